"""Triton's interpreter without work that it repeats; importing this makes it so.

For a launch the interpreter puts functions of its own into the modules triton.language and
triton.language.core, those that a function sees, and does so again at each call of a device
function: half the time of a kernel of small tiles. Once a launch is enough.

For each operation it makes a type with its shape in two forms, and a table of numpy's types: a
third of what is left. All values of one type share these, which nobody changes.
"""

import functools
import inspect
import math

import triton.language as tl
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
    """(shape of a block type, number of elements, shape of a tensor) of sizes in int."""
    return tl.tuple(sizes), math.prod(sizes), tl.tuple([tl.constexpr(x) for x in sizes])


def make_block_type(self, element_ty, shape):
    sizes = tuple(x.value if isinstance(x, tl.constexpr) else x for x in shape)
    if sizes not in valid:
        make_checked(self, element_ty, shape)
        valid.add(sizes)
    self.element_ty = element_ty
    self.shape, self.numel, self.tensor_shape = shape_of(sizes)
    self.name = f"<{list(sizes)}, {element_ty}>"


def make_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    if type.is_block():
        self.shape, self.numel = type.tensor_shape, tl.constexpr(type.numel)
    else:
        self.shape, self.numel = NO_SHAPE, ONE


valid, make_checked = set(), tl.block_type.__init__
NO_SHAPE, ONE = tl.tuple([]), tl.constexpr(1)
tl.block_type.__init__, tl.tensor.__init__ = make_block_type, make_tensor
numpy_type = functools.cache(interpreter._get_np_dtype)
numpy_type_of_pointers = interpreter._get_np_dtype(tl.pointer_type(tl.int8))
interpreter._get_np_dtype = lambda of: (
    numpy_type_of_pointers if of.scalar.is_ptr() else numpy_type(of.scalar)
)
