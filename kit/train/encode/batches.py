"""Encoded rows as tensors: padded, packed, and which of their positions predict a token that counts.

Needs torch alone, so that a bare GPU machine can use it. An encoded row is `{"input_ids", "labels"}`, two lists of as
many integers; a packed one says in `seq_lengths` how many tokens each of its documents has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

IGNORED = -100
"""Label of a token that the loss leaves out: prompt and padding (the value torch and TRL use)."""


def padded_batch(
    rows: Sequence[Mapping[str, list[int]]], pad: int, length: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encoded rows as int64 tensors [rows, longest, or `length`]: ids, attention mask, labels; padded on the right."""
    longest = length or max(len(r["input_ids"]) for r in rows)
    gaps = [longest - len(r["input_ids"]) for r in rows]
    ids = torch.tensor([r["input_ids"] + [pad] * gap for r, gap in zip(rows, gaps, strict=True)])
    labels = torch.tensor([r["labels"] + [IGNORED] * gap for r, gap in zip(rows, gaps, strict=True)])
    mask = torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps])
    return ids, mask, labels


def collate_packed(
    rows: Sequence[Mapping[str, list[int]]], pad: int, length: int = 0
) -> dict[str, torch.Tensor]:
    """Packed rows as int64 tensors [rows, longest, or `length`]: ids, labels, positions.

    Positions begin anew with each document and there is no attention mask: that is how transformers knows where one
    ends. A row stays a row; TRL's own collator strings a batch into one, whose attention mask is quadratic in all of
    it where no flash kernel runs. A document's first token, and padding, is not predicted.
    """
    ids, _, labels = padded_batch(rows, pad, length)
    positions = torch.zeros_like(ids)
    for row, packed in zip(positions, rows, strict=True):
        row[: len(packed["input_ids"])] = torch.cat([torch.arange(n) for n in packed["seq_lengths"]])
    labels[positions == 0] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def packed_lengths(positions: torch.Tensor) -> torch.Tensor:
    """Lengths of the documents in `collate_packed`'s rows; a document has two tokens at least, padding none."""
    ends = torch.nn.functional.pad(positions[:, 1:], (0, 1)) == 0
    lengths = positions[ends] + 1
    return lengths[lengths > 1]


def predicted_tokens(values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`values` [n, …] at the position before every token that counts, and these tokens [n].

    Of `values` [rows, length, …] (logits, or hidden states) and `labels` [rows, length], on the same device. What stands
    before the first token predicts nothing that is known.
    """
    counted = labels[:, 1:] != IGNORED
    return values[:, :-1][counted], labels[:, 1:][counted]


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Σ −log p(label) in nats, a float32 scalar, of logits [n, vocabulary] and labels [n]; `IGNORED` ones add nothing.

    Only what is scored is widened to float32: the vocabulary is large.
    """
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED)
