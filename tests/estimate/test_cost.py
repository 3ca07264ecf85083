"""Estimates: a fixed part, a rate, and where the rate comes from."""

import pytest
from support import no_network

from kit import ROOT
from kit.cli import main
from kit.estimate import reference, table
from kit.estimate.rates import measured_by_reference, planned_units, usd_per_million
from kit.lake.manifest import Counts, Manifest
from kit.params import STAGES, CompareGenerations, ExtractText, FinetuneSft
from kit.train.models import shipped
from kit.train.plan import machine as machines

RATES = {
    "machine": "m",
    "date": "d",
    "commit": "c",
    "stages": {n: {"fixed_s": 10.0, "per_unit_s": 0.5, "memory_mb": 900} for n in STAGES},
}


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    monkeypatch.setattr(reference, "read", lambda name: RATES)


def manifest(p, records, seconds):
    return Manifest(stage=p.stage, run="r", created_at="", params=p.identity(), inputs=[], outputs=[],
                    counts=Counts(records_in=records, records_out=records), seconds=seconds, cost_usd=0, code={}, environment={})  # fmt: skip


def test_without_an_earlier_run_the_reference_is_used():
    e = table.estimate_stage(ExtractText(usd_per_hour=3.6), 100, None)
    assert (e.seconds, e.rate_from, e.memory_mb) == (60.0, "reference run", 900)
    assert e.usd == pytest.approx(0.06)


def test_an_earlier_run_gives_the_rate_and_its_fixed_part_does_not_scale():
    e = table.estimate_stage(ExtractText(), 1000, manifest(ExtractText(), 100, 20.0))
    assert (e.seconds, e.rate_from) == (110.0, "this lake")


def test_training_counts_tokens_and_generation_new_tokens():
    assert planned_units(FinetuneSft(sft_steps=10, sft_batch_size=4, max_tokens=100), 5) == (
        4000,
        "tokens at most",
    )
    assert planned_units(CompareGenerations(prompts=["a", "b"], max_new_tokens=10), 5) == (
        60,
        "new tokens",
    )


def test_dollars_per_million():
    assert usd_per_million(3600, 1e6, 2.0) == pytest.approx(2.0)


def test_the_shipped_reference_covers_every_stage(monkeypatch):
    monkeypatch.undo()
    shipped = reference.read("rates")
    assert set(shipped["stages"]) == set(STAGES) and shipped["machine"] and shipped["commit"]


def test_a_step_of_several_passes_is_counted_whole():
    p = FinetuneSft(sft_steps=10, sft_batch_size=4, gradient_accumulation=3, max_tokens=100)
    assert planned_units(p, 5)[0] == 12_000


def test_another_models_run_tells_nothing_and_the_plan_stands_in():
    p = FinetuneSft(base_model="big/one")
    e = table.estimate_stage(p, 1, manifest(FinetuneSft(), 8, 30.0), (90.0, 20_000.4, "plan for X"))
    assert (e.seconds, e.memory_mb, e.rate_from) == (100.0, 20_000, "plan for X")
    assert not measured_by_reference(p) and measured_by_reference(FinetuneSft())


def test_cores_that_are_named_share_the_pages():
    e = table.estimate_stage(ExtractText(cores=20), 100, None)
    assert e.seconds == 10 + 0.5 * 100 / 10 and "2 → 20 cores" in e.rate_from


@pytest.mark.parametrize(
    "recipe, pages, said",
    [
        ("imdb_reviews", "20,000 pages at most", "plan for L40S"),
        ("amazon_sentiment", "40,000 pages at most", "plan for L40S"),
        ("dolly_llama3", "717 pages selected", "plan for L40S"),
        ("common_crawl_month", "2,616,796,857 pages at most", "runs on one core"),
    ],
)
def test_the_experiments_are_estimated_offline(monkeypatch, capsys, tmp_path, recipe, pages, said):
    if recipe != "dolly_llama3" and not shipped.PACKAGES[shipped.SHIPPED].here:
        pytest.skip("the shipped model is not fetched")
    monkeypatch.undo()
    attempts = no_network(monkeypatch)
    path = ROOT / "params" / f"{recipe}.yaml"
    assert main(["estimate", str(path), "--gpu", "l40s", "--lake", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert pages in out and said in out and attempts == []
    assert "needs" not in out, "the recipe's own machine is large enough"


def test_a_machine_that_is_too_small_is_told_with_what_would_fit(monkeypatch, capsys, tmp_path):
    monkeypatch.undo()
    small = machines.Machine("x", 12_000.0, 3e11, 10.0, gpu=False)
    monkeypatch.setattr(machines, "this_machine", lambda dtype: small)
    path = ROOT / "params" / "dolly_llama3.yaml"
    assert main(["estimate", str(path), "--lake", str(tmp_path)]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert any(
        "60_finetune_sft" in w and "x has 11.7 GB free: " in w and "method=qlora" in w for w in warnings
    )


def test_an_unknown_gpu_names_the_known_ones(monkeypatch, capsys):
    monkeypatch.undo()
    assert main(["estimate", str(ROOT / "params/demo.yaml"), "--gpu", "h10"]) == 2
    assert "did you mean 'h100'" in capsys.readouterr().err
