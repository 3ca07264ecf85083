"""Typed, flat parameters: conversion from strings, clear errors, one meaning per name."""

import pytest

from kit import ROOT
from kit.errors import ParamError
from kit.params import (
    NOTEBOOKS,
    STAGES,
    AlignDpo,
    ExploreIndex,
    ExtractText,
    RefineText,
    Stage,
    for_stage,
    known_fields,
    load_recipe,
    validate_recipe,
)


def test_strings_become_their_types():
    p = RefineText.parse(
        {"min_words": "80", "mask_pii": "false", "min_lang_score": "0.5", "keep_languages": "[en, de]"}
    )
    assert (p.min_words, p.mask_pii, p.min_lang_score, p.keep_languages) == (80, False, 0.5, ["en", "de"])


@pytest.mark.parametrize(
    "text, expected",
    [("", []), ("[]", []), ("eng", ["eng"]), ("eng, zho", ["eng", "zho"]), ("['a, b', c]", ["a, b", "c"])],
)
def test_lists_come_as_people_write_them(text, expected):
    assert ExploreIndex.parse({"languages": text}).languages == expected


def test_a_model_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        RefineText().min_words = 3


def test_unknown_name_names_the_nearest():
    with pytest.raises(ParamError, match="unknown parameter 'sft_step'; did you mean 'sft_steps'"):
        validate_recipe({"sft_step": 3})


@pytest.mark.parametrize(
    "values",
    [
        {"min_words": "many"},
        {"min_lang_score": 2},
        {"extractor": "magic"},
        {"run": "a/b"},
        {"prompts": [{"a": "b"}]},
    ],
)
def test_wrong_values_are_refused_by_name(values):
    with pytest.raises(ParamError, match=f"parameter '{next(iter(values))}'"):
        validate_recipe(values)


def test_every_wrong_word_is_named_at_once():
    with pytest.raises(ParamError, match="nosuch.*min_words"):
        validate_recipe({"nosuch": 1, "min_words": "x"})


def test_one_name_means_one_thing():
    seen = {}
    for cls in NOTEBOOKS.values():
        for name, field in cls.model_fields.items():
            meaning = (field.annotation, field.default, field.description)
            assert seen.setdefault(name, meaning) == meaning, f"{name} means two things"


def test_a_parameter_is_declared_once():
    """Stages that share one inherit it: a default or a bound is changed in one place."""
    declared = {}
    for cls in {base for stage in NOTEBOOKS.values() for base in stage.__mro__ if issubclass(base, Stage)}:
        for name in cls.__annotations__.keys() & cls.model_fields.keys():
            assert declared.setdefault(name, cls) is cls, f"{name}: {cls.__name__}, {declared[name].__name__}"
    assert declared.keys() == known_fields().keys()


def test_from_cell_takes_only_what_the_stage_knows():
    p = AlignDpo.from_cell({"dpo_steps": 3, "nosuch": 1, "__name__": "x"})
    assert p.dpo_steps == 3


def test_identity_leaves_out_where_and_how_much():
    a = RefineText(run="a", lake="x", usd_per_hour=1, cores=1).identity()
    assert a == RefineText(run="b", lake="y", usd_per_hour=2, cores=2).identity()
    assert a != RefineText(min_words=51).identity()


def test_thresholds_of_later_stages_are_the_extractors_only_with_a_prefilter():
    assert ExtractText(min_words=1, keep_languages=["en"]).identity() == ExtractText().identity()
    assert ExtractText(prefilter=True, min_words=1).identity() != ExtractText(prefilter=True).identity()
    assert ExtractText(prefilter=True).identity() != ExtractText().identity()


@pytest.mark.parametrize("recipe", sorted((ROOT / "params").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_recipes_are_valid(recipe):
    values = load_recipe(recipe)
    assert {for_stage(cls, values).run for cls in STAGES.values()} == {recipe.stem}


@pytest.mark.parametrize("name", ["imdb_reviews", "amazon_sentiment", "dolly_llama3", "common_crawl_month"])
def test_experiments_suit_every_notebook_and_say_why_on_every_line(name):
    path = ROOT / "params" / f"{name}.yaml"
    values = load_recipe(path)
    stages = [for_stage(cls, values) for cls in NOTEBOOKS.values()]
    told = {k for p in stages for k, v in values.items() if k in type(p).model_fields and getattr(p, k) == v}
    assert told == set(values), "a value that no stage takes as it is written"
    defaults = {k: f.default for cls in NOTEBOOKS.values() for k, f in cls.model_fields.items()}
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in " #"]
    silent = [line for line in lines[1:] if " # " not in line and not line.endswith(":")]
    assert silent == []
    assert len([k for k in values if values[k] != defaults[k]]) > 15


@pytest.mark.parametrize(
    "text, line",
    [
        ("a: [1", "not YAML"),
        ("- a\n- b", "name: value"),
        ("just words", "name: value"),
        ("a: 1\n b: 2\n", "not YAML, line 2"),
    ],
)
def test_what_is_no_recipe_is_told_in_one_line(tmp_path, text, line):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ParamError, match=line) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_recipe_is_told(tmp_path):
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", binary, tmp_path):
        with pytest.raises(ParamError, match="the kit ships .*params/demo.yaml"):
            load_recipe(path)
