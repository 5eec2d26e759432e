"""Triton's interpreter without work that it repeats; importing this makes it so.

For a launch the interpreter puts functions of its own into the modules triton.language and
triton.language.core, those that a function sees, and does so again at each call of a device
function: half the time of a kernel of small tiles. Once a launch is enough.
"""

import functools
import inspect

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
