"""This machine as the whole kit sees it: cores, memory, control groups, and processes watched and killed."""

import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest

from kit import ROOT, doctor, process

GB = 1 << 30
SAYS = """
import json, os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from kit import doctor, process
from kit.data.engine import spark
from kit.launch.arrival import watch
from kit.params import Cores, RefineOnArrival
from kit.train.models import load
os.cpu_count = lambda: 64  # what the machine has, not what this process may use
print(json.dumps({
    "doctor": doctor._cores().means,
    "spark": spark.master(Cores()),
    "spark, told": spark.master(Cores(cores=3)),
    "torch": load.set_threads(),
    "arrivals": watch.workers_of(RefineOnArrival()),
}))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_all_agree_on_the_cores_that_this_process_may_use() -> None:
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    ran = subprocess.run([sys.executable, "-c", SAYS], env=env, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == {
        "doctor": "Spark runs local[1]",
        "spark": "local[1]",
        "spark, told": "local[3]",
        "torch": 1,
        "arrivals": 1,
    }


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A machine of 8 cores and 64 GB, 40 of them free, whose control groups the test writes."""

    def write(membership: str, files: dict[str, object]) -> None:
        (tmp_path / "self").write_text(membership)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    memory = psutil.virtual_memory()._replace(total=64 * GB, available=40 * GB)
    monkeypatch.setattr(process, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(process, "MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(process.psutil, "virtual_memory", lambda: memory)
    return write


def seen() -> tuple[int, float, float]:
    """Cores, memory and free memory in GB."""
    return process.cores(), process.memory_bytes() / GB, process.free_bytes() / GB


def test_without_control_groups_the_system_is_believed(groups) -> None:
    assert seen() == (8, 64, 40)


def test_a_container_of_version_2_sees_its_own_group_as_the_root(groups) -> None:
    statistics = f"anon 5\ninactive_file {GB}\nactive_file 7"
    files = {"cpu.max": "250000 100000", "memory.max": 16 * GB, "memory.current": 5 * GB}
    groups("0::/\n", files | {"memory.stat": statistics})
    assert seen() == (3, 16, 12)


def test_every_group_above_counts_too(groups) -> None:
    files = {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000"}
    files |= {"a/b/memory.max": "max", "a/b/memory.current": GB}
    files |= {"a/memory.max": 10 * GB, "a/memory.current": 9 * GB, "a/memory.stat": "inactive_file 0"}
    groups("0::/a/b\n", files)
    assert seen() == (4, 10, 1)


def test_version_1_and_a_path_of_the_host_that_is_not_mounted(groups) -> None:
    files = {"cpu/cpu.cfs_quota_us": 50_000, "cpu/cpu.cfs_period_us": 100_000}
    files |= {"memory/memory.limit_in_bytes": 4 * GB, "memory/memory.usage_in_bytes": 3 * GB}
    files["memory/memory.stat"] = f"inactive_file 1\ntotal_inactive_file {2 * GB}"
    groups("4:memory:/docker/0123\n2:cpu,cpuacct:/docker/0123\n1:name=systemd:/\n", files)
    # the mount of both controllers is linked under each one's name
    (process.GROUPS / "cpu").rename(process.GROUPS / "cpu,cpuacct")
    (process.GROUPS / "cpu").symlink_to("cpu,cpuacct")
    assert seen() == (1, 4, 3)


def test_version_1_without_limits(groups) -> None:
    files = {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100_000}
    files |= {"memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": GB}
    groups("4:memory:/\n2:cpu:/\n0::/\n", files)
    assert seen() == (8, 64, 40)


def test_more_in_use_than_the_limit_is_nothing_free(groups) -> None:
    groups("0::/\n", {"memory.max": 2 * GB, "memory.current": 3 * GB})
    assert process.free_bytes() == 0


def test_doctor_and_plan_see_the_limit_of_a_container(groups, monkeypatch) -> None:
    import torch

    from kit.train.plan import machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "machine_peak", lambda dtype: 1.0)
    groups("0::/\n", {"memory.max": 4 * GB, "memory.current": GB, "memory.stat": "inactive_file 0"})
    found = doctor._memory()
    assert (found.found, found.ok) == ("4 GB", False)
    own = process.resident_bytes()
    planned = machine.this_machine(torch.float32).memory_mb * machine.MB
    assert planned == pytest.approx(3 * GB + own, rel=0.02)


def test_the_machine_is_looked_at_in_one_module_only() -> None:
    facts = re.compile(
        r"cpu_count|sched_getaffinity|sysconf|sys/fs/cgroup|cpuinfo|virtual_memory|import psutil"
    )
    found = {
        str(path.relative_to(ROOT)) for path in (ROOT / "kit").rglob("*.py") if facts.search(path.read_text())
    }
    assert found == {"kit/process.py"}


def test_the_processor_has_a_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(process, "PROCESSOR", tmp_path / "cpuinfo")
    assert process.processor() == process.platform.machine()
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: Fast: 9000\nprocessor\t: 1\nmodel name\t: x\n"
    )
    assert process.processor() == "Fast: 9000"


@pytest.fixture
def parent():
    """A process that has a child in a session of its own, which holds 60 MB."""
    child = "block = b'x' * 60_000_000; print('here', flush=True); import time; time.sleep(60)"
    code = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "here\n"
        yield running
        running.kill()


def test_a_family_is_measured_and_killed_by_descent(parent) -> None:
    grandchild, _ = family = process.family(parent.pid)
    assert [member.pid for member in family] == [grandchild.pid, parent.pid]
    assert process.family_bytes(parent.pid) > 60e6
    assert process.family_bytes() > process.family_bytes(parent.pid)
    process.kill_family(parent.pid)
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert len(gone) == 2 and not alive
    process.kill_family(grandchild.pid)  # gone before: no error


def test_a_tree_kills_orphans_too(parent) -> None:
    tree = process.Tree(parent.pid)
    tree.sample()
    tree.kill()
    gone, alive = psutil.wait_procs(tree.alive, timeout=10)
    assert len(gone) == 2 and not alive


def test_watching_looks_while_the_block_runs_and_not_after() -> None:
    looks = []
    with pytest.raises(ZeroDivisionError), process.watching(lambda: looks.append(time.monotonic()), 0.01):
        deadline = time.monotonic() + 10
        while len(looks) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        raise ZeroDivisionError
    ended = time.monotonic()
    time.sleep(0.1)
    assert len(looks) >= 3 and looks[-1] <= ended
