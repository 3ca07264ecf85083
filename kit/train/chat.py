"""Questions to a model in this process: answers in batches, and choices between A and B as log-odds."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from kit.train import models

Turn = dict[str, str]
"""`{"role", "content"}`."""
BATCH = 8
"""Texts at once."""
TOO_LONG = "longer than the model reads"


@dataclass
class Call:
    """One request and what became of it; seconds are measured (of a batch: its share), tokens None if untold."""

    role: str
    model: str
    prompt: str
    reply: str = ""
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    seconds: float = 0.0
    attempt: int = 1
    error: str = ""


class InProcess:
    """A model loaded here, and the log of what it was asked; the same seed and threads give the same replies."""

    gives_odds = True
    """Its judgements are no mere letters, so its liking of a letter can be measured and taken off."""

    def __init__(self, name: str, *, dtype: str, trust_remote_code: bool, seed: int) -> None:
        self.name, self.seed = name, seed
        self.tokenizer = models.load_tokenizer(name, trust_remote_code=trust_remote_code)
        self.model = models.load_model(name, dtype=dtype, trust_remote_code=trust_remote_code).eval()
        self.what_ran = models.describe(self.model)
        special = sorted(self.tokenizer.all_special_tokens, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)))
        self.calls: list[Call] = []

    def ask(
        self, role: str, chats: Sequence[list[Turn]], tokens: int, temperature: float, bar: Any
    ) -> list[tuple[str, str]]:
        """(reply, error) for each chat, in order; temperature 0 is greedy."""
        texts = [self._text(chat) for chat in chats]
        found = [("", TOO_LONG)] * len(texts)
        for i, new, _, call in self._generate(
            role, texts, [self._ids(t) for t in texts], tokens, temperature
        ):
            call.reply = self.tokenizer.decode(new, skip_special_tokens=True).strip()
            call.reply_tokens = len([t for t in new if t != self.tokenizer.pad_token_id])
            found[i] = (call.reply, "")
            bar.update()
        return found

    def judge(self, chats: Sequence[list[Turn]], begun: str, bar: Any) -> list[tuple[float | None, str]]:
        """(log-odds of A over B, error): the next word of an answer that was `begun`, for each chat."""
        texts = [self._text(chat, begun) for chat in chats]
        both = [(self._ids(f"{t} A"), self._ids(f"{t} B")) for t in texts]
        # tokenizers differ in what they join to a letter: the first token is compared by which the two differ
        at = [
            next(i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]) for a, b in both
        ]
        ids = [a[:n] for (a, _), n in zip(both, at, strict=True)]
        found: list[tuple[float | None, str]] = [(None, TOO_LONG)] * len(texts)
        for i, _, logits, call in self._generate("judge", texts, ids, 1, 0.0):
            a, b = (logits[side[at[i]]].item() for side in both[i])
            call.reply = f"A over B: {a - b:+.3f}"
            found[i] = (a - b, "")
            bar.update()
        return found

    def length(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text)["input_ids"])

    def _text(self, turns: list[Turn], begun: str = "") -> str:
        # text from the web must not open a turn of its own
        turns = [{**t, "content": self.special.sub(" ", t["content"])} for t in turns]
        if self.tokenizer.chat_template:
            return (
                self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + begun
            )
        told = "".join(
            f"{'Human' if t['role'] == 'user' else 'Assistant'}: {t['content']}\n\n" for t in turns
        )
        return f"{told}Assistant: {begun}".rstrip()

    def _ids(self, text: str) -> list[int]:
        # a chat template has written the tokenizer's first token already
        return self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template)["input_ids"]

    @torch.no_grad()
    def _generate(
        self, role: str, texts: list[str], ids: list[list[int]], tokens: int, temperature: float
    ) -> Iterator[tuple[int, list[int], torch.Tensor, Call]]:
        """Number of a text, its new tokens, the first logits and its entry in the log; too long ones are left out."""
        sampled = {"do_sample": True, "temperature": temperature, "top_p": 0.95}
        config = GenerationConfig(
            max_new_tokens=tokens,
            repetition_penalty=1.1 if tokens > 1 else 1.0,  # a small model repeats itself without it
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            output_logits=tokens == 1,
            return_dict_in_generate=True,
            **(sampled if temperature else {"do_sample": False}),
        )
        longest = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        fits = [
            i for i in sorted(range(len(ids)), key=lambda i: len(ids[i])) if len(ids[i]) + tokens <= longest
        ]
        for i in set(range(len(ids))) - set(fits):
            self.calls.append(Call(role, self.name, texts[i], prompt_tokens=len(ids[i]), error=TOO_LONG))
        torch.manual_seed(self.seed)
        for start in range(0, len(fits), BATCH):  # like lengths together: less padding
            batch, began = fits[start : start + BATCH], time.perf_counter()
            width = max(len(ids[i]) for i in batch)
            gaps = [width - len(ids[i]) for i in batch]
            padded = [[self.tokenizer.pad_token_id] * g + ids[i] for i, g in zip(batch, gaps, strict=True)]
            out = self.model.generate(
                input_ids=torch.tensor(padded, device=self.model.device),
                attention_mask=torch.tensor([[0] * g + [1] * (width - g) for g in gaps]).to(
                    self.model.device
                ),
                generation_config=config,
            )
            seconds = (time.perf_counter() - began) / len(batch)
            for n, i in enumerate(batch):
                call = Call(role, self.name, texts[i], prompt_tokens=len(ids[i]), seconds=seconds)
                self.calls.append(call)
                yield (
                    i,
                    out.sequences[n, width:].tolist(),
                    out.logits[0][n].float() if out.logits else None,
                    call,
                )
