"""What stage 40 leaves for those that read it: the lines that a site repeats."""

from __future__ import annotations

from collections import defaultdict

from kit.lake.manifest import Manifest
from kit.lake.store import Lake


def boilerplate_lines(lake: Lake, manifest: Manifest) -> dict[str, frozenset[str]]:
    """The lines that each host repeats on its pages, as stage 40 found them."""
    lines_by_host = defaultdict(set)
    if lake.paths(manifest, "boilerplate"):
        for row in lake.table(manifest, "boilerplate", ["host", "line"]).to_pylist():
            lines_by_host[row["host"]].add(row["line"])
    return {host: frozenset(lines) for host, lines in lines_by_host.items()}


def without_boilerplate(text: str, lines: frozenset[str]) -> str:
    """A text without the lines that its site repeats."""
    return "\n".join(line for line in text.split("\n") if line.strip() not in lines)
