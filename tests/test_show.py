"""What people look at: escaped, short, and the same in a notebook, a terminal and a page."""

import matplotlib
import pytest

from kit import show
from kit.lake.manifest import Counts

matplotlib.use("Agg")
EVIL = "<script>alert(1)</script>\u202eevil\x1b[31m"


def test_text_from_the_web_is_escaped_wherever_it_is_shown():
    widget = show.explore(lambda x: show.text_page(EVIL, EVIL, host=EVIL), x=[1])
    shown = [
        show.Table([{EVIL: EVIL}])._repr_html_(),
        show.text_page(EVIL, EVIL, host=EVIL)._repr_html_(),
        show.difference(EVIL, "b " + EVIL)._repr_html_(),
        show.html_page(EVIL),
        widget.children[-1].value,
    ]
    for markup in shown:
        assert "<script>" not in markup and "&lt;script&gt;" in markup
    for markup in shown[:3]:
        assert "\u202e" not in markup and "\x1b" not in markup


def test_a_terminal_table_shows_no_control_characters():
    assert "\x1b" not in repr(show.Table([{"a": EVIL}]))


def test_a_table_aligns_numbers_right_and_cuts_long_texts():
    lines = repr(show.Table([{"n": 5, "t": "x" * 50}, {"n": 1234, "t": "y"}], width=10)).splitlines()
    assert lines[1].startswith("    5  xxxxxxxxx…") and lines[2].startswith("1,234  y")


def test_a_wide_table_is_shown_field_by_field():
    table = show.Table([{"prompt": "a", "base": 1.5}, {"prompt": "b\u202e", "base": None}])
    assert table.one_field_a_line() == "\n  prompt   a\n  base     1.5\n\n  prompt   b\\u202e\n  base     "


def test_facts_of_all_kinds_stand_in_one_column():
    shown = repr(show.facts({"a": 1234567, "b": 0.000123456, "c": True, "d": "words"})).split()
    assert shown == ["value", "a", "1,234,567", "b", "0.0001235", "c", "True", "d", "words"]


def test_an_empty_table_is_shown():
    assert "<table " in show.Table([])._repr_html_() and repr(show.Table([])) == ""
    assert "<th" in show.Table([], ["a"])._repr_html_() and repr(show.Table([], ["a"])) == "a"


def test_differences_are_marked_on_both_sides():
    markup = show.difference("a b c", "a x c")._repr_html_()
    assert ">b</mark>" in markup and ">x</mark>" in markup and ">a</mark>" not in markup


def test_a_widget_follows_its_controls():
    widget = show.explore(
        lambda n, word, name: show.TrustedHtml(f"{n} {word} {name}"),
        n=(0, 10, 1, 2),
        word=["a", "b"],
        name="x",
    )
    number, word, name, view = widget.children
    assert ">2 a x<" in view.value
    number.value, word.value, name.value = 3, "b", "y"
    assert ">3 b y<" in view.value


def test_a_choice_can_follow_the_choices_before_it():
    sites = {("a", "x"): ["ax1", "ax2"], ("a", "y"): ["ay"], ("b", "x"): ["bx"]}
    asked = []
    widget = show.explore(
        lambda crawl, kind, site: (
            asked.append((crawl, kind, site)) or show.TrustedHtml(f"{crawl} {kind} {site}")
        ),
        crawl=["a", "b"],
        kind=lambda crawl: sorted(k for c, k in sites if c == crawl),
        site=lambda crawl, kind: sites[crawl, kind],
    )
    crawl, kind, site, view = widget.children
    assert ">a x ax1<" in view.value and site.options == ("ax1", "ax2")
    kind.value = "y"
    assert ">a y ay<" in view.value and site.options == ("ay",)
    crawl.value = "b"
    assert ">b x bx<" in view.value and kind.options == ("x",)
    assert asked == [("a", "x", "ax1"), ("a", "y", "ay"), ("b", "x", "bx")], "shown once for each click"


@pytest.mark.parametrize("n", [1, 30])
def test_figures_carry_their_numbers(n):
    rows = [{"k": f"k{i}", "v": i + 1} for i in range(n)]
    ax = show.bars(rows, "k", "v", "title", top=5)
    assert len(ax.patches) == min(n, 5) and max(b.get_width() for b in ax.patches) == n
    kept = show.funnel(Counts(records_in=3, records_out=1, dropped={"a": 1}, failed={"b": 1}), "t")
    assert [t.get_text() for t in kept.get_yticklabels()] == ["failed: b", "a", "kept"]


def test_dollars_are_no_formula():
    for shown in (show.Table([{"a": "$5 or $10"}]), show.difference("$5", "$6"), show.text_page("$5", "$6")):
        assert "mathjax_ignore" in shown._repr_html_()
