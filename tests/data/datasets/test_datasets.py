"""Training rows: every record accounted for, nothing on both sides, shards that others stream as they are."""

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from kit.data.datasets.datasets import Splits, build_datasets, grid, heldout_groups, plain, split_rows
from kit.data.datasets.formats import FORMATS, document_rows, instruction_row
from kit.data.extract.schema import REVIEW
from kit.data.trace import trace
from kit.errors import LakeError, ParamError
from kit.lake.manifest import Account, Counts, Manifest
from kit.lake.store import Lake
from kit.params import BuildDatasets, Deduplicate, RefineText

P = BuildDatasets()
KEPT = pa.schema([("doc_id", pa.string()), ("cluster_id", pa.string()), ("keep", pa.bool_())])
REFINED = pa.schema(
    [(n, pa.string()) for n in ("doc_id", "host", "lang", "text", "drop_reason", "url")]
    + [("reviews", pa.list_(REVIEW))]
)


def review(
    item: str, body: str, helpful: int | None = None, votes: int | None = None, kind: str = "Movie", **more
) -> dict:
    return {"item": item, "item_type": kind, "rating": 3.0, "rating_max": 5.0, "body": body, "helpful": helpful,
            "votes": votes} | more  # fmt: skip


def document(number: int, reviews: list[dict] | None = None, **values) -> dict:
    """A document that refining and deduplication kept."""
    return {
        "doc_id": f"doc{number}",
        "url": f"https://site{number}.example/",
        "host": f"site{number}.example",
        "lang": "en",
        "text": f"Text number {number}.",
        "reviews": reviews or [],
        "cluster_id": f"doc{number}",
    } | values


def films(count: int) -> list[dict]:
    """One document a film, each with two reviews of it."""
    return [
        document(i, [review(f"Film {i}", f"Body {i}{x}", h, 10) for x, h in (("a", 9), ("b", 2))])
        for i in range(count)
    ]


def build(
    docs: list[dict], p: BuildDatasets = P, reviews: bool = True, lines=()
) -> tuple[list[dict], Counts]:
    def made():
        yield from (document_rows(d, p, reviews) for d in docs)
        yield from (instruction_row(x, f"f:{n}", p) for n, x in enumerate(lines, 1))

    account = Account()
    rows = list(split_rows(made(), Splits.plan(made(), p), account))
    return rows, account.counts(by_name=False)


def a_lake(uri: str, docs: list[dict], parts: int = 3, repeated: tuple[str, str] = ("none", "none")) -> Lake:
    """A lake whose run has `docs` as stages 30 and 40 leave them, one that was dropped, a host's `repeated` line."""
    lake = Lake(uri)
    docs = [*docs, document(9999, [review("Film 0", "dropped")], drop_reason="spam")]
    counts = Counts(records_in=len(docs), records_out=len(docs))
    for p, schema in ((RefineText(), REFINED), (Deduplicate(), KEPT)):
        with lake.stage(p) as out:
            for part in range(parts):
                rows = [d | {"keep": not d.get("drop_reason")} for d in docs[part::parts]]
                out.table(f"part-{part:05d}", pa.Table.from_pylist(rows, schema=schema))
            if schema is KEPT:
                out.table("boilerplate-00000", pa.table({"host": repeated[:1], "line": repeated[1:]}))
            out.commit(counts, {"pii_masked": {"email": 4}})
    return lake


def lines(lake: Lake, manifest: Manifest, name: str) -> list[dict]:
    raw = b"".join(lake.fs.cat_file(x) for x in lake.paths(manifest, name) if x.endswith(".jsonl"))
    return [json.loads(x) for x in raw.decode().split("\n")[:-1]]


def sides(rows: list[dict], key: str = "group") -> list[set[str]]:
    return [{r[key] for r in rows if r["split"] == s} for s in ("train", "heldout")]


def test_the_sample_has_no_subject_on_both_sides(data_lake: Lake) -> None:
    manifest = data_lake.need("sample", "50_build_datasets")
    train, heldout = (data_lake.table(manifest, s).to_pylist() for s in ("train", "heldout"))
    assert len(train) > 4 * len(heldout) > 40
    for key in ("group", "completion", "doc_id"):
        assert not {r[key] for r in train} & {r[key] for r in heldout}
    counts = Counter(r["row_id"] for r in train + heldout)
    assert set(counts.values()) == {1}
    assert manifest.counts.records_out == len(counts)


def test_the_sample_pairs_are_about_one_film_and_clearly_apart(data_lake: Lake) -> None:
    manifest = data_lake.need("sample", "50_build_datasets")
    rows = {r["row_id"]: r | {"split": s} for s in ("train", "heldout")
            for r in data_lake.table(manifest, s).to_pylist()}  # fmt: skip
    pairs = data_lake.table(manifest, "preferences").to_pylist()
    assert len(pairs) > 100
    for pair in pairs:
        better, worse = rows[pair["chosen_row"]], rows[pair["rejected_row"]]
        assert better["group"] == worse["group"]
        assert better["split"] == worse["split"] == pair["split"]
        assert pair["prompt"] == better["prompt"] == worse["prompt"]
        assert (pair["chosen"], pair["rejected"]) == (better["completion"], worse["completion"])
        assert pair["chosen_helpful"] - pair["rejected_helpful"] >= P.min_helpful_gap - 1e-6


def test_json_lines_and_parquet_say_the_same(data_lake: Lake) -> None:
    manifest = data_lake.need("sample", "50_build_datasets")
    texts = []
    for split in ("train", "heldout"):
        rows = data_lake.table(manifest, split).to_pylist()
        texts.append([r["prompt"] + r["completion"] for r in rows])
        ids = [{"row_id": r["row_id"], "doc_id": r["doc_id"]} for r in rows]
        told = lines(data_lake, manifest, f"text-{split}")
        assert told == [{"text": t} | i for t, i in zip(texts[-1], ids, strict=True)]
        wanted = [(r["completion"].strip(), int(r["rating"] >= 3)) for r in rows if r["rating"] is not None]
        assert [(x["text"], x["label"]) for x in lines(data_lake, manifest, f"sentiment-{split}")] == wanted
        assert [r["label"] for r in rows if r["rating"] is not None] == [x for _, x in wanted]
    (path,) = data_lake.paths(manifest, "train.txt")
    assert data_lake.fs.cat_file(path).decode() == "\n\n".join(texts[0])
    told = lines(data_lake, manifest, "preferences")
    assert [x["pair_id"] for x in told] == data_lake.table(manifest, "preferences")["pair_id"].to_pylist()


def test_documents_rows_and_reasons_add_up() -> None:
    docs = [
        *films(6),
        document(90),
        document(91, [review("Saw", "x", kind="Product")]),
        document(92, lang="de"),
    ]
    docs.append(document(93, [review("Film 0", "Body 0a"), review("", "no subject")]))
    asked = [{"instruction": f"Ask {n}", "output": "Yes."} for n in (1, 2, 2)] + ["not JSON"]
    rows, counts = build(docs, lines=asked)
    assert (counts.records_in, counts.created, counts.records_out) == (14, 6, 14)
    assert counts.dropped == {
        "language not in train_languages": 1,
        "no review of item_types": 2,
        "row already there": 2,
    }
    assert counts.failed == {"instruction file: not JSON": 1}
    assert rows[0]["prompt"] == "The review of movie 'Film 0' is"
    assert rows[0]["completion"] == " Body 0a"


def test_without_reviews_documents_are_rows_and_a_site_or_cluster_is_one_group() -> None:
    docs = [document(i) for i in range(20)]
    docs += [document(20, host="site3.example", cluster_id="doc20"), document(21, cluster_id="doc3"),
             document(22, cluster_id="doc20")]  # fmt: skip
    rows, counts = build(docs, reviews=False)
    assert counts.records_out == counts.records_in == 23
    assert {r["kind"] for r in rows} == {"document"}
    groups = {r["doc_id"]: r["group"] for r in rows}
    assert len({groups[f"doc{i}"] for i in (3, 20, 21, 22)}) == 1
    assert len(set(groups.values())) == 20
    train, heldout = sides(rows)
    assert train and heldout and not train & heldout


def test_a_new_page_moves_no_site_to_the_other_side() -> None:
    docs = [document(i, host=f"site{i % 40}.example", cluster_id=f"c{900 - i}") for i in range(400)]
    few, many = ({r["doc_id"]: r["split"] for r in build(docs[:n], reviews=False)[0]} for n in (120, 400))
    assert few == {k: many[k] for k in few} and set(few.values()) == {"train", "heldout"}


def test_a_question_and_a_long_passage_are_on_one_side() -> None:
    passage = [f"Passage {n} " + "tells of many things " * 5 for n in range(20)]
    asked = [
        {
            "instruction": f"Question {n % 90}? "[: None if n % 2 else -1].upper(),
            "input": x,
            "output": f"Answer {n}.",
        }
        for n in range(300)
        for x in ["", "hello"][n % 2 : n % 2 + 1]
    ]
    asked += [{"instruction": f"Q{n}", "context": passage[n % 20], "response": f"A{n}."} for n in range(100)]
    rows, counts = build([], BuildDatasets(train_languages=[], heldout_share=0.3), lines=asked)
    assert counts.records_out == 400
    train, heldout = sides([r | {"asked": " ".join(r["question"].casefold().split())} for r in rows], "asked")
    assert len(heldout) > 10 and not train & heldout
    train, heldout = sides([r for r in rows if len(r["context"] or "") > 20], "context")
    assert heldout and not train & heldout
    train, heldout = sides([r for r in rows if r["context"] == "hello"], "context")
    assert train == heldout == {"hello"}, "a short context joins nothing"


def test_a_text_on_both_sides_is_held_out_no_more_whatever_the_order() -> None:
    docs = films(40) + [
        document(100 + i, [review(f"Film {i}", ("Great  MOVIE!", "great movie!")[i % 2])]) for i in range(40)
    ]
    for order in (docs, docs[::-1]):
        rows, counts = build(order)
        texts = [{" ".join(t.casefold().split()) for t in s} for s in sides(rows, "completion")]
        assert not texts[0] & texts[1]
        assert counts.dropped["held-out text also in train"] == len(sides(rows)[1]) > 1
        assert "great movie!" in texts[0]


def test_one_group_cannot_be_held_out_without_a_leak() -> None:
    with pytest.raises(LakeError, match="hold out"):
        build([document(1, [review("Fog", "a"), review("fog", "b")])])
    with pytest.raises(LakeError, match="1 records.*train_languages"):
        build([document(1, lang="de")])


@pytest.mark.parametrize("share", [0.05, 0.15, 0.9])
def test_held_out_groups_stay_when_data_are_added(share: float) -> None:
    groups = [f"film {i}" for i in range(400)]
    few, many = (heldout_groups(set(groups[:n]), share, 0) for n in (200, 400))
    assert few == many & set(groups[:200])
    assert len(many) / 400 == pytest.approx(share, abs=0.06)
    assert heldout_groups(set(groups), share, 1) != many
    assert len(heldout_groups({"a", "b"}, share, 0)) == 1


def test_the_same_documents_make_the_same_rows_in_any_order() -> None:
    docs = films(8)
    first, again = (build(d)[0] for d in (docs, docs[::-1]))
    assert sorted(first, key=str) == sorted(again, key=str)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        *(({"prompt_template": x}, "prompt_template") for x in ("{film} is", "{", "{0}", "{item.x}")),
        ({"formats": ["text", "sentimant"]}, "did you mean 'sentiment'"),
        ({"instruction_files": ["nowhere.jsonl"]}, "does not exist"),
        ({"preference_files": ["nowhere.jsonl"]}, "does not exist"),
    ],
)
def test_a_wrong_parameter_is_named(data_lake: Lake, values: dict, told: str) -> None:
    before = data_lake.need("sample", "50_build_datasets")
    with pytest.raises(ParamError, match=told):
        build_datasets(BuildDatasets(lake=data_lake.uri, **values), data_lake)
    assert data_lake.need("sample", "50_build_datasets") == before


def files(folder: Path) -> dict[str, list[str]]:
    """Instructions of both styles and preferences, as parameters."""
    dolly = [{"instruction": f"Tell of {n}", "context": "", "response": f"It is {n}."} for n in range(30)]
    alpaca = [
        {"instruction": f"Say {n}", "input": f"Word {n}", "output": "\ud800 Yes.\u2028\x00"}
        for n in range(30)
    ]
    pairs = [
        {"prompt": f"human: Tell of {n}", "chosen": f"Well {n}.", "rejected": f"Nah {n}."} for n in range(30)
    ]
    for name, made in (("dolly", dolly), ("alpaca", alpaca), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    ours = {"instruction_files": ["dolly", "alpaca"], "preference_files": ["pairs"]}
    return {k: [str(folder / f"{x}.jsonl") for x in v] for k, v in ours.items()}


def test_shards_are_small_and_the_same_every_time(tmp_path: Path) -> None:
    lake = a_lake(str(tmp_path / "lake"), films(40))
    again, small = (
        build_datasets(BuildDatasets(lake=lake.uri, shard_mb=0.004, **files(tmp_path)), lake) for _ in "ab"
    )
    assert small.content_sha256 == again.content_sha256
    assert [o.sha256 for o in small.outputs] == [o.sha256 for o in again.outputs]
    shards = Counter(re.sub(r"-\d{5}\.", ".", o.name) for o in small.outputs)
    assert len({o.name for o in small.outputs}) == len(small.outputs)
    for name in ("train.parquet", "text-train.jsonl", "chat-train.jsonl", "preferences.jsonl"):
        assert shards[name] >= 3, name
    assert max(o.bytes for o in small.outputs if o.name.endswith(".jsonl")) <= 4000
    whole = build_datasets(BuildDatasets(lake=lake.uri, **files(tmp_path)), lake)
    assert set(Counter(re.sub(r"-\d{5}\.", ".", o.name) for o in whole.outputs).values()) == {1}
    for name in ("train", "heldout", "preferences"):
        assert lake.table(small, name).equals(lake.table(whole, name))
    for name in ("text-train", "instruction-heldout", "chat-train", "sentiment-train", "preferences"):
        assert lines(lake, small, name) == lines(lake, whole, name)
    assert whole.counts == small.counts
    assert (whole.counts.records_in, whole.counts.created, whole.counts.records_out) == (100, 40, 140)
    account = whole.metrics["pair_counts"]
    assert (account["records_in"], account["created"], account["records_out"]) == (30, 40, 70)


def test_rows_and_pairs_that_ask_the_same_are_on_one_side(tmp_path: Path) -> None:
    # questions about one passage are one group, so that a question's own hash does not tell its side
    passage = [f"Passage {n} " + "tells of many things " * 5 for n in range(20)]
    asked = [{"instruction": f"Ask {n}", "context": passage[n % 20], "response": f"R {n}"} for n in range(80)]
    pairs = [
        {"prompt": f"human: ask {n}", "chosen": f"Well {n}.", "rejected": f"Nah {n}."} for n in range(80)
    ]
    for name, made in (("asked", asked), ("pairs", pairs)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    ours = {"instruction_files": [str(tmp_path / "asked")], "preference_files": [str(tmp_path / "pairs")]}
    lake = a_lake(str(tmp_path / "lake"), films(4))
    manifest = build_datasets(
        BuildDatasets(lake=lake.uri, heldout_share=0.4, train_languages=[], **ours), lake
    )
    of = lambda x: int(re.search(r"[Aa]sk (\d+)\n", x["prompt"])[1])  # noqa: E731
    side = {
        of(r): s for s in ("train", "heldout") for r in lake.table(manifest, s).to_pylist() if r["source"]
    }
    told = {of(x): x["split"] for x in lake.table(manifest, "preferences").to_pylist() if x["source"]}
    assert told == side and len(told) == 80 and set(told.values()) == {"train", "heldout"}


def streamed(lake: Lake, manifest: Manifest) -> dict[str, list[dict]]:
    """Every set of the manifest by Hugging Face's `datasets`, streamed from where the lake lies."""
    datasets = pytest.importorskip("datasets")
    found = {}
    for kind, suffix in (("parquet", ".parquet"), ("json", ".jsonl")):
        names = {re.sub(r"-\d{5}\..*", "", o.name) for o in manifest.outputs if o.name.endswith(suffix)}
        for name in sorted(names):
            urls = [lake.fs.unstrip_protocol(x) for x in lake.paths(manifest, name) if x.endswith(suffix)]
            rows = datasets.load_dataset(kind, data_files=urls, split="train", streaming=True)
            found[name + suffix] = list(rows)
    return found


def check_streams(lake: Lake, folder: Path) -> None:
    p = BuildDatasets(lake=lake.uri, shard_mb=0.004, **files(folder))
    manifest = build_datasets(p, lake)
    found = streamed(lake, manifest)
    assert len(found) == 2 * len(FORMATS) + 4
    for name, rows in found.items():
        stem, _, suffix = name.rpartition(".")
        wanted = lines(lake, manifest, stem) if suffix == "jsonl" else lake.table(manifest, stem).to_pylist()
        assert rows == wanted and len(rows) > 5, name
        # the types of the first shard are those of all: a text that is null there would be no text anywhere
        assert suffix != "jsonl" or not any(
            v is None for r in rows for k, v in r.items() if "_helpful" not in k
        )
    assert sum(len(found[f"text-{s}.jsonl"]) for s in ("train", "heldout")) == manifest.counts.records_out


def test_datasets_streams_exactly_the_rows_from_disk(tmp_path: Path) -> None:
    check_streams(a_lake(str(tmp_path / "lake"), films(40)), tmp_path)


def test_datasets_streams_exactly_the_rows_from_s3(s3: str, tmp_path: Path) -> None:
    check_streams(a_lake(s3, films(40)), tmp_path)


def test_lines_that_a_site_repeats_are_left_out_of_whole_documents_where_asked(tmp_path: Path) -> None:
    docs = [document(n, host=f"h{n % 5}", text=f"Menu\nWords {n}.") for n in range(20)] + [
        document(20, host="h1", text="Menu")
    ]
    lake = a_lake(str(tmp_path / "lake"), docs, repeated=("h1", "Menu"))
    for drop in (True, False):
        manifest = build_datasets(BuildDatasets(lake=lake.uri, drop_boilerplate=drop), lake)
        rows = [r for s in ("train", "heldout") for r in lake.table(manifest, s).to_pylist()]
        told = {r["doc_id"]: r["completion"] for r in rows}
        assert len(told) == 21 - drop and told["doc2"] == "Menu\nWords 2."
        assert told["doc1"] == ("Words 1." if drop else "Menu\nWords 1.")
        assert manifest.counts.dropped == ({"nothing left of the text": 1} if drop else {})


def test_a_row_and_a_pair_of_a_file_lead_back_to_their_line(tmp_path: Path) -> None:
    lake = a_lake(str(tmp_path / "lake"), films(4))
    ours = files(tmp_path)
    manifest = build_datasets(BuildDatasets(lake=lake.uri, **ours), lake)
    rows = [x for s in ("train", "heldout") for x in lake.table(manifest, s).to_pylist()]
    row = next(r for r in rows if r["context"] == "Word 17")
    assert f"{ours['instruction_files'][1]}, line 18" in trace(lake, row["row_id"], ["sample"])
    pair = next(x for x in lake.table(manifest, "preferences").to_pylist() if x["chosen"] == "Well 3.")
    assert f"{ours['preference_files'][0]}, line 4" in trace(lake, pair["pair_id"], ["sample"])


def test_the_card_tells_what_is_in_and_lets_no_mark_up_through(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|**x**\n# Owned [a](http://b) `c`\u202e"
    docs = [*films(6), document(7, [review("Film 9", "A text", rating=None)], host=evil, lang="<b>")]
    lake = a_lake(str(tmp_path / "lake"), docs)
    manifest = build_datasets(BuildDatasets(lake=lake.uri, train_languages=[], **files(tmp_path)), lake)
    (path,) = lake.paths(manifest, "card.md")
    told = lake.fs.cat_file(path).decode()
    for part in ("73 rows from 9 sites or files", "| instruction | 60 |", "| review | 13 |",
                 "| none | 61 |", "| 100 % | 3 |", "4 email", "length: chosen is longer", "| &lt;b&gt; | 1 |",
                 *(i.content_sha256 for i in manifest.inputs), '"min_votes": 5'):  # fmt: skip
        assert part in told, part
    assert "<script" not in told and "\n# Owned" not in told and "\u202e" not in told
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt;\\|\\*\\*x\\*\\* \\# Owned \\[a\\](http://b) \\`c\\`\\\\u202e"
        in told
    )
    assert all(line.count("|") - line.count("\\|") in (0, 3, 5) for line in told.splitlines())
    assert plain(None) == "unknown" and grid(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |"


def test_unrated_reviews_get_no_sentiment_row(tmp_path: Path) -> None:
    scale = [(4.0, 10.0), (7.0, 10.0), (None, 5.0), (2.0, 5.0)]
    docs = [
        document(n, [review(f"Film {n}", f"Body {n}", rating=r, rating_max=m)])
        for n, (r, m) in enumerate(scale * 5)
    ]
    lake = a_lake(str(tmp_path / "lake"), docs)
    manifest = build_datasets(BuildDatasets(lake=lake.uri), lake)
    told = {
        x["text"]: x["label"] for s in ("train", "heldout") for x in lines(lake, manifest, f"sentiment-{s}")
    }
    assert told == {f"Body {n}": (0, 1, None, 0)[n % 4] for n in range(20) if n % 4 != 2}
    assert manifest.metrics["formats"] == {"text": 20, "instruction": 20, "chat": 20, "sentiment": 15}
