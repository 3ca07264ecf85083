"""What the tasks of deduplication do, one after the other, each with arrays of `numpy`: sign, pair, verify, decide.

What a task holds is bounded by `BATCH_SHINGLES` and by a few numbers a document of its share.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kit.data.dedup import minhash
from kit.data.dedup.arrays import (
    DOC,
    EDGE,
    EXACT,
    KEY,
    LABEL,
    PAIR,
    VERDICT,
    PairJob,
    identity,
    joined,
    rows_of,
)
from kit.data.engine.spark import plan_parts
from kit.params import Deduplicate

ALL_PAIRS_UP_TO, COMPANIONS = 40, 8
"""In larger LSH buckets each text is compared with the first few and the next few: all pairs would grow as the square."""
PAIRS_FLOOR = 0.5
"""Verified pairs are told of from this Jaccard index on."""
# what a task holds at a time: characters of texts that are signed, shingles of 8 bytes that are compared (32 MB)
BATCH_CHARS, BATCH_SHINGLES = 1 << 18, 1 << 22


def _hashes(values: Iterable[str | None]) -> np.ndarray:
    """64 bits of a hash of each value, 0 where there is none: two are equal by chance once in 10¹⁹."""
    # "replace": a page may hold half of a surrogate pair, which has no UTF-8
    digests = [
        blake2b(v.encode("utf-8", "replace"), digest_size=8).digest() if v else bytes(8) for v in values
    ]
    return np.frombuffer(b"".join(digests), np.uint64)


def sign(job: PairJob, group: int) -> tuple[np.ndarray, int]:
    """Write the shingles and `DOC`s of a group's documents; `KEY` for each of their keys, LSH and exact ones, and
    how many documents there are.
    """
    p = job.p
    docs: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    first_place = place = group << 32
    n_shingles = 0
    columns = ["doc_id", "url", "payload_digest", "text", "fetch_time"]
    with job.lake.fs.open(job.file("grams", group), "wb") as f:
        for batch in job.documents(group, [*columns, *(["reviews"] if p.survivor == "richest" else [])]):
            rows, texts = _described(batch, p)
            ids, places = identity(rows["doc_id"]), place + np.arange(len(rows))

            # near copies: the shingles of some texts at a time, and a key for each band of each text
            for share in plan_parts([len(text) for text in texts], BATCH_CHARS):
                grams, bounds = minhash.shingles(texts[share.start : share.stop], p.ngram)
                rows["first_shingle"][share], rows["size"][share] = n_shingles + bounds[:-1], np.diff(bounds)
                f.write(grams.tobytes())
                n_shingles += len(grams)
                # a text without a word has no shingle and no near copy
                some = np.flatnonzero(np.diff(bounds))
                if len(some):
                    bounds, some = bounds[np.append(some, len(bounds) - 1)], some + share.start
                    bands = minhash.band_keys(grams, bounds, p.buckets, p.hashes_per_bucket, p.seed)
                    whose = {"whole": bands.sum(axis=0), "id": ids[some], "doc": places[some]}
                    # the lowest bit tells kinds apart: 0 for a band, 1 for what is exactly the same
                    keys += [rows_of(KEY, key=band & ~np.uint64(1), **whose) for band in bands]

            # exact copies: a key for each hash; its kind goes in, so that a URL never meets a text
            for number, kind in enumerate(sorted(set(p.exact) & set(EXACT))):
                some = np.flatnonzero(rows[kind])
                key = minhash.mix(rows[kind][some] + np.uint64(number)) | np.uint64(1)
                keys.append(rows_of(KEY, key=key, whole=key, id=ids[some], doc=places[some]))
            docs.append(rows)
            place += len(rows)
    job.lake.fs.pipe_file(job.file("docs", group), joined(docs, DOC).tobytes())
    return joined(keys, KEY), place - first_place


def _described(batch: pa.RecordBatch, p: Deduplicate) -> tuple[np.ndarray, list[str]]:
    """`DOC` of each document of a batch, [documents], where its shingles lie left open; and the texts.

    The survivor of a cluster has the least (`rank`, `time`, `doc_id`): richest, most reviews and then most
    characters; longest, most characters; latest, the last fetch; earliest, the first.
    """
    texts = batch["text"].to_pylist()
    rows = np.zeros(len(texts), DOC)
    rows["doc_id"] = batch["doc_id"].to_pylist()
    # plain lists: some of pyarrow's shorter ways load pandas, 0.2 s in every worker
    rows["time"] = [time or 0 for time in batch["fetch_time"].cast(pa.int64()).to_pylist()]
    for kind, column in zip(EXACT, ("url", "payload_digest"), strict=False):
        rows[kind] = _hashes(batch[column].to_pylist())
    rows["text"] = _hashes(texts)
    if p.survivor == "richest":
        # a review counts more than any length: texts are shorter than 2⁴⁰ characters
        reviews = pc.list_value_length(batch["reviews"]).to_pylist()
        rows["rank"] = [-(n or 0) << 40 for n in reviews]
    if p.survivor in ("richest", "longest"):
        rows["rank"] -= [len(text) for text in texts]
    elif p.survivor == "latest":
        rows["time"] *= -1
    return rows, texts


def candidate_pairs(rows: np.ndarray) -> np.ndarray:
    """`PAIR`s of documents that share a key, a before b by the hash of their ids; `rows` are `KEY`s, in any order.

    A bucket is all documents of one key. Those in it whose LSH keys are all alike (`whole`) are most likely the same
    text: they are compared with the first of them alone, and that one with the other firsts of the bucket.

    | firsts in a bucket | compared |
    |---|---|
    | up to `ALL_PAIRS_UP_TO` | each with each |
    | more | each with the `COMPANIONS` first ones and with the `COMPANIONS` before it |
    """
    # keys that only one document has make no pair: nearly all, so they go before the expensive sort
    rows = rows[rows["key"].argsort()]
    again = rows["key"][1:] == rows["key"][:-1]
    rows = rows[np.append(again, False) | np.append(False, again)]
    # by id and not by place: which pairs are tried must not hang on how the input is cut into parts
    rows = rows[np.lexsort((rows["doc"], rows["id"], rows["whole"], rows["key"]))]
    if not len(rows):
        return np.empty(0, PAIR)
    key, whole = rows["key"], rows["whole"]

    # all below are numbers of rows; `firsts` [alike groups], one for each (key, whole)
    is_first = np.append(True, (key[1:] != key[:-1]) | (whole[1:] != whole[:-1]))
    firsts = is_first.nonzero()[0]
    group_of = np.cumsum(is_first) - 1
    sides = [((~is_first).nonzero()[0], firsts[group_of][~is_first])]

    # a bucket's firsts lie one after the other: `starts` and `sizes` [buckets] count in `firsts`
    starts = np.append(True, key[firsts][1:] != key[firsts][:-1]).nonzero()[0]
    sizes = np.diff(np.append(starts, len(firsts)))

    # small buckets, all of one size at a time: members [buckets of that size, size]
    for size in np.unique(sizes[(sizes > 1) & (sizes <= ALL_PAIRS_UP_TO)]):
        members = firsts[starts[sizes == size, None] + np.arange(size)]
        sides.append(tuple(members[:, side].ravel() for side in np.triu_indices(size, 1)))

    # large buckets, one by one: members [size]
    large = sizes > ALL_PAIRS_UP_TO
    for start, size in zip(starts[large].tolist(), sizes[large].tolist(), strict=True):
        members = firsts[start : start + size]
        for k in range(1, COMPANIONS + 1):
            sides += [(members[k:], members[:-k]), (members[k:], np.full(size - k, members[k - 1]))]

    # each pair from its end with the lower id, so that both keys of a pair name it the same way
    a, b = (np.concatenate(side) for side in zip(*sides, strict=True))
    swap = rows["id"][a] > rows["id"][b]
    a, b = np.where(swap, b, a), np.where(swap, a, b)
    return rows_of(PAIR, a=rows["doc"][a], b=rows["doc"][b], exact=key[a] & np.uint64(1))


def verify_pairs(job: PairJob, pairs: np.ndarray) -> tuple[int, np.ndarray]:
    """How many distinct pairs were compared, and an `EDGE` for each that is exact or close enough to be told of.

    `pairs` are `PAIR`s [pairs], several of the same two documents where they share several keys.
    """
    # the same pair once, and as an exact one if any of its keys says so: ~exact sorts True first
    pairs = pairs[np.lexsort((~pairs["exact"], pairs["b"], pairs["a"]))]
    same = (pairs["a"][1:] == pairs["a"][:-1]) & (pairs["b"][1:] == pairs["b"][:-1])
    pairs = pairs[np.append(True, ~same)[: len(pairs)]]

    # from here on a and b [pairs] are numbers in `docs` [documents], which is sorted
    docs = np.unique(np.concatenate([pairs["a"], pairs["b"]]))
    records, read = job.records(docs), job.reader("grams", np.uint64)
    a, b = docs.searchsorted(pairs["a"]), docs.searchsorted(pairs["b"])
    close = np.zeros(len(pairs))
    for share in plan_parts((records["size"][a] + records["size"][b]).tolist(), BATCH_SHINGLES):
        # the shingles of these pairs' documents are read once, however many pairs they are in
        these = np.unique(np.concatenate([a[share], b[share]]))
        grams, bounds = read(docs[these], records["first_shingle"][these], records["size"][these])
        sets = [grams[i:j] for i, j in pairwise(bounds.tolist())]
        ones, others = these.searchsorted(a[share]), these.searchsorted(b[share])
        # pairs are sorted by a: one call compares a document with all of its partners
        runs = np.append(np.append(True, ones[1:] != ones[:-1]).nonzero()[0], len(ones)).tolist()
        for i, j in pairwise(runs):
            partners = [sets[k] for k in others[i:j].tolist()]
            ends = np.cumsum([0, *map(len, partners)])
            close[share.start + i : share.start + j] = minhash.jaccards(
                sets[ones[i]], np.concatenate(partners), ends
            )
    is_edge = pairs["exact"] | (close >= min(PAIRS_FLOOR, job.p.min_jaccard))
    a_id, b_id = records["doc_id"][a[is_edge]], records["doc_id"][b[is_edge]]
    columns = {name: pairs[name][is_edge] for name in PAIR.names}
    return len(pairs), rows_of(EDGE, **columns, jaccard=close[is_edge], a_id=a_id, b_id=b_id)


def label_components(pairs: np.ndarray) -> np.ndarray:
    """Connected components of few pairs: `LABEL` of each document in one, the label being its least place."""
    docs, ends = np.unique(np.concatenate([pairs["a"], pairs["b"]]), return_inverse=True)
    a, b = ends[: len(pairs)], ends[len(pairs) :]
    # `least` [documents]: the lowest number that each is known to be connected with, itself to begin with
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

    What is a copy of a copy only goes on to the next round, so no near copy leaves without a near survivor. Of several
    reasons the first of `EXACT` is given, and "near copy" only where none of them holds.
    """
    labels = labels[np.lexsort((labels["doc"], labels["label"]))]
    records, read = job.records(labels["doc"]), job.reader("grams", np.uint64)
    kinds = [kind for kind in EXACT if kind in job.p.exact]
    ids = records["doc_id"]
    verdicts = rows_of(VERDICT, doc_id=ids, survivor=ids, reason=0, jaccard=1.0, doc=labels["doc"])
    for members in np.split(np.arange(len(labels)), np.diff(labels["label"]).nonzero()[0] + 1):
        # the best first; lexsort takes its last key as the first one
        left = members[np.lexsort([records[name][members] for name in ("doc_id", "time", "rank")])]
        verdicts["cluster_id"][members] = min(ids[members].tolist(), default=b"")
        while len(left) > 1:
            best, others = left[:1], left[1:]
            one = read(labels["doc"][best], records["first_shingle"][best], records["size"][best])[0]
            for share in plan_parts(records["size"][others].tolist(), BATCH_SHINGLES):
                some = others[share]
                sets = read(labels["doc"][some], records["first_shingle"][some], records["size"][some])
                verdicts["jaccard"][some] = minhash.jaccards(one, *sets)
            reason = np.where(verdicts["jaccard"][others] >= job.p.min_jaccard, len(EXACT) + 1, 0)
            # the first kind is written last, over the others
            for kind in reversed(kinds):
                alike = (records[kind][others] == records[kind][best]) & (records[kind][others] != 0)
                reason[alike] = 1 + list(EXACT).index(kind)
            verdicts["reason"][others], verdicts["survivor"][others] = reason, ids[best]
            left = others[reason == 0]
            # until their own round says otherwise, they stay
            verdicts["survivor"][left], verdicts["jaccard"][left] = ids[left], 1.0
    return verdicts
