"""72: principles → critique → revision → preference pairs, by the model in this process or an endpoint.

A principle asks for the critique of a first answer, for a revision, and which is better (Bai et al. 2022,
Constitutional AI, arXiv:2212.08073). Judges like a position more than a text (Wang et al. 2023,
arXiv:2305.17926): both orders are judged, and where they contradict there is no pair. A model in this process
judges by log-odds of A and B, less those of equal texts (after Zhao et al. 2021, Calibrate Before Use).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kit.errors import ModelError, ParamError
from kit.lake.manifest import Counts, Manifest
from kit.lake.store import Lake
from kit.params import ConstitutionalFeedback
from kit.progress import progress
from kit.train.align.chat import InProcess, Turn
from kit.train.align.endpoint import Endpoint
from kit.train.encode.encode import SECTION
from kit.train.models import load

UNDECIDED = 0.001  # so near to a half is no judgement: logits of a bfloat16 model are often just equal
JUDGEMENT_TURNS, NOT_DECIDED = "judgement depends on the order", "judged undecided"
ENDED = re.compile(r"(?s).*(?:[.!?…][\"'”’)]*(?=\s|$)|[。！？])")
TEXTS = ("prompt", "chosen", "rejected", "split", "principle")
PAIR = pa.schema([*((name, pa.string()) for name in TEXTS), ("confidence", pa.float64())])
"""What 70 reads of a pair, and where it comes from; all from train rows, so all on that side."""


class Principle(BaseModel):
    """What one principle asks a model for; plain words, sent as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, str_min_length=1)
    name: str
    critique: str
    revise: str
    judge: str


@dataclass
class PrincipleCase:
    """One prompt under one principle; `toward`: probabilities that the revision is better, by order."""

    prompt: str
    principle: Principle
    answer: str = ""
    critique: str = ""
    revision: str = ""
    toward: tuple[float, ...] = ()
    turns_uncalibrated: bool = False
    lost: str = ""
    error: str = ""

    def chat(self) -> list[Turn]:
        """What was said so far, up to the next request."""
        asks = self.principle
        said = [question(self.prompt), self.answer, asks.critique, self.critique, asks.revise, ""]
        return [{"role": ("user", "assistant")[i % 2], "content": said[i]} for i in range(said.index(""))]

    def choice(self, a: str, b: str) -> list[Turn]:
        """The judge's question, without a text to go on with: a small model judges by that alone."""
        request = f"Request: {question(self.prompt)}\n\n" if SECTION.match(self.prompt) else ""
        asked = f"{request}Text A: {a}\n\nText B: {b}\n\n{self.principle.judge}"
        return [{"role": "user", "content": asked}]


def load_principles(path: str) -> list[Principle]:
    """The principles in a YAML file, a list of `{name, critique, revise, judge}`; raises `ParamError`."""
    what = f"principles_file '{Path(path).name}'"
    try:
        items = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return TypeAdapter(Annotated[list[Principle], Field(min_length=1)]).validate_python(items)
    except ValidationError as error:
        first = error.errors()[0]
        raise ParamError(f"{what}, item {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ParamError(f"{what} is not YAML: {' '.join(str(error).split())}") from None


def question(prompt: str) -> str:
    """A row's prompt as a request: that of an instruction row, or the beginning of a text to go on with."""
    request = SECTION.sub("", prompt).strip()
    return request if SECTION.match(prompt) else f"Continue this text with two or three sentences: {prompt}"


def constitutional_feedback(p: ConstitutionalFeedback, lake: Lake) -> Manifest:
    """Commit tables `preferences` (what 70 reads), `judgements` (every case) and `calls` (every request).

    Counts: prompts in, further cases created; out the pairs. An endpoint may reply otherwise in every run.
    Raises `ParamError` for the principles, `ModelError` for an endpoint or rows that cannot be used.
    """
    with lake.stage(p) as out:
        rows = lake.table(out.read("50_build_datasets"), "train").to_pylist()
        principles = load_principles(out.read_outside(p.principles_file))
        each = min(p.feedback_principles, len(principles))
        all_cases = cases(rows, principles, each, p)
        prompts = len(all_cases) // each
        if p.endpoint:
            asked = Endpoint(p.endpoint, p.endpoint_model, p.endpoint_key_from, p.endpoint_timeout_s)
        else:
            load.set_threads(p.threads)
            asked = InProcess(p.base_model, dtype=p.dtype, trust_remote_code=p.trust_remote_code, seed=p.seed)
        calls = prompts + len(all_cases) * (6 if asked.gives_odds else 4)
        with progress(calls, "feedback", "calls") as bar:
            _say(asked, "answer", all_cases[::each], p.feedback_tokens, p.feedback_temperature, bar)
            for i, case in enumerate(all_cases):
                first = all_cases[i - i % each]
                case.answer, case.lost, case.error = first.answer, first.lost, first.error
            _say(asked, "critique", all_cases, p.feedback_tokens, 0.0, bar)
            _say(asked, "revision", all_cases, p.feedback_tokens, 0.0, bar)
            _drop(asked, all_cases, p.max_tokens)
            _judge(asked, all_cases, bar)
        pairs = [pair(case) for case in _going(all_cases)]
        out.rows("preferences", pairs, PAIR)
        out.rows("judgements", [judgement(case) for case in all_cases])
        out.rows("calls", [asdict(call) for call in asked.calls], measured=True)
        counts = {"records_in": prompts, "created": len(all_cases) - prompts, "records_out": len(pairs)}
        counts |= {"dropped": Counter(c.lost for c in all_cases if c.lost)}
        counts |= {"failed": Counter(c.error for c in all_cases if c.error)}
        return out.commit(Counts(**counts), metrics(all_cases, asked))


def cases(
    rows: list[dict], principles: list[Principle], each: int, p: ConstitutionalFeedback
) -> list[PrincipleCase]:
    """`each` cases for each of the first `feedback_prompts` prompts; principles take turns, shuffled."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows if (row["prompt"] or "").strip()))
    if not prompts:
        raise ModelError("no train row of 50_build_datasets has a prompt: there is nothing to answer")
    order = Random(p.seed).sample(principles, len(principles))
    asked = [prompt for prompt in prompts[: p.feedback_prompts] for _ in range(each)]
    return [PrincipleCase(prompt, order[i % len(order)]) for i, prompt in enumerate(asked)]


def _going(all_cases: Sequence[PrincipleCase]) -> list[PrincipleCase]:
    return [case for case in all_cases if not case.lost and not case.error]


def _say(
    asked: Any, role: str, all_cases: Sequence[PrincipleCase], tokens: int, temperature: float, bar: Any
) -> None:
    """Ask for each case's next text; the prompt said again and a sentence cut short are left out."""
    going = _going(all_cases)
    replies = asked.ask(role, [case.chat() for case in going], tokens, temperature, bar)
    for case, (reply, error) in zip(going, replies, strict=True):
        reply = re.sub(rf"(?i)^\W*{re.escape(case.prompt.strip())}\W*", "", reply)
        reply = (ENDED.match(reply) or [reply])[0].strip()
        setattr(case, role, reply)
        case.error, case.lost = error, "" if error or reply else f"empty {role}"


def _drop(asked: Any, all_cases: Sequence[PrincipleCase], max_tokens: int) -> None:
    """Leave out what is no pair to learn from, before a judge is asked."""
    key = lambda case, text: (case.prompt, " ".join(text.casefold().split()))  # noqa: E731
    seen = {key(case, case.answer) for case in all_cases}
    for case in _going(all_cases):
        if key(case, case.revision) in seen:
            case.lost = "revision equals the first answer or another revision"
        elif asked.length(f"{case.prompt} {max(case.answer, case.revision, key=len)}") > max_tokens:
            case.lost = "pair longer than max_tokens"
        seen.add(key(case, case.revision))


def _judge(asked: Any, all_cases: Sequence[PrincipleCase], bar: Any) -> None:
    """Judge pairs in both orders, and texts beside themselves where a liking of a letter can be taken off."""
    going, n = _going(all_cases), 4 if asked.gives_odds else 2
    texts = [(case, case.answer, case.revision) for case in going]
    chats = [case.choice(*order) for case, a, b in texts for order in [(a, b), (b, a), (a, a), (b, b)][:n]]
    judged = asked.judge(chats, bar)
    for i, case in enumerate(going):
        odds, errors = zip(*judged[i * n : (i + 1) * n], strict=True)
        case.error = next(filter(None, errors), "")
        if case.error or None in odds:
            case.lost = "" if case.error else NOT_DECIDED
            continue
        liking, case.turns_uncalibrated = sum(odds[2:]) / 2, odds[0] * odds[1] > 0
        second, first = ((1 + math.tanh(logit / 2)) / 2 for logit in (liking - odds[0], odds[1] - liking))
        if min(abs(second - 0.5), abs(first - 0.5)) < UNDECIDED:
            case.lost = NOT_DECIDED
        elif (second > 0.5) != (first > 0.5):
            case.lost = JUDGEMENT_TURNS
        case.toward = (second, first)


def pair(case: PrincipleCase) -> dict[str, Any]:
    """The pair of a judged case; the answers go on where the prompt ends, with a space where it has none."""
    toward, space = sum(case.toward) / 2, "" if case.prompt[-1:].isspace() else " "
    better, worse = (case.revision, case.answer) if toward > 0.5 else (case.answer, case.revision)
    texts = (case.prompt, space + better, space + worse, "train", case.principle.name)
    return dict(zip(PAIR.names, (*texts, max(toward, 1 - toward)), strict=True))


def judgement(case: PrincipleCase) -> dict[str, Any]:
    """All that became of a case, as a row."""
    better = "revision" if sum(case.toward) > 1 else "first answer"
    verdict = case.error or case.lost or f"{better} is better"
    texts = {role: getattr(case, role) for role in ("prompt", "answer", "critique", "revision")}
    return {**texts, "principle": case.principle.name, "toward": list(case.toward), "verdict": verdict}


def metrics(all_cases: Sequence[PrincipleCase], asked: Any) -> dict[str, Any]:
    """Shares of judgements that turn with the order, with a liking of letters and without; calls by role."""
    judged = max(sum(bool(case.toward) for case in all_cases), 1)
    turned = sum(case.lost == JUDGEMENT_TURNS for case in all_cases)
    return {
        "order_dependent_share": round(turned / judged, 4),
        "order_dependent_share_uncalibrated": round(sum(c.turns_uncalibrated for c in all_cases) / judged, 4),
        "calls": dict(Counter(call.role for call in asked.calls)),
        "what_ran": asked.what_ran,
    }
