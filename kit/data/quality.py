"""Quality rules: each one a value that is kept and a threshold that can be moved later.

Gopher quality and repetition (Rae et al. 2021, arXiv:2112.11446, table A1), in datatrove's variant: words are
non-punctuation tokens, the mean word length is an arithmetic mean, n-gram shares count characters of joined
words against the length of the text. Languages without spaces are counted by character, and rules on word
shape or English stop words do not apply where they make no sense (`needs`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

SOLO, JOINERS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff", "'’.-"
TOKEN = re.compile(rf"[{SOLO}]|[^\W{SOLO}]+(?:[{JOINERS}][^\W{SOLO}]+)*")
"""A word: one character of an unspaced script, or letters and digits, joined by single marks."""
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
    """Words without punctuation; characters of unspaced scripts are words of their own.

    The tokens of `TOKEN`, found faster: what is in none becomes a space, and the rest is split at spaces.
    """
    codes, inside, solo = _inside(text)
    if solo.any():
        return TOKEN.findall(text)
    return np.where(inside, codes, np.uint32(32)).tobytes().decode("utf-32-le").split()


def cheap_words(text: str) -> int:
    """`len(words(text))`, exactly, without making the words: for raw text that may not be worth more work."""
    _, inside, solo = _inside(text)
    starts = np.count_nonzero(inside[1:] > inside[:-1]) + np.count_nonzero(inside[:1])
    return int(starts + np.count_nonzero(solo))


def measure(text: str) -> dict[str, float]:
    """The value of every rule for one text; shares are 0–1, `words` and `stop_words` are counts."""
    tokens = words(text)
    # a token's number is where it comes first
    first: dict[str, int] = {}
    ids = np.fromiter(map(first.setdefault, tokens, range(len(tokens))), np.int64, len(tokens))
    times = np.bincount(ids)
    ends = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)), out=ends[1:])
    letterless = [i for t, i in first.items() if not (t.isalpha() or any(map(str.isalpha, t)))]
    lines = [x for x in text.split("\n") if x.strip()]
    paragraphs = [x.lstrip("\n") for x in text.strip().split("\n\n") if x.strip()]
    n_words, n_lines, n_chars = max(len(tokens), 1), max(len(lines), 1), max(len(text), 1)
    dup_lines, dup_line_chars = _duplicates(lines)
    dup_paragraphs, dup_paragraph_chars = _duplicates(paragraphs)
    values = {
        "words": float(len(tokens)),
        "mean_word_length": int(ends[-1]) / n_words,
        "hash_ratio": text.count("#") / n_words,
        "ellipsis_ratio": (text.count("...") + text.count("…")) / n_words,
        "bullet_lines": sum(x.lstrip().startswith(BULLETS) for x in lines) / n_lines,
        "ellipsis_lines": sum(x.rstrip().endswith(ELLIPSES) for x in lines) / n_lines,
        "alpha_words": (len(tokens) - int(times[letterless].sum())) / n_words,
        "stop_words": float(len(STOP_WORDS.intersection(map(str.lower, first)))),
        "dup_lines": dup_lines / n_lines,
        "dup_line_chars": dup_line_chars / n_chars,
        "dup_paragraphs": dup_paragraphs / max(len(paragraphs), 1),
        "dup_paragraph_chars": dup_paragraph_chars / n_chars,
    }
    return values | {name: chars / n_chars for name, chars in _ngrams(ids, times, ends).items()}


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


def _ngrams(ids: np.ndarray, times: np.ndarray, ends: np.ndarray) -> dict[str, int]:
    """Characters of the most frequent 2- to 4-gram, and of the 5- to 10-grams that came before.

    `ids` are the tokens as numbers, `times` how often each number comes, `ends` the characters before each token.
    An n-gram can come twice only where both (n-1)-grams in it do, so every round looks at those places alone,
    and numbers the n-grams there anew, exactly, by where they come first (as a suffix array is built).
    """
    chars = {f"top_{n}gram": 0 for n in (2, 3, 4)} | {f"dup_{n}gram": 0 for n in range(5, 11)}
    at = (times[ids] > 1).nonzero()[0]
    grams = ids[at]
    for n, name in enumerate(chars, start=2):
        near = (at[1:] - at[:-1] == 1).nonzero()[0]
        if not len(near):
            break
        keys = grams[near] * len(ids) + grams[near + 1]
        at = at[near]
        order = keys.argsort(kind="stable")
        keys = keys[order]
        new = np.ones(len(at) + 1, bool)
        np.not_equal(keys[1:], keys[:-1], out=new[1:-1])
        bounds = new.nonzero()[0]
        if len(bounds) == len(new):
            break
        sizes = bounds[1:] - bounds[:-1]
        first = at[order[bounds[:-1]]]
        if n <= 4:
            most = sizes.max()
            top = first[sizes == most].min()
            chars[name] = int((ends[top + n] - ends[top] + n - 1) * most)
        first[sizes == 1] = -1
        grams = np.empty_like(at)
        grams[order] = first.repeat(sizes)
        again = grams >= 0
        at, grams = at[again], grams[again]
        if n > 4:
            chars[name] = int(_repeated(at, grams, n, ends))
    return chars


def _repeated(at: np.ndarray, grams: np.ndarray, n: int, ends: np.ndarray) -> int:
    """Characters of the n-grams `grams` at places `at` that came before, each token counted once."""
    seen: set[int] = set()
    chars = free = 0
    for i, gram in zip(at.tolist(), grams.tolist()):
        if i >= free:
            if gram in seen:
                chars += ends[i + n] - ends[i]
                free = i + n
            else:
                seen.add(gram)
    return chars


def _inside(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Code points of a text, which of them are in words of letters and digits, and which are a word alone."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[codes]
    inside = kinds == 1
    inside[1:-1] |= (kinds[1:-1] == 2) & inside[:-2] & inside[2:]
    return codes, inside, kinds == 3


@cache
def _kinds() -> np.ndarray:
    """What each code point is to `TOKEN`: 1 letter or digit, 2 joiner, 3 a word alone, 0 none of them."""
    kinds = np.zeros(0x110000, np.uint8)
    every = np.arange(len(kinds), dtype=np.uint32).tobytes().decode("utf-32-le", "surrogatepass")
    for kind, pattern in enumerate((r"\w+", f"[{JOINERS}]", f"[{SOLO}]+"), start=1):
        for run in re.finditer(pattern, every):
            kinds[run.start() : run.end()] = kind
    return kinds
