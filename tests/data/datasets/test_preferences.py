"""Preference pairs: made where readers really differ, read from files, and every planted fault found."""

import json
from collections import Counter

import pytest

from kit.data.datasets.formats import question_group
from kit.data.datasets.preferences import build_pairs, file_pair, length_bias, validate_pairs, vote_pairs
from kit.params import BuildDatasets

P = BuildDatasets(train_languages=[])
WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "flint",
    "grove",
    "heath",
    "ivory",
    "jetty",
    "kelp",
    "larch",
]


def pair(n: int, split: str = "train", **values) -> dict:
    """A pair that is like no other, both sides of one length."""
    chosen, rejected = (f"{side} {WORDS[n % 12]} {n:04d}" for side in ("good", "poor"))
    return {"pair_id": f"p{n}", "prompt": f"Question {n}?", "chosen": chosen, "rejected": rejected, "item": None,
            "split": split} | values  # fmt: skip


def swapped(one: dict) -> dict:
    return one | {"chosen": one["rejected"], "rejected": one["chosen"]}


def found(pairs: list[dict]) -> tuple[list[str], dict[str, int]]:
    kept, report = validate_pairs(pairs)
    return [x["pair_id"] for x in kept], {r["check"]: r["dropped"] for r in report if r["dropped"]}


def test_sound_pairs_stay_as_they_are_and_in_order() -> None:
    pairs = [pair(n, "heldout" if n % 3 == 0 else "train") for n in range(30)]
    assert validate_pairs(pairs)[0] == pairs
    assert found(pairs)[1] == {}


@pytest.mark.parametrize(
    ("planted", "kept", "check"),
    [
        ([pair(1, prompt=" ")], "", "empty prompt or side"),
        ([pair(1, chosen="")], "", "empty prompt or side"),
        ([pair(1, rejected="\n")], "", "empty prompt or side"),
        ([pair(1, chosen="The same", rejected=" the  same\n")], "", "identical sides"),
        ([pair(1), pair(1, chosen="GOOD birch 0001 ", pair_id="copy")], "p1", "duplicate"),
        ([pair(1, "heldout"), pair(1, pair_id="copy")], "copy", "duplicate"),
        ([pair(1), pair(2), swapped(pair(1))], "p2", "contradictory"),
        ([pair(1), swapped(pair(1, "heldout"))], "", "contradictory"),
        ([pair(1), pair(2, "heldout", prompt="question 1?")], "p1", "leak: prompt also in train"),
        ([pair(1, item="Fog"), pair(2, "heldout", item="fog")], "p1", "leak: subject also in train"),
        ([pair(1), pair(2, "heldout", chosen=pair(1)["rejected"])], "p1", "leak: text also in train"),
        ([pair(2, "heldout", rejected=pair(1)["rejected"]), pair(1)], "p1", "leak: text also in train"),
    ],
)
def test_each_planted_fault_is_found_among_sound_pairs(planted: list[dict], kept: str, check: str) -> None:
    around = [pair(n, "heldout" if n % 2 else "train") for n in range(10, 20)]
    left, dropped = found(planted + around)
    assert left == kept.split() + [x["pair_id"] for x in around]
    assert dropped == {check: len(planted) - len(kept.split())}


def test_what_was_dropped_leaks_nothing_and_train_loses_nothing_to_leaks() -> None:
    pairs = [
        pair(1, rejected=""),
        pair(2, "heldout", chosen=pair(1)["chosen"]),
        pair(3, item="Fog"),
        pair(4, item="Fog"),
    ]
    assert found(pairs) == (["p2", "p3", "p4"], {"empty prompt or side": 1})


def test_the_verdicts_do_not_depend_on_the_order() -> None:
    pairs = [pair(n % 25, "heldout" if n % 4 == 0 else "train", pair_id=f"p{n}") for n in range(40)]
    pairs += [swapped(pair(n, "heldout")) for n in (1, 2)] + [pair(90, "heldout", prompt="Question 3?")]
    first, again = (validate_pairs(x) for x in (pairs, pairs[::-1]))
    assert first[1] == again[1]
    texts = [{(x["prompt"], x["chosen"]) for x in kept} for kept, _ in (first, again)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("longer", "factor", "warned"),
    [(50, 1, False), (56, 1, False), (70, 1, True), (30, 1, True), (50, 3, True), (0, 1, True)],
)
def test_length_bias_is_told_and_drops_nothing(longer: int, factor: int, warned: bool) -> None:
    pairs = [
        pair(n, chosen="x" * (100 * factor + (1 if n < longer else -1)), rejected="y" * 100)
        if factor == 1
        else pair(n, chosen="x" * (100 * factor if n < longer else 99), rejected="y" * 100)
        for n in range(100)
    ]
    row = length_bias(pairs)
    assert row["pairs"] == longer and row["dropped"] == 0
    assert ("length alone" in row["note"]) == warned
    assert f"{longer}%" in row["note"]


def test_few_pairs_are_no_evidence_and_none_is_no_error() -> None:
    assert "length alone" not in length_bias([pair(n, chosen="good one 12345.") for n in range(3)])["note"]
    assert validate_pairs([]) == ([], validate_pairs([])[1])


def rows(*votes: tuple[str, int, int], group: str = "fog") -> list[dict]:
    return [
        {"row_id": f"r{text}", "item": "Fog", "group": group, "prompt": "Fog is", "completion": f" {text}",
         "helpful": helpful, "votes": of, "split": "train"} for text, helpful, of in votes
    ]  # fmt: skip


def test_a_pair_needs_votes_and_a_gap_and_one_subject() -> None:
    fog = rows(("best", 9, 10), ("good", 8, 10), ("bad", 1, 10), ("few votes", 0, 4), ("never", None, None))
    pairs = list(vote_pairs(fog, P))
    assert [(x["chosen"], x["rejected"]) for x in pairs] == [(" best", " bad"), (" good", " bad")]
    assert pairs[0]["chosen_row"] == "rbest" and pairs[0]["rejected_helpful"] == 0.1
    assert not list(vote_pairs(rows(("a", 9, 10)) + rows(("b", 1, 10), group="mist"), P))


def line(
    prompt: str = "Why?", chosen: str = "Because it is.", rejected: str = "No idea at all.", **more
) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


QUESTION = "### Instruction\nWhy is it so?\n\n### Answer\n"


@pytest.mark.parametrize(
    ("prompt", "chosen", "wanted", "question"),
    [
        ("human: Why is it so?", "Yes.", QUESTION, "Why is it so?"),
        ("\n\nHuman: Why is it so?", "Yes.", QUESTION, "Why is it so?"),
        ("Why is it so?", "Yes.", QUESTION, "Why is it so?"),
        ("Human: Why is it so?\n", "Yes.", QUESTION, "Why is it so?"),
        (
            "The review of movie 'Fog' is",
            " grey.",
            "The review of movie 'Fog' is",
            "The review of movie 'Fog' is",
        ),
        ("Once upon ", "a time.", "Once upon ", "Once upon"),
        (
            "human: a\ngpt: b\nhuman: c",
            "d",
            "### Instruction\nhuman: a\ngpt: b\nhuman: c\n\n### Answer\n",
            "human: a\ngpt: b\nhuman: c",
        ),
    ],
)
def test_a_question_gets_delimiters_and_a_text_to_complete_stays(prompt, chosen, wanted, question) -> None:
    (made,) = file_pair(line(prompt, chosen, " No."[chosen[0] != " " :]), "f:3", P).rows
    assert (made["prompt"], made["chosen"], made["question"]) == (wanted, chosen, question)
    assert made["source"] == "f:3"


@pytest.mark.parametrize("bad", ["not JSON", {"prompt": "x"}, line(chosen=["x"]), line(rejected=None)])
def test_a_line_that_is_no_pair_is_a_failure(bad) -> None:
    made = file_pair(bad, "f:1", P)
    assert not made.rows and made.failed.startswith("preference file: ")


def test_pairs_of_files_and_votes_are_accounted_for_and_lie_where_their_question_does(tmp_path) -> None:
    lines = [line(f"Question number {n}?", f"chosen {n}", f"other {n}") for n in range(60)]
    vote = {"models": {"chosen": "aligned", "rejected": "tuned"}, "voted_at": "2026-03-01T12:00:00Z"}
    lines += [line("Fog is", " fine", " dull") | vote, line("Mist is", " wet", " dry") | vote]
    lines += [
        line(),
        line(),
        line(rejected=""),
        line("\ud800?\x00", "a", "b"),
        line(lang="zh"),
        {"prompt": 1},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join([*map(json.dumps, lines), "{"]), encoding="utf-8")
    sides = {question_group(q): s for q, s in (("Fog is", "heldout"), ("mist  IS", "train"))}
    voted = [r | {"split": "heldout"} for r in rows(("best", 9, 10), ("bad", 1, 10))]
    p = BuildDatasets(train_languages=["en"], heldout_share=0.2)
    pairs, report, counts = build_pairs(voted, [("x.jsonl", str(tmp_path / "x.jsonl"))], sides, p)
    assert (counts.records_in, counts.created, counts.records_out) == (69, 1, 65)
    assert counts.failed == {
        "preference file: no texts 'prompt', 'chosen' and 'rejected'": 1,
        "preference file: not JSON": 1,
    }
    assert counts.dropped == {"duplicate": 1, "empty prompt or side": 1, "language not in train_languages": 1}
    assert {r["check"]: r["pairs"] for r in report}["duplicate"] == 1
    split = {x["prompt"]: x["split"] for x in pairs}
    assert split["Mist is"] == "train" and 2 < Counter(split.values())["heldout"] < 25
    assert {x["split"] for x in pairs if x["prompt"] == "Fog is" and x.get("source")} == {"heldout"}


def test_real_pairs_are_read_and_judged(real_data) -> None:
    pairs, _, counts = build_pairs([], [("p", str(real_data / "preferences_sample.jsonl"))], {}, P)
    assert counts.records_in == 313 and counts.failed == {}
    assert counts.records_out == len(pairs) > 290
    assert all(x["prompt"].startswith("### Instruction\n") for x in pairs)
    sides = [{x["prompt"] for x in pairs if x["split"] == s} for s in ("train", "heldout")]
    assert all(sides) and not sides[0] & sides[1]
