"""72: principles → critique → revision → preference pairs, by the model in this process or an endpoint.

A principle asks for the critique of a first answer, for a revision, and which of the two is better (Bai et al.
2022, Constitutional AI, arXiv:2212.08073, 3.1 and 4.1). Judges like a position more than a text (Wang et al. 2023,
arXiv:2305.17926): both orders are judged, and where they contradict there is no pair. A model in this process judges
by the log-odds of A and B, less those of one text beside itself (after Zhao et al. 2021, Calibrate Before Use).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import pyarrow as pa

from kit import show
from kit.lake import Counts, Lake, Manifest
from kit.params import ConstitutionalFeedback
from kit.train import models
from kit.train.chat import InProcess, Turn
from kit.train.encode import SECTION
from kit.train.endpoint import Endpoint
from kit.train.models import ModelError
from kit.train.principles import Principle, load_principles

UNDECIDED = 0.001
"""A probability so near to a half is no judgement: logits of a bfloat16 model are often just equal."""
JUDGEMENT_TURNS, NOT_DECIDED = "judgement depends on the order", "judged undecided"
BEGUN = "The better one is Text"
TEXTS = ["pair_id", "prompt", "chosen", "rejected", "item", "lang", "split", "principle"]
PAIR = pa.schema([*((x, pa.string()) for x in TEXTS), ("confidence", pa.float64())])
"""What 70 reads of 50's pairs, and whence a pair comes; all from train rows, so all on that side."""
TOTALS = ("prompt_tokens", "reply_tokens", "seconds")
ENDED = re.compile(r"(?s).*(?:[.!?…][\"'”’)]*(?=\s|$)|[。！？])")


@dataclass
class Case:
    """One prompt under one principle, on its way; `toward`: probability that the revision is better, by order."""

    row: dict[str, Any]
    principle: Principle
    answer: str = ""
    critique: str = ""
    revision: str = ""
    toward: tuple[float, float] | None = None
    turns_uncalibrated: bool | None = None
    lost: str = ""
    error: str = ""

    @property
    def alive(self) -> bool:
        """Whether it is still on its way."""
        return not self.lost and not self.error

    def chat(self) -> list[Turn]:
        """What was said so far."""
        asks, p = question(self.row["prompt"]), self.principle
        said = [asks, self.answer, p.critique, self.critique, p.revise, ""]
        return [{"role": ("user", "assistant")[i % 2], "content": said[i]} for i in range(said.index(""))]

    def choice(self, a: str, b: str) -> list[Turn]:
        """The judge's question. A text that goes on is judged without its prompt: the shipped model then preferred
        20 of 24 human texts to its own for their detail, and 14 with it."""
        prompt = self.row["prompt"]
        request = f"Request: {question(prompt)}\n\n" if SECTION.match(prompt) else ""
        asked = f"{request}Text A: {a}\n\nText B: {b}\n\n{self.principle.judge}"
        return [{"role": "user", "content": asked}]


def question(prompt: str) -> str:
    """A row's prompt as a request: that of an instruction row, or the beginning of a text to go on with."""
    if SECTION.match(prompt):
        return SECTION.sub("", prompt).strip()
    return f"Continue this text with two or three sentences: {prompt}"


def constitutional_feedback(p: ConstitutionalFeedback, lake: Lake) -> Manifest:
    """Commit `pairs.jsonl`, tables `preferences`, `judgements` (every case) and `calls` (every request).

    Prompts are the first ones of the train rows, each under `feedback_principles` principles, all used alike.
    Counts: prompts in, further cases created; out the pairs. Metrics: how judgements split, calls, tokens. Raises
    `ParamError` for the principles, `ModelError` for an endpoint that cannot be used and rows without prompts. An
    endpoint may reply otherwise in every run, and its judge is not asked for log-probabilities.
    """
    with lake.stage(p) as out:
        rows = lake.table(out.read("50_build_datasets"), "train").to_pylist()
        principles = load_principles(out.read_outside(p.principles_file))
        groups = cases(rows, principles, p)
        found = [case for group in groups for case in group]
        if p.endpoint:
            asked = Endpoint(p.endpoint, p.endpoint_model, p.endpoint_key_from, p.endpoint_timeout_s)
        else:
            models.set_threads(p.threads)
            asked = InProcess(p.base_model, dtype=p.dtype, trust_remote_code=p.trust_remote_code, seed=p.seed)
        calibrated = asked.gives_odds and p.feedback_calibrate
        total = len(found) * (6 if calibrated else 4) + (0 if found[0].answer else len(groups))
        with show.progress(total, "feedback", "calls") as bar:
            if p.feedback_seed_answer == "generate":
                heads = [group[0] for group in groups]
                _say(asked, "answer", heads, p.feedback_tokens, p.feedback_temperature, bar)
                for head, *rest in groups:
                    for case in rest:
                        case.answer, case.lost, case.error = head.answer, head.lost, head.error
            _say(asked, "critique", found, p.feedback_tokens, 0.0, bar)
            _say(asked, "revision", found, p.feedback_tokens, 0.0, bar)
            _drop(found, asked.length, p.max_tokens)
            _judge(asked, found, calibrated, bar)
        kept = [pair(case) for case in found if case.alive]
        lines = "".join(json.dumps({k: x[k] for k in PAIR.names[1:]}) + "\n" for x in kept)
        out.bytes("pairs.jsonl", lines.encode(), rows=len(kept))
        out.table("preferences", pa.Table.from_pylist(kept, schema=PAIR))
        out.table("judgements", pa.Table.from_pylist([judgement(case) for case in found]))
        out.table("calls", pa.Table.from_pylist([asdict(c) for c in asked.calls]), measured=True)
        counts = Counts(
            records_in=len(groups),
            created=len(found) - len(groups),
            records_out=len(kept),
            dropped=dict(Counter(c.lost for c in found if c.lost)),
            failed=dict(Counter(c.error for c in found if c.error)),
        )
        return out.commit(counts, metrics(found, asked))


def cases(rows: Sequence[dict], principles: list[Principle], p: ConstitutionalFeedback) -> list[list[Case]]:
    """Cases of the first `feedback_prompts` different prompts; the principles go round in a shuffled order."""
    prompts: dict[str, dict[str, Any]] = {}
    for row in rows:
        asks = (row["prompt"] or "").strip() and (row["completion"] or "").strip()
        if asks and len(prompts) < p.feedback_prompts:
            prompts.setdefault(row["prompt"], row)
    if not prompts:
        raise ModelError("no train row of 50_build_datasets has a prompt, so there is nothing to answer")
    order = Random(p.seed).sample(principles, len(principles))
    each, given = min(p.feedback_principles, len(order)), p.feedback_seed_answer == "dataset"
    return [
        [
            Case(row, order[(i * each + j) % len(order)], row["completion"].strip() * given)
            for j in range(each)
        ]
        for i, row in enumerate(prompts.values())
    ]


def _say(asked: Any, role: str, found: Sequence[Case], tokens: int, temperature: float, bar: Any) -> None:
    going = [case for case in found if case.alive]
    replies = asked.ask(role, [case.chat() for case in going], tokens, temperature, bar)
    for case, (reply, error) in zip(going, replies, strict=True):
        if role != "critique":
            # a small model says the beginning again, and its last sentence is often cut
            reply = re.sub(rf"(?i)^\W*{re.escape(case.row['prompt'].strip())}\W*", "", reply)
            reply = (ENDED.match(reply) or [reply])[0].strip()
        setattr(case, role, reply)
        case.error, case.lost = error, "" if error or reply else f"empty {role}"


def _drop(found: Sequence[Case], length: Any, max_tokens: int) -> None:
    """Leave out what is no pair to learn from, before a judge is asked."""
    seen = set()
    for case in (c for c in found if c.alive):
        texts = (case.row["prompt"], case.answer, case.revision)
        prompt, answer, revision = (" ".join(text.casefold().split()) for text in texts)
        if revision == answer:
            case.lost = "revision equals the first answer"
        elif (prompt, revision) in seen:
            case.lost = "same revision under another principle"
        elif max(length(f"{texts[0]} {side}") for side in texts[1:]) > max_tokens:
            case.lost = "pair longer than max_tokens"
        seen.add((prompt, revision))


def _judge(asked: Any, found: Sequence[Case], calibrated: bool, bar: Any) -> None:
    """Judge each pair in both orders, and each text beside itself where a liking of a letter is to be taken off."""
    going = [case for case in found if case.alive]
    orders = [lambda c: (c.answer, c.revision), lambda c: (c.revision, c.answer)]
    if calibrated:
        orders += [lambda c: (c.answer, c.answer), lambda c: (c.revision, c.revision)]
    judged = asked.judge([case.choice(*order(case)) for case in going for order in orders], BEGUN, bar)
    for n, case in enumerate(going):
        mine = judged[n * len(orders) : (n + 1) * len(orders)]
        case.error = next((error for _, error in mine if error), "")
        odds = [x for x, _ in mine]
        if case.error or None in odds:
            case.lost = "" if case.error else NOT_DECIDED
            continue
        case.turns_uncalibrated = odds[0] * odds[1] > 0
        liking = sum(odds[2:]) / 2 if odds[2:] else 0.0
        case.toward = tuple((1 + math.tanh(x / 2)) / 2 for x in (liking - odds[0], odds[1] - liking))
        if min(abs(x - 0.5) for x in case.toward) < UNDECIDED:
            case.lost = NOT_DECIDED
        elif (case.toward[0] > 0.5) != (case.toward[1] > 0.5):
            case.lost = JUDGEMENT_TURNS


def pair(case: Case) -> dict[str, Any]:
    """The pair of a judged case. The answers go on where the prompt ends, with a space where it has none, as the
    rows of the data set do: the reader of preference files takes texts that do not join for questions."""
    prompt, toward = case.row["prompt"], sum(case.toward) / 2
    sides = [("" if prompt[-1:].isspace() else " ") + text for text in (case.revision, case.answer)]
    chosen, rejected = sides if toward > 0.5 else sides[::-1]
    name = hashlib.blake2b("\x1f".join([prompt, chosen, rejected]).encode(), digest_size=10).hexdigest()
    about = [*map(case.row.get, ("item", "language")), "train", case.principle.name, max(toward, 1 - toward)]
    return dict(zip(PAIR.names, [name, prompt, chosen, rejected, *about], strict=True))


def judgement(case: Case) -> dict[str, Any]:
    """All that became of a case, as a row."""
    second, first = case.toward or (None, None)
    better = "revision" if case.toward and second + first > 1 else "first answer"
    return {
        "prompt": case.row["prompt"],
        "principle": case.principle.name,
        **{k: getattr(case, k) for k in ("answer", "critique", "revision")},
        "revision_better_when_second": second,
        "revision_better_when_first": first,
        "verdict": case.error or case.lost or f"{better} is better",
    }


def metrics(found: Sequence[Case], asked: Any) -> dict[str, Any]:
    """How judgements split, and what was asked; tokens only where they are known."""
    judged = [c for c in found if c.toward]
    share = lambda n: round(n / max(len(judged), 1), 4)  # noqa: E731
    return {
        "judged": len(judged),
        "revision_chosen": sum(c.alive and sum(c.toward) > 1 for c in judged),
        "order_dependent_share": share(sum(c.lost == JUDGEMENT_TURNS for c in judged)),
        "order_dependent_share_uncalibrated": share(sum(c.turns_uncalibrated for c in judged)),
        "calls": dict(Counter(c.role for c in asked.calls)),
        "call_errors": dict(Counter(c.error for c in asked.calls if c.error)),
        **{k: sum(getattr(c, k) or 0 for c in asked.calls) for k in TOTALS},
        "what_ran": asked.what_ran,
    }
