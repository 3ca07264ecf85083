"""The lines that a site repeats on its pages: menus, notices, footers that extraction let through.

A line is boilerplate where `boilerplate_pages` pages of its host have it, and `boilerplate_share` of them all; copies
that are not kept do not count, or an article under five addresses would be boilerplate. Lines are counted as
hashes; the words of those that are found are read again from one page that has them. So no text is shuffled.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from kit.params import Deduplicate

LINE = np.dtype([("host", "u8"), ("line", "u8"), ("pages", "i8"), ("of_pages", "i8"), ("doc", "i8")])
Page = tuple[int, str, str]
"""Place in the input, host, text."""


def lines_of(text: str) -> set[str]:
    """The distinct lines of a text, without space around them."""
    return set(map(str.strip, text.split("\n"))) - {""}


def code(line: str) -> int:
    """64 bits that tell strings apart, 0 for the empty one; Python's own hash changes with the process."""
    raw = line.encode("utf-8", "surrogatepass")
    return zlib.crc32(raw) << 32 | zlib.adler32(raw) if raw else 0


def count_lines(pages: Iterable[Page], gone: set[int]) -> np.ndarray:
    """`LINE` for each distinct line of each host: on how many pages it is, and the first; line 0 counts the pages."""
    count: dict[str, Counter[str]] = defaultdict(Counter)
    first: dict[tuple[str, str], int] = {}
    for place, host, text in pages:
        if place not in gone:
            # the empty line stands on every page, so its count is the host's number of pages
            lines = {"", *lines_of(text)}
            count[host].update(lines)
            for line in lines:
                first.setdefault((host, line), place)
    rows = [
        (code(host), code(line), pages, 0, first[host, line])
        for host, lines in count.items()
        for line, pages in lines.items()
    ]
    return np.array(rows, LINE)


def repeated(rows: np.ndarray, p: Deduplicate) -> np.ndarray:
    """The `LINE`s that are boilerplate, out of all those of some hosts; `doc` is a page that has it."""
    rows = rows[np.lexsort((rows["doc"], rows["line"], rows["host"]))]
    if not len(rows):
        return rows
    # one row for each line of each host: its pages in all groups added up, and the first page that has it
    new = np.append(True, (rows["host"][1:] != rows["host"][:-1]) | (rows["line"][1:] != rows["line"][:-1]))
    lines = rows[new]
    lines["pages"] = np.add.reduceat(rows["pages"], new.nonzero()[0])
    totals = lines[lines["line"] == 0]
    lines["of_pages"] = totals["pages"][totals["host"].searchsorted(lines["host"])]
    least = np.maximum(p.boilerplate_pages, p.boilerplate_share * lines["of_pages"])
    return lines[(lines["pages"] >= least) & (lines["line"] != 0)]


def spell(pages: Iterable[Page], rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """The words of boilerplate: host, line, and on how many pages of how many it is."""
    # by page, then by the line's hash: on how many pages of how many
    wanted: dict[int, dict[int, tuple[int, int]]] = defaultdict(dict)
    for _, line, n, of, place in rows.tolist():
        wanted[place][line] = n, of
    if not wanted:  # no line to spell, no page to read
        return
    for place, host, text in pages:
        if place not in wanted:
            continue
        for line in lines_of(text):
            counts = wanted[place].get(code(line))
            if counts:
                yield {"host": host, "line": line, "pages": counts[0], "of_pages": counts[1]}
