"""80's grid: other ways to train beside the kit's, each measured in a process of its own, and what each switch gains."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pyarrow as pa
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from kit import process
from kit.errors import ParamError
from kit.estimate.rates import usd_per_million
from kit.lake.code import code_identity, environment
from kit.lake.manifest import Manifest
from kit.lake.store import Lake
from kit.measure.training.compare_methods import encoded, gpu_name, in_own_process
from kit.params import BenchmarkTraining, FinetuneSft, did_you_mean
from kit.progress import progress
from kit.train.loop.meter import PARTS
from kit.train.models import load
from kit.train.models.describe import with_layers
from kit.train.plan import settings
from kit.train.plan.flops import naive_6n
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
FLAGS = ("checkpointing", "compiled")
SIZES = ("row_tokens", "batch", "layers", "steps", "padding_share", "last_loss")
SPEEDS = ("tokens_per_s", "spread", "samples_per_s", "mfu", "hfu", "naive_6n_mfu", "peak_flops_per_s")
COSTS = ("peak_memory_mb", "joules_per_token", "usd_per_million_tokens")
FLOPS = ("flops_per_token", "flops_per_s", "hardware_flops_per_s", "naive_flops_per_s", "flops_per_byte")
SECONDS = ("seconds_a_step", *(f"{part}_s" for part in (*PARTS, "idle")))
GRID = pa.schema(
    [
        *((name, pa.string()) for name in (*TEXT, *VERSIONS)),
        *((name, pa.bool_()) for name in FLAGS),
        *((name, pa.float64()) for name in (*SIZES, *SPEEDS, *COSTS, *FLOPS, *SECONDS)),
    ]
)
GAINS = pa.schema(
    [
        *((name, pa.string()) for name in ("without", "changed")),
        *((name, pa.float64()) for name in ("speed", "memory", "loss_kit", "loss_without")),
    ]
)


@dataclass(frozen=True)
class Cell:
    """One run of the grid: 60's parameters and `kit.train.plan.settings`'s settings that it changes."""

    name: str
    params: dict[str, Any]
    changes: dict[str, Any]


def cells(grid: Sequence[str]) -> list[Cell]:
    """The cells that these items name, alternatives (`a|b`) multiplied out; raises `ParamError`."""
    cells_named = [
        _cell(words) for item in grid for words in itertools.product(*map(_alternatives, item.split()))
    ]
    return list({cell.name: cell for cell in cells_named}.values())


def _alternatives(word: str) -> list[str]:
    """`name=a|b` as `name=a` and `name=b`; any other word as it is."""
    name, is_set, values = word.partition("=")
    return [f"{name}={value}" for value in values.split("|")] if is_set else [name]


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
    shared_params = {
        k: v for k, v in {**tuned.params, **p.model_dump()}.items() if k in FinetuneSft.model_fields
    }
    shared_params |= {"sft_batch_size": p.grid_batch_size, "sft_steps": p.grid_warmup + p.grid_steps}
    shared_params |= {"eval_rows": 1, "checkpoint_steps": 0}
    about = {"layers": p.grid_layers, "machine": machine_name(), "commit": code_identity(p.stage)["git_sha"]}
    about |= {k: v for k, v in environment().items() if k in VERSIONS and k != "machine"}
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        if p.grid_layers and wanted:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kit-grid-"))
            shared_params["base_model"] = write_cut_model(p, Path(folder))
        bar = stack.enter_context(progress(len(wanted), "grid", "cells"))
        for cell in wanted:
            tuning = FinetuneSft(**{**shared_params, **cell.params})
            row = in_own_process(cell_row, tuning, cell.changes, lake.uri, p.grid_warmup)
            rows.append({"cell": cell.name, **about, **row})
            bar.update()
            bar.note(f"{cell.name}: {row['error'] or format(row['tokens_per_s'], ',.0f') + ' tokens/s'}")
    return rows


def write_cut_model(p: BenchmarkTraining, folder: Path) -> str:
    """Write `p.base_model` with its first `grid_layers` layers alone: as wide, with the same words, only shallower."""
    config = load.open_pretrained(AutoConfig, p.base_model, p.trust_remote_code)
    config = with_layers(config, range(min(p.grid_layers, config.get_text_config().num_hidden_layers)))
    options = {"trust_remote_code": p.trust_remote_code, "config": config, "dtype": "auto"}
    load.open_pretrained(AutoModelForCausalLM, p.base_model, **options).save_pretrained(folder)
    load.load_tokenizer(p.base_model, trust_remote_code=p.trust_remote_code).save_pretrained(folder)
    return str(folder)


def cell_row(p: FinetuneSft, changes: Mapping[str, Any], lake_uri: str, warmup: int) -> dict[str, Any]:
    """One cell, trained and measured; rates are medians of the steps past `warmup`, `spread` their IQR / median.

    `flops_per_byte`: model FLOPs over the least that a step must move: weights read forward and backward, activations,
    gradients and optimizer state written once and read once (sizes from `kit.train.plan`).
    """
    with tempfile.TemporaryDirectory(prefix="kit-cell-") as temp, contextlib.redirect_stdout(io.StringIO()):
        fitted = fit_rows(p, *encoded(p, lake_uri), Path(temp), {**changes, "synchronise": True})
    metrics, trainer = fitted.metrics, fitted.metrics["trainer"]
    steps, ran, recipe = trainer.meter[warmup:], metrics["what_ran"], trainer.model.recipe
    rates = [s["tokens"] / s["seconds"] for s in steps]
    seconds, watts = median(s["seconds"] for s in steps), [s["watts"] for s in steps if "watts" in s]
    moved = 2e6 * sum(metrics["memory_parts_mb"].get(k, 0) for k in MOVED)
    return {
        "error": "",
        "method": p.method,
        **{k: recipe[k] for k in ("weights", "optimizer")},
        **{k: ran[k] for k in ("computes_in", "attention", "checkpointing", "compiled", "batch")},
        "packing": re.split("[,:]", ran["packing"])[0],
        "row_tokens": p.max_tokens,
        "steps": len(steps),
        **{k: metrics[k] for k in ("padding_share", "flops_per_token")},
        "convention": metrics["flops_convention"],
        "last_loss": metrics["losses"][-1],
        "tokens_per_s": median(rates),
        "spread": spread(rates),
        "samples_per_s": fitted.rows_a_step / seconds,
        "peak_memory_mb": metrics["peak_rss_mb"],
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
    rows_by_cell, gain_rows = {r["cell"]: r for r in rows if not r["error"]}, []
    for cell in wanted:
        changed = set(cell.params) | set(cell.changes)
        if cell.name != "kit" and {"kit", cell.name} <= set(rows_by_cell) and changed <= SWITCHES:
            kit, other = rows_by_cell["kit"], rows_by_cell[cell.name]
            row = {n: kit[k] / other[k] for n, k in (("speed", "tokens_per_s"), ("memory", "peak_memory_mb"))}
            row |= {"loss_kit": kit["last_loss"], "loss_without": other["last_loss"]}
            words = "all of them" if cell.name == "stock" else ", ".join(sorted(changed))
            gain_rows.append({"without": cell.name, "changed": words, **row})
    return gain_rows


def machine_name() -> str:
    """The GPU of this machine, or its processor and the threads in use."""
    cpu = f"{process.processor()}, {torch.get_num_threads()} threads"
    return gpu_name() if torch.cuda.is_available() else cpu
