"""What `blocks` knows of a block: words that tell one kind of markup or text from another, and the numbers made of them.

Shallow text features go back to BoilerPipe (Kohlschütter et al., WSDM 2010), scores of containers to Readability;
what is new here is how often a block's kind of markup occurs on the page and how much text it holds there, and what
the heading above it and the containers around it begin with.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import numpy as np

from kit.data.text.vocabulary import CLASS_WORDS, FIRST_PERSON_WORDS, FUNCTION_WORDS, FURNITURE_WORDS


@dataclass(frozen=True)
class Blocks:
    """A walked page: its text blocks in reading order and the tree of containers they lie in.

    `rows` has `COLUMNS` per block, flat. A container is a block-level element that holds at least one block: the
    number of its parent, of its first block, one past that of its last, and of its start tag among the page's.
    """

    title: str
    texts: list[str]
    rows: list[int]
    parents: list[int]
    starts: list[int]
    ends: list[int]
    kinds: list[int]


COLUMNS = ("container", "flags", "own", "depth", "link_chars", "links", "breaks", "buttons", "row")
_TAGS = (
    "div p li h1 h2 h3 h4 td th blockquote pre dt dd caption article summary address header section form tr"
)
TAGS = _TAGS.split()
"""Tags that tell blocks apart, by rank; the rest are like one of these or like `div`."""
_ALIKE = "h5=h4 h6=h4 figcaption=caption legend=summary footer=header nav=header"
RANK = {tag: i for i, tag in enumerate(TAGS)}
RANK |= {tag: RANK[other] for tag, other in (pair.split("=") for pair in _ALIKE.split())}
OTHER = "body noscript ul ol dl table thead tbody tfoot main aside fieldset figure details center dialog menu hgroup"
BLOCK_TAGS = frozenset([*RANK, *OTHER.split()])
_ANCESTORS = "nav header footer aside article main form table ul ol figure section dl blockquote pre tr hidden noscript"
ANCESTORS = _ANCESTORS.split()
BIT = {tag: 1 << i for i, tag in enumerate(ANCESTORS)} | {"menu": 1}
PRE, UNSEEN = BIT["pre"], BIT["hidden"] | BIT["noscript"]
# four counters of twelve bits in one integer, so that one look-up a word and one sum a block count all four: function
# words, furniture, words of the title, first person; a bit above them marks where a block begins
_LEXICON = {
    word: (word in FUNCTION_WORDS) + ((word in FURNITURE_WORDS) << 12) + ((word in FIRST_PERSON_WORDS) << 36)
    for word in FUNCTION_WORDS | FURNITURE_WORDS | FIRST_PERSON_WORDS
}
_IN_TITLE, _MARK = 1 << 24, 1 << 60
SEEN_CHARS = 200  # of a block are enough for its shares; under 1,024, what ten bits can count


def _table(*classes: str) -> np.ndarray:
    """Of each character, a counter in the ten bits of its class, so that one sum counts all classes at once."""
    table = np.zeros(0x10000, np.int64)
    for i, chars in enumerate(classes):
        table[[ord(c) for c in chars]] = 1 << 10 * i
    return table


_CHARS = _table(
    ".!?。！？",
    ",;、，",
    "".join(c for c in map(chr, range(0x3000)) if c.isupper()),
    "".join(map(chr, (*range(0x3041, 0x3100), *range(0x3400, 0xA000)))),  # no spaces between words
    "|•·»›→/©",
    "0123456789",
)
_FIRST = np.log2(_table("“\"«„‘'", "•-–*·", "0123456789") + 1)
_LAST = np.log2(_table('.!?。！？”"…', ":", ",;、，", ")]") + 1)


def _measure(b: Blocks, link_chars: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each block's text amounts to, float64 [6, blocks], and the features `_TEXT_FEATURES`, [features, blocks].

    The amounts: words, those outside links, stop words, marks, furniture, first person. `link_chars` [blocks].
    """
    # characters as numbers; of long blocks the beginning, which bounds the time a page can take
    seen = [text[:SEEN_CHARS] for text in b.texts]
    chars = np.fromiter(map(len, b.texts), np.int64, len(seen))
    lengths = np.fromiter(map(len, seen), np.int64, len(seen))
    codes = np.minimum(np.frombuffer("".join(seen).encode("utf-32-le", "surrogatepass"), np.uint32), 0xFFFF)
    ends = np.cumsum(lengths)
    first = ends - lengths
    # counts [6, blocks]: one sum a block, whose fields of ten bits are then taken apart
    counts = np.add.reduceat(_CHARS.take(codes), first) >> np.arange(0, 60, 10)[:, None] & 1023

    # words: all blocks as one list with a mark before each, counted the same way; lexical [4, blocks]
    title_words = b.title.lower().split()[:50]
    lexicon = _LEXICON | {word: _IN_TITLE + _LEXICON.get(word, 0) for word in title_words}
    lexicon["\0"] = _MARK
    tokens = ("\0 " + " \0 ".join(seen)).lower().split()
    values = np.fromiter(map(lexicon.get, tokens, repeat(0)), np.int64, len(tokens))
    marks = np.flatnonzero(values >= _MARK)
    words = np.maximum(np.diff(marks, append=len(tokens)) - 1, 1)
    lexical = np.add.reduceat(values, marks) >> np.arange(0, 48, 12)[:, None] & 0xFFF

    # shares, each [blocks]
    stop, furniture, titled, person = lexical / words
    sentences, _, upper, unspaced, odd, digits = counts / lengths
    stop = np.where(unspaced > 0.2, 0.4, stop)  # of no use where words are not told apart
    # words of the whole block, by those of its beginning
    long = (words + 0.6 * counts[3]) * (chars / lengths)
    density = np.minimum(link_chars / chars, 1)
    text = long * (1 - density)
    # how often the same block came before: what repeats is a label, such as "Reply"
    copies: dict[str, int] = {}
    nth = []
    for block in b.texts:
        nth.append(copies.get(block, 0))
        copies[block] = nth[-1] + 1
    log_chars, log_text = np.log1p((chars, text))
    text_features = (density, log_chars, log_text, furniture, titled, sentences, upper, odd, lengths / words)
    text_features += (_LAST[codes[ends - 1]], nth, person, _FIRST[codes[first]], digits)
    amounts = (long, text, long * stop, counts[0] + counts[1], lexical[1], lexical[3])
    return np.stack(amounts), np.stack(text_features)


_OWN = "density log_chars log_text boiler titled sentences upper odd word_chars last nth person first digits"
_TEXT_FEATURES = _OWN.split()
_DENSITY, _LOG_CHARS, _LOG_TEXT, _BOILER_SHARE, _TITLED = range(5)
_PERSON_SHARE = _TEXT_FEATURES.index("person")
_NEAR, _WINDOWS, _LEVELS = (-1, 1), np.array([[3], [8], [20]]), 5
_PLACES = {f"in_{t}": i for i, t in enumerate(ANCESTORS)}
_PLACES |= {f"above_{t}": i for i, t in enumerate(CLASS_WORDS, len(ANCESTORS))}
_PLACES |= {f"own_{t}": i for i, t in enumerate(CLASS_WORDS, 64)}
_MARKS = (
    "in_nav in_header in_footer in_aside in_article in_main in_form in_ul in_ol in_section in_hidden above_nav "
    "above_related above_comment above_cookie above_form above_popup above_post above_meta own_nav own_related "
    "own_comment own_form own_meta own_content own_post own_image"
)
_PAGE_MARKS = "in_article in_main in_table in_ul in_pre above_post above_product above_comment above_review"
_BITS = [_PLACES[name] for name in f"{_MARKS} {_PAGE_MARKS}".split()]
_OF_HEADING = [_PLACES[f"own_{name}"] for name in ("comment", "related", "review", "meta")]
_PAGE = _BITS[-len(_PAGE_MARKS.split()) :]
NAMES = (
    f"rank depth links buttons position words_before blocks_after {' '.join(_TEXT_FEATURES)} {_MARKS}"
    + "".join(f" {name}{d:+}" for d in _NEAR for name in ("rank", "log_text"))
    + "".join(f" {name}_around_{k}" for name in ("text_share", "log_text") for k in (3, 8, 20))
    + " text_before_10 text_after_10 since_heading since_h1 since_title"
    + "".join(
        f" head_{name}"
        for name in ("boiler", "rank", "titled", "person", "chars", "comment", "related", "review", "meta")
    )
    + "".join(f" {name}_open_{u}" for name in ("boiler", "rank", "chars", "place") for u in range(4))
    + "".join(
        f" {name}_up_{u}"
        for name in ("text", "text_share", "stop", "marks", "p", "boiler", "person", "size", "blocks")
        for u in range(5)
    )
    + "".join(f" {name}_alike_{u}" for u in range(3) for name in ("blocks", "text", "text_share", "mean"))
    + " siblings in_best in_best_parent from_best score_0 score_1 score_2"
    + " page_words page_blocks page_text_share page_stop page_p longest best_share h1s ps"
    + "".join(f" page_{t}" for t in _PAGE_MARKS.split())
).split()
"""Features of a block, in the order of `features`; `up_0` is its container, `up_1` that one's container, …"""


def features(b: Blocks) -> np.ndarray:
    """Features of the blocks of a page, of which there must be one at least: blocks × `NAMES`."""
    n = len(b.texts)
    # all but `rows`: [containers]
    rows, parents, starts, ends, kinds = (
        np.fromiter(column, np.int64, len(column))
        for column in (b.rows, b.parents, b.starts, b.ends, b.kinds)
    )
    container, flags, own, depth, link_chars, links, _, buttons, _ = rows.reshape(n, -1).T
    rank, index = own & 63, np.arange(n)
    amounts, text_features = _measure(b, link_chars)
    words, text = amounts[:2]
    bits = np.unpackbits(np.stack((flags, own >> 6), 1).view(np.uint8), axis=1, bitorder="little").T
    is_p = rank == RANK["p"]
    # amounts of any run of blocks are then two look-ups: sums[:, end] - sums[:, start]
    sums = np.zeros((7, n + 1))  # of words, text, stop words, marks, words in p, boiler, person
    np.cumsum(amounts[:4], axis=1, out=sums[:4, 1:])
    np.cumsum(words * is_p, out=sums[4, 1:])
    np.cumsum(amounts[4:], axis=1, out=sums[5:, 1:])
    total = sums[0, -1]
    # the five innermost containers of each block, [5, blocks]; the body is its own parent
    up = [container]
    for _ in range(_LEVELS - 1):
        up.append(parents[up[-1]])
    levels = np.stack(up)
    inside, best_share = _containers(
        (parents, starts, ends, kinds), levels, rank, words, text, sums, text_features[_DENSITY]
    )
    groups = (
        (rank, depth, links, buttons, index / n, sums[0, :-1] / total, n - index),
        text_features,
        bits[_BITS[: -len(_PAGE)]],
        _around(rank, text_features[_LOG_TEXT], sums, text_features[_TITLED]),
        _headed(rank, text_features, bits, starts[levels[:4]]),
        inside,
    )
    # the same for all blocks of a page
    page = [np.log1p(total), np.log1p(n), *(sums[[1, 2, 4], -1] / total), words.max(), best_share]
    page += [(rank == RANK["h1"]).sum(), is_p.sum(), *(bits[_PAGE] @ words / total)]
    matrix = np.empty((len(NAMES), n), np.float32)
    np.concatenate(groups, out=matrix[: -len(page)], casting="unsafe")
    matrix[-len(page) :] = np.array(page)[:, None]
    return np.ascontiguousarray(matrix.T)


def _around(rank: np.ndarray, log_text: np.ndarray, sums: np.ndarray, titled: np.ndarray) -> np.ndarray:
    """Features of a block's neighbours, and how far above it the last heading, the first h1 and the title are."""
    n = len(rank)
    index = np.arange(n)
    near = np.full((2, n + 4), -1.0)
    near[:, 2:-2] = rank, log_text
    neighbours = [near[:, 2 + d : 2 + d + n] for d in _NEAR]
    low, high = np.maximum(index - _WINDOWS, 0), np.minimum(index + _WINDOWS + 1, n)
    words, text = sums[:2, high] - sums[:2, low]
    before = sums[1, :-1] - sums[1, np.maximum(index - 10, 0)]
    after = sums[1, np.minimum(index + 11, n)] - sums[1, 1:]
    since = [index - np.maximum.accumulate(np.where(_is_heading(rank), index, -99))]
    for marked in (rank == RANK["h1"], titled > 0.6):
        since.append(index - marked.argmax() if marked.any() else np.full(n, -999))
    return np.concatenate((*neighbours, text / (words + 1), np.log1p(text), np.log1p((before, after)), since))


def _is_heading(rank: np.ndarray) -> np.ndarray:
    return (rank >= RANK["h1"]) & (rank <= RANK["h4"])


def _headed(rank: np.ndarray, text_features: np.ndarray, bits: np.ndarray, opening: np.ndarray) -> np.ndarray:
    """Features of the last heading, and of the first block of each container ("Related posts", "Comments")."""
    index = np.arange(len(rank))
    heading = np.maximum.accumulate(np.where(_is_heading(rank), index, 0))
    boiler, titled, person, chars = text_features[[_BOILER_SHARE, _TITLED, _PERSON_SHARE, _LOG_CHARS]]
    last = (values.take(heading) for values in (boiler, rank, titled, person, chars, *bits[_OF_HEADING]))
    opened = (boiler[opening], rank[opening], chars[opening], np.log1p(index - opening))
    return np.concatenate((np.stack(list(last)), *opened))


def _containers(
    tree: tuple[np.ndarray, ...],
    levels: np.ndarray,
    rank: np.ndarray,
    words: np.ndarray,
    text: np.ndarray,
    sums: np.ndarray,
    density: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Features of the containers a block is in, of those alike, and of the page's best; the best's share of words."""
    parents, starts, ends, kinds = tree
    inside = sums[:, ends] - sums[:, starts]
    share = inside[1:] / (inside[0] + 1)
    described = np.stack((np.log1p(inside[1]), *share, inside[0] / sums[0, -1], np.log1p(ends - starts)))
    # containers are alike where their start tags are the same, classes included
    apart = np.arange(3)[:, None] * (int(kinds.max()) + 1)  # one count for each level
    kind = (kinds[levels[:3]] + apart).ravel()
    blocks = np.bincount(kind)
    all_words, all_text = (np.bincount(kind, np.tile(amounts, 3)) for amounts in (words, text))
    of_kinds = (np.log1p(blocks), np.log1p(all_text), all_text / (all_words + 1), all_words / (blocks + 1))
    alike = np.stack(of_kinds)[:, kind].reshape(4, 3, -1).swapaxes(0, 1).reshape(12, -1)
    same = parents * (int(kinds.max()) + 1) + kinds
    _, number, count = np.unique(same, return_inverse=True, return_counts=True)
    siblings = count[number][levels[:4]].max(axis=0)
    # as Readability does: a container is worth what its blocks are, half as much one level further up
    good = np.where((density < 0.4) & (words > 8), text * 0.4 + np.diff(sums[2]) * (1 - density), 0.0)
    m = len(parents)
    score = np.bincount(levels[0], good * np.where(rank == RANK["p"], 0.2, 0.5), m)
    score += np.bincount(levels[1], good, m) + np.bincount(levels[2], good * 0.5, m)
    best = int(score.argmax())
    index = np.arange(len(words))
    low, high, above = starts[best], ends[best], parents[best]
    place = [
        siblings,
        (index >= low) & (index < high),
        (index >= starts[above]) & (index < ends[above]),
        np.minimum(index - low, 0) + np.maximum(index - high + 1, 0),
    ]
    scores = score[levels[:3]] / (score[best] + 1)
    of_levels = described[:, levels].reshape(-1, len(index))
    return np.concatenate((of_levels, alike, place, scores)), inside[0, best] / sums[0, -1]
