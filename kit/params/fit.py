"""What a stage trains, in named fields: how many rows at a time, of how many texts, for how many steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """One model, or adapter of one, that a stage trains; a stage that trains two says two of them.

    `rows`: of one forward and backward pass, each of `texts` texts (a pair has two) of at most `tokens` tokens, prompt
    included. `steps`: optimizer steps, each of `accumulation` passes. `batch_field`, `tokens_field`: the parameters that
    set `rows` and `tokens`, for whoever has to name them. `learning_rate`: its peak, 0 = the method's own. `fill_memory`: `rows` is the most that a
    pass is worth, and the free memory decides. `reference`: every text also passes through the model as it was.
    `judged`: it passes through a reward model, too, which stays in memory. `written`: tokens of a text that the model
    writes itself before it learns from them. `checkpoint_steps`: steps between checkpoints, 0 = none.
    """

    name: str
    rows: int
    steps: int
    batch_field: str
    tokens: int
    learning_rate: float
    texts: int = 1
    accumulation: int = 1
    tokens_field: str = "max_tokens"
    fill_memory: bool = False
    reference: bool = False
    judged: bool = False
    written: int = 0
    checkpoint_steps: int = 0

    @property
    def pass_texts(self) -> int:
        """Texts of one forward and backward pass."""
        return self.rows * self.texts

    @property
    def step_rows(self) -> int:
        """Rows that one optimizer step has seen."""
        return self.rows * self.accumulation

    @property
    def all_tokens(self) -> int:
        """Tokens of the whole training, were every text as long as it may be."""
        return self.steps * self.step_rows * self.texts * self.tokens
