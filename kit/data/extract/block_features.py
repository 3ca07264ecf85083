"""What `blocks` knows of a block: words that tell one kind of markup or text from another, and the numbers made of them.

Shallow text features go back to BoilerPipe (Kohlschütter et al., WSDM 2010), scores of containers to Readability;
what is new here is how often a block's kind of markup occurs on the page and how much text it holds there, and what
the heading above it and the containers around it begin with.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import numpy as np


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
CLASS_WORDS = {
    "nav": "nav|menu|crumb|toc$|pagina|pager|paging",
    "head": "header|masthead|topbar|banner|logo|brand",
    "foot": "footer|bottom|copyright|colophon",
    "side": "sidebar|side$|aside|widget|rail$|column",
    "related": "related|recommend|similar|more$|popular|trending|latest|also|teaser|promo|carousel|slider|swiper",
    "share": "share|sharing|social|facebook|twitter",
    "comment": "comment|disqus|respond|reply|replies",
    "cookie": "cookie|consent|gdpr|privacy",
    "ad": "advert|sponsor|adsense|ads$|ad$|dfp",
    "form": "form|search|filter|input|btn|button|cta|newsletter|subscri|sign|login|register",
    "popup": "modal|popup|overlay|dialog|hidden|hide|only$|screen|reader$|visually|collapse|skip|print",
    "meta": "meta|byline|date|time|tags$|tag$|categor|posted|info|credit",
    "image": "caption|figure|image|photo|gallery|media|thumb",
    "content": "content|article|entry|main|body|text|story|prose|markdown",
    "post": "post|message|thread|topic|answer|question",
    "review": "review|testimonial|rating|quote|feedback|star$",
    "author": "author|bio$|profile|avatar|user|member",
    "product": "product|price|cart|shop|item|card|grid|listing|list",
    "detail": "description|summary|detail|feature|spec|faq|accordion|tab",
    "title": "hero|title|headline|intro|lead|subtitle",
}
_STOP = """the of and to in a is that for it as was with be by on not he his but at are this have or had from an they
    which you were all her she there would their we him been has when who will no more if out so said what up its
    about than into them can only other new some could time these two may then do first any my now such like our
    der die das und ist nicht ein eine zu mit den von auf sich des im dem für es auch als er hat aus bei nach wird
    sind noch wie wir einen zum war haben nur oder aber vor zur bis durch man sein wurde kann wenn um ich sie dass
    le la les de et est un une que qui dans pour pas sur au par plus ce se ne il avec sont mais ou son nous vous
    el los las y en del con su para al lo como más pero di e che per non è della i sono da het een van dat op te
    zijn voor met niet aan o um os não na no do em uma w z się jest że и в на не что с по как это для из"""
STOP = frozenset(_STOP.split())
_BOILER = """cookie cookies privacy policy copyright © rights reserved login log sign signin signup subscribe newsletter
    share tweet facebook twitter pinterest linkedin instagram whatsapp youtube related read comment comments reply
    replies posted menu search terms conditions contact impressum datenschutz agb advertisement advertise previous
    next home follow email e-mail download cart click view more updated published author tags categories category
    filed skip back top anmelden teilen kommentar kommentare weiter weiterlesen mehr artikel like likes vote votes
    javascript browser enable account password register online quote edit report members joined location messages
    posts thread views shop wishlist quantity add checkout sale price free shipping sitemap faq careers support
    help press blog news latest popular recent archives photo image credit: via print pdf close accept settings
    partager suivez accueil connexion mentions légales leer compartir comentarios inicio testimonials reviews review faq faqs
    recommended similar trending discover watch bio author leave cancel stories"""
BOILER = frozenset(_BOILER.split())
_PERSON = "i my me i'm i've i’m i’ve mine myself you your ich mein meine mir je j'ai mon ma yo mi eu"
PERSON = frozenset(_PERSON.split())
_LEXICON = {w: (w in STOP) + ((w in BOILER) << 12) + ((w in PERSON) << 36) for w in {*STOP, *BOILER, *PERSON}}
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
    """Amounts per block (words, those outside links, stop words, marks, boilerplate, person) and the features `_TOLD`."""
    seen = [t[:SEEN_CHARS] for t in b.texts]
    chars, lengths = (np.fromiter(map(len, t), np.int64, len(seen)) for t in (b.texts, seen))
    codes = np.minimum(np.frombuffer("".join(seen).encode("utf-32-le", "surrogatepass"), np.uint32), 0xFFFF)
    ends = np.cumsum(lengths)
    first = ends - lengths
    counts = np.add.reduceat(_CHARS.take(codes), first) >> np.arange(0, 60, 10)[:, None] & 1023
    lexicon = _LEXICON | {w: _IN_TITLE + _LEXICON.get(w, 0) for w in b.title.lower().split()[:50]}
    lexicon["\0"] = _MARK
    tokens = ("\0 " + " \0 ".join(seen)).lower().split()
    values = np.fromiter(map(lexicon.get, tokens, repeat(0)), np.int64, len(tokens))
    marks = np.flatnonzero(values >= _MARK)  # one before each block
    words = np.maximum(np.diff(marks, append=len(tokens)) - 1, 1)
    lexical = np.add.reduceat(values, marks) >> np.arange(0, 48, 12)[:, None] & 0xFFF
    stop, boiler, titled, person = lexical / words
    sentences, _, upper, unspaced, odd, digits = counts / lengths
    stop = np.where(unspaced > 0.2, 0.4, stop)  # of no use where words are not told apart
    long = (words + 0.6 * counts[3]) * (chars / lengths)
    density = np.minimum(link_chars / chars, 1)
    text = long * (1 - density)
    copies: dict[str, int] = {}
    nth = []
    for t in b.texts:
        nth.append(copies.get(t, 0))
        copies[t] = nth[-1] + 1
    log_chars, log_text = np.log1p((chars, text))
    told = (density, log_chars, log_text, boiler, titled, sentences, upper, odd, lengths / words)
    told += (_LAST[codes[ends - 1]], nth, person, _FIRST[codes[first]], digits)
    return np.stack((long, text, long * stop, counts[0] + counts[1], lexical[1], lexical[3])), np.stack(told)


_NUMBERS = (
    "density log_chars log_text boiler titled sentences upper odd word_chars last nth person first digits"
)
_TOLD = _NUMBERS.split()
_DENSITY, _LOG_CHARS, _LOG_TEXT, _BOILER_SHARE, _TITLED = range(5)
_PERSON_SHARE = _TOLD.index("person")
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
    f"rank depth links buttons position words_before blocks_after {' '.join(_TOLD)} {_MARKS}"
    + "".join(f" {x}{d:+}" for d in _NEAR for x in ("rank", "log_text"))
    + "".join(f" {x}_around_{k}" for x in ("text_share", "log_text") for k in (3, 8, 20))
    + " text_before_10 text_after_10 since_heading since_h1 since_title"
    + "".join(
        f" head_{x}"
        for x in ("boiler", "rank", "titled", "person", "chars", "comment", "related", "review", "meta")
    )
    + "".join(f" {x}_open_{u}" for x in ("boiler", "rank", "chars", "place") for u in range(4))
    + "".join(
        f" {x}_up_{u}"
        for x in ("text", "text_share", "stop", "marks", "p", "boiler", "person", "size", "blocks")
        for u in range(5)
    )
    + "".join(f" {x}_alike_{u}" for u in range(3) for x in ("blocks", "text", "text_share", "mean"))
    + " siblings in_best in_best_parent from_best score_0 score_1 score_2"
    + " page_words page_blocks page_text_share page_stop page_p longest best_share h1s ps"
    + "".join(f" page_{t}" for t in _PAGE_MARKS.split())
).split()
"""Features of a block, in the order of `features`; `up_0` is its container, `up_1` that one's container, …"""


def features(b: Blocks) -> np.ndarray:
    """Features of the blocks of a page, of which there must be one at least: blocks × `NAMES`."""
    n = len(b.texts)
    rows, parents, starts, ends, kinds = (
        np.fromiter(x, np.int64, len(x)) for x in (b.rows, b.parents, b.starts, b.ends, b.kinds)
    )
    container, flags, own, depth, link_chars, links, _, buttons, _ = rows.reshape(n, -1).T
    rank, index = own & 63, np.arange(n)
    amounts, told = _measure(b, link_chars)
    words, text = amounts[:2]
    bits = np.unpackbits(np.stack((flags, own >> 6), 1).view(np.uint8), axis=1, bitorder="little").T
    is_p = rank == RANK["p"]
    sums = np.zeros((7, n + 1))  # of words, text, stop words, marks, words in p, boiler, person
    np.cumsum(amounts[:4], axis=1, out=sums[:4, 1:])
    np.cumsum(words * is_p, out=sums[4, 1:])
    np.cumsum(amounts[4:], axis=1, out=sums[5:, 1:])
    total = sums[0, -1]
    up = [container]
    for _ in range(_LEVELS - 1):
        up.append(parents[up[-1]])
    levels = np.stack(up)
    inside, best_share = _containers(
        (parents, starts, ends, kinds), levels, rank, words, text, sums, told[_DENSITY]
    )
    groups = (
        (rank, depth, links, buttons, index / n, sums[0, :-1] / total, n - index),
        told,
        bits[_BITS[: -len(_PAGE)]],
        _around(rank, told[_LOG_TEXT], sums, told[_TITLED]),
        _headed(rank, told, bits, starts[levels[:4]]),
        inside,
    )
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
    for found in (rank == RANK["h1"], titled > 0.6):
        since.append(index - found.argmax() if found.any() else np.full(n, -999))
    return np.concatenate((*neighbours, text / (words + 1), np.log1p(text), np.log1p((before, after)), since))


def _is_heading(rank: np.ndarray) -> np.ndarray:
    return (rank >= RANK["h1"]) & (rank <= RANK["h4"])


def _headed(rank: np.ndarray, told: np.ndarray, bits: np.ndarray, opening: np.ndarray) -> np.ndarray:
    """Features of the last heading, and of the first block of each container ("Related posts", "Comments")."""
    index = np.arange(len(rank))
    heading = np.maximum.accumulate(np.where(_is_heading(rank), index, 0))
    boiler, titled, person, chars = told[[_BOILER_SHARE, _TITLED, _PERSON_SHARE, _LOG_CHARS]]
    last = (x.take(heading) for x in (boiler, rank, titled, person, chars, *bits[_OF_HEADING]))
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
    apart = np.arange(3)[:, None] * (int(kinds.max()) + 1)  # one count for each level
    kind = (kinds[levels[:3]] + apart).ravel()
    blocks, all_words, all_text = (np.bincount(kind, x) for x in (None, np.tile(words, 3), np.tile(text, 3)))
    of_kinds = (np.log1p(blocks), np.log1p(all_text), all_text / (all_words + 1), all_words / (blocks + 1))
    alike = np.stack(of_kinds)[:, kind].reshape(4, 3, -1).swapaxes(0, 1).reshape(12, -1)
    same = parents * (int(kinds.max()) + 1) + kinds
    _, number, count = np.unique(same, return_inverse=True, return_counts=True)
    siblings = count[number][levels[:4]].max(axis=0)
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
