"""Personal data: found by shape, verified by checksum where there is one, masked by typed placeholders.

Covers e-mail, phone (`phonenumbers`, regions by language), IPv4 and IPv6 (public ones), payment cards (Luhn)
and IBANs (ISO 7064). Not covered: names, postal addresses, national ids.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect
from collections.abc import Callable, Iterator

import phonenumbers

EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,5}[A-Za-z]{2,24}(?![\w@-])")
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d|\w)")
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
CARD = re.compile(r"(?<![\w-])[3-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])")
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
LOCAL_US = re.compile(r"(?<![\w-])555-01\d{2}(?![\w-])")
"""North American numbers without an area code: only the range that is kept for fiction is safe to tell."""
SEVEN_DIGITS = re.compile(r"\d(?:[^\w\n]{0,4}\d){6}")
"""The least a phone number with its area code has (ITU-T E.164 leaves the shorter ones to local dialling)."""
NUMBER_OR_AT = re.compile(r"\d\d|@|::")
PART_OF_MORE = re.compile(r"\d[/.-]$|[A-Z]/$")
"""Before digits that end a longer run of them, such as a file number: no phone number."""
REGIONS = {
    "en": ("US", "GB"),
    "de": ("DE",),
    "fr": ("FR",),
    "es": ("ES",),
    "it": ("IT",),
    "pt": ("PT",),
    "pl": ("PL",),
    "ru": ("RU",),
    "ja": ("JP",),
    "zh": ("CN",),
}
INTERNAL = [
    ipaddress.ip_network(n)
    for n in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "0.0.0.0/8", "255.0.0.0/8")
]
TYPES = ("email", "iban", "card", "ipv6", "ipv4", "phone")
"""In the order in which they are looked for: a span that one type took is not looked at again."""
Span = tuple[int, int]


def luhn(digits: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1)."""
    total = 0
    for i, c in enumerate(reversed(digits)):
        n = int(c) * (1 + i % 2)
        total += n - 9 if n > 9 else n
    return total % 10 == 0


def iban_valid(iban: str) -> bool:
    """The checksum of an IBAN (ISO 13616, ISO 7064 mod 97-10)."""
    compact = iban.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _card(match: str) -> bool:
    digits = re.sub(r"\D", "", match)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


def _ipv4(match: str) -> bool:
    try:
        address = ipaddress.IPv4Address(match)
    except ValueError:
        return False
    return not any(address in network for network in INTERNAL)


def _ipv6(match: str) -> bool:
    try:
        address = ipaddress.IPv6Address(match)
    except ValueError:
        return False
    return len(match) > 6 and not (address.is_loopback or address.is_link_local or address.is_unspecified)


PATTERNS: dict[str, tuple[re.Pattern[str], re.Pattern[str], Callable[[str], bool]]] = {
    "email": (re.compile("@"), EMAIL, lambda _: True),
    "iban": (re.compile(r"[A-Z]\d\d"), IBAN, iban_valid),
    "card": (SEVEN_DIGITS, CARD, _card),
    "ipv6": (re.compile(":[0-9A-Fa-f]{0,4}:"), IPV6, _ipv6),
    "ipv4": (re.compile(r"\d\.\d{1,3}\.\d"), IPV4, _ipv4),
}
"""By kind: what must be there at all and is quickly looked for, the shape, and the check of what has that shape."""


def _phones(text: str, lang: str) -> Iterator[Span]:
    # no number goes on over the end of a line, so the slow matcher need only see lines that may hold one
    at = 0
    while found := SEVEN_DIGITS.search(text, at):
        start = text.rfind("\n", 0, found.start()) + 1
        at = text.find("\n", found.end()) % (len(text) + 1)
        line = text[start:at]
        for region in REGIONS.get(lang, ("US",)):
            for match in phonenumbers.PhoneNumberMatcher(line, region):
                if not PART_OF_MORE.search(line, max(match.start - 2, 0), match.start):
                    yield start + match.start, start + match.end
    # last, so that a number with its area code goes as a whole
    for match in LOCAL_US.finditer(text):
        yield match.span()


def find(text: str, lang: str) -> list[tuple[int, int, str]]:
    """Spans of personal data as `(start, end, type)`, sorted, none overlapping."""
    taken: list[tuple[int, int, str]] = []
    for kind in TYPES:
        if kind == "phone":
            spans: Iterator[Span] = _phones(text, lang)
        else:
            needs, pattern, valid = PATTERNS[kind]
            spans = (
                (m.span() for m in pattern.finditer(text) if valid(m[0])) if needs.search(text) else iter(())
            )
        for start, end in spans:
            # spans in `taken` are sorted and apart, so only the two neighbours can overlap
            at = bisect(taken, (start, end, kind))
            if (at == 0 or taken[at - 1][1] <= start) and (at == len(taken) or taken[at][0] >= end):
                taken.insert(at, (start, end, kind))
    return taken


def mask(text: str, lang: str) -> tuple[str, dict[str, int]]:
    """The text with personal data replaced by `<EMAIL>`, `<PHONE>` …, and how many of each type."""
    counts = dict.fromkeys(TYPES, 0)
    if not NUMBER_OR_AT.search(text):
        return text, counts
    parts, position = [], 0
    for start, end, kind in find(text, lang):
        parts += [text[position:start], f"<{kind.upper()}>"]
        counts[kind] += 1
        position = end
    return "".join([*parts, text[position:]]), counts
