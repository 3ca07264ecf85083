"""What a stage trains stands in named fields, and what it reads in a method: nothing hangs on how a field is called."""

import pyarrow as pa
import pytest
from support import tiny_model

from kit import ROOT, pipeline
from kit.estimate import rates
from kit.lake.code import NOT_IN_CONTENT
from kit.lake.manifest import Counts
from kit.lake.store import Lake
from kit.params import (
    NOTEBOOKS,
    AlignDpo,
    BuildDatasets,
    ClassifySentiment,
    ContinuePretraining,
    Distill,
    FinetuneSft,
    MergeAndExport,
    RewardAndPolicy,
)

TRAINS = {
    "60_finetune_sft": ["sft"],
    "62_continue_pretraining": ["scratch", "model"],
    "63_classify_sentiment": ["classifier"],
    "70_align_dpo": ["policy"],
    "71_reward_and_policy": ["reward", "policy"],
    "73_distill": ["student"],
}


def test_every_stage_that_takes_optimizer_steps_says_what_it_fits():
    assert {name: [f.name for f in cls().fits()] for name, cls in NOTEBOOKS.items() if cls().fits()} == TRAINS
    for name in TRAINS:
        p = NOTEBOOKS[name]()
        for fit in p.fits():
            assert fit.batch_field in type(p).model_fields


@pytest.mark.parametrize(
    "p, steps, rows, texts",
    [
        (FinetuneSft(sft_steps=7, sft_batch_size=3), [7], [3], [1]),
        (ContinuePretraining(pretrain_steps=9, pretrain_batch_size=5, continue_steps=4), [9, 4], [5, 2], [1, 1]),
        (ClassifySentiment(classify_steps=6, classify_batch_size=8), [6], [8], [1]),
        (AlignDpo(dpo_steps=5, dpo_batch_size=3), [5], [3], [2]),
        (RewardAndPolicy(reward_steps=8, reward_batch_size=3, policy_steps=2, policy_prompts=5, policy_generations=6),
         [8, 2], [3, 5], [2, 6]),
        (Distill(distill_steps=3, distill_batch_size=4), [3], [4], [1]),
    ],
)  # fmt: skip
def test_each_fit_has_its_own_steps_rows_and_texts(p, steps, rows, texts):
    trained = p.fits()
    assert [f.steps for f in trained] == steps
    assert [f.rows for f in trained] == rows
    assert [f.texts for f in trained] == texts


def test_only_a_loss_with_a_reference_has_one():
    losses = {
        loss: AlignDpo(preference_loss=loss).fits()[0].reference for loss in ("dpo", "ipo", "kto", "orpo")
    }
    assert losses == {"dpo": True, "ipo": True, "kto": True, "orpo": False}
    assert [f.reference for f in RewardAndPolicy().fits()] == [False, True]
    assert not RewardAndPolicy(policy_kl_beta=0).fits()[1].reference


def test_the_work_of_every_training_is_counted_and_not_of_those_with_a_known_prefix():
    p = RewardAndPolicy(
        reward_steps=10, reward_batch_size=2, reward_tokens=50, gradient_accumulation=3,
        policy_steps=4, policy_prompts=2, policy_generations=5,
    )  # fmt: skip
    assert rates.planned_units(p, 5) == (10 * 2 * 2 * 3 * 50 + 4 * 2 * 5 * 3 * 50, "tokens at most")
    assert rates.planned_units(AlignDpo(dpo_steps=4, dpo_batch_size=3, max_tokens=10), 5)[0] == 4 * 3 * 2 * 10
    units = {name: rates.planned_units(cls(), 7)[1] for name, cls in NOTEBOOKS.items()}
    assert units["30_refine_text"] == units["50_build_datasets"] == "pages"
    assert units["00_start_here"] == units["80_benchmark_training"] == "machine"


@pytest.mark.parametrize(
    "p, more",
    [
        (AlignDpo(preferences_from="72_constitutional_feedback"), "72_constitutional_feedback"),
        (MergeAndExport(export_from="70_align_dpo"), "70_align_dpo"),
    ],
)
def test_a_stage_that_a_parameter_names_is_made_first(tmp_path, monkeypatch, p, more):
    """74 with export_from=70_align_dpo could not run alone: only 70's parameter was known to name a stage."""
    assert p.reads() == (*type(p).needs, more)
    assert type(p)().reads() == type(p).needs
    made = []

    def run_stage(lake, stage):
        made.append(stage.stage)
        with lake.stage(stage) as out:
            out.table("part", pa.table({"n": [1]}))
            out.commit(Counts(records_in=1, records_out=1))

    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    monkeypatch.setattr(Lake, "check_writable", lambda self: None)
    given = {"lake": str(tmp_path), "base_model": tiny_model()}
    pipeline.open_lake(p.model_copy(update=given))
    assert more in made and BuildDatasets.stage in made


def test_no_result_gets_stale_by_a_parameter_of_another_stage():
    modules = {f"kit.params.{path.stem}" for path in (ROOT / "kit" / "params").glob("[a-z]*.py")}
    assert "kit.params.fit" in modules <= NOT_IN_CONTENT
