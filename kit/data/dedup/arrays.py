"""The arrays that the tasks of deduplication hand to each other, and what every task knows and can read.

Spark shuffles a few large arrays in place of many rows. Shingles lie in files beside the parts (8 bytes a word, swept
with the commit), and a task reads those of the documents it compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kit.data.dedup import minhash
from kit.lake.files import PartWriter
from kit.lake.store import Lake
from kit.params import Deduplicate

EXACT = {"url": "same URL", "payload": "same payload", "text": "same text"}
REASONS = (None, *EXACT.values(), "near copy")
ID = "S20"
# every array that is shuffled has one of these types: Spark moves it as bytes, and no row becomes a Python object
DOC = np.dtype(
    [
        ("doc_id", ID),
        ("rank", "i8"),
        ("time", "i8"),
        *((kind, "u8") for kind in EXACT),
        ("first_shingle", "i8"),
        ("size", "i8"),
    ]
)
"""A document: the survivor rule's two numbers, hashes (0 = has none), and where its shingles lie in its group's file."""
KEY = np.dtype([("key", "u8"), ("whole", "u8"), ("id", "u8"), ("doc", "i8")])
"""`doc` is a document's place: group × 2³² + row. `whole` is equal where all LSH keys are; exact keys are odd."""
PAIR = np.dtype([("a", "i8"), ("b", "i8"), ("exact", "?")])
EDGE = np.dtype([*PAIR.descr, ("jaccard", "f8"), ("a_id", ID), ("b_id", ID)])
LABEL = np.dtype([("label", "i8"), ("doc", "i8")])
VERDICT = np.dtype(
    [
        ("doc_id", ID),
        ("cluster_id", ID),
        ("survivor", ID),
        ("reason", "i8"),
        ("jaccard", "f8"),
        ("doc", "i8"),
    ]
)
"""What becomes of a document; `reason` counts in `REASONS`, 0 for one that stays."""


@dataclass(frozen=True)
class PairJob:
    """What every task knows: parameters, input parts in groups of a task each, and where to write."""

    p: Deduplicate
    lake: Lake
    writer: PartWriter
    groups: list[list[str]]
    parts: int
    """Output parts: they depend on the number of documents alone."""

    def file(self, kind: str, group: int) -> str:
        """A file that lives until the commit: the lake sweeps what no manifest lists."""
        return f"{self.writer.folder}/{self.writer.attempt}-{kind}-{group}"

    def documents(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The documents of a group that moved on so far, always in the same order."""
        for path in self.groups[group]:
            with self.lake.fs.open(path, "rb") as f:
                # a place counts these rows, so every task must leave out the same ones
                for batch in pq.ParquetFile(f).iter_batches(1000, columns=[*columns, "drop_reason"]):
                    yield batch.filter(pc.is_null(batch["drop_reason"]))

    def reader(self, kind: str, dtype: Any) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
        """A function that reads `size` items from `start` on for each of some documents, three arrays [documents].

        It returns all items, [sum of sizes], and `bounds` [documents + 1]: those of document i lie at
        `bounds[i] : bounds[i + 1]`.
        """
        dtype = np.dtype(dtype)
        # documents of one cluster may lie in many groups; a task keeps at most so many files open
        file = lru_cache(64)(lambda group: self.lake.fs.open(self.file(kind, group), "rb"))

        def read(docs: np.ndarray, start: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            bounds = np.concatenate([[0], np.cumsum(size)])
            items = np.empty(bounds[-1], dtype)
            raw = items.view(np.uint8)
            raw_bounds = bounds * dtype.itemsize
            # in the order of their places, so that a file is read from its beginning to its end
            for i in docs.argsort().tolist():
                group_file = file(int(docs[i]) >> 32)
                group_file.seek(int(start[i]) * dtype.itemsize)
                group_file.readinto(raw[raw_bounds[i] : raw_bounds[i + 1]])
            return items, bounds

        return read

    def records(self, docs: np.ndarray) -> np.ndarray:
        """`DOC` of each document."""
        # the low half of a place is the row within the group's file
        return self.reader("docs", DOC)(docs, docs & 0xFFFFFFFF, np.ones(len(docs), np.int64))[0]

    def pages(self, group: int) -> Iterator[tuple[int, str, str]]:
        """Place, host and text of each document of a group."""
        place = group << 32
        for batch in self.documents(group, ["host", "text"]):
            for host, text in zip(batch["host"].to_pylist(), batch["text"].to_pylist(), strict=True):
                yield place, host or "", text
                place += 1

    def signed(self, group: int) -> np.ndarray:
        """`DOC` of all documents of a group."""
        return np.frombuffer(self.lake.fs.cat_file(self.file("docs", group)), DOC)


def identity(ids: np.ndarray) -> np.ndarray:
    """64 bits of a hash of each doc_id: an order that does not depend on where a document lies."""
    hashes = np.zeros(len(ids), np.uint64)
    # four bytes of all ids at a time; "<" keeps the order the same on a big-endian machine
    for word in np.ascontiguousarray(ids).view("<u4").reshape(len(ids), ids.itemsize // 4).T:
        hashes = minhash.mix(hashes * np.uint64(31) + word)
    return hashes


def split_by_share(rows: np.ndarray, shares: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of each share, in their order."""
    # stable: the order of rows within a share must not hang on how they came in
    order = shares.argsort(kind="stable")
    which, starts = np.unique(shares[order], return_index=True)
    yield from zip(which.tolist(), np.split(rows[order], starts[1:]), strict=False)


def joined(arrays: Iterable[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """All rows of `arrays` one after the other, [rows] of `dtype`; of no array, none."""
    return np.concatenate([np.empty(0, dtype), *arrays])


def rows_of(dtype: np.dtype, **columns: Any) -> np.ndarray:
    """Rows of `dtype` out of its columns, each an array [rows] or one value for all; one at least is an array."""
    rows = np.empty(next(len(c) for c in columns.values() if np.ndim(c)), dtype)
    for name, column in columns.items():
        rows[name] = column
    return rows
