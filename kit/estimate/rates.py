"""What a unit of work costs: the reference run's rates, measured, with machine, date and commit."""

from __future__ import annotations

from typing import Any

from kit.params import CompareGenerations, Stage, Training

DECIDES = ("base_model", "method", "quantization", "dtype", "activation_checkpointing", "packing")
"""Parameters without which an earlier run tells nothing about the next one's speed."""


def usd(seconds: float, usd_per_hour: float) -> float:
    """Price of `seconds` of a machine that costs `usd_per_hour`."""
    return seconds / 3600 * usd_per_hour


def usd_per_million(seconds: float, units: float, usd_per_hour: float) -> float:
    """Dollars per million pages, rows or tokens at a rate just measured; NaN for no units."""
    return usd(seconds, usd_per_hour) * 1e6 / units if units else float("nan")


def planned_units(p: Stage, pages: int) -> tuple[float, str]:
    """How much work a stage will be and in what: `pages` are those selected, training counts tokens."""
    if trained := p.fits():
        return sum(fit.all_tokens for fit in trained), "tokens at most"
    if isinstance(p, CompareGenerations):  # by three models: base, tuned, aligned
        return 3 * len(p.prompts) * p.max_new_tokens, "new tokens"
    about_machine = isinstance(p, Training) or p.zone == "reports"
    return (1, "machine") if about_machine else (pages, "pages")


def measured_by_reference(p: Stage) -> bool:
    """Whether the reference run, which was made on defaults, ran the model and the method of `p`."""
    return deciding(p) == deciding(type(p)())


def deciding(p: Stage) -> dict[str, Any]:
    """Those of `DECIDES` that the stage has, with their values."""
    return p.model_dump(include=set(DECIDES))


def two_point_rates(
    small: list[tuple[Stage, int, dict]], large: list[tuple[Stage, int, dict]]
) -> dict[str, Any]:
    """`{stage: {fixed_s, per_unit_s, memory_mb}}` from two runs of different size, a straight line through both.

    Each item is (parameters, pages, `{"seconds", "peak_memory_mb"}` of the stage's execution).
    """
    rates = {}
    for (p, few, a), (q, many, b) in zip(small, large, strict=True):
        units = planned_units(p, few)[0], planned_units(q, many)[0]
        slope = max(b["seconds"] - a["seconds"], 0) / (units[1] - units[0]) if units[1] > units[0] else 0.0
        rates[q.stage] = {
            "fixed_s": round(max(b["seconds"] - slope * units[1], 0), 2),
            "per_unit_s": float(f"{slope:.4g}"),
            "memory_mb": max(a["peak_memory_mb"], b["peak_memory_mb"]),
        }
    return rates
