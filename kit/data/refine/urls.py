"""What a URL alone says against a page: a list of the user's, and words, as in FineWeb (with lists of our own)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from urllib.parse import urlsplit

from kit import resolve_path
from kit.errors import ParamError

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
            listed = {line.partition("#")[0].strip().lower().removeprefix("www.") for line in f} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise ParamError(f"parameter 'blocked_urls': cannot read '{path}' ({error})") from None
    pages = {re.sub(r"^https?://(www\.)?", "", entry).rstrip("/") for entry in listed if "/" in entry}

    def blocked(url: str) -> bool:
        try:
            host = (urlsplit(url).hostname or "").removeprefix("www.")
        except ValueError:  # a URL of the web need not be one, such as "http://["
            return False
        labels = host.split(".")
        page = re.sub(r"^https?://(www\.)?", "", url.lower()).rstrip("/")
        return page in pages or any(".".join(labels[i:]) in listed for i in range(len(labels)))

    return blocked
