"""70: adapter → aligned. Direct preference optimisation on pairs of a better and a worse completion, by TRL.

The policy is the tuned model (its adapter merged) with a new adapter; the reference is the same model with
that adapter switched off. So nothing is loaded twice, and nobody has to wonder what the reference is: at
step 0 the two are one, and the loss of a sigmoid over a difference of zero is ln 2.

(Rafailov et al. 2023, Direct Preference Optimization, equation 7.)
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from trl import DPOConfig, DPOTrainer

from kit.lake import Lake, Manifest
from kit.params import AlignDpo
from kit.train import models
from kit.train.encode import Rows
from kit.train.loop import Metered, common, quiet, run, steps_table
from kit.train.methods import adapter_config
from kit.train.models import ModelError

LN2 = math.log(2)
LN2_TOLERANCE = 1e-3
"""In bfloat16 too: an adapter that is zero adds exact zeros, so both sides round alike (measured: 2e-9)."""


class PreferenceTrainer(Metered, DPOTrainer):
    """TRL's trainer, metered."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        found = super()._compute_loss(model, inputs, return_outputs)
        if self.model.training and self.state.global_step == 0:
            check_first_loss(float((found[0] if return_outputs else found).detach()))
        return found


def check_first_loss(loss: float) -> None:
    """Raise `ModelError` unless the loss before the first update is ln 2."""
    if not abs(loss - LN2) < LN2_TOLERANCE:
        raise ModelError(
            f"the first DPO loss is {loss:.4f}, not ln 2 = {LN2:.4f}: the reference is not the model that "
            "training starts from"
        )


def align(p: AlignDpo, lake: Lake) -> Manifest:
    """Align the model of 60 on the preference pairs of 50 and commit the new adapter as `model/`.

    The adapter goes on top of the tuned model: base, then 60's adapter, then this one. Metrics: losses,
    reward margins and accuracies per step, speed, memory, FLOPs, what really ran. Counts: train pairs in;
    out those trained on at least once. Raises `ModelError` for a data set without usable pairs, a first loss
    that is not ln 2, and a loss that is not finite. A trained reference, KTO and ORPO are not covered.
    """
    threads = models.set_threads(p.threads)
    with lake.stage(p) as out, tempfile.TemporaryDirectory(prefix="kit-dpo-") as temp:
        data, tuned = out.read("50_build_datasets"), out.read("60_finetune_sft")
        tokenizer = models.load_tokenizer(p.base_model)
        pairs = usable(lake.table(data, "preferences").to_pylist(), tokenizer, p.max_tokens)
        pairs.require("preference")
        folder = lake.local_folder(tuned, "model")
        model = models.load_model(p.base_model, dtype=p.dtype, adapters=[folder])
        trainer = build(p, model, tokenizer, pairs.rows, Path(temp))
        ran = run(trainer, "dpo")
        if len(trainer.train_dataset) != len(pairs.rows):
            raise ModelError("TRL dropped preference pairs that the kit had counted as usable")
        out.folder("model", models.save_adapter(trainer.model, Path(temp, "model"), p.base_model))
        out.table("steps", steps_table(trainer), measured=True)
        metrics = {
            **ran,
            # the reference's forward pass is work that the method asks for
            "flops": ran["flops"] + ran["forward_flops"],
            "hardware_flops": ran["hardware_flops"] + ran["forward_flops"],
            "flops_per_token": (ran["flops"] + ran["forward_flops"]) / ran["tokens"],
            "flops_convention": ran["flops_convention"] + "; plus one forward pass of the reference",
            "samples_per_s": round(p.dpo_steps * p.dpo_batch_size / ran["train_seconds"], 3),
            **logged(trainer),
        }
        metrics["what_ran"] |= {
            "threads": threads,
            "padding": tokenizer.pad_note,
            "reference": "the tuned model, new adapter off",
        }
        return out.commit(pairs.counts(p.dpo_steps, p.dpo_batch_size, "dpo_steps"), metrics)


def logged(trainer: Any) -> dict[str, list[float]]:
    """Reward margins and accuracies, one number a step."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[f"rewards/{name}"] for entry in logs] for name in ("margins", "accuracies")}


def usable(pairs: Sequence[Mapping[str, Any]], tokenizer: Any, max_tokens: int) -> Rows:
    """The train pairs that teach something, the others counted by reason; held-out pairs are no input."""
    found = Rows()
    for pair in pairs:
        if pair.get("split", "train") != "train":
            continue
        reason = _flaw(pair, tokenizer, max_tokens)
        if reason:
            found.dropped[reason] = found.dropped.get(reason, 0) + 1
        else:
            found.rows.append({key: pair[key] for key in ("prompt", "chosen", "rejected")})
    return found


def _flaw(pair: Mapping[str, Any], tokenizer: Any, max_tokens: int) -> str | None:
    chosen, rejected = (pair["chosen"] or "").strip(), (pair["rejected"] or "").strip()
    if not chosen or not rejected:
        return "empty"
    if chosen == rejected:
        return "chosen equals rejected"
    if len(tokenizer(pair["prompt"] or "")["input_ids"]) >= max_tokens:
        return "prompt fills max_tokens"
    return None


def build(
    p: AlignDpo, model: Any, tokenizer: Any, pairs: list[dict[str, str]], temp: Path
) -> PreferenceTrainer:
    """The TRL trainer for `p`; `model` becomes policy and, with its new adapter off, reference."""
    with quiet():
        return PreferenceTrainer(
            model=model,
            args=DPOConfig(
                beta=p.dpo_beta,
                max_steps=p.dpo_steps,
                per_device_train_batch_size=p.dpo_batch_size,
                learning_rate=p.dpo_learning_rate,
                **common(p, model, temp),
            ),
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=adapter_config(p),
        )
