"""Personal data: found by shape, verified by checksum where there is one, masked by typed placeholders.

Covers e-mail, phone (`phonenumbers`, regions by language), IPv4 and IPv6 (public ones), payment cards (Luhn),
IBANs (ISO 7064), national ids of the countries in `NATIONAL` (checksums of `python-stdnum`) and street addresses
that end in a postal code (US, UK, DE, FR). Those have shapes of our own: of ten addresses that pyap2 0.2.20 sees
in 120 real English texts one is an address, usaddress only splits what is known to be one, libpostal wants 2 GB
of data. Not covered: names, addresses without a postal code, ids of other countries.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module

import phonenumbers
from stdnum import iban, luhn

# Every pattern below is bounded ({1,64}, {0,20} …) or anchored by a look-behind: on hostile text an open repetition
# would take time as the square of its length. Look-arounds at both ends keep a match from being a piece of a longer one.
EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,5}[A-Za-z]{2,24}(?![\w@-])")
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d|\w)")
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
CARD = re.compile(r"(?<![\w-])[3-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])")
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?(?=[A-Z]{0,2}\d)[A-Z0-9]{1,3})?(?!\w)")
FICTION = re.compile(
    r"(?:5(?<![\w+-]5)55-01\d\d"  # NANPA; without an area code no other range is safe to tell
    r"|0(?<![\w+-]0)(?:1[ .]?99[ .]?00|2[ .]?61[ .]?91|3[ .]?53[ .]?01|4[ .]?65[ .]?71|5[ .]?36[ .]?49"
    r"|6[ .]?39[ .]?98)(?:[ .]?\d\d){2}"  # ARCEP, decision 2018-0881
    r"|0(?<![\w+-]0)(?:1632 ?960|7700 ?900|3069 ?990) ?\d{3})(?![\w-])"  # Ofcom, numbers for drama
)
"""Numbers that regulators keep for fiction and `phonenumbers` leaves out, or knows in that country's texts only."""
SEVEN_DIGITS = re.compile(r"\d(?:[^\w\n]{0,4}\d){6}")
"""The least a phone number with its area code has (ITU-T E.164 leaves the shorter ones to local dialling)."""
NUMBER_OR_AT = re.compile(r"\d(?:\d|[A-Z]? \d)|@|::")
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
TYPES = ("email", "iban", "card", "ipv6", "ipv4", "national_id", "address", "phone")
"""In the order in which they are looked for: a span that one type took is not looked at again."""
Span = tuple[int, int]

# seven characters that every shape below has; a text without them is not searched for any
ID_NEEDS = re.compile(r"\d(?:(?:[ .-]?\d){5}|[A-Z]\d\d[A-Z]\d)")
NATIONAL = [
    (module, re.compile(rf"(?<![\w.-])(?:{shape})(?![\w-]|\.\d)", re.ASCII), re.compile(words, re.IGNORECASE))
    for module, shape, words in (
        ("be.nn", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d", ""),
        ("br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d\d", ""),
        ("br.cpf", r"\d{11}", r"\bcpf"),
        ("ca.sin", r"\d{3}[ -]?\d{3}[ -]?\d{3}", r"social insurance|assurance sociale"),
        ("ch.ssn", r"756\.\d{4}\.\d{4}\.\d\d", ""),
        ("cn.ric", r"[1-9]\d{16}[\dX]", ""),
        ("de.idnr", r"\d\d ?\d{3} ?\d{3} ?\d{3}", r"steuer-?id|identifikationsn|\bidnr|tax id|\btin\b"),
        ("dk.cpr", r"\d{6}-?\d{4}", r"\bcpr"),
        ("es.dni", r"\d{8}-?[A-Z]", r"\bd\.?n\.?i\b|\bn\.?i\.?f\b|identidad"),
        ("es.nie", r"[XYZ]-?\d{7}-?[A-Z]", r"\bn\.?i\.?[ef]\b|extranjero|identidad"),
        ("fi.hetu", r"\d{6}[-+A]\d{3}[0-9A-Y]", ""),
        ("fr.nir", r"[12] ?\d\d ?\d\d ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d", ""),
        ("", r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?: ?\d\d){3} ?[A-D]", r"insurance|\bni\b"),
        ("in_.aadhaar", r"\d{4} ?\d{4} ?\d{4}", r"aadhaar|आधार"),
        ("it.codicefiscale", r"[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]", ""),
        ("kr.rrn", r"\d{6}-\d{7}", ""),
        ("nl.bsn", r"\d{9}|\d{4}\.\d\d\.\d{3}", r"\bbsn|burgerservice|sofi"),
        ("no.fodselsnummer", r"\d{6} ?\d{5}", r"f[øo]dselsn|personn"),
        ("pl.pesel", r"\d{11}", r"pesel"),
        ("se.personnummer", r"(?:\d\d)?\d{6}[-+]\d{4}", r"person-?n"),
        ("tr.tckimlik", r"\d{11}", r"kimlik|\bt\.?c\b"),
        ("us.ssn", r"\d{3}-\d\d-\d{4}", r"\bssn\b|social security"),
    )
]
"""Module of `stdnum` that checks it (the UK has no checksum), shape, and the words of which one must stand close
before it, where shape and checksum alone would take other numbers for ids."""
CHECKSUMS = {m: import_module(f"stdnum.{m}").is_valid if m else bool for m, _, _ in NATIONAL}
WORDS_BEFORE = 40  # characters

_EN = (
    r"(?<![\w.])\d{1,5}[A-Za-z]?,? (?:[A-Z0-9][\w.'-]{0,20} ){1,4}(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd"
    r"|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Parkway|Pkwy|Highway|Hwy|Way|Square|Sq|Terrace|Circle|Close|Crescent|Row)"
    r"\b\.?(?:[,\n ]{1,2}[A-Z#0-9][\w.'-]{0,20}){1,6}?[,\n ]{1,2}"
)
ADDRESSES = (
    re.compile(_EN + r"[A-Z]{2},? \d{5}(?:-\d{4})?(?!\w)"),
    re.compile(_EN + r"[A-Z]{1,2}\d[A-Z\d]? \d[A-Z]{2}(?!\w)"),
    re.compile(
        r"(?<![\w-])(?:[A-ZÄÖÜ][\w.-]{0,20}[ -]){0,3}[\w-]{0,30}(?:[Ss]tra(?:ß|ss)e|[Ss]tr\.|[Ww]eg|[Pp]latz"
        r"|[Aa]llee|[Gg]asse|[Rr]ing|[Dd]amm|[Uu]fer|[Cc]haussee|[Mm]arkt) ?\d{1,4} ?[a-z]?(?: ?[-–/] ?\d{1,4})?"
        r"(?: ?[,|•·–-])?\s{1,2}"
        r"(?:DE?-)?\d{5} [A-ZÄÖÜ][\w-]{1,30}"
    ),
    re.compile(
        r"(?<!\w)\d{1,4}(?: ?bis| ?ter)?,? (?:rue|avenue|av\.|boulevard|bd|place|chemin|impasse|allée|quai|route)"
        r" [^\n,\d]{3,50},?\s{1,2}\d{5} [A-ZÀ-Ý][\w'-]{1,30}"
    ),
)
"""Number, street and postal code of the US, the UK, Germany and France; every repetition is bounded."""
POSTAL_CODE = re.compile(r"\d(?:\d{4}|[A-Z\d]? \d[A-Z]{2})")
# characters around a postal code in which its address is looked for: in the US and UK it ends an address, in Germany and
# France the town comes after it
BEFORE_CODE, AFTER_CODE = 160, 40


def _id_valid(module: str, match: str) -> bool:
    try:
        return CHECKSUMS[module](match)
    except (KeyError, ValueError):  # stdnum 2.2 stumbles over Chinese counties that it does not know
        return False


def _card(match: str) -> bool:
    digits = re.sub(r"\D", "", match)
    # ISO/IEC 7812: 13 to 19 digits in use; 0000… passes Luhn's check and is no card
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn.is_valid(digits)


def _ipv4(match: str) -> bool:
    try:
        address = ipaddress.IPv4Address(match)
    except ValueError:
        return False
    # what is no address of the outside names nobody, and stands in every tutorial
    return not any(address in network for network in INTERNAL)


def _ipv6(match: str) -> bool:
    try:
        address = ipaddress.IPv6Address(match)
    except ValueError:
        return False
    # "::" and "a::b" are addresses by the letter, and in texts mostly code or a time
    return len(match) > 6 and not (address.is_loopback or address.is_link_local or address.is_unspecified)


PATTERNS: dict[str, tuple[re.Pattern[str], re.Pattern[str], Callable[[str], bool]]] = {
    "email": (re.compile("@"), EMAIL, lambda _: True),
    "iban": (re.compile(r"[A-Z]\d\d"), IBAN, iban.is_valid),
    "card": (SEVEN_DIGITS, CARD, _card),
    "ipv6": (re.compile(":[0-9A-Fa-f]{0,4}:"), IPV6, _ipv6),
    "ipv4": (re.compile(r"\d\.\d{1,3}\.\d"), IPV4, _ipv4),
}
"""By kind: what must be there at all and is quickly looked for, the shape, and the check of what has that shape."""


def _windows(text: str, needs: re.Pattern[str]) -> Iterator[Span]:
    """Lines that hold a match: nothing searched in them goes on over their end, so slow patterns skip the rest."""
    end = 0
    while match := needs.search(text, end):
        start = text.rfind("\n", 0, match.start()) + 1
        end = text.find("\n", match.end())
        if end < 0:  # the last line has no end
            end = len(text)
        yield start, end


def _shaped(text: str, needs: re.Pattern, shape: re.Pattern, valid: Callable[[str], bool]) -> Iterator[Span]:
    for start, end in _windows(text, needs):
        yield from (m.span() for m in shape.finditer(text, start, end) if valid(m[0]))


def _phones(text: str, lang: str) -> Iterator[Span]:
    for start, end in _windows(text, SEVEN_DIGITS):
        line = text[start:end]
        for region in REGIONS.get(lang, ("US",)):
            for match in phonenumbers.PhoneNumberMatcher(line, region):
                if not PART_OF_MORE.search(line, max(match.start - 2, 0), match.start):
                    yield start + match.start, start + match.end
    # last, so that a number with its area code goes as a whole
    for match in FICTION.finditer(text):
        yield match.span()


def _national_ids(text: str, _: str) -> Iterator[Span]:
    for start, end in _windows(text, ID_NEEDS):
        for module, shape, words in NATIONAL:
            for match in shape.finditer(text, start, end):
                # a check digit lets a tenth of all numbers of the shape pass: a word before it decides
                start_before = max(match.start() - WORDS_BEFORE, 0)
                if words.search(text, start_before, match.start()) and _id_valid(module, match[0]):
                    yield match.span()


def _addresses(text: str, _: str) -> Iterator[Span]:
    end = 0
    for code in POSTAL_CODE.finditer(text):
        # from one code to the next, so that no character is looked at as often as there are codes around it
        start, end = max(code.start() - BEFORE_CODE, end), code.end()
        for shape in ADDRESSES:
            for match in shape.finditer(text, start, end + AFTER_CODE):
                if match.end() < end + AFTER_CODE:  # what the window's end cuts is found by its own code
                    yield match.span()


FINDERS = {"national_id": _national_ids, "address": _addresses, "phone": _phones}


def find(text: str, lang: str, types: Sequence[str] = TYPES) -> list[tuple[int, int, str]]:
    """Spans of personal data of these types as `(start, end, type)`, sorted, none overlapping."""
    taken: list[tuple[int, int, str]] = []
    for kind in (k for k in TYPES if k in types):
        for start, end in FINDERS[kind](text, lang) if kind in FINDERS else _shaped(text, *PATTERNS[kind]):
            # spans in `taken` are sorted and apart, so only the two neighbours can overlap
            position = bisect(taken, (start, end, kind))
            after_left = position == 0 or taken[position - 1][1] <= start
            before_right = position == len(taken) or taken[position][0] >= end
            if after_left and before_right:
                taken.insert(position, (start, end, kind))
    return taken


def mask(text: str, lang: str, types: Sequence[str] = TYPES) -> tuple[str, dict[str, int]]:
    """The text with personal data replaced by `<EMAIL>`, `<PHONE>` …, and how many of each of these types."""
    counts = {kind: 0 for kind in TYPES if kind in types}
    # most texts hold nothing that could be any of it: one search instead of one for each shape
    if not counts or not NUMBER_OR_AT.search(text):
        return text, counts
    parts, position = [], 0
    for start, end, kind in find(text, lang, types):
        parts += [text[position:start], f"<{kind.upper()}>"]
        counts[kind] += 1
        position = end
    return "".join([*parts, text[position:]]), counts
