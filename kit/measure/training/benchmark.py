"""80: speed, memory, MFU and price of the runs just made and of a grid of others; FLOPs of every method beside 6N.

A grid to quote, on the whole model: kit run params/demo.yaml --only 80 -p grid_layers=0 -p grid_warmup=3 -p grid_steps=6
"""

from __future__ import annotations

import time
from typing import Any

import torch
from peft import get_peft_model

from kit.estimate.rates import usd_per_million
from kit.lake.manifest import Counts, Manifest
from kit.lake.store import Lake
from kit.measure.training.grid import GAINS, GRID, cells, gains, rated, run_cells
from kit.params import BenchmarkTraining, FinetuneSft
from kit.train.models import load
from kit.train.models.methods import METHODS, adapter_config, base_quantization
from kit.train.plan.flops import model_flops, naive_6n
from kit.train.plan.peak import measured_peak


def benchmark_training(p: BenchmarkTraining, lake: Lake) -> Manifest:
    """Commit `runs` (60 and 70 of this lake), `grid` and `gains` (all measured), `model_flops` (by method, exact).

    MFU = model FLOPs / seconds / peak; HFU adds what ran beside them (padding, logits computed twice). The peak is a
    matmul's in the type that ran, the best seen here or in the runs, which must be of this machine. Outside the seconds:
    starting, loading, the warm-up of `grid` (that of `runs` is inside). A cell that fails is a row with its error.
    Raises `ParamError` for a grid that names no parameter.
    """
    threads = load.set_threads(p.threads)
    wanted = cells(p.grid)  # a word that is wrong is found before anything is measured
    with lake.stage(p) as out:
        trained = [out.read("60_finetune_sft"), out.read("70_align_dpo")]
        rows = run_cells(p, lake, trained[0], wanted)
        errors = [r["error"] for r in rows if r["error"]]

        # one peak for each type that ran: bfloat16 over a float32 peak would not be a utilisation
        ran = {_ran_in(m) for m in trained} | {r["computes_in"] for r in rows if not r["error"]}
        peaks = {kind: measured_peak(p.peak_matmul, getattr(torch, kind)) for kind in sorted(ran)}
        # while 60 and 70 ran the machine may have been less busy than now: a peak below what was reached is none
        for m in trained:
            peaks[_ran_in(m)] = max(peaks[_ran_in(m)], m.metrics["peak_flops_per_s"])
        rows = [r if r["error"] else rated(r, peaks[r["computes_in"]], p.usd_per_hour) for r in rows]

        table = flops_by_method(p, trained[0].params["lora_r"])
        naive = table[0]["naive_6n_flops_per_token"]  # the same for every method, as 6N knows no methods
        runs = [run_row(m, peaks[_ran_in(m)], naive, p.usd_per_hour) for m in trained]

        out.rows("runs", runs, measured=True)
        out.rows("grid", rows, GRID, measured=True)
        out.rows("gains", gains(rows, wanted), GAINS, measured=True)
        out.rows("model_flops", table)
        metrics = {"peak_flops_per_s": peaks, "threads": threads, "peak_edge": p.peak_matmul, "runs": runs}
        failed = {error: errors.count(error) for error in errors}
        n = len(trained) + len(rows)
        counts = Counts(records_in=n, records_out=n - len(errors), failed=failed)
        return out.commit(counts, metrics | {"bytes_per_s": measured_bandwidth()})


def measured_bandwidth(megabytes: int = 256, tries: int = 6) -> float:
    """Bytes per second, read and written, of the fastest copy within this device's memory."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=load.device())
    target, took = torch.empty_like(source), []
    for _ in range(tries):
        began = time.perf_counter()
        target.copy_(source)
        target[0].item()  # waits for a GPU
        took.append(time.perf_counter() - began)
    return 2 * source.numel() / min(took)


def _ran_in(manifest: Manifest) -> str:
    """The type that the matmuls ran in."""
    return manifest.metrics["what_ran"]["computes_in"]


def run_row(manifest: Manifest, peak: float, naive_per_token: float, usd_per_hour: float) -> dict[str, Any]:
    """One run as one row. Rates in tokens (padding excluded), rows or pairs, and FLOPs per second."""
    metrics, run_params = manifest.metrics, manifest.params
    seconds, tokens = metrics["train_seconds"], metrics["tokens"]
    return {
        "stage": manifest.stage,
        "method": " + ".join(run_params[k] for k in ("preference_loss", "method") if k in run_params),
        "steps": len(metrics["losses"]),
        "padding_share": 1 - tokens / metrics["padded_tokens"],
        "seconds": seconds,
        **{k: metrics[k] for k in ("tokens", "tokens_per_s", "samples_per_s", "flops_per_token")},
        "peak_flops_per_s": peak,
        "mfu": metrics["flops"] / seconds / peak,
        "hfu": metrics["hardware_flops"] / seconds / peak,
        "naive_6n_mfu": naive_per_token * tokens / seconds / peak,
        "peak_memory_mb": metrics["peak_rss_mb"],
        "usd_per_million_tokens": usd_per_million(seconds, tokens, usd_per_hour),
        "dtype": _ran_in(manifest),
        "threads": metrics["what_ran"]["threads"],
        "convention": metrics["flops_convention"],
    }


def flops_by_method(p: BenchmarkTraining, lora_r: int) -> list[dict[str, Any]]:
    """FLOPs per token in rows of `p.max_tokens`: `method_to_full` is saved, `naive_to_true` is 6N's error."""
    rows = []
    for method in METHODS:
        tuning = FinetuneSft(base_model=p.base_model, method=method, lora_r=lora_r)
        model = load.load_model(p.base_model, dtype=p.dtype, quantization=base_quantization(tuning))
        naive = naive_6n(model)
        config = adapter_config(tuning)
        counted = model_flops(get_peft_model(model, config) if config else model)
        rows.append(
            {
                "method": method,
                "trained_matmul_parameters": counted.trained,
                "frozen_matmul_parameters": counted.frozen,
                "weight_flops_per_token": counted.weights,
                "attention_flops_per_token": counted.per_token(p.max_tokens) - counted.weights,
                "flops_per_token": counted.per_token(p.max_tokens),
                "naive_6n_flops_per_token": naive,
                "naive_to_true": naive / counted.per_token(p.max_tokens),
                "row_tokens": p.max_tokens,
            }
        )
        del model
        load.release()
    full = next(r["flops_per_token"] for r in rows if r["method"] == "full")
    return [{**row, "method_to_full": row["flops_per_token"] / full} for row in rows]
