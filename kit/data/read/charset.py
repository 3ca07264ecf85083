"""Bytes of a page → text, by the charset that fits them."""

from __future__ import annotations

import re

from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

CYRILLIC = frozenset(
    map_encoding_to_html5(c) for c in ("windows-1251", "koi8-r", "koi8-u", "ibm866", "iso-8859-5")
)
META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w:-]+)", re.IGNORECASE)


def decode(payload: bytes, http_charset: str | None) -> tuple[str, str]:
    """Text of a page and the charset that was used: `(text, charset)`; never raises.

    Bytes that are valid UTF-8 are UTF-8, whatever the heads claim (by chance they would not be). Otherwise the
    first claim that decodes without error wins: HTTP head, `<meta>`, a guess from the bytes.
    """
    # a byte order mark is no accident
    if payload[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return payload.decode("utf-16", "replace").lstrip("\ufeff"), "utf-16"
    escapes = b"\x1b$" in payload[:4096]  # ISO-2022-JP is ASCII to a UTF-8 decoder
    if not escapes:
        try:
            return payload.decode("utf-8-sig"), "utf-8"
        except UnicodeDecodeError:
            pass
    # HTML wants the element within the first 1,024 bytes; comments and scripts push it further down
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
