"""Every parameter of the kit: one frozen model per notebook, the order of the notebooks, and recipes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml

from kit import ROOT, resolve_path
from kit.errors import ParamError
from kit.params.align import AlignDpo, ConstitutionalFeedback, RewardAndPolicy
from kit.params.data import (
    Cores as Cores,
)
from kit.params.data import (
    Deduplicate,
    ExploreIndex,
    ExtractText,
    QueryWithAthena,
    RefineOnArrival,
    RefineText,
    StartHere,
    WriteYourOwnJob,
)
from kit.params.data import (
    Extracting as Extracting,
)
from kit.params.data import (
    Refining as Refining,
)
from kit.params.datasets import AugmentText, BalanceTokenization, BenchmarkData, BuildDatasets
from kit.params.measure import BenchmarkTraining, CompareGenerations
from kit.params.stage import Stage, did_you_mean
from kit.params.train import (
    METHODS as METHODS,
)
from kit.params.train import (
    ClassifySentiment,
    ComparePeft,
    ContinuePretraining,
    Distill,
    FinetuneSft,
    MergeAndExport,
)
from kit.params.train import (
    Training as Training,
)
from kit.params.train import (
    Tuning as Tuning,
)

STAGES: dict[str, type[Stage]] = {
    cls.stage: cls
    for cls in (
        StartHere,
        ExploreIndex,
        ExtractText,
        RefineText,
        Deduplicate,
        BuildDatasets,
        FinetuneSft,
        AlignDpo,
        BenchmarkTraining,
        CompareGenerations,
    )
}
"""The main chain, in the order in which it runs."""
SIDE_TRIPS: dict[str, type[Stage]] = {
    cls.stage: cls
    for cls in (
        QueryWithAthena,
        WriteYourOwnJob,
        RefineOnArrival,
        AugmentText,
        BalanceTokenization,
        ComparePeft,
        ContinuePretraining,
        ClassifySentiment,
        RewardAndPolicy,
        ConstitutionalFeedback,
        Distill,
        MergeAndExport,
        BenchmarkData,
    )
}
"""Stages off the chain: nothing needs their results, and `kit run` runs one only when asked by `--only`."""
NOTEBOOKS: dict[str, type[Stage]] = dict(sorted({**STAGES, **SIDE_TRIPS}.items()))
"""Every stage by the name of its notebook."""


def known_fields() -> dict[str, Any]:
    """Every parameter of the kit by name, with pydantic's description of it."""
    return {name: field for cls in NOTEBOOKS.values() for name, field in cls.model_fields.items()}


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read one flat YAML; raises `ParamError` when it is missing, not YAML, nested or has unknown names."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        here = [str(f.relative_to(ROOT)) for f in sorted((ROOT / "params").glob("*.yaml"))]
        raise ParamError(f"cannot read recipe '{path}' ({reason}); the kit ships {', '.join(here)}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ParamError(f"recipe '{path}' is not YAML{line}") from None
    if not isinstance(values, dict):
        raise ParamError(f"recipe '{path}' is not YAML of the form 'name: value'")
    validate_recipe(values)
    return values


def validate_recipe(values: Mapping[str, Any]) -> None:
    """Check a recipe whole, before anything starts; raises `ParamError` naming every wrong word."""
    fields = known_fields()
    wrong = [f"unknown parameter '{k}'{did_you_mean(str(k), fields)}" for k in values if k not in fields]
    for name in (k for k in values if k in fields):
        # any stage that has the name will do: one name means one thing in the whole kit
        cls = next(c for c in NOTEBOOKS.values() if name in c.model_fields)
        try:
            cls.parse({name: values[name]})
        except ParamError as error:
            wrong.append(str(error))
    if wrong:
        raise ParamError("; ".join(wrong))


def for_stage(cls: type[Stage], values: Mapping[str, Any]) -> Stage:
    """The stage's own parameters out of a whole recipe."""
    return cls.parse({k: v for k, v in values.items() if k in cls.model_fields})


def is_list(name: str) -> bool:
    """Whether the parameter `name` holds a list."""
    return get_origin(known_fields()[name].annotation) is list


def is_path(name: str) -> bool:
    """Whether the parameter `name` holds a path or paths."""
    return bool((known_fields()[name].json_schema_extra or {}).get("path"))


def from_here(name: str, value: str) -> str | list[str]:
    """A path (or list of paths) of the command line, relative to the working directory, as one relative to the checkout."""

    def moved(path: str) -> str:
        if "://" in path:
            return path
        return os.path.relpath(Path(path).expanduser().resolve(), ROOT)

    if not is_list(name):
        return moved(value)
    items = value.strip().removeprefix("[").removesuffix("]").split(",")
    return [moved(item.strip().strip("'\"")) for item in items if item.strip()]


def check_paths(values: Mapping[str, Any]) -> None:
    """Raise `ParamError` for a local path that is not there, before anything starts."""
    for name in (name for name in values if is_path(name) and name != "lake"):
        for path in values[name] if is_list(name) else [values[name]]:
            if "://" not in path and not Path(resolve_path(path)).exists():
                raise ParamError(f"parameter '{name}': '{path}' does not exist")
