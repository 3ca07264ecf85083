"""71: comparisons → a model that gives a text one number, its reward → a policy that writes for that number.

Only differences mean something: P(a better than b) = sigmoid(r_a - r_b) (Bradley and Terry 1952; Ouyang et
al. 2022). Where the better text is the longer one, a model may be right by counting: so it reads equally many
tokens of either.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from kit.errors import ModelError
from kit.lake.manifest import Manifest
from kit.lake.store import Lake
from kit.params import RewardAndPolicy
from kit.params.fit import Fit
from kit.progress import progress
from kit.train.align.preference import usable
from kit.train.align.trust import calibration, hacking, repetition, wilson
from kit.train.encode.encode import Rows, perplexity, prepare
from kit.train.loop.meter import Metered, steps_table
from kit.train.loop.run import quiet, run_training
from kit.train.models import adapters, load
from kit.train.models.methods import METHODS
from kit.train.plan.fit import require_fit
from kit.train.plan.setup import Setup, resolve_setup, trainer_arguments

FEWEST = 4  # pairs: with 4 right of 4, the Wilson interval leaves out a coin's 1/2 for the first time
ANSWERS = 2  # to each held-out prompt, before and after


class Sampled(Metered):
    """A trainer whose batches are prompts: answers are sampled first, then metered and trained on."""

    def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        model.train()
        return super().training_step(model, self._prepare_inputs(inputs), *args)

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        batch = inputs if isinstance(inputs, dict) else super()._prepare_inputs(inputs)
        return {**batch, "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)}


class RewardModelTrainer(Metered, RewardTrainer):
    """TRL's trainer for rewards, metered."""


class GroupTrainer(Sampled, GRPOTrainer):
    """An answer's reward against the mean of its group (Shao et al. 2024), metered."""


class LeaveOneOutTrainer(Sampled, RLOOTrainer):
    """An answer's reward against the mean of the others (Ahmadian et al. 2024), metered."""


OBJECTIVES = {"grpo": (GroupTrainer, GRPOConfig), "rloo": (LeaveOneOutTrainer, RLOOConfig)}


def untrained(base: PreTrainedModel, pad: int) -> PreTrainedModel:
    """`base` with a head of zeros for its vocabulary: all rewards 0, first loss ln 2, no chance."""
    base.config.num_labels, base.config.pad_token_id = 1, pad  # the last token that is no padding is read
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(base.config)
    setattr(model, model.base_model_prefix, base.base_model)
    model.score = torch.nn.Linear(model.score.in_features, 1, bias=False, device=base.device)
    model.score.register_forward_pre_hook(lambda _, args: (args[0].float(),))  # its type, see `widen_trained`
    torch.nn.init.zeros_(model.score.weight)
    vars(model).update({k: v for k, v in vars(base).items() if "quantiz" in k or "loaded_in" in k})
    return model


class Judge:
    """A reward model and its tokenizer; TRL calls it with answers, and it remembers them."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.__name__, self.seen = model.eval(), tokenizer, "reward_model", []

    @torch.no_grad()
    def rewards(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """The reward of each encoded text."""
        batch = self.tokenizer.pad({"input_ids": list(texts)}, padding_side="right", return_tensors="pt")
        return self.model(**batch.to(self.model.device), use_cache=False).logits[:, 0].float().tolist()

    def __call__(self, prompts: list, completions: list, completion_ids: list, **kw: Any) -> list[float]:
        """One reward an answer, of prompt and answer encoded as `prepare_pairs` does."""
        ids = [[t for t in answer if t not in self.tokenizer.all_special_ids] for answer in completion_ids]
        rewards = self.rewards([self.tokenizer(q)["input_ids"] + a for q, a in zip(prompts, ids)])
        for q, text, raw, a, r in zip(prompts, completions, completion_ids, ids, rewards):
            seen = {"prompt": q, "answer": text, "reward": r, "length": len(a), "repetition": repetition(a)}
            self.seen.append({**seen, "cut": float(self.tokenizer.eos_token_id not in raw)})
        kw["log_metric"]("repetition", fmean(repetition(a) for a in ids))
        return rewards


def prepare_pairs(given: Sequence, tokenizer: Any, tokens: int, split: str, most: int | None = None) -> Rows:
    """Usable pairs as `chosen_ids` and `rejected_ids`, at most `tokens` long; raises `ModelError`."""
    # cut here, without end token: TRL drops longer pairs, trains with that token, judges answers without it
    pairs = usable(given, tokenizer, tokens, split)
    pairs.rows = pairs.rows[:most]
    for row in pairs.rows:
        row["lengths"] = [len(row["chosen"]), len(row["rejected"])]
        for side in ("chosen", "rejected"):
            text = tokenizer(row.pop(side), add_special_tokens=False)["input_ids"]
            row[f"{side}_ids"] = (tokenizer(row["prompt"] or "")["input_ids"] + text)[:tokens]
    if len(pairs.rows) < FEWEST:
        few = f"{len(pairs.rows)} usable {split} pairs (dropped: {pairs.dropped or 'none'})"
        raise ModelError(f"50_build_datasets has {few}, a reward model needs {FEWEST}")
    return pairs


def train_reward(
    setup: Setup, tokenizer: Any, pairs: Rows, folder: Path, planned_seconds: float
) -> tuple[Any, dict[str, Any]]:
    """The trainer, and the metrics, of a reward model fitted to `pairs`; `folder` is for its log."""
    model = untrained(setup.model(), tokenizer.pad_token_id)
    adapter = setup.new_adapter()
    adapter.task_type = TaskType.SEQ_CLS
    adapter.modules_to_save = ["score"]
    # pairs leave the mean open (Eisenstein et al. 2023)
    args = RewardConfig(center_rewards_coefficient=0.01, **trainer_arguments(setup, model, folder))
    rows = Dataset.from_list(pairs.rows)
    with quiet():
        trainer = RewardModelTrainer(
            model, args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter
        )
    adapters.widen_trained(trainer.model)
    return trainer, run_training(trainer, "reward model", planned_seconds)


def reward_scores(judge: Judge, held: Rows) -> dict[str, Any]:
    """How good a reward model is on unseen pairs; lengths are those of the whole texts, in characters."""
    sides = [(tuple(pair["chosen_ids"]), tuple(pair["rejected_ids"])) for pair in held.rows]
    known = {text: 0.0 for pair in sides for text in pair}  # pairs share texts: each is read once
    with progress(len(known), "held-out texts", "texts") as bar:
        for text in known:
            known[text] = judge.rewards([text])[0]
            bar.update()
    rewards, lengths = [[known[t] for t in pair] for pair in sides], [pair["lengths"] for pair in held.rows]
    margins, varied = [chosen - rejected for chosen, rejected in rewards], np.std(rewards) * np.std(lengths)
    return {
        "pairs": len(margins),
        "texts": len(known),
        "accuracy": fmean(m > 0 for m in margins),
        "interval": wilson(sum(m > 0 for m in margins), len(margins)),
        "longer_wins": fmean(chosen > rejected for chosen, rejected in lengths),
        "length_correlation": float(np.corrcoef(np.ravel(rewards), np.ravel(lengths))[0, 1])
        if varied
        else 0.0,
        **calibration(margins),
    }


def prepare_prompts(rows: Sequence[Mapping], tokenizer: Any, policy: Fit, least: int) -> Dataset:
    """Distinct prompts that leave room for an answer in what the reward model reads; raises `ModelError`."""
    room = policy.tokens - policy.written
    asked = dict.fromkeys(r["prompt"] for r in rows if (r["prompt"] or "").strip())
    kept = [{"prompt": q} for q in asked if len(tokenizer(q)["input_ids"]) <= room]
    if len(kept) < least:  # TRL would leave an incomplete batch out, and train on nothing
        of = f"{len(kept)} of {len(asked)} distinct prompts have at most {room} tokens, a step needs {least}"
        raise ModelError(f"{of}: lower policy_prompts or policy_tokens, or raise reward_tokens")
    return Dataset.from_list(kept)


def build_policy(
    p: RewardAndPolicy, setup: Setup, model: Any, judge: Judge, asked: Sequence[Dataset], folder: Path
) -> Any:
    """The TRL trainer for `p`; `model` becomes policy and, with its new adapter off, reference."""
    trainer_class, config = OBJECTIVES[p.policy_objective]
    arguments = trainer_arguments(setup, model, folder)
    del arguments["max_length"]  # TRL's trainers that sample have none
    arguments["per_device_train_batch_size"] = setup.fit.pass_texts  # they count answers, not prompts
    args = config(
        disable_dropout=True,
        per_device_eval_batch_size=10 * ANSWERS,
        num_generations=setup.fit.texts,
        num_generations_eval=ANSWERS,
        max_completion_length=setup.fit.written,
        num_iterations=p.policy_iterations,
        beta=p.policy_kl_beta,
        epsilon=p.policy_clip,
        **arguments,
    )
    with quiet():
        trainer = trainer_class(
            model,
            judge,
            args,
            train_dataset=asked[0],
            eval_dataset=asked[1],
            processing_class=judge.tokenizer,
            peft_config=setup.new_adapter(),
        )
    adapters.widen_trained(trainer.model)
    return trainer


def measure_policy(
    trainer: Any, judge: Judge, held: Rows, seed: int, when: str
) -> tuple[dict[str, float], list]:
    """Means over `ANSWERS` to each held-out prompt, drawn with the same seed every time; and the answers."""
    judge.seen, batches = [], trainer.get_eval_dataloader()
    torch.manual_seed(seed)
    trainer.model.eval()
    with quiet(), torch.no_grad(), progress(len(batches), "held-out answers", "batches") as bar:
        for batch in batches:
            trainer._prepare_inputs(batch)  # writes answers and has them judged
            bar.update()
    means = {k: fmean(s[k] for s in judge.seen) for k in ("reward", "length", "repetition", "cut")}
    means["perplexity"] = perplexity(trainer.model, judge.tokenizer, held.rows)[0]
    return means, [{"when": when} | s for s in judge.seen]


def reward_and_policy(p: RewardAndPolicy, lake: Lake) -> Manifest:
    """Train a reward model on the pairs of 50, and the model of 60 against it; commit `reward/` and `model/`.

    The policy's adapter goes on top of 60's. Every step's reward, KL, clipped share, length, repetition:
    tables `*_steps`. Counts: train pairs in; out those trained on. Raises `ModelError` for what it cannot
    do, and a first KL that is not 0.
    """
    load.set_threads(p.threads)
    reward, policy = (resolve_setup(p, fit) for fit in p.fits())
    if not isinstance(reward.adapter, LoraConfig):
        raise ModelError(f"71 trains low-rank adapters, not method={p.method}: lora, qlora or dora")
    with lake.stage(p) as out, tempfile.TemporaryDirectory(prefix="kit-reward-") as temp:
        data, tuned = out.read("50_build_datasets"), out.read("60_finetune_sft")
        if not METHODS[below := tuned.params["method"]].merges:
            raise ModelError(f"no policy goes on top of method={below}: run 60 with method=lora")
        given, *rows = (lake.table(data, t).to_pylist() for t in ("preferences", "train", "heldout"))
        tokenizer = reward.tokenizer()
        pairs = prepare_pairs(given, tokenizer, reward.fit.tokens, "train")
        unseen = prepare_pairs(given, tokenizer, reward.fit.tokens, "heldout", p.reward_eval_pairs)
        asked = [
            prepare_prompts(r, tokenizer, policy.fit, n) for r, n in zip(rows, (policy.fit.step_rows, 1))
        ]
        held = prepare(rows[1][: p.eval_rows], tokenizer, p.max_tokens)
        # both before the first is trained for nothing
        reward_plan, policy_plan = (require_fit(s, rows_tokens=[s.fit.tokens]) for s in (reward, policy))
        fitted, learned = train_reward(reward, tokenizer, pairs, Path(temp, "r"), reward_plan.seconds)
        judge = Judge(fitted.model, tokenizer)
        learned |= reward_scores(judge, unseen)
        model = policy.model(adapters=[lake.local_folder(tuned, "model")])
        trainer = build_policy(p, policy, model, judge, asked, Path(temp, "p"))
        before, first = measure_policy(trainer, judge, held, p.seed, "before")
        ran = run_training(trainer, f"policy {p.policy_objective}", policy_plan.seconds)
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        if abs(first_kl := steps[0].get("kl", 0.0)) > 1e-3:
            raise ModelError(f"the first KL is {first_kl:.4f}: the reference is not the tuned model")
        after, last = measure_policy(trainer, judge, held, p.seed, "after")
        for name, trained in (("reward", fitted), ("model", trainer)):
            folder = Path(temp, name)
            adapters.save_adapter(trained.model, folder, policy.base_model, policy.quantization)
            out.folder(name, folder)
            out.table(f"{name}_steps", steps_table(trained), measured=True)
        out.rows("answers", first + last)
        hacked = hacking(before, after)
        metrics = {"reward_model": learned, "policy": told_of_policy(p, policy, ran, steps, hacked)}
        counts = pairs.counts(reward.fit.steps, reward.fit.step_rows, "reward_steps")
        return out.commit(counts, metrics | {"hacked": hacked, "before": before, "after": after})


def told_of_policy(
    p: RewardAndPolicy, policy: Setup, ran: dict[str, Any], steps: Sequence[Mapping], hacked: Sequence[str]
) -> dict[str, Any]:
    """The policy's metrics with its reference and how many steps taught nothing; prints what a person must know."""
    reference = "the tuned model, new adapter off" if policy.fit.reference else "none, policy_kl_beta is 0"
    flat = sum(step.get("frac_reward_zero_std") == 1 for step in steps)
    ran["what_ran"] |= {"reference": reference, "objective": p.policy_objective}
    ran["flops_convention"] += "; sampling, reference and reward model not counted"
    print(f"reference: {reference}; reward hacking: {', '.join(hacked) or 'no sign'}")
    print(f"all rewards equal in {flat} of {len(steps)} steps")
    return ran | {"flat_steps": flat}
