"""Packaging: pins without addresses, extras that compose, a conda file whose specs parse, CI that calls make test."""

import re
import tomllib

import yaml
from rattler import MatchSpec

from kit import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_are_plain_pins():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text and "@" not in text and "+cpu" not in text
    assert pins()["torch"] == "2.13.0" and pins()["duckdb"] == "1.5.5"


def test_every_direct_dependency_is_pinned():
    pinned = {name.lower().replace("_", "-") for name in pins()}
    wanted = [
        *PROJECT["dependencies"],
        *(d for extra in PROJECT["optional-dependencies"].values() for d in extra),
    ]
    names = {re.match(r"[\w.-]+", d)[0].lower().replace("_", "-") for d in wanted} - {PROJECT["name"]}
    assert names <= pinned, names - pinned


def test_the_halves_install_apart():
    extras = PROJECT["optional-dependencies"]
    assert not any(d.startswith(("torch", "transformers")) for d in extras["data"])
    assert not any(d.startswith(("pyspark", "duckdb")) for d in extras["train"])
    assert extras["all"] == [f"{PROJECT['name']}[data,train,aws,lab]"]


def test_the_conda_file_parses_and_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    specs = {str(MatchSpec(d).name.normalized): d for d in environment["dependencies"] if isinstance(d, str)}
    assert specs["python"] == "python=3.11" and specs["openjdk"] == "openjdk=17" and "pip" in specs
    assert environment["dependencies"][-1]["pip"] == ["-c constraints.txt", "-e .[all,test]"]


def test_ci_is_what_the_readme_names():
    assert (
        "make test" in (ROOT / ".ci" / "run").read_text()
        and "bash .ci/run" in (ROOT / ".github/workflows/test.yml").read_text()
    )
    assert {"make demo", "make test"} <= set(
        re.findall(r"make \w+", (ROOT / "README.md").read_text(encoding="utf-8"))
    )
