"""Train and test the model of `kit.data.extract.blocks` on pages whose main text people marked.

    python -m kit.maintain.train_blocks PAGES.warc.gz PAGES_GOLD.jsonl [MORE.warc.gz MORE_GOLD.jsonl …] [--out FOLDER]

A gold line has `record_id`, `url` and either `text`, the main text in full, or snippets that must be in it (`with`)
and must not (`without`). Every page is first extracted by a model that has seen no page of its site; the scores go to
the screen and into the model card, then a model trained on all pages is written. Same data, same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightgbm
import numpy as np

from kit.data.extract import blocks, walk
from kit.data.read import archive
from kit.data.read.charset import decode
from kit.measure.data.scores import score_texts, words

FOLDS, GRAM = 5, 4
PARAMETERS = {
    "objective": "cross_entropy",  # labels are shares, not only 0 and 1
    "learning_rate": 0.07,
    "num_leaves": 16,
    "min_data_in_leaf": 40,
    "lambda_l2": 5.0,
    "feature_fraction": 0.25,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "max_bin": 127,
    "seed": 1,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}
TREES = 160


_SECOND_LEVEL = "ac co com edu gob gov gouv govt ltd me mil net ne nom or org plc sch"
SECOND_LEVEL = frozenset(_SECOND_LEVEL.split())
START, END = "<!-- scores -->", "<!-- /scores -->"


@dataclass
class GoldPage:
    """A page with its gold; `label` is each block's share of main text, −1 where the gold does not tell."""

    group: str
    gold: dict[str, Any]
    payload: bytes
    blocks: blocks.Blocks
    features: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    fold: int


def site(url: str) -> str:
    """Registered domain, by a rule of thumb instead of the public suffix list."""
    host = (urlsplit(url).hostname or url).split(".")
    deep = len(host) > 2 and len(host[-1]) == 2 and host[-2] in SECOND_LEVEL
    return ".".join(host[-3 if deep else -2 :])


def shares(texts: list[str], gold: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Label and weight of each block: see `GoldPage`.

    A word counts as main text where it is in a run of four words, across blocks, that the gold text has too: so a
    menu's "Home" is told from the same word in a sentence. A short block between others is main text if it is a line.
    """
    if not gold.get("text"):
        return _by_snippets(texts, gold)
    tokens = [words(t) for t in texts]
    sizes = np.array([len(t) for t in tokens])
    page = [w for t in tokens for w in t]
    known = set(_grams(words(gold["text"])))
    hit = np.zeros(len(page) + 1, bool)
    for i, gram in enumerate(_grams(page)):
        if gram in known:
            hit[i : i + GRAM] = True
    total = np.concatenate(([0], np.cumsum(hit[:-1])))
    ends = np.cumsum(sizes)
    label = (total[ends] - total[ends - sizes]) / np.maximum(sizes, 1)
    label[sizes == 0] = -1
    keys = [" ".join(t) for t in tokens]
    lines = Counter(" ".join(words(line)) for line in gold["text"].split("\n"))
    lines.subtract(keys[i] for i in np.flatnonzero(label > 0.5))
    for i in np.flatnonzero((label >= 0) & (label <= 0.5)):
        if lines[keys[i]] > 0 and label[max(0, i - 4) : i + 5].max() > 0.5:
            label[i] = 1
            lines[keys[i]] -= 1
    _unrepeat(label, keys, sizes, words(gold["text"]))
    main = max(30, float(sizes @ np.maximum(label, 0)))
    felt = np.minimum((sizes + 2) / main, 0.5) * 60  # errors as a page's F1 feels them
    return label, np.where(label >= 0, felt, 0)


def _unrepeat(label: np.ndarray, keys: list[str], sizes: np.ndarray, gold: list[str]) -> None:
    """Of a block that the page has more often than the gold text, keep those whose neighbours are main text."""
    joined = f" {' '.join(gold)} "
    copies: dict[str, list[int]] = {}
    for i in np.flatnonzero(label > 0.5):
        copies.setdefault(keys[i], []).append(int(i))
    for key, places in copies.items():
        wanted = max(1, joined.count(f" {key} ")) if len(places) > 1 else 1
        if len(places) > wanted:
            near = {}
            for i in places:
                around = np.r_[max(0, i - 4) : i, i + 1 : min(len(keys), i + 5)]
                near[i] = np.maximum(label[around], 0) @ sizes[around] / (1 + sizes[around].sum())
            label[sorted(places, key=near.__getitem__, reverse=True)[wanted:]] = 0


def _grams(tokens: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[i:] for i in range(GRAM)))


def _by_snippets(texts: list[str], gold: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Labels of blocks that hold a snippet of one kind only, and a wanted one nowhere else."""
    label = np.full(len(texts), -1.0)
    joined = [" ".join(t.split()) for t in texts]
    wanted, unwanted = ([" ".join(s.split()) for s in gold.get(k) or ()] for k in ("with", "without"))
    for i, text in enumerate(joined):
        good, bad = any(s in text for s in wanted), any(s in text for s in unwanted)
        if good != bad:
            label[i] = good
    for snippet in wanted:
        matches = [i for i, text in enumerate(joined) if snippet in text]
        if len(matches) > 1:
            label[matches] = -1
    return label, np.where(label >= 0, 1.0, 0.0)


def load(warc: str, gold: str) -> list[GoldPage]:
    """The pages of an archive that have a gold line, joined by `record_id`."""
    with open(gold, encoding="utf-8", newline="\n") as f:
        golds = {record["record_id"].strip("<>"): record for record in map(json.loads, f)}
    pages = []
    for record in archive.records(warc):
        if isinstance(record, archive.Record) and record.type == "response":
            about = golds.get(record.head.get("warc-record-id", "").strip("<>"))
            if about is not None:
                pages.append(_page(Path(warc).name, about, record.stored))
    return pages


def _page(group: str, gold: dict[str, Any], payload: bytes) -> GoldPage:
    walked = walk.walk(walk.parse(decode(payload, None)[0]))
    domain = site(gold.get("url") or gold.get("name") or gold["record_id"])
    fold = int(hashlib.blake2b(domain.encode()).hexdigest(), 16) % FOLDS
    if walked.texts:
        return GoldPage(
            group, gold, payload, walked, blocks.features(walked), *shares(walked.texts, gold), fold
        )
    none = np.zeros((0, len(blocks.NAMES)), np.float32)
    return GoldPage(group, gold, payload, walked, none, none[:, 0], none[:, 0], fold)


def fit_blocks(pages: list[GoldPage], trees: int = TREES) -> lightgbm.Booster:
    """A model trained on the blocks of `pages` whose label is known; each archive weighs the same."""
    matrix, y, w = (
        np.concatenate([getattr(p, name) for p in pages]) for name in ("features", "label", "weight")
    )
    groups, of_page = np.unique([p.group for p in pages], return_inverse=True)
    group = np.repeat(of_page, [len(p.label) for p in pages])
    sums = np.bincount(group, w, len(groups))
    w = w * (sums.mean() / np.maximum(sums, 1))[group]
    use = w > 0
    data = lightgbm.Dataset(
        matrix[use], np.clip(y[use], 0, 1), weight=w[use], feature_name=list(blocks.NAMES)
    )
    return lightgbm.train(PARAMETERS, data, trees)


def cross_validate(pages: list[GoldPage], trees: int = TREES) -> list[str]:
    """Main text of every page by a model that has seen no page of its site."""
    texts = [""] * len(pages)
    for fold in range(FOLDS):
        start = time.monotonic()
        model = fit_blocks([p for p in pages if p.fold != fold], trees)
        for i, p in enumerate(pages):
            if p.fold == fold:
                texts[i] = blocks.main_text(p.blocks, model)
        print(f"fold {fold + 1} of {FOLDS}: {time.monotonic() - start:.0f} s", flush=True)
    return texts


def rivals() -> dict[str, Callable[[str], str]]:
    """The extractors to compare with, those that are installed."""
    import trafilatura
    from resiliparse.extract.html2text import extract_plain_text

    return {
        "trafilatura": lambda html: (
            trafilatura.extract(html, include_comments=True, include_tables=True) or ""
        ),
        "resiliparse": lambda html: extract_plain_text(
            html, main_content=True, preserve_formatting=True, alt_texts=False
        ),
    }


def scores_table(pages: list[GoldPage], trees: int = TREES) -> str:
    """The table of scores, Markdown: each extractor on each archive's pages, and how fast on one core."""
    extractors = {"auto": blocks.extract_main_text} | rivals()
    texts: dict[str, list[str]] = {name: [] for name in extractors}
    seconds = dict.fromkeys(extractors, 0.0)
    for start in range(0, len(pages), 20):  # in turns, so that a busy machine is as busy for all
        for name, extract in extractors.items():
            begin = time.process_time()
            texts[name] += [extract(decode(p.payload, None)[0]) for p in pages[start : start + 20]]
            seconds[name] += time.process_time() - begin
        print(f"{min(start + 20, len(pages))} of {len(pages)} pages", end="\r", flush=True)
    texts["auto"] = cross_validate(pages, trees)
    lines = []
    for group in sorted({p.group for p in pages}):
        own = [i for i, p in enumerate(pages) if p.group == group]
        for name in extractors:
            scores = score_texts([texts[name][i] for i in own], [pages[i].gold for i in own])
            if not lines:
                lines = [f"| pages | extractor | {' | '.join(scores)} | pages/s/core |", "|---" * 10 + "|"]
            shown = " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in scores.values())
            lines.append(f"| {group} | {name} | {shown} | {len(pages) / seconds[name]:.0f} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def save(pages: list[GoldPage], folder: Path, trees: int = TREES) -> bytes:
    """Train on all pages and write the model into `folder`; the same pages give the same bytes."""
    data = gzip.compress(fit_blocks(pages, trees).model_to_string().encode(), 9, mtime=0)
    (folder / blocks.MODEL.name).write_bytes(data)
    return data


def write_scores(card: Path, table: str) -> None:
    """Put the table between the marks in the model card."""
    text = card.read_text(encoding="utf-8") if card.exists() else f"{START}\n{END}\n"
    head, rest = text.split(START, 1)
    card.write_text(f"{head}{START}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Train, write the model, cross-validate, write the scores; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kit.maintain.train_blocks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("files", nargs="+", help="archive and gold, archive and gold, …")
    parser.add_argument("--out", type=Path, default=blocks.MODEL.parent, help="folder of model and card")
    asked = parser.parse_args(arguments)
    if len(asked.files) % 2:
        parser.error("every archive needs its gold file behind it")
    folder, pairs = asked.out, zip(asked.files[::2], asked.files[1::2])
    pages = [page for warc, gold in pairs for page in load(warc, gold)]
    print(f"{len(pages)} pages, {sum(len(p.label) for p in pages)} blocks", flush=True)
    size = len(save(pages, folder))
    print(f"model of {size} bytes in {folder}", flush=True)
    write_scores(folder / "blocks_card.md", scores_table(pages))


if __name__ == "__main__":
    main(sys.argv[1:])
