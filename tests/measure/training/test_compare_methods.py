"""The comparison of methods: each in a process of its own, failures as rows, ratios from what was measured."""

import math

import pytest
from support import make_lake, tiny_model

from kit.errors import ModelError, ParamError
from kit.estimate import reference
from kit.lake.store import Lake
from kit.measure.training import compare_methods
from kit.measure.training.compare_methods import CLAIMS, EXTRAS, claims, tuning
from kit.params import ComparePeft
from kit.train.models.methods import METHODS


def compare_params(lake: Lake, **values) -> ComparePeft:
    small = {"compare_steps": 2, "max_tokens": 48, "compare_eval_rows": 2, "threads": 1, "dtype": "float32"}
    return ComparePeft(**{"lake": lake.uri, "base_model": tiny_model(), **small, **values})


def test_every_way_is_a_row_and_one_that_fails_says_why(tmp_path, monkeypatch):
    lake = make_lake(tmp_path)
    run_it = compare_methods.in_own_process

    def too_large(work, p, *args):
        return {"error": "does not fit"} if p.activation_checkpointing else run_it(work, p, *args)

    monkeypatch.setattr(compare_methods, "in_own_process", too_large)
    manifest = compare_methods.compare_methods(compare_params(lake, methods=["lora"]), lake)
    rows = {r["name"]: r for r in lake.table(manifest, "methods").to_pylist()}
    assert list(rows) == ["lora", *(n for n, way in EXTRAS.items() if way["method"] == "lora")]
    assert manifest.counts.failed == {"does not fit": 1}
    assert rows["lora, checkpointing"]["samples_per_s"] is None
    lora = rows["lora"]
    assert lora["heldout_after"] < lora["heldout_before"]
    assert 0 < lora["trainable"] < lora["parameters"]
    assert lora["peak_memory_mb"] > lora["weights_mb"] > 0
    assert 0 < lora["mfu"] <= lora["hfu"]
    assert lora["minutes"] > 0 < lora["usd"]
    # the same rows in the same order: in float32 two half batches are one
    assert rows["lora, half batch twice"]["heldout_after"] == pytest.approx(lora["heldout_after"], rel=1e-4)


def test_all_ways_see_the_same_number_of_rows():
    p = ComparePeft(compare_steps=5, compare_batch_size=4)
    for way in [{"method": m} for m in METHODS] + list(EXTRAS.values()):
        t = tuning(p, way)
        assert t.sft_steps * t.sft_batch_size * t.gradient_accumulation == 20


def test_a_method_that_does_not_exist_and_a_model_that_cannot_be_had(tmp_path):
    lake = make_lake(tmp_path)
    with pytest.raises(ParamError, match="no method 'lorra'; did you mean 'lora'"):
        compare_methods.compare_methods(compare_params(lake, methods=["lorra"]), lake)
    with pytest.raises(ModelError, match="no method ran"):
        compare_methods.compare_methods(compare_params(lake, methods=["prompt"], base_model="/nowhere"), lake)


def test_claims_are_ratios_of_the_rows_named():
    def row(name, **values):
        return {
            "name": name,
            "error": "",
            "trainable": 1,
            "usd": 1.0,
            "weights_mb": 1.0,
            "peak_memory_mb": 1.0,
        } | values

    rows = [row("full", samples_per_s=2.0), row("lora", samples_per_s=3.0, weights_mb=4.0)]
    rows += [row("qlora", samples_per_s=1.0), {"name": "lora, float32", "error": "no memory"}]
    made = {c["claim"]: c["here"] for c in claims(rows)}
    assert len(made) == len(CLAIMS)
    assert made["LoRA over full, samples/s"] == "1.5×"
    assert made["QLoRA needs less memory than LoRA: weights"] == "−75%"
    assert made["mixed precision over float32, LoRA"] == "not measured"


def test_the_reference_run_that_ships_beats_its_base_in_every_method():
    made = reference.read("methods")
    assert {"machine", "date", "commit", "command"} <= set(made)
    rows = {r["name"]: r for r in made["rows"]}
    assert set(METHODS) <= set(rows)
    for name in METHODS:
        assert rows[name]["heldout_after"] < rows[name]["heldout_before"], name
        assert math.isfinite(rows[name]["heldout_after"])
