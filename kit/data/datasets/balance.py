"""Tokenising with even partitions, then packing into rows of one length.

What a text costs is known only when it is tokenised, so 5 % of it are, and its bytes tell the rest. Long texts are cut
at bounds (paragraph, line, sentence, word) where the tokenizer's result stays the same. Partitions are built as Huffman
built codes (1952): merge the two lightest groups, again and again. Merged until `partitions` are left, as is usual, the
last merges may double a group. Here merging ends at groups of 1/256 of a partition; these are dealt out heaviest
first, each to the lightest partition, so the heaviest estimated load is at most the mean and one group (Graham 1969).
Held in the driver: some numbers of each text, no text.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import Broadcast, StorageLevel
from pyspark.core.rdd import RDD
from tokenizers import Tokenizer

from kit import resolve_path
from kit.data.datasets.augment import train_shares
from kit.data.datasets.packing import Slices, best_fit, write_rows
from kit.data.datasets.partitions import CUTTING, GROUPS, assign
from kit.data.engine.spark import collect, run_tasks, session
from kit.errors import LakeError, ParamError
from kit.lake.manifest import Account, Manifest
from kit.lake.store import Lake, StageWriter
from kit.params import BalanceTokenization
from kit.progress import progress

Share = tuple[str, int, int]
"""Path of a file of training rows, first row, number of rows."""
Probe = tuple[list[int], int, int]
"""Bytes of a text's pieces, and the tokens and the bytes of its slices."""


CUT = re.compile(r"(?<=\S)\s(?=\S)|(?<=\n)\n(?=\S)")
PROBE = "A word, 12 345 it's\n\nNext:  two\tspaces\n- list\n\nÜber naïve 你好 мир。 ok 🙂 end."
PROBED, SLICES, SLICE = 0.05, 32, 60
"""Share of a text that is tokenised first, in at most so many slices of at least so many characters."""
PRIOR = 150
"""Bytes of an average text that the slices are weighed against: a short text is hardly known by its own."""


@functools.cache
def fast_tokenizer(source: str) -> Tokenizer:
    """The tokenizer in the text of a `tokenizer.json`, on one core: Spark has the others."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(source)
    tokenizer.encode_special_tokens = True  # an end token's name in a page is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, no special tokens added."""
    return [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def end_token(tokenizer: Tokenizer, folder: Path) -> int:
    """Id of the token that ends a text, from `tokenizer_config.json` or by its usual names; raises `ParamError`."""
    config = folder / "tokenizer_config.json"
    said = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.exists() else None
    names = (
        said["content"] if isinstance(said, dict) else said,
        "<|endoftext|>",
        "<|im_end|>",
        "</s>",
        "[SEP]",
    )
    if ids := [i for i in map(tokenizer.token_to_id, filter(None, names)) if i is not None]:
        return ids[0]
    raise ParamError("parameter 'tokenizer': it has no end token, texts would run into each other")


def cut_is_safe(tokenizer: Tokenizer) -> bool:
    """Whether a cut at `CUT` leaves the tokens as they are: with GPT-2's splitting, not with SentencePiece's."""
    halves = [(PROBE[: m.start()], PROBE[m.start() :]) for m in CUT.finditer(PROBE)]
    whole = token_ids(tokenizer, [PROBE])[0]
    return all(a + b == whole for a, b in (token_ids(tokenizer, half) for half in halves))


def cut_text(text: str, limit: int) -> list[str]:
    """A text in pieces of at most `limit` characters where it has bounds: a paragraph's, line's or sentence's first."""
    pieces, start = [], 0
    while len(text) - start > limit:
        bounds = [m.start() for m in CUT.finditer(text, start + limit // 2 + 1, start + limit)]
        if not (bounds := bounds or [m.start() for m in islice(CUT.finditer(text, start + limit), 1)]):
            break
        best = max(
            bounds, key=lambda i: (text[i - 1 : i + 1] == "\n\n", text[i] == "\n", text[i - 1] in ".!?", i)
        )
        pieces.append(text[start:best])
        start = best
    return [*pieces, text[start:]]


def slices(text: str) -> list[str]:
    """Evenly spread slices of a text, or all of a short one."""
    size = max(int(len(text) * PROBED), SLICE)
    n = min(SLICES, size // SLICE)
    starts = [(2 * i + 1) * len(text) // (2 * n) - size // n // 2 for i in range(n)]
    return [text[start : start + size // n] for start in starts] if len(text) > size else [text]


def probe(tokenizer: Tokenizer, pieces: list[str]) -> Probe:
    """Of a text in pieces: their bytes, and the tokens and bytes of its slices."""
    taken = slices("".join(pieces))
    piece_bytes = [len(piece.encode("utf-8", "replace")) for piece in pieces]
    taken_bytes = sum(len(part.encode("utf-8", "replace")) for part in taken)
    return piece_bytes, sum(map(len, token_ids(tokenizer, taken))), taken_bytes


def expected_tokens(probes: Sequence[Probe]) -> np.ndarray:
    """Expected tokens of every piece of texts that were probed, float64 [pieces]."""
    tokens, of_bytes = np.array([probed[1:] for probed in probes], float).T  # both [texts]
    # few bytes say little of a text: it is taken to be as the mean of all, as if `PRIOR` bytes more had been like that
    ratio = (tokens + PRIOR * tokens.sum() / of_bytes.sum()) / (of_bytes + PRIOR)
    return np.concatenate([np.array(probed[0]) * r for probed, r in zip(probes, ratio, strict=True)])


@dataclass(frozen=True)
class Texts:
    """The training texts as every task reads them: whole, or cut where that leaves the tokens as they are."""

    lake: Lake
    cutting: bool
    piece_bytes: int
    """Longest piece of a text that is cut, as far as the text has bounds."""

    def of(self, share: Share) -> Iterator[tuple[str, list[str]]]:
        """`(row_id, pieces)` of every text of a share that is not empty."""
        path, first_row, n_rows = share
        table = self.lake.read_part(path).slice(first_row, n_rows)
        for row in table.select(["row_id", "prompt", "completion"]).to_pylist():
            text = (row["prompt"] or "") + (row["completion"] or "")
            if text:
                characters = self.piece_bytes * len(text) // len(text.encode("utf-8", "replace"))
                yield row["row_id"], cut_text(text, max(characters, 1)) if self.cutting else [text]


def measure_texts(
    p: BalanceTokenization, texts: Texts, shares: list[Share], tokenizer: Broadcast[str]
) -> tuple[list[str], list[Probe], list[int]]:
    """`row_id` and `probe` of every text, and the number of the first piece of each share."""

    def measure(share: Share) -> dict[str, Any]:
        probed = [(key, probe(fast_tokenizer(tokenizer.value), pieces)) for key, pieces in texts.of(share)]
        return {"done": share[2], "texts": probed}

    results = run_tasks(p, measure, [(share[2], share) for share in shares], "measure", "texts")
    keys, probes = zip(*(probed for result in results for probed in result["texts"]), strict=True)
    n_pieces = [sum(len(sizes) for _, (sizes, *_) in result["texts"]) for result in results]
    return list(keys), list(probes), [0, *accumulate(n_pieces)]


def tokenise(
    pieces: RDD, partitions: int, tokenizer: Broadcast[str], end: int, n_pieces: int
) -> tuple[RDD, list[float], np.ndarray]:
    """Token ids of all pieces, on the workers' disks; seconds of each partition; tokens of each piece.

    `pieces` holds `(partition, (number of the piece, text, whether it ends its text))`, the result for each partition
    `(seconds, [(number, ids as int32)])`; behind a text's last piece comes the token `end`.
    """
    done = pieces.context.accumulator(0)

    def work(items: Iterable[Any]) -> Iterator[tuple[float, list[tuple[int, np.ndarray]]]]:
        mine = [piece for _, piece in items]
        started = time.perf_counter()
        ids = token_ids(fast_tokenizer(tokenizer.value), [text for _, text, _ in mine])
        seconds = time.perf_counter() - started
        done.add(len(mine))
        ended = [own + [end] * last for own, (*_, last) in zip(ids, mine, strict=True)]
        yield (
            seconds,
            [(number, np.array(own, np.int32)) for own, (number, *_) in zip(ended, mine, strict=True)],
        )

    tokenised = pieces.partitionBy(partitions, int).mapPartitions(work).persist(StorageLevel.DISK_ONLY)
    with progress(n_pieces, "tokenise", "pieces") as bar:
        lengths = tokenised.map(lambda part: (part[0], [(number, len(ids)) for number, ids in part[1]]))
        counted = collect(lengths, done, bar)
    n_tokens = sorted(piece for _, counts in counted for piece in counts)
    return tokenised, [seconds for seconds, _ in counted], np.array([n for _, n in n_tokens])


def balance_tokenization(p: BalanceTokenization, lake: Lake, tokenizer_file: str) -> Manifest:
    """Training rows → `part-…`, rows of `packing.ROW`, and `loads`: what each piece of a text cost, and where.

    Every text ends with the end token, which also fills rows up. `metrics` tells the heaviest partition over the mean,
    seconds, and the padding of three ways to pack. Raises `ParamError`.
    """
    source = Path(resolve_path(tokenizer_file)).read_text(encoding="utf-8")
    end = end_token(fast_tokenizer(source), Path(resolve_path(tokenizer_file)).parent)
    cutting = p.balance in CUTTING and cut_is_safe(fast_tokenizer(source))
    with lake.stage(p) as out:
        out.read_outside(tokenizer_file)

        # how the input is cut: shares of rows for the tasks, texts into pieces that fit the partitions
        shares = train_shares(lake, out.read("50_build_datasets"), p.part_mb)
        about_bytes = 3 * sum(lake.fs.size(path) for path in {path for path, *_ in shares})  # uncompressed
        texts = Texts(lake, cutting, max(about_bytes // (p.partitions * GROUPS), SLICE))
        context = session(p).sparkContext
        tokenizer = context.broadcast(source)

        # what each piece will cost, and to which partition it goes; owner, estimated, parts [pieces]
        keys, probes, first_piece = measure_texts(p, texts, shares, tokenizer)
        owner = np.repeat(np.arange(len(keys)), [len(sizes) for sizes, *_ in probes])  # each piece's text
        estimated = expected_tokens(probes)
        parts = assign(p.balance, [keys[i] for i in owner], estimated.tolist(), p.partitions)

        # each piece to its partition, numbered as it was probed: shares are read twice, in the same order
        def spread(task: tuple[int, Share]) -> Iterator[tuple[int, tuple[int, str, bool]]]:
            number = first_piece[task[0]]
            for _, pieces in texts.of(task[1]):
                for i, text in enumerate(pieces, 1):
                    yield parts[number], (number, text, i == len(pieces))
                    number += 1

        started = time.perf_counter()
        pieces = context.parallelize(list(enumerate(shares)), len(shares)).flatMap(spread)
        tokenised, spent, tokens = tokenise(pieces, p.partitions, tokenizer, end, len(owner))
        wall = time.perf_counter() - started

        # pieces back to whole texts, texts into rows of one length; whole [texts], tokens [pieces]
        whole = np.bincount(owner, tokens).astype(int)
        rows = best_fit(whole.tolist(), p.packed_tokens)
        _write_packed(p, out, tokenised, rows, keys, owner, tokens, end)
        tokenised.unpersist()
        columns = [[keys[i] for i in owner], estimated.round().astype(int), tokens, parts]
        out.table("loads", pa.table(columns, ["row_id", "estimated", "tokens", "partition"]))

        # a row of the input ends in a packed row with others; a long one, cut, in several
        given, packed = sum(n_rows for *_, n_rows in shares), sum(map(len, rows))
        gone = Counter({"no text": given - len(keys), "packed with others": packed - len(rows)})
        account = Account(given, packed - len(keys), len(rows), gone)
        seconds = {"tokenise": wall, "slowest partition": max(spent), "all partitions": sum(spent)}
        loads = np.bincount(parts, tokens, p.partitions)
        metrics = {
            "tokens": int(tokens.sum()),
            "pieces": len(owner),
            "max_over_mean": round(float(loads.max() / loads.mean()), 4),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "padding": _padding(whole, len(rows), p.packed_tokens),
        }
        return out.commit(account.counts(), metrics)


def _write_packed(
    p: BalanceTokenization,
    out: StageWriter,
    tokenised: RDD,
    rows: list[Slices],
    keys: list[str],
    owner: np.ndarray,
    tokens: np.ndarray,
    end: int,
) -> None:
    """Write the packed rows; raises `LakeError` where a token is missing in them."""
    whole = np.bincount(owner, tokens).astype(int)
    # where each piece begins in its text: tokens of all pieces before it, less those of all texts before its own
    begins = np.cumsum(tokens) - tokens - (np.cumsum(whole) - whole)[owner]
    places = list(zip(owner.tolist(), begins.tolist(), strict=True))
    rows_per_part = max(int(p.part_mb * 5e5 / p.packed_tokens), 1)
    pieces = tokenised.flatMap(lambda part: part[1])
    written = write_rows(pieces, rows, keys, places, end, p.packed_tokens, rows_per_part, out)
    if sum(part["tokens"] for part in written) != tokens.sum():
        raise LakeError("not every token that was made was packed")
    for part in written:
        out.add(part["output"])


def _padding(whole: np.ndarray, n_rows: int, size: int) -> dict[str, float]:
    """Share of tokens that is padding, by three ways to pack texts of `whole` tokens into rows of `size`."""
    total = whole.sum()
    ways = {"a row each": (-(-whole // size)).sum(), "in order": -(-total // size), "best fit": n_rows}
    return {name: round(float(1 - total / (n * size)), 4) for name, n in ways.items()}
