"""Which code made a result: a hash of the notebook and of every kit module that it can reach."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import platform
import re
import subprocess
from importlib import metadata, util
from pathlib import Path
from typing import Any

from kit import ROOT

NOT_IN_CONTENT = {
    "kit.params",
    "kit.params.align",
    "kit.params.datasets",
    "kit.params.measure",
    "kit.params.stage",
    "kit.params.data",
    "kit.params.fit",
    "kit.params.train",
    "kit.show",
    "kit.errors",
    "kit.estimate.rates",
    "kit.estimate.table",
    "kit.estimate.reference",
    "kit.process",
    "kit.pipeline",
    "kit.progress",
    "kit.report",
    "kit",
}
"""Modules that decide how a result is chosen or shown, not what it is: editing them makes nothing stale."""


@functools.cache
def code_identity(stage: str) -> dict[str, Any]:
    """`git_sha`, `dirty` and a hash of the stage's notebook and every kit module that it can reach."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        sha = git(["git", "rev-parse", "HEAD"]).stdout.strip() or None
        dirty = bool(git(["git", "status", "--porcelain", "--", "kit", "notebooks"]).stdout.strip())
    except OSError:  # no git, or a zip on a cluster: the source hash below still says which code ran
        sha, dirty = None, False
    return {"git_sha": sha, "dirty": dirty, "source_sha256": source_sha256(stage)}


def source_sha256(stage: str) -> str:
    """Hash over the notebook's code cells and the kit modules it imports, directly or not."""
    digest = hashlib.sha256()
    notebook = ROOT / "notebooks" / f"{stage}.ipynb"
    imports: set[str] = set()
    if notebook.exists():
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        # parameters are compared by value, so the cell that repeats the defaults is not code
        code = [
            c
            for c, cell in zip(code, (c for c in cells if c["cell_type"] == "code"), strict=True)
            if "parameters" not in cell["metadata"].get("tags", [])
        ]
        imports = {name for source in code for name in _kit_imports(source)}
        digest.update("\n".join(code).encode())
    digest.update(modules_sha256(imports).encode())
    return digest.hexdigest()


def modules_sha256(modules: set[str]) -> str:
    """Hash over kit modules and those they import, directly or not."""
    digest = hashlib.sha256()
    for module in sorted(_closure(modules) - NOT_IN_CONTENT):
        digest.update(f"{module}\n".encode() + _module_path(module).read_bytes())
    return digest.hexdigest()


def _closure(modules: set[str]) -> set[str]:
    seen: set[str] = set()
    todo = set(modules)
    while todo:
        module = todo.pop()
        seen.add(module)
        path = _module_path(module)
        if module not in NOT_IN_CONTENT:
            todo |= _kit_imports(path.read_text(encoding="utf-8")) - seen
    return seen


@functools.cache  # a module is read for every stage that reaches it
def _kit_imports(source: str) -> set[str]:
    """Names of kit modules that `source` imports, at any depth of its code."""
    imported: set[str] = set()
    source = re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE)  # IPython magics are not Python
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return {m for m in imported if m.split(".")[0] == "kit" and _module_path(m) is not None}


@functools.cache
def _module_path(module: str) -> Path | None:
    base = ROOT / Path(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            return path
    return None


@functools.cache
def environment() -> dict[str, str]:
    """Versions that a reader of a manifest will ask for; packages that are not installed are left out."""
    names = ("pyspark", "duckdb", "pyarrow", "torch", "transformers", "peft", "trl", "resiliparse")
    versions = {name: metadata.version(name) for name in names if util.find_spec(name)}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}
