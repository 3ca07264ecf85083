"""80: speed, memory, MFU and price of the runs just made and of a grid of others; FLOPs of every method beside 6N.

A grid to quote, on the whole model: kit run params/demo.yaml --only 80 -p grid_layers=0 -p grid_warmup=3 -p grid_steps=6
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pyarrow as pa
import torch
import yaml
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from kit import process
from kit.errors import ParamError
from kit.estimate.rates import usd_per_million
from kit.lake.code import code_identity, environment
from kit.lake.manifest import Counts, Manifest
from kit.lake.store import Lake
from kit.measure.training.compare_methods import encoded, gpu_name, in_own_process
from kit.params import BenchmarkTraining, FinetuneSft, did_you_mean
from kit.progress import progress
from kit.train.loop.meter import PARTS
from kit.train.models import load
from kit.train.models.describe import with_layers
from kit.train.models.methods import METHODS, adapter_config, base_quantization
from kit.train.plan import settings
from kit.train.plan.flops import measured_peak, model_flops, naive_6n
from kit.train.tune.sft import fit_rows

Row = dict[str, Any]
STOCK = {"packing": False, "activation_checkpointing": True}
"""The kit's parameters where TRL's defaults differ; the rest of `settings.STOCK` has none, or agrees."""
SAME = {"compile_model": "compile"}  # what kit.train.plan.settings calls a parameter of 60 otherwise
SWITCHES = {*settings.STOCK, *SAME}
"""What changes how fast a cell trains, not what: such cells stand in the table `gains`."""
MOVED = ("weights", "trained", "gradients", "optimizer", "activations")
"""Parts of the plan's memory that a step must read and write."""
TEXT = ("cell", "error", "method", "weights", "computes_in", "attention", "optimizer", "packing")
VERSIONS = ("machine", "torch", "transformers", "trl", "peft", "commit", "convention")
NUMBERS = ("row_tokens", "batch", "layers", "steps", "padding_share", "last_loss", "tokens_per_s", "spread",
           "samples_per_s", "mfu", "hfu", "naive_6n_mfu", "peak_flops_per_s", "peak_memory_mb", "joules_per_token",
           "usd_per_million_tokens", "flops_per_token", "flops_per_s", "hardware_flops_per_s", "naive_flops_per_s",
           "flops_per_byte", "seconds_a_step", *(f"{part}_s" for part in (*PARTS, "idle")))  # fmt: skip
TYPES = ((pa.string(), (*TEXT, *VERSIONS)), (pa.bool_(), ("checkpointing", "compiled")),
         (pa.float64(), NUMBERS))  # fmt: skip
GRID = pa.schema([(name, kind) for kind, names in TYPES for name in names])
GAINS = pa.schema([("without", pa.string()), ("changed", pa.string()), ("speed", pa.float64()),
                   ("memory", pa.float64()), ("loss_kit", pa.float64()), ("loss_without", pa.float64())])  # fmt: skip


def benchmark_training(p: BenchmarkTraining, lake: Lake) -> Manifest:
    """Commit `runs` (60 and 70 of this lake), `grid` and `gains` (all measured), `model_flops` (by method, exact).

    MFU = model FLOPs / seconds / peak; HFU adds what ran beside them (padding, logits computed twice). The peak is a
    matmul's in the type that ran, the best seen here or in the runs, which must be of this machine. Outside the seconds:
    starting, loading, the warm-up of `grid` (that of `runs` is inside). A cell that fails is a row with its error.
    Raises `ParamError` for a grid that names no parameter.
    """
    threads, wanted = load.set_threads(p.threads), cells(p.grid)
    with lake.stage(p) as out:
        made = [out.read("60_finetune_sft"), out.read("70_align_dpo")]
        rows = run_cells(p, lake, made[0], wanted)
        errors = [r["error"] for r in rows if r["error"]]
        ran = {_ran_in(m) for m in made} | {r["computes_in"] for r in rows if not r["error"]}
        peaks = {kind: measured_peak(p.peak_matmul, getattr(torch, kind)) for kind in sorted(ran)}
        for m in made:  # while they ran the machine may have been less busy than now
            peaks[_ran_in(m)] = max(peaks[_ran_in(m)], m.metrics["peak_flops_per_s"])
        rows = [r if r["error"] else rated(r, peaks[r["computes_in"]], p.usd_per_hour) for r in rows]
        table = flops_by_method(p, made[0].params["lora_r"])
        naive = table[0]["naive_6n_flops_per_token"]
        runs = [run_row(m, peaks[_ran_in(m)], naive, p.usd_per_hour) for m in made]
        out.rows("runs", runs, measured=True)
        out.rows("grid", rows, GRID, measured=True)
        out.rows("gains", gains(rows, wanted), GAINS, measured=True)
        out.rows("model_flops", table)
        metrics = {"peak_flops_per_s": peaks, "threads": threads, "peak_edge": p.peak_matmul, "runs": runs}
        failed, n = {error: errors.count(error) for error in errors}, len(made) + len(rows)
        counts = Counts(records_in=n, records_out=n - len(errors), failed=failed)
        return out.commit(counts, metrics | {"bytes_per_s": measured_bandwidth()})


@dataclass(frozen=True)
class Cell:
    """One run of the grid: 60's parameters and `kit.train.plan.settings`'s settings that it changes."""

    name: str
    params: dict[str, Any]
    changes: dict[str, Any]


def cells(grid: Sequence[str]) -> list[Cell]:
    """The cells that these items name, alternatives (`a|b`) multiplied out; raises `ParamError`."""
    items = [[[f"{n}{eq}{v}" for v in values.split("|")] if eq else [n] for n, eq, values in
              (word.partition("=") for word in item.split())] for item in grid]  # fmt: skip
    made = [_cell(words) for item in items for words in itertools.product(*item)]
    return list({cell.name: cell for cell in made}.values())


def _cell(words: Sequence[str]) -> Cell:
    params, changes = (dict(STOCK), dict(settings.STOCK)) if "stock" in words else ({}, {})
    for word in (w for w in words if w not in ("kit", "stock")):
        name, is_set, value = word.partition("=")
        if is_set and name in FinetuneSft.model_fields:
            params[name] = value
            changes.pop(SAME.get(name, name), None)
        elif is_set and name in settings.STOCK:
            changes[name] = yaml.safe_load(value)
        else:
            near = did_you_mean(name, [*FinetuneSft.model_fields, *settings.STOCK, "kit", "stock"])
            raise ParamError(f"parameter 'grid': '{word}' names no parameter of 60{near}")
    FinetuneSft(**params)  # a value that cannot be is found before anything runs
    return Cell(" ".join(w for w in words if w != "kit") or "kit", params, changes)


def run_cells(p: BenchmarkTraining, lake: Lake, tuned: Manifest, wanted: Sequence[Cell]) -> list[Row]:
    """Every cell as a row, each out of a process of its own; all start from what 60 was told."""
    told = {k: v for k, v in {**tuned.params, **p.model_dump()}.items() if k in FinetuneSft.model_fields}
    told |= {"sft_batch_size": p.grid_batch_size, "sft_steps": p.grid_warmup + p.grid_steps}
    told |= {"eval_rows": 1, "checkpoint_steps": 0}
    about = {"layers": p.grid_layers, "machine": machine_name(), "commit": code_identity(p.stage)["git_sha"]}
    about |= {k: v for k, v in environment().items() if k in VERSIONS and k != "machine"}
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        if p.grid_layers and wanted:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kit-grid-"))
            told["base_model"] = write_cut_model(p, Path(folder))
        bar = stack.enter_context(progress(len(wanted), "grid", "cells"))
        for cell in wanted:
            tuning = FinetuneSft(**{**told, **cell.params})
            row = in_own_process(cell_row, tuning, cell.changes, lake.uri, p.grid_warmup)
            rows.append({"cell": cell.name, **about, **row})
            bar.update()
            bar.note(f"{cell.name}: {row['error'] or format(row['tokens_per_s'], ',.0f') + ' tokens/s'}")
    return rows


def write_cut_model(p: BenchmarkTraining, folder: Path) -> str:
    """Write `p.base_model` with its first `grid_layers` layers alone: as wide, with the same words, only shallower."""
    config = load.open_pretrained(AutoConfig, p.base_model, p.trust_remote_code)
    config = with_layers(config, range(min(p.grid_layers, config.get_text_config().num_hidden_layers)))
    told = {"trust_remote_code": p.trust_remote_code, "config": config, "dtype": "auto"}
    load.open_pretrained(AutoModelForCausalLM, p.base_model, **told).save_pretrained(folder)
    load.load_tokenizer(p.base_model, trust_remote_code=p.trust_remote_code).save_pretrained(folder)
    return str(folder)


def cell_row(p: FinetuneSft, changes: Mapping[str, Any], lake_uri: str, warmup: int) -> dict[str, Any]:
    """One cell, trained and measured; rates are medians of the steps past `warmup`, `spread` their IQR / median.

    `flops_per_byte`: model FLOPs over the least that a step must move: weights read forward and backward, activations,
    gradients and optimizer state written once and read once (sizes from `kit.train.plan`).
    """
    with tempfile.TemporaryDirectory(prefix="kit-cell-") as temp, contextlib.redirect_stdout(io.StringIO()):
        fitted = fit_rows(p, *encoded(p, lake_uri), Path(temp), {**changes, "synchronise": True})
    m, trainer = fitted.metrics, fitted.metrics["trainer"]
    steps, ran, made = trainer.meter[warmup:], m["what_ran"], trainer.model.recipe
    rates = [s["tokens"] / s["seconds"] for s in steps]
    seconds, watts = median(s["seconds"] for s in steps), [s["watts"] for s in steps if "watts" in s]
    moved = 2e6 * sum(m["memory_parts_mb"].get(k, 0) for k in MOVED)
    return {
        "error": "",
        "method": p.method,
        **{k: made[k] for k in ("weights", "optimizer")},
        **{k: ran[k] for k in ("computes_in", "attention", "checkpointing", "compiled", "batch")},
        "packing": re.split("[,:]", ran["packing"])[0],
        "row_tokens": p.max_tokens,
        "steps": len(steps),
        **{k: m[k] for k in ("padding_share", "flops_per_token")},
        "convention": m["flops_convention"],
        "last_loss": m["losses"][-1],
        "tokens_per_s": median(rates),
        "spread": spread(rates),
        "samples_per_s": fitted.rows_a_step / seconds,
        "peak_memory_mb": m["peak_rss_mb"],
        "joules_per_token": median(watts) / median(rates) if watts else None,
        "flops_per_s": median(s["flops"] / s["seconds"] for s in steps),
        "hardware_flops_per_s": median(s["hardware_flops"] / s["seconds"] for s in steps),
        "naive_flops_per_s": naive_6n(fitted.model) * median(rates),
        "flops_per_byte": median(s["flops"] for s in steps) / moved,
        "seconds_a_step": seconds,
        **{f"{part}_s": median(s.get(f"{part}_seconds", 0.0) for s in steps) for part in (*PARTS, "idle")},
    }


def spread(values: Sequence[float]) -> float:
    """Interquartile range over the median; 0 for fewer than two values."""
    low, middle, high = quantiles(values, method="inclusive") if len(values) > 1 else (1.0, 1.0, 1.0)
    return (high - low) / middle


def rated(row: Mapping[str, Any], peak: float, usd_per_hour: float) -> dict[str, Any]:
    """A cell's row with its utilisations and its price."""
    shares = {"mfu": "flops_per_s", "hfu": "hardware_flops_per_s", "naive_6n_mfu": "naive_flops_per_s"}
    price = usd_per_million(1.0, row["tokens_per_s"], usd_per_hour)
    more = {"peak_flops_per_s": peak, "usd_per_million_tokens": price}
    return {**row, **more, **{name: row[rate] / peak for name, rate in shares.items()}}


def gains(rows: Sequence[Mapping[str, Any]], wanted: Sequence[Cell]) -> list[dict[str, Any]]:
    """The kit's way over every cell that trains the same only otherwise: ratios of tokens/s and of memory; last losses."""
    found, made = {r["cell"]: r for r in rows if not r["error"]}, []
    for cell in wanted:
        changed = set(cell.params) | set(cell.changes)
        if cell.name != "kit" and {"kit", cell.name} <= set(found) and changed <= SWITCHES:
            kit, other = found["kit"], found[cell.name]
            row = {n: kit[k] / other[k] for n, k in (("speed", "tokens_per_s"), ("memory", "peak_memory_mb"))}
            row |= {"loss_kit": kit["last_loss"], "loss_without": other["last_loss"]}
            words = "all of them" if cell.name == "stock" else ", ".join(sorted(changed))
            made.append({"without": cell.name, "changed": words, **row})
    return made


def machine_name() -> str:
    """The GPU of this machine, or its processor and the threads in use."""
    cpu = f"{process.processor()}, {torch.get_num_threads()} threads"
    return gpu_name() if torch.cuda.is_available() else cpu


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
    m, told = manifest.metrics, manifest.params
    seconds, tokens = m["train_seconds"], m["tokens"]
    return {
        "stage": manifest.stage,
        "method": " + ".join(told[k] for k in ("preference_loss", "method") if k in told),
        "steps": len(m["losses"]),
        "padding_share": 1 - tokens / m["padded_tokens"],
        "seconds": seconds,
        **{k: m[k] for k in ("tokens", "tokens_per_s", "samples_per_s", "flops_per_token")},
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
