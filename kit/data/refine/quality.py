"""Quality rules: each one a value that is kept and a threshold that can be moved later.

All in datatrove's variant, whose defaults they have (0.10; a test compares verdicts on real pages): words are the
tokens of `kit.data.text.words`, punctuation included where shares are taken, means are arithmetic, and duplicate lines
count from their second time on.

- `url`: a list of blocked domains, hosts or URLs, and words in the URL, as FineWeb does (with lists of their own).
- `gopher_repetition`, `gopher_quality`: Rae et al. 2021, arXiv:2112.11446, table A1.
- `c4`: Raffel et al. 2020, arXiv:1910.10683, section 2.2, without its list of bad words. Line rules make no verdict:
  they take lines out before sentences are counted. Lines without a full stop stay, as in FineWeb.
- `fineweb`: Penedo et al. 2024, arXiv:2406.17557, section 3.6; judges the text that moves on.

Rules on word shape or English stop words do not apply where they make no sense (`needs`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from kit.data.text import words as w
from kit.data.text.rules import RULE_SETS, RULES

BULLETS, ELLIPSES = ("•", "-"), ("...", "…")


CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
LINE_PHRASES = (
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
"""C4 takes a line with one of them out."""
# datatrove's defaults: C4 wants three words a line and none longer than 1,000 characters; to FineWeb a line of up to
# 30 characters is short
MIN_LINE_WORDS, LONG_WORD, SHORT_LINE = 3, 1000, 30


def rule_values(
    text: str, rule_sets: Iterable[str] = RULE_SETS, c4_lines: bool = False
) -> tuple[str, dict[str, float]]:
    """The text that moves on and the value of every rule of `rule_sets`; shares are 0–1, the others counts.

    With `c4_lines` only lines that C4 keeps move on, unless it keeps none. `url` is not measured here.
    """
    sets = set(rule_sets)
    values: dict[str, float] = {}
    # tokens are made once, and only for rules that ask for those of the whole text:
    # where C4 shortens it, FineWeb wants those of what is left
    whole_text = {"gopher_repetition", "gopher_quality"} | (set() if c4_lines else {"fineweb"})
    tokens = w.tokens(text) if sets & whole_text else None
    if "gopher_repetition" in sets:
        values |= _repetition(text, tokens)
    if "gopher_quality" in sets:
        values |= _quality(text, tokens)
    if "c4" in sets or c4_lines:
        kept, c4_values = c4(text, tokens)
        values |= c4_values if "c4" in sets else {}
        if c4_lines and kept and kept != text:
            text, tokens = kept, w.tokens(kept) if "fineweb" in sets else None
    if "fineweb" in sets:
        values |= _fineweb(text, len((tokens or w.tokens(text)).ids))
    return text, values


def _repetition(text: str, tokens: w.Tokens) -> dict[str, float]:
    n_chars = max(len(text), 1)
    # the paragraphs of a stripped text, the lines of the text as it is: so datatrove cuts them
    paragraphs, lines = re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text)
    dup_paragraphs, dup_paragraph_chars = _duplicates(paragraphs)
    dup_lines, dup_line_chars = _duplicates(lines)
    values = {
        "dup_paragraphs": dup_paragraphs / len(paragraphs),
        "dup_paragraph_chars": dup_paragraph_chars / n_chars,
        "dup_lines": dup_lines / len(lines),
        "dup_line_chars": dup_line_chars / n_chars,
    }
    ids, lengths = tokens.ids, tokens.traits[:, w.LENGTH]  # both [tokens]
    ends = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    # numbers of this text alone: those of the process grow with all it has seen
    _, first, distinct, times = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    chars_of = _ngrams(first[distinct], times[distinct], ends)
    return values | {name: chars / n_chars for name, chars in chars_of.items()}


def _quality(text: str, tokens: w.Tokens) -> dict[str, float]:
    traits = tokens.traits  # [tokens, traits], integers
    n_tokens, n_words = max(len(traits), 1), int(traits[:, w.WORD].sum())
    lines = text.splitlines()
    n_lines = max(len(lines), 1)
    # a bit for each of the stop words: what counts is how many different ones there are
    stop = int(np.bitwise_or.reduce(traits[:, w.STOP])) if len(traits) else 0
    return {
        "words": float(n_words),
        "mean_word_length": int(traits[:, w.LENGTH] @ traits[:, w.WORD]) / max(n_words, 1),
        "hash_ratio": text.count("#") / n_tokens,
        "ellipsis_ratio": (text.count("...") + text.count("…")) / n_tokens,
        "bullet_lines": sum(line.lstrip().startswith(BULLETS) for line in lines) / n_lines,
        "ellipsis_lines": sum(line.rstrip().endswith(ELLIPSES) for line in lines) / n_lines,
        "alpha_words": int(traits[:, w.ALPHA].sum()) / n_tokens,
        "stop_words": float(stop.bit_count()),
    }


def c4(text: str, tokens: w.Tokens | None = None) -> tuple[str, dict[str, float]]:
    """What C4's line rules leave of a text, and how many lines hold what rules a document out, and sentences.

    Sentences are counted in every line by itself, as spaCy's sentencizer does: one begins with the first token
    that is no mark after a mark that ends one. `tokens` are the text's, where they are known.
    """
    kept: list[str] = []
    pieces: list[int] = []
    lorem = curly = 0
    # asked of the whole text first: most have none of it, and then no line is searched for it
    lower = text.lower()
    phrases = [phrase for phrase in LINE_PHRASES if phrase in lower]
    has_lorem, has_curly = "lorem ipsum" in lower, "{" in text
    for line in map(str.strip, text.splitlines()):
        words = line.split()
        n = len(words)
        if n < MIN_LINE_WORDS or (len(line) > LONG_WORD and max(map(len, words)) > LONG_WORD):
            continue
        if "[" in line:
            line = CITATION.sub("", line)
            n = len(line.split())
        low = line.lower() if phrases or has_lorem else ""
        # the order is datatrove's: a line on JavaScript goes before its brackets are counted, one with another phrase
        # after, and lorem ipsum counts in both
        lorem += has_lorem and "lorem ipsum" in low
        if phrases and "javascript" in low:
            continue
        curly += has_curly and "{" in line
        if any(phrase in low for phrase in phrases):
            continue
        kept.append(line)
        pieces.append(n)
    cleaned = "\n".join(kept)
    # the text's own tokens still hold where no line went
    if tokens is None or cleaned != text:
        tokens = w.tokens(cleaned)
    return cleaned.strip(), {
        "lorem_ipsum": float(lorem),
        "curly_brackets": float(curly),
        "sentences": float(_sentences(tokens, np.array(pieces, np.int64))),
    }


def _sentences(tokens: w.Tokens, pieces: np.ndarray) -> int:
    """Sentences of a text whose lines have so many pieces each, `pieces` [lines].

    Every line begins one; within a line one begins at each word before which, since the last word, a sentence ended.
    """
    # the token at which each line begins, [lines + 1]
    line_starts = np.zeros(len(pieces) + 1, np.int64)
    line_starts[1:] = np.append(0, np.cumsum(tokens.pieces))[np.cumsum(pieces)]
    # how many marks that end a sentence come before each token, [tokens + 1]
    ends_before = np.append(0, np.cumsum(tokens.traits[:, w.END]))
    words = (tokens.traits[:, w.MARK] == 0).nonzero()[0]  # tokens that may begin a sentence
    # from the token after the word before, or from the line's beginning where that is later
    own_line = line_starts[np.searchsorted(line_starts, words, "right") - 1]
    since = np.maximum(np.append(-1, words[:-1]) + 1, own_line)
    return int(np.count_nonzero(ends_before[words] > ends_before[since])) + len(pieces)


def _fineweb(text: str, n_tokens: int) -> dict[str, float]:
    lines = [line for line in text.split("\n") if line.strip()]
    n_lines = max(len(lines), 1)
    return {
        "line_punct": sum(line[-1] in w.ENDS for line in lines) / n_lines,
        "short_lines": sum(len(line) <= SHORT_LINE for line in lines) / n_lines,
        "dup_chars": _duplicates(lines)[1] / max(len(text) - text.count("\n"), 1),
        "line_breaks": text.count("\n") / max(n_tokens, 1),
    }


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

    `ids` [tokens]: each token as the place where the same one comes first. `times` [tokens]: how often it comes.
    `ends` [tokens + 1]: the characters before each token. Where nothing comes twice, the first n-gram is the most
    frequent one. Between two tokens of an n-gram a space is counted (n - 1), as datatrove joins them with one.

    An n-gram can come twice only where both (n-1)-grams in it do, so every round looks at those places alone,
    and numbers the n-grams there anew, exactly, by where they come first (as a suffix array is built).
    """
    chars = {f"top_{n}gram": int(ends[n]) + n - 1 if len(ids) >= n else 0 for n in (2, 3, 4)}
    chars |= {f"dup_{n}gram": 0 for n in range(5, 11)}

    # both [places]: where an (n-1)-gram begins that comes more than once, ascending, and its number
    places = (times > 1).nonzero()[0]
    grams = ids[places]
    for n, name in enumerate(chars, start=2):
        # an n-gram is two (n-1)-grams one token apart
        adjacent = (places[1:] - places[:-1] == 1).nonzero()[0]
        if not len(adjacent):
            break
        keys = grams[adjacent] * len(ids) + grams[adjacent + 1]
        places = places[adjacent]

        # equal n-grams side by side; stable, so that the first of a run is where the n-gram comes first
        order = keys.argsort(kind="stable")
        keys = keys[order]
        is_start = np.ones(len(places) + 1, bool)
        np.not_equal(keys[1:], keys[:-1], out=is_start[1:-1])
        bounds = is_start.nonzero()[0]
        if len(bounds) == len(is_start):  # none comes twice, so no longer one does
            break
        sizes = bounds[1:] - bounds[:-1]  # [distinct n-grams], as `first`
        first = places[order[bounds[:-1]]]
        if n <= 4:
            # of several that are as frequent, the one that comes first
            most = sizes.max()
            top = first[sizes == most].min()
            chars[name] = int((ends[top + n] - ends[top] + n - 1) * most)

        # back to the order of the text; -1 marks what comes once and drops out
        first[sizes == 1] = -1
        grams = np.empty_like(places)
        grams[order] = first.repeat(sizes)
        again = grams >= 0
        places, grams = places[again], grams[again]
        if n > 4:
            chars[name] = int(_repeated(places, grams, n, ends))
    return chars


def _repeated(places: np.ndarray, grams: np.ndarray, n: int, ends: np.ndarray) -> int:
    """Characters of the n-grams `grams` at `places`, both [places], that came before, each token counted once."""
    seen: set[int] = set()
    chars = 0
    free = 0  # the first token that no repeated n-gram has taken
    for place, gram in zip(places.tolist(), grams.tolist()):
        if place >= free:
            if gram in seen:
                chars += ends[place + n] - ends[place]
                free = place + n
            else:
                seen.add(gram)
    return chars
