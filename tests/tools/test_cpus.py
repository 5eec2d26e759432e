"""CPUs of a process by affinity mask, core and quota, on stand-ins for the files of Linux."""

import os

import pytest

from clinattn.tools import cpus
from clinattn.tools.cpus import Cpus


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Puts folders of tmp_path in the place of the system's; the group is /docker/one."""
    monkeypatch.setattr(cpus, "TOPOLOGY", tmp_path / "cpu")
    monkeypatch.setattr(cpus, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cpus, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/docker/one\n")

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    return write


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_two_cpus_of_one_core_are_one_core(system, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5})
    for number, siblings in ((0, "0,4"), (4, "0,4"), (1, "1,5"), (5, "1,5")):
        system(f"cpu/cpu{number}/topology/thread_siblings_list", siblings)
    assert cpus.cpus() == Cpus(allowed=4, cores=2, quota=None)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_without_files_each_cpu_is_a_core(system, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 7})
    assert cpus.cpus() == Cpus(3, 3, None)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"docker/one/cpu.max": "max 100000"}, None),
        ({"docker/one/cpu.max": "250000 100000"}, 2.5),
        ({"docker/one/cpu.max": "max 100000", "docker/cpu.max": "400000 100000"}, 4.0),
        ({"docker/one/cpu.max": "800000 100000", "docker/cpu.max": "50000 100000"}, 0.5),
        ({"cpu.max": "100000 100000"}, 1.0),  # a container sees its own group at the top
        ({"docker/other/cpu.max": "100000 100000"}, None),
    ],
)
def test_the_smallest_quota_of_the_groups_above_holds(system, files, quota):
    for name, text in files.items():
        system(f"cgroup/{name}", text)
    assert cpus.quota() == quota


@pytest.mark.parametrize(("quota", "expected"), [("150000", 1.5), ("-1", None)])
def test_groups_of_version_1(system, quota, expected):
    system("own", "12:memory:/docker/one\n4:cpu,cpuacct:/docker/one\n1:name=systemd:/x")
    system("cgroup/cpu,cpuacct/docker/one/cpu.cfs_quota_us", quota)
    system("cgroup/cpu,cpuacct/docker/one/cpu.cfs_period_us", "100000")
    assert cpus.quota() == expected


def test_a_group_outside_of_what_is_seen(system):
    system("own", "0::/../../pod")
    system("cgroup/cpu.max", "300000 100000")
    assert cpus.quota() == 3.0


def test_no_linux(tmp_path, monkeypatch):
    monkeypatch.setattr(cpus, "OWN_GROUPS", tmp_path / "absent")
    assert cpus.quota() is None


@pytest.mark.parametrize(
    ("found", "threads"),
    [(Cpus(8, 4, None), 4), (Cpus(8, 4, 2.9), 2), (Cpus(8, 4, 0.5), 1), (Cpus(2, 2, 64.0), 2)],
)
def test_useful_threads(found, threads):
    assert found.useful == threads
