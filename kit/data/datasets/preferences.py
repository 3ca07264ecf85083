"""Preference pairs: out of readers' votes, out of files, and what is wrong with a set of them.

A preference file is JSON Lines of three texts, `prompt`, `chosen` and `rejected`, and may tell its `lang`. Votes
cast in 90_compare_generations are such a file: a vote adds `models` (`{"chosen": "aligned", "rejected": "tuned"}`)
and `voted_at` (ISO 8601, UTC), a tie writes no line; keys that are not named here are ignored.
Pairs of votes on reviews grow with the square of the reviews of one subject; all pairs are held in memory.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import pyarrow as pa

from kit.data.datasets import formats
from kit.data.datasets.formats import Row, clean, fold, row_id
from kit.lake.manifest import Account, Counts
from kit.params import BuildDatasets

COLUMNS = (
    "pair_id prompt chosen rejected item chosen_row rejected_row chosen_helpful rejected_helpful source split"
)
PAIR = pa.schema([(x, pa.float32() if "_helpful" in x else pa.string()) for x in COLUMNS.split()])
"""Rows and votes are null in pairs of a file, `source` (`FILE:LINE`) in pairs of votes on reviews."""
ROLE = re.compile(r"^(human|user|system|gpt|assistant)\s*:", re.IGNORECASE | re.MULTILINE)
CHECKS = ("empty prompt or side", "identical sides", "duplicate", "contradictory", "leak: prompt also in train",
          "leak: subject also in train", "leak: text also in train")  # fmt: skip
LENGTH_RATIO, LENGTH_SHARE = 1.25, 0.1
"""How uneven the sides' mean lengths may be, and how far from a half the share of pairs whose chosen side is longer:
length is the best known thing that a reward learns instead of quality (Singhal et al. 2023, arXiv:2310.03716)."""


def build_pairs(
    voted: Iterable[Row], files: Iterable[tuple[str, str]], sides: Mapping[str, str], p: BuildDatasets
) -> tuple[list[Row], list[Row], Counts]:
    """Valid pairs of votes and files, the validator's report, and the account: lines in + pairs of votes = out + lost.

    A pair of a file lies where rows that ask the same do (`sides`: question group → split), or else by that hash.
    """
    pairs = list(vote_pairs(voted, p))
    account = Account(created=len(pairs))
    for name, uri in files:
        for number, line in formats.json_lines(uri):
            own_pair = file_pair(line, f"{name}:{number}", p)
            formats.note(account, own_pair)
            for pair in own_pair.rows:
                group = formats.question_group(pair["question"])
                far = "heldout" if formats.on_far_side(group, p.heldout_share, p.seed) else "train"
                pairs.append(pair | {"split": sides.get(group, far)})
    kept, report = validate_pairs(pairs)
    account.dropped += Counter({r["check"]: r["dropped"] for r in report})
    account.records_out = len(kept)
    return kept, report, account.counts(by_name=False)


def vote_pairs(rows: Iterable[Row], p: BuildDatasets) -> Iterator[Row]:
    """Pairs of reviews of one subject that readers found clearly more and clearly less helpful."""
    by_item: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["item"] and (row["votes"] or 0) >= p.min_votes:
            by_item[row["group"]].append(row)
    for item in sorted(by_item):
        for a, b in combinations(by_item[item], 2):
            worse, better = sorted((a, b), key=lambda r: r["helpful"] / r["votes"])
            shares = [r["helpful"] / r["votes"] for r in (better, worse)]
            if shares[0] - shares[1] >= p.min_helpful_gap:
                pair = {"pair_id": row_id(better["row_id"], worse["row_id"])}
                pair |= {k: better[k] for k in ("prompt", "item", "split")}
                for side, row, helpful in zip(("chosen", "rejected"), (better, worse), shares, strict=True):
                    pair |= {
                        side: row["completion"],
                        f"{side}_row": row["row_id"],
                        f"{side}_helpful": helpful,
                    }
                yield pair


def file_pair(line: Row | str, source: str, p: BuildDatasets) -> formats.Made:
    """The pair of one line of a preference file, its split still open; `question` is what it asks.

    Texts that join without white space are a question and its answers: their prompt gets the delimiters of an
    instruction row (and loses the `human:` of a single turn), so that tuning and alignment see one form. Other
    prompts, such as those of 90, stay as they are.
    """
    texts = [line.get(k) if isinstance(line, dict) else None for k in ("prompt", "chosen", "rejected")]
    if not all(isinstance(text, str) for text in texts):
        wrong = line if isinstance(line, str) else "no texts 'prompt', 'chosen' and 'rejected'"
        return formats.Made([], failed=f"preference file: {wrong}")
    prompt, chosen, rejected = map(clean, texts)
    language = formats.line_language(line, f"{prompt}\n{chosen}")
    if p.train_languages and language and language not in p.train_languages:
        return formats.Made([], formats.OTHER_LANGUAGE)
    roles, question = ROLE.findall(prompt), prompt.strip()
    if len(roles) == 1 and question.casefold().startswith(("human", "user")):
        question = ROLE.sub("", question, count=1).strip()
    joined = prompt[-1:].isspace() or any(text[:1].isspace() for text in (chosen, rejected))
    if question and (roles or not joined):
        prompt = formats.instruction_prompt(question)
    pair = {"pair_id": row_id("pair", prompt, chosen, rejected), "question": question, "source": source}
    return formats.Made([pair | {"prompt": prompt, "chosen": chosen, "rejected": rejected}])


def validate_pairs(pairs: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The pairs that can be trained on, in their order, and a report: a row for each check, what it found and dropped.

    Texts are compared by `fold`. A pair is dropped for the first of `CHECKS` that it fails: an empty text, sides that
    are the same, the same pair again, one that another pair contradicts (both go: nothing tells which is right); of
    the held-out pairs those whose prompt, subject or either text is trained on. Length bias drops nothing. Two
    answers that say the same in other words are not found.
    """
    keys = [tuple(fold(pair[k] or "") for k in ("prompt", "chosen", "rejected")) for pair in pairs]
    there, seen, kept, failed = set(keys), set(), [], Counter[str]()
    trained: dict[str, set[str]] = defaultdict(set)
    # the training side first: of a pair on both sides that copy stays, and what is held out remains unseen
    for n in sorted(range(len(pairs)), key=lambda n: pairs[n]["split"] != "train"):
        prompt, chosen, rejected = keys[n]
        parts = {
            "prompt": {prompt},
            "subject": {fold(pairs[n].get("item") or "")} - {""},
            "text": {chosen, rejected},
        }
        leaks = [k for k in parts if pairs[n]["split"] != "train" and parts[k] & trained[k]]
        flaws = (
            not all(keys[n]),
            chosen == rejected,
            keys[n] in seen,
            (prompt, rejected, chosen) in there,
            *(k in leaks for k in parts),
        )
        if any(flaws):
            failed[CHECKS[flaws.index(True)]] += 1
        else:
            kept.append(n)
            for name in parts if pairs[n]["split"] == "train" else ():
                trained[name] |= parts[name]
        seen.add(keys[n])
    report = [
        {"check": check, "pairs": failed[check], "dropped": failed[check], "note": ""} for check in CHECKS
    ]
    good = [pairs[n] for n in sorted(kept)]
    return good, [*report, length_bias(good)]


def length_bias(pairs: Sequence[Row]) -> Row:
    """Row of the report: pairs whose chosen side is longer, in characters, and how much longer chosen sides are.

    The note warns when the share is off a half by more than `LENGTH_SHARE` and than chance (two standard errors),
    or the ratio of mean lengths beyond `LENGTH_RATIO` either way.
    """
    if not pairs:
        return {"check": "length: chosen is longer", "pairs": 0, "dropped": 0, "note": "there is no pair"}
    lengths = [(len(pair["chosen"]), len(pair["rejected"])) for pair in pairs]
    longer, count = sum(a > b for a, b in lengths), len(pairs)
    ratio = sum(a for a, _ in lengths) / sum(b for _, b in lengths)
    note = f"chosen is longer in {longer / count:.0%}, by mean length {ratio:.2f} times the rejected"
    uneven = abs(longer / count - 0.5) > max(LENGTH_SHARE, count**-0.5)
    if uneven or not 1 / LENGTH_RATIO <= ratio <= LENGTH_RATIO:
        note += ": a model can win by length alone"
    return {"check": "length: chosen is longer", "pairs": longer, "dropped": 0, "note": note}
