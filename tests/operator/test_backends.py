"""The backends that can run here, the choice of one for a call, and the words of a refusal."""

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from documentation import support_table
from places import ROOT
from support import BACKENDS, backends_module

import clinattn
from clinattn import fused_attention
from clinattn.backends import compiled

Q = torch.randn(1, 2, 5, 8)


@pytest.fixture
def fresh(monkeypatch):
    """The backends module with nothing chosen or warned about yet."""

    def clear():
        for cached in ("_select", "_load", "_warn_once"):
            getattr(backends_module, cached).cache_clear()
        backends_module.triton.triton_error.cache_clear()

    monkeypatch.delenv("CLINATTN_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    clear()
    yield monkeypatch
    monkeypatch.undo()
    clear()


@pytest.fixture
def no_extension(fresh):
    fresh.setattr(compiled, "extension_error", "the compiled module does not load (gone)")
    return fresh


def chosen(device="cpu", dtype=torch.float32, name=""):
    return backends_module._select(name, torch.device(device), dtype).name


def test_every_backend_is_listed():
    status = clinattn.backends()
    assert list(status) == ["triton", "cuda", "cpu", "reference"]
    assert status["reference"] and status["reference"].reasons == ()
    text = repr(status)
    assert "reference  usable" in text
    if torch.version.cuda is None:
        assert not status["cuda"]
        assert f"cuda       not usable: torch {torch.__version__} is built without CUDA; " in text


WITH_OTHER_ARGUMENTS = """
from pathlib import Path
import torch
read = Path.read_bytes
Path.read_bytes = lambda path: read(path).replace(b"double dropout_p, ", b"int64_t dropout, ")
import clinattn
from clinattn.backends.compiled import compiled_module
q = torch.randn(1, 2, 5, 8)
try:
    clinattn.fused_attention(q, q, q, backend="cpu")
except RuntimeError as error:
    print(error)
registered = torch._C._dispatch_has_kernel_for_dispatch_key("clinattn::cpu_forward", "CPU")
print(clinattn.backends()["cpu"], compiled_module(), registered)
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled backend is not built here")
def test_a_library_with_other_arguments_is_not_loaded(tmp_path):
    command = [sys.executable, "-c", WITH_OTHER_ARGUMENTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    why = "was built from another version; with a C++ compiler"
    refused, said = done.stdout.splitlines()
    assert f"backend 'cpu' cannot be used: the compiled module clinattn._C {why}" in refused
    assert why in said and said.endswith("None False"), done.stderr


def test_an_extension_module_of_an_earlier_version_is_not_loaded(monkeypatch):
    spec = importlib.util.spec_from_file_location("clinattn._C", "_C.cpython-311.so")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    why = "the compiled module clinattn._C was built from another version"
    assert compiled.load() == (None, why)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled backend is not built here")
def test_the_module_names_all_it_was_built_with():
    info = importlib.import_module("clinattn._C").build_info()
    assert info["torch"] == "2.11 or newer"
    usable = importlib.import_module("clinattn._C").instruction_sets()
    assert set(usable) <= set(info["instruction_sets"].split())
    units = {path.stem.removeprefix("isa_") for path in ROOT.glob("csrc/cpu/isa_*.cpp")}
    assert set(info["instruction_sets"].split()) <= units


def test_cpu_tensors_get_the_compiled_backend(fresh):
    assert chosen() == ("cpu" if "cpu" in BACKENDS else "reference")


def test_reference_is_the_last_resort_with_one_warning(no_extension):
    with pytest.warns(RuntimeWarning, match="slow reference.*does not load.*pip install") as seen:
        fused_attention(Q, Q, Q)
        fused_attention(Q, Q, Q)
        fused_attention(Q.double(), Q.double(), Q.double())
    assert len(seen) == 1
    assert not clinattn.backends()["cpu"]


def test_asking_for_reference_does_not_warn(no_extension):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_attention(Q, Q, Q, backend="reference")


def test_a_backend_asked_for_runs_or_raises(no_extension):
    for backend, match in (
        ("cpu", "'cpu' cannot be used: the compiled module does not load .gone.; with a C.."),
        ("cuda", "'cuda' cannot be used: it serves CUDA tensors, and these are on cpu"),
        ("triton", "'triton' cannot be used: "),
    ):
        with pytest.raises(RuntimeError, match=match):
            fused_attention(Q, Q, Q, backend=backend)


def test_the_environment_forces_a_backend(fresh):
    fresh.setenv("CLINATTN_BACKEND", "reference")
    assert backends_module.implementation("", Q).name == "reference"
    fresh.setenv("CLINATTN_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' cannot be used"):
        fused_attention(Q, Q, Q)
    assert backends_module.implementation("reference", Q).name == "reference"
    fresh.setenv("CLINATTN_BACKEND", "gpu")
    with pytest.raises(ValueError, match="got 'gpu', expected one of triton, cuda, cpu, ref"):
        fused_attention(Q, Q, Q)


def test_cuda_tensors_get_triton_unless_the_card_is_too_old(fresh):
    fresh.setattr(backends_module.triton, "triton_error", lambda: None)
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert chosen("cuda:0") == "triton"
    with pytest.warns(RuntimeWarning, match="it does not serve torch.float64"):
        assert chosen("cuda:0", torch.float64) == "reference"
    with pytest.raises(NotImplementedError, match="'triton' does not serve torch.float64; these"):
        chosen("cuda:0", torch.float64, "triton")
    with pytest.raises(RuntimeError, match="'cpu' cannot be used: .*these are on cuda:0"):
        chosen("cuda:0", name="cpu")
    fresh.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.warns(RuntimeWarning, match="compute capability 7.5 < 8.0"):
        assert chosen("cuda:1") == "reference"


@pytest.fixture
def card(fresh):
    """A machine with one card, and a module that was built with CUDA kernels for some cards."""

    def make(capability, archs="7.5,8.0,8.6"):
        fresh.setattr(torch.version, "cuda", "13.0")
        fresh.setattr(torch.cuda, "is_available", lambda: True)
        fresh.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        fresh.setattr(compiled, "extension_error", None)
        fresh.setattr(compiled, "build_info", {"cuda_archs": archs} if archs else {})
        return fresh

    return make


def test_cuda_kernels_serve_where_triton_does_not(card):
    without_triton = card((7, 5))
    without_triton.setitem(sys.modules, "triton", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen("cuda:0") == "cuda"
        assert chosen("cuda:0", torch.bfloat16) == "cuda"
    assert chosen("cuda:0", name="cuda") == "cuda"
    with pytest.raises(NotImplementedError, match="'cuda' does not serve torch.float64; these"):
        chosen("cuda:0", torch.float64, "cuda")
    gradients, tensor = backends_module.GRADIENTS, (torch.device("cuda:0"), torch.float32)
    assert backends_module._select("", *tensor, gradients, True).name == "cuda"
    some = backends_module.Serves(forward=(), backward=gradients[:2])
    without_triton.setitem(backends_module.SERVES, "cuda", some)
    backends_module._select.cache_clear()
    with pytest.warns(RuntimeWarning, match="cuda: it does not serve the gradient of alibi_slopes"):
        assert backends_module._select("", *tensor, gradients, True).name == "reference"


def test_cuda_kernels_serve_cards_too_old_for_triton(card):
    card((7, 5)).setattr(backends_module.triton, "triton_error", lambda: None)
    assert chosen("cuda:0") == "cuda"
    card((8, 0))
    backends_module._select.cache_clear()
    assert chosen("cuda:0") == "triton"
    assert chosen("cuda:0", name="cuda") == "cuda"


def test_cuda_tensors_with_neither_triton_nor_the_extension(card):
    card((8, 0), archs=None).setitem(sys.modules, "triton", None)
    words = "slow reference.* on cuda. triton: .*pip install triton. cuda: .*CLINATTN_CUDA=1 pip"
    with pytest.warns(RuntimeWarning, match=words) as seen:
        assert chosen("cuda:0") == chosen("cuda:1") == "reference"
        assert chosen("cuda:0", torch.bfloat16) == "reference"
    assert len(seen) == 1


@pytest.mark.parametrize(
    "capability, archs, served",
    [
        ((8, 0), "8.0", True),
        ((8, 6), "8.0", True),
        ((8, 0), "8.6", False),
        ((9, 0), "7.5,8.0", False),
        ((9, 0), "7.5,8.0+PTX", True),
        ((12, 0), "9.0+PTX", True),
        ((8, 0), "7.5+PTX", False),
        ((8, 9), "7.5,9.0+PTX", False),
        ((7, 0), "7.0+PTX", False),
    ],
)
def test_cards_that_the_extension_was_compiled_for(card, capability, archs, served):
    card(capability, archs)
    reasons = backends_module.reasons_against("cuda", torch.device("cuda:0"))
    assert bool(reasons) != served
    if not served:
        need = "7.0 < 7.5" if capability < (7, 5) else "TORCH_CUDA_ARCH_LIST="
        assert need in reasons[0]


def test_cuda_status_says_what_was_verified(card):
    fresh = card((8, 0))
    assert repr(clinattn.backends()["cuda"]) == "usable (compiled, not yet verified on this card)"
    fresh.setattr(backends_module.cuda, "VERIFIED", frozenset([(8, 0)]))
    assert repr(clinattn.backends()["cuda"]) == "usable (compiled, verified on such a card)"


@pytest.mark.parametrize(
    "nvcc, words",
    [(None, "the CUDA toolkit 13.0 .nvcc. and a C"), ("/usr/bin/nvcc", "built without its CUDA")],
)
def test_what_to_install_for_the_cuda_kernels(card, nvcc, words):
    card((8, 0), archs=None).setattr(shutil, "which", lambda name: nvcc)
    (reason,) = clinattn.backends()["cuda"].reasons
    assert re.search(words, reason)
    assert ("toolkit" in reason) == (nvcc is None)


def test_rotary_of_cuda_tensors_without_triton(card):
    card((8, 0)).setitem(sys.modules, "triton", None)
    rotary_op = importlib.import_module("clinattn.operator.rotary_op")
    assert rotary_op._load(chosen("cuda:0")) is rotary_op.reference_rotary


def test_triton_on_cpu_tensors_needs_the_interpreter(fresh):
    fresh.setattr(backends_module.triton, "triton_error", lambda: None)
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="serves CUDA tensors, and these are on cpu; TRITON_INT"):
        chosen(name="triton")
    fresh.setenv("TRITON_INTERPRET", "1")
    assert backends_module.reasons_against("triton", torch.device("cpu")) == []
    assert chosen() != "triton"


@pytest.fixture
def plain_cpu(fresh):
    """A CPU backend that serves no more than masks, windows and lengths."""
    fresh.setattr(compiled, "extension_error", None)
    fresh.setitem(backends_module.SERVES, "cpu", backends_module.Serves((), ()))
    return fresh


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled backend")
def test_an_argument_that_a_backend_does_not_serve(plain_cpu):
    mask = torch.zeros(5, 5, requires_grad=True)
    with pytest.raises(NotImplementedError, match="'cpu' does not serve softcap; these.*reference"):
        fused_attention(Q, Q, Q, softcap=3.0, backend="cpu")
    with pytest.raises(NotImplementedError, match="global_prefix, dropout_p; these do"):
        fused_attention(Q, Q, Q, dropout_p=0.1, global_prefix=1, backend="cpu")
    o = fused_attention(Q, Q, Q, mask, backend="cpu")
    with pytest.raises(NotImplementedError, match="the gradient of attn_mask in the backward pass"):
        o.sum().backward()
    with pytest.warns(RuntimeWarning, match="cpu: it does not serve softcap") as seen:
        for _ in range(3):
            fused_attention(Q, Q, Q, softcap=3.0)
    assert len(seen) == 1


def test_tables_name_features_only():
    assert set(backends_module.SERVES) == set(backends_module.NAMES)
    for served in backends_module.SERVES.values():
        known = {*backends_module.FEATURES, backends_module.SUMMARIES}
        assert set(served.forward) | set(served.backward) <= known
    assert set(backends_module.SERVES["reference"].backward) == set(backends_module.FEATURES)


def test_the_documentation_shows_the_table():
    page = (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")
    assert f"\n\n{support_table()}\n\n" in page


def test_another_backend_behind_a_name(fresh):
    double = backends_module.cpu.BACKEND._replace(
        reasons_against=lambda device: [],
        load=lambda: backends_module._load("reference")._replace(name="double"),
        notes=lambda: ("a double",),
    )
    before = backends_module.register(double)
    try:
        assert chosen() == chosen(name="cpu") == "double"
        assert repr(clinattn.backends()["cpu"]) == "usable (a double)"
    finally:
        assert backends_module.register(before) is double
    assert chosen() != "double" and not clinattn.backends()["cpu"].notes


def test_without_triton(fresh):
    fresh.setitem(sys.modules, "triton", None)
    assert "pip install triton" in clinattn.backends()["triton"].reasons[0]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"] or ["reference"])
def test_the_environment_is_read_at_start(backend):
    """From a shell: CLINATTN_BACKEND=... python script.py."""
    script = (
        "import torch, importlib, clinattn\n"
        "module = importlib.import_module('clinattn.backends.select')\n"
        "print(module.implementation('', torch.ones(1)).name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"CLINATTN_BACKEND": backend, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == backend
