"""63: a review's label by an encoder, the same training as one process and under four kinds of parallelism.

Each way is a `torchrun` of `kit.train.parallel` with its ranks as real processes. Its sharded checkpoint is consolidated,
and the consolidated model is what is scored on held-out rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kit import process
from kit.errors import ModelError, ParamError
from kit.lake.manifest import Counts, Manifest
from kit.lake.store import Lake
from kit.params import ClassifySentiment, did_you_mean
from kit.progress import progress
from kit.train.models import load
from kit.train.models.consolidate import consolidate
from kit.train.parallel.rank import timed
from kit.train.parallel.rank_job import CHECKPOINT, ROWS, START, RankJob, padded_length, save_rows, steps_of
from kit.train.parallel.ranks import jobs, launch, require
from kit.train.parallel.strategies import STRATEGIES
from kit.train.plan.flops import ModelFlops, model_flops
from kit.train.plan.scaling import Links, StepWork, predict

LABELS = {0: "negative", 1: "positive"}
"""Ratings 1 and 2, and 3 to 5 (50 makes them)."""


def classify(p: ClassifySentiment, lake: Lake) -> Manifest:
    """Train one classifier in every way of `p.strategies` and commit the table `strategies`, a row a way.

    Of each: accuracy on held-out rows, largest difference of a step's loss from one process's (float32), seconds a
    step, speed-up, MFU, share of communication. `ranks` has what each process held; `model/` is the consolidated
    checkpoint of the first way. Raises `ParamError` for a way that does not exist, `ModelError` for rows of one label
    only, a number of ranks that does not divide what they share, and a rank that died.
    """
    for name in p.strategies:
        if name not in STRATEGIES:
            raise ParamError(f"parameter 'strategies': no '{name}'{did_you_mean(name, STRATEGIES)}")
    with lake.stage(p) as out, tempfile.TemporaryDirectory(prefix="kit-classify-") as temp:
        data, folder = out.read("50_build_datasets"), Path(temp)
        rows = lake.table(data, "train").to_pylist()
        train, held = labelled(rows, "train"), labelled(lake.table(data, "heldout").to_pylist(), "heldout")
        tokenizer = load.open_pretrained(AutoTokenizer, p.encoder)
        counted = write_start(p, tokenizer, folder / START)
        encoded = encode_texts(tokenizer, [text for text, _ in train], p.max_tokens)
        save_rows(folder / ROWS, encoded, [label for _, label in train])
        steps = schedule(p, encoded)
        reached = {i for step in steps for i in step}
        lengths = [[len(encoded[i]) for i in step] for step in steps]
        config = AutoConfig.from_pretrained(folder / START)
        ways = {name: jobs(p, name) for name in ("one", *p.strategies)}
        # all of them before the first starts, not each when its turn comes
        for name, (job, ranks) in ways.items():
            require(name, job, ranks, config)
        way_rows: list[dict[str, Any]] = []
        losses: dict[str, list[float]] = {}
        reports: list[dict[str, Any]] = []
        with progress(len(ways) * (p.classify_steps + p.check_steps), "classify", "steps") as bar:
            for name, (job, ranks) in ways.items():
                report = launch(folder, job, ranks, bar)
                # of the model that its files make, not of the one in the ranks' memory
                accuracy = consolidated_accuracy(p, folder, tokenizer, held, folder / f"model-{name}")
                way_rows.append(way_row(name, job, report, accuracy, counted, lengths))
                losses[name] = report[0]["checked"] + report[0]["losses"]
                reports += report
        for row in way_rows:
            way = ways[row["strategy"]]
            row["predicted"] = predicted_speed_up(way, row, way_rows[0], config, lengths)
        _beside_one(way_rows, losses, p.check_steps)
        base = baseline(train, held)
        out.rows("strategies", [{**row, "links": str(row["links"])} for row in way_rows], measured=True)
        out.rows("ranks", [_flat(r) for r in reports], measured=True)
        out.table("losses", pa.Table.from_pydict(losses), measured=True)
        out.folder("model", folder / f"model-{([*ways][1:] or ['one'])[0]}")
        dropped = {
            "no label": len(rows) - len(train),
            "not reached in classify_steps": len(train) - len(reached),
        }
        counts = Counts(
            records_in=len(rows), records_out=len(reached), dropped={k: v for k, v in dropped.items() if v}
        )
        metrics = {"strategies": way_rows, "baseline_accuracy": base, "heldout_rows": len(held)}
        metrics |= {"majority_accuracy": majority(held), "what_ran": reports, "base": p.encoder}
        return out.commit(counts, metrics)


def _beside_one(way_rows: list[dict[str, Any]], losses: dict[str, list[float]], check_steps: int) -> None:
    """Note of each way its speed-up over one process, the first row, and how far its losses are from that one's."""
    for row in way_rows:
        row["speed_up"] = way_rows[0]["seconds"] / row["seconds"]
        # only the first steps, in float32: later ones drift apart by rounding, which says nothing of a strategy
        checked = losses[row["strategy"]][:check_steps]
        row["loss_difference"] = max(abs(a - b) for a, b in zip(checked, losses["one"]))


def labelled(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[str, int]]:
    """(text, label) of the rows that have one; raises `ModelError` for none, or all of one label."""
    pairs = [(r["completion"].strip(), int(r["label"])) for r in rows if r["label"] is not None]
    labels = {label for _, label in pairs}
    if len(labels) < 2:
        what = f"all {len(pairs)} are {LABELS[labels.pop()]}" if labels else "none has a rating"
        raise ModelError(f"the {name} rows of 50_build_datasets cannot teach a classifier: {what}")
    return pairs


def write_start(p: ClassifySentiment, tokenizer: PreTrainedTokenizerBase, folder: Path) -> ModelFlops:
    """Write the model that every way begins with: the encoder and a new head, no dropout; returns its FLOPs."""
    torch.manual_seed(p.seed)
    said = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # that the head is new is known
    # dropout draws differ by rank, and then so do the losses that are to be compared
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model = load.open_pretrained(
        AutoModelForSequenceClassification,
        p.encoder,
        dtype=torch.float32,
        use_safetensors=True,
        num_labels=len(LABELS),
        id2label=LABELS,
        label2id={v: k for k, v in LABELS.items()},
        **none,
    )
    transformers_logging.set_verbosity(said)
    most = model.config.max_position_embeddings
    if p.max_tokens > most:
        raise ModelError(f"max_tokens={p.max_tokens} is longer than the model's context of {most} tokens")
    # a temporary folder's name has no business in a model that is kept
    model.config._name_or_path = p.encoder
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return model_flops(model, causal=False)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int
) -> list[list[int]]:
    """Token ids of each text, cut to `max_tokens`."""
    return tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]


def schedule(p: ClassifySentiment, encoded: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows of every step, as all ways see them; raises `ModelError` for fewer rows than a step takes."""
    (fit,) = p.fits()
    if len(encoded) < fit.step_rows:
        raise ModelError(
            f"{len(encoded)} rows are fewer than a step takes ({fit.step_rows}): lower {fit.batch_field}"
        )
    return list(steps_of([len(ids) for ids in encoded], fit.step_rows, fit.steps, p.seed))


def consolidated_accuracy(
    p: ClassifySentiment,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    held: Sequence[tuple[str, int]],
    target: Path,
) -> float:
    """Consolidate the sharded checkpoint into `target`, load that, and return its accuracy on `held`."""
    consolidate(folder / CHECKPOINT, target, 1000, folder / START)
    model = AutoModelForSequenceClassification.from_pretrained(target, dtype=torch.float32)
    model.to(load.device()).eval()
    # like lengths together: less padding
    order = sorted(range(len(held)), key=lambda i: len(held[i][0]))
    right = 0
    for start in range(0, len(order), 32):
        taken = [held[i] for i in order[start : start + 32]]
        inputs = tokenizer(
            [text for text, _ in taken],
            truncation=True,
            max_length=p.max_tokens,
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            said = model(**inputs.to(model.device)).logits.argmax(-1).tolist()
        right += sum(a == label for a, (_, label) in zip(said, taken))
    return right / len(held)


def way_row(
    name: str,
    job: RankJob,
    report: Sequence[dict[str, Any]],
    accuracy: float,
    counted: ModelFlops,
    steps: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """One way as one row; `steps`: the lengths in tokens of each one's rows.

    Times and FLOPs are of the same steps: all but warm-up and the one that was profiled.
    """
    seconds = report[0]["seconds"]
    counted_steps = timed(len(seconds))
    tokens = sum(sum(steps[i]) for i in counted_steps)
    flops = sum(counted.total(steps[i]) for i in counted_steps)
    spent = sum(seconds[i] for i in counted_steps)
    # all ranks' together, each measured while the others computed, too
    peak = sum(r["peak_flops_per_s"] for r in report)
    return {
        "strategy": name,
        "ranks": len(report),
        "arrangement": " × ".join(f"{n} {axis}" for axis, n in report[0]["mesh"].items() if n > 1)
        or "1 process",
        "device": report[0]["name"],
        "accuracy": accuracy,
        "seconds": spent,
        "step_seconds": spent / len(counted_steps),
        "tokens_per_s": tokens / spent,
        "mfu": flops / spent / peak,
        "communication": sum(r["communication"] for r in report) / len(report),
        "peak_flops_a_rank": peak / len(report),
        "links": report[0]["links"],
        "parameters_a_rank": max(r["parameters_here"] for r in report),
        "dtype": job.dtype,
    }


def predicted_speed_up(
    way: tuple[RankJob, int],
    row: dict[str, Any],
    one: dict[str, Any],
    config: PretrainedConfig,
    steps: Sequence[Sequence[int]],
) -> float:
    """The speed-up that `kit.train.plan.scaling` would have said, from one process's step and the links measured by these.

    Arithmetic is taken to be slower by as much as a matmul is while all processes compute, or as there are fewer cores
    than threads. Embeddings, biases and norms that no rank divides are taken to be divided.
    """
    job, ranks = way
    if ranks == 1:
        return 1.0
    longest = [padded_length(max(step)) for step in steps]
    # in units of one process's step: it makes `step_seconds` FLOPs at one FLOP/s
    work = StepWork(
        parameters=one["parameters_a_rank"],
        trained=one["parameters_a_rank"],
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        hidden=config.hidden_size,
        tokens=sum(map(sum, steps)) / len(steps),
        positions=job.rows * sum(longest) / len(longest),
        flops=one["step_seconds"],
        activations=0.0,
        rows=job.rows,
        microbatches=job.accumulation,
        chunks=job.accumulation * ranks,
        value=2.0 if job.dtype == "bfloat16" else 4.0,
        end=config.vocab_size * config.hidden_size,
    )
    slower = row["peak_flops_a_rank"] / one["peak_flops_a_rank"]
    if not torch.cuda.is_available():
        slower = min(slower, process.cores() / (ranks * job.threads))
    links = Links(**{**row["links"], "flops_per_s": slower})
    # over one process that has a core to itself
    return slower * predict(work, links, job.strategy, ranks, job.tensor).speed_up


def _flat(report: dict[str, Any]) -> dict[str, Any]:
    """A rank's report as a row of a table."""
    who = ("strategy", "rank", "device", "name", "threads")
    what = ("parameters_here", "communication", "peak_flops_per_s")
    place = ", ".join(f"{axis} {i}" for axis, i in report["coordinate"].items())
    shards = "; ".join(f"{name} {local} of {whole}" for name, (local, whole) in report["shards"].items())
    return {name: report[name] for name in (*who, *what)} | {"place": place, "shards": shards}


def baseline(train: Sequence[tuple[str, int]], held: Sequence[tuple[str, int]]) -> float:
    """Accuracy of TF-IDF (words and pairs, sublinear) and logistic regression on the same rows, by scikit-learn."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit(*zip(*train))
    return float(model.score(*zip(*held)))


def majority(rows: Sequence[tuple[str, int]]) -> float:
    """Share of the more frequent label: what a classifier gets for nothing."""
    positive = sum(label for _, label in rows) / len(rows)
    return max(positive, 1 - positive)
