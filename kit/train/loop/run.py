"""One training from its first step, or its last whole checkpoint, to what is told of it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import trl.trainer.utils
from safetensors import SafetensorError

from kit import ROOT
from kit.errors import ModelError
from kit.lake.code import code_identity
from kit.lake.files import no_space
from kit.lake.manifest import Work
from kit.lake.store import Lake, StageWriter
from kit.progress import progress
from kit.train.loop.meter import PARTS, SUMMED, WHOLE, Live, peak_memory, resume_meter
from kit.train.models.describe import computes_in, describe
from kit.train.plan import settings
from kit.train.plan.flops import model_flops
from kit.train.plan.machine import machine_peak
from kit.train.plan.peak import peak_of


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
        code = code_identity(out.p.stage)["source_sha256"]
        key = Work.of(out.p.identity(), out.inputs, code).key[:12]
        # transformers writes and reads checkpoints in a local folder only
        base = Path(lake.root) if lake.uri == lake.root else ROOT / ".cache" / "work"
        folder = base / "models" / out.p.run / "_work" / f"{out.p.stage}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        # after an error this line is not reached, so a killed run keeps its folder; those of other parameters or
        # code go, too: nothing will ask for them again once this stage is committed
        for old in folder.parent.glob(f"{out.p.stage}-*"):
            shutil.rmtree(old)


def run_training(trainer: Any, label: str, planned_seconds: float = 0.0) -> dict[str, Any]:
    """Train, from the last whole checkpoint in the trainer's folder where there is one.

    `planned_seconds` of the whole training are shown as the time left until a step is done. Returns losses, tokens, seconds, tokens/s, peak memory, FLOPs per token and what really ran; of a run that
    was killed and went on, all steps. Raises `ModelError` when a loss is not finite or the disk is full: the last
    whole checkpoint stays.
    """
    # where it goes on
    folder = Path(trainer.args.output_dir)
    last = last_checkpoint(folder)
    done = int(last.name.rpartition("-")[2]) if last else 0

    # what the meter needs: the log of the steps before, and FLOPs of the model as it stands now, adapters included
    trainer.step_now = {}
    trainer.meter = resume_meter(folder, done)
    trainer.counted = model_flops(trainer.model)
    # MFU compares with the peak of the type that really computes, which autocast may have changed
    peak_rate = machine_peak(ran_in(trainer))
    if done:
        print(f"{label}: goes on after step {done} of {trainer.args.max_steps}, from {last.name}")

    # a model from scratch has no recipe: TRL's own settings hold
    recipe = getattr(trainer.model, "recipe", None) or settings.STOCK
    with (
        quiet(recipe["loss_tile"]),
        settings.prepared(trainer.model, recipe),
        progress(trainer.args.max_steps, label, "steps") as bar,
        peak_memory() as peak,
    ):
        trainer.add_callback(Live(trainer, bar, peak_rate, planned_seconds))
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        # a full disk shows as any of the three, depending on who was writing (Python, safetensors, torch)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not no_space(error):
                raise
            raise disk_full(trainer.state.global_step, last_checkpoint(folder)) from None
    return meter_totals(trainer, peak_rate) | {
        "peak_rss_mb": peak["mb"],
        "resumed_at": done,
        "trainable": describe(trainer.model)["trainable"],
        "what_ran": what_ran(trainer),
    }


def disk_full(step: int, whole: Path | None) -> ModelError:
    """The error of a run that could not save `step`: which checkpoint it can go on from."""
    kept = f"{whole.name} is whole: make room and run again" if whole else "no checkpoint was whole yet"
    return ModelError(f"the disk is full, while saving step {step}; {kept}")


def meter_totals(trainer: Any, peak_rate: float) -> dict[str, Any]:
    """What the meter of a training adds up to, over all its steps; `peak_rate`: FLOP/s that the machine can reach."""
    total = {key: sum(step[key] for step in trainer.meter) for key in SUMMED}
    seconds = sum(step["seconds"] for step in trainer.meter)
    # rates are totals over totals, not means of rates: a short step must not count as much as a long one
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        **total,
        "padding_share": round(1 - total["tokens"] / total["padded_tokens"], 4),
        "train_seconds": round(seconds, 3),
        "seconds_a_step": {
            part: round(sum(step[f"{part}_seconds"] for step in trainer.meter) / len(trainer.meter), 4)
            for part in (*PARTS, "idle")
        },
        "tokens_per_s": round(total["tokens"] / seconds, 2),
        "flops_per_token": total["flops"] / total["tokens"],
        "flops_convention": trainer.counted.convention,
        "mfu": round(total["flops"] / seconds / peak_rate, 4),
        "peak_flops_per_s": peak_rate,
        "datasheet_flops_per_s": datasheet_peak(ran_in(trainer)),
    }


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint in `folder` that was written to its end."""
    whole = [f.parent for f in folder.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda f: int(f.name.rpartition("-")[2]), default=None)


def ran_in(trainer: Any) -> str:
    """The type that the matmuls compute in: autocast's where it is on."""
    return "bfloat16" if trainer.args.bf16 else computes_in(trainer.model)


def datasheet_peak(dtype: str) -> float | None:
    """What the GPU's data sheet says it computes in `dtype`, dense; None for a CPU and a GPU that is not in the table."""
    return peak_of(torch.cuda.get_device_name(), dtype) if torch.cuda.is_available() else None


def what_ran(trainer: Any) -> dict[str, Any]:
    """What a person would otherwise have to believe."""
    return {
        **describe(trainer.model),
        "computes_in": ran_in(trainer),
        "optimizer": optimizer_name(getattr(trainer.optimizer, "optimizer", trainer.optimizer)),
        "trainer": next(c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")),
        "autocast": "bfloat16" if trainer.args.bf16 else "none",
        "checkpointing": bool(trainer.args.activation_checkpointing),
        "compiled": bool(getattr(trainer.model, "recipe", settings.STOCK)["compile"]),
        "batch": trainer.args.per_device_train_batch_size,
        "gradient_accumulation": trainer.args.gradient_accumulation_steps,
        "processes": trainer.args.world_size,
        "parallelism": "none" if trainer.args.world_size == 1 else str(trainer.accelerator.distributed_type),
    }


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Its class, and where bitsandbytes keeps its state in fewer bits, in how many."""
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)
    return type(optimizer).__name__ + (f" {bits}bit" if bits != 32 else "")


@contextlib.contextmanager
def quiet(loss_tile: int = 0) -> Iterator[None]:
    """Keep the libraries' bars and prints out of notebooks; set the tile of TRL's loss, in vocabulary entries."""
    from transformers import trainer as hf_trainer

    # module-level settings of other libraries: put back at the end, as a notebook goes on using them
    tile = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    shown = hf_trainer.PrinterCallback.on_log
    datasets.disable_progress_bars()
    # TRL's tile suits a GPU's cache; a CPU is faster with another (see `settings.CPU_TILE`)
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = loss_tile or (
        tile if torch.cuda.is_available() else settings.CPU_TILE
    )
    # it would print a dictionary a step into the notebook, under the line that `Live` keeps up to date
    hf_trainer.PrinterCallback.on_log = lambda *args, **kwargs: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = tile
        hf_trainer.PrinterCallback.on_log = shown
