"""The benchmark of a run: its rows, its convention, and what of it is the same every time."""

import pytest
from test_models import tiny_model
from test_preference import dpo_params, tuned_lake

from kit import params
from kit.measure.benchmark import benchmark_training
from kit.train.methods import METHODS
from kit.train.preference import align


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    lake = tuned_lake(tmp_path_factory.mktemp("lake"))
    align(dpo_params(lake), lake)
    return lake


def bench(lake):
    p = params.BenchmarkTraining(
        lake=lake.uri, base_model=tiny_model(), dtype="float32", peak_matmul=64, max_tokens=48, threads=1
    )
    return benchmark_training(p, lake)


def test_a_row_per_run_with_rates_memory_and_price(lake):
    manifest = bench(lake)
    sft, dpo = lake.table(manifest, "runs").to_pylist()
    made = lake.need("sample", "60_finetune_sft").metrics
    assert (sft["stage"], sft["method"]) == ("60_finetune_sft", "lora")
    assert dpo["stage"] == "70_align_dpo"
    for row in (sft, dpo):
        assert 0 < row["mfu"] <= row["hfu"]
        assert row["peak_memory_mb"] > 0
        assert row["usd_per_million_tokens"] > 0
        assert "causal (half)" in row["convention"]
        assert row["dtype"] == "float32"
    assert sft["mfu"] == pytest.approx(made["flops"] / made["train_seconds"] / sft["peak_flops_per_s"])
    assert "reference" in dpo["convention"]


def test_flops_by_method_are_exact_and_the_timings_no_content(lake):
    first, second = bench(lake), bench(lake)
    assert first.content_sha256 == second.content_sha256
    rows = {r["method"]: r for r in lake.table(first, "model_flops").to_pylist()}
    assert set(rows) == set(METHODS)
    assert rows["full"]["method_to_full"] == 1
    assert rows["lora"]["method_to_full"] < 0.8
    assert rows["lora"]["naive_to_true"] > 1.2
    assert rows["full"]["weight_flops_per_token"] == 6 * rows["full"]["trained_matmul_parameters"]
