"""What one page holds beside its main text: charset, title, images with captions, links, reviews.

Plain functions of bytes or of a parsed tree. Pages come from strangers: every list has a cap, no JSON or
mark-up, however deep or broken, raises, and walks stop early instead of reading a whole page for one caption.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urljoin

from selectolax.lexbor import LexborHTMLParser, LexborNode

MAX_IMAGES, MAX_REVIEWS, MAX_LINKS = 200, 2000, 2000
"""How many of a kind a page can have; a stage counts the pages that reach a cap."""
# the last: what an int32 column holds
MAX_JSON_BYTES, CONTEXT_CHARS, MAX_COUNT = 1 << 20, 300, 2**31 - 1
MAX_STEPS = 200
"""Nodes looked at for the text beside one image."""


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
    entries = []
    for node in tree.css("img[src]")[:MAX_IMAGES]:
        attributes = node.attributes
        figure = _figure(node)
        caption = figure.css_first("figcaption") if figure else None
        entries.append(
            {
                "src": attributes.get("src") or "",
                "alt": (attributes.get("alt") or "").strip(),
                "caption": " ".join(caption.text().split()) if caption else "",
                "context": " … ".join(text for text in _beside(figure or node) if text),
            }
        )
    return entries


def _figure(node: LexborNode) -> LexborNode | None:
    """The `<figure>` around an image, looked for a few levels up."""
    # picture, link and wrapper elements lie between; further up it is another image's figure
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
    text_by_url: dict[str, str] = {}
    for node in tree.css("a[href]"):
        try:
            url = urljoin(base, (node.attributes.get("href") or "").strip())
        except ValueError:  # a URL such as http://[broken
            continue
        # mailto:, javascript: and the like are no pages
        if url.startswith(("http://", "https://")) and url not in text_by_url:
            if len(text_by_url) == MAX_LINKS:
                break
            text_by_url[url] = " ".join(node.text().split())[:CONTEXT_CHARS]
    return [{"url": url, "text": text} for url, text in text_by_url.items()]
