"""70: adapter → aligned. The policy learns from pairs of a better and a worse completion, by TRL.

The policy is the tuned model (its adapter merged) with a new adapter; the reference is the same model with
that adapter switched off, or a frozen copy where all weights are trained. Nobody has to wonder what the reference
is: at step 0 the two are one, so the loss before the first update is known, and is checked (`kit.train.align.objectives`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from kit.errors import ModelError
from kit.lake.manifest import Manifest
from kit.lake.store import Lake
from kit.params import AlignDpo
from kit.train.align.objectives import OBJECTIVES
from kit.train.encode.encode import Rows
from kit.train.loop.meter import steps_table
from kit.train.loop.run import quiet, run_training
from kit.train.models import adapters, load
from kit.train.models.methods import METHODS
from kit.train.plan.fit import require_fit
from kit.train.plan.setup import Setup, resolve_setup, trainer_arguments

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
        setup = resolve_setup(p)
        tokenizer = setup.tokenizer()
        given = lake.table(data, "preferences").to_pylist()
        pairs = usable(given, tokenizer, setup.fit.tokens)
        pairs.require("preference", p.preferences_from)
        held = usable(given, tokenizer, setup.fit.tokens, "heldout").rows[:EVALUATED]
        texts = [
            tokenizer(r["prompt"] + r[side])["input_ids"]
            for r in pairs.rows
            for side in ("chosen", "rejected")
        ]
        needed = require_fit(setup, rows_tokens=[len(ids) for ids in texts])
        folder = lake.local_folder(tuned, "model")
        trainer, ran = _train(
            p, setup, folder, tokenizer, pairs.rows, held, Path(temp, "main"), needed.seconds
        )
        saved = adapters.save_adapter(
            trainer.model, Path(temp, "model"), setup.base_model, setup.quantization
        )
        out.folder("model", saved)
        out.table("steps", steps_table(trainer), measured=True)
        del trainer  # room for the sweep
        sweep = [_moved(p.dpo_beta, ran)]
        for beta in p.sweep_betas:
            load.release()
            other = p.model_copy(update={"dpo_beta": float(beta)})
            moved = _train(other, setup, folder, tokenizer, pairs.rows, [], Path(temp, beta), needed.seconds)[
                1
            ]
            sweep.append(_moved(float(beta), moved))
        metrics = {
            **_with_reference(ran, setup.fit.reference),
            "samples_per_s": round(setup.fit.steps * setup.fit.step_rows / ran["train_seconds"], 3),
            "sweep": sorted(sweep, key=lambda s: s["beta"]),
        }
        kept = "a frozen copy of the tuned model" if setup.full else "the tuned model, new adapter off"
        metrics["what_ran"] |= {
            "method": setup.method,
            "base": setup.quantization,
            "loss": p.preference_loss,
            "threads": threads,
            "padding": tokenizer.pad_note,
            "reference": kept if setup.fit.reference else "none",
        }
        counts = pairs.counts(setup.fit.steps, setup.fit.step_rows, "dpo_steps")
        return out.commit(counts, metrics)


def _with_reference(ran: Mapping[str, Any], reference: bool) -> dict[str, Any]:
    """A run's metrics with the forward pass of the reference, where there is one: work that the method asks for."""
    extra = ran["forward_flops"] if reference else 0
    return {
        **ran,
        "flops": ran["flops"] + extra,
        "hardware_flops": ran["hardware_flops"] + extra,
        "flops_per_token": (ran["flops"] + extra) / ran["tokens"],
        "flops_convention": ran["flops_convention"] + "; plus one forward pass of the reference" * reference,
    }


def _train(
    p: AlignDpo,
    setup: Setup,
    tuned: str,
    tokenizer: Any,
    pairs: list[dict[str, str]],
    held: list[dict[str, str]],
    folder: Path,
    planned_seconds: float,
) -> tuple[Any, dict[str, Any]]:
    """One training from the tuned model: the trainer, and its metrics with those of the held-out pairs."""
    trainer = preference_trainer(p, setup, setup.model(adapters=[tuned]), tokenizer, pairs, held, folder)
    ran = run_training(trainer, f"{p.preference_loss} β {p.dpo_beta:g}", planned_seconds)
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
    rows = Rows()
    for pair in pairs:
        if pair.get("split", "train") != split:
            continue
        reason = _flaw(pair, tokenizer, max_tokens)
        if reason:
            rows.dropped[reason] = rows.dropped.get(reason, 0) + 1
        else:
            rows.rows.append({key: pair[key] for key in ("prompt", "chosen", "rejected")})
    return rows


def _flaw(pair: Mapping[str, Any], tokenizer: Any, max_tokens: int) -> str | None:
    chosen, rejected = (pair["chosen"] or "").strip(), (pair["rejected"] or "").strip()
    if not chosen or not rejected:
        return "empty"
    if chosen == rejected:
        return "chosen equals rejected"
    if len(tokenizer(pair["prompt"] or "")["input_ids"]) >= max_tokens:
        return "prompt fills max_tokens"
    return None


def preference_trainer(
    p: AlignDpo,
    setup: Setup,
    model: Any,
    tokenizer: Any,
    pairs: list[dict[str, str]],
    held: list[dict[str, str]],
    folder: Path,
) -> Any:
    """The TRL trainer for `p`; `model` becomes policy and, with its new adapter off, reference."""
    objective = OBJECTIVES[p.preference_loss]
    reference = {}
    if setup.full and setup.fit.reference:
        # TRL would load the reference anew by its name: the model before it was tuned
        reference = {"ref_model": copy.deepcopy(model).eval().requires_grad_(False)}
    rows = datasets.Dataset.from_list(pairs if objective.paired else judgements(pairs))
    unseen = datasets.Dataset.from_list(held if objective.paired else judgements(held)) if held else None
    arguments = trainer_arguments(setup, model, folder)
    if not objective.paired:
        arguments["per_device_train_batch_size"] *= 2  # a judgement is half a pair
    if not p.dpo_learning_rate:
        arguments["learning_rate"] = setup.learning_rate * SHARE_OF_SFT_RATE
    with quiet():
        trainer = objective.trainer(
            model=model,
            args=objective.config(beta=p.dpo_beta, **objective.settings, **arguments),
            train_dataset=rows,
            eval_dataset=unseen,
            processing_class=tokenizer,
            peft_config=setup.new_adapter(),
            **reference,
        )
    if not setup.full:
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
