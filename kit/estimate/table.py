"""What a run will take and what it took: seconds, memory and dollars.

An estimate is `fixed + per_unit × units`. The rate is this lake's own, from the manifest of an earlier run,
where there is one; else that of the reference run which ships with the kit (`kit.estimate.reference`: measured, with machine,
date and commit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kit.estimate import reference
from kit.lake.store import Manifest
from kit.params import CompareGenerations, Cores, Stage, Training

DECIDES = ("base_model", "method", "quantization", "dtype", "activation_checkpointing", "packing")
"""Parameters without which an earlier run tells nothing about the next one's speed."""


@dataclass(frozen=True)
class Estimate:
    """Seconds, peak memory (MB) and dollars of one stage, and where the rate comes from."""

    stage: str
    work: str
    seconds: float
    memory_mb: float
    usd: float
    rate_from: str


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


def estimate(
    p: Stage, pages: int, earlier: Manifest | None, planned: tuple[float, float, str] | None = None
) -> Estimate:
    """Time, memory and dollars of a stage; `earlier` is its last result in this lake, if there is one.

    Of an earlier run's seconds, the fixed part (starting an engine, loading a model) is taken from the
    reference and does not scale. `planned` (seconds past the fixed part, MB, from what) stands in where no run of
    this model has been measured. With `cores` given, Spark's stages are taken to scale with them from the reference's.
    """
    units, unit = planned_units(p, pages)
    work = f"{units:,.0f} {unit}"
    known = reference.read("rates")
    rate = known["stages"][p.stage]
    fixed, per_unit, memory_mb, source = (
        rate["fixed_s"],
        rate["per_unit_s"],
        rate["memory_mb"],
        "reference run",
    )
    if earlier and any(earlier.params.get(k) != value for k, value in deciding(p).items()):
        earlier = None
    before = earlier and planned_units(type(p)(**earlier.params), earlier.counts.records_in)[0]
    if earlier and before:
        fixed = min(fixed, earlier.seconds)
        per_unit, source = (earlier.seconds - fixed) / before, "this lake"
    elif planned:
        per_unit, memory_mb, source = planned[0] / units, round(planned[1]), planned[2]
    elif isinstance(p, Cores) and p.cores:
        made_on = known.get("cores", 2)
        per_unit, source = per_unit * made_on / p.cores, f"reference run, {made_on} → {p.cores} cores"
    seconds = fixed + per_unit * units
    return Estimate(p.stage, work, round(seconds, 1), memory_mb, usd(seconds, p.usd_per_hour), source)


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
