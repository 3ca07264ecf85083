"""What else can be told of a text: key phrases, named entities, an extractive summary, reading ease.

Only the first `MAX_CHARS` characters are looked at, in time linear in them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from math import log2
from typing import Any

import numpy as np
import pyarrow as pa

from kit.data.refine.entities import PLACEHOLDER, entities, sentences, stopwords

FEATURES = ("keywords", "entities", "summary", "reading_ease")
NAMES = pa.list_(pa.struct([("text", pa.string()), ("type", pa.string())]))
SCHEMA = pa.struct(list(zip(FEATURES, (pa.list_(pa.string()), NAMES, pa.string(), pa.float64()))))
MAX_CHARS, MAX_KEYWORDS, MAX_SENTENCES = 20_000, 8, 3
NOT_SPACED = ("zh", "ja")
MIN_WORDS = 30  # below that a reading ease says nothing
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
HAN = re.compile(
    r"(?:(?![的了在是和也就都与不我你他她们这那有一])[\u4e00-\u9fff]){2,8}|[\u30a1-\u30ff]{2,16}"
)
FRAGMENT = re.compile(r"[^\n.,;:!?…()\[\]{}\"“”„«»|/*•–—=<>。！？，、]+")
ENGLISH = r"(?!(?<=[^aeiouyl])e$|(?<=[^aeiouytd])ed$|(?<=[^aeiouyszxcgh])es$)[aeiouy]+"  # with no silent e
FLESCH = {
    "en": (206.835, 1.015, 84.6, ENGLISH),
    "de": (180.0, 1.0, 58.5, r"[aeiouyäöü]+"),
    "es": (206.84, 1.02, 60.0, r"[aeiouáéíóúü]+"),
    "fr": (207.0, 1.015, 73.6, r"(?!(?<=\w\w)es?$)[aeiouyà-öø-ÿœ]+"),
    "it": (217.0, 1.3, 60.0, r"[aeiouàèéìòù]+"),
    "nl": (206.835, 0.93, 77.0, r"[aeiouyáéíóúäëïöü]+"),
    "pt": (248.835, 1.015, 84.6, r"[aeiouáâãàéêíóôõúü]+"),
    "ru": (206.835, 1.3, 60.1, r"[аеёиоуыэюя]"),
}
"""a − b · words per sentence − c · syllables per word: Flesch 1948, Amstad 1978, Fernández Huerta 1959, Kandel and
Moles 1958, Franchina and Vacca 1986, Douma 1960, Martins et al. 1996, Oborneva 2006; and what counts as a syllable."""


def text_features(
    text: str, lang: str, wanted: Sequence[str], pipelines: Sequence[str] = ()
) -> dict[str, Any]:
    """`SCHEMA`'s fields of a text; None for what is not wanted, or not defined for the language or the text.

    `pipelines` are names of installed spaCy pipelines for entities; each is used for texts of its language.
    """
    text = text[:MAX_CHARS].encode(errors="replace").decode() if wanted else ""
    return {
        "keywords": keywords(text, lang) if "keywords" in wanted else None,
        "entities": entities(text, lang, pipelines) if "entities" in wanted else None,
        "summary": summary(text, lang) if "summary" in wanted else None,
        "reading_ease": reading_ease(text, lang) if "reading_ease" in wanted else None,
    }


def _words(text: str, lang: str) -> list[str]:
    return (HAN if lang in NOT_SPACED else WORD).findall(text)


def keywords(text: str, lang: str) -> list[str]:
    """Key phrases of one to three words, best first: how often they come × log of their length; no word twice.

    A phrase stands whole between stop words and punctuation, as in RAKE (Rose et al. 2010), or comes again. In
    Chinese and Japanese, runs of Han characters or Katakana are words.
    """
    stop = stopwords(lang)
    counts: Counter[tuple[str, ...]] = Counter()
    shown: dict[tuple[str, ...], str] = {}  # a phrase as it is written where it comes first
    most = 1 if lang in NOT_SPACED else 3
    # placeholders become a mark, so that no phrase goes across a masked name
    for part in FRAGMENT.findall(PLACEHOLDER.sub(";", text)):
        for is_key, group in groupby(
            _words(part, lang), lambda w: 2 <= len(w) <= 40 and w.casefold() not in stop
        ):
            run = list(group) if is_key else []
            for first in range(len(run)):
                for end in range(first + 1, min(first + most, len(run)) + 1):
                    phrase = tuple(w.casefold() for w in run[first:end])
                    # a phrase that stands whole between stop words counts double: it may come but once
                    counts[phrase] += 1 + (end - first == len(run) and most > 1)
                    shown.setdefault(phrase, " ".join(run[first:end]))
    # a longer phrase says more, but must not beat a word that comes much oftener: the log of its length
    phrases: list[str] = []
    used: set[str] = set()
    for phrase, count in sorted(counts.items(), key=lambda item: -item[1] * log2(1 + len(item[0]))):
        if count >= 2 and used.isdisjoint(phrase):
            phrases.append(shown[phrase])
            used.update(phrase)
    return phrases[:MAX_KEYWORDS]


def summary(text: str, lang: str) -> str | None:
    """At most three sentences, verbatim and in order: those most like all others, early ones first.

    Degree LexRank (Erkan and Radev 2004) on cosines, over 200 sentences; the first one weighs double.
    """
    stop = stopwords(lang)
    columns: dict[str, int] = {}  # a word's column in the matrix
    bags: dict[str, list[int]] = {}  # by sentence, so that one that is repeated does not vote for itself
    for sentence in sentences(text):
        bag = {w.casefold() for w in _words(sentence, lang)} - stop
        long = len(sentence.encode()) >= 20 and len(sentence) <= 400 and len(bag) >= 3
        if long and sentence[-1] in '.!?…。！？"”»’)」』' and len(bags) < 200:
            bags.setdefault(sentence, [columns.setdefault(w, len(columns)) for w in sorted(bag)])
    # [sentences, words], each row of length 1: products of rows are cosines
    matrix = np.zeros((len(bags), len(columns)))
    for row, bag in zip(matrix, bags.values()):
        row[bag] = len(bag) ** -0.5
    # the sum of a sentence's cosines with all others, without the matrix [sentences, sentences]
    score = matrix @ matrix.sum(axis=0) * (1 + 1 / (1 + np.arange(len(bags))))
    # rounded, as the number of threads may change the last digits
    best = set(np.argsort(-score.round(9), kind="stable")[:MAX_SENTENCES].tolist())
    return " ".join(s for i, s in enumerate(bags) if i in best) or None


def reading_ease(text: str, lang: str) -> float | None:
    """Flesch's reading ease as fitted to the language, about 0 (hard) to 100 (easy); syllables are vowel groups."""
    words = Counter(WORD.findall(text.lower()))
    total = words.total()
    if lang not in FLESCH or total < MIN_WORDS:
        return None
    a, b, c, vowels = FLESCH[lang]
    # a word without a vowel, such as an abbreviation, is still spoken: one syllable at least
    syllables = sum(n * max(1, len(re.findall(vowels, word))) for word, n in words.items())
    return a - b * total / len(sentences(text)) - c * syllables / total
