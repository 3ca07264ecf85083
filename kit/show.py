"""How the kit shows things: tables, figures and pages. All text from the web is escaped here."""

from __future__ import annotations

import functools
import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

INK, ACCENT, PALE, WARN = "#22313f", "#2a7f9e", "#c9d6de", "#c8553d"

CSS = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: .92em }}
th, td {{ border-bottom: 1px solid {PALE}; padding: .35rem .7rem; text-align: left; vertical-align: top }}
th {{ color: {ACCENT}; font-weight: 600 }}
h1, h2 {{ font-weight: 600; line-height: 1.2 }}
p.note {{ color: #66757f; font-size: .9em }}
"""


CELL, PLAIN = "padding:.2em .7em;vertical-align:top", "mathjax_ignore"
MOST_WORDS = 1500
"""Of a text whose differences are shown."""


class Table:
    """Rows that a notebook, a terminal and a page can all print; every cell is escaped in HTML."""

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, width: int = 300
    ):
        self.rows = list(rows)
        self.columns = list(columns or (self.rows[0] if self.rows else []))
        self.width = width

    def cell(self, value: Any) -> str:
        """One value as text: numbers short, control characters visible, cut at `width`."""
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        text = printable(str(value))
        return text if len(text) <= self.width else text[: self.width - 1] + "…"

    def _repr_html_(self) -> str:
        first = self.rows[0] if self.rows else {}
        head = "".join(
            f'<th style="text-align:{cell_align(first.get(c))};{CELL};border-bottom:1px solid {PALE}">{escape(str(c))}</th>'
            for c in self.columns
        )
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="text-align:{cell_align(row.get(c))};{CELL}">{html.escape(self.cell(row.get(c)))}</td>'
                for c in self.columns
            )
            + "</tr>"
            for row in self.rows
        )
        # styled here, as widgets have no style for tables; not typeset: "$5 or $10" is no formula
        return (
            f'<table class="{PLAIN}" style="line-height:1.3;border-collapse:collapse">'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def __repr__(self) -> str:
        cells = [[self.cell(row.get(c)).replace("\n", " ") for c in self.columns] for row in self.rows]
        widths = [max([len(c), *(len(row[i]) for row in cells)]) for i, c in enumerate(self.columns)]
        numeric = [all(cell_align(row.get(c)) == "right" for row in self.rows) for c in self.columns]
        lines = []
        for line in (self.columns, *cells):
            padded = [
                cell.rjust(width) if is_number else cell.ljust(width)
                for cell, width, is_number in zip(line, widths, numeric, strict=True)
            ]
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)

    def one_field_a_line(self) -> str:
        """For a terminal where the columns do not fit side by side: each row after an empty line, a line a field."""
        lines = []
        for row in self.rows:
            lines += ["", *(f"  {column:8} {self.cell(row[column])}" for column in self.columns)]
        return "\n".join(lines)


def facts(values: Mapping[str, Any]) -> Table:
    """Names and values of all kinds, a row each."""
    return Table([{"": name, "value": _in_words(value)} for name, value in values.items()])


def _in_words(value: Any) -> str:
    # `type` and not `isinstance`: True is an int, too, and no number to a reader
    if type(value) is float:
        return f"{value:,.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def cell_align(value: Any) -> str:
    """`right` for numbers and missing values, `left` for words."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "right" if value is None or number else "left"


def printable(text: str) -> str:
    """Hostile text made safe to look at: control and bidirectional-override characters become visible."""
    return "".join(
        c if c in "\n\t" or (c.isprintable() and c not in BIDI) else f"\\u{ord(c):04x}" for c in text
    )


BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def escape(text: str) -> str:
    """Any text, safe inside HTML and visible as what it is."""
    return html.escape(printable(text))


def html_page(title: str, *parts: str) -> str:
    """A self-contained HTML page; `parts` are HTML that the caller has escaped."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head>'
        f"<body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>"
    )


SPARKS = "▁▂▃▄▅▆▇█"


def spark(values: Sequence[float], width: int = 12) -> str:
    """The last `width` numbers as a line of blocks, the highest full."""
    last = [v for v in values[-width:] if math.isfinite(v)]
    low, span = min(last, default=0.0), (max(last, default=0.0) - min(last, default=0.0)) or 1.0
    return "".join(SPARKS[round((v - low) / span * (len(SPARKS) - 1))] for v in last)


def axes(title: str, x: str = "", y: str = "", size: tuple[float, float] = (7.2, 3.4)) -> Any:
    """A matplotlib Axes in the kit's one style; end a plot cell with `;`."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=size, layout="constrained")
    ax.set_title(title, loc="left", color=INK, fontsize=12)
    ax.set_xlabel(x, color=INK)
    ax.set_ylabel(y, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=INK, labelsize=9)
    return ax


def bars(
    rows: Sequence[Mapping[str, Any]], label: str, value: str, title: str, unit: str = "", top: int = 15
) -> Any:
    """Horizontal bars, longest first, each with its number; `rows` are dicts."""
    chosen = sorted(rows, key=lambda r: -(r[value] or 0))[:top][::-1]
    ax = axes(title, unit, size=(7.2, 0.8 + 0.28 * len(chosen)))
    drawn = ax.barh([printable(str(r[label]))[:48] for r in chosen], [r[value] for r in chosen], color=ACCENT)
    ax.bar_label(drawn, [f"{r[value]:,.4g}" for r in chosen], padding=3, color=INK, fontsize=9)
    ax.margins(x=0.12)
    return ax


def funnel(counts: Any, title: str) -> Any:
    """Where records went: kept above, then every reason for which some were lost."""
    rows = [{"why": "kept", "n": counts.records_out}]
    lost = {**counts.dropped, **{f"failed: {k}": v for k, v in counts.failed.items()}}
    rows += [{"why": k, "n": v} for k, v in sorted(lost.items(), key=lambda item: -item[1])]
    ax = axes(title, "records", size=(7.2, 0.9 + 0.28 * len(rows)))
    drawn = ax.barh(
        [r["why"] for r in rows][::-1],
        [r["n"] for r in rows][::-1],
        color=[*[WARN] * (len(rows) - 1), ACCENT],
    )
    ax.bar_label(drawn, padding=3, color=INK, fontsize=9)
    ax.margins(x=0.1)
    return ax


def lines(series: Mapping[str, Sequence[float]], title: str, x: str, y: str) -> Any:
    """One line for each series over 1, 2, 3 …, named at its end."""
    ax = axes(title, x, y)
    for color, (name, values) in zip((ACCENT, WARN, INK, "#8a6fb0"), series.items(), strict=False):
        ax.plot(range(1, len(values) + 1), values, color=color, label=name, linewidth=1.8)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=9)
    return ax


class TrustedHtml:
    """HTML made here, for a notebook to show; its author has escaped what came from outside."""

    def __init__(self, markup: str) -> None:
        self.markup = markup

    def _repr_html_(self) -> str:
        return f'<div class="{PLAIN}" style="line-height:1.4">{self.markup}</div>'

    def __repr__(self) -> str:
        return printable(html.unescape(re.sub(r"<[^>]*>", " ", self.markup))).strip()


def stack(*parts: Any) -> TrustedHtml:
    """Tables and pages, one below the other."""
    return TrustedHtml("".join(part._repr_html_() for part in parts))


def difference(left: str, right: str, names: tuple[str, str] = ("", "")) -> TrustedHtml:
    """Two texts side by side, words that are in one only marked; of long ones the beginning (finding differences
    takes time as the square of the words)."""
    import difflib

    # hostile text: neither a megabyte nor one word of a megabyte may hold up the notebook
    a, b = ([word[:200] for word in whole[:100_000].split()[:MOST_WORDS]] for whole in (left, right))
    sides: tuple[list[str], list[str]] = ([], [])
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for side, words in ((0, a[a0:a1]), (1, b[b0:b1])):
            text = escape(" ".join(words))
            sides[side].append(
                text if kind == "equal" or not text else f'<mark style="background:#f6d5cc">{text}</mark>'
            )
    cells = "".join(
        f'<td style="width:50%;vertical-align:top;text-align:left;padding-right:1em"><b>{escape(name)}</b><br>{" ".join(s)}</td>'
        for name, s in zip(names, sides, strict=True)
    )
    return TrustedHtml(f'<table style="table-layout:fixed;width:100%"><tr>{cells}</tr></table>')


def text_page(title: str, text: str, **facts: Any) -> TrustedHtml:
    """One text from the web, with facts about it, escaped."""
    facts_line = " · ".join(
        f"{escape(k)} <b>{escape(str(v))}</b>" for k, v in facts.items() if v not in (None, "")
    )
    body = escape(text).replace("\n", "<br>")
    style = f"max-height:22em;overflow:auto;border-left:3px solid {PALE};padding-left:1em;max-width:60em"
    return TrustedHtml(
        f'<b>{escape(title)}</b><br><small>{facts_line}</small><div style="{style}">{body}</div>'
    )


def explore(render: Any, **choices: Any) -> Any:
    """A widget: `render(**values)` is shown anew whenever one of `choices` changes.

    A choice is a list (drop-down), a function of the choices before it that returns such a list (drop-down that
    follows them), `(low, high, step, start)` (slider) or a string (text field). `render` returns something with
    `_repr_html_`. In a notebook that nobody clicks, show a static table beside it.
    """
    import ipywidgets as w

    def control(name: str, choice: Any) -> Any:
        wide = {"layout": w.Layout(width="32em"), "style": {"description_width": "9em"}}
        label = name.replace("_", " ")
        if isinstance(choice, tuple):
            low, high, step, start = choice
            slider = w.FloatSlider if isinstance(step, float) else w.IntSlider
            return slider(
                value=start, min=low, max=high, step=step, description=label, continuous_update=False, **wide
            )
        if isinstance(choice, str):
            wide["layout"] = w.Layout(width="64em")  # prompts and URLs are long
            return w.Text(value=choice, description=label, continuous_update=False, **wide)
        if any(len(str(option)) > 40 for option in choice):
            wide["layout"] = w.Layout(width="64em")
        return w.Dropdown(options=choice, description=label, **wide)

    follows = {name: functools.cache(choice) for name, choice in choices.items() if callable(choice)}
    controls: dict[str, Any] = {}
    for name, choice in choices.items():
        before = {n: c.value for n, c in controls.items()}
        controls[name] = control(name, follows[name](**before) if name in follows else choice)
    view = w.HTML()
    following = False

    def refresh(*_: Any) -> None:
        nonlocal following
        if following:  # a drop-down that got new options tells of its new value
            return
        following, values = True, {}
        try:
            for name, c in controls.items():
                if name in follows and list(c.options) != list(follows[name](**values)):
                    c.options = follows[name](**values)
                values[name] = c.value
        finally:
            following = False
        view.value = render(**values)._repr_html_()

    for c in controls.values():
        c.observe(refresh, "value")
    refresh()
    return w.VBox([*controls.values(), view])
