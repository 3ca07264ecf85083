"""60: base → adapter. Supervised fine-tuning on prompt and completion rows, by TRL and PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from kit.lake.manifest import Manifest
from kit.lake.store import Lake
from kit.params import FinetuneSft
from kit.params.train import PASS_TOKENS
from kit.train.encode.batches import collate_packed
from kit.train.encode.encode import Rows, perplexity, prepare
from kit.train.loop.meter import Metered, steps_table
from kit.train.loop.run import quiet, run_training, work_folder
from kit.train.models import adapters, load
from kit.train.models.methods import begin_prompt
from kit.train.plan.fit import plan_training, require_fit
from kit.train.plan.setup import Setup, resolve_setup, trainer_arguments

SHARE_OF_MEMORY = 0.8
"""Of the free memory, what a batch found by the plan may need: the plan is off by a tenth or so."""
BATCH = "batch"
"""File in a run's folder: the batch that was found; a killed run goes on with it, whatever is free by then."""


class SftTrainer(Metered, SFTTrainer):
    """TRL's trainer, metered."""


@dataclass
class Fitted:
    """A model that was tuned, its tokenizer, and the metrics of the run; rows of the data set a step took (mean)."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    quantization: str
    metrics: dict[str, Any]
    rows_a_step: float


def finetune(p: FinetuneSft, lake: Lake) -> Manifest:
    """Tune `p.base_model` on the rows of 50 and commit the adapter (all weights for method full) as `model/`.

    The same parameters, threads and machine give the same bytes; with `checkpoint_steps`, also when the run was
    killed and started again. Metrics: losses, perplexity before and after, tokens, speed, memory, FLOPs per
    token, what really ran, and what the plan had said. Counts: train rows in; out those trained on at least once.
    Raises `ModelError` for a data set with nothing to train on, a plan that does not fit this machine, a loss that
    is not finite, and a full disk.
    """
    with lake.stage(p) as out:
        data = out.read("50_build_datasets")
        tokenizer = load.load_tokenizer(p.base_model, trust_remote_code=p.trust_remote_code)
        train = prepare(lake.table(data, "train").to_pylist(), tokenizer, p.max_tokens, p.task)
        heldout = lake.table(data, "heldout").to_pylist()[: p.eval_rows]
        held = prepare(heldout, tokenizer, p.max_tokens, p.task)
        train.require("train"), held.require("heldout")
        with work_folder(lake, out, bool(p.checkpoint_steps)) as folder:
            fitted = fit_rows(p, tokenizer, train, held, folder)
            trainer = fitted.metrics.pop("trainer")
            saved = adapters.save_adapter(fitted.model, folder / "model", p.base_model, fitted.quantization)
            out.folder("model", saved)
            out.table("steps", steps_table(trainer), measured=True)
            counts = train.counts(p.sft_steps, math.floor(fitted.rows_a_step), "sft_steps")
            return out.commit(counts, fitted.metrics)


def fit_rows(
    p: FinetuneSft,
    tokenizer: PreTrainedTokenizerBase,
    train: Rows,
    heldout: Rows,
    folder: Path,
    changes: Mapping[str, Any] = {},
) -> Fitted:
    """Tune a model on encoded rows; `folder` holds its checkpoints and log. What 60, 61, 80 and a cluster call.

    `changes` take the place of what `kit.train.plan.settings` would set, by its names.
    """
    threads = load.set_threads(p.threads)
    setup = resolve_setup(p, changes=changes)
    if setup.unpacked:
        print(f"packing: none, {setup.unpacked}")
    setup.require_context()
    rows, lengths = pack(setup, train)
    setup = with_batch(setup, lengths, folder)
    needed = require_fit(setup, rows_tokens=lengths)
    print(needed.line())
    model = setup.model()
    before, _ = perplexity(model, tokenizer, heldout.rows)
    trainer = sft_trainer(setup, model, tokenizer, rows, folder)
    ran = run_training(trainer, f"sft {setup.method}", needed.seconds)
    after, scored = perplexity(trainer.model, tokenizer, heldout.rows)
    rows_a_step = setup.fit.step_rows * len(train.rows) / len(rows)
    metrics = {
        **ran,
        "samples_per_s": round(setup.fit.steps * rows_a_step / ran["train_seconds"], 3),
        "perplexity_before": before,
        "perplexity_after": after,
        "heldout_before": math.log(before),
        "heldout_after": math.log(after),
        "perplexity_tokens": scored,
        "truncated_rows": train.truncated,
        "packed_rows": len(rows) if setup.packing else 0,
        "epochs": round(trainer.state.epoch or 0.0, 3),
        "estimate": needed.compared(ran),
        "memory_parts_mb": {name: round(mb, 1) for name, mb in needed.parts.items()},
        "trainer": trainer,
    }
    metrics["what_ran"] |= {
        "method": setup.method,
        "base": setup.quantization,
        "task": p.task,
        "packing": packing_words(setup),
        "rows dropped": sum(train.dropped.values()),
        "of these fully masked": train.dropped.get("prompt fills max_tokens", 0),
        "threads": threads,
        "padding": tokenizer.pad_note,
    }
    return Fitted(trainer.model, tokenizer, setup.quantization, metrics, rows_a_step)


def packing_words(setup: Setup) -> str:
    """How rows were packed, or why not."""
    if setup.packing:
        return "best fit, documents kept apart"
    return f"none: {setup.unpacked}" if setup.unpacked else "none"


def with_batch(setup: Setup, lengths: Sequence[int], folder: Path) -> Setup:
    """The setup with its batch; for 0 the one that `folder` remembers, else the one that `largest_batch` finds, printed."""
    if not setup.fit.fill_memory:
        return setup
    kept = folder / BATCH
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(str(largest_batch(setup, lengths)), encoding="utf-8")
    setup = setup.with_rows(int(kept.read_text(encoding="utf-8")))
    print(
        f"batch: {setup.fit.rows} rows a pass, {setup.fit.accumulation} passes a step, "
        f"{setup.machine.memory_mb / 1024:.1f} GB free"
    )
    return setup


def largest_batch(setup: Setup, lengths: Sequence[int]) -> int:
    """The largest power of two of rows that needs `SHARE_OF_MEMORY` of the free memory and `PASS_TOKENS` at most."""
    rows = 1
    while 2 * rows * max(lengths) <= PASS_TOKENS:
        larger = plan_training(setup.with_rows(2 * rows), lengths)
        if larger.memory_mb > SHARE_OF_MEMORY * setup.machine.memory_mb:
            break
        rows *= 2
    return rows


def pack(setup: Setup, train: Rows) -> tuple[datasets.Dataset, list[int]]:
    """The rows as the trainer takes them, packed where asked, and the length of each in tokens."""
    rows = datasets.Dataset.from_list(train.rows)
    if setup.packing:
        with quiet():
            rows = pack_dataset(rows, setup.fit.tokens, strategy="bfd")
    return rows, [len(ids) for ids in rows["input_ids"]]


def sft_trainer(
    setup: Setup,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    folder: Path,
) -> SftTrainer:
    """The TRL trainer, over rows encoded here, so that nothing is dropped or masked unseen."""
    with quiet():
        trainer = SftTrainer(
            model=model,
            args=SFTConfig(
                dataset_kwargs={"skip_prepare_dataset": True},
                completion_only_loss=False,  # the labels already say which tokens count
                **trainer_arguments(setup, model, folder),
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=setup.new_adapter(),
            data_collator=collator(setup.packing, setup.recipe["attention"], tokenizer.pad_token_id),
        )
    if not setup.full:
        adapters.widen_trained(trainer.model)
        begin_prompt(trainer.model, rows[0]["input_ids"])
    return trainer


def collator(packing: bool, attention: str, pad: int) -> Callable[..., Any] | None:
    """How packed rows become a batch: as rows, or strung into one for FlashAttention, which knows documents so alone."""
    if not packing:
        return None
    if attention.startswith("flash_attention"):
        return DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=True)
    return partial(collate_packed, pad=pad)
