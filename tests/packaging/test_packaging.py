"""The files of an install: clinattn alone, with or without the kernels."""

import os
import re
import shutil
import sys
import zipfile
from email.parser import HeaderParser
from importlib.metadata import packages_distributions

import pytest
import setuptools
import torch
from building import cuda, extension, flags
from installs import copy_repository, run
from places import ROOT

BLOCK_OPTIONAL_MODULES = """
import sys
for name in ("triton", "clinattn._C", "numpy", "pyarrow", "typer", "matplotlib"):
    sys.modules[name] = None
import clinattn
assert "cpu" in clinattn.backends() and not clinattn.backends()["cpu"]
"""
CALL_ON_THE_REFERENCE = """
import warnings
import torch
import clinattn
print(clinattn.__file__)
q = torch.randn(1, 2, 5, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out = clinattn.fused_attention(q, q, q)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))
messages = [str(w.message) for w in caught if "clinattn" in str(w.message)]
assert len(messages) == 1 and "C++ compiler" in messages[0], messages
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, so that a build here touches nothing of the repository."""
    folder = tmp_path_factory.mktemp("tree")
    copy_repository(folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tree):
    """The wheel that pip builds where CLINATTN_SKIP_EXT=1 asks for no kernels."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", "dist", ".", cwd=tree, CLINATTN_SKIP_EXT="1")
    (path,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def files(folder):
    """Paths within a folder, without the bytecode that Python leaves where it has run."""
    paths = (x for x in folder.rglob("*") if x.is_file() and x.parent.name != "__pycache__")
    return {path.relative_to(folder).as_posix() for path in paths}


def test_the_wheel_holds_clinattn_and_nothing_beside_it(tree, wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    kernels = {f"clinattn/kernels/{name}" for name in files(tree / "kernels")}
    assert names == {f"clinattn/{name}" for name in files(tree / "clinattn")} | kernels
    (top_level,) = (name for name in wheel.namelist() if name.endswith("/top_level.txt"))
    assert wheel.read(top_level).decode().split() == ["clinattn"]


def test_a_wheel_with_the_library_is_named_for_the_platform_alone():
    library = setuptools.Extension("clinattn.libclinattn", [])
    distribution = setuptools.Distribution({"name": "clinattn", "ext_modules": [library]})
    wheel = extension.Wheel(distribution)
    wheel.ensure_finalized()
    python, abi, platform = wheel.get_tag()
    assert (python, abi) == ("py3", "none") and platform != "any"


def test_the_requirements_leave_triton_to_torch(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    headers = HeaderParser().parsestr(wheel.read(metadata).decode())
    requirements = [r for r in headers.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(r.split(";")[0].strip() for r in requirements) == ["torch>=2.11", "triton"]
    assert headers["Requires-Python"] == ">=3.10"


def test_without_kernels_the_reference_backend_serves(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    # -S: the finder of an editable install would serve this tree's own compiled module.
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    done = run(sys.executable, "-S", "-c", CALL_ON_THE_REFERENCE, cwd=tmp_path, PYTHONPATH=path)
    assert done.stdout.startswith(str(tmp_path / "site"))


BROKEN_COMPILER = """#!/bin/sh
case "$*" in *isa_*.cpp*) echo "this compiler is broken" >&2; exit 3;; esac
exec c++ "$@"
"""


@pytest.fixture
def make(tree, tmp_path):
    """`make setup` in the tree, in an environment that is complete but for the extension."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for name in (".made", ".torch", ".installed"):
        (tmp_path / "venv" / name).write_text("torch\n")
    broken = tmp_path / "broken++"
    broken.write_text(BROKEN_COMPILER)
    broken.chmod(0o755)
    command = ["make", "setup", "TORCH=torch", f"VENV={tmp_path / 'venv'}"]
    return lambda **settings: run(*command, cwd=tree, check=False, CXX=str(broken), **settings)


def test_make_stops_where_the_build_fails(make, tree):
    older = tree / "clinattn" / "_C.older.so"
    older.touch()
    done = make()
    assert done.returncode, done.stdout
    assert "this compiler is broken" in done.stdout + done.stderr
    assert "CLINATTN_SKIP_EXT=1 with the same command, for the slow reference" in done.stderr
    assert not older.exists(), done.stderr
    done = make(CLINATTN_SKIP_EXT="1")
    assert not done.returncode, done.stderr
    assert make().returncode, "the extension was left out, not built"


@pytest.fixture
def cuda_here(monkeypatch):
    """build_support.cuda on a machine with a CUDA build of torch, nvcc 13.0 and no card."""
    said = {"--version": "release 13.0, V13.0.88", "--list-gpu-arch": EVERY_ARCH}
    for name in ("CLINATTN_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(cuda, "nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    monkeypatch.setattr(cuda, "nvcc_says", lambda *options: said[options[0]])


EVERY_ARCH = "".join(f"compute_{x}\n" for x in (75, 80, 86, 87, 89, 90, 100, 103, 120))
ARCH_LISTS = [
    (None, "7.5 8.0 8.6 9.0 10.0 12.0+PTX"),
    ("8.0;9.0+PTX", "8.0 9.0+PTX"),
    ("9.0a 7.5", "7.5 9.0"),
    ("Turing;10.0", "7.5+PTX 10.0"),
    ("7.0;12.0+PTX", "12.0+PTX"),
]


@pytest.mark.parametrize("listed, expected", ARCH_LISTS, ids=lambda x: str(x).replace(" ", ","))
def test_cards_that_are_compiled_for(cuda_here, monkeypatch, listed, expected):
    if listed is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert cuda.cuda_archs() == expected.split()
    assert cuda.wants_cuda()


def test_cards_that_are_visible_are_compiled_for(cuda_here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: [(8, 0), (7, 5)][i])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    assert cuda.cuda_archs() == ["7.5", "8.0+PTX"]


def test_an_older_nvcc_is_not_asked_for_newer_cards(cuda_here, monkeypatch):
    monkeypatch.setattr(cuda, "nvcc_says", lambda *_: EVERY_ARCH.split("compute_100")[0])
    assert cuda.cuda_archs() == ["7.5", "8.0", "8.6", "9.0+PTX"]


def test_flags_of_nvcc():
    assert cuda.gencode("8.6") == ["-gencode=arch=compute_86,code=sm_86"]
    assert cuda.gencode("10.0+PTX") == [
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.parametrize(
    "reason, change",
    [
        ("is built without CUDA", lambda to: to.setattr(torch.version, "cuda", None)),
        ("toolkit 13.0", lambda to: to.setattr(cuda, "nvcc", lambda: None)),
        ("release 13.0, and .* 12.8", lambda to: to.setattr(torch.version, "cuda", "12.8")),
        ("older than .* 7.5", lambda to: to.setenv("TORCH_CUDA_ARCH_LIST", "7.0")),
    ],
)
def test_without_cuda_the_rest_is_built(cuda_here, monkeypatch, capsys, reason, change):
    change(monkeypatch)
    assert not cuda.wants_cuda()
    assert re.search(reason, cuda.cuda_missing())
    monkeypatch.setenv("CLINATTN_CUDA", "1")
    with pytest.raises(SystemExit, match=f"CLINATTN_CUDA=1, but .*{reason}"):
        cuda.wants_cuda()


def test_the_environment_decides_on_cuda(cuda_here, monkeypatch):
    monkeypatch.setenv("CLINATTN_CUDA", "0")
    assert not cuda.wants_cuda()
    monkeypatch.setenv("CLINATTN_CUDA", "yes")
    with pytest.raises(SystemExit, match="CLINATTN_CUDA is 'yes'; expected 0 or 1"):
        cuda.wants_cuda()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_torch_side_of_cuda_compiles(tmp_path):
    used = run("nvcc", "--dryrun", "-x", "cu", os.devnull, cwd=tmp_path).stderr
    folders = re.findall(r'"-I([^"]+)"', used)
    options = [*flags.torch_flags(), "-fsyntax-only", "-Wall", "-DUSE_CUDA"]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    run("c++", *options, *(f"-isystem{folder}" for folder in folders), *sources, cwd=tmp_path)


def test_no_module_named_kernels_is_installed(tmp_path):
    code = "from importlib.util import find_spec; spec = find_spec('kernels'); print(spec)"
    assert str(ROOT) not in run(sys.executable, "-c", code, cwd=tmp_path).stdout
    assert "clinattn" not in packages_distributions().get("kernels", [])
    assert str(ROOT) not in sys.path


def test_kernels_are_installed_as_a_subpackage(tmp_path):
    code = "import clinattn.kernels; print(clinattn.kernels.__file__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).stdout.strip().endswith("__init__.py")


def test_import_needs_torch_alone(tmp_path):
    run(sys.executable, "-c", BLOCK_OPTIONAL_MODULES, cwd=tmp_path)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_an_instruction_set_unit_shares_no_code_with_another():
    """A shared inline function compiled with AVX-512 could be linked in on a machine without it."""
    folders = ("build/*-*", "build/compilers/*/build/*-*")  # those of platforms
    objects = [path for folder in folders for path in ROOT.glob(f"{folder}/isa_*.o")]
    if not objects:
        pytest.skip("the compiled backend is not built here")
    for path in objects:
        symbols = [line.split() for line in run("nm", path, cwd=ROOT).stdout.splitlines()]
        assert not [name for *_, kind, name in symbols if kind in "WVu"], path
