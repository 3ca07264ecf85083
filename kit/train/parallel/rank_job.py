"""What every rank of a job of 63 is told, and the rows that it trains on: the same steps for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

JOB, ROWS, REPORT, START, CHECKPOINT = "job.json", "rows.safetensors", "report.json", "start", "checkpoint"

PAD_TO = 32
"""Rows are padded to a multiple of this: a pipeline has one plan for each length."""


@dataclass(frozen=True)
class RankJob:
    """What every rank is told. A step trains on `rows` rows, in `accumulation` passes; `tensor` ranks share a layer."""

    strategy: str
    rows: int
    accumulation: int = 1
    tensor: int = 1
    steps: int = 1
    check_steps: int = 0
    learning_rate: float = 1e-4
    dtype: str = "float32"
    threads: int = 1
    seed: int = 0
    timeout_s: float = 300.0


Batch = dict[str, torch.Tensor]


def steps_of(lengths: Sequence[int], rows: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The rows of each step: shuffled every epoch, neighbours in length together, the longest of a step first.

    What does not fill a step at the end of an epoch comes in the next one, shuffled anew.
    """
    draw, given = torch.Generator().manual_seed(seed), 0
    while given < steps:
        order = torch.randperm(len(lengths), generator=draw).tolist()
        # sorted within windows of eight steps: less padding, and still other neighbours in every epoch
        window = rows * 8
        groups = []
        for start in range(0, len(order), window):
            by_length = sorted(order[start : start + window], key=lambda i: -lengths[i])
            groups += [by_length[i : i + rows] for i in range(0, len(by_length), rows)]
        groups = [g for g in groups if len(g) == rows]
        if not groups:
            raise ValueError(f"{len(lengths)} rows do not fill a step of {rows}")
        for i in torch.randperm(len(groups), generator=draw).tolist()[: steps - given]:
            yield groups[i]
            given += 1


def padded_length(length: int) -> int:
    """The length that a batch is given whose longest row has `length` tokens."""
    return -(-length // PAD_TO) * PAD_TO


class Data:
    """The encoded rows of a job: `input_ids` one behind the other, their `lengths`, and `labels`."""

    def __init__(self, path: Path, device: torch.device) -> None:
        held = load_file(path)
        self.lengths, self.labels, self.device = held["lengths"].tolist(), held["labels"], device
        self.ids = held["input_ids"].split(self.lengths)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Rows as [rows, length] tensors, padded to a multiple of `PAD_TO`."""
        length = padded_length(max(self.lengths[i] for i in rows))
        ids, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
        for row, i in enumerate(rows):
            ids[row, : self.lengths[i]], mask[row, : self.lengths[i]] = self.ids[i], 1
        tensors = {"input_ids": ids, "attention_mask": mask, "labels": self.labels[list(rows)]}
        return {name: value.to(self.device) for name, value in tensors.items()}


def save_rows(path: Path, rows: Sequence[Sequence[int]], labels: Sequence[int]) -> None:
    """Write encoded rows for `Data`."""
    save_file(
        {
            "input_ids": torch.tensor([t for row in rows for t in row]),
            "lengths": torch.tensor([len(row) for row in rows]),
            "labels": torch.tensor(labels),
        },
        path,
    )
