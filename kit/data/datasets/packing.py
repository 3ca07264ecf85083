"""Tokenised texts → rows of one length, by best fit, decreasing (Ding et al. 2024, arXiv:2404.10830): only a text
that is longer than a row is split, and padding stays small."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import RDD

from kit.lake.store import StageWriter

INTS = pa.list_(pa.int32())
ROW = pa.schema({"input_ids": INTS, "lengths": INTS, "row_ids": pa.list_(pa.string()), "starts": INTS})
"""Tokens of a row; how many each text in it has there, that text's row_id, and its first token's place in the text.
Behind the sum of `lengths` is padding. Attention is kept inside a text by `lengths`."""
Slices = list[tuple[int, int, int]]
"""What is in a row: `(number of the text, first token, number of tokens)`."""


def best_fit(lengths: Sequence[int], size: int) -> list[Slices]:
    """Rows of at most `size` tokens: longest text first, each where it leaves least room; ties by the lowest row."""
    pieces = [
        (min(size, n - start), text, start) for text, n in enumerate(lengths) for start in range(0, n, size)
    ]
    rows: list[Slices] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for n, text, start in sorted(pieces, key=lambda piece: (-piece[0], *piece[1:])):
        position = bisect_left(free, (n, -1))
        room, row = free.pop(position) if position < len(free) else (size, len(rows))
        rows[row:] = rows[row:] or [[]]
        rows[row].append((text, start, n))
        if room > n:
            insort(free, (room - n, row))
    return rows


def write_rows(
    tokens: RDD, rows: list[Slices], keys: list[str], begins: list[tuple[int, int]], fill: int, size: int,
    per_part: int, out: StageWriter,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write `part-…` with `per_part` rows each; `tokens` holds `(piece, ids)`, `begins` each piece's `(text, first
    token)`. Returns the outputs, each with its number of `tokens` without padding."""
    wanted: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for row, kept in enumerate(rows):
        for text, start, n in kept:
            wanted[text].append((start, start + n, row))
    writer = out.parts

    def deal(piece: tuple[int, np.ndarray]) -> Iterator[tuple[int, tuple[int, int, int, np.ndarray]]]:
        text, begin = begins[piece[0]]
        for start, stop, row in wanted[text]:
            if (ids := piece[1][max(start - begin, 0) : max(stop - begin, 0)]).size:
                yield row // per_part, (row, text, max(start, begin), ids)

    def write(part: tuple[int, Iterable[tuple[int, int, int, np.ndarray]]]) -> dict[str, Any]:
        pieces_of: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, text, _, ids in sorted(part[1], key=lambda item: item[:3]):
            pieces_of[row, text] += ids.tolist()
        packed = []
        for row in sorted({row for row, _ in pieces_of}):
            ids = [token for text, *_ in rows[row] for token in pieces_of[row, text]]
            names = [keys[text] for text, *_ in rows[row]]
            lengths, starts = [n for *_, n in rows[row]], [start for _, start, _ in rows[row]]
            padded = ids + [fill] * (size - len(ids))
            packed.append(dict(zip(ROW.names, (padded, lengths, names, starts), strict=True)))
        table = pa.Table.from_pylist(packed, schema=ROW)
        output = writer.table(f"part-{part[0]:05d}", table)
        return {"output": output, "tokens": sum(map(len, pieces_of.values()))}

    return tokens.flatMap(deal).groupByKey(-(-len(rows) // per_part)).map(write).collect()
