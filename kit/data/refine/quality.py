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
from collections.abc import Callable, Iterable
from functools import cache
from urllib.parse import urlsplit

import numpy as np

from kit import resolve_path
from kit.data.text import words as w
from kit.data.text.rules import RULE_SETS, RULES
from kit.errors import ParamError

BULLETS, ELLIPSES = ("•", "-"), ("...", "…")


CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
LINE_PHRASES = (
    "javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"
)  # fmt: skip
"""C4 takes a line with one of them out."""
MIN_LINE_WORDS, LONG_WORD, SHORT_LINE = 3, 1000, 30
BANNED_WORDS = frozenset(
    [
        "porn",
        "porno",
        "pornhub",
        "xxx",
        "xvideos",
        "hentai",
        "milf",
        "camgirl",
        "camgirls",
        "escorts",
        "onlyfans",
        "sexcam",
        "sexcams",
    ]
)
SOFT_WORDS = frozenset(
    "adult casino casinos poker slots jackpot betting gambling payday loans viagra cialis pills pharmacy erotic nude "  # noqa: SIM905
    "sexy dating replica cheap torrent warez crack keygen".split()
)
"""One of the first or two of the second in a URL speak against it; lists of our own, short on purpose."""


def rule_values(
    text: str, rule_sets: Iterable[str] = RULE_SETS, c4_lines: bool = False
) -> tuple[str, dict[str, float]]:
    """The text that moves on and the value of every rule of `rule_sets`; shares are 0–1, the others counts.

    With `c4_lines` only lines that C4 keeps move on, unless it keeps none. `url` is not measured here.
    """
    sets, values = set(rule_sets), {}
    tokens = w.tokens(text) if sets & {"gopher_repetition", "gopher_quality"} or ("fineweb" in sets and not c4_lines) else None  # fmt: skip
    if "gopher_repetition" in sets:
        values |= _repetition(text, tokens)
    if "gopher_quality" in sets:
        values |= _quality(text, tokens)
    if "c4" in sets or c4_lines:
        kept, found = c4(text, tokens)
        values |= found if "c4" in sets else {}
        if c4_lines and kept and kept != text:
            text, tokens = kept, w.tokens(kept) if "fineweb" in sets else None
    if "fineweb" in sets:
        values |= _fineweb(text, len((tokens or w.tokens(text)).ids))
    return text, values


def _repetition(text: str, tokens: w.Tokens) -> dict[str, float]:
    n_chars = max(len(text), 1)
    paragraphs, lines = re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text)
    dup_paragraphs, dup_paragraph_chars = _duplicates(paragraphs)
    dup_lines, dup_line_chars = _duplicates(lines)
    values = {
        "dup_paragraphs": dup_paragraphs / len(paragraphs),
        "dup_paragraph_chars": dup_paragraph_chars / n_chars,
        "dup_lines": dup_lines / len(lines),
        "dup_line_chars": dup_line_chars / n_chars,
    }
    ids, lengths = tokens.ids, tokens.traits[:, w.LENGTH]
    ends = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    # numbers of this text alone: those of the process grow with all it has seen
    _, at, ids, times = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    return values | {k: chars / n_chars for k, chars in _ngrams(at[ids], times[ids], ends).items()}


def _quality(text: str, tokens: w.Tokens) -> dict[str, float]:
    traits = tokens.traits
    n_tokens, n_words = max(len(traits), 1), int(traits[:, w.WORD].sum())
    lines = text.splitlines()
    n_lines = max(len(lines), 1)
    stop = int(np.bitwise_or.reduce(traits[:, w.STOP])) if len(traits) else 0
    return {
        "words": float(n_words),
        "mean_word_length": int(traits[:, w.LENGTH] @ traits[:, w.WORD]) / max(n_words, 1),
        "hash_ratio": text.count("#") / n_tokens,
        "ellipsis_ratio": (text.count("...") + text.count("…")) / n_tokens,
        "bullet_lines": sum(x.lstrip().startswith(BULLETS) for x in lines) / n_lines,
        "ellipsis_lines": sum(x.rstrip().endswith(ELLIPSES) for x in lines) / n_lines,
        "alpha_words": int(traits[:, w.ALPHA].sum()) / n_tokens,
        "stop_words": float(stop.bit_count()),
    }


def c4(text: str, tokens: w.Tokens | None = None) -> tuple[str, dict[str, float]]:
    """What C4's line rules leave of a text, and how many lines hold what rules a document out, and sentences.

    Sentences are counted in every line by itself, as spaCy's sentencizer does: one begins with the first token
    that is no mark after a mark that ends one. `tokens` are the text's, where they are known.
    """
    kept, pieces, lorem, curly = [], [], 0, 0
    lower = text.lower()
    phrases = [x for x in LINE_PHRASES if x in lower]
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
        lorem += has_lorem and "lorem ipsum" in low
        if phrases and "javascript" in low:
            continue
        curly += has_curly and "{" in line
        if any(x in low for x in phrases):
            continue
        kept.append(line)
        pieces.append(n)
    cleaned = "\n".join(kept)
    if tokens is None or cleaned != text:
        tokens = w.tokens(cleaned)
    return cleaned.strip(), {
        "lorem_ipsum": float(lorem),
        "curly_brackets": float(curly),
        "sentences": float(_sentences(tokens, np.array(pieces, np.int64))),
    }


def _sentences(tokens: w.Tokens, pieces: np.ndarray) -> int:
    """Sentences of a text whose lines have so many pieces each."""
    lines = np.zeros(len(pieces) + 1, np.int64)  # the token at which each line begins
    lines[1:] = np.append(0, np.cumsum(tokens.pieces))[np.cumsum(pieces)]
    ends = np.append(0, np.cumsum(tokens.traits[:, w.END]))
    at = (tokens.traits[:, w.MARK] == 0).nonzero()[0]  # tokens that may begin a sentence
    since = np.maximum(np.append(-1, at[:-1]) + 1, lines[np.searchsorted(lines, at, "right") - 1])
    return int(np.count_nonzero(ends[at] > ends[since])) + len(pieces)


def _fineweb(text: str, n_tokens: int) -> dict[str, float]:
    lines = [x for x in text.split("\n") if x.strip()]
    n_lines = max(len(lines), 1)
    return {
        "line_punct": sum(x[-1] in w.ENDS for x in lines) / n_lines,
        "short_lines": sum(len(x) <= SHORT_LINE for x in lines) / n_lines,
        "dup_chars": _duplicates(lines)[1] / max(len(text) - text.count("\n"), 1),
        "line_breaks": text.count("\n") / max(n_tokens, 1),
    }


def measure_url(url: str, blocked: Callable[[str], bool] = lambda url: False) -> dict[str, float]:
    """The values of the `url` rules."""
    parts = set(re.split(r"[^a-z0-9]+", url.lower()))
    return {
        "blocked_url": float(blocked(url)),
        "banned_url_words": float(len(parts & BANNED_WORDS)),
        "soft_url_words": float(len(parts & SOFT_WORDS)),
    }


@cache
def blocklist(path: str) -> Callable[[str], bool]:
    """Whether a URL is on the list in the file `path`: itself, its host, or a domain above it; `#` begins a remark.

    Raises `ParamError` when the file cannot be read.
    """
    if not path:
        return lambda url: False
    try:
        with open(resolve_path(path), encoding="utf-8") as f:
            listed = {x.partition("#")[0].strip().lower().removeprefix("www.") for x in f} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise ParamError(f"parameter 'blocked_urls': cannot read '{path}' ({error})") from None
    pages = {re.sub(r"^https?://(www\.)?", "", x).rstrip("/") for x in listed if "/" in x}

    def blocked(url: str) -> bool:
        try:
            host = (urlsplit(url).hostname or "").removeprefix("www.")
        except ValueError:
            return False
        labels = host.split(".")
        page = re.sub(r"^https?://(www\.)?", "", url.lower()).rstrip("/")
        return page in pages or any(".".join(labels[i:]) in listed for i in range(len(labels)))

    return blocked


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

    `ids` are the tokens as numbers (where each comes first), `times` how often each of them comes, `ends` the
    characters before each token. Where nothing comes twice, the first n-gram is the most frequent one.
    An n-gram can come twice only where both (n-1)-grams in it do, so every round looks at those places alone,
    and numbers the n-grams there anew, exactly, by where they come first (as a suffix array is built).
    """
    chars = {f"top_{n}gram": int(ends[n]) + n - 1 if len(ids) >= n else 0 for n in (2, 3, 4)}
    chars |= {f"dup_{n}gram": 0 for n in range(5, 11)}
    at = (times > 1).nonzero()[0]
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
