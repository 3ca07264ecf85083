"""Text that a model writes after prompts, a batch at a time: 72's replies, 73's own texts, 74's and 90's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

REPETITION_PENALTY = 1.1
"""For text that people read: a small model repeats itself without it (Keskar et al. 2019, CTRL, take 1.2)."""
NUCLEUS = 0.95
"""Share of the probability that is drawn from; the tail holds most of the slips (Holtzman et al. 2020)."""


@dataclass(frozen=True)
class Written:
    """What one batch became.

    `tokens`: of each row what came after its prompt, as long as the longest row, filled with the padding token.
    `first_logits`: [rows, vocabulary] of the first token to come, in the model's type; None unless asked for.
    """

    tokens: list[list[int]]
    first_logits: torch.Tensor | None = None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    first_logits: bool = False,
    **settings: Any,
) -> Written:
    """Continue encoded `prompts` (token ids, of any lengths) as one batch, with the model in evaluation mode.

    `settings` are those of `GenerationConfig`; what they leave open is as the model's own settings have it. Random
    numbers come from torch's global generator: seed it before, for the same text again. The model's mode is given back.
    """
    pad = tokenizer.pad_token_id
    rows = [torch.tensor(prompt) for prompt in prompts]
    # on the left, so that the first new token stands right behind the prompt in every row: [rows, longest prompt]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(model.device)
    # by length and not by token: where padding is the end token, one inside a prompt is text
    ones = [torch.ones_like(row) for row in rows]
    mask = pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left").to(model.device)
    was_training = model.training
    model.eval()
    whole = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            pad_token_id=pad,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_logits=first_logits,
            **settings,
        ),
    )
    model.train(was_training)
    return Written(
        whole.sequences[:, ids.shape[1] :].tolist(),
        whole.logits[0] if first_logits else None,
    )


def for_readers(tokenizer: PreTrainedTokenizerBase, temperature: float) -> dict[str, Any]:
    """Settings of `generate` for text that people read; temperature 0 takes the likeliest token each time."""
    drawn = {"do_sample": True, "temperature": temperature, "top_p": NUCLEUS}
    return {
        "repetition_penalty": REPETITION_PENALTY,
        "eos_token_id": tokenizer.eos_token_id,
        **(drawn if temperature else {"do_sample": False}),
    }
