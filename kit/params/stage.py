"""Typed, flat parameters: one frozen model per notebook, one meaning per name in the whole kit.

A notebook's `parameters` cell repeats the names and defaults below (a test compares the two) and reads
itself back with `p = ExtractText.from_cell(globals())`. Values may arrive as strings (SageMaker Notebook
Jobs pass nothing else) and are converted; an unknown name or a wrong value is a `ParamError` that names
the nearest right one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kit.errors import ParamError
from kit.params.fit import Fit


def _listed(value: Any) -> Any:
    """`"[a, b]"`, `"a, b"` and `"a"` as lists; prompts with commas need the bracketed form."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("["):
        parsed = yaml.safe_load(text)
        return ["" if item is None else str(item) for item in parsed]
    return [item.strip() for item in text.split(",") if item.strip()]


Strings = Annotated[list[str], BeforeValidator(_listed)]
PATH = {"path": True}
"""Marks a field as a path or list of paths: the command line resolves it from the working directory."""


class Stage(BaseModel):
    """What every notebook takes; each stage below adds its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: ClassVar[str] = ""
    zone: ClassVar[str] = "intermediate"
    needs: ClassVar[tuple[str, ...]] = ()
    """Stages whose committed result this one reads."""

    run: str = Field("sample", description="name of this experiment in the lake", pattern=r"^[\w.-]+$")
    lake: str = Field("lake", description="where results go: a folder or s3://…", json_schema_extra=PATH)
    seed: int = Field(0, description="seeds every random choice", ge=0)
    usd_per_hour: float = Field(
        0.096,
        description="price of this machine; the default is an on-demand m5.large (2 vCPU), us-east-1",
        ge=0,
    )

    @classmethod
    def from_cell(cls, cell: Mapping[str, Any]) -> Stage:
        """Read the parameters out of a notebook's `globals()`; names the stage does not know are ignored."""
        return cls.parse({k: cell[k] for k in cls.model_fields if k in cell})

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Stage:
        """Build the model; raises `ParamError` with one line per wrong value."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ParamError("; ".join(_explain(cls, e) for e in error.errors())) from None

    def reads(self) -> tuple[str, ...]:
        """Stages whose committed result this one reads with these parameters: `needs`, and what a parameter adds."""
        return self.needs

    def fits(self) -> tuple[Fit, ...]:
        """What the stage trains, one `Fit` each, in the order in which it does; none where it trains nothing."""
        return ()

    def identity(self) -> dict[str, Any]:
        """The parameters that decide what comes out: not where it is kept, what an hour costs, how fast and as whom one asks."""
        return self.model_dump(
            exclude={"run", "lake", "usd_per_hour", "cores", "requests_per_s", "retries", "contact"}
        )


def _explain(cls: type[Stage], error: Mapping[str, Any]) -> str:
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"unknown parameter '{name}'{did_you_mean(name, cls.model_fields)}"
    hint = " (quote a text that holds ': ')" if isinstance(error["input"], dict) else ""
    return f"parameter '{name}': {error['msg'].lower()}, got {error['input']!r}{hint}"


def did_you_mean(name: str, names: Mapping[str, Any] | list[str]) -> str:
    """`; did you mean 'x'?` for the closest of `names`, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
