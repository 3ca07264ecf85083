"""Figures of reference runs, which ship with the kit: read by those who show them, written by maintainers.

`rates` is what `kit estimate` starts from, `methods` and `gpu_methods` are tables of 61, `classify` is that of 63.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kit import ROOT
from kit.lake.manifest import Manifest

FOLDER = ROOT / "data_samples" / "reference_runs"


def recorded(name: str) -> bool:
    """Whether there is a reference run `name`: some want a machine that nobody has had yet."""
    return _file(name).exists()


@cache
def read(name: str) -> dict[str, Any]:
    """The figures `name`: `machine`, `date` and `commit` of the run, and what was measured.

    Raises `FileNotFoundError` where none is recorded.
    """
    return json.loads(_file(name).read_text(encoding="utf-8"))


def write_reference(name: str, manifest: Manifest, machine: str, figures: Mapping[str, Any]) -> None:
    """Record `figures` as `name`, with the date and the commit of `manifest`, which was made on `machine`."""
    changed = "+" if manifest.code["dirty"] else ""  # not quite that commit
    made_by = {
        "machine": machine,
        "date": manifest.created_at[:10],
        "commit": str(manifest.code["git_sha"])[:10] + changed,
    }
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(made_by | dict(figures), indent=1, ensure_ascii=False)
    _file(name).write_text(text + "\n", encoding="utf-8")
    read.cache_clear()


def _file(name: str) -> Path:
    return FOLDER / f"{name}.json"
