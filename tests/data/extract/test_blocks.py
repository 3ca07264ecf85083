"""Main text by blocks: what is kept and how it is written, hostile pages, a model that is not there, training."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from kit import ROOT
from kit.data.extract import blocks
from kit.data.extract import walk as walk_module
from kit.data.extract.blocks import all_text, choose, extract_main_text, features, main_text
from kit.data.extract.walk import parse, walk
from kit.data.read import archive
from kit.errors import KitError
from kit.measure.data import scores as scores_module

SENTENCES = [
    "The river rose during the night, and by morning the lower fields were under water.",
    "Nobody in the village could remember a flood like it, although the older people tried.",
    "They carried the chairs upstairs, then the books, and at last the clock that never worked.",
    "When the water fell again, it left a line on every wall, and a smell that stayed until June.",
]
ARTICLE = f"""<!doctype html><html><head><title>The flood - Daily Post</title><style>p {{ color: red }}</style></head>
<body><header><nav class="main-menu"><ul><li><a href="/">Home</a></li><li><a href="/s">Sport</a></li></ul></nav></header>
<main><article class="post-content"><h1>The flood</h1><p>{SENTENCES[0]} {SENTENCES[1]}</p>
<script>if (a < b) document.write("<p>never shown</p>")</script><!-- <p>a comment</p> -->
<h2>What they saved</h2><p>{SENTENCES[2]} {SENTENCES[3]}</p><ul><li>chairs of the grandmother, all six of them</li>
<li>the clock that stood in the hall</li></ul><p>{SENTENCES[1]} {SENTENCES[0]}</p></article></main>
<footer class="site-footer"><p><a href="/i">Imprint</a> <a href="/p">Privacy policy</a></p>
<p>© 2026 All rights reserved</p></footer></body></html>"""


class Keep:
    """A model that is sure of every block."""

    def predict(self, x: np.ndarray, **_: object) -> np.ndarray:
        return np.full(len(x), 5.0)


def everything(html: str) -> str:
    return main_text(walk(parse(html)), Keep())


def test_an_article_without_its_menu_and_footer() -> None:
    lines = extract_main_text(ARTICLE).split("\n")
    assert f"{SENTENCES[0]} {SENTENCES[1]}" in lines
    assert f"{SENTENCES[2]} {SENTENCES[3]}" in lines
    assert "What they saved" in lines
    assert "the clock that stood in the hall" in lines
    assert not {"Home", "Sport", "Imprint Privacy policy", "© 2026 All rights reserved"} & set(lines)


def test_all_text_has_what_is_visible_and_nothing_else() -> None:
    text = all_text(
        walk(parse(ARTICLE + '<p style="display:none">secret</p><div hidden><p>hidden too</p></div>'))
    )
    assert {"Home", "Sport", "The flood", "© 2026 All rights reserved"} <= set(text.split("\n"))
    assert not any(word in text for word in ("never shown", "a comment", "color", "secret", "hidden too"))


@pytest.mark.parametrize(
    "html, text",
    [
        ("<p>a <b>b</b>c<i> d</i></p>", "a bc d"),
        ("<p>a\n  b<br>c<br/> d</p>", "a b\nc\nd"),
        ("<pre>def f():\n    return 1\n\nf()</pre>", "def f():\n    return 1\n\nf()"),
        ("<table><tr><th>a<th>b</tr><tr><td>1<td>2</tr></table>", "a\tb\n1\t2"),
        ("<table><tr><td><p>a</p><p>b</p></td><td>c</td></tr></table>", "a\nb\nc"),
        ("<ul><li>a<ul><li>b</ul><li>c</ul>", "a\nb\nc"),
        ("<p>1 &lt; 2 &amp;lt; &quot;3&quot;&nbsp;4 &euro;</p>", '1 < 2 &lt; "3" 4 €'),
        ('<p title="a > b <i>" class="<p>">a</p>', "a"),
        ("<div>a<!-- <div> > -->b</div>c", "ab\nc"),
        ("<p>a<script>'</p>' < '<p>x'</script>b<svg><text>x</text></svg>c", "abc"),
        ("<p>a<select><option>x</select>b<textarea><p>x</textarea>c", "abc"),
        ("a<iframe><p>x</p></iframe>b<video>x</video>", "ab"),
    ],
)
def test_how_text_is_written(html: str, text: str) -> None:
    assert everything(html) == text


def test_text_that_is_only_in_noscript_is_found() -> None:
    paragraphs = "".join(f"<p>{s}</p>" for s in SENTENCES)
    assert SENTENCES[0] in extract_main_text(
        f"<body><div id=app></div><noscript>{paragraphs}</noscript></body>"
    )


def test_a_page_in_chinese() -> None:
    sentence = "昨天晚上河水上涨,村子里的老人说,他们从来没有见过这样大的洪水。"
    menu = "".join(f'<li><a href="/{i}">栏目</a></li>' for i in range(9))
    html = f"<body><nav><ul>{menu}</ul></nav><article>{f'<p>{sentence * 3}</p>' * 5}</article></body>"
    text = extract_main_text(html)
    assert sentence in text
    assert "栏目" not in text


HOSTILE = {
    "empty": "",
    "no body": "<frameset><frame src=a></frameset>",
    "only scripts": "<script>var a = '<p>x</p>'</script>" * 50,
    "binary": bytes(range(256)).decode("latin-1") * 200,
    "null bytes": "<p>a\x00b</p>\x00" * 50,
    "surrogates": "<p class='\udc00'>\ud800 text \udfff</p>",
    "attributes twice": "<p class=a class=b id=x id=y>text</p>",
    "odd names": '<div<p q"r=1 =">text</div<p><a"b>more</a"b><' + "/div>" * 9,
    "open quote": '<div class="a><p>text</p>' * 300,
    "open comment": "<p>text<!-- " * 300,
    "deep": "<div>" * 50_000 + "text",
    "deep and closed": "<div>" * 20_000 + "text" + "</div>" * 20_000,
    "deep, hidden by false ends": "<div></p></section>" * 50_000 + "text",
    "deep lists": "<ul><li>" * 20_000 + "text",
    "one line": "<p>" + "word " * 200_000,
    "one word": "<p>" + "x" * 1_000_000,
    "tiny blocks": "<p>x</p>" * 200_000,
    "many words of one class": f'<div class="{" ".join(f"a{i}" for i in range(50_000))}">text</div>',
    "signs": "<p>" + "<>&;\"'" * 20_000,
    "dots": "<p>" + ".,!|" * 5000,
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pages(kind: str) -> None:
    walked = walk(parse(HOSTILE[kind]))
    text = main_text(walked)
    assert isinstance(text, str)
    text.encode()
    assert bool(text) == bool(walked.texts)
    if walked.texts:
        assert np.isfinite(features(walked)).all()
    if kind not in (
        "empty",
        "no body",
        "only scripts",
        "binary",
        "signs",
        "dots",
        "one line",
        "one word",
        "tiny blocks",
    ):
        assert "text" in all_text(walked) or "ab" in text


def test_a_page_of_links_only_still_has_a_text() -> None:
    assert extract_main_text("<body><ul><li><a href=a>one</a><li><a href=b>two</a></ul></body>")


def test_a_text_does_not_depend_on_pages_before(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [
        ARTICLE.replace("post-content", f"x{i} content").replace("h2", f"h{1 + i % 5}") for i in range(6)
    ]
    alone = [extract_main_text(p) for p in pages]
    monkeypatch.setattr(walk_module, "MAX_STEPS", 1)
    monkeypatch.setattr(walk_module, "MAX_WORDS", 1)
    assert [extract_main_text(p) for p in reversed(pages)] == alone[::-1]


def test_choose_has_the_highest_expected_f1() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, words = rng.uniform(0.15, 0.45, 8), rng.integers(1, 90, 8)
        kept = set(choose(p, words).tolist())

        def expected(some: set[int], p: np.ndarray = p, words: np.ndarray = words) -> float:
            at = sorted(some)
            return 2 * (p * words)[at].sum() / (words[at].sum() + (p * words).sum())

        order = np.argsort(-p)
        assert expected(kept) == pytest.approx(max(expected(set(order[: k + 1].tolist())) for k in range(8)))


def test_blocks_that_leave_the_cascade_early_are_as_likely_as_all_trees_say(real_data: Path) -> None:
    """Or a page's many sure blocks add up to text that is not there, and `choose` keeps too much."""
    from kit.maintain import train_blocks

    pages = train_blocks.load(str(real_data / "pages.warc.gz"), str(real_data / "pages_gold.jsonl"))[::40]
    early = full = 0.0
    for p in pages:
        if p.blocks.texts:
            size = [len(t) for t in p.blocks.texts]
            early += size @ blocks.probabilities(p.blocks)
            full += size @ blocks._model().predict(p.features)
    assert early == pytest.approx(full, rel=0.005)


@pytest.mark.parametrize("data", [None, b"", b"no gzip", gzip.compress(b"tree\n", mtime=0), "other features"])
def test_a_model_that_is_missing_or_damaged_is_told(
    data: bytes | str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gz"
    if data == "other features":
        data = gzip.compress(
            gzip.decompress(blocks.MODEL.read_bytes()).replace(b"rank depth", b"other depth", 1)
        )
    if data is not None:
        path.write_bytes(data)
    monkeypatch.setattr(blocks, "MODEL", path)
    blocks._model.cache_clear()
    try:
        with pytest.raises(KitError, match="model"):
            extract_main_text(ARTICLE)
    finally:
        blocks._model.cache_clear()


def test_the_sample_crawls_pages_have_a_text() -> None:
    path = next((ROOT / "data_samples" / "crawl-data").glob("CC-SAMPLE-2026-05/**/warc/*.warc.gz"))
    records = [r for r in archive.records(str(path)) if isinstance(r, archive.Record)]
    pages = [
        r.stored.decode("utf-8", "replace")
        for r in records
        if r.type == "response" and "html" in r.content_type
    ]
    assert len(pages) > 10
    for html in pages:
        walked = walk(parse(html))
        assert set(main_text(walked).replace("\t", "\n").split("\n")) <= set(
            "\n".join(walked.texts).split("\n")
        )
        assert bool(main_text(walked)) == bool(walked.texts)


def test_labels_of_blocks() -> None:
    from kit.maintain.train_blocks import shares

    texts = ["Home", SENTENCES[0], "Home", SENTENCES[1], "Share this", "The end", SENTENCES[0], "Imprint"]
    gold = {"text": f"{SENTENCES[0]}\n{SENTENCES[1]}\nThe end"}
    label, weight = shares(texts, gold)
    assert label.tolist() == [0, 1, 0, 1, 0, 1, 0, 0]  # the copy far down is not the one in the gold text
    assert weight[1] > weight[0] > 0
    label, weight = shares(texts, {"with": ["lower fields", "older people"], "without": ["Imprint"]})
    assert label.tolist() == [-1, -1, -1, 1, -1, -1, -1, 0]  # the first snippet is in two places
    assert weight.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]


def test_scores() -> None:
    from kit.measure.data.scores import score_texts

    golds = [{"text": "a b c d"}, {"with": ["x  y", "z"], "without": ["w"]}]
    scores = score_texts(["a b e e", "x y w"], golds)
    assert (scores["pages"], scores["word P"], scores["word R"], scores["word F1"]) == (1, 0.5, 0.5, 0.5)
    assert (scores["snippet P"], scores["snippet R"], scores["snippet F"]) == (0.5, 0.5, 0.5)


def test_training_writes_the_same_model_twice_and_the_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kit.maintain import train_blocks

    monkeypatch.setattr(train_blocks, "TREES", 3)
    golds, records = [], []
    for i in range(60):
        body = ARTICLE.replace("The flood", f"The flood {i}").encode()
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{i}>\r\n"
        block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + body
        records.append(f"{head}Content-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n")
        text = "\n".join([f"The flood {i}", *SENTENCES])
        golds.append({"record_id": f"urn:uuid:{i}", "url": f"https://site{i}.example/", "text": text})
    warc, gold = tmp_path / "x.warc", tmp_path / "x.jsonl"
    warc.write_bytes(b"".join(records))
    gold.write_text("\n".join(map(json.dumps, golds)), encoding="utf-8")
    pages = train_blocks.load(str(warc), str(gold))
    assert len(pages) == 60
    assert {p.fold for p in pages} == set(range(train_blocks.FOLDS))
    assert train_blocks.save(pages, tmp_path, 3) == train_blocks.save(pages, tmp_path, 3)
    table = train_blocks.scores_table(pages, 3)
    train_blocks.write_scores(tmp_path / "card.md", table)
    train_blocks.write_scores(tmp_path / "card.md", table)
    assert (tmp_path / "card.md").read_text(encoding="utf-8").count("| x.warc | auto | 60 |") == 1
    assert "fold 5 of 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "url, domain",
    [
        ("https://www.a.example.co.uk/x", "example.co.uk"),
        ("http://blog.example.com", "example.com"),
        ("http://example.de", "example.de"),
        ("https://news.bbc.fr/", "bbc.fr"),
    ],
)
def test_sites(url: str, domain: str) -> None:
    from kit.maintain.train_blocks import site

    assert site(url) == domain


@pytest.mark.timeout(120)
def test_real_pages_by_a_model_that_has_not_seen_their_sites(real_data: Path) -> None:
    """A small cross-validation that really trains: far from the card's scores, far above no model at all."""
    from kit.maintain import train_blocks

    pages = train_blocks.load(str(real_data / "pages.warc.gz"), str(real_data / "pages_gold.jsonl"))
    pages = [p for p in pages if p.gold.get("text") and len(p.label) < 400][:120]
    golds = [p.gold for p in pages]
    ours = scores_module.score_texts(train_blocks.cross_validate(pages, 25), golds)["word F1"]
    whole = scores_module.score_texts([all_text(p.blocks) for p in pages], golds)["word F1"]
    print(f"word F1 {ours:.3f}, all text {whole:.3f}")
    assert ours > whole + 0.1


def test_real_pages_with_the_shipped_model(real_data: Path) -> None:
    """Sanity only: the shipped model was trained on these pages, the card has the honest scores."""
    import trafilatura

    from kit.maintain import train_blocks

    pages = train_blocks.load(str(real_data / "pages.warc.gz"), str(real_data / "pages_gold.jsonl"))
    pages = [p for p in pages if p.gold.get("text")][::8]
    golds = [p.gold for p in pages]
    ours = scores_module.score_texts([main_text(p.blocks) for p in pages], golds)["word F1"]
    html = [train_blocks.decode(p.payload, None)[0] for p in pages]
    theirs = scores_module.score_texts([trafilatura.extract(h) or "" for h in html], golds)["word F1"]
    print(f"word F1 {ours:.3f}, trafilatura {theirs:.3f}")
    assert ours > theirs + 0.02
