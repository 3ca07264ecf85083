"""Lines that a site repeats: counted right however the pages are dealt out, spelled right, and left out of texts."""

import random
from collections import defaultdict

import numpy as np
import pytest
from support import store

from kit.data.dedup.boilerplate import LINE, code, count_lines, repeated, spell
from kit.data.dedup.dedup import deduplicate
from kit.data.dedup.schema import boilerplate_lines, without_boilerplate
from kit.lake.store import Lake
from kit.params import Deduplicate

P = Deduplicate(boilerplate_pages=3, boilerplate_share=0.5)


@pytest.mark.parametrize("shares", [1, 4])
def test_lines_are_found_as_a_plain_count_finds_them(shares: int) -> None:
    pick = random.Random(1)
    pages = [
        (i, f"h{i % 5}.example", "\n".join(pick.choices("abcdefgh", k=6)) + f"\n own {i} \n\n")
        for i in range(60)
    ]
    gone = set(range(0, 60, 7))
    plain: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for i, host, text in pages:
        for line in {"", *(x.strip() for x in text.split("\n"))} if i not in gone else ():
            plain[host][line] += 1
    wanted = {
        (h, x, n, lines[""]) for h, lines in plain.items() for x, n in lines.items()
        if x and n >= P.boilerplate_pages and n >= P.boilerplate_share * lines[""]
    }  # fmt: skip
    rows = np.concatenate([count_lines(pages[i::shares], gone) for i in range(shares)])
    found = list(spell(pages, repeated(rows, P)))
    assert {tuple(x.values()) for x in found} == wanted and len(found) == len(wanted) > 10
    assert not len(repeated(np.empty(0, LINE), P)) and code("") == 0 != code("a")


def test_copies_that_go_make_no_boilerplate_and_the_lines_can_be_left_out(tmp_path) -> None:
    lake, pick = Lake(str(tmp_path)), random.Random(2)
    word = lambda: "".join(pick.choices("abcdefghij", k=6))  # noqa: E731
    body = lambda: "\n".join(" ".join(word() for _ in range(12)) for _ in range(8))  # noqa: E731
    article, menu = body(), "Home · About\n© 2026 <b>us</b>"
    texts = [f"{menu}\n{body()}" for _ in range(5)] + [article] * 6
    store(lake, "b", [{"doc_id": f"{i:02d}", "text": t} for i, t in enumerate(texts)], 2)
    made = deduplicate(Deduplicate(run="b", lake=lake.uri, cores=2, exact=["text"]), lake)
    lines = boilerplate_lines(lake, made)
    assert lines == {"a.example": frozenset(menu.split("\n"))}
    assert without_boilerplate(texts[0], lines["a.example"]) == texts[0].removeprefix(menu + "\n")
    assert lake.table(made, "boilerplate").to_pylist()[0] == {
        "host": "a.example", "line": "Home · About", "pages": 5, "of_pages": 6
    }  # fmt: skip
    store(lake, "none", [{"doc_id": f"{i}", "text": body()} for i in range(9)])
    made = deduplicate(Deduplicate(run="none", lake=lake.uri, cores=2), lake)
    assert boilerplate_lines(lake, made) == {}
