"""Preference alignment on a tiny random model: the reference, the counts, the bytes."""

import math

import pytest
from support import TEXT, dpo_params, make_lake, no_network, outputs, pair, sft_params, tiny_model, tuned_lake

from kit.errors import ModelError
from kit.train.align import preference
from kit.train.align.objectives import OBJECTIVES, check_first_loss
from kit.train.align.preference import align
from kit.train.models import load
from kit.train.tune.sft import finetune


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_starts_at_ln_2_and_widens_the_margin(tmp_path, monkeypatch, dtype):
    attempts = no_network(monkeypatch)
    lake = tuned_lake(tmp_path)
    m = align(dpo_params(lake, dpo_steps=12, dpo_learning_rate=5e-3, dtype=dtype), lake).metrics
    assert attempts == []
    assert m["losses"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert m["margins"][0] == pytest.approx(0, abs=1e-3)
    assert m["margins"][-1] > 0.01
    assert len(m["accuracies"]) == 12
    assert m["what_ran"]["trainer"] == "DPOTrainer"
    assert m["flops"] > m["forward_flops"] > 0


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_after_full_fine_tuning_too_the_reference_is_the_tuned_model(tmp_path, method):
    lake = make_lake(tmp_path)
    finetune(sft_params(lake, method="full", sft_learning_rate=1e-2), lake)
    m = align(dpo_params(lake, method=method, dpo_steps=10, dpo_learning_rate=5e-3), lake).metrics
    assert m["losses"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert m["margins"][-1] > 0.01
    assert m["what_ran"]["reference"] == (
        "a frozen copy of the tuned model" if method == "full" else "the tuned model, new adapter off"
    )
    assert (m["what_ran"]["trainable"] == m["what_ran"]["parameters"]) == (method == "full")


@pytest.mark.parametrize("loss", list(OBJECTIVES))
def test_every_objective_starts_where_it_must_and_parts_chosen_from_rejected(tmp_path, loss):
    lake = tuned_lake(tmp_path)
    p = dpo_params(lake, preference_loss=loss, dpo_steps=12, dpo_learning_rate=5e-3)
    m = align(p, lake).metrics
    start = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5}.get(loss)
    assert start is None or m["losses"][0] == pytest.approx(start, rel=1e-3)
    assert loss == "orpo" or m["margins"][-1] > m["margins"][0]
    assert m["losses"][-1] < m["losses"][0]
    assert (m["what_ran"]["reference"] == "none") == (loss == "orpo")
    assert m["what_ran"]["loss"] == loss


def test_a_smaller_beta_goes_further_and_heldout_pairs_are_ranked(tmp_path):
    held = [pair(20 + i, f" {TEXT[i]}", f" {TEXT[(i + 1) % 3]}", split="heldout") for i in range(2)]
    lake = tuned_lake(
        tmp_path, pairs=[*(pair(i, f" {TEXT[i % 3]}", f" {TEXT[(i + 1) % 3]}") for i in range(4)), *held]
    )
    p = dpo_params(lake, dpo_steps=14, dpo_learning_rate=1e-2, sweep_betas=["2.0", "0.02"])
    m = align(p, lake).metrics
    assert [s["beta"] for s in m["sweep"]] == [0.02, 0.1, 2.0]
    assert m["sweep"][0]["margins"][-1] > m["sweep"][2]["margins"][-1] > 0
    assert m["sweep"][1]["losses"] == m["losses"], "the sweep changes nothing of the run itself"
    assert m["heldout"]["pairs"] == 2
    assert 0 <= m["heldout"]["accuracies"] <= 1


def test_a_learned_prompt_cannot_be_aligned(tmp_path):
    lake = tuned_lake(tmp_path)
    with pytest.raises(ModelError, match=r"method=prompt.*full, lora, qlora or dora"):
        align(dpo_params(lake, method="prompt"), lake)


def test_another_reference_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="not 0.6931"):
        check_first_loss(0.7)
    with pytest.raises(ModelError, match="not 0.6931"):
        check_first_loss(float("nan"))
    lake = tuned_lake(tmp_path)
    build = preference.preference_trainer

    def wrong_reference(p, model, *args):
        trainer = build(p, model, *args)
        trainer.ref_model = load.load_model(tiny_model(), dtype="float32")  # the base, not the tuned model
        preference.load.release()
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(trainer.ref_model)
        return trainer

    monkeypatch.setattr(preference, "preference_trainer", wrong_reference)
    with pytest.raises(ModelError, match="the reference is not the model that training starts from"):
        align(dpo_params(lake), lake)
    assert lake.manifest("sample", "70_align_dpo") is None


def test_the_same_parameters_give_the_same_bytes(tmp_path):
    lake = tuned_lake(tmp_path)
    first = align(dpo_params(lake), lake)
    assert outputs(align(dpo_params(lake), lake)) == outputs(first)
    assert sorted(outputs(first)) == [
        "model/adapter_config.json",
        "model/adapter_model.safetensors",
        "model/tuned_on.json",
    ]


def test_every_pair_is_accounted_for(tmp_path):
    good = [pair(i, f" {TEXT[i % 3]}", f" {TEXT[(i + 1) % 3]}") for i in range(5)]
    bad = [
        pair(10, "", " no"),
        pair(11, " same", " same "),
        pair(12, " yes", " no", prompt="The film is " * 40),
        pair(13, " yes", " no", split="heldout"),
    ]
    lake = tuned_lake(tmp_path, pairs=good + bad)
    manifest = align(dpo_params(lake, dpo_steps=2), lake)
    assert manifest.counts.records_in == 8, "held-out pairs are no input of training"
    assert manifest.counts.records_out == 4
    assert manifest.counts.dropped == {
        "empty": 1,
        "chosen equals rejected": 1,
        "prompt fills max_tokens": 1,
        "not reached in dpo_steps": 1,
    }


def test_no_pair_is_an_error(tmp_path):
    lake = tuned_lake(tmp_path, pairs=[])
    with pytest.raises(ModelError, match="no usable preference row"):
        align(dpo_params(lake), lake)
