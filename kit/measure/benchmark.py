"""80: speed, memory, MFU and price of the runs just made; FLOPs of every method beside the naive 6N."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch
from peft import get_peft_model

from kit.cost import usd_per_million
from kit.lake import Counts, Lake, Manifest
from kit.params import BenchmarkTraining, FinetuneSft
from kit.train import models
from kit.train.flops import measured_peak, model_flops, naive_6n
from kit.train.methods import METHODS, adapter_config, base_quantization


def benchmark_training(p: BenchmarkTraining, lake: Lake) -> Manifest:
    """Commit two tables: `runs` (measured: 60 and 70 of this lake) and `model_flops` (by method, exact).

    MFU = model FLOPs / seconds / peak; HFU adds what ran beside them (padding, logits computed twice). The
    peak is a matmul measured here and now, in the type that ran, so a figure says how near training comes to
    what this machine can do; it holds only if 60 and 70 ran on this machine too. Starting and loading are
    outside the seconds; warm-up steps are inside.
    """
    threads = models.set_threads(p.threads)
    with lake.stage(p) as out:
        made = [out.read("60_finetune_sft"), out.read("70_align_dpo")]
        peaks = {
            kind: measured_peak(p.peak_matmul, getattr(torch, kind))
            for kind in sorted({_ran_in(m) for m in made})
        }
        table = flops_by_method(p, made[0].params["lora_r"])
        naive = table[0]["naive_6n_flops_per_token"]
        runs = [run_row(m, peaks[_ran_in(m)], naive, p.usd_per_hour) for m in made]
        out.table("runs", pa.Table.from_pylist(runs), measured=True)
        out.table("model_flops", pa.Table.from_pylist(table))
        metrics = {"peak_flops_per_s": peaks, "threads": threads, "peak_edge": p.peak_matmul, "runs": runs}
        return out.commit(Counts(records_in=len(made), records_out=len(runs)), metrics)


def _ran_in(manifest: Manifest) -> str:
    """The type that the matmuls ran in."""
    return manifest.metrics["what_ran"]["computes_in"]


def run_row(manifest: Manifest, peak: float, naive_per_token: float, usd_per_hour: float) -> dict[str, Any]:
    """One run as one row. Rates in tokens (padding excluded), rows or pairs, and FLOPs per second."""
    m = manifest.metrics
    seconds, tokens = m["train_seconds"], m["tokens"]
    return {
        "stage": manifest.stage,
        "method": " + ".join(
            manifest.params[k] for k in ("preference_loss", "method") if k in manifest.params
        ),
        "steps": len(m["losses"]),
        "tokens": tokens,
        "padding_share": 1 - tokens / m["padded_tokens"],
        "seconds": seconds,
        "tokens_per_s": m["tokens_per_s"],
        "samples_per_s": m["samples_per_s"],
        "flops_per_token": m["flops_per_token"],
        "peak_flops_per_s": peak,
        "mfu": m["flops"] / seconds / peak,
        "hfu": m["hardware_flops"] / seconds / peak,
        "naive_6n_mfu": naive_per_token * tokens / seconds / peak,
        "peak_memory_mb": m["peak_rss_mb"],
        "usd_per_million_tokens": usd_per_million(seconds, tokens, usd_per_hour),
        "dtype": _ran_in(manifest),
        "threads": m["what_ran"]["threads"],
        "convention": m["flops_convention"],
    }


def flops_by_method(p: BenchmarkTraining, lora_r: int) -> list[dict[str, Any]]:
    """FLOPs per token of `p.base_model` in rows of `p.max_tokens`, for every method that 60 knows.

    `method_to_full` is what a method saves by itself; `naive_to_true` how much a 6N formula overstates it.
    """
    rows = []
    for method in METHODS:
        tuning = FinetuneSft(base_model=p.base_model, method=method, lora_r=lora_r)
        model = models.load_model(p.base_model, dtype=p.dtype, quantization=base_quantization(tuning))
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
        models.release()
    full = next(r["flops_per_token"] for r in rows if r["method"] == "full")
    return [{**row, "method_to_full": row["flops_per_token"] / full} for row in rows]
