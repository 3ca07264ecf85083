"""Reviews: those that a page marks up for machines, and those that a person brings as rows of a file."""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any

from selectolax.lexbor import LexborHTMLParser

from kit.data.extract import blocks, walk
from kit.data.extract.page import MAX_COUNT, MAX_JSON_BYTES, MAX_REVIEWS
from kit.data.read.record import host_name
from kit.data.read.rows import NAMES, Layout, column_key, first_value, rating_of, row_fields
from kit.errors import RecordError

TAG = re.compile(r"</?(?:br|p|div|b|i|u|em|strong|a|ul|ol|li|span|h[1-6])\b[^<>]{0,500}>", re.IGNORECASE)


def document(text: str, layout: Layout, text_column: str = "", rating_column: str = "") -> dict[str, Any]:
    """`title`, `text`, `reviews` and, where the row names a site, `host`; raises `RecordError`.

    Columns have their usual names (`NAMES`) or are named. A row with a rating or an item is a review of one that
    may be unknown.
    """
    row, wanted = row_fields(text, layout), column_key(text_column) or NAMES["text"]
    if not set(wanted.split()) & set(row):
        raise RecordError(f"no column '{text_column or 'text'}': see text_column")
    body, title, item = (_plain(first_value(row, names)) for names in (wanted, NAMES["title"], NAMES["item"]))
    rating, best = rating_of(row, rating_column, layout)
    # of two columns, or [1, 2] in one, as Amazon had it
    counts = re.findall(r"\d{1,9}", " ".join(first_value(row, NAMES[kind]) for kind in ("helpful", "votes")))
    helpful, votes = map(int, counts[:2]) if len(counts) > 1 else (None, None)
    site = first_value(row, NAMES["site"])
    review = {
        "item": item,
        "item_type": "",
        "rating": rating,
        "rating_max": best,
        "title": title,
        "body": body,
        "helpful": helpful,
        "votes": votes,
    }
    fields = {"title": title, "text": body, "reviews": [review] if item or rating is not None else []}
    # a column may hold an address or a plain name
    return fields | ({"host": host_name(site) or site} if site else {})


def _plain(text: str) -> str:
    """Text without the mark-up that reviews are often stored with."""
    if TAG.search(text):
        return blocks.all_text(walk.walk(walk.parse(text))).strip()
    return (html.unescape(text) if "&" in text else text).strip()


def reviews_of(html: str) -> list[dict[str, Any]]:
    """`reviews` of a page that has not been parsed yet."""
    return reviews(LexborHTMLParser(html))


def reviews(tree: LexborHTMLParser) -> list[dict[str, Any]]:
    """Reviews that the page marks up as schema.org JSON-LD, however deep; broken JSON yields none.

    Keys: `item, item_type, rating, rating_max, title, body, helpful, votes`. The author is left out on purpose.
    """
    collected: list[dict[str, Any]] = []
    for script in tree.css('script[type="application/ld+json"]'):
        source = script.text() or ""
        # parsing is what costs, so what cannot hold a review (Review, review, itemReviewed …) is not parsed
        if len(source) > MAX_JSON_BYTES or "eview" not in source:
            continue
        try:
            todo: list[tuple[Any, dict[str, Any]]] = [(json.loads(source), {})]
        except (ValueError, RecursionError):
            continue
        # a stack in place of recursion: JSON-LD of strangers may be nested as deep as the parser allows
        while todo and len(collected) < MAX_REVIEWS:
            node, about = todo.pop()
            if isinstance(node, list):
                todo += [(member, about) for member in reversed(node)]  # popped from the end, so in order
            elif isinstance(node, dict):
                if _type(node) == "Review":
                    collected.append(_review(node, about))
                else:
                    todo += [(v, node) for v in node.values() if isinstance(v, (dict, list))]
    return [r for r in collected if r["body"]]


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
