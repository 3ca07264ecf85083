"""What stage 40 leaves for those that read it: the lines that a site repeats."""

from __future__ import annotations

from collections import defaultdict

from kit.lake.manifest import Manifest
from kit.lake.store import Lake


def boilerplate_lines(lake: Lake, manifest: Manifest) -> dict[str, frozenset[str]]:
    """The lines that each host repeats on its pages, as stage 40 found them."""
    found = defaultdict(set)
    if lake.paths(manifest, "boilerplate"):
        for row in lake.table(manifest, "boilerplate", ["host", "line"]).to_pylist():
            found[row["host"]].add(row["line"])
    return {host: frozenset(lines) for host, lines in found.items()}


def without_boilerplate(text: str, lines: frozenset[str]) -> str:
    """A text without the lines that its site repeats."""
    return "\n".join(x for x in text.split("\n") if x.strip() not in lines)
