"""Triton's interpreter without work that it repeats; importing this makes it so.

For a launch the interpreter puts functions of its own into the modules triton.language and
triton.language.core, those that a function sees, and does so again at each call of a device
function: half the time of a kernel of small tiles. Once a launch is enough.

For each operation it makes a type with its shape in two forms, and a table of numpy's types: a
third of what is left. All values of one type share these, which nobody changes.

For operands of one type, the most frequent ones, it works out the common type and shape as for any
others. And it computes every sum and product of integers twice, the second time in 64 bits to see
whether the first overflows: a quarter of what is left. `overflow_checks()` asks for that.
"""

import dataclasses
import functools
import inspect
import math
from contextlib import contextmanager

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

patch_again, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
patched = set()


@functools.cache
def modules_of(fn):
    seen = [x for x in fn.__globals__.values() if inspect.ismodule(x)]
    return frozenset(x.__name__ for x in seen if x in (tl, tl.core))


def patch(fn):
    if (modules := modules_of(fn)) <= patched:
        return interpreter._LangPatchScope()
    patched.update(modules)
    return patch_again(fn)


def launch_anew(self, *arguments, **keywords):
    patched.clear()
    return launch(self, *arguments, **keywords)


interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch_anew


@functools.cache
def shape_of(sizes):
    """(shape of a block type, number of elements, shape of a tensor, name) of sizes in int."""
    shape = tl.tuple(sizes)
    as_tensor = tl.tuple([tl.constexpr(x) for x in sizes])
    shared[id(shape)] = shape, math.prod(sizes), as_tensor, f"<{list(sizes)}, "
    return shared[id(shape)]


def make_block_type(self, element_ty, shape):
    if (found := shared.get(id(shape))) is None:
        sizes = tuple(x.value if isinstance(x, tl.constexpr) else x for x in shape)
        if sizes not in valid:
            make_checked(self, element_ty, shape)
            valid.add(sizes)
        found = shape_of(sizes)
    self.element_ty = element_ty
    self.shape, self.numel, self.tensor_shape, name = found
    self.name = f"{name}{element_ty}>"


def make_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    if type.is_block():
        self.shape, self.numel = type.tensor_shape, tl.constexpr(type.numel)
    else:
        self.shape, self.numel = NO_SHAPE, ONE


shared = {}  # by the id of a shape that shape_of holds
valid, make_checked = set(), tl.block_type.__init__
NO_SHAPE, ONE = tl.tuple([]), tl.constexpr(1)
tl.block_type.__init__, tl.tensor.__init__ = make_block_type, make_tensor
numpy_type = functools.cache(interpreter._get_np_dtype)
numpy_type_of_pointers = interpreter._get_np_dtype(tl.pointer_type(tl.int8))
interpreter._get_np_dtype = lambda of: (
    numpy_type_of_pointers if of.scalar.is_ptr() else numpy_type(of.scalar)
)


def cast(self, value, dtype, *rounding):
    if value.type.scalar is dtype.scalar:
        return value
    return cast_any(self, value, dtype, *rounding)


def in_one_shape(self, a, b):
    """Two operands of one type, two scalars, and two blocks of one shape stay as they are."""
    if a.type is b.type or (a.shape is b.shape and a.type.is_block() == b.type.is_block()):
        return a, b
    return in_one_shape_any(self, a, b)


def in_one_type(self, a, b, *checks, **keywords):
    """Two numbers of one type keep it, unless they are divided: `div_or_mod`, the last check."""
    divided = len(checks) > 3 or "div_or_mod" in keywords
    alike = type(a) is tl.tensor and type(b) is tl.tensor and a.dtype is b.dtype
    if alike and type(a.dtype) is tl.dtype and not divided:
        return in_one_shape(self, a, b)
    return in_one_type_any(self, a, b, *checks, **keywords)


cast_any, TritonSemantic.cast = TritonSemantic.cast, cast
in_one_shape_any = TritonSemantic.broadcast_impl_value
TritonSemantic.broadcast_impl_value = in_one_shape
in_one_type_any = TritonSemantic.binary_op_type_checking_impl
TritonSemantic.binary_op_type_checking_impl = in_one_type


@contextmanager
def overflow_checks(on=True):
    """The interpreter raises AssertionError where a sum or product leaves its integer type."""
    builder = interpreter.interpreter_builder
    before = builder.options
    builder.options = dataclasses.replace(before, sanitize_overflow=on)
    yield
    builder.options = before


overflow_checks(False).__enter__()
