"""60: base → adapter. Supervised fine-tuning on prompt and completion rows, by TRL and PEFT.

The parts that preference alignment shares are here too: the meter, the trainer's settings, the log of steps.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow as pa
import torch
import trl.trainer.utils
from peft import LoraConfig, PeftConfig
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from kit import show
from kit.lake import Counts, Lake, Manifest
from kit.params import FinetuneSft, Training
from kit.train import models
from kit.train.flops import ModelFlops, model_flops
from kit.train.models import ModelError

METHODS: dict[str, dict[str, Any] | None] = {
    "lora": {},
    "dora": {"use_dora": True},
    "full": None,
}
"""What is trained: settings of PEFT's `LoraConfig`, or None for all weights."""

CPU_TILE = 2048
"""Vocabulary entries per tile of TRL's chunked loss on a CPU: its own 32,768 fall out of the cache."""


def adapter_config(method: str, r: int, alpha: int) -> PeftConfig | None:
    """The PEFT configuration of a row of `METHODS`; None where all weights are trained."""
    extra = METHODS[method]
    if extra is None:
        return None
    return LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", **extra)


# ---------------------------------------------------------------- the stage


def finetune(p: FinetuneSft, lake: Lake) -> Manifest:
    """Tune `p.base_model` on the rows of 50 and commit the adapter (all weights for method full) as `model/`.

    The same parameters, threads and machine give the same bytes. Metrics: losses, perplexity before and
    after, tokens, speed, memory, FLOPs per token, what really ran. Counts: train rows in; out those trained
    on at least once. Raises `ModelError` for a data set with nothing to train on and for a loss that is not
    finite. Packing, quantisation, checkpoints and several devices are not covered.
    """
    threads = models.set_threads(p.threads)
    with lake.stage(p) as out, tempfile.TemporaryDirectory(prefix="kit-sft-") as temp:
        data = out.read("50_build_datasets")
        tokenizer = models.load_tokenizer(p.base_model)
        train = prepare(lake.table(data, "train").to_pylist(), tokenizer, p.max_tokens)
        heldout = prepare(lake.table(data, "heldout").to_pylist()[: p.eval_rows], tokenizer, p.max_tokens)
        train.require("train"), heldout.require("heldout")
        model = models.load_model(p.base_model, dtype=p.dtype if METHODS[p.method] is not None else "float32")
        before, _ = models.perplexity(model, tokenizer, heldout.rows)
        trainer = build(p, model, tokenizer, train.rows, Path(temp))
        ran = run(trainer, "sft")
        after, scored = models.perplexity(trainer.model, tokenizer, heldout.rows)
        out.folder("model", models.save_adapter(trainer.model, Path(temp, "model"), p.base_model))
        out.table("steps", steps_table(trainer), measured=True)
        metrics = {
            **ran,
            "samples_per_s": round(p.sft_steps * p.sft_batch_size / ran["train_seconds"], 3),
            "perplexity_before": before,
            "perplexity_after": after,
            "perplexity_tokens": scored,
            "truncated_rows": train.truncated,
            "epochs": round(trainer.state.epoch or 0.0, 3),
        }
        metrics["what_ran"] |= {"method": p.method, "threads": threads, "padding": tokenizer.pad_note}
        return out.commit(train.counts(p.sft_steps, p.sft_batch_size, "sft_steps"), metrics)


@dataclass
class Rows:
    """Encoded rows, and what became of those that cannot be trained on."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0

    def require(self, name: str) -> None:
        """Raise `ModelError` when no row is left."""
        if not self.rows:
            gone = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
            raise ModelError(
                f"the data set of 50_build_datasets has no usable {name} row ({gone or 'it is empty'})"
            )

    def counts(self, steps: int, batch: int, parameter: str) -> Counts:
        """Rows in and out of `steps` steps of `batch` rows; the last batch of an epoch may be smaller."""
        kept, dropped = len(self.rows), dict(self.dropped)
        reached = kept if steps >= math.ceil(kept / batch) else steps * batch
        if reached < kept:
            dropped[f"not reached in {parameter}"] = kept - reached
        return Counts(records_in=kept + sum(self.dropped.values()), records_out=reached, dropped=dropped)


def prepare(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Rows:
    """Encode rows; those with nothing to learn from, which TRL would drop unseen, are counted by reason."""
    found = Rows()
    for row in rows:
        if not (row["completion"] or "").strip():
            found.dropped["empty"] = found.dropped.get("empty", 0) + 1
            continue
        # one more token than fits tells whether something was cut
        longer = models.encode(row, tokenizer, max_tokens + 1)
        encoded = {key: values[:max_tokens] for key, values in longer.items()}
        if not models.counted_tokens(encoded["labels"]):
            found.dropped["prompt fills max_tokens"] = found.dropped.get("prompt fills max_tokens", 0) + 1
            continue
        found.truncated += len(longer["input_ids"]) > max_tokens
        found.rows.append(encoded)
    return found


def build(
    p: FinetuneSft, model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], temp: Path
) -> SftTrainer:
    """The TRL trainer for `p`, over rows encoded here, so that nothing is dropped or masked unseen."""
    with quiet():
        return SftTrainer(
            model=model,
            args=SFTConfig(
                max_steps=p.sft_steps,
                per_device_train_batch_size=p.sft_batch_size,
                learning_rate=p.sft_learning_rate,
                dataset_kwargs={"skip_prepare_dataset": True},
                completion_only_loss=False,  # the labels already say which tokens count
                **common(p, model, temp),
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=adapter_config(p.method, p.lora_r, p.lora_alpha),
        )


# ---------------------------------------------------------------- shared with preference alignment


def common(p: Training, model: torch.nn.Module, temp: Path) -> dict[str, Any]:
    """Settings of every TRL trainer of the kit; TRL's own defaults would turn on bf16 and checkpointing."""
    full_in_half = getattr(p, "method", "") == "full" and models.pick_dtype(p.dtype) == torch.bfloat16
    return {
        "output_dir": str(temp),
        "seed": p.seed,
        "max_length": p.max_tokens,
        "lr_scheduler_type": "cosine",
        # full: float32 weights, bfloat16 arithmetic; small updates vanish in bfloat16 weights
        "bf16": full_in_half,
        "use_cpu": model.device.type == "cpu",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the default shows the mean so far instead of a NaN
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


class Metered:
    """Mixin for TRL trainers: counts what a step really computes, gives the first one a learning rate."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """One step, its tokens counted: real ones, padded ones, Σ L² for attention."""
        lengths = inputs["attention_mask"].sum(dim=1)
        began = time.perf_counter()
        loss = super().training_step(model, inputs, *args)
        if not torch.isfinite(loss):
            raise ModelError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the learning rate"
            )
        self.meter.append(
            {
                "tokens": int(lengths.sum()),
                "padded_tokens": inputs["attention_mask"].numel(),
                "squares": int((lengths * lengths).sum()),
                "compute_seconds": time.perf_counter() - began,
            }
        )
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


class SftTrainer(Metered, SFTTrainer):
    """TRL's trainer, metered."""


class Live(TrainerCallback):
    """Shows each step and keeps its clock time."""

    def __init__(self, bar: show.Progress, meter: list[dict[str, Any]]) -> None:
        self.bar, self.meter = bar, meter
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        now = time.perf_counter()
        self.meter[-1]["seconds"], self.began = now - self.began, now
        self.bar.update()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
    ) -> None:
        """Say how it goes."""
        if logs and "loss" in logs:
            rate = self.meter[-1]["tokens"] / self.meter[-1]["seconds"]
            self.bar.note(f"loss {logs['loss']:.3f} · {rate:,.0f} tokens/s")


def run(trainer: Any, label: str) -> dict[str, Any]:
    """Train; returns losses, tokens, seconds, tokens/s, peak memory, FLOPs per token and what really ran."""
    trainer.meter = []
    counted = model_flops(trainer.model)
    with quiet(), show.progress(trainer.args.max_steps, label, "steps") as bar, peak_memory() as peak:
        trainer.add_callback(Live(bar, trainer.meter))
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    total = {key: sum(m[key] for m in trainer.meter) for key in ("tokens", "padded_tokens", "squares")}
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        **total,
        "train_seconds": round(seconds, 3),
        "tokens_per_s": round(total["tokens"] / seconds, 2),
        "peak_rss_mb": peak["mb"],
        **flops_metrics(counted, total),
        "trainable": models.describe(trainer.model)["trainable"],
        "what_ran": what_ran(trainer),
    }


def flops_metrics(counted: ModelFlops, total: dict[str, int]) -> dict[str, Any]:
    """Model FLOPs of the run (forward, backward) and per token, with the convention."""
    flops = counted.total(total["tokens"], total["squares"])
    forward = counted.total(total["tokens"], total["squares"], forward_only=True)
    # what runs beside the model FLOPs: padded positions, and the logits a second time in TRL's chunked loss
    hardware = counted.weights * total["padded_tokens"] + counted.attention * total["squares"] / 2
    hardware += 2 * counted.head * total["padded_tokens"]
    return {
        "flops": flops,
        "forward_flops": forward,
        "hardware_flops": hardware,
        "flops_per_token": flops / total["tokens"],
        "flops_convention": counted.convention,
    }


def what_ran(trainer: Any) -> dict[str, Any]:
    """What a person would otherwise have to believe."""
    return {
        **models.describe(trainer.model),
        "optimizer": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
        "trainer": type(trainer).__mro__[2].__name__,
        "autocast": "bfloat16" if trainer.args.bf16 else "none",
        "checkpointing": bool(trainer.args.gradient_checkpointing),
        "processes": trainer.args.world_size,
    }


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
def quiet() -> Iterator[None]:
    """Keep the libraries' bars and prints out of notebooks; make TRL's loss tiles fit a CPU's cache."""
    from transformers import trainer as hf_trainer

    tile, shown = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, hf_trainer.PrinterCallback.on_log
    datasets.disable_progress_bars()
    if not torch.cuda.is_available():
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE
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
    found, done, me = {"mb": 0.0}, threading.Event(), psutil.Process()

    def look() -> None:
        while not done.wait(every_s):
            found["mb"] = max(found["mb"], round(me.memory_info().rss / 2**20, 1))

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        if torch.cuda.is_available():
            found["mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
