"""The benchmark of a run and of a grid: rows, convention, cells in words, gains, and what is the same every time."""

import pytest
from support import tiny_model

from kit import params
from kit.errors import ParamError
from kit.measure.training import grid
from kit.measure.training.benchmark import benchmark_training
from kit.measure.training.grid import cells
from kit.train.loop.meter import PARTS
from kit.train.models.methods import METHODS
from kit.train.plan import settings


@pytest.fixture(scope="module")
def lake(aligned_lake):
    return aligned_lake


def bench(lake, **values):
    small = {"peak_matmul": 64, "max_tokens": 48, "threads": 1, "grid": [], "grid_layers": 0}
    p = params.BenchmarkTraining(
        **{"lake": lake.uri, "base_model": tiny_model(), "dtype": "float32", **small, **values}
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
    assert manifest.metrics["bytes_per_s"] > 1e8
    for name in ("grid", "gains"):  # no cells: the tables are there, and empty
        assert lake.table(manifest, name).num_rows == 0


def test_flops_by_method_are_exact_and_the_timings_no_content(lake):
    first, second = bench(lake), bench(lake)
    assert first.content_sha256 == second.content_sha256
    rows = {r["method"]: r for r in lake.table(first, "model_flops").to_pylist()}
    assert set(rows) == set(METHODS)
    assert rows["full"]["method_to_full"] == 1
    assert rows["lora"]["method_to_full"] < 0.8
    assert rows["lora"]["naive_to_true"] > 1.2
    assert rows["full"]["weight_flops_per_token"] == 6 * rows["full"]["trained_matmul_parameters"]


def test_every_cell_is_a_row_and_one_that_fails_says_why(lake):
    grid = ["kit", "activation_checkpointing=true", "stock", "attention=flash_attention_2"]
    manifest = bench(lake, grid=grid, grid_layers=1, grid_steps=2)
    rows = {r["cell"]: r for r in lake.table(manifest, "grid").to_pylist()}
    assert list(rows) == grid
    failed = rows.pop("attention=flash_attention_2")
    assert "flash_attention_2" in failed["error"] and failed["tokens_per_s"] is None
    assert manifest.counts.failed == {failed["error"]: 1}
    assert manifest.counts.records_out == 2 + 3
    for row in rows.values():
        assert row["error"] == "" and row["steps"] == 2 and row["layers"] == 1
        assert 0 < row["mfu"] <= row["hfu"] and row["mfu"] < row["naive_6n_mfu"]
        assert row["peak_memory_mb"] > 0 < row["usd_per_million_tokens"]
        assert row["joules_per_token"] is None or row["joules_per_token"] > 0
        parts = [row[f"{part}_s"] for part in (*PARTS, "idle")]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(row["seconds_a_step"], rel=0.3)
        assert all(row[name] for name in ("machine", "torch", "transformers", "trl", "peft", "convention"))
    kit, again, stock = rows["kit"], rows["activation_checkpointing=true"], rows["stock"]
    assert (kit["checkpointing"], again["checkpointing"], stock["checkpointing"]) == (0, 1, 1)
    assert kit["packing"].startswith("best fit") and stock["packing"] == "none"
    assert (
        again["hardware_flops_per_s"] / again["flops_per_s"]
        > kit["hardware_flops_per_s"] / kit["flops_per_s"]
    )
    assert stock["computes_in"] == "bfloat16" and kit["computes_in"] == "float32"
    # nothing but the way it is computed was switched: the same rows, the same loss
    assert again["last_loss"] == pytest.approx(kit["last_loss"], rel=1e-5)
    made = {g["without"]: g for g in lake.table(manifest, "gains").to_pylist()}
    assert set(made) == {"activation_checkpointing=true", "stock"}
    assert made["stock"]["speed"] == pytest.approx(kit["tokens_per_s"] / stock["tokens_per_s"])
    assert made["stock"]["memory"] == pytest.approx(kit["peak_memory_mb"] / stock["peak_memory_mb"])


def test_cells_are_words_and_alternatives_are_multiplied_out():
    made = cells(["", "kit", "method=full|lora", "max_tokens=128|256 sft_batch_size=2|4"])
    assert [c.name for c in made] == [
        "kit",
        "method=full",
        "method=lora",
        *(f"max_tokens={t} sft_batch_size={b}" for t in (128, 256) for b in (2, 4)),
    ]
    assert made[1].params == {"method": "full"} and not made[1].changes
    (stock,) = cells(["stock"])
    assert stock.changes == settings.STOCK and stock.params["packing"] is False
    (nearly,) = cells(["stock packing=true compile_model=on loss_tile=2048"])
    assert nearly.params["packing"] == "true" and nearly.changes["loss_tile"] == 2048
    assert not {"packing", "compile"} & set(nearly.changes), "the word comes after stock, and holds"


@pytest.mark.parametrize(
    "word, near", [("metod=full", "method"), ("stok", "stock"), ("atention=eager", "attention")]
)
def test_a_cell_that_names_nothing_is_refused_before_anything_runs(lake, word, near):
    with pytest.raises(ParamError, match=f"'grid': '{word}' names no parameter of 60; did you mean '{near}'"):
        bench(lake, grid=["kit", word])


def test_a_value_that_cannot_be_is_refused_before_anything_runs(lake):
    with pytest.raises(Exception, match="method"):
        bench(lake, grid=["method=lorra"])


def test_spread_is_the_interquartile_range_over_the_median():
    assert grid.spread([5.0]) == 0
    assert grid.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


def test_gains_are_of_cells_that_train_the_same():
    def row(cell, speed):
        return {"cell": cell, "error": "", "tokens_per_s": speed, "peak_memory_mb": 100.0, "last_loss": 1.0}

    wanted = cells(["kit", "stock", "method=full", "attention=eager", "packing=false max_tokens=64"])
    rows = [row(c.name, s) for c, s in zip(wanted, (300.0, 150.0, 100.0, 200.0, 50.0), strict=True)]
    speeds = {g["without"]: g["speed"] for g in grid.gains(rows, wanted)}
    assert speeds == {"stock": 2.0, "attention=eager": 1.5}
    rows[0]["error"] = "no memory"
    assert grid.gains(rows, wanted) == []
