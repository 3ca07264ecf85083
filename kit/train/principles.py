"""A constitution: the principles of 72 in a YAML file, and what each of them asks a model for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from kit.params import ParamError


class Principle(BaseModel):
    """What one principle asks for; plain words, sent as they are. One sentence makes all four."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, str_min_length=1)
    name: str
    critique: str
    revise: str
    judge: str

    @model_validator(mode="before")
    @classmethod
    def _sentence(cls, item: Any) -> Any:
        if not isinstance(item, str) or not item.strip():
            return item
        return {
            "name": item,
            "critique": f"Where does your text break this principle: {item}",
            "revise": f"Rewrite your text so that it keeps this principle: {item}",
            "judge": f"Which text keeps this principle better: {item}",
        }


def load_principles(path: str) -> list[Principle]:
    """The principles in a YAML file: a list of `{name, critique, revise, judge}` or of plain sentences.

    Raises `ParamError` that names the file and the item.
    """
    told = f"principles_file '{Path(path).name}'"
    try:
        items = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        found = TypeAdapter(list[Principle]).validate_python(items)
    except OSError as error:
        raise ParamError(f"{told} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ParamError(f"{told} is not YAML{f', line {mark.line + 1}' if mark else ''}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f", {'item ' + str(x + 1) if isinstance(x, int) else x}" for x in first["loc"])
        raise ParamError(f"{told}{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    twice = [name for name, n in Counter(x.name for x in found).items() if n > 1]
    if twice or not found:
        raise ParamError(
            f"{told} " + (f"has two principles named '{twice[0]}'" if twice else "has no principle")
        )
    return found
