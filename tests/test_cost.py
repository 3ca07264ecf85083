"""Estimates: a fixed part, a rate, and where the rate comes from."""

import pytest

from kit import cost
from kit.lake import Counts, Manifest
from kit.params import STAGES, CompareGenerations, ExtractText, FinetuneSft

RATES = {
    "machine": "m",
    "date": "d",
    "commit": "c",
    "stages": {n: {"fixed_s": 10.0, "per_unit_s": 0.5, "memory_mb": 900} for n in STAGES},
}


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    monkeypatch.setattr(cost, "reference", lambda: RATES)


def manifest(p, records, seconds):
    return Manifest(stage=p.stage, run="r", created_at="", params=p.identity(), inputs=[], outputs=[],
                    counts=Counts(records_in=records, records_out=records), seconds=seconds, cost_usd=0, code={}, environment={})  # fmt: skip


def test_without_an_earlier_run_the_reference_is_used():
    e = cost.estimate(ExtractText(usd_per_hour=3.6), 100, None)
    assert (e.seconds, e.rate_from, e.memory_mb) == (60.0, "reference run", 900)
    assert e.usd == pytest.approx(0.06)


def test_an_earlier_run_gives_the_rate_and_its_fixed_part_does_not_scale():
    e = cost.estimate(ExtractText(), 1000, manifest(ExtractText(), 100, 20.0))
    assert (e.seconds, e.rate_from) == (110.0, "this lake")


def test_training_counts_tokens_and_generation_new_tokens():
    assert cost.planned_units(FinetuneSft(sft_steps=10, sft_batch_size=4, max_tokens=100), 5) == (
        4000,
        "tokens at most",
    )
    assert cost.planned_units(CompareGenerations(prompts=["a", "b"], max_new_tokens=10), 5) == (
        60,
        "new tokens",
    )


def test_dollars_per_million():
    assert cost.usd_per_million(3600, 1e6, 2.0) == pytest.approx(2.0)


def test_the_shipped_reference_covers_every_stage(monkeypatch):
    monkeypatch.undo()
    shipped = cost.reference()
    assert set(shipped["stages"]) == set(STAGES) and shipped["machine"] and shipped["commit"]
