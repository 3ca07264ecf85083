"""Personal data: what is planted is masked, what only looks like it is not."""

from collections import Counter
from itertools import pairwise

import pytest

from kit.data import pii

MASKED = [
    ("write to jo.doe+x@mail.example.org now", "write to <EMAIL> now"),
    ("write to jo@site.example.", "write to <EMAIL>."),
    ("call 555-0143 today", "call <PHONE> today"),
    ("call +1 (212) 555-0143 today", "call <PHONE> today"),
    ("tel.\n(212) 555-0143\n7 of 12", "tel.\n<PHONE>\n7 of 12"),
    ("from 198.51.100.14, twice", "from <IPV4>, twice"),
    ("at 2001:db8::8a2e:370:7334 too", "at <IPV6> too"),
    ("card 4111 1111 1111 1111 expired", "card <CARD> expired"),
    ("IBAN DE89 3704 0044 0532 0130 00 bitte", "IBAN <IBAN> bitte"),
    ("IBAN DE89370400440532013000.", "IBAN <IBAN>."),
]
LEFT = [
    "version 1.2.3.4.5",
    "394.000 of 1,200,000",
    "212\n867-5309",
    "host 192.168.1.1 and 127.0.0.1 and 999.1.1.1",
    "loopback ::1 at 12:30:45",
    "card 4111 1111 1111 1112",
    "ISBN 978-3-16-148410-0 of 24.06.2024",
    "IBAN DE88 3704 0044 0532 0130 00",
    "@handle, a@b, x@@y.org and price 12,80",
    "0000 0000 0000 0000",
    "Rif. 2024/05-77310 of PK/2023/0617-44",
]


@pytest.mark.parametrize("text, masked", MASKED)
def test_masked(text: str, masked: str) -> None:
    assert pii.mask(text, "en")[0] == masked


@pytest.mark.parametrize("text", LEFT)
def test_left_alone(text: str) -> None:
    assert pii.mask(text, "en") == (text, dict.fromkeys(pii.TYPES, 0))


def test_spans_are_sorted_and_apart_and_are_what_is_masked() -> None:
    text = " ".join(t for t, _ in MASKED) * 20
    spans = pii.find(text, "en")
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    masked, counts = pii.mask(text, "en")
    assert len(spans) == sum(counts.values()) == masked.count("<")
    assert pii.mask(masked, "en")[0] == masked


def test_planted_values_are_masked_and_decoys_are_not(
    refined: dict, documents: dict, crawl_planted: dict
) -> None:
    wanted, masked, missed = Counter(), Counter(), []
    for planted in crawl_planted["pii"]:
        wanted[planted["type"]] += 1
        before, after = (docs[planted["url"]]["text"] for docs in (documents, refined))
        if planted["value"] not in before or planted["value"] in after:
            missed.append((planted["type"], planted["value"]))
    for doc in refined.values():
        masked.update(doc["pii"])
    for kind in pii.TYPES:
        hits = wanted[kind] - sum(k == kind for k, _ in missed)
        recall, precision = hits / wanted[kind], min(hits / masked[kind], 1)
        print(
            f"pii {kind}: recall {recall:.3f} of {wanted[kind]}, precision {precision:.3f} of {masked[kind]}"
        )
        assert recall >= 0.95 and precision >= 0.9, kind
    print("missed:", missed)
    places = [(x["url"], x["value"]) for x in crawl_planted["decoy"]]
    gone = [v for u, v in places if v in documents[u]["text"] and v not in refined[u]["text"]]
    print(f"decoys masked: {gone} of {len(places)}")
    assert not gone
