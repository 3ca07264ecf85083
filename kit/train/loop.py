"""What every trainer of the kit shares: settings, the meter, live progress, checkpoints, and what really ran."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
import trl.trainer.utils
from peft import PeftModel
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from kit import ROOT, process, show
from kit.lake import Lake, StageWriter, code_identity
from kit.params import Training
from kit.train import fast, models
from kit.train.encode import packed_lengths
from kit.train.flops import ModelFlops, measured_peak, model_flops, peak_of
from kit.train.models import ModelError

LOG = "log.jsonl"
WHOLE = "whole"
"""An empty file in a checkpoint that was written to its end."""


def recipe(p: Training) -> dict[str, Any]:
    """What `fast.settings` makes of the parameters; raises `ModelError` for a kernel that is not installed."""
    steps = (getattr(p, name) for name in type(p).model_fields if name.endswith("_steps"))
    given = {"attention", "optimizer", "compile_model", "packing", "activation_checkpointing"}
    try:
        return fast.settings(
            full=getattr(p, "method", "full") == "full",
            bf16=models.pick_dtype(p.dtype) == torch.bfloat16,
            steps=next(steps, 0),
            **{"packing": False} | {k: v for k, v in p.model_dump().items() if k in given},
        )
    except ValueError as error:
        raise ModelError(str(error)) from None


def common(
    p: Training,
    model: torch.nn.Module,
    folder: Path,
    checkpoint_steps: int = 0,
    made: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Settings of every TRL trainer of the kit, from `made` (see `recipe`), which the model is given to keep."""
    model.recipe = made = made or recipe(p)
    set_attention(model, made["attention"])
    return {
        "output_dir": str(folder),
        "seed": p.seed,
        "max_length": p.max_tokens,
        "lr_scheduler_type": "cosine",
        "use_cpu": model.device.type == "cpu",
        "gradient_accumulation_steps": getattr(p, "gradient_accumulation", 1),
        **fast.arguments(made),
        "save_strategy": "steps" if checkpoint_steps else "no",
        "save_steps": checkpoint_steps or 500,
        "save_total_limit": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the default shows the mean so far instead of a NaN
        "report_to": "none",
        "disable_tqdm": True,
    }


def set_attention(model: torch.nn.Module, kernel: str) -> None:
    """Give a model another attention kernel; raises `ModelError` where it has none of the kind."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if inner.config._attn_implementation == kernel:
        return
    try:
        inner.set_attn_implementation(kernel)
    except (ValueError, ImportError) as error:
        raise ModelError(f"attention={kernel}: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def work_folder(lake: Lake, out: StageWriter, keep: bool) -> Iterator[Path]:
    """Where a run keeps its checkpoints and log while it trains.

    With `keep`, a folder named after the work (parameters, inputs, code) beside the stage, or under `.cache` for a
    lake that is no folder: a killed run finds it again, another run does not. It goes when the run succeeds.
    """
    with tempfile.TemporaryDirectory(prefix="kit-train-") as temp:
        if not keep:
            yield Path(temp)
            return
        content = [(i.uri, i.content_sha256) for i in out.inputs]
        code = code_identity(out.p.stage)["source_sha256"]
        key = hashlib.sha256(json.dumps([out.p.identity(), content, code]).encode()).hexdigest()[:12]
        base = Path(lake.root) if lake.uri == lake.root else ROOT / ".cache" / "work"
        folder = base / "models" / out.p.run / "_work" / f"{out.p.stage}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        for old in folder.parent.glob(f"{out.p.stage}-*"):  # of other parameters or code, too
            shutil.rmtree(old)


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
        counted = metered(self.counted, *batch_sizes(inputs), self.args.activation_checkpointing)
        self.pass_began = self.clock()
        loss = super().training_step(model, inputs, *args)
        if not torch.isfinite(loss):
            raise ModelError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the learning rate"
            )
        self.pass_began = self.spent("backward_seconds", self.pass_began)
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
        models.save_adapter(self.model, Path(output_dir or self.args.output_dir), "")


MASKS = {"attention_mask", "chosen_attention_mask", "rejected_attention_mask"}


def batch_sizes(inputs: dict[str, Any]) -> tuple[list[int], int]:
    """Lengths in tokens of a batch's texts, padded or packed, and its positions with padding; a pair is two texts."""
    if "position_ids" in inputs:
        lengths, positions = packed_lengths(inputs["position_ids"]), inputs["input_ids"].numel()
    else:
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

    def __init__(self, trainer: Any, bar: show.Progress, peak: float) -> None:
        self.trainer, self.bar, self.peak = trainer, bar, peak
        self.log = Path(trainer.args.output_dir) / LOG
        self.seen = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()
        self.bar.update(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are clipped and weights updated."""
        self.trainer.spent("optimizer_seconds", self.trainer.pass_began)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
    ) -> None:
        """Close the step: count, show, and append it to the log on disk."""
        if not logs or "loss" not in logs:
            return
        now = time.perf_counter()
        step = self.trainer.step_now
        step["seconds"], self.began = now - self.began, now
        for part in PARTS:  # a trainer with a loss of its own does not say when its forward pass ends
            step.setdefault(f"{part}_seconds", 0.0)
        step["idle_seconds"] = step["seconds"] - sum(step[f"{part}_seconds"] for part in PARTS)
        step["mfu"] = step["flops"] / step["seconds"] / self.peak
        step["memory_mb"] = round(memory_mb(), 1)
        with contextlib.suppress(
            ImportError, RuntimeError
        ):  # no driver that tells, or not its Python package
            step |= {"watts": torch.cuda.power_draw() / 1000} if torch.cuda.is_available() else {}
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
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


def memory_mb() -> float:
    """Memory in use now: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return process.resident_bytes() / 2**20


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint in `folder` that was written to its end."""
    whole = [f.parent for f in folder.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda f: int(f.name.rpartition("-")[2]), default=None)


def resume_meter(folder: Path, step: int) -> list[dict[str, Any]]:
    """What the log on disk says of the steps up to `step`; later ones, which are not in the checkpoint, go."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
    kept = [e for e in map(json.loads, lines) if e["step"] <= step]
    path.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
    return [{k: e[k] for k in METER} for e in kept]


PARTS = ("data", "forward", "backward", "optimizer")
"""Where a step's seconds go; the rest is idle (logging, checkpoints, the libraries' own bookkeeping)."""
SUMMED = ("tokens", "padded_tokens", "squares", "rows", "flops", "forward_flops", "hardware_flops")
METER = (*SUMMED, "seconds", "mfu", "memory_mb", "idle_seconds", *(f"{part}_seconds" for part in PARTS))


def run(trainer: Any, label: str) -> dict[str, Any]:
    """Train, from the last whole checkpoint in the trainer's folder where there is one.

    Returns losses, tokens, seconds, tokens/s, peak memory, FLOPs per token and what really ran; of a run that
    was killed and went on, all steps. Raises `ModelError` when a loss is not finite or the disk is full: the last
    whole checkpoint stays.
    """
    folder = Path(trainer.args.output_dir)
    last = last_checkpoint(folder)
    done = int(last.name.rpartition("-")[2]) if last else 0
    trainer.step_now, trainer.meter = {}, resume_meter(folder, done)
    trainer.counted, peak_rate = model_flops(trainer.model), machine_peak(ran_in(trainer))
    if done:
        print(f"{label}: goes on after step {done} of {trainer.args.max_steps}, from {last.name}")
    made = getattr(trainer.model, "recipe", None) or fast.STOCK
    with (
        quiet(made["loss_tile"]),
        fast.prepared(trainer.model, made),
        show.progress(trainer.args.max_steps, label, "steps") as bar,
        peak_memory() as peak,
    ):
        trainer.add_callback(Live(trainer, bar, peak_rate))
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not no_space(error):
                raise
            kept = last_checkpoint(folder)
            raise ModelError(
                f"the disk is full, while saving step {trainer.state.global_step}; "
                + (
                    f"{kept.name} is whole: make room and run again"
                    if kept
                    else "no checkpoint was whole yet"
                )
            ) from None
    total = {key: sum(m[key] for m in trainer.meter) for key in SUMMED}
    seconds = sum(m["seconds"] for m in trainer.meter)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        **total,
        "padding_share": round(1 - total["tokens"] / total["padded_tokens"], 4),
        "train_seconds": round(seconds, 3),
        "seconds_a_step": {
            part: round(sum(m[f"{part}_seconds"] for m in trainer.meter) / len(trainer.meter), 4)
            for part in (*PARTS, "idle")
        },
        "tokens_per_s": round(total["tokens"] / seconds, 2),
        "peak_rss_mb": peak["mb"],
        "flops_per_token": total["flops"] / total["tokens"],
        "flops_convention": trainer.counted.convention,
        "mfu": round(total["flops"] / seconds / peak_rate, 4),
        "peak_flops_per_s": peak_rate,
        "datasheet_flops_per_s": datasheet_peak(ran_in(trainer)),
        "resumed_at": done,
        "trainable": models.describe(trainer.model)["trainable"],
        "what_ran": what_ran(trainer),
    }


def no_space(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that the disk is full."""
    chain = [error, error.__cause__, error.__context__]
    full = {errno.ENOSPC, errno.EDQUOT}
    return any(getattr(e, "errno", None) in full or "No space left" in str(e) for e in chain if e)


@functools.cache
def machine_peak(dtype: str) -> float:
    """FLOP/s of a matmul in `dtype` here and now; half a second, once a process."""
    return measured_peak(1024 if not torch.cuda.is_available() else 8192, getattr(torch, dtype), seconds=0.5)


def ran_in(trainer: Any) -> str:
    """The type that the matmuls compute in: autocast's where it is on."""
    return "bfloat16" if trainer.args.bf16 else models.computes_in(trainer.model)


def datasheet_peak(dtype: str) -> float | None:
    """What the GPU's data sheet says it computes in `dtype`, dense; None for a CPU and a GPU that is not in the table."""
    return peak_of(torch.cuda.get_device_name(), dtype) if torch.cuda.is_available() else None


def what_ran(trainer: Any) -> dict[str, Any]:
    """What a person would otherwise have to believe."""
    return {
        **models.describe(trainer.model),
        "computes_in": ran_in(trainer),
        "optimizer": optimizer_name(getattr(trainer.optimizer, "optimizer", trainer.optimizer)),
        "trainer": next(c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")),
        "autocast": "bfloat16" if trainer.args.bf16 else "none",
        "checkpointing": bool(trainer.args.activation_checkpointing),
        "compiled": bool(getattr(trainer.model, "recipe", fast.STOCK)["compile"]),
        "batch": trainer.args.per_device_train_batch_size,
        "gradient_accumulation": trainer.args.gradient_accumulation_steps,
        "processes": trainer.args.world_size,
        "parallelism": "none" if trainer.args.world_size == 1 else str(trainer.accelerator.distributed_type),
    }


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Its class, and where bitsandbytes keeps its state in fewer bits, in how many."""
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)
    return type(optimizer).__name__ + (f" {bits}bit" if bits != 32 else "")


def steps_table(trainer: Any) -> pa.Table:
    """The log: one row a step, with whatever numbers TRL logged and the meter counted."""
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
def quiet(loss_tile: int = 0) -> Iterator[None]:
    """Keep the libraries' bars and prints out of notebooks; set the tile of TRL's loss, in vocabulary entries."""
    from transformers import trainer as hf_trainer

    tile, shown = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, hf_trainer.PrinterCallback.on_log
    datasets.disable_progress_bars()
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = loss_tile or (
        tile if torch.cuda.is_available() else fast.CPU_TILE
    )
    hf_trainer.PrinterCallback.on_log = lambda *args, **kwargs: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = tile
        hf_trainer.PrinterCallback.on_log = shown


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
    try:
        with process.watching(look, every_s):
            yield peak
    finally:
        if torch.cuda.is_available():
            peak["mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
