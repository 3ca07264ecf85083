"""A page as blocks: one walk over the serialised page, which leaves out what is hidden and what never holds text."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterator

from selectolax.lexbor import LexborHTMLParser

from kit.data.extract.block_features import ANCESTORS, BIT, BLOCK_TAGS, CLASS_WORDS, PRE, RANK, Blocks

MAX_STEPS, MAX_WORDS = 3_000, 50_000  # entries of the caches of two pure functions
MAX_DEPTH = 5_000  # nested elements; browsers stop at 512
ROLES = dict(navigation="nav", banner="header", contentinfo="footer", complementary="aside", main="main")
_GROUPS = {
    stem.rstrip("$"): 1 << i for i, stems in enumerate(CLASS_WORDS.values()) for stem in stems.split("|")
}
_STEMS = re.compile("|".join(sorted((s for x in CLASS_WORDS.values() for s in x.split("|")), reverse=True)))
_PIECES = re.compile("[A-Z]?[a-z]{2,}|[A-Z]{2,}")
_HIDDEN = re.compile(r' hidden="| aria-hidden="true"|display: ?none|visibility: ?hidden')
INLINE, LINK, LINK_END, BREAK, BUTTON, SKIP, OPEN, CLOSE = range(8)
Step = tuple[
    int, int, int, str
]  # of a tag: its kind, flags for all within, rank and class words of its own, itself
_CLOSE: dict[str, Step] = {f"/{tag}": (CLOSE, 0, 0) for tag in BLOCK_TAGS}
_SHORT: dict[str, Step] = {
    name: (kind, 0, 0)
    for kind, names in {
        INLINE: "span /span img i /i b /b strong /strong em /em input source col font /font small /small sup /sup sub /sub u /u "
        "time /time picture /picture code /code /button /label option /option cite /cite path /path",
        LINK: "a",
        LINK_END: "/a",
        BREAK: "br hr",
        BUTTON: "button label",
        SKIP: "script style svg template iframe object video audio canvas select textarea math map",
    }.items()
    for name in names.split()
}
_steps: dict[str, Step] = dict(_CLOSE)
_words: dict[str, int] = {}
_NESTING = re.compile(
    r"<(/?)(address|article|aside|blockquote|center|details|dialog|dir|div|dl|fieldset|figcaption|figure|footer|form"
    r"|h\d|header|hgroup|listing|main|menu|nav|ol|pre|search|section|summary|ul)\b[^>]*>?",
    re.IGNORECASE,
)


def parse(html: str) -> LexborHTMLParser:
    """The page's DOM.

    Lexbor takes time quadratic in the depth of open blocks (3 s at 50,000), so where they are nested deeper than
    `MAX_DEPTH` the page is parsed with a paragraph in the place of each: text stays, structure does not.
    """
    if html.count("<") > MAX_DEPTH and _depth(html) > MAX_DEPTH:
        html = _NESTING.sub("<p>", html)
    return LexborHTMLParser(html)


def _depth(html: str) -> int:
    """Of block-level elements open at once the most, or more: each end tag closes one of its own name only."""
    opened: Counter[str] = Counter()
    depth = most = 0
    for end, name in _NESTING.findall(html.lower()):
        if not end:
            opened[name] += 1
            depth += 1
            most = max(most, depth)
        elif opened[name]:
            opened[name] -= 1
            depth -= 1
    return most


def walk(tree: LexborHTMLParser) -> Blocks:
    """Text blocks of the page; takes scripts and styles out of `tree`.

    Reads the tree as lexbor writes it out, where every element is closed and `<` and `>` are always a tag's: cutting
    that at `<` is several times faster than visiting nodes from Python, and no nesting is too deep.
    """
    collects = gc.isenabled()
    gc.disable()  # thousands of strings and tuples and no cycle: looking for one takes a tenth of the time
    try:
        return _walk(tree)
    finally:
        if collects:
            gc.enable()


def _walk(tree: LexborHTMLParser) -> Blocks:
    title = tree.css_first("title")  # found early, while `tags` looks through all of the page
    name = title.text() if title is not None else ""
    tree.strip_tags(["script", "style", "svg"], recursive=True)
    body = tree.body
    pieces = iter(((body.html if body is not None else None) or "").split("<"))
    texts: list[str] = []
    rows: list[int] = []
    parents, starts, ends, kinds = [0], [0], [0], [0]
    numbers: dict[str, int] = {}
    stack = [(0, 0, 0, 0)]  # of open containers: number, flags, own, table row
    parts: list[str] = []  # of the block being read
    at = flags = own = row = link_chars = links = breaks = buttons = 0
    linked = False
    known, short = _steps.get, _SHORT.get
    for piece in pieces:
        tag, _, text = piece.partition(">")
        step = known(tag) or short(tag.partition(" ")[0]) or _step(tag)
        kind = step[0]
        if kind >= OPEN:
            if parts:
                block = "".join(parts)
                if breaks or flags & PRE or "&" in block:
                    block = _clean(block, breaks, flags & PRE)
                else:
                    block = " ".join(block.split())
                if block:
                    texts.append(block)
                    rows += (at, flags, own, len(stack), link_chars, links, breaks, buttons, row)
                parts = []
            link_chars = links = breaks = buttons = 0
            if kind == OPEN:
                parents.append(at)
                at = len(starts)
                starts.append(len(texts))
                ends.append(0)
                kinds.append(numbers.setdefault(tag, len(numbers)))
                flags |= step[1]
                own = step[2] if step[2] > 63 else step[2] | own & ~63  # without class words, the parent's
                if step[2] & 63 == RANK["tr"]:
                    row = at
                stack.append((at, flags, own, row))
            elif at:
                stack.pop()
                if starts[at] == len(texts):  # nothing in it: it is the last, forget it
                    del parents[at:], starts[at:], ends[at:], kinds[at:]
                else:
                    ends[at] = len(texts)
                at, flags, own, row = stack[-1]
        elif kind == LINK:
            links += 1
            linked = True
        elif kind == LINK_END:
            linked = False
        elif kind == BREAK:
            parts.append("\0")
            breaks += 1
        elif kind == BUTTON:
            buttons += 1
        elif kind == SKIP:
            text = _skip(piece, pieces, tag)
        if text and (parts or not text.isspace()):
            parts.append(text)
            if linked:
                link_chars += len(text)
    for opened in stack:
        ends[opened[0]] = len(texts)
    return Blocks(name, texts, rows, parents, starts, ends, kinds)


def _skip(piece: str, pieces: Iterator[str], tag: str) -> str:
    """Go past a comment or an element that holds no text of the page; returns the text that follows."""
    end = "-->" if tag.startswith("!--") else f"/{tag.partition(' ')[0]}>"
    while end not in piece:
        piece = next(pieces, end)
    return piece.partition(end)[2]


def _clean(text: str, breaks: int, keep_lines: int) -> str:
    """Text of a block with its entities resolved (lexbor writes these four) and its white space collapsed."""
    if "&" in text:
        for entity, char in (("&nbsp;", " "), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
            text = text.replace(entity, char)
    if keep_lines:
        return "\n".join(line.rstrip() for line in text.replace("\0", "\n").split("\n")).strip("\n")
    if breaks:
        return "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\0"))))
    return " ".join(text.split())


def _step(tag: str) -> Step:
    """Meaning of a tag that is in none of the tables; of block-level tags remembered, whatever page they are on."""
    name = tag.partition(" ")[0]
    if name not in BLOCK_TAGS:
        return SKIP if tag.startswith("!--") else INLINE, 0, 0
    bits, words = BIT.get(name, 0), 0
    for start in (' class="', ' id="', ' itemprop="'):
        at = tag.find(start) + len(start)
        if at >= len(start):
            value = tag[at : tag.find('"', at)]
            known = _words.get(value)
            words |= _value(value) if known is None else known
    if ' role="' in tag:
        bits |= BIT.get(ROLES.get(tag.partition(' role="')[2].partition('"')[0], ""), 0)
    if ("hidden" in tag or "none" in tag) and _HIDDEN.search(tag):
        bits |= BIT["hidden"]
    if len(_steps) > MAX_STEPS:
        _steps.clear()
        _steps.update(_CLOSE)
    _steps[tag] = step = OPEN, bits | words << len(ANCESTORS), RANK.get(name, 0) | words << 6
    return step


def _value(value: str) -> int:
    """Bits of all words of an attribute's value."""
    bits = 0
    for word in value.replace("-", " ").replace("_", " ").split():
        known = _words.get(word)
        bits |= _word(word) if known is None else known
    if len(value) < 200 and len(_words) < MAX_WORDS:
        _words[value] = bits
    return bits


def _word(word: str) -> int:
    """Bits of the groups in `CLASS_WORDS` that a word of a class or id belongs to, camel case cut into pieces."""
    stem = word.rstrip("0123456789")
    if not stem.isalpha() or len(stem) > 40:
        return 0
    if len(_words) > MAX_WORDS:
        _words.clear()
    bits = 0
    for piece in _PIECES.findall(stem):
        for found in _STEMS.findall(piece.lower()):
            bits |= _GROUPS[found]
    _words[word] = bits
    return bits
