"""What a training run will need, before it starts: memory, time, and the nearest plan that fits.

Memory by its parts from the counts of `kit.train.dry` (their sizes: Korthikanti et al. 2022 for activations and
recomputation, with SDPA no term in T²; Dettmers et al. 2023 for NF4). Time: FLOPs at the share of the machine's peak that
such runs reach, and the bytes that are moved beside them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from kit import process
from kit.params import CompareGenerations, Training, Tuning
from kit.params.train import PASS_TOKENS
from kit.train import fast, loop, models
from kit.train.dry import look
from kit.train.flops import peak_of
from kit.train.methods import base_quantization
from kit.train.models import ModelError

MB = 2**20
STORED = {"int8": 1.0, "nf4": 0.5 + 4 / 64, "nf4_double": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes a weight of a quantised linear layer: NF4 has a float32 scale for 64 weights, double quantisation 8 bits."""
OPTIMIZER = {"adamw": 8.0, "adamw_8bit": 2.0 + 2 * 4 / 256}
"""Bytes a trained weight of AdamW's two states; in 8 bits with a float32 scale for 256."""


@dataclass(frozen=True)
class Machine:
    """Where a run would be: free memory (MB), FLOP/s of a large matmul in the type it computes in, read speed (GB/s)."""

    name: str
    memory_mb: float
    flops_per_s: float
    gb_per_s: float
    gpu: bool = True


LOSS_TILE = 32_768
"""Vocabulary entries of a tile of TRL's chunked loss on a GPU."""
PROCESS = 600 * MB
"""A process with torch, transformers and TRL before it loads a model (measured: 602 MB)."""
EFFICIENCY = {"gpu": 0.4, torch.bfloat16: 0.45, torch.float32: 0.65}
"""Share of the peak in use. CPU: measured here with SmolLM2. GPU: not by us; Llama-3-8B on H100 with NeMo and torchtitan."""
BESIDE = {"nf4": 5.0, "nf4_double": 5.0, "int8": 3.0, "dora": 24.0}
"""Bytes moved a frozen weight and pass: matrices dequantised twice; DoRA's norms of its corrected columns."""
CPU_GB_PER_S = 10.0
PASS_S = 0.02
"""What the trainer does around a forward and backward pass (measured on a model of 0.2M parameters)."""
GPUS = {
    "h200": Machine("H200", 143_771, peak_of("NVIDIA H200"), 4800),
    "h100": Machine("H100 SXM", 81_559, peak_of("NVIDIA H100 80GB HBM3"), 3350),
    "a100": Machine("A100 80 GB", 81_920, peak_of("NVIDIA A100-SXM4-80GB"), 2039),
    "l40s": Machine("L40S", 46_068, peak_of("NVIDIA L40S"), 864),
    "rtx4090": Machine("RTX 4090", 24_564, peak_of("NVIDIA GeForce RTX 4090"), 1008),
}
"""NVIDIA's data sheets: memory as the driver shows it, dense bfloat16 (`flops.PEAKS`), and the memory's speed."""


@dataclass(frozen=True)
class Plan:
    """Peak memory (MB) and seconds of a run, and what the memory is made of."""

    memory_mb: float
    seconds: float
    parts: dict[str, float]

    def line(self) -> str:
        """One line for a notebook."""
        made = ", ".join(f"{name} {mb / 1024:.1f}" for name, mb in self.parts.items() if mb > 51)
        return f"estimate: {self.memory_mb / 1024:.1f} GB ({made}), {self.seconds:.0f} s"

    def compared(self, ran: dict[str, Any]) -> dict[str, float]:
        """The estimate beside what was measured, and its relative errors."""
        return {
            "memory_mb": round(self.memory_mb, 1),
            "seconds": round(self.seconds, 2),
            "memory_error": round(self.memory_mb / ran["peak_rss_mb"] - 1, 3),
            "seconds_error": round(self.seconds / ran["train_seconds"] - 1, 3),
        }


def this_machine(p: Training) -> Machine:
    """The GPU where there is one, else the CPU; memory that is free now, or already this process's own."""
    peak = loop.machine_peak(str(models.pick_dtype(p.dtype)).removeprefix("torch."))
    if torch.cuda.is_available():
        free, name = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return Machine(name, free / MB, peak, GPUS["a100"].gb_per_s)
    memory = process.free_bytes() + process.resident_bytes()
    return Machine("this machine", memory / MB, peak, CPU_GB_PER_S, gpu=False)


def size(p: Tuning) -> tuple[str, int, int, int]:
    """The parameter that sets the batch, its rows, texts of a row (a pair has two), and optimizer steps."""
    batch = next(name for name in type(p).model_fields if name.endswith("_batch_size"))
    steps = next(name for name in type(p).model_fields if name.endswith("_steps"))
    rows = getattr(p, batch) or max(1, PASS_TOKENS // p.max_tokens)
    return batch, rows, 1 + batch.startswith(("dpo", "reward")), getattr(p, steps)


def plan(
    p: Tuning, machine: Machine, rows_tokens: Sequence[int] = (), quantization: str | None = None
) -> Plan:
    """Memory at its peak and seconds of training `p` on rows of these lengths (none given: all of `max_tokens`).

    Not covered: attention without SDPA, models whose layers differ, several GPUs. Raises `ModelError`.
    """
    kind = quantization or base_quantization(p)
    full, dtype = p.method == "full", _dtype(p, machine)
    mixed, width = full and dtype == torch.bfloat16, dtype.itemsize
    kept = torch.float32 if full else dtype
    seen = look(p.base_model, p.trust_remote_code, p.method, p.lora_r, p.virtual_tokens, kept, mixed)
    _, rows, texts, steps = size(p)
    lengths = [min(n, p.max_tokens) + seen.virtual for n in rows_tokens] or [p.max_tokens + seen.virtual]
    tokens, again = rows * texts * max(lengths), p.activation_checkpointing
    saved = seen.saved + seen.saved_token * tokens
    if again:  # what enters each layer, and one layer whole
        inputs = seen.layers * seen.hidden * width * tokens
        saved = inputs + seen.layer_saved + seen.layer_saved_token * tokens
    tile = min(tokens, 4096) * min(seen.vocab, LOSS_TILE if machine.gpu else fast.CPU_TILE) * (4 + width)
    # a tile of the loss, its gradient, those on their way through a layer, a matrix that is dequantised whole
    saved += (
        tile + tokens * (4 * seen.hidden + 3 * seen.widest * width) + seen.largest * width * (kind != "none")
    )
    gradients, update = seen.trained * 4, seen.trained * 4 * (machine.gpu and p.optimizer == "adamw")
    # gradients of weights take the room that activations leave, unless they wait for more passes
    saved = max(saved - gradients * (p.gradient_accumulation == 1), update)
    # perplexity: logits of four rows, and in float32 twice more; a CPU's process keeps that room, in pieces
    scored = 4 * max(lengths) * seen.vocab * (kept.itemsize + 8)
    scored = max(0.0, scored - saved - gradients) if machine.gpu else scored
    parts = {
        "weights": seen.linear * STORED.get(kind, kept.itemsize) + seen.other * kept.itemsize,
        "trained": 0 if full else seen.trained * 4,
        "gradients": gradients,
        "optimizer": seen.trained * OPTIMIZER[p.optimizer],
        "activations": saved,
        "evaluation": scored,
        "process": 0 if machine.gpu else PROCESS,
    }
    if full and getattr(p, "preference_loss", "orpo") != "orpo":
        parts["reference"] = parts["weights"]  # a frozen copy; an adapter is switched off instead
    parts = {name: float(size) / MB for name, size in parts.items()}
    longest = _longest(lengths, rows * texts, p.seed)
    padded = rows * texts * fmean(longest)
    whole, forward = (
        rows * texts * fmean(seen.flops.total([n - seen.virtual], forward_only=only) for n in longest)
        for only in (False, True)
    )
    # the loss computes its logits twice; a DPO reference and checkpointing add forward passes
    flops = whole + 2 * seen.flops.head * padded + (again + texts - 1) * forward
    moved = seen.linear * (BESIDE.get(kind, 0) + BESIDE.get(p.method, 0)) * (1 + again / 2)
    moved += seen.trained * (20 + OPTIMIZER[p.optimizer]) / p.gradient_accumulation
    reached = machine.flops_per_s * EFFICIENCY["gpu" if machine.gpu else dtype]
    each = flops / reached + moved / machine.gb_per_s / 1e9 + PASS_S
    return Plan(sum(parts.values()), steps * p.gradient_accumulation * each, parts)


def _dtype(p: Training, machine: Machine) -> torch.dtype:
    return models.pick_dtype("bfloat16" if machine.gpu and p.dtype == "auto" else p.dtype)


def _longest(lengths: Sequence[int], rows: int, seed: int) -> list[int]:
    """The longest row in a batch of `rows`, to which all are padded, in 200 draws."""
    draw = random.Random(seed)
    return [max(draw.choices(lengths, k=rows)) for _ in range(200)]


def nearest(
    p: Tuning, machine: Machine, rows_tokens: Sequence[int] = ()
) -> tuple[dict[str, Any], Plan] | None:
    """The cheapest changes of parameters with which `p` fits, and its plan then; None when nothing does."""

    def fits(changes: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Plan] | None:
        values = {name: value for change in changes for name, value in change.items()}
        made = plan(p.model_copy(update=values), machine, rows_tokens)
        new = {name: value for name, value in values.items() if value != getattr(p, name)}
        return (new, made) if made.memory_mb <= machine.memory_mb else None

    batch, rows, _, _ = size(p)
    low_rank = p.method in ("full", "dora", "lora", "qlora")
    changes: list[dict[str, Any]] = [
        {"activation_checkpointing": p.method != "prefix"},  # PEFT refuses it for prefixes
        {batch: 1, "gradient_accumulation": p.gradient_accumulation * rows},
        {"optimizer": "adamw_8bit"},
        {"method": "lora" if p.method in ("full", "dora") else p.method},
        {"method": "qlora", "quantization": "auto"} if low_rank else {"quantization": "nf4_double"},
        *({"max_tokens": p.max_tokens >> n} for n in range(1, 5) if p.max_tokens >> n >= 32),
    ]
    n = next((n for n in range(1, len(changes) + 1) if fits(changes[:n])), None)
    if n is None:
        return None
    taken = changes[:n]
    for change in taken[-2::-1]:  # what turns out not to be needed is left as the person had it
        less = [c for c in taken if c is not change]
        taken = less if fits(less) else taken
    return fits(taken)


def require_fit(
    p: Tuning, *, rows_tokens: Sequence[int], quantization: str, machine: Machine | None = None
) -> Plan:
    """The plan of a run; raises `ModelError` with the nearest one that fits when this machine is too small."""
    machine = machine or this_machine(p)
    made = plan(p, machine, rows_tokens, quantization)
    if made.memory_mb > machine.memory_mb:
        raise ModelError(too_large(p, machine, made, rows_tokens))
    return made


def too_large(p: Tuning, machine: Machine, made: Plan, rows_tokens: Sequence[int] = ()) -> str:
    """One line: what is needed, what there is, and which parameters to change."""
    found, instead = nearest(p, machine, rows_tokens), "no way to tune it fits, take a smaller base_model"
    if found:
        words = " ".join(f"{name}={str(value).lower()}" for name, value in found[0].items())
        instead = f"{words} needs {found[1].memory_mb / 1024:.1f} GB"
    return (
        f"{p.base_model} with method={p.method} needs {made.memory_mb / 1024:.1f} GB and {machine.name} has "
        f"{machine.memory_mb / 1024:.1f} GB free: {instead}"
    )


def foresee(p: Training, machine: Machine) -> tuple[Plan | None, str]:
    """The plan of a stage of the chain before its rows are known, each taken as long as it may be; why it does not fit.

    None for a stage whose size has nothing to do with the model's.
    """
    if isinstance(p, Tuning):
        made = plan(p, machine)
        return made, too_large(p, machine, made) if made.memory_mb > machine.memory_mb else ""
    if not isinstance(p, CompareGenerations):
        return None, ""
    dtype = _dtype(p, machine)
    seen = look(p.base_model, p.trust_remote_code, "lora", 1, 1, dtype, False)
    weights = (seen.linear + seen.other) * dtype.itemsize
    # adapters are merged in float32, on the CPU; every new token reads all weights once; base, tuned, aligned
    parts = {
        "weights": weights / MB * (1 if machine.gpu else 4 / dtype.itemsize),
        "process": 0 if machine.gpu else PROCESS / MB,
    }
    seconds = 3 * len(p.prompts) * p.max_new_tokens * weights / machine.gb_per_s / 1e9
    made = Plan(sum(parts.values()), seconds, parts)
    return made, "" if made.memory_mb <= machine.memory_mb else f"needs {made.memory_mb / 1024:.1f} GB"
