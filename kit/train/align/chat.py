"""Questions to a model in this process: answers in batches, and choices between A and B as log-odds."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kit.train.models import load
from kit.train.models.describe import describe
from kit.train.models.generate import for_readers, generate

Turn = dict[str, str]  # {"role", "content"}
BATCH, BEGUN, TOO_LONG = 8, "The better one is Text", "longer than the model reads"


@dataclass
class Call:
    """One request and what became of it: seconds are a batch's share, tokens None if untold, log-odds."""

    role: str
    model: str
    prompt: str
    reply: str = ""
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    seconds: float = 0.0
    attempts: int = 1
    odds: float | None = None
    error: str = ""


class InProcess:
    """A model loaded here and its log of requests; the same seed and threads give the same replies."""

    gives_odds = True  # so a liking of a letter can be measured, and taken off

    def __init__(self, name: str, *, dtype: str, trust_remote_code: bool, seed: int) -> None:
        self.name, self.seed = name, seed
        self.tokenizer = load.load_tokenizer(name, trust_remote_code=trust_remote_code)
        self.model = load.load_model(name, dtype=dtype, trust_remote_code=trust_remote_code).eval()
        self.what_ran = describe(self.model)
        special = sorted(self.tokenizer.all_special_tokens, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)))
        self.length = lambda text: len(self.tokenizer(text)["input_ids"])
        self.calls: list[Call] = []

    def ask(self, role: str, chats: Sequence[list[Turn]], tokens: int, temperature: float, bar: Any) -> list:
        """(reply, error) for each chat, in order; temperature 0 is greedy."""
        calls = self._run(role, [self._ids(chat) for chat in chats], tokens, temperature, bar)
        return [(call.reply, call.error) for call in calls]

    def judge(self, chats: Sequence[list[Turn]], bar: Any) -> list[tuple[float | None, str]]:
        """(log-odds of A over B as the next word of an answer that is begun, error) for each chat."""
        begun, letters = [], []
        for chat in chats:
            a, b = (self._ids(chat, f"{BEGUN} {letter}") for letter in "AB")
            # tokenizers differ in what they join to a letter: compared is the first token that differs
            first_different = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
            begun.append(a[:first_different])
            letters.append([a[first_different], b[first_different]])
        return [(call.odds, call.error) for call in self._run("judge", begun, 1, 0.0, bar, letters)]

    def _ids(self, turns: Sequence[Turn], begun: str = "") -> list[int]:
        # text from the web must not open a turn of its own
        turns = [{**turn, "content": self.special.sub(" ", turn["content"])} for turn in turns]
        if self.tokenizer.chat_template:  # writes the tokenizer's first token, too
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text + begun, add_special_tokens=False)["input_ids"]
        said = "".join(f"{turn['role'].title()}: {turn['content']}\n\n" for turn in turns)
        return self.tokenizer(f"{said}Assistant: {begun}".rstrip())["input_ids"]

    def _run(
        self, role: str, ids: list[list[int]], tokens: int, temperature: float, bar: Any, letters: Any = ()
    ) -> list[Call]:
        """What became of each text, in order; with `letters`, the log-odds of its two tokens to come next."""
        calls = [
            Call(role, self.name, self.tokenizer.decode(prompt), prompt_tokens=len(prompt)) for prompt in ids
        ]
        self.calls += calls
        pad = self.tokenizer.pad_token_id
        settings = for_readers(self.tokenizer, temperature)
        if letters:  # a letter that the question names may be the answer: no penalty for that
            settings["repetition_penalty"] = 1.0
        longest = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # like lengths together: less padding
        fits = [i for i in order if len(ids[i]) + tokens <= longest]
        for i in order[len(fits) :]:
            calls[i].error = TOO_LONG
        torch.manual_seed(self.seed)
        for start in range(0, len(fits), BATCH):
            batch, began = fits[start : start + BATCH], time.perf_counter()
            prompts = [ids[i] for i in batch]
            written = generate(
                self.model, self.tokenizer, prompts, tokens, first_logits=bool(letters), **settings
            )
            seconds = (time.perf_counter() - began) / len(batch)
            for n, i in enumerate(batch):
                call, new = calls[i], written.tokens[n]
                call.reply = self.tokenizer.decode(new, skip_special_tokens=True).strip()
                call.reply_tokens, call.seconds = len(new) - new.count(pad), seconds
                if letters:
                    a, b = written.first_logits[n, letters[i]].tolist()
                    call.odds = a - b
                bar.update()
        return calls
