"""Floors of the house: lower ones never import upper ones, there is no circle, and each half stands alone."""

import ast
import subprocess
import sys

import pytest

from kit import ROOT

FLOORS = (
    ("kit", "kit.errors"),
    ("kit.params",),
    ("kit.lake.store",),
    ("kit.estimate.reference",),
    ("kit.estimate.table", "kit.process", "kit.progress"),
    ("kit.show",),
    ("kit.data", "kit.train"),
    ("kit.measure", "kit.launch"),
    ("kit.pipeline", "kit.report", "kit.doctor", "kit.maintain.refresh"),
    ("kit.cli",),
)
FOREIGN = {"kit.data": {"torch", "transformers", "peft", "trl"}, "kit.train": {"pyspark", "duckdb", "warcio"}}


def imports(path) -> set[str]:
    """Every module a file imports, anywhere in its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def name_of(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted((ROOT / "kit").rglob("*.py"))}
IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def reached(module: str) -> set[str]:
    """Everything that importing `module` may import, in the end."""
    seen, todo = set(), [module]
    while todo:
        for name in IMPORTS.get(todo.pop(), ()):
            if name not in seen:
                seen.add(name)
                todo.append(name)
    return seen


def floor(module: str) -> int:
    """Index of the floor that a module stands on: the longest name above it counts."""
    fits = [
        (len(name), i)
        for i, names in enumerate(FLOORS)
        for name in names
        if module == name or (name != "kit" and module.startswith(f"{name}."))
    ]
    assert fits, f"{module} stands on no floor: add it to the floors in kit/__init__.py and here"
    return max(fits)[1]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_from_a_floor_above_or_across(module: str) -> None:
    for name in IMPORTS[module] & set(MODULES):
        assert floor(name) <= floor(module), f"{module} imports {name}"
        halves = {m.split(".")[1] for m in (module, name) if m.startswith(("kit.data", "kit.train"))}
        assert len(halves) < 2 or floor(module) > floor("kit.data"), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_no_circle(module: str) -> None:
    assert module not in reached(module)


@pytest.mark.parametrize("half", FOREIGN)
def test_each_half_does_without_the_other_halfs_libraries(half: str) -> None:
    for module in (m for m in MODULES if m.startswith(half)):
        roots = {name.split(".")[0] for name in reached(module)}
        assert not roots & FOREIGN[half], module


def test_the_data_half_imports_where_torch_is_not_installed() -> None:
    modules = [m for m in MODULES if m.startswith("kit.data")]
    block = f"""import sys
class Absent:
    def find_spec(self, name, *more):
        if name.split(".")[0] in {FOREIGN["kit.data"]}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""
    code = f"{block}import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
