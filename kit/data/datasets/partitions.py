"""How documents are put into partitions of even load."""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

CUTTING = ("huffman", "longest_first")
"""Methods that cut long texts; the others spread whole texts, as they commonly do."""
GROUPS = 256
"""Groups of a partition: the finer, the more even, and the more the driver has to sort."""


def merge_lightest(loads: Sequence[float], least: int, cap: float) -> list[tuple[float, list[int]]]:
    """Huffman's merging: the two lightest groups become one while more than `least` are left and it is within `cap`."""
    heap = [(load, i, [i]) for i, load in enumerate(loads)]
    heapq.heapify(heap)
    while len(heap) > max(least, 1) and heap[0][0] + min(heap[1:3])[0] <= cap:
        load, first, members = heapq.heappop(heap)
        other = heap[0]
        heapq.heapreplace(heap, (load + other[0], min(first, other[1]), members + other[2]))
    return [(load, members) for load, _, members in sorted(heap)]


def longest_first(loads: Sequence[float], k: int) -> list[int]:
    """A partition for each load: heaviest first, each to the lightest partition (LPT)."""
    heap, chosen = [(0.0, part) for part in range(k)], [0] * len(loads)
    for i in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        load, chosen[i] = heap[0]
        heapq.heapreplace(heap, (load + loads[i], chosen[i]))
    return chosen


def assign(method: str, keys: Sequence[str], loads: Sequence[float], k: int) -> list[int]:
    """A partition below `k` for each load, by a method of `BalanceTokenization.balance` or `merged`, plain Huffman."""
    if method == "round_robin":
        return [i % k for i in range(len(loads))]
    if method == "hash":
        return [zlib.crc32(key.encode()) % k for key in keys]
    if method == "longest_first":
        return longest_first(loads, k)
    groups = merge_lightest(loads, k, sum(loads) / k / GROUPS if method == "huffman" else float("inf"))
    parts = longest_first([load for load, _ in groups], k)
    part_of = {i: part for (_, members), part in zip(groups, parts, strict=True) for i in members}
    return [part_of[i] for i in range(len(loads))]


def loads_by_method(loads: pa.Table, k: int) -> dict[str, np.ndarray]:
    """Real tokens of each of `k` partitions by method, from the stage's `loads`."""
    keys, owner = np.unique(loads["row_id"].to_numpy(zero_copy_only=False), return_inverse=True)
    loads_of = {}
    for method in ("hash", "round_robin", "merged", "longest_first", "huffman"):
        each = [loads[c].to_numpy() for c in ("estimated", "tokens")]
        estimated, tokens = each if method in CUTTING else [np.bincount(owner, sizes) for sizes in each]
        loads_of[method] = np.bincount(assign(method, list(keys), estimated.tolist(), k), tokens, k)
    return loads_of
