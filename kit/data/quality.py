"""Quality rules: each one a value that is kept and a threshold that can be moved later.

Gopher quality and repetition (Rae et al. 2021, arXiv:2112.11446, table A1), in datatrove's variant: words are
non-punctuation tokens, the mean word length is an arithmetic mean, n-gram shares count characters of joined
words against the length of the text. Languages without spaces are counted by character, and rules on word
shape or English stop words do not apply where they make no sense (`needs`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
    r"(?:['’.-][^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+)*"
)
BULLETS = ("•", "‣", "▪", "●", "◦", "-", "*", "–")
ELLIPSES = ("...", "…")
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
UNSPACED = frozenset({"zh", "ja", "th", "lo", "km", "my"})


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

    def bounds(self, params: dict[str, float]) -> tuple[float | None, float | None]:
        """The two bounds, parameters looked up."""
        low, high = (params[x] if isinstance(x, str) else x for x in (self.low, self.high))
        return low, high

    def applies(self, lang: str) -> bool:
        """Whether the rule judges texts of this language (ISO 639-1)."""
        return {"english": lang == "en", "spaces": lang not in UNSPACED}.get(self.needs, True)


RULES = (
    Rule("gopher_quality", "words", "min_words", "max_words"),
    Rule("gopher_quality", "mean_word_length", 3, 10, needs="spaces"),
    Rule("gopher_quality", "hash_ratio", None, 0.1),
    Rule("gopher_quality", "ellipsis_ratio", None, 0.1),
    Rule("gopher_quality", "bullet_lines", None, 0.9),
    Rule("gopher_quality", "ellipsis_lines", None, 0.3),
    Rule("gopher_quality", "alpha_words", 0.8, None),
    Rule("gopher_quality", "stop_words", 2, None, needs="english"),
    Rule("gopher_repetition", "dup_lines", None, "max_duplicate_lines"),
    Rule("gopher_repetition", "dup_line_chars", None, 0.2),
    Rule("gopher_repetition", "dup_paragraphs", None, 0.3),
    Rule("gopher_repetition", "dup_paragraph_chars", None, 0.2),
    *(Rule("gopher_repetition", f"top_{n}gram", None, x) for n, x in ((2, 0.2), (3, 0.18), (4, 0.16))),
    *(
        Rule("gopher_repetition", f"dup_{n}gram", None, x)
        for n, x in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    ),
)
"""Every threshold of the kit, in the order in which a document's first failing one is named."""
RULE_SETS = tuple(dict.fromkeys(r.rule_set for r in RULES))
COLUMNS = tuple(r.column for r in RULES)


def words(text: str) -> list[str]:
    """Words without punctuation; characters of unspaced scripts are words of their own."""
    return TOKEN.findall(text)


def measure(text: str) -> dict[str, float]:
    """The value of every rule for one text; shares are 0–1, `words` and `stop_words` are counts."""
    tokens = words(text)
    lines = [x for x in text.split("\n") if x.strip()]
    paragraphs = [x for x in re.split(r"\n{2,}", text.strip()) if x.strip()]
    n_words, n_lines, n_chars = max(len(tokens), 1), max(len(lines), 1), max(len(text), 1)
    dup_lines, dup_line_chars = _duplicates(lines)
    dup_paragraphs, dup_paragraph_chars = _duplicates(paragraphs)
    values = {
        "words": float(len(tokens)),
        "mean_word_length": sum(map(len, tokens)) / n_words,
        "hash_ratio": text.count("#") / n_words,
        "ellipsis_ratio": (text.count("...") + text.count("…")) / n_words,
        "bullet_lines": sum(x.lstrip().startswith(BULLETS) for x in lines) / n_lines,
        "ellipsis_lines": sum(x.rstrip().endswith(ELLIPSES) for x in lines) / n_lines,
        "alpha_words": sum(any(c.isalpha() for c in t) for t in tokens) / n_words,
        "stop_words": float(len(STOP_WORDS.intersection(t.lower() for t in tokens))),
        "dup_lines": dup_lines / n_lines,
        "dup_line_chars": dup_line_chars / n_chars,
        "dup_paragraphs": dup_paragraphs / max(len(paragraphs), 1),
        "dup_paragraph_chars": dup_paragraph_chars / n_chars,
    }
    values |= {f"top_{n}gram": _top_ngram(tokens, n) / n_chars for n in (2, 3, 4)}
    return values | {f"dup_{n}gram": _repeated_ngrams(tokens, n) / n_chars for n in range(5, 11)}


def failing(values: dict[str, float], lang: str, rule_sets: list[str], params: dict[str, float]) -> list[str]:
    """Names of the rules that `values` break, in the order of `RULES`."""
    names = []
    for rule in RULES:
        if rule.rule_set in rule_sets and rule.applies(lang):
            low, high = rule.bounds(params)
            value = values[rule.column]
            if (low is not None and value < low) or (high is not None and value > high):
                names.append(rule.name)
    return names


def _duplicates(parts: list[str]) -> tuple[int, int]:
    """How many of `parts` came before, and their characters."""
    seen: set[str] = set()
    count = chars = 0
    for part in parts:
        if part in seen:
            count, chars = count + 1, chars + len(part)
        seen.add(part)
    return count, chars


def _top_ngram(tokens: list[str], n: int) -> int:
    """Characters covered by the most frequent n-gram, 0 if none comes twice."""
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    if not counts:
        return 0
    gram, times = max(counts.items(), key=lambda x: (x[1], len(x[0])))
    return (sum(map(len, gram)) + n - 1) * times if times > 1 else 0


def _repeated_ngrams(tokens: list[str], n: int) -> int:
    """Characters of n-grams that came before, each token counted once."""
    seen: set[tuple[str, ...]] = set()
    chars = i = 0
    while i + n <= len(tokens):
        gram = tuple(tokens[i : i + n])
        if gram in seen:
            chars += sum(map(len, gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return chars
