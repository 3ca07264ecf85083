"""70: adapter → aligned. The policy learns from pairs of a better and a worse completion, by TRL.

The policy is the tuned model (its adapter merged) with a new adapter; the reference is the same model with
that adapter switched off, or a frozen copy where all weights are trained. Nobody has to wonder what the reference
is: at step 0 the two are one, so the loss before the first update is known, and is checked (`kit.train.objectives`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from kit.lake import Lake, Manifest
from kit.params import AlignDpo
from kit.train import adapters, load
from kit.train.encode import Rows
from kit.train.loop import common, quiet, run, steps_table
from kit.train.methods import METHODS, adapter_config, base_quantization
from kit.train.objectives import OBJECTIVES
from kit.train.plan import require_fit
from kit.train.shipped import ModelError

SHARE_OF_SFT_RATE = 0.2
"""A fifth of the method's rate for fine-tuning: preferences move a model that writes well already."""
EVALUATED = 8
"""Held-out pairs that score the aligned model, at most."""


def align(p: AlignDpo, lake: Lake) -> Manifest:
    """Align the model of 60 on preference pairs and commit the new adapter (method full: all weights) as `model/`.

    The result goes on top of the tuned model: base, then 60's weights, then these. Metrics: losses, reward margins
    and accuracies per step, those of held-out pairs, what other values of β would have done (`sweep_betas`),
    speed, memory, FLOPs, what really ran. Counts: train pairs in; out those trained on at least once. Raises
    `ModelError` for pairs that cannot be used, a first loss that is not the one policy = reference gives, and a loss
    that is not finite.
    """
    threads = load.set_threads(p.threads)
    if not METHODS[p.method].merges:
        raise ModelError(f"70 cannot train a learned prompt (method={p.method}): full, lora, qlora or dora")
    with lake.stage(p) as out, tempfile.TemporaryDirectory(prefix="kit-dpo-") as temp:
        data, tuned = out.read(p.preferences_from), out.read("60_finetune_sft")
        tokenizer = load.load_tokenizer(p.base_model, trust_remote_code=p.trust_remote_code)
        found = lake.table(data, "preferences").to_pylist()
        pairs = usable(found, tokenizer, p.max_tokens)
        pairs.require("preference", p.preferences_from)
        held = usable(found, tokenizer, p.max_tokens, "heldout").rows[:EVALUATED]
        texts = [
            tokenizer(r["prompt"] + r[side])["input_ids"]
            for r in pairs.rows
            for side in ("chosen", "rejected")
        ]
        require_fit(p, rows_tokens=[len(ids) for ids in texts], quantization=base_quantization(p))
        folder = lake.local_folder(tuned, "model")
        trainer, ran = _train(p, folder, tokenizer, pairs.rows, held, Path(temp, "main"))
        made = adapters.save_adapter(trainer.model, Path(temp, "model"), p.base_model, base_quantization(p))
        out.folder("model", made)
        out.table("steps", steps_table(trainer), measured=True)
        del trainer  # room for the sweep
        sweep = [_moved(p.dpo_beta, ran)]
        for beta in p.sweep_betas:
            load.release()
            other = p.model_copy(update={"dpo_beta": float(beta)})
            sweep.append(
                _moved(float(beta), _train(other, folder, tokenizer, pairs.rows, [], Path(temp, beta))[1])
            )
        metrics = {
            **ran,
            **_with_reference(p, ran),
            "samples_per_s": round(p.dpo_steps * _batch(p) / ran["train_seconds"], 3),
            "sweep": sorted(sweep, key=lambda s: s["beta"]),
        }
        metrics["what_ran"] |= {
            "method": p.method,
            "base": base_quantization(p),
            "loss": p.preference_loss,
            "threads": threads,
            "padding": tokenizer.pad_note,
            "reference": _reference(p),
        }
        return out.commit(pairs.counts(p.dpo_steps, _batch(p), "dpo_steps"), metrics)


def _reference(p: AlignDpo) -> str:
    """What the policy is held against, in words."""
    if OBJECTIVES[p.preference_loss].first_loss is None:
        return "none"
    return "a frozen copy of the tuned model" if p.method == "full" else "the tuned model, new adapter off"


def _with_reference(p: AlignDpo, ran: Mapping[str, Any]) -> dict[str, Any]:
    """FLOPs with those of the reference's forward pass, which is work that the method asks for."""
    has_reference = OBJECTIVES[p.preference_loss].first_loss is not None
    extra = ran["forward_flops"] if has_reference else 0
    more = "; plus one forward pass of the reference" if has_reference else ""
    return {
        "flops": ran["flops"] + extra,
        "hardware_flops": ran["hardware_flops"] + extra,
        "flops_per_token": (ran["flops"] + extra) / ran["tokens"],
        "flops_convention": ran["flops_convention"] + more,
    }


def _batch(p: AlignDpo) -> int:
    return p.dpo_batch_size * p.gradient_accumulation


def _train(
    p: AlignDpo,
    tuned: str,
    tokenizer: Any,
    pairs: list[dict[str, str]],
    held: list[dict[str, str]],
    folder: Path,
) -> tuple[Any, dict[str, Any]]:
    """One training from the tuned model: the trainer, and its metrics with those of the held-out pairs."""
    dtype = p.dtype if p.method != "full" else "float32"
    model = load.load_model(
        p.base_model,
        dtype=dtype,
        adapters=[tuned],
        quantization=base_quantization(p),
        trust_remote_code=p.trust_remote_code,
    )
    trainer = build(p, model, tokenizer, pairs, held, folder)
    ran = run(trainer, f"{p.preference_loss} β {p.dpo_beta:g}")
    if len(trainer.train_dataset) != len(pairs) * (1 if OBJECTIVES[p.preference_loss].paired else 2):
        raise ModelError("TRL dropped preference pairs that the kit had counted as usable")
    ran |= logged(trainer)
    if held:
        with quiet():
            scores = trainer.evaluate()
        ran["heldout"] = {"pairs": len(held)} | {
            k.removeprefix("eval_rewards/"): v for k, v in scores.items() if k.startswith("eval_rewards/")
        }
    return trainer, ran


def _moved(beta: float, ran: Mapping[str, Any]) -> dict[str, Any]:
    """How far a training with `beta` went: rewards are β times a log-ratio, so divided by β they compare."""
    nats = {k: [v / beta for v in ran[k]] for k in ("margins", "chosen", "rejected") if k in ran}
    return {"beta": beta, "losses": ran["losses"], **nats}


def logged(trainer: Any) -> dict[str, list[float]]:
    """Reward margins, accuracies and rewards of either side, one number a step, where the objective has them."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("margins", "accuracies", "chosen", "rejected")
    return {n: [e[f"rewards/{n}"] for e in logs] for n in names if all(f"rewards/{n}" in e for e in logs)}


def usable(pairs: Sequence[Mapping[str, Any]], tokenizer: Any, max_tokens: int, split: str = "train") -> Rows:
    """The pairs of `split` that teach something, the others counted by reason; other splits are no input."""
    found = Rows()
    for pair in pairs:
        if pair.get("split", "train") != split:
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
    p: AlignDpo,
    model: Any,
    tokenizer: Any,
    pairs: list[dict[str, str]],
    held: list[dict[str, str]],
    folder: Path,
) -> Any:
    """The TRL trainer for `p`; `model` becomes policy and, with its new adapter off, reference."""
    objective = OBJECTIVES[p.preference_loss]
    config = adapter_config(p)
    reference = {}
    if config is None and objective.first_loss is not None:
        # TRL would load the reference anew by its name: the model before it was tuned
        reference = {"ref_model": copy.deepcopy(model).eval().requires_grad_(False)}
    rows = datasets.Dataset.from_list(pairs if objective.paired else judgements(pairs))
    unseen = datasets.Dataset.from_list(held if objective.paired else judgements(held)) if held else None
    with quiet():
        trainer = objective.trainer(
            model=model,
            args=objective.config(
                beta=p.dpo_beta,
                max_steps=p.dpo_steps,
                # a judgement is half a pair
                per_device_train_batch_size=p.dpo_batch_size * (1 if objective.paired else 2),
                learning_rate=p.dpo_learning_rate or METHODS[p.method].learning_rate * SHARE_OF_SFT_RATE,
                **objective.settings,
                **common(p, model, folder),
            ),
            train_dataset=rows,
            eval_dataset=unseen,
            processing_class=tokenizer,
            peft_config=config,
            **reference,
        )
    if config is not None:
        adapters.widen_trained(trainer.model)
    trainer.first_loss = objective.first_loss(p.dpo_beta) if objective.first_loss else None
    return trainer


def judgements(pairs: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Pairs as single texts, each good or bad."""
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
