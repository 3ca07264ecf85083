"""Texts → sets of word n-grams → MinHash signatures → LSH keys, a whole batch of texts at a time.

A text is normalised as FineWeb does (lower case, digits as 0, no punctuation, no diacritics); its words are runs of
letters and digits (so clauses in a script without spaces, as in the field's other tools). No word ever becomes a
Python string: code points are folded by a table, words and n-grams are hashes of 64 bits, and `numpy` goes over all
texts at once.
Permutations are `(h xor k) · a` modulo 2³² with odd a: one to one, and four times as fast as 64 bits. That an LSH
key is equal by chance costs one comparison more and no copy, since what is joined is decided by `jaccards`.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np

WORD = re.compile(r"\w+")
"""A word of a normalised text."""
MARK, SEVERAL = 1 << 24, 1 << 25
"""In `_folded` in place of a code point: it is left out, it becomes several."""
# odd, so that both have an inverse modulo 2⁶⁴ and no product loses its low bits
BASE, STEP = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93


def normalise(text: str) -> str:
    """Lower case, digits as 0, no diacritics, one sigma: what copies have in common."""
    return "".join(map(_plain, text.lower()))


@cache
def _plain(c: str) -> str:
    if c == "ς" or c.isdigit():
        return "0" if c.isdigit() else "σ"
    # Hangul would fall apart into its letters, which are no diacritics
    parts = c if "가" <= c <= "힣" else unicodedata.normalize("NFD", c)
    return "".join(p for p in parts if not unicodedata.combining(p))


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): spreads the bits of 64-bit integers, any shape."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def word_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each word of all texts, uint64 [words], and `bounds` [texts + 1], int64: the words of text i lie at
    `bounds[i] : bounds[i + 1]`.
    """
    # all code points of the batch, [characters], with a line end between two texts: no word goes across it
    joined = "\n".join(texts)
    folded = _folded()[np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)]
    # where each text begins in them, [texts + 1]
    edges = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1, out=edges[1:])
    highest = folded.max(initial=0)
    if highest >= SEVERAL:  # rare, so that all others need one look-up
        return word_hashes([normalise(t) for t in texts])
    if highest >= MARK:
        # diacritics go, and what comes after them moves up
        stays = folded != MARK
        edges[:-1] -= np.concatenate([[0], np.cumsum(~stays)])[edges[:-1]]
        folded = folded[stays]
    # a word is a run of code points that are not 0
    inside = folded != 0
    first = inside.copy()
    first[1:] &= ~inside[:-1]
    starts = first.nonzero()[0]
    if not len(starts):
        return np.empty(0, np.uint64), np.zeros(len(texts) + 1, np.int64)
    # a polynomial of a word's characters: the powers count from the start of the batch, and are divided out
    powers, inverse = _powers(1 << max(len(folded) - 1, 1 << 18).bit_length())
    hashes = np.add.reduceat(folded * powers[: len(folded)], starts) * inverse[starts]
    edges[-1] = len(folded)
    return mix(hashes), np.searchsorted(starts, edges)


@cache
def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """`BASE` to the powers 0 … n - 1 modulo 2⁶⁴, and their inverses."""
    powers, inverses = (np.full(n, base, np.uint64) for base in (BASE, pow(BASE, -1, 1 << 64)))
    for table in (powers, inverses):
        table[0] = 1
        np.cumprod(table, out=table)  # unsigned integers wrap, which is the modulus
    return powers, inverses


@cache
def _folded() -> np.ndarray:
    """What each code point becomes in a normalised text, 0 if it is in no word, with the flags above."""
    # all of Unicode, uint32 [0x110000]: 4 MB, made once a process
    table = np.arange(0x110000, dtype=np.uint32)
    every = table.tobytes().decode("utf-32-le", "surrogatepass")
    words = np.zeros(len(table), bool)
    for run in WORD.finditer(every):
        words[run.start() : run.end()] = True
    # a block whose characters are all plain, as nearly all are, costs one call instead of 256
    for start in range(0, len(table), 256):
        block = every[start : start + 256]
        odd = any(map(str.isdigit, block)) or any(map(unicodedata.combining, block))
        if odd or unicodedata.normalize("NFD", block.lower()) != block:
            for i, c in enumerate(map(normalise, block), start):
                table[i] = ord(c) if len(c) == 1 else SEVERAL if c else MARK
    table[(table < MARK) & ~words[np.minimum(table, len(table) - 1)]] = 0
    return table


def shingles(texts: Sequence[str], ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct 64-bit hashes of each text's word n-grams, one text after the other, and the texts' bounds.

    A text of fewer words is one shingle, one of no words none.
    """
    words, bounds = word_hashes(texts)  # [words], [texts + 1]
    sizes = np.diff(bounds)
    # Σ word · STEPᵏ over the words k = 1 … n of each n-gram: their order counts
    steps = np.cumprod(np.full(ngram, STEP, np.uint64))
    grams = words * steps[0]
    for k in range(1, ngram):
        grams[:-k] += words[k:] * steps[k]
    # an n-gram that begins in the last n - 1 words of a text would go on into the next one
    valid = np.arange(len(words)) < np.repeat(bounds[1:] - ngram + 1, sizes)
    for i in ((sizes > 0) & (sizes < ngram)).nonzero()[0]:
        valid[bounds[i]] = True
        grams[bounds[i]] = (words[bounds[i] : bounds[i + 1]] * steps[: sizes[i]]).sum()
    grams, bounds = mix(grams[valid]), np.concatenate([[0], np.cumsum(valid)])[bounds]
    for a, b in pairwise(bounds.tolist()):
        grams[a:b].sort()
    # sorted, so that the same shingle of a text lies side by side; the first of a text always counts
    new = np.ones(len(grams), bool)
    np.not_equal(grams[1:], grams[:-1], out=new[1:])
    new[bounds[:-1][np.diff(bounds) > 0]] = True
    return grams[new], np.concatenate([[0], np.cumsum(new)])[bounds]


def band_keys(sets: np.ndarray, bounds: np.ndarray, buckets: int, rows: int, seed: int) -> np.ndarray:
    """LSH keys, uint64 of shape (buckets, sets): equal in two with probability J^rows (J = their Jaccard index).

    No set may be empty.
    """
    random = np.random.default_rng(seed)
    # a permutation is h → (h xor flip) · factor, one for each row of each band
    flips, factors = random.integers(0, 2**32, (2, buckets, rows), dtype=np.uint32)
    low, starts = sets.astype(np.uint32), bounds[:-1]
    keys, turned = np.empty((buckets, len(starts)), np.uint64), np.empty_like(low)
    for number, key in enumerate(keys):
        key[:] = number  # so that equal values of two bands are no match
        for flip, factor in zip(flips[number], factors[number] | np.uint32(1), strict=True):
            np.bitwise_xor(low, flip, out=turned)
            np.multiply(turned, factor, out=turned)
            key[:] = mix(key * np.uint64(STEP) + np.minimum.reduceat(turned, starts))
    return keys


def jaccards(one: np.ndarray, sets: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """True Jaccard index of a sorted set with each of several, float64; 0 where both are empty."""
    # where each member of the sets would stand in `one`, [members]; past its end, at its last
    position = np.minimum(one.searchsorted(sets), max(len(one) - 1, 0))
    hits = one[position] == sets if len(one) else np.zeros(len(sets), bool)
    common = np.diff(np.concatenate([[0], np.cumsum(hits)])[bounds])
    return common / np.maximum(len(one) + np.diff(bounds) - common, 1)


def measured_recall(
    texts: Sequence[str], ngram: int, buckets: int, rows: int, seed: int = 0, copies: int = 2000
) -> list[tuple[float, float, int]]:
    """How often changed copies of `texts` really share an LSH key: (mean true Jaccard, share found, pairs), by 0.05.

    A copy has up to 15 % of its words replaced by words of other texts; only from a Jaccard index of 0.4 on, and
    of the beginnings of texts: how long they are does not matter.
    """
    pick = random.Random(seed)
    long = [words for t in texts if len(words := t[:4000].split()) >= 50]
    both: list[str] = []
    for _ in range(copies if long else 0):
        words, other, share = pick.choice(long), pick.choice(long), pick.uniform(0, 0.15)
        both += " ".join(words), " ".join(pick.choice(other) if pick.random() < share else w for w in words)
    sets, bounds = shingles(both, ngram)
    ends = [sets[a:b] for a, b in pairwise(bounds.tolist())]
    true = np.array(
        [jaccards(a, b, np.array([0, len(b)]))[0] for a, b in zip(ends[::2], ends[1::2], strict=True)]
    )
    keys = band_keys(sets, bounds, buckets, rows, seed)
    share_a_key = (keys[:, ::2] == keys[:, 1::2]).any(axis=0)
    bins = (true * 20).astype(int)
    # below 0.4 there are too few pairs to say anything of
    chosen = [bins == number for number in range(8, 20)]
    return [(true[b].mean(), share_a_key[b].mean(), b.sum()) for b in chosen if b.any()]
