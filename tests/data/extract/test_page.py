"""What a page holds beside its main text: charsets, reviews, images, links, whatever its author did to them."""

import json

import pyarrow as pa
import pytest
from selectolax.lexbor import LexborHTMLParser

from kit.data.extract import page
from kit.data.extract.page import html_language, images, links, title
from kit.data.extract.reviews import reviews_of
from kit.data.extract.schema import IMAGE, LINK, REVIEW
from kit.data.read.charset import decode


def reviews(data: object, raw: str = "") -> list[dict]:
    """Reviews found on a page whose JSON-LD is `data`."""
    script = f'<script type="application/ld+json">{raw or json.dumps(data)}</script>'
    return reviews_of(f"<html><head>{script}</head><body><p>Some text to keep.</p></body></html>")


def review(**values) -> dict:
    return {
        "@type": "Review",
        "reviewBody": "Good.",
        "itemReviewed": {"@type": "Movie", "name": "Fog"},
    } | values


@pytest.mark.parametrize(
    "data, claim, text",
    [
        ("čeština".encode("cp1250"), "windows-1250", "čeština"),
        ("naïve café".encode(), "iso-8859-1", "naïve café"),
        (b"\xef\xbb\xbfabc", None, "abc"),
        ("día".encode("utf-16"), None, "día"),
        ("日本語".encode("iso-2022-jp"), "iso-2022-jp", "日本語"),
        ("слово за словом, строка за строкой".encode("cp1251"), None, "слово за словом, строка за строкой"),
        (b"<meta charset=koi8-r>" + "да".encode("koi8-r"), "no-such-charset", "<meta charset=koi8-r>да"),
        (b"", "utf-8", ""),
    ],
)
def test_charsets(data: bytes, claim: str | None, text: str) -> None:
    assert decode(data, claim)[0] == text


@pytest.mark.timeout(30)
@pytest.mark.parametrize("data", [bytes(range(256)) * 50, b"\xff\xfe\xd8", b"\xff" * 9, b"\x1b$" * 5000])
@pytest.mark.parametrize("claim", [None, "utf-8", "x-user-defined", "utf-7", "rot13", "zip", "idna", "\x00"])
def test_decode_never_raises(data: bytes, claim: str | None) -> None:
    text, charset = decode(data, claim)
    assert isinstance(text, str)
    assert charset
    text.encode()


def test_reviews_are_found_however_deep_and_take_their_subject_from_above() -> None:
    nested = {
        "@type": "Product",
        "name": "Saw",
        "review": [review(itemReviewed=None), review(reviewBody="B")],
    }
    found = reviews({"@graph": [{"a": [nested]}]})
    assert [(r["item"], r["body"]) for r in found] == [("Saw", "Good."), ("Fog", "B")]
    assert reviews(review(**{"@type": ["Review", "Thing"]}))[0]["item"] == "Fog"
    assert reviews(review(itemReviewed={"@type": ["Movie"], "name": "Fog"}))[0]["item_type"] == "Movie"


@pytest.mark.parametrize(
    "raw",
    ["{broken", "[" * 100_000, '{"a":' * 50_000, "", "null", '"Review"', '[{"@type": "Review"}]', "\ud800"],
)
def test_json_that_holds_no_review_yields_none_and_loses_no_page(raw: str) -> None:
    assert reviews(None, raw or " ") == []


@pytest.mark.parametrize("value", [1e30, -3, "many", None, [], {}, float("nan"), float("inf"), 10**400, True])
def test_odd_numbers_in_a_review_fit_the_schema(value: object) -> None:
    count = {"interactionType": "https://schema.org/LikeAction", "userInteractionCount": value}
    data = review(reviewRating={"ratingValue": value, "bestRating": value}, interactionStatistic=[count, 7])
    (found,) = reviews(data)
    assert found["body"] == "Good."
    pa.array([found], REVIEW)


def test_halves_of_surrogate_pairs_in_json_do_not_reach_the_parts() -> None:
    found = reviews(None, r'{"@type": "Review", "reviewBody": "Good\ud83d.", "name": "\udc00x\u0000"}')
    assert [(r["body"], r["title"]) for r in found] == [("Good.", "x")]
    pa.array(found, REVIEW)


def tree(html: str) -> LexborHTMLParser:
    return LexborHTMLParser(html)


def test_images_have_the_text_beside_them() -> None:
    (image,) = images(tree("<p>before</p><br><img src='a.png' alt=' x '><p>after</p>"))
    assert image == {"src": "a.png", "alt": "x", "caption": "", "context": "before … after"}
    pa.array([image], IMAGE)


def test_a_figure_gives_its_caption_and_scripts_give_no_context() -> None:
    (image,) = images(
        tree(
            "<p>The <b>text</b> before.</p><script>no()</script>"
            "<figure><a href=x><img src=a></a><figcaption> Two\n words </figcaption></figure><style>no</style>"
        )
    )
    assert (image["caption"], image["context"]) == ("Two words", "The text before.")


def test_a_page_of_images_and_one_of_endless_nesting_stay_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_IMAGES", 7)
    assert len(images(tree("<img src=a>" * 50))) == 7
    deep = "<div>" * 50_000 + "text<img src=a>"
    assert len(images(tree(deep))) == 1
    looked = images(tree("<img src=a>" + "<i></i>" * 100_000 + "far away"))
    assert looked[0]["context"] == ""


def test_links_are_absolute_and_each_comes_once() -> None:
    html = (
        "<a href='/a'>One  <b>two</b></a><a href='a'>again</a><a href='javascript:x()'>no</a><a>no</a>"
        "<a href='http://[broken'>no</a><a href='//other.example/x#y'>three</a><a href='mailto:x@y'>no</a>"
    )
    found = links(tree(html), "https://site.example/dir/")
    assert found == [
        {"url": "https://site.example/a", "text": "One two"},
        {"url": "https://site.example/dir/a", "text": "again"},
        {"url": "https://other.example/x#y", "text": "three"},
    ]
    pa.array(found, LINK)


def test_title_and_language() -> None:
    html = tree("<html lang='de-AT'><title> A\n title </title><svg><title>no</title></svg>")
    assert (title(html), html_language(html)) == ("A title", "de-AT")
    assert (title(tree("")), html_language(tree("<html lang>"))) == ("", "")
    assert len(html_language(tree(f"<html lang={'x' * 99}>"))) == 35
