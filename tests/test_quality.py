"""Quality values against vectors worked out by hand."""

import pytest

from kit.data.quality import COLUMNS, RULES, failing, measure, words
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
