"""The needs and effects of importing clinattn, in fresh interpreters."""

import ast
import graphlib
import re
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
    """Importing loads no compiler and no optional dependency before its use."""
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
    """A top-level module `kernels` would shadow the package of that name on PyPI."""
    script = """
import importlib.util, clinattn
print(importlib.util.find_spec("kernels"))
print(importlib.util.find_spec("clinattn.kernels") is not None)
"""
    assert run(script, tmp_path, ()).splitlines() == ["None", "True"]


PACKAGE = ROOT / "clinattn"
# The rooms that a room may import from; "kernels" is a room, too, and imports none.
ROOMS = {
    "backends": {"kernels"},
    "operator": {"backends"},
    "parallel": {"backends", "operator"},
    "files": set(),
    "encoder": {"backends", "files", "operator"},
    "workloads": {"files", "operator"},
    "integrations": {"backends", "encoder", "operator"},
    "explain": {"backends", "encoder", "operator"},
    "training": {"encoder", "files", "operator", "workloads"},
    "tools": {
        "backends", "encoder", "explain", "files", "integrations", "kernels", "operator",
        "training", "workloads",
    },
}  # fmt: skip
# The entrance hall: what stands in no room.
HALL = {
    "": {"backends", "explain", "integrations", "operator", "parallel"},
    "__main__": {"tools"},
    "_C": set(),
}

# Within the two lowest rooms, the modules of its room that a module may import.
LAYERS = {
    "backends.call": set(),
    "backends.backend": {"call"},
    "backends.compiled": {"call"},
    "backends.cpu": {"backend", "compiled"},
    "backends.cuda": {"backend", "compiled"},
    "backends.triton": {"backend"},
    "backends.reference.philox": set(),
    "backends.reference.blocks": {"call"},
    "backends.reference.scores": {"call", "reference.blocks", "reference.philox"},
    "backends.reference.attention": {"call", "reference.blocks", "reference.scores"},
    "backends.reference.summary": {
        "call", "reference.attention", "reference.blocks", "reference.scores",
    },
    "backends.select": {"backend", "call", "compiled", "cpu", "cuda", "triton"},
    "operator.after_import": set(),
    "operator.autograd": set(),
    "operator.listeners": set(),
    "operator.ranges": set(),
    "operator.split": set(),
    "operator.timeline": set(),
    "operator.visibility": set(),
    "operator.flops": {"visibility"},
    "operator.ops": {"after_import", "ranges"},
    "operator.words.scalars": set(),
    "operator.words.checks": {"visibility", "words.forms", "words.scalars"},
    "operator.words.forms": set(),
    "operator.words.feature_checks": {"timeline", "visibility", "words.checks", "words.scalars"},
    "operator.words.features": {"timeline", "words.feature_checks"},
    "operator.packing": {"visibility", "words.checks", "words.scalars"},
    "operator.jagged": {"packing"},
    "operator.relative": {"words.checks", "words.scalars"},
    "operator.functions": {
        "autograd", "listeners", "ops", "split", "visibility",
        "words.checks", "words.feature_checks", "words.forms", "words.scalars",
    },
    "operator.bare": {"autograd", "functions", "listeners", "ranges"},
    "operator.assemble": {
        "visibility", "words.checks", "words.features", "words.forms", "words.scalars",
    },
    "operator.attention": {
        "assemble", "bare", "functions", "jagged", "split", "visibility", "words.checks",
        "words.scalars",
    },
    "operator.summary": {
        "assemble", "jagged", "ops", "split", "words.checks", "words.forms", "words.scalars",
    },
    "operator.rotary_op": {"ops"},
    "operator.rotary": {
        "autograd", "rotary_op", "split", "timeline", "visibility", "words.checks", "words.scalars",
    },
}  # fmt: skip


def files():
    """{module: its file}, without the package's name: "" is clinattn itself."""
    found = {}
    for path in sorted(PACKAGE.glob("**/*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "kernels":  # which is a link, or absent
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def module_of(name):
    """The module that has an imported name, or is it; kernels are one."""
    if name.startswith("kernels"):
        return "kernels"
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name


def imported(path, module=""):
    """Modules of the package that a file imports, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ["clinattn", *above] if node.level else []
            parent = ".".join([*start, *([node.module] if node.module else [])])
            names |= {f"{parent}.{alias.name}" for alias in node.names}
    inside = {x.partition(".")[2] for x in names if x.split(".")[0] == "clinattn"}
    return {module_of(x) for x in inside if not x.startswith("_C")}


IMPORTS = {module: imported(path, module) for module, path in FILES.items()}


def room(module):
    return module.split(".")[0]


def test_the_imports_are_read():
    """The other tests would pass on no module, and on imports that are not recognised."""
    assert len(FILES) > 140 and sum(map(len, IMPORTS.values())) > 300
    assert "encoder.config" in IMPORTS["encoder.presets"]
    assert "operator.words.scalars" in IMPORTS["encoder.config"]
    assert "training.loop" in IMPORTS["tools.train"]
    assert {room(x) for x in FILES} == {*ROOMS, *HALL}


@pytest.mark.parametrize("module", FILES)
def test_imports_run_down(module):
    """Modules import from lower rooms. tools.environment has the version from the hall."""
    allowed = HALL.get(module, ROOMS.get(room(module), set()) | {room(module)})
    others = {room(x) for x in IMPORTS[module]} - allowed
    assert others <= ({""} if module == "tools.environment" else set())


@pytest.mark.parametrize("module", LAYERS)
def test_the_lowest_rooms_have_floors(module):
    own = room(module)
    within = {x.partition(".")[2] for x in IMPORTS[module] if room(x) == own}
    assert within <= LAYERS[module]


def test_every_module_of_the_lowest_rooms_has_a_floor():
    doors = {x for x, path in FILES.items() if path.name == "__init__.py"}
    assert {x for x in FILES if room(x) in ("backends", "operator")} - doors == set(LAYERS)


def test_there_is_no_circle():
    """No circle among modules, with late imports. A door that imports its own room is no step."""
    doors = {x for x, path in FILES.items() if path.name == "__init__.py"}
    graph = {
        module: {x for x in found if not (x in doors and module.startswith(f"{x}."))}
        for module, found in IMPORTS.items()
    }
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(FILES)  # or CycleError


def test_what_others_import_is_named_at_the_door():
    unnamed = []
    for module, found in IMPORTS.items():
        for x in found:
            parts = x.split(".")
            for n in range(1, len(parts)):
                door = ".".join(parts[:n])
                outside = module != door and not module.startswith(f"{door}.")
                if outside and door in FILES:
                    said = ast.get_docstring(ast.parse(FILES[door].read_text()))
                    if parts[n] not in re.findall(r"\w+", said):
                        unnamed.append(f"{door}: {parts[n]} for {module}")
    assert not unnamed


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_nothing_of_the_package(path):
    assert imported(path, f"kernels.{path.stem}") <= {"kernels"}
