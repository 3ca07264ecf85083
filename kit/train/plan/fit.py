"""What a training run will need, before it starts: memory, time, and the nearest plan that fits.

Memory by its parts from the counts of `kit.train.plan.dry` (their sizes: Korthikanti et al. 2022 for activations and
recomputation, with SDPA no term in T²; Dettmers et al. 2023 for NF4). Time: FLOPs at the share of the machine's peak that
such runs reach, and the bytes that are moved beside them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from kit.errors import ModelError
from kit.params import CompareGenerations, Training, Tuning
from kit.train.plan import settings
from kit.train.plan.dry import look
from kit.train.plan.machine import MB, Machine
from kit.train.plan.setup import Setup, dtype_on, resolve_setup

STORED = {"int8": 1.0, "nf4": 0.5 + 4 / 64, "nf4_double": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes a weight of a quantised linear layer: NF4 has a float32 scale for 64 weights, double quantisation 8 bits."""
OPTIMIZER = {"adamw": 8.0, "adamw_8bit": 2.0 + 2 * 4 / 256}
"""Bytes a trained weight of AdamW's two states; in 8 bits with a float32 scale for 256."""
PROCESS = 600 * MB
"""A process with torch, transformers and TRL before it loads a model (measured: 602 MB)."""
EFFICIENCY = {"gpu": 0.4, torch.bfloat16: 0.45, torch.float32: 0.65}
"""Share of the peak in use. CPU: measured here with SmolLM2. GPU: not by us; Llama-3-8B on H100 with NeMo and torchtitan."""
BESIDE = {"nf4": 5.0, "nf4_double": 5.0, "int8": 3.0, "dora": 24.0}
"""Bytes moved a frozen weight and pass: matrices dequantised twice; DoRA's norms of its corrected columns."""
PASS_S = 0.02
"""What the trainer does around a forward and backward pass (measured on a model of 0.2M parameters)."""


@dataclass(frozen=True)
class Plan:
    """Peak memory (MB) and seconds of a run, and what the memory is made of."""

    memory_mb: float
    seconds: float
    parts: dict[str, float]

    def line(self) -> str:
        """One line for a notebook."""
        # parts that would show as 0.0 are left out
        parts = ", ".join(f"{name} {mb / 1024:.1f}" for name, mb in self.parts.items() if mb > 51)
        return f"estimate: {self.memory_mb / 1024:.1f} GB ({parts}), {self.seconds:.0f} s"

    def compared(self, ran: dict[str, Any]) -> dict[str, float]:
        """The estimate beside what was measured, and its relative errors."""
        return {
            "memory_mb": round(self.memory_mb, 1),
            "seconds": round(self.seconds, 2),
            "memory_error": round(self.memory_mb / ran["peak_rss_mb"] - 1, 3),
            "seconds_error": round(self.seconds / ran["train_seconds"] - 1, 3),
        }


def plan_training(setup: Setup, rows_tokens: Sequence[int] = ()) -> Plan:
    """Memory at its peak and seconds of a training on texts of these lengths (none given: all as long as they may be).

    Not covered: attention without SDPA, models whose layers differ, several GPUs. Raises `ModelError`.
    """
    fit, virtual = setup.fit, setup.seen.virtual
    lengths = [min(n, fit.tokens) + virtual for n in rows_tokens] or [fit.tokens + virtual]
    parts = {name: float(size) / MB for name, size in _memory(setup, max(lengths)).items()}
    seconds = fit.steps * fit.accumulation * _pass_seconds(setup, lengths)
    return Plan(sum(parts.values()), seconds, parts)


def _memory(setup: Setup, longest: int) -> dict[str, float]:
    """Bytes at the peak by what they hold, where every text of a pass is `longest` tokens."""
    seen, fit, gpu = setup.seen, setup.fit, setup.machine.gpu
    kept = setup.weights.itemsize
    saved = _activations(setup, fit.pass_texts * longest)
    # what is trained is kept in float32, and so are its gradients
    gradients = seen.trained * 4
    update = gradients * (gpu and setup.optimizer == "adamw")
    # gradients of weights take the room that activations leave, unless they wait for more passes
    saved = max(saved - gradients * (fit.accumulation == 1), update)
    # perplexity: logits of four rows, and in float32 twice more; a CPU's process keeps that room, in pieces
    scored = 4 * longest * seen.vocab * (kept + 8)
    scored = max(0.0, scored - saved - gradients) if gpu else scored
    weights = seen.linear * STORED.get(setup.quantization, kept) + seen.other * kept
    trained = 0 if setup.full else seen.trained * 4
    optimizer = seen.trained * OPTIMIZER[setup.optimizer]
    parts = {
        "weights": weights,
        "trained": trained,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": saved,
        "evaluation": scored,
        "process": 0 if gpu else PROCESS,
    }
    if setup.full and fit.reference:
        parts["reference"] = weights  # a frozen copy; an adapter is switched off instead
    if fit.judged:
        # of the same base and the same kind; its trainer is held, with its state, until both are saved
        parts["reward model"] = weights + trained + optimizer
    return parts


def _activations(setup: Setup, tokens: int) -> float:
    """Bytes that a forward pass over `tokens` keeps for the backward pass, and what that needs for a moment."""
    seen, width = setup.seen, setup.dtype.itemsize
    saved = seen.saved + seen.saved_token * tokens
    if setup.activation_checkpointing:  # what enters each layer, and one layer whole
        inputs = seen.layers * seen.hidden * width * tokens
        saved = inputs + seen.layer_saved + seen.layer_saved_token * tokens
    tile = min(tokens, 4096) * min(seen.vocab, settings.loss_tile(setup.machine.gpu)) * (4 + width)
    dequantised = seen.largest * width * (setup.quantization != "none")
    # a tile of the loss, its gradient, those on their way through a layer, a matrix that is dequantised whole
    return saved + (tile + tokens * (4 * seen.hidden + 3 * seen.widest * width) + dequantised)


def _pass_seconds(setup: Setup, lengths: Sequence[int]) -> float:
    """Seconds of a forward and backward pass over texts drawn from those of these lengths, padded to the longest."""
    seen, fit, machine = setup.seen, setup.fit, setup.machine
    longest = _longest(lengths, fit.pass_texts, setup.seed)
    padded = fit.pass_texts * fmean(longest)
    whole, forward = (
        fit.pass_texts * fmean(seen.flops.total([n - seen.virtual], forward_only=only) for n in longest)
        for only in (False, True)
    )
    again = setup.activation_checkpointing
    # the loss computes its logits twice; checkpointing, a reference and a reward model add forward passes
    flops = whole + 2 * seen.flops.head * padded + (again + fit.reference + fit.judged) * forward
    moved = seen.linear * (BESIDE.get(setup.quantization, 0) + BESIDE.get(setup.method, 0)) * (1 + again / 2)
    moved += seen.trained * (20 + OPTIMIZER[setup.optimizer]) / fit.accumulation
    # a text that the step writes itself reads all weights for each new token
    moved += fit.written * (seen.linear + seen.other) * setup.weights.itemsize
    reached = machine.flops_per_s * EFFICIENCY["gpu" if machine.gpu else setup.dtype]
    return flops / reached + moved / machine.gb_per_s / 1e9 + PASS_S


def _longest(lengths: Sequence[int], rows: int, seed: int) -> list[int]:
    """The longest row in a batch of `rows`, to which all are padded, in 200 draws."""
    # with the run's seed, so that an estimate can be repeated
    draw = random.Random(seed)
    return [max(draw.choices(lengths, k=rows)) for _ in range(200)]


def nearest_fit(setup: Setup, rows_tokens: Sequence[int] = ()) -> tuple[dict[str, Any], Plan] | None:
    """The cheapest changes of parameters with which a training fits, and its plan then; None when nothing does."""
    p, fit = setup.given, setup.fit

    def fits(changes: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Plan] | None:
        values = {name: value for change in changes for name, value in change.items()}
        changed = p.model_copy(update=values)
        same = next(other for other in changed.fits() if other.name == fit.name)
        plan = plan_training(resolve_setup(changed, same, setup.machine), rows_tokens)
        new = {name: value for name, value in values.items() if value != getattr(p, name)}
        return (new, plan) if plan.memory_mb <= setup.machine.memory_mb else None

    low_rank = setup.method in ("full", "dora", "lora", "qlora")
    lengths = [fit.tokens >> n for n in range(1, 5)]
    # in this order: what costs time, what costs a little exactness, what changes the result
    changes: list[dict[str, Any]] = [
        {"activation_checkpointing": setup.method != "prefix"},  # PEFT refuses it for prefixes
        {fit.batch_field: 1, "gradient_accumulation": fit.step_rows},
        {"optimizer": "adamw_8bit"},
        {"method": "lora" if setup.method in ("full", "dora") else setup.method},
        {"method": "qlora", "quantization": "auto"} if low_rank else {"quantization": "nf4_double"},
        *({fit.tokens_field: tokens} for tokens in lengths if tokens >= 32),
    ]
    n = next((n for n in range(1, len(changes) + 1) if fits(changes[:n])), None)
    if n is None:
        return None
    taken = changes[:n]
    # the last change made it fit; each of those before it may not be needed, and is then left as the person had it
    for change in taken[-2::-1]:
        less = [c for c in taken if c is not change]
        taken = less if fits(less) else taken
    return fits(taken)


def require_fit(setup: Setup, *, rows_tokens: Sequence[int]) -> Plan:
    """The plan of a run; raises `ModelError` with the nearest one that fits when its machine is too small."""
    plan = plan_training(setup, rows_tokens)
    if plan.memory_mb > setup.machine.memory_mb:
        raise ModelError(too_large(setup, plan, rows_tokens))
    return plan


def too_large(setup: Setup, plan: Plan, rows_tokens: Sequence[int] = ()) -> str:
    """One line: what is needed, what there is, and which parameters to change."""
    instead = "no way to tune it fits, take a smaller base_model"
    fitting = nearest_fit(setup, rows_tokens)
    if fitting:
        changes, smaller = fitting
        words = " ".join(f"{name}={str(value).lower()}" for name, value in changes.items())
        instead = f"{words} needs {smaller.memory_mb / 1024:.1f} GB"
    machine = setup.machine
    return (
        f"{setup.base_model} with method={setup.method} needs {plan.memory_mb / 1024:.1f} GB and {machine.name} has "
        f"{machine.memory_mb / 1024:.1f} GB free: {instead}"
    )


def foresee(p: Training, machine: Machine) -> tuple[Plan | None, str]:
    """The plan of a stage of the chain before its rows are known, each taken as long as it may be; why it does not fit.

    None for a stage whose size has nothing to do with the model's.
    """
    if isinstance(p, Tuning):
        setups = [resolve_setup(p, fit, machine) for fit in p.fits()]
        plans = [plan_training(setup) for setup in setups]
        setup, largest = max(zip(setups, plans), key=lambda pair: pair[1].memory_mb)
        plan = replace(largest, seconds=sum(each.seconds for each in plans))  # one after the other
        return plan, too_large(setup, largest) if largest.memory_mb > machine.memory_mb else ""
    if not isinstance(p, CompareGenerations):
        return None, ""
    dtype = dtype_on(machine, p.dtype)
    seen = look(p.base_model, p.trust_remote_code, "lora", 1, 1, dtype, False)
    weights = (seen.linear + seen.other) * dtype.itemsize
    # adapters are merged in float32, on the CPU; every new token reads all weights once; base, tuned, aligned
    parts = {
        "weights": weights / MB * (1 if machine.gpu else 4 / dtype.itemsize),
        "process": 0 if machine.gpu else PROCESS / MB,
    }
    seconds = 3 * len(p.prompts) * p.max_new_tokens * weights / machine.gb_per_s / 1e9
    plan = Plan(sum(parts.values()), seconds, parts)
    return plan, "" if plan.memory_mb <= machine.memory_mb else f"needs {plan.memory_mb / 1024:.1f} GB"
