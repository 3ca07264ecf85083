"""Rows of text → rows of tokens: what is trained on, what is left out and why, and how well a model predicts it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kit.errors import ModelError
from kit.lake.manifest import Counts
from kit.train.encode.batches import IGNORED, padded_batch, predicted_tokens, summed_loss


@dataclass
class Rows:
    """Encoded rows, and what became of those that cannot be trained on."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0

    def require(self, name: str, stage: str = "50_build_datasets") -> None:
        """Raise `ModelError` when no row is left."""
        if not self.rows:
            gone = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
            raise ModelError(f"the data set of {stage} has no usable {name} row ({gone or 'it is empty'})")

    def counts(self, steps: int, batch: int, parameter: str) -> Counts:
        """Rows in and out of `steps` steps of `batch` rows; the last batch of an epoch may be smaller."""
        kept, dropped = len(self.rows), dict(self.dropped)
        reached = kept if steps >= math.ceil(kept / batch) else steps * batch
        if reached < kept:
            dropped[f"not reached in {parameter}"] = kept - reached
        return Counts(records_in=kept + sum(self.dropped.values()), records_out=reached, dropped=dropped)


def prepare(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    task: str = "completion",
) -> Rows:
    """Encode rows; those with nothing to learn from, which TRL would drop unseen, are counted by reason."""
    prepared = Rows()
    for row in rows:
        if not (row["completion"] or "").strip():
            prepared.dropped["empty"] = prepared.dropped.get("empty", 0) + 1
            continue
        # one more token than fits tells whether something was cut
        longer = encode_row(row, tokenizer, max_tokens + 1, task)
        encoded = {key: values[:max_tokens] for key, values in longer.items()}
        if not counted_tokens(encoded["labels"]):
            prepared.dropped["prompt fills max_tokens"] = (
                prepared.dropped.get("prompt fills max_tokens", 0) + 1
            )
            continue
        prepared.truncated += len(longer["input_ids"]) > max_tokens
        prepared.rows.append(encoded)
    return prepared


SECTION = re.compile(r"^### (Instruction|Context|Answer)\n", re.MULTILINE)


def _as_completion(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    return row.get("prompt") or "", row["completion"]


def _as_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    return "", (row.get("prompt") or "") + row["completion"]


def _as_instruction(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    prompt = row.get("prompt") or ""
    if prompt.strip() and not SECTION.match(prompt):
        prompt = f"### Instruction\n{prompt.strip()}\n\n### Answer\n"
    return prompt, row["completion"].strip()


def _as_chat(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template: task=instruction asks for none")
    asked = SECTION.sub("", row.get("prompt") or "").strip()
    if not asked:
        return "", row["completion"]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["completion"].strip()}]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise ModelError(
            "the chat template writes a question differently once it is answered: use another task"
        )
    # the template has written the tokenizer's first token already
    bos = tokenizer.bos_token or ""
    return prompt.removeprefix(bos) if _adds_bos(tokenizer) else prompt, whole[len(prompt) :].rstrip()


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


TASKS: dict[str, Callable[[dict[str, Any], PreTrainedTokenizerBase], tuple[str, str]]] = {
    "completion": _as_completion,
    "text": _as_text,
    "instruction": _as_instruction,
    "chat": _as_chat,
}
"""How a row becomes (what is given, what is learned)."""


def encode_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_tokens: int, task: str = "completion"
) -> dict[str, list[int]]:
    """One row as `input_ids` and `labels`, at most `max_tokens` long; prompt tokens are `IGNORED` in the
    labels.

    Prompt and completion are tokenised apart, as they are when a person asks, so the model sees in training
    the very prompt tokens it will see then. A row without prompt counts as a whole. The end token closes a
    completion that fits. Raises `ModelError` for a task that the tokenizer cannot do.
    """
    given, learned = TASKS[task](row, tokenizer)
    prompt = tokenizer(given)["input_ids"]
    said = tokenizer(learned, add_special_tokens=False)["input_ids"]
    ends = [] if said[-1:] in ([], [tokenizer.eos_token_id]) else [tokenizer.eos_token_id]
    completion = said + ends
    return {
        "input_ids": (prompt + completion)[:max_tokens],
        "labels": ([IGNORED] * len(prompt) + completion)[:max_tokens],
    }


def counted_tokens(labels: Sequence[int]) -> int:
    """How many tokens of a row are predicted and scored: the first has nothing before it."""
    return sum(label != IGNORED for label in labels[1:])


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, list[int]]],
    batch: int = 4,
) -> tuple[float, int]:
    """exp of the mean negative log-likelihood over the scored tokens of encoded `rows`; and their number.

    One mean over all tokens, not a mean of rows: long rows weigh more, as in training. Raises `ModelError`
    when no token is scored.
    """
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    ordered = sorted(rows, key=lambda r: len(r["input_ids"]))  # like lengths together: less padding
    for start in range(0, len(ordered), batch):
        where = next(model.parameters()).device
        tensors = padded_batch(ordered[start : start + batch], tokenizer.pad_token_id)
        ids, mask, labels = (tensor.to(where) for tensor in tensors)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        # a learned prompt stands before the text
        scored, said = predicted_tokens(logits[:, -ids.shape[1] :], labels)
        total += summed_loss(scored, said).item()
        tokens += len(said)
    model.train(was_training)
    if not tokens:
        raise ModelError("no token to score: the held-out rows are empty, or their prompts fill max_tokens")
    return math.exp(min(total / tokens, 700.0)), tokens
