"""Quality values against vectors worked out by hand, and against a plain implementation of the same definitions."""

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from kit import ROOT
from kit.data.quality import (
    BULLETS,
    COLUMNS,
    ELLIPSES,
    RULES,
    STOP_WORDS,
    TOKEN,
    cheap_words,
    failing,
    measure,
    words,
)
from kit.params import RefineText

DEFAULTS = RefineText().model_dump()
SETS = DEFAULTS["quality_rules"]


@pytest.mark.parametrize(
    "text, found",
    [
        ("Don't stop-gap, 3.5 times!", ["Don't", "stop-gap", "3.5", "times"]),
        ("中文 and カナ", ["中", "文", "and", "カ", "ナ"]),
        ("… -- !", []),
        ("", []),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found


@pytest.mark.parametrize(
    "text, values",
    [
        ("", dict.fromkeys(COLUMNS, 0)),
        ("The cat and the dog", {"words": 5, "mean_word_length": 3, "stop_words": 2, "alpha_words": 1}),
        ("# 1 22 333 a", {"words": 4, "hash_ratio": 1 / 4, "alpha_words": 1 / 4, "mean_word_length": 7 / 4}),
        ("a... b… c", {"words": 3, "ellipsis_ratio": 2 / 3, "ellipsis_lines": 0}),
        ("- a\n• b\nc...\nd", {"bullet_lines": 1 / 2, "ellipsis_lines": 1 / 4}),
        # 4 lines, one of them (2 characters) for the second time, in 11 characters
        ("ab\ncd\nab\nef", {"dup_lines": 1 / 4, "dup_line_chars": 2 / 11, "dup_paragraphs": 0}),
        ("ab\n\ncd\n\nab", {"dup_paragraphs": 1 / 3, "dup_paragraph_chars": 2 / 10}),
        # "a b" twice: 3 characters each, in 9
        ("a b c a b", {"top_2gram": 6 / 9, "top_3gram": 0, "dup_5gram": 0}),
        # the five words come a second time: 5 characters in 19
        ("a b c d e a b c d e", {"dup_5gram": 5 / 19, "dup_6gram": 0}),
    ],
)
def test_golden_vectors(text: str, values: dict[str, float]) -> None:
    found = measure(text)
    assert {k: found[k] for k in values} == pytest.approx(values)
    assert set(found) == set(COLUMNS)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.column)
def test_every_rule_holds_at_its_bounds_and_breaks_beyond(rule) -> None:
    fine = {r.column: (r.bounds(DEFAULTS)[0] or 0) for r in RULES}
    assert failing(fine, "en", SETS, DEFAULTS) == []
    for bound, step in zip(rule.bounds(DEFAULTS), (-1e-9, 1e-9), strict=True):
        if bound is not None:
            assert failing(fine | {rule.column: bound}, "en", SETS, DEFAULTS) == []
            assert failing(fine | {rule.column: bound + step}, "en", SETS, DEFAULTS) == [rule.name]


def test_rules_judge_only_languages_they_make_sense_for() -> None:
    values = measure("一 " * 60) | {"mean_word_length": 1.0, "stop_words": 0}
    named = {lang: set(failing(values, lang, ["gopher_quality"], DEFAULTS)) for lang in ("en", "de", "zh")}
    assert named["zh"] == set()
    assert named["de"] == {"gopher_quality: mean_word_length"}
    assert named["en"] == {"gopher_quality: mean_word_length", "gopher_quality: stop_words"}
    assert failing(values, "en", [], DEFAULTS) == []


def plain_measure(text: str) -> dict[str, float]:
    """What `measure` promises, written as it is defined and not to be fast."""
    tokens = TOKEN.findall(text)
    lines = [x for x in text.split("\n") if x.strip()]
    paragraphs = [x for x in re.split(r"\n{2,}", text.strip()) if x.strip()]
    n_words, n_lines, n_chars = max(len(tokens), 1), max(len(lines), 1), max(len(text), 1)

    def came_before(parts: list[str]) -> list[str]:
        return [x for i, x in enumerate(parts) if x in set(parts[:i])]

    def top(n: int) -> int:
        counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        [(gram, times)] = counts.most_common(1) or [((), 0)]
        return len(" ".join(gram)) * times if times > 1 else 0

    def repeated(n: int) -> int:
        seen, chars, i = set(), 0, 0
        while i + n <= len(tokens):
            gram = tuple(tokens[i : i + n])
            chars, i = (chars + len("".join(gram)), i + n) if gram in seen else (chars, i + 1)
            seen.add(gram)
        return chars

    return {
        "words": len(tokens),
        "mean_word_length": sum(map(len, tokens)) / n_words,
        "hash_ratio": text.count("#") / n_words,
        "ellipsis_ratio": (text.count("...") + text.count("…")) / n_words,
        "bullet_lines": sum(x.lstrip().startswith(BULLETS) for x in lines) / n_lines,
        "ellipsis_lines": sum(x.rstrip().endswith(ELLIPSES) for x in lines) / n_lines,
        "alpha_words": sum(any(c.isalpha() for c in t) for t in tokens) / n_words,
        "stop_words": len(STOP_WORDS & {t.lower() for t in tokens}),
        "dup_lines": len(came_before(lines)) / n_lines,
        "dup_line_chars": sum(map(len, came_before(lines))) / n_chars,
        "dup_paragraphs": len(came_before(paragraphs)) / max(len(paragraphs), 1),
        "dup_paragraph_chars": sum(map(len, came_before(paragraphs))) / n_chars,
        **{f"top_{n}gram": top(n) / n_chars for n in (2, 3, 4)},
        **{f"dup_{n}gram": repeated(n) / n_chars for n in range(5, 11)},
    }


def check_exact(text: str) -> None:
    """Exactly the plain values, in the order of the columns and as plain floats; the same words, and as many."""
    assert words(text) == TOKEN.findall(text)
    assert cheap_words(text) == len(TOKEN.findall(text))
    found = measure(text)
    assert list(found.items()) == list(plain_measure(text).items())
    assert {type(x) for x in found.values()} == {float}


ODD = {
    "nothing": "",
    "white space": " \n\n\t\n ",
    "one word": "word",
    "one character": "中",
    "marks": "'’.- .a. -b- c..d e'-f ’",
    "joined": "a.b.c-d's 3.5 x’y a.中.b",
    "underscores": "_ __ a_b ½ Ⅷ ² ¼x",
    "lone surrogates": "a\ud800b \udfff c",
    "beyond the BMP": "𝒜bc 😀 a😀b 𠀀𠀁 𐐀",
    "all the same": "spam " * 3000,
    "two in turn": "ab cd " * 1500,
    "period of seven": "one two three four five six seven " * 300,
    "overlapping": "a a a b a a a a b " * 50,
    "CJK": "日本語のテキスト、漢字かな交じり文。" * 40,
    "mixed scripts": "Hello 世界, 안녕 мир! " * 30,
    "long word": "a" * 100_000,
    "long": " ".join(str(i * i % 9973) for i in range(40_000)),
    "newlines": "a\n\n\nb\n\n\n\nb\n \n\nb\n\n a\n",
    "bullets": "- a...\n\n• b…\n * a\n- a...\n\n",
}


@pytest.mark.parametrize("name", ODD)
def test_fast_values_are_the_plain_ones_on_odd_texts(name: str) -> None:
    check_exact(ODD[name])


def test_fast_values_are_the_plain_ones_on_random_texts() -> None:
    rng = random.Random(0)
    for _ in range(400):
        # few words: n-grams of all lengths come again, and overlap
        vocabulary = [
            "".join(rng.choices("ab.-'’_1½ 中かéЖ한😀#…", k=rng.randint(1, 4)))
            for _ in range(rng.randint(1, 9))
        ]
        phrases = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 15))) for _ in range(5)]
        ends = (" ", "\n", "\n\n", ". ", "…\n", "...\n\n\n")
        check_exact("".join(rng.choice(phrases) + rng.choice(ends) for _ in range(rng.randint(0, 60))))


def test_every_character_is_in_a_word_or_not_as_the_pattern_says() -> None:
    every = list(map(chr, range(0x110000)))
    check = " ".join(every)
    assert words("a".join(every)) == TOKEN.findall("a".join(every))
    assert cheap_words(check) == len(TOKEN.findall(check))


def test_fast_values_are_the_plain_ones_on_sample_texts() -> None:
    texts = [x.read_text(encoding="utf-8") for x in sorted((ROOT / "data_samples" / "texts").rglob("*.yaml"))]
    cuts = [t[i : i + 6000] for t in texts for i in range(0, len(t), 6000)]
    assert len(cuts) > 100
    for text in cuts:
        check_exact(text)


def test_fast_values_are_the_plain_ones_on_real_pages(real_data: Path) -> None:
    with gzip.open(real_data / "datatrove_decisions.jsonl.gz", "rt", encoding="utf-8") as f:
        texts = [json.loads(line)["text"] or "" for line in f]
    assert len(texts) > 800
    for text in texts:
        check_exact(text)
