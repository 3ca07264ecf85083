"""The record of one committed stage: what it read, what it wrote, where every record went."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field, model_validator

from kit.lake.code import code_identity, environment
from kit.params import Stage

SCHEMA_VERSION = 1


class Output(BaseModel):
    """One committed file. `name` is what it is, `path` where this attempt put it (relative to the stage)."""

    name: str
    path: str
    rows: int
    bytes: int
    sha256: str
    measured: bool = False
    """True for timings and the like: they differ in every run, so they are no part of the content."""


class Input(BaseModel):
    """What a stage read: another stage's manifest, or a file or folder from outside the lake."""

    uri: str
    manifest_sha256: str | None = None
    content_sha256: str


class Counts(BaseModel):
    """Where every record went. Reasons and errors are named; the sum must come out."""

    records_in: int
    records_out: int
    created: int = 0
    dropped: dict[str, int] = Field(default_factory=dict)
    failed: dict[str, int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _identity(self) -> Counts:
        gone = sum(self.dropped.values()) + sum(self.failed.values())
        if self.records_in + self.created != self.records_out + gone:
            raise ValueError(
                f"records do not add up: {self.records_in} in + {self.created} created != "
                f"{self.records_out} out + {gone} dropped or failed"
            )
        return self


@dataclass
class Account:
    """Where every record went, while they are being counted: in + created = out + dropped + failed, in the end."""

    records_in: int = 0
    created: int = 0
    records_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of_verdicts(cls, verdicts: Iterable[str | None]) -> Account:
        """An account of records that were judged: None moves on, a text is the reason why the record does not."""
        reasons = Counter(verdicts)
        kept = reasons.pop(None, 0)
        return cls(kept + reasons.total(), 0, kept, reasons)

    @classmethod
    def total(cls, accounts: Iterable[Account]) -> Account:
        """The account of a whole whose parts have accounts of their own."""
        whole = cls()
        for part in accounts:
            whole.records_in += part.records_in
            whole.created += part.created
            whole.records_out += part.records_out
            whole.dropped.update(part.dropped)
            whole.failed.update(part.failed)
        return whole

    def counts(self, by_name: bool = True) -> Counts:
        """The account as a manifest keeps it, reasons that nothing went for left out; raises `ValueError`.

        Reasons come in the order of their names, for parts may end in any order, or else as they were met.
        """
        dropped, failed = (
            {k: n for k, n in (sorted(c.items()) if by_name else c.items()) if n}
            for c in (self.dropped, self.failed)
        )
        sums = {"records_in": self.records_in, "created": self.created, "records_out": self.records_out}
        return Counts(**sums, dropped=dropped, failed=failed)


class Manifest(BaseModel):
    """The record of one committed stage; reading it is reading the result."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    run: str
    created_at: str
    params: dict[str, Any]
    inputs: list[Input]
    outputs: list[Output]
    counts: Counts
    metrics: dict[str, Any] = Field(default_factory=dict)
    seconds: float
    cost_usd: float
    code: dict[str, Any]
    environment: dict[str, str]

    @property
    def content_sha256(self) -> str:
        """Hash of what the stage made, whatever the attempt, the clock or the file names."""
        rows = sorted((o.name, o.sha256) for o in self.outputs if not o.measured)
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class Execution(BaseModel):
    """How a stage's last try under `kit run` went: `_execution.json`, beside the manifest and no part of the commit.

    `commit` is the SHA-256 of the manifest that was there when this was written. The record holds as long as that is
    the last one: the next commit, whoever makes it, makes the record void, and neither sweeps nor changes it.
    """

    commit: str | None
    """None: nothing was committed."""
    seconds: float | None = None
    """What the commit took, the kernel's start included."""
    peak_memory_mb: int | None = None
    """Most that the kit's processes held together meanwhile, 10⁶ bytes."""
    error: str | None = None
    """One line of what ended a later try, or one that committed before it failed."""
    written_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Work:
    """What decides a result: parameters, inputs by their content, and code. Equal ones are the same work."""

    params: dict[str, Any]
    inputs: list[tuple[str, str]]
    """Address and content hash of each."""
    source_sha256: str

    @classmethod
    def of(
        cls,
        params: Mapping[str, Any],
        inputs: Iterable[Input],
        source_sha256: str,
        but: Set[str] = frozenset(),
    ) -> Work:
        """Work with these parameters, those named in `but` left out."""
        content_by_uri = [(source.uri, source.content_sha256) for source in inputs]
        return cls({k: v for k, v in params.items() if k not in but}, content_by_uri, source_sha256)

    @property
    def key(self) -> str:
        """A name for the work, 64 hexadecimal digits."""
        parts = [self.params, self.inputs, self.source_sha256]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def new_manifest(
    p: Stage,
    started: float,
    inputs: list[Input],
    outputs: list[Output],
    counts: Counts,
    metrics: dict[str, Any],
) -> Manifest:
    """What an attempt at a stage, begun at `started` (`time.perf_counter()`), has to say of itself as it ends now."""
    seconds = time.perf_counter() - started
    return Manifest(
        stage=p.stage,
        run=p.run,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        params=p.identity(),
        inputs=inputs,
        outputs=outputs,
        counts=counts,
        metrics=metrics,
        seconds=round(seconds, 3),
        cost_usd=round(seconds / 3600 * p.usd_per_hour, 9),
        code=code_identity(p.stage),
        environment=environment(),
    )


def counts_line(counts: Counts) -> str:
    """One line that says where the records of `counts` went."""
    gone = {**counts.dropped, **counts.failed}
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(gone.items(), key=lambda item: -item[1]))
    return f"{counts.records_in} in, {counts.records_out} out" + (f" ({reasons})" if reasons else "")
