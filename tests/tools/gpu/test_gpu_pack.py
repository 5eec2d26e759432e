"""bench/gpu/pack.py: kernels compiled ahead of time are those that Triton's JIT then looks for."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from places import BENCH

pytest.importorskip("triton")

# Triton's JIT launches on a driver that stands in; {change} comes before the pack is taken.
LAUNCHING = """
import json, sys
from pathlib import Path
from gpu import unpacking
versions = unpacking.versions
unpacking.versions = lambda: versions(sm=90)
unpacking.ROOT = Path({root!r})
{change}
facts = unpacking.take(Path({folder!r}))
import torch
from gpu import ahead, launches
from clinattn import fused_attention
counts = []
for calls in (
    launches.calls("first call"),
    [lambda: fused_attention(*[torch.empty(1, 1, 16, 16)] * 3, backend="triton", window=5)],
):
    with ahead.stand_in(), ahead.counted() as missed:
        for call in calls:
            call()
    counts.append(len(missed))
print(json.dumps([facts, counts]))
"""
# Names of kernels and hashes of their sources, hashed in an order of one's own
HASHES = """
import json
from gpu import ahead, launches
kernels, _ = ahead.recorded(launches.calls("first call"))
print(json.dumps(dict(sorted((x.source.name, x.source.hash()) for x in kernels[::{step}]))))
"""
OTHER_BUILD = """
from triton.runtime import cache
cache.triton_key = lambda: "another build"
"""


def run(*command, **settings):
    path = os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path, **settings}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=BENCH,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """The three kernels of the first call, and a file in place of the extension."""
    folder = tmp_path_factory.mktemp("pack")
    extension = folder / "libclinattn.so"
    extension.write_bytes(b"cuda_forward")
    given = ["--folder", folder / "pack", "--cache", folder / "cache", "--extension", extension]
    out = run(BENCH / "gpu" / "pack.py", *given, "--stages", "first call")
    assert "3 kernels" in out and "0 failed" in out
    return folder / "pack"


@pytest.mark.parametrize("content", [None, b"cpu_forward"], ids=["absent", "without CUDA"])
def test_an_extension_that_cannot_serve_is_refused_at_once(content, tmp_path):
    extension, there = tmp_path / "libclinattn.so", tmp_path / "pack"
    there.mkdir()
    (there / "versions.json").write_text("{}")
    if content:
        extension.write_bytes(content)
    words = "no CUDA kernels" if content else "there is no"
    with pytest.raises(AssertionError, match=words):
        run(BENCH / "gpu" / "pack.py", "--folder", there, "--extension", extension)
    assert (there / "versions.json").exists()


def launched(pack, tmp_path, change=""):
    """(facts of take, [compilations of what was packed, of another call]), from a copy elsewhere"""
    (tmp_path / "clinattn").mkdir()
    shutil.copytree(BENCH.parent / "kernels", tmp_path / "kernels")
    folder = shutil.copytree(pack, tmp_path / "carried")
    words = {"root": str(tmp_path), "folder": str(folder), "change": change}
    settings = {"TRITON_CACHE_DIR": str(tmp_path / "cold")}
    return json.loads(run("-c", LAUNCHING.format(**words), **settings))


@pytest.mark.parametrize("change", ["", OTHER_BUILD], ids=["same", "other build"])
def test_the_jit_compiles_nothing_that_was_packed(change, pack, tmp_path):
    facts, (packed, other) = launched(pack, tmp_path, change)
    assert facts["pack"].startswith("taken"), facts
    assert ("another build" in facts["pack"]) == bool(change)
    assert facts["kernels"] == 3 and facts["changed"] == []
    assert facts["extension"] == "taken"
    assert [x.name for x in (tmp_path / "clinattn").iterdir()] == ["libclinattn.so"]
    assert packed == 0
    assert other == 1


def test_hashes_are_those_of_launches_whichever_kernel_is_compiled_first():
    """Triton 3.6 hashes dkdv_kernel otherwise where dq_kernel was not hashed before it."""
    found = [json.loads(run("-c", HASHES.format(step=step))) for step in (1, -1)]
    assert found[0].keys() == {"_forward_kernel", "dq_kernel", "dkdv_kernel"}
    assert found[0] == found[1]


def test_a_pack_has_all_that_the_two_calls_launch(bench_on_the_path):
    from gpu import launches, plan

    planned = {stage for call in plan.CALLS.values() for stage in call}
    assert planned & set(launches.STAGES) <= set(launches.USUAL)


@pytest.fixture
def taken(pack, tmp_path, monkeypatch, bench_on_the_path):
    """Takes the pack in this process, on a machine of the packed versions less these."""
    from gpu import unpacking

    for name in ("TRITON_CACHE_DIR", unpacking.EXTENSION_TAKEN):
        monkeypatch.setenv(name, "")
    packed = json.loads((pack / unpacking.VERSIONS).read_text())
    monkeypatch.setattr(unpacking, "ROOT", tmp_path)
    (tmp_path / "clinattn").mkdir()

    def take(**different):
        monkeypatch.setattr(unpacking, "versions", lambda: packed | different)
        return unpacking.take(shutil.copytree(pack, tmp_path / "carried"))

    return take


def test_kernels_for_another_card_are_refused(taken):
    facts = taken(sm=80)
    assert facts["pack"] == "refused: sm 80 here, 90 packed"
    assert facts["extension"] == "taken"
    assert not os.environ["TRITON_CACHE_DIR"]


def test_an_extension_serves_every_python_and_torch(taken, tmp_path):
    facts = taken(python="3.99", torch="2.99.1", sources={"forward.py": "another"})
    assert facts["pack"] == facts["extension"] == "taken"
    assert (tmp_path / "clinattn" / "libclinattn.so").exists()
    assert "forward.py" in facts["changed"]


def test_a_broken_or_absent_pack_stops_nothing(tmp_path, bench_on_the_path):
    from gpu import unpacking

    assert unpacking.take(tmp_path) == {"pack": "none"}
    (tmp_path / unpacking.VERSIONS).write_text("{}")
    assert unpacking.take(tmp_path)["pack"].startswith("refused: ")
