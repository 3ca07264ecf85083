"""What one page holds beside its main text: charset, title, images with captions, links, reviews.

Plain functions of bytes or of a parsed tree. Pages come from strangers: every list has a cap, no JSON or
mark-up, however deep or broken, raises, and walks stop early instead of reading a whole page for one caption.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5
from selectolax.lexbor import LexborHTMLParser, LexborNode

CYRILLIC = frozenset(
    map_encoding_to_html5(c) for c in ("windows-1251", "koi8-r", "koi8-u", "ibm866", "iso-8859-5")
)
META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w:-]+)", re.IGNORECASE)
MAX_IMAGES, MAX_REVIEWS, MAX_LINKS = 200, 2000, 2000
"""How many of a kind a page can have; a stage counts the pages that reach a cap."""
MAX_JSON_BYTES, CONTEXT_CHARS, MAX_COUNT = 1 << 20, 300, 2**31 - 1
MAX_STEPS = 200
"""Nodes looked at for the text beside one image."""


def decode(payload: bytes, http_charset: str | None) -> tuple[str, str]:
    """Text of a page and the charset that was used: `(text, charset)`; never raises.

    Bytes that are valid UTF-8 are UTF-8, whatever the heads claim (by chance they would not be). Otherwise the
    first claim that decodes without error wins: HTTP head, `<meta>`, a guess from the bytes.
    """
    if payload[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return payload.decode("utf-16", "replace").lstrip("\ufeff"), "utf-16"
    escapes = b"\x1b$" in payload[:4096]  # ISO-2022-JP is ASCII to a UTF-8 decoder
    if not escapes:
        try:
            return payload.decode("utf-8-sig"), "utf-8"
        except UnicodeDecodeError:
            pass
    meta = META_CHARSET.search(payload[:4096])
    guess = _codec(detect_encoding(payload[:65536]) or "utf-8")
    claims = [_codec(c) for c in (http_charset, meta[1].decode("latin-1") if meta else None) if c]
    # any Cyrillic charset decodes any other's bytes without an error: there the letters tell more than the heads
    first = [guess] if CYRILLIC.issuperset({guess, *claims[:1]}) else []
    for charset in [*first, *claims, guess]:
        try:
            return payload.decode(charset), charset
        except (UnicodeDecodeError, LookupError):
            continue
    return bytes_to_str(payload, guess, errors="replace"), guess


def _codec(charset: str) -> str:
    """Python's name of a charset as browsers understand it, or what was said if they do not know it."""
    return map_encoding_to_html5(charset) or charset


def title(tree: LexborHTMLParser) -> str:
    """The page's `<title>`, white space folded."""
    node = tree.css_first("title")
    return " ".join(node.text().split()) if node else ""


def html_language(tree: LexborHTMLParser) -> str:
    """What `<html lang>` claims, at most 35 characters (the longest tag of BCP 47)."""
    node = tree.css_first("html")
    return ((node.attributes.get("lang") if node else None) or "")[:35]


def images(tree: LexborHTMLParser) -> list[dict[str, str]]:
    """Images with alternative text, caption and the text beside them, at most `MAX_IMAGES`."""
    found = []
    for node in tree.css("img[src]")[:MAX_IMAGES]:
        attributes = node.attributes
        figure = _figure(node)
        caption = figure.css_first("figcaption") if figure else None
        found.append(
            {
                "src": attributes.get("src") or "",
                "alt": (attributes.get("alt") or "").strip(),
                "caption": " ".join(caption.text().split()) if caption else "",
                "context": " … ".join(x for x in _beside(figure or node) if x),
            }
        )
    return found


def _figure(node: LexborNode) -> LexborNode | None:
    """The `<figure>` around an image, looked for a few levels up."""
    for _ in range(8):
        node = node.parent
        if node is None or node.tag in ("body", "figure"):
            break
    return node if node is not None and node.tag == "figure" else None


def _beside(node: LexborNode) -> Iterator[str]:
    """Text of the nearest nodes with text before and after `node`."""
    for step in ("prev", "next"):
        other, text = getattr(node, step), ""
        for _ in range(MAX_STEPS):
            if other is None or text:
                break
            text = _start_of(other)
            other = getattr(other, step)
        yield text


def _start_of(node: LexborNode) -> str:
    """The first `CONTEXT_CHARS` of a node's text; scripts and styles have none."""
    if node.is_text_node:
        return " ".join((node.text_content or "").split())[:CONTEXT_CHARS]
    if not node.is_element_node or node.tag in ("script", "style", "noscript", "template"):
        return ""
    parts, length = [], 0
    for steps, child in enumerate(node.traverse(include_text=True)):
        if steps > MAX_STEPS or length > CONTEXT_CHARS:
            break
        if child.is_text_node and child.parent.tag not in ("script", "style"):
            parts.append(child.text_content or "")
            length += len(parts[-1].strip())
    return " ".join(" ".join(parts).split())[:CONTEXT_CHARS]


def links(tree: LexborHTMLParser, base: str) -> list[dict[str, str]]:
    """Links to other pages as absolute http(s) URLs with their text, each URL once, at most `MAX_LINKS`."""
    found: dict[str, str] = {}
    for node in tree.css("a[href]"):
        try:
            url = urljoin(base, (node.attributes.get("href") or "").strip())
        except ValueError:  # a URL such as http://[broken
            continue
        if url.startswith(("http://", "https://")) and url not in found:
            if len(found) == MAX_LINKS:
                break
            found[url] = " ".join(node.text().split())[:CONTEXT_CHARS]
    return [{"url": url, "text": text} for url, text in found.items()]


def reviews_of(html: str) -> list[dict[str, Any]]:
    """`reviews` of a page that has not been parsed yet."""
    return reviews(LexborHTMLParser(html))


def reviews(tree: LexborHTMLParser) -> list[dict[str, Any]]:
    """Reviews that the page marks up as schema.org JSON-LD, however deep; broken JSON yields none.

    Keys: `item, item_type, rating, rating_max, title, body, helpful, votes`. The author is left out on purpose.
    """
    found: list[dict[str, Any]] = []
    for script in tree.css('script[type="application/ld+json"]'):
        source = script.text() or ""
        if len(source) > MAX_JSON_BYTES or "eview" not in source:
            continue
        try:
            todo: list[tuple[Any, dict[str, Any]]] = [(json.loads(source), {})]
        except (ValueError, RecursionError):
            continue
        while todo and len(found) < MAX_REVIEWS:
            node, about = todo.pop()
            if isinstance(node, list):
                todo += [(x, about) for x in reversed(node)]
            elif isinstance(node, dict):
                if _type(node) == "Review":
                    found.append(_review(node, about))
                else:
                    todo += [(v, node) for v in node.values() if isinstance(v, (dict, list))]
    return [r for r in found if r["body"]]


def _review(node: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """One schema.org Review; `about` is the thing it was found under, used when it names no subject."""
    item = node.get("itemReviewed") if isinstance(node.get("itemReviewed"), dict) else about
    rating = node.get("reviewRating") if isinstance(node.get("reviewRating"), dict) else {}
    counters = node.get("interactionStatistic")
    counters = counters if isinstance(counters, list) else [counters] if isinstance(counters, dict) else []
    likes = {
        str(c.get("interactionType")).rpartition("/")[2]: _number(c.get("userInteractionCount"))
        for c in counters
        if isinstance(c, dict)
    }
    helpful, against = likes.get("LikeAction"), likes.get("DislikeAction") or 0
    return {
        "item": _string(item.get("name")),
        "item_type": _type(item),
        "rating": _number(rating.get("ratingValue")),
        "rating_max": _number(rating.get("bestRating")) or 5.0,
        "title": _string(node.get("name")),
        "body": _string(node.get("reviewBody")),
        "helpful": None if helpful is None else int(min(helpful, MAX_COUNT)),
        "votes": None if helpful is None else int(min(helpful + against, MAX_COUNT)),
    }


def _type(node: dict[str, Any]) -> str:
    """The schema.org type of a thing, the first where it has several."""
    kind = node.get("@type")
    return _string(kind[0] if isinstance(kind, list) and kind else kind)


def _string(value: Any) -> str:
    """Text out of JSON, without the halves of surrogate pairs that JSON may escape and Parquet cannot hold."""
    return str(value or "").encode("utf-8", "ignore").decode().replace("\x00", "").strip()


def _number(value: Any) -> float | None:
    """A finite, non-negative number, or None; JSON in the wild holds words, NaN and 1e999."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < math.inf else None
