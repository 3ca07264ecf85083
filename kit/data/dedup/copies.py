"""What the tasks of deduplication do, one after the other, each with arrays of `numpy`: sign, pair, verify, decide.

Between them Spark shuffles a few large arrays in place of many rows. Shingles lie in files beside the parts (8 bytes
a word, swept with the commit), and a task reads those of the documents it compares: what it holds is bounded by
`BATCH_SHINGLES` and by a few numbers a document of its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kit.data.dedup import minhash
from kit.data.engine.spark import plan_parts
from kit.lake.files import PartWriter
from kit.lake.store import Lake
from kit.params import Deduplicate

EXACT = {"url": "same URL", "payload": "same payload", "text": "same text"}
REASONS = (None, *EXACT.values(), "near copy")
ID = "S20"
DOC = np.dtype(
    [("doc_id", ID), ("rank", "i8"), ("time", "i8"), *((x, "u8") for x in EXACT), ("at", "i8"), ("size", "i8")]
)  # fmt: skip
"""A document: the survivor rule's two numbers, hashes (0 = has none), and where its shingles lie."""
KEY = np.dtype([("key", "u8"), ("whole", "u8"), ("id", "u8"), ("doc", "i8")])
"""`doc` is a document's place: group × 2³² + row. `whole` is equal where all LSH keys are; exact keys are odd."""
PAIR = np.dtype([("a", "i8"), ("b", "i8"), ("exact", "?")])
EDGE = np.dtype([*PAIR.descr, ("jaccard", "f8"), ("a_id", ID), ("b_id", ID)])
LABEL = np.dtype([("label", "i8"), ("doc", "i8")])
VERDICT = np.dtype(
    [("doc_id", ID), ("cluster_id", ID), ("survivor", ID), ("reason", "i8"), ("jaccard", "f8"), ("doc", "i8")]
)  # fmt: skip
ALL_PAIRS_UP_TO, COMPANIONS = 40, 8
"""In larger LSH buckets each text is compared with the first few and the next few: all pairs would grow as the square."""
PAIRS_FLOOR = 0.5
"""Verified pairs are told of from this Jaccard index on."""
BATCH_CHARS, BATCH_SHINGLES = 1 << 18, 1 << 22


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
                for batch in pq.ParquetFile(f).iter_batches(1000, columns=[*columns, "drop_reason"]):
                    yield batch.filter(pc.is_null(batch["drop_reason"]))

    def reader(self, kind: str, dtype: Any) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
        """A function that reads `size` items from `at` for each of some documents: all items, and the bounds."""
        dtype = np.dtype(dtype)
        file = lru_cache(64)(lambda group: self.lake.fs.open(self.file(kind, group), "rb"))

        def read(docs: np.ndarray, at: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            bounds = np.concatenate([[0], np.cumsum(size)])
            found = np.empty(bounds[-1], dtype)
            raw, spots = found.view(np.uint8), bounds * dtype.itemsize
            for i in docs.argsort().tolist():
                f = file(int(docs[i]) >> 32)
                f.seek(int(at[i]) * dtype.itemsize)
                f.readinto(raw[spots[i] : spots[i + 1]])
            return found, bounds

        return read

    def records(self, docs: np.ndarray) -> np.ndarray:
        """`DOC` of each document."""
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


def _hashes(values: Iterable[str | None]) -> np.ndarray:
    """64 bits of a hash of each value, 0 where there is none: two are equal by chance once in 10¹⁹."""
    found = [blake2b(v.encode("utf-8", "replace"), digest_size=8).digest() if v else bytes(8) for v in values]
    return np.frombuffer(b"".join(found), np.uint64)


def identity(ids: np.ndarray) -> np.ndarray:
    """64 bits of a hash of each doc_id: an order that does not depend on where a document lies."""
    found = np.zeros(len(ids), np.uint64)
    for word in np.ascontiguousarray(ids).view("<u4").reshape(len(ids), ids.itemsize // 4).T:
        found = minhash.mix(found * np.uint64(31) + word)
    return found


def split_by_share(rows: np.ndarray, shares: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of each share, in their order."""
    order = shares.argsort(kind="stable")
    which, starts = np.unique(shares[order], return_index=True)
    yield from zip(which.tolist(), np.split(rows[order], starts[1:]), strict=False)


def joined(arrays: Iterable[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays])


def rows_of(dtype: np.dtype, **columns: Any) -> np.ndarray:
    made = np.empty(next(len(c) for c in columns.values() if np.ndim(c)), dtype)
    for name, column in columns.items():
        made[name] = column
    return made


def sign(job: PairJob, group: int) -> tuple[np.ndarray, int]:
    """Write the shingles and `DOC`s of a group's documents; `KEY` for each of their keys, LSH and exact ones, and
    how many documents there are.
    """
    p, docs, keys, at, row = job.p, [], [], 0, group << 32
    columns = ["doc_id", "url", "payload_digest", "text", "fetch_time"]
    with job.lake.fs.open(job.file("grams", group), "wb") as f:
        for batch in job.documents(group, [*columns, *(["reviews"] if p.survivor == "richest" else [])]):
            texts = batch["text"].to_pylist()
            made, lengths = np.zeros(len(texts), DOC), [len(t) for t in texts]
            made["doc_id"] = batch["doc_id"].to_pylist()
            # plain lists: some of pyarrow's shorter ways load pandas, 0.2 s in every worker
            made["time"] = [x or 0 for x in batch["fetch_time"].cast(pa.int64()).to_pylist()]
            for kind, column in zip(EXACT, ("url", "payload_digest"), strict=False):
                made[kind] = _hashes(batch[column].to_pylist())
            made["text"] = _hashes(texts)
            if p.survivor == "richest":
                made["rank"] = [-(x or 0) << 40 for x in pc.list_value_length(batch["reviews"]).to_pylist()]
            if p.survivor in ("richest", "longest"):
                made["rank"] -= lengths
            elif p.survivor == "latest":
                made["time"] *= -1
            ids, places = identity(made["doc_id"]), row + np.arange(len(made))
            for share in plan_parts(lengths, BATCH_CHARS):
                grams, bounds = minhash.shingles(texts[share.start : share.stop], p.ngram)
                made["at"][share], made["size"][share] = at + bounds[:-1], np.diff(bounds)
                f.write(grams.tobytes())
                at += len(grams)
                some = np.flatnonzero(np.diff(bounds))
                if len(some):
                    bounds, some = bounds[np.append(some, len(bounds) - 1)], some + share.start
                    bands = minhash.band_keys(grams, bounds, p.buckets, p.hashes_per_bucket, p.seed)
                    whose = {"whole": bands.sum(axis=0), "id": ids[some], "doc": places[some]}
                    keys += [rows_of(KEY, key=band & ~np.uint64(1), **whose) for band in bands]
            for number, kind in enumerate(sorted(set(p.exact) & set(EXACT))):
                some = np.flatnonzero(made[kind])
                key = minhash.mix(made[kind][some] + np.uint64(number)) | np.uint64(1)
                keys.append(rows_of(KEY, key=key, whole=key, id=ids[some], doc=places[some]))
            docs.append(made)
            row += len(made)
    job.lake.fs.pipe_file(job.file("docs", group), joined(docs, DOC).tobytes())
    return joined(keys, KEY), row - (group << 32)


def candidate_pairs(rows: np.ndarray) -> np.ndarray:
    """`PAIR`s of documents that share a key, a before b by the hash of their ids.

    Texts with all LSH keys alike are compared with the first of them, and that one with the others of the bucket.
    """
    rows = rows[rows["key"].argsort()]
    again = rows["key"][1:] == rows["key"][:-1]
    rows = rows[np.append(again, False) | np.append(False, again)]
    rows = rows[np.lexsort((rows["doc"], rows["id"], rows["whole"], rows["key"]))]
    if not len(rows):
        return np.empty(0, PAIR)
    key, whole = rows["key"], rows["whole"]
    new = np.append(True, (key[1:] != key[:-1]) | (whole[1:] != whole[:-1]))
    first = new.nonzero()[0]
    found = [((~new).nonzero()[0], first[np.cumsum(new) - 1][~new])]
    starts = np.append(True, key[first][1:] != key[first][:-1]).nonzero()[0]
    sizes = np.diff(np.append(starts, len(first)))
    for size in np.unique(sizes[(sizes > 1) & (sizes <= ALL_PAIRS_UP_TO)]):
        members = first[starts[sizes == size, None] + np.arange(size)]
        found.append(tuple(members[:, side].ravel() for side in np.triu_indices(size, 1)))
    for start, size in zip(*(x[sizes > ALL_PAIRS_UP_TO].tolist() for x in (starts, sizes)), strict=True):
        members = first[start : start + size]
        for k in range(1, COMPANIONS + 1):
            found += [(members[k:], members[:-k]), (members[k:], np.full(size - k, members[k - 1]))]
    a, b = (np.concatenate(side) for side in zip(*found, strict=True))
    swap = rows["id"][a] > rows["id"][b]
    a, b = np.where(swap, b, a), np.where(swap, a, b)
    return rows_of(PAIR, a=rows["doc"][a], b=rows["doc"][b], exact=key[a] & np.uint64(1))


def verify_pairs(job: PairJob, pairs: np.ndarray) -> tuple[int, np.ndarray]:
    """How many distinct pairs were compared, and an `EDGE` for each that is exact or close enough to be told of."""
    pairs = pairs[np.lexsort((~pairs["exact"], pairs["b"], pairs["a"]))]
    same = (pairs["a"][1:] == pairs["a"][:-1]) & (pairs["b"][1:] == pairs["b"][:-1])
    pairs = pairs[np.append(True, ~same)[: len(pairs)]]
    docs = np.unique(np.concatenate([pairs["a"], pairs["b"]]))
    records, read = job.records(docs), job.reader("grams", np.uint64)
    a, b = docs.searchsorted(pairs["a"]), docs.searchsorted(pairs["b"])
    close = np.zeros(len(pairs))
    for share in plan_parts((records["size"][a] + records["size"][b]).tolist(), BATCH_SHINGLES):
        these = np.unique(np.concatenate([a[share], b[share]]))
        grams, bounds = read(docs[these], records["at"][these], records["size"][these])
        sets = [grams[i:j] for i, j in pairwise(bounds.tolist())]
        ones, others = these.searchsorted(a[share]), these.searchsorted(b[share])
        runs = np.append(np.append(True, ones[1:] != ones[:-1]).nonzero()[0], len(ones)).tolist()
        for i, j in pairwise(runs):
            many = [sets[k] for k in others[i:j].tolist()]
            ends = np.cumsum([0, *map(len, many)])
            at = share.start
            close[at + i : at + j] = minhash.jaccards(sets[ones[i]], np.concatenate(many), ends)
    told = pairs["exact"] | (close >= min(PAIRS_FLOOR, job.p.min_jaccard))
    a_id, b_id = records["doc_id"][a[told]], records["doc_id"][b[told]]
    columns = {name: pairs[name][told] for name in PAIR.names}
    return len(pairs), rows_of(EDGE, **columns, jaccard=close[told], a_id=a_id, b_id=b_id)


def label_components(pairs: np.ndarray) -> np.ndarray:
    """Connected components of few pairs: `LABEL` of each document in one, the label being its least place."""
    docs, ends = np.unique(np.concatenate([pairs["a"], pairs["b"]]), return_inverse=True)
    a, b = ends[: len(pairs)], ends[len(pairs) :]
    least = np.arange(len(docs))
    while (least[a] != least[b]).any():
        low = np.minimum(least[a], least[b])
        # the labels' own labels go down, so a chain settles in about log n rounds
        for end in (least[a], least[b]):
            np.minimum.at(least, end, low)
        while (least[least] != least).any():
            least = least[least]
    return rows_of(LABEL, label=docs[least], doc=docs)


def decide(job: PairJob, labels: np.ndarray) -> np.ndarray:
    """A `VERDICT` on each document of some clusters: the best one stays, and what is a copy of *it* goes.

    What is a copy of a copy only goes on to the next round, so no near copy leaves without a near survivor.
    """
    labels = labels[np.lexsort((labels["doc"], labels["label"]))]
    records, read = job.records(labels["doc"]), job.reader("grams", np.uint64)
    kinds = [kind for kind in EXACT if kind in job.p.exact]
    ids = records["doc_id"]
    made = rows_of(VERDICT, doc_id=ids, survivor=ids, reason=0, jaccard=1.0, doc=labels["doc"])
    for members in np.split(np.arange(len(labels)), np.diff(labels["label"]).nonzero()[0] + 1):
        left = members[np.lexsort([records[x][members] for x in ("doc_id", "time", "rank")])]
        made["cluster_id"][members] = min(ids[members].tolist(), default=b"")
        while len(left) > 1:
            best, others = left[:1], left[1:]
            one = read(labels["doc"][best], records["at"][best], records["size"][best])[0]
            for share in plan_parts(records["size"][others].tolist(), BATCH_SHINGLES):
                some = others[share]
                sets = read(labels["doc"][some], records["at"][some], records["size"][some])
                made["jaccard"][some] = minhash.jaccards(one, *sets)
            reason = np.where(made["jaccard"][others] >= job.p.min_jaccard, len(EXACT) + 1, 0)
            for kind in reversed(kinds):
                alike = (records[kind][others] == records[kind][best]) & (records[kind][others] != 0)
                reason[alike] = 1 + list(EXACT).index(kind)
            made["reason"][others], made["survivor"][others] = reason, ids[best]
            left = others[reason == 0]
            # until their own round says otherwise, they stay
            made["survivor"][left], made["jaccard"][left] = ids[left], 1.0
    return made
