"""The meter of a training: what each step computes, when and in how much memory, shown live and kept in a log."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from kit import process, show
from kit.errors import ModelError
from kit.progress import Progress
from kit.train.encode.batches import packed_lengths
from kit.train.models import adapters
from kit.train.plan.flops import ModelFlops

LOG = "log.jsonl"
"""In a run's folder: a line a step."""
WHOLE = "whole"
"""An empty file in a checkpoint that was written to its end."""
PARTS = ("data", "forward", "backward", "optimizer")
"""Where a step's seconds go; the rest is idle (logging, checkpoints, the libraries' own bookkeeping)."""
SUMMED = ("tokens", "padded_tokens", "squares", "rows", "flops", "forward_flops", "hardware_flops")
METER = (*SUMMED, "seconds", "mfu", "memory_mb", "idle_seconds", *(f"{part}_seconds" for part in PARTS))


class Metered:
    """Mixin for TRL trainers: counts what a step really computes and when, gives the first one a learning rate."""

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        """The batches of a step, timed."""
        began = self.clock()
        batches = super().get_batch_samples(*args)
        self.spent("data_seconds", began)
        return batches

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass, timed; what a trainer does before it (generation, say) makes its data."""
        # GRPO and RLOO write their completions between the start of the step and this call
        self.spent("data_seconds", self.pass_began)
        began = self.clock()
        loss = super().compute_loss(*args, **kwargs)
        self.pass_began = self.spent("forward_seconds", began)
        return loss

    def clock(self) -> float:
        """Now. A GPU is waited for only where a recipe says `synchronise`; else forward is the time to start it."""
        if getattr(self.model, "recipe", {}).get("synchronise") and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def spent(self, what: str, since: float) -> float:
        """Add the seconds since then to the step's; returns now."""
        now = self.clock()
        self.step_now[what] = self.step_now.get(what, 0.0) + now - since
        return now

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """One forward and backward pass, metered: its texts and tokens, real ones and padded ones, its FLOPs."""
        # counted before the pass, which may take things out of `inputs`
        counted = metered(self.counted, *batch_sizes(inputs), self.args.activation_checkpointing)
        self.pass_began = self.clock()
        loss = super().training_step(model, inputs, *args)
        # the optimizer has not stepped yet: the last checkpoint and the weights are still good
        if not torch.isfinite(loss):
            raise ModelError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the learning rate"
            )
        self.pass_began = self.spent("backward_seconds", self.pass_began)
        # with accumulation a step is several passes: add them up
        for key, value in counted.items():
            self.step_now[key] = self.step_now.get(key, 0) + value
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Linear warm-up over a tenth of the steps, then half a cosine down to zero.

        transformers' own warm-up begins with a rate of zero; a run of a dozen steps cannot spare one.
        """
        warm = max(1, round(num_training_steps / 10))

        def rate(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, num_training_steps - warm)))

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint's weights as the kit saves them: safetensors, no pickled settings, no call to the hub."""
        adapters.save_adapter(self.model, Path(output_dir or self.args.output_dir), "")


MASKS = {"attention_mask", "chosen_attention_mask", "rejected_attention_mask"}


def batch_sizes(inputs: dict[str, Any]) -> tuple[list[int], int]:
    """Lengths in tokens of a batch's texts, padded or packed, and its positions with padding; a pair is two texts."""
    # only packed rows bring positions: they begin at 0 again where a document begins
    if "position_ids" in inputs:
        lengths, positions = packed_lengths(inputs["position_ids"]), inputs["input_ids"].numel()
    else:
        # a preference batch holds chosen and rejected texts under masks of their own
        masks = [v for k, v in inputs.items() if k in MASKS]
        lengths = torch.cat([mask.sum(dim=1) for mask in masks])
        positions = sum(mask.numel() for mask in masks)
    return lengths.long().tolist(), positions


def metered(flops: ModelFlops, lengths: list[int], positions: int, recomputed: bool) -> dict[str, float]:
    """One batch in the meter's words: what it holds, its model FLOPs (all, forward), and what the hardware did."""
    # TRL's chunked loss computes the logits a second time
    again = 2 * flops.head * (positions + flops.virtual * len(lengths))
    return {
        "tokens": sum(lengths),
        "padded_tokens": positions,
        "squares": sum(n * n for n in lengths),
        "rows": len(lengths),
        "flops": flops.total(lengths),
        "forward_flops": flops.total(lengths, forward_only=True),
        "hardware_flops": flops.hardware(lengths, positions, recomputed) + again,
    }


class Live(TrainerCallback):
    """Shows each step, keeps its log, and says which checkpoints are whole."""

    def __init__(self, trainer: Any, bar: Progress, peak: float, planned_seconds: float = 0.0) -> None:
        self.trainer, self.bar, self.peak, self.planned_seconds = trainer, bar, peak, planned_seconds
        self.log = Path(trainer.args.output_dir) / LOG
        self.seen = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock: loading, planning and steps of a killed run are no part of the time left."""
        self.began = time.perf_counter()
        still_to_do = 1 - state.global_step / args.max_steps
        self.bar.begin(state.global_step, self.planned_seconds * still_to_do)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are clipped and weights updated."""
        self.trainer.spent("optimizer_seconds", self.trainer.pass_began)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
    ) -> None:
        """Close the step: count, show, and append it to the log on disk."""
        # the last log of a run holds totals and no step's loss
        if not logs or "loss" not in logs:
            return

        # the step ends where the next begins, so that all steps add up to the wall clock
        now = time.perf_counter()
        step = self.trainer.step_now
        step["seconds"], self.began = now - self.began, now
        for part in PARTS:  # a trainer with a loss of its own does not say when its forward pass ends
            step.setdefault(f"{part}_seconds", 0.0)
        step["idle_seconds"] = step["seconds"] - sum(step[f"{part}_seconds"] for part in PARTS)
        step["mfu"] = step["flops"] / step["seconds"] / self.peak
        step["memory_mb"] = round(memory_mb(), 1)
        # not every driver tells its power, and its Python package (nvidia-ml-py) may be missing
        with contextlib.suppress(ImportError, RuntimeError):
            step |= {"watts": torch.cuda.power_draw() / 1000} if torch.cuda.is_available() else {}

        # the log on disk goes before the next step: a run killed now can be metered as a whole later
        self.trainer.meter.append(dict(step))
        step.clear()
        entry = {"step": state.global_step, **logs, **self.trainer.meter[-1]}
        with self.log.open("a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
        self.seen.append(logs["loss"])
        self.bar.update()
        self.bar.note(
            f"loss {logs['loss']:.3f} {show.spark(self.seen)} · {entry['tokens'] / entry['seconds']:,.0f} tokens/s"
            f" · MFU {entry['mfu']:.0%} · {entry['memory_mb'] / 1024:.1f} GB"
            + (f" · margin {logs['rewards/margins']:.3f}" if "rewards/margins" in logs else "")
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is written."""
        # the trainer calls this after its last file: a checkpoint without the mark was cut off by a kill or a full disk
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


def memory_mb() -> float:
    """Memory in use now: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return process.resident_bytes() / 2**20


def resume_meter(folder: Path, step: int) -> list[dict[str, Any]]:
    """What the log on disk says of the steps up to `step`; later ones, which are not in the checkpoint, go."""
    path = folder / LOG
    # step 0 begins anew: what another try left there is no part of this run
    lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
    kept = [e for e in map(json.loads, lines) if e["step"] <= step]
    path.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
    return [{k: e[k] for k in METER} for e in kept]


def steps_table(trainer: Any) -> pa.Table:
    """The log: one row a step, with whatever numbers TRL logged and the meter counted."""
    # the trainer's own history comes back with a checkpoint, as the meter does: both have every step
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    rows = [
        {
            "step": entry["step"],
            **{k: float(v) for k, v in entry.items() if k not in ("step", "epoch")},
            **meter,
        }
        for entry, meter in zip(logs, trainer.meter, strict=True)
    ]
    return pa.Table.from_pylist(rows)


@contextlib.contextmanager
def peak_memory(every_s: float = 0.05) -> Iterator[dict[str, float]]:
    """Peak resident memory of this process in MB while the block runs, by looking every `every_s` seconds.

    A process's own high-water mark would also count what ran before. On a GPU, its allocated peak instead.
    """
    peak = {"mb": 0.0}

    def look() -> None:
        peak["mb"] = max(peak["mb"], round(process.resident_bytes() / 2**20, 1))

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    look()  # a block shorter than the first wait has a peak, too
    try:
        with process.watching(look, every_s):
            yield peak
    finally:
        if torch.cuda.is_available():
            peak["mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
