"""60: base → adapter. Supervised fine-tuning on prompt and completion rows, by TRL and PEFT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, pack_dataset

from kit.lake import Lake, Manifest
from kit.params import FinetuneSft
from kit.train import models
from kit.train.encode import Rows, collate_packed, perplexity, prepare
from kit.train.loop import Metered, common, quiet, run, steps_table, work_folder
from kit.train.methods import adapter_config, base_quantization, begin, learning_rate
from kit.train.models import ModelError
from kit.train.plan import require_fit


class SftTrainer(Metered, SFTTrainer):
    """TRL's trainer, metered."""


@dataclass
class Fitted:
    """A model that was tuned, its tokenizer, and the metrics of the run."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    quantization: str
    metrics: dict[str, Any]


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
        tokenizer = models.load_tokenizer(p.base_model, trust_remote_code=p.trust_remote_code)
        train = prepare(lake.table(data, "train").to_pylist(), tokenizer, p.max_tokens, p.task)
        heldout = lake.table(data, "heldout").to_pylist()[: p.eval_rows]
        held = prepare(heldout, tokenizer, p.max_tokens, p.task)
        train.require("train"), held.require("heldout")
        with work_folder(lake, out, bool(p.checkpoint_steps)) as folder:
            fitted = fit(p, tokenizer, train, held, folder)
            trainer = fitted.metrics.pop("trainer")
            made = models.save_adapter(fitted.model, folder / "model", p.base_model, fitted.quantization)
            out.folder("model", made)
            out.table("steps", steps_table(trainer), measured=True)
            reached = p.sft_batch_size * p.gradient_accumulation * fitted.metrics.pop("rows_per_row")
            return out.commit(train.counts(p.sft_steps, math.floor(reached), "sft_steps"), fitted.metrics)


def fit(
    p: FinetuneSft, tokenizer: PreTrainedTokenizerBase, train: Rows, heldout: Rows, folder: Path
) -> Fitted:
    """Tune a model on encoded rows; `folder` holds its checkpoints and log. What 60 and 61 and a cluster call."""
    threads = models.set_threads(p.threads)
    config, quantization = adapter_config(p), base_quantization(p)
    rows, lengths = pack(p, train, config)
    plan = require_fit(p, rows_tokens=lengths, quantization=quantization)
    print(plan.line())
    model = models.load_model(
        p.base_model,
        # all weights are trained in float32: small updates vanish in bfloat16
        dtype=p.dtype if config else "float32",
        quantization=quantization,
        trust_remote_code=p.trust_remote_code,
    )
    require_context(model, p.max_tokens)
    before, _ = perplexity(model, tokenizer, heldout.rows)
    trainer = build(p, model, tokenizer, rows, config, folder)
    ran = run(trainer, f"sft {p.method}")
    after, scored = perplexity(trainer.model, tokenizer, heldout.rows)
    batch = p.sft_batch_size * p.gradient_accumulation
    metrics = {
        **ran,
        "samples_per_s": round(p.sft_steps * batch * len(train.rows) / len(rows) / ran["train_seconds"], 3),
        "perplexity_before": before,
        "perplexity_after": after,
        "heldout_before": math.log(before),
        "heldout_after": math.log(after),
        "perplexity_tokens": scored,
        "truncated_rows": train.truncated,
        "packed_rows": len(rows) if p.packing else 0,
        "epochs": round(trainer.state.epoch or 0.0, 3),
        "estimate": plan.compared(ran),
        "rows_per_row": len(train.rows) / len(rows),
        "trainer": trainer,
    }
    metrics["what_ran"] |= {
        "method": p.method,
        "base": quantization,
        "task": p.task,
        "packing": "best fit, documents kept apart" if p.packing else "none",
        "rows dropped": sum(train.dropped.values()),
        "of these fully masked": train.dropped.get("prompt fills max_tokens", 0),
        "threads": threads,
        "padding": tokenizer.pad_note,
    }
    return Fitted(trainer.model, tokenizer, quantization, metrics)


def require_context(model: PreTrainedModel, max_tokens: int) -> None:
    """Raise `ModelError` for rows longer than the model was made for: positions past its end are noise."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most and max_tokens > most:
        raise ModelError(f"max_tokens={max_tokens} is longer than the model's context of {most} tokens")


def pack(p: FinetuneSft, train: Rows, config: PeftConfig | None) -> tuple[datasets.Dataset, list[int]]:
    """The rows as the trainer takes them, packed where asked, and the length of each in tokens."""
    rows = datasets.Dataset.from_list(train.rows)
    if p.packing:
        if config is not None and config.is_prompt_learning:
            raise ModelError(
                f"packing does not go with method {p.method}: its prompt would stand before one row only"
            )
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
                **common(p, model, folder, p.checkpoint_steps),
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=config,
            data_collator=partial(collate_packed, pad=tokenizer.pad_token_id) if p.packing else None,
        )
    if config is not None:
        models.widen_trained(trainer.model)
        begin(trainer.model, rows[0]["input_ids"])
    return trainer
