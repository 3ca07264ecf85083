"""How near extracted text is to gold text, by words and by snippets."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-case words."""
    return WORD.findall(text.lower())


def score_texts(texts: list[str], golds: list[dict[str, Any]]) -> dict[str, float]:
    """Mean word precision, recall and F1 over pages with full text; the same of snippets, all pages taken together."""
    full, counts = [], Counter()
    for text, gold in zip(texts, golds):
        if gold.get("text"):
            ours, theirs = Counter(words(text)), Counter(words(gold["text"]))
            common = (ours & theirs).total()
            full.append((_ratio(common, ours.total()), _ratio(common, theirs.total())))
        joined = re.sub(r"\s+", " ", text)
        for kind in ("with", "without"):
            for snippet in gold.get(kind) or ():
                counts[kind, re.sub(r"\s+", " ", snippet) in joined] += 1
    snippets_kept = counts["with", True]
    p, r = (
        _ratio(snippets_kept, snippets_kept + counts["without", True]),
        _ratio(snippets_kept, snippets_kept + counts["with", False]),
    )
    mean = [sum(column) / max(1, len(full)) for column in zip(*((p, r, _f1(p, r)) for p, r in full))] or [
        0.0
    ] * 3
    names = ("word P", "word R", "word F1", "snippet P", "snippet R", "snippet F")
    return {"pages": len(full)} | dict(zip(names, (*mean, p, r, _f1(p, r))))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _f1(p: float, r: float) -> float:
    return _ratio(2 * p * r, p + r)
