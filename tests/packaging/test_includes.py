"""Each C++ file includes what it uses, so that every compiler and standard library takes it.

What a header of the standard library brings besides its own names differs between them: GCC 12's
<atomic> declares std::initializer_list, that of GCC 13 does not.
"""

import os
import re
import shlex
import shutil
import subprocess

import pytest
from building import flags as build_flags
from building import toolchain
from compilers import on_the_path
from places import LIB, ROOT

CSRC = ROOT / "csrc"
FILES = sorted(
    path
    for folder in (CSRC, LIB / "csrc")
    for path in folder.rglob("*")
    if path.suffix in (".h", ".cuh", ".cpp", ".cu")
)
HEADERS = [path for path in FILES if path.suffix == ".h" and CSRC in path.parents]

# The header of each name of the standard library; one of several where they all declare it.
DECLARED_IN = {
    "algorithm": "clamp copy copy_n max min max_element find_if is_sorted sort stable_sort reverse "
    "shuffle push_heap pop_heap",
    "array": "array",
    "atomic": "atomic memory_order_acquire memory_order_release memory_order_relaxed",
    "bit": "bit_cast",
    "chrono": "chrono",
    "concepts": "convertible_to same_as",
    "cmath": "abs exp2 isinf logb nearbyint pow",
    "cstdlib": "aligned_alloc atoi free getenv",
    "cstring": "memset memcpy",
    "exception": "exception",
    "functional": "function greater",
    "initializer_list": "initializer_list",
    "limits": "numeric_limits",
    "map": "map",
    "memory": "unique_ptr",
    "numeric": "accumulate iota",
    "optional": "nullopt optional",
    "ostream": "ostream",
    "random": "minstd_rand",
    "source_location": "source_location",
    "sstream": "ostringstream",
    "stdexcept": "invalid_argument runtime_error",
    "string": "string to_string",
    "thread": "thread this_thread",
    "tuple": "tuple",
    "type_traits": "common_type_t conditional_t is_const_v is_reference_v is_same_v remove_cvref_t",
    "utility": "move pair",
    "vector": "vector erase_if",
}
HEADERS_OF = {
    f"std::{name}": (header,) for header, names in DECLARED_IN.items() for name in names.split()
}
WORDS = {
    r"(?<![\w:])mem(?:cpy|set)\(": ("string.h", "cstring"),
    r"\bfor \([^;]*: \{": ("initializer_list",),  # a loop over a list in braces
}
# Types that a file of the project may bring, since its own declarations have them.
TYPES = {
    r"(?<!\w)__m(?:128|256|512)": ("immintrin.h",),
    r"(?<!\w)u?int(?:8|16|32|64)_t\b": ("cstdint", "stdint.h"),
    r"(?<!\w)size_t\b": ("cstddef", "stddef.h"),
}


def code_of(path):
    return re.sub(r"//.*", "", path.read_text())


def named_by(path):
    """The headers in angle brackets that a file includes, and the files of the project."""
    text = path.read_text()
    own = re.findall(r'^ *#include "([^"]+)"', text, re.MULTILINE)
    folders = [path.parent, CSRC, LIB / "csrc"]
    found = [next((d / x for d in folders if (d / x).exists()), None) for x in own]
    return set(re.findall(r"^ *#include <([^>]+)>", text, re.MULTILINE)), list(filter(None, found))


def reached_from(path):
    """The headers in angle brackets that a file includes itself or by files of the project."""
    seen, waiting, brackets = set(), [path.resolve()], set()
    while waiting:
        at = waiting.pop()
        if at not in seen:
            seen.add(at)
            more, files = named_by(at)
            brackets |= more
            waiting += [x.resolve() for x in files]
    return brackets


def needs_torch(path):
    return any(x.startswith(("ATen/", "torch/", "c10/")) for x in reached_from(path))


@pytest.mark.parametrize("path", FILES, ids=lambda x: str(x.relative_to(ROOT)))
def test_a_file_includes_the_header_of_each_name(path):
    code = code_of(path)
    direct = named_by(path)[0]
    own_header = path.with_suffix(".h")
    if path.suffix == ".cpp" and own_header in named_by(path)[1]:
        direct |= named_by(own_header)[0]
    missing = {
        (name, headers)
        for name in set(re.findall(r"std::[a-z_0-9]+", code))
        if direct.isdisjoint(headers := HEADERS_OF.get(name, ()))
    }
    missing |= {
        (found[0], headers)
        for pattern, headers in WORDS.items()
        if (found := re.search(pattern, code)) and direct.isdisjoint(headers)
    }
    reached = reached_from(path)
    missing |= {
        (found[0], headers)
        for pattern, headers in TYPES.items()
        if (found := re.search(pattern, code)) and reached.isdisjoint(headers)
    }
    assert not missing


def flags_of(path):
    """The flags of the instruction set that a header is written for."""
    sets = {"amx": "amx", "bf16": "avx512_bf16", "dot": "avx512_bf16", "avx512": "avx512"}
    for word, name in (sets | {"avx2": "avx2"}).items():
        if word in path.stem:
            return build_flags.ISA_FLAGS[name]
    return []


def compilers():
    """The compiler of the build and, with CLINATTN_TESTS=every, every other on PATH."""
    used = [shlex.join(toolchain.compiler())] if shutil.which(toolchain.compiler()[0]) else []
    return used + (on_the_path() if os.environ.get("CLINATTN_TESTS") == "every" else [])


def complaints(paths, flags, folder):
    """The messages of the compiler CXX for files that include a single header each."""
    sources = []
    for path in paths:
        source = folder / f"{path.stem}.cpp"
        source.write_text(f'#include "{path}"\n')
        sources.append(source)
    options = [*build_flags.isa_common_flags(), *flags, "-fsyntax-only", f"-I{CSRC}"]
    command = [*toolchain.compiler(), *options, *sources]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.parametrize("compiler", compilers())
@pytest.mark.parametrize("flags", [*build_flags.ISA_FLAGS.values()], ids=[*build_flags.ISA_FLAGS])
def test_a_header_compiles_alone(compiler, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    paths = [path for path in HEADERS if not needs_torch(path) and flags_of(path) == flags]
    paths = [path for path in paths if path.parent.name != "cuda"]
    assert paths or not flags
    assert not complaints(paths, flags, tmp_path)


@pytest.mark.parametrize("compiler", compilers())
def test_a_header_that_includes_torch_compiles_alone(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    paths = [path for path in HEADERS if needs_torch(path) and path.parent.name != "cuda"]
    assert not complaints(paths, ["-fexceptions", *build_flags.torch_flags()], tmp_path)
