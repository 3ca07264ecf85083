"""Main text of a page: cut it into blocks, describe each by numbers, let gradient-boosted trees decide.

    from kit.data.extract.blocks import extract_main_text
    text = extract_main_text("<html>…")

The numbers are those of `block_features`; the model is trained by `train_blocks`, `blocks_card.md` is its card. Needs
selectolax 1.0: see `walk`.
"""

from __future__ import annotations

import functools
import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from kit.data.extract.block_features import (
    COLUMNS,
    NAMES,
    RANK,
    UNSEEN,
    Blocks,
    features,
)
from kit.data.extract.walk import parse, walk
from kit.errors import KitError

MODEL = Path(__file__).with_name("blocks_model.txt.gz")
CASCADE = ((0, 20, -1.8, 9.0, 2.4), (20, 40, -1.8, 1.6, 1.35), (60, -1, 0.0, 0.0, 1.0))
"""First tree, number of trees, the log odds between which a block goes on to the next, and by how much the trees still
to come would stretch those of a block that does not: unstretched, a page's many sure blocks look like much text."""
# a page of nothing but doubtful blocks still gives its best ones, and a sure block is never left out for a better sum
LOWEST, HIGHEST = 0.1, 0.5


def all_text(blocks: Blocks) -> str:
    """Every visible block of the page, a line each."""
    flags = blocks.rows[1 :: len(COLUMNS)]
    # where all is hidden until a script shows it, what is hidden is the page
    seen = [t for t, f in zip(blocks.texts, flags) if not f & UNSEEN]
    return "\n".join(seen or blocks.texts)


@functools.cache
def _model() -> Any:
    """The trained trees; raises `KitError` where their file is missing, damaged or made for other features."""
    import lightgbm

    try:
        model = lightgbm.Booster(model_str=gzip.decompress(MODEL.read_bytes()).decode())
    except (OSError, EOFError, ValueError, zlib.error, lightgbm.basic.LightGBMError) as error:
        raise KitError(f"the model {MODEL} is missing or damaged: {error}") from None
    if model.feature_name() != NAMES:
        raise KitError(f"the model {MODEL} was trained for other features: run kit.maintain.train_blocks")
    return model


def probabilities(blocks: Blocks, model: Any = None) -> np.ndarray:
    """How likely each block is main text; most are plainly or plainly not after few of the trees."""
    model = model or _model()
    matrix = features(blocks)
    # odds [blocks]; `left`, the numbers of those still in doubt, and their sums so far, [left]
    odds, left, sums = np.zeros(len(matrix)), np.arange(len(matrix)), np.zeros(len(matrix))
    for start, trees, low, high, stretch in CASCADE:
        sums += model.predict(
            matrix, raw_score=True, start_iteration=start, num_iteration=trees, num_threads=1
        )
        odds[left] = sums * stretch
        on = np.flatnonzero((sums > low) & (sums < high))
        if not len(on):
            break
        matrix, left, sums = matrix.take(on, axis=0), left[on], sums[on]
    return 1 / (1 + np.exp(-odds))


def choose(p: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Blocks to keep: those above the threshold that makes the page's expected word F1 the highest.

    Of the k likeliest blocks that is 2 Σ_k p·words / (Σ_k words + Σ p·words), Σ_k over them and Σ over all.
    """
    order = np.argsort(-p, kind="stable")
    kept, right = np.cumsum(words[order]), np.cumsum((p * words)[order])
    best = p[order[int((right / (kept + right[-1])).argmax())]]
    return np.flatnonzero(p >= min(max(best, LOWEST), HIGHEST))


def main_text(blocks: Blocks, model: Any = None) -> str:
    """The page's main text, a line per block, cells of a table's row with tabs between; "" if it has no text at all.

    Where no block is likely, the likeliest are returned: what to do with a page of no use is for others to say.
    """
    if not blocks.texts:
        return ""
    p = probabilities(blocks, model)
    # as weights, about six characters a word, the space included, are near enough
    words = np.fromiter(map(len, blocks.texts), np.int64, len(p)) // 6 + 1
    if p.max() < LOWEST:
        p = p / p.max()
    width = len(COLUMNS)
    cells = (RANK["td"], RANK["th"])
    lines: list[str] = []
    before = 0
    for i in choose(p, words):
        # columns 2 and 8 of `COLUMNS`: own, whose six low bits are the rank, and row
        row = blocks.rows[i * width + 8] if blocks.rows[i * width + 2] & 63 in cells else 0
        if row and row == before:
            lines[-1] += "\t" + blocks.texts[i]
        else:
            lines.append(blocks.texts[i])
        before = row
    return "\n".join(lines)


def extract_main_text(html: str) -> str:
    """Main text of a page."""
    return main_text(walk(parse(html)))
