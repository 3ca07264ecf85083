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
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from kit.lake import Lake, Manifest
from kit.params import FinetuneSft
from kit.params.train import PASS_TOKENS
from kit.train import adapters, load
from kit.train.batches import collate_packed
from kit.train.encode import Rows, perplexity, prepare
from kit.train.loop import Metered, common, quiet, recipe, run, steps_table, work_folder
from kit.train.methods import adapter_config, base_quantization, begin, learning_rate
from kit.train.plan import Machine, plan, require_fit, this_machine
from kit.train.shipped import ModelError

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
            fitted = fit(p, tokenizer, train, held, folder)
            trainer = fitted.metrics.pop("trainer")
            made = adapters.save_adapter(fitted.model, folder / "model", p.base_model, fitted.quantization)
            out.folder("model", made)
            out.table("steps", steps_table(trainer), measured=True)
            counts = train.counts(p.sft_steps, math.floor(fitted.rows_a_step), "sft_steps")
            return out.commit(counts, fitted.metrics)


def fit(
    p: FinetuneSft,
    tokenizer: PreTrainedTokenizerBase,
    train: Rows,
    heldout: Rows,
    folder: Path,
    changes: Mapping[str, Any] = {},
) -> Fitted:
    """Tune a model on encoded rows; `folder` holds its checkpoints and log. What 60, 61, 80 and a cluster call.

    `changes` take the place of what `kit.train.fast` would set, by its names.
    """
    threads = load.set_threads(p.threads)
    config, quantization = adapter_config(p), base_quantization(p)
    why_not = "a learned prompt would stand before one row only" if prompts(config) and p.packing else ""
    if why_not:
        print(f"packing: none, {why_not}")
    p = p.model_copy(update={"packing": p.packing and not why_not})
    made = {**recipe(p), **changes}
    rows, lengths = pack(p, train)
    p = with_batch(p, lengths, quantization, folder)
    needed = require_fit(p, rows_tokens=lengths, quantization=quantization)
    print(needed.line())
    model = load.load_model(
        p.base_model,
        dtype=made["weights"],
        quantization=quantization,
        trust_remote_code=p.trust_remote_code,
    )
    require_context(model, p.max_tokens)
    before, _ = perplexity(model, tokenizer, heldout.rows)
    trainer = build(p, model, tokenizer, rows, config, folder, made)
    ran = run(trainer, f"sft {p.method}")
    after, scored = perplexity(trainer.model, tokenizer, heldout.rows)
    rows_a_step = p.sft_batch_size * p.gradient_accumulation * len(train.rows) / len(rows)
    metrics = {
        **ran,
        "samples_per_s": round(p.sft_steps * rows_a_step / ran["train_seconds"], 3),
        "perplexity_before": before,
        "perplexity_after": after,
        "heldout_before": math.log(before),
        "heldout_after": math.log(after),
        "perplexity_tokens": scored,
        "truncated_rows": train.truncated,
        "packed_rows": len(rows) if p.packing else 0,
        "epochs": round(trainer.state.epoch or 0.0, 3),
        "estimate": needed.compared(ran),
        "memory_parts_mb": {name: round(mb, 1) for name, mb in needed.parts.items()},
        "trainer": trainer,
    }
    metrics["what_ran"] |= {
        "method": p.method,
        "base": quantization,
        "task": p.task,
        "packing": "best fit, documents kept apart" if p.packing else "none" + f": {why_not}" * bool(why_not),
        "rows dropped": sum(train.dropped.values()),
        "of these fully masked": train.dropped.get("prompt fills max_tokens", 0),
        "threads": threads,
        "padding": tokenizer.pad_note,
    }
    return Fitted(trainer.model, tokenizer, quantization, metrics, rows_a_step)


def prompts(config: PeftConfig | None) -> bool:
    """Whether a learned prompt or prefix stands before every row."""
    return config is not None and config.is_prompt_learning


def with_batch(p: FinetuneSft, lengths: Sequence[int], quantization: str, folder: Path) -> FinetuneSft:
    """`p` with its batch; for 0 the one that `folder` remembers, else the one that `largest_batch` finds, printed."""
    if p.sft_batch_size:
        return p
    kept, machine = folder / BATCH, this_machine(p)
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(str(largest_batch(p, lengths, quantization, machine)), encoding="utf-8")
    p = p.model_copy(update={"sft_batch_size": int(kept.read_text(encoding="utf-8"))})
    print(
        f"batch: {p.sft_batch_size} rows a pass, {p.gradient_accumulation} passes a step, "
        f"{machine.memory_mb / 1024:.1f} GB free"
    )
    return p


def largest_batch(p: FinetuneSft, lengths: Sequence[int], quantization: str, machine: Machine) -> int:
    """The largest power of two of rows that needs `SHARE_OF_MEMORY` of the free memory and `PASS_TOKENS` at most."""
    rows = 1
    while 2 * rows * max(lengths) <= PASS_TOKENS:
        larger = plan(p.model_copy(update={"sft_batch_size": 2 * rows}), machine, lengths, quantization)
        if larger.memory_mb > SHARE_OF_MEMORY * machine.memory_mb:
            break
        rows *= 2
    return rows


def require_context(model: PreTrainedModel, max_tokens: int) -> None:
    """Raise `ModelError` for rows longer than the model was made for: positions past its end are noise."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most and max_tokens > most:
        raise ModelError(f"max_tokens={max_tokens} is longer than the model's context of {most} tokens")


def pack(p: FinetuneSft, train: Rows) -> tuple[datasets.Dataset, list[int]]:
    """The rows as the trainer takes them, packed where asked, and the length of each in tokens."""
    rows = datasets.Dataset.from_list(train.rows)
    if p.packing:
        with quiet():
            rows = pack_dataset(rows, p.max_tokens, strategy="bfd")
    return rows, [len(ids) for ids in rows["input_ids"]]


def build(
    p: FinetuneSft,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    config: PeftConfig | None,
    folder: Path,
    made: dict[str, Any],
) -> SftTrainer:
    """The TRL trainer for `p`, over rows encoded here, so that nothing is dropped or masked unseen."""
    with quiet():
        trainer = SftTrainer(
            model=model,
            args=SFTConfig(
                max_steps=p.sft_steps,
                per_device_train_batch_size=p.sft_batch_size,
                learning_rate=learning_rate(p, p.sft_learning_rate),
                dataset_kwargs={"skip_prepare_dataset": True},
                completion_only_loss=False,  # the labels already say which tokens count
                **common(p, model, folder, p.checkpoint_steps, made),
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=config,
            data_collator=collator(p.packing, made["attention"], tokenizer.pad_token_id),
        )
    if config is not None:
        adapters.widen_trained(trainer.model)
        begin(trainer.model, rows[0]["input_ids"])
    return trainer


def collator(packing: bool, attention: str, pad: int) -> Callable[..., Any] | None:
    """How packed rows become a batch: as rows, or strung into one for FlashAttention, which knows documents so alone."""
    if not packing:
        return None
    if attention.startswith("flash_attention"):
        return DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=True)
    return partial(collate_packed, pad=pad)
