"""A page as blocks: one walk over the serialised page, which leaves out what is hidden and what never holds text."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterator

from selectolax.lexbor import LexborHTMLParser

from kit.data.extract.block_features import ANCESTORS, BIT, BLOCK_TAGS, PRE, RANK, Blocks
from kit.data.text.vocabulary import CLASS_WORDS

# entries of the caches of two pure functions: what they forget changes the time, never a result
MAX_STEPS, MAX_WORDS = 3_000, 50_000
MAX_DEPTH = 5_000  # nested elements; browsers stop at 512
ROLES = dict(navigation="nav", banner="header", contentinfo="footer", complementary="aside", main="main")
_GROUPS = {
    stem.rstrip("$"): 1 << i for i, stems in enumerate(CLASS_WORDS.values()) for stem in stems.split("|")
}
# backwards, so that "header" is tried before "head": the first alternative that fits is taken
_STEMS = re.compile(
    "|".join(sorted((stem for stems in CLASS_WORDS.values() for stem in stems.split("|")), reverse=True))
)
_PIECES = re.compile("[A-Z]?[a-z]{2,}|[A-Z]{2,}")
_HIDDEN = re.compile(r' hidden="| aria-hidden="true"|display: ?none|visibility: ?hidden')
ROW_RANK = RANK["tr"]
INLINE, LINK, LINK_END, BREAK, BUTTON, SKIP, OPEN, CLOSE = range(8)
Step = tuple[int, int, int]
"""Of a tag: its kind, flags for all within, and rank (6 bits) and class words of its own."""
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


class _Containers:
    """The containers of a page while it is read: all of them as `Blocks` has them, and those that are open."""

    def __init__(self) -> None:
        self.parents, self.starts, self.ends, self.kinds = [0], [0], [0], [0]
        self.numbers: dict[str, int] = {}
        """A number for each different start tag."""
        self.stack = [(0, 0, 0, 0)]
        """Of those that are open, the body first: number, flags, own, table row."""

    def open(self, tag: str, step: Step, n_blocks: int) -> tuple[int, int, int, int]:
        """A container begins before block `n_blocks`; what now holds, as on the stack."""
        parent, flags, own, row = self.stack[-1]
        number = len(self.starts)
        self.parents.append(parent)
        self.starts.append(n_blocks)
        self.ends.append(0)
        self.kinds.append(self.numbers.setdefault(tag, len(self.numbers)))
        flags |= step[1]
        own = step[2] if step[2] > 63 else step[2] | own & ~63  # without class words, the parent's
        if step[2] & 63 == ROW_RANK:
            row = number
        self.stack.append((number, flags, own, row))
        return self.stack[-1]

    def close(self, n_blocks: int) -> tuple[int, int, int, int]:
        """The innermost container ends after `n_blocks` blocks; what now holds, as on the stack."""
        number = self.stack[-1][0]
        if number:  # the body stays open, whatever a page closes
            self.stack.pop()
            # nothing in it: it is the last, forget it
            if self.starts[number] == n_blocks:
                del self.parents[number:], self.starts[number:], self.ends[number:], self.kinds[number:]
            else:
                self.ends[number] = n_blocks
        return self.stack[-1]


def _serialised(tree: LexborHTMLParser) -> tuple[str, str]:
    """The page's title, and its body as lexbor writes it out, without scripts and styles."""
    # by a selector, which stops at the first one; `tags` would look through all of the page
    title = tree.css_first("title")
    name = title.text() if title is not None else ""
    tree.strip_tags(["script", "style", "svg"], recursive=True)
    body = tree.body
    return name, (body.html if body is not None else None) or ""


def _walk(tree: LexborHTMLParser) -> Blocks:
    name, source = _serialised(tree)
    pieces = iter(source.split("<"))
    texts: list[str] = []
    rows: list[int] = []
    containers = _Containers()
    stack = containers.stack
    parts: list[str] = []  # of the block being read
    container = flags = own = row = link_chars = links = breaks = buttons = 0
    linked = False
    # as locals: this loop runs once for every tag of every page
    known, short = _steps.get, _SHORT.get
    for piece in pieces:
        tag, _, text = piece.partition(">")
        # a tag as a whole has been met before (nearly always), or its name says enough, or it is looked into
        step = known(tag) or short(tag.partition(" ")[0]) or _step(tag)
        kind = step[0]
        if kind >= OPEN:
            # a block ends wherever a container begins or ends
            block = _clean("".join(parts), breaks, flags & PRE) if parts else ""
            if block:
                texts.append(block)
                rows += (container, flags, own, len(stack), link_chars, links, breaks, buttons, row)
            parts = []
            link_chars = links = breaks = buttons = 0
            if kind == OPEN:
                container, flags, own, row = containers.open(tag, step, len(texts))
            else:
                container, flags, own, row = containers.close(len(texts))
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
        # white space between tags begins no block, but inside one it parts words
        if text and (parts or not text.isspace()):
            parts.append(text)
            if linked:
                link_chars += len(text)
    for opened in stack:
        containers.ends[opened[0]] = len(texts)
    return Blocks(name, texts, rows, containers.parents, containers.starts, containers.ends, containers.kinds)


def _skip(piece: str, pieces: Iterator[str], tag: str) -> str:
    """Go past a comment or an element that holds no text of the page; returns the text that follows."""
    end = "-->" if tag.startswith("!--") else f"/{tag.partition(' ')[0]}>"
    # a comment or a script may hold any number of "<"
    while end not in piece:
        piece = next(pieces, end)
    return piece.partition(end)[2]


def _clean(text: str, breaks: int, keep_lines: int) -> str:
    """Text of a block with its entities resolved (lexbor writes these four) and its white space collapsed."""
    if "&" in text:
        for entity, char in (("&nbsp;", " "), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
            text = text.replace(entity, char)
    # in <pre> the lines and the space at their beginnings are the text
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
    # two sets of bits: kinds of container around (flags for all within), and groups of class words (its own)
    bits, words = BIT.get(name, 0), 0
    # lexbor writes every attribute as name="value", with one space before it, so `find` is enough
    for attribute in (' class="', ' id="', ' itemprop="'):
        begin = tag.find(attribute) + len(attribute)
        if begin >= len(attribute):
            value = tag[begin : tag.find('"', begin)]
            known = _words.get(value)
            words |= _value(value) if known is None else known
    if ' role="' in tag:
        bits |= BIT.get(ROLES.get(tag.partition(' role="')[2].partition('"')[0], ""), 0)
    if ("hidden" in tag or "none" in tag) and _HIDDEN.search(tag):
        bits |= BIT["hidden"]
    # hostile pages can have a new tag each; what is forgotten is worked out again
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
    # long values are lists of classes that seldom come again
    if len(value) < 200 and len(_words) < MAX_WORDS:
        _words[value] = bits
    return bits


def _word(word: str) -> int:
    """Bits of the groups in `CLASS_WORDS` that a word of a class or id belongs to, camel case cut into pieces."""
    # generated names (css-1x2y3z) say nothing
    stem = word.rstrip("0123456789")
    if not stem.isalpha() or len(stem) > 40:
        return 0
    if len(_words) > MAX_WORDS:
        _words.clear()
    bits = 0
    for piece in _PIECES.findall(stem):
        for stem_of_group in _STEMS.findall(piece.lower()):
            bits |= _GROUPS[stem_of_group]
    _words[word] = bits
    return bits
