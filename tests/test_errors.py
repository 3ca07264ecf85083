"""The family of errors stands on one page, and a user's mistake is one line."""

import ast
import inspect
import re

import pytest

from kit import ROOT, errors

FAMILY = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}
SIGNALS = {("kit/measure/gpu/suite.py", "Skip")}
"""Exceptions that never leave the module that raises them."""


def parsed():
    for path in sorted(p for folder in ("kit", "tests") for p in (ROOT / folder).rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def test_every_error_of_the_kit_is_on_the_page():
    bases = re.compile(r"(Error|Exception|Failed|Missing|MissingInput|Interrupt|Exit)$")
    found = {
        (path, node.name)
        for path, tree in parsed()
        if path.startswith("kit/")
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(bases.search(ast.unparse(base)) for base in node.bases)
    }
    assert found == {("kit/errors.py", name) for name in FAMILY} | SIGNALS


def test_each_is_imported_from_there_only():
    elsewhere = []
    for path, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module != "kit.errors":
                elsewhere += [(path, name.name) for name in node.names if name.name in FAMILY]
            # polite.FetchError
            elif isinstance(node, ast.Attribute) and node.attr in FAMILY and path.startswith("kit/"):
                elsewhere.append((path, ast.unparse(node)))
    assert not elsewhere


def test_the_picture_shows_all_of_them_under_what_they_are():
    depths = {}
    above = {}
    for line in errors.__doc__.splitlines():
        drawn = re.match(r"    ([│├└─ ]*)([A-Z]\w+)  ", line)
        if drawn:
            depth = len(drawn[1]) // 4
            depths[depth] = drawn[2]
            above[drawn[2]] = depths[depth - 1] if depth else "Exception"
    assert above == {name: cls.__bases__[0].__name__ for name, cls in FAMILY.items()}


def test_what_reads_files_meets_the_errors_it_knows():
    assert issubclass(errors.FetchError, OSError) and issubclass(errors.Missing, FileNotFoundError)
    error = errors.Missing("fetch: HTTP 404", "https://me:secret@Far.example/a?key=secret#there")
    assert str(error) == "fetch: HTTP 404 (https://far.example/a)" and error.reason == "fetch: HTTP 404"


@pytest.mark.parametrize("cls", [c for c in FAMILY.values() if issubclass(c, errors.KitError)])
def test_a_notebook_shows_one_line(cls):
    assert cls("no luck")._render_traceback_() == [f"{cls.__name__}: no luck"]
    assert cls.exit_status == (2 if cls is errors.ParamError else 1)
