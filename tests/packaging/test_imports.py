"""What importing clinattn needs and does, in fresh interpreters."""

import ast
import subprocess
import sys

import pytest
from places import ROOT

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED or name in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""


def run(script, tmp_path, blocked=()):
    code = f"BLOCKED = {set(blocked)!r}\n{BLOCK}\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "blocked", [("triton",), ("clinattn._C",), ("triton", "clinattn._C", "numpy")], ids=str
)
def test_attention_without(blocked, tmp_path):
    """Every optional part may be missing: calls still work, and backends() says what is."""
    script = """
import torch, warnings, clinattn
status = clinattn.backends()
warnings.simplefilter("ignore")
q = torch.randn(1, 2, 5, 8, requires_grad=True)
o = clinattn.fused_attention(q, q, q)
o.sum().backward()
torch.testing.assert_close(o, torch.nn.functional.scaled_dot_product_attention(q, q, q))
print(status)
"""
    out = run(script, tmp_path, blocked)
    assert "reference  usable" in out
    assert "triton     not usable" in out
    if "clinattn._C" in blocked:
        assert "cpu        not usable: the compiled module clinattn._C does not load" in out


def test_import_is_light(tmp_path):
    """No compiler and no optional dependency before it is used."""
    script = """
import torch
before = set(sys.modules)
import clinattn
print(*{name.split(".")[0] for name in set(sys.modules) - before})
print("torch._dynamo" in sys.modules or "torch._inductor" in sys.modules)
"""
    packages, compilers = run(script, tmp_path).splitlines()
    optional = {"numpy", "triton", "typer", "rich", "matplotlib", "pyarrow"}
    assert not optional & set(packages.split())
    assert compilers == "False"


@pytest.mark.parametrize("first", ["import clinattn", "import torch.utils.flop_counter"])
def test_flops_are_counted_whichever_comes_first(first, tmp_path):
    script = f"""
{first}
import sys, clinattn, torch
hooks = len(sys.meta_path)
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(1, 2, 5, 8)
with FlopCounterMode(display=False) as counter:
    clinattn.fused_attention(q, q, q)
module = sys.modules["torch.utils.flop_counter"]
print(counter.get_total_flops(), hooks - len(sys.meta_path), type(module.__loader__).__name__)
print(module.__spec__.loader is module.__loader__)
"""
    waited = "1" if first == "import clinattn" else "0"
    expected = [str(4 * 2 * 25 * 8), waited, "SourceFileLoader", "True"]
    assert run(script, tmp_path).split() == expected


def test_there_is_no_top_level_kernels(tmp_path):
    """A package of that name on PyPI would be shadowed by it."""
    script = """
import importlib.util, clinattn
print(importlib.util.find_spec("kernels"))
print(importlib.util.find_spec("clinattn.kernels") is not None)
"""
    assert run(script, tmp_path, ()).splitlines() == ["None", "True"]


# What a module may import of the package; imports run one way.
LAYERS = {
    "arguments": set(),
    "visibility": {"arguments"},
    "philox": set(),
    "blocks": {"arguments"},
    "scores": {"arguments", "blocks", "philox"},
    "reference": {"arguments", "blocks", "scores"},
    "compiled": set(),
    "cuda_kernels": set(),
    "backends": {"arguments", "compiled", "cuda_kernels", "kernels", "reference"},
    "scalars": set(),
    "checks": {"backends", "scalars", "visibility"},
    "packing": {"checks", "scalars", "visibility"},
    "ranges": set(),
    "after_import": set(),
    "flops": {"arguments", "visibility"},
    "ops": {"after_import", "arguments", "backends", "ranges", "reference"},
    "timeline": set(),
    "relative": {"checks", "scalars"},
    "feature_checks": {"checks", "scalars", "timeline", "visibility"},
    "features": {"feature_checks", "timeline"},
    "autograd": set(),
    "functions": {
        "arguments", "autograd", "checks", "feature_checks", "ops", "scalars", "visibility",
    },
    "attention": {"checks", "features", "functions", "scalars", "visibility"},
    "rotary_op": {"backends", "ops"},
    "rotary": {"autograd", "checks", "rotary_op", "scalars", "timeline", "visibility"},
}  # fmt: skip


def imported(path):
    """Names of the package's modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        names |= {m.split(".")[1] for m in modules if m.startswith("clinattn.")}
    return names


@pytest.mark.parametrize("module", LAYERS)
def test_imports_run_one_way(module):
    assert imported(ROOT / "clinattn" / f"{module}.py") <= LAYERS[module]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_nothing_of_the_package(path):
    assert imported(path) == set()
