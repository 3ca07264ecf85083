"""61: every way to tune a model, on the same rows with the same budget; what each costs and what it buys.

Each is trained in a process of its own, so that its peak memory is its own. `kit.maintain.refresh methods` keeps the table of a
run as a reference run that ships with the kit.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from kit.errors import KitError, ModelError, ParamError
from kit.estimate import reference
from kit.estimate.rates import usd
from kit.lake.manifest import Counts, Manifest
from kit.lake.store import Lake
from kit.params import ComparePeft, FinetuneSft, did_you_mean
from kit.progress import progress
from kit.train.encode.encode import Rows, prepare
from kit.train.models import load
from kit.train.models.methods import METHODS
from kit.train.tune.sft import fit_rows

EXTRAS: dict[str, dict[str, Any]] = {
    "full, float32": {"method": "full", "dtype": "float32"},
    "lora, float32": {"method": "lora", "dtype": "float32"},
    "lora, half batch twice": {"method": "lora", "gradient_accumulation": 2},
    "lora, checkpointing": {"method": "lora", "activation_checkpointing": True},
}
"""Beside the methods: what mixed precision, gradient accumulation and activation checkpointing buy."""

CLAIMS: tuple[tuple[str, str, str, str, str, bool], ...] = (
    ("LoRA over full, samples/s", "1.71×", "lora", "full", "samples_per_s", False),
    ("LoRA over full, cost", "0.5×", "lora", "full", "usd", False),
    ("LoRA trains, share of full's parameters", "0.0009×", "lora", "full", "trainable", False),
    ("QLoRA needs less memory than LoRA: weights", "−75 %", "qlora", "lora", "weights_mb", True),
    ("QLoRA needs less memory than full: peak", "−75 %", "qlora", "full", "peak_memory_mb", True),
    ("mixed precision over float32, LoRA", "3×", "lora", "lora, float32", "samples_per_s", False),
    ("mixed precision over float32, full", "3×", "full", "full, float32", "samples_per_s", False),
    ("accumulation: peak memory", "", "lora, half batch twice", "lora", "peak_memory_mb", True),
    ("accumulation: samples/s", "", "lora, half batch twice", "lora", "samples_per_s", False),
    ("checkpointing: peak memory", "", "lora, checkpointing", "lora", "peak_memory_mb", True),
    ("checkpointing: samples/s", "", "lora, checkpointing", "lora", "samples_per_s", False),
)
"""What the reference systems claim (AWS on Trainium; QLoRA "up to 75 % less", mixed precision "up to 3×"), which two
rows of ours it compares, in which column, and whether as a saving."""


def compare_methods(p: ComparePeft, lake: Lake) -> Manifest:
    """Commit the table `methods`, one row a way to tune (see `method_row`), and `claims`, the references' ratios beside ours.

    A way that fails (too large for this machine, not possible with this model) is a row with its error, and counts as
    failed. Raises `ParamError` for a method that does not exist and `ModelError` when every one fails.
    """
    for name in p.methods:
        if name not in METHODS:
            raise ParamError(f"parameter 'methods': no method '{name}'{did_you_mean(name, METHODS)}")
    ways = {name: {"method": name} for name in p.methods}
    ways |= {name: way for name, way in EXTRAS.items() if way["method"] in p.methods}
    with lake.stage(p) as out:
        out.read("50_build_datasets")
        rows = []
        with progress(len(ways), "compare", "methods") as bar:
            for name, way in ways.items():
                rows.append(
                    {"name": name} | in_own_process(method_row, tuning(p, way), lake.uri, p.usd_per_hour)
                )
                bar.update()
                bar.note(
                    f"{name}: {rows[-1]['error'] or format(rows[-1]['samples_per_s'], '.2f') + ' samples/s'}"
                )
        errors = [r["error"] for r in rows if r["error"]]
        if len(errors) == len(rows):
            raise ModelError(f"no method ran; the first said: {errors[0]}")
        out.rows("methods", rows, measured=True)
        out.rows("claims", claims(rows), measured=True)
        exact = ("name", "trainable", "heldout_before", "heldout_after")
        out.rows("losses", [{k: r.get(k) for k in exact} for r in rows])
        failed = {error: errors.count(error) for error in errors}
        counts = Counts(records_in=len(rows), records_out=len(rows) - len(errors), failed=failed)
        return out.commit(counts, {"rows": rows, "claims": claims(rows)})


def tuning(p: ComparePeft, way: Mapping[str, Any]) -> FinetuneSft:
    """60's parameters for one way; all see the same rows in the same order."""
    shared = {k: v for k, v in p.model_dump().items() if k in FinetuneSft.model_fields}
    batch = p.compare_batch_size // way.get("gradient_accumulation", 1)
    shared |= {
        "sft_steps": p.compare_steps,
        "sft_batch_size": max(1, batch),
        "packing": p.compare_packing,
        "eval_rows": p.compare_eval_rows,
    }
    return FinetuneSft(**{**shared, **way})


def in_own_process(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The row that `work` makes, out of a process forked from a server that has imported the libraries once.

    What goes wrong there (too little memory, not possible with this model or machine) is the row's `error`, one line.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kit.train.tune.sft"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        try:
            return pool.submit(_safely, work, *args).result()
        except BrokenProcessPool:
            return {"error": "killed, most likely for want of memory"}


def _safely(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    try:
        return work(*args)
    except KitError as error:
        return {"error": str(error)}
    except (
        RuntimeError,
        ValueError,
        MemoryError,
        ImportError,
    ) as error:  # torch's want of memory is a RuntimeError
        first_line = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {first_line}"[:200]}


def encoded(p: FinetuneSft, lake_uri: str) -> tuple[Any, Rows, Rows]:
    """Tokenizer, training rows and `p.eval_rows` held-out rows of 50; raises `ModelError` where there are none."""
    lake = Lake(lake_uri)
    data = lake.need(p.run, "50_build_datasets")
    tokenizer = load.load_tokenizer(p.base_model, trust_remote_code=p.trust_remote_code)
    train = prepare(lake.table(data, "train").to_pylist(), tokenizer, p.max_tokens, p.task)
    held = prepare(lake.table(data, "heldout").to_pylist()[: p.eval_rows], tokenizer, p.max_tokens, p.task)
    train.require("train"), held.require("heldout")
    return tokenizer, train, held


def method_row(p: FinetuneSft, lake_uri: str, usd_per_hour: float) -> dict[str, Any]:
    """One way, trained and measured.

    `samples_per_s`, `tokens_per_s` (padding excluded), `peak_memory_mb` (of the process, GPU: allocated), `weights_mb`,
    `minutes`, `usd`, `mfu`, `hfu`; `heldout_before` and `heldout_after` are losses in nats a token; `trainable` and
    `parameters` are counts; what ran in words.
    """
    with tempfile.TemporaryDirectory(prefix="kit-compare-") as temp:
        metrics = fit_rows(p, *encoded(p, lake_uri), Path(temp)).metrics
    ran = metrics["what_ran"]
    return {
        "error": "",
        "method": p.method,
        "trainable": metrics["trainable"],
        "parameters": ran["parameters"],
        "samples_per_s": metrics["samples_per_s"],
        "tokens_per_s": metrics["tokens_per_s"],
        "peak_memory_mb": metrics["peak_rss_mb"],
        "weights_mb": ran["weights_mb"],
        "minutes": metrics["train_seconds"] / 60,
        "usd": usd(metrics["train_seconds"], usd_per_hour),
        "heldout_before": metrics["heldout_before"],
        "heldout_after": metrics["heldout_after"],
        "mfu": metrics["mfu"],
        "hfu": metrics["hardware_flops"] / metrics["train_seconds"] / metrics["peak_flops_per_s"],
        "base": ran["base"],
        "computes_in": ran["computes_in"],
        "device": ran["device"],
        "steps": len(metrics["losses"]),
    }


def claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the references claim beside what this table says; a row that did not run says so."""
    rows_by_name = {r["name"]: r for r in rows if not r["error"]}
    claim_rows = []
    for what, claimed, ours, base, column, saving in CLAIMS:
        measured = "not measured"
        if ours in rows_by_name and base in rows_by_name and rows_by_name[base][column]:
            ratio = rows_by_name[ours][column] / rows_by_name[base][column]
            measured = f"{ratio - 1:+.0%}".replace("-", "−") if saving else f"{ratio:.3g}×"
        claim_rows.append({"claim": what, "reference": claimed, "here": measured})
    return claim_rows


GPU_CASES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("LoRA, Llama 8B", {"method": "lora"}, "12,473 tokens/s, MFU 40.6 % (NeMo AutoModel, one H100)"),
    ("QLoRA, Llama 8B", {"method": "qlora"}, "7.4 GiB with short rows (torchtune, RTX 4090)"),
)


def gpu_name() -> str:
    """The GPU of this machine, in words."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def gpu_rows() -> list[dict[str, Any]]:
    """The cases that want a GPU: measured in a reference run that ships, or the command that measures them."""
    recorded = reference.read("gpu_methods") if reference.recorded("gpu_methods") else {"rows": []}
    rows = []
    for name, way, published in GPU_CASES:
        row = {r["name"]: r for r in recorded["rows"]}.get(way["method"])
        words = "not measured: no GPU was at hand"
        if row:
            words = (
                f"{row['tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.1%}, {row['peak_memory_mb']:,.0f} MB"
            )
        rows.append({"case": name, "published": published, "here": words, "command": GPU_COMMAND})
    return rows


GPU_COMMAND = (
    "python -m kit.train.plan.dry Llama-3-8B random-8b && kit run params/demo.yaml --until 50 && "
    "kit run params/demo.yaml --only 61 -p base_model=random-8b -p methods=lora,qlora -p compare_packing=true "
    "-p max_tokens=4096 -p compare_steps=20 && python -m kit.maintain.refresh methods demo gpu_methods"
)
