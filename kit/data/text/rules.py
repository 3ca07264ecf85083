"""The rules that may drop a document, one a line: rule set, value, bounds and the parameters that move them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kit.data.text.words import word_count
from kit.errors import ParamError
from kit.params import did_you_mean

UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "km", "my"})


@dataclass(frozen=True)
class Rule:
    """One threshold: `column` must lie in [`low`, `high`]; a string names the parameter that holds the bound."""

    rule_set: str
    column: str
    low: float | str | None = None
    high: float | str | None = None
    needs: str = ""
    """`english` or `spaces`: the languages the rule makes sense for; empty = all."""

    @property
    def name(self) -> str:
        """What a document dropped by this rule is counted under."""
        return f"{self.rule_set}: {self.column}"

    def bound(self, side: str, params: Mapping[str, Any]) -> float | None:
        """The bound `low` or `high`: that of `params["thresholds"]`, else the rule's own, a parameter looked up."""
        own = getattr(self, side)
        own = params[own] if isinstance(own, str) else own
        return overrides(tuple(params.get("thresholds", ()))).get((self.name, side), own)

    def bounds(self, params: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """The two bounds."""
        return self.bound("low", params), self.bound("high", params)

    def applies(self, lang: str) -> bool:
        """Whether the rule judges texts of this language (ISO 639-1)."""
        return {"english": lang == "en", "spaces": lang not in UNSPACED_LANGUAGES}.get(self.needs, True)


WORDS = Rule("gopher_quality", "words", "min_words", "max_words")
"""The one rule that a prefilter asks in advance."""
RULES = (
    Rule("url", "blocked_url", None, 0),
    Rule("url", "banned_url_words", None, 0),
    Rule("url", "soft_url_words", None, 1),
    Rule("gopher_repetition", "dup_paragraphs", None, 0.3),
    Rule("gopher_repetition", "dup_paragraph_chars", None, 0.2),
    Rule("gopher_repetition", "dup_lines", None, "max_duplicate_lines"),
    Rule("gopher_repetition", "dup_line_chars", None, 0.2),
    *(Rule("gopher_repetition", f"top_{n}gram", None, x) for n, x in ((2, 0.2), (3, 0.18), (4, 0.16))),
    *(
        Rule("gopher_repetition", f"dup_{n}gram", None, x)
        for n, x in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    ),
    WORDS,
    Rule("gopher_quality", "mean_word_length", 3, 10, needs="spaces"),
    Rule("gopher_quality", "hash_ratio", None, 0.1),
    Rule("gopher_quality", "ellipsis_ratio", None, 0.1),
    Rule("gopher_quality", "bullet_lines", None, 0.9),
    Rule("gopher_quality", "ellipsis_lines", None, 0.3),
    Rule("gopher_quality", "alpha_words", 0.8, None),
    Rule("gopher_quality", "stop_words", 2, None, needs="english"),
    Rule("c4", "lorem_ipsum", None, 0),
    Rule("c4", "curly_brackets", None, 0),
    Rule("c4", "sentences", 5, None),
    Rule("fineweb", "line_punct", 0.12, None),
    Rule("fineweb", "short_lines", None, 0.67),
    Rule("fineweb", "dup_chars", None, 0.01),
    Rule("fineweb", "line_breaks", None, 0.3),
)
"""Every threshold of the kit, in FineWeb's order, in which a document's first failing one is named."""
RULE_SETS = tuple(dict.fromkeys(r.rule_set for r in RULES))
COLUMNS = tuple(r.column for r in RULES)
OVERRIDE = re.compile(r"\s*(\w+)\s*:\s*(\w+)\s*(<=|>=)\s*([-+.\deE]+)\s*")


@lru_cache(16)
def overrides(thresholds: tuple[str, ...]) -> dict[tuple[str, str], float]:
    """Bounds by `(rule name, "low" | "high")` out of `"fineweb: short_lines <= 0.8"`; raises `ParamError`."""
    names = {r.name for r in RULES}
    bounds = {}
    for text in thresholds:
        parts = OVERRIDE.fullmatch(text)
        name = f"{parts[1]}: {parts[2]}" if parts else text
        if not parts or name not in names:
            hint = did_you_mean(name, sorted(names))
            raise ParamError(f"parameter 'thresholds': no 'set: rule <= number' in {text!r}{hint}")
        bounds[name, "high" if parts[3] == "<=" else "low"] = float(parts[4])
    return bounds


def too_few_words(text: str, params: Mapping[str, Any]) -> bool:
    """Whether the rule `WORDS` rules out every text that is a part of this one: it has no more words."""
    return word_count(text) < WORDS.bound("low", params)
