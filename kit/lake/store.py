"""The lake: `<lake>/<zone>/<run>/<stage>/`, on a disk or on `s3://`, with the manifest as the commit.

A stage writes parts under new names, then one `_manifest.json`. That single write is the commit: a reader
sees either the last good result or the new one, never a mixture, and a killed stage leaves nothing to clean
up. There is no rename, so the same code is right on an object store.

Every manifest satisfies the accounting identity, or is refused:
`records_in + created == records_out + Σ dropped + Σ failed`.
"""

from __future__ import annotations

import ast
import errno
import functools
import hashlib
import json
import platform
import re
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata, util
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, ValidationError, model_validator

from kit import ROOT, resolve
from kit.errors import LakeError, MissingInput, ParamError
from kit.params import NOTEBOOKS, SIDE_TRIPS, Stage

SCHEMA_VERSION = 1
MANIFEST = "_manifest.json"
EXECUTION = "_execution.json"
WHOLE_FILE_HASH_BYTES = 64 << 20
NOT_IN_CONTENT = {
    "kit.params",
    "kit.params.stage",
    "kit.params.data",
    "kit.params.fit",
    "kit.params.train",
    "kit.show",
    "kit.errors",
    "kit.estimate.table",
    "kit.estimate.reference",
    "kit.process",
    "kit.pipeline",
    "kit.progress",
    "kit.report",
    "kit",
}
"""Modules that decide how a result is chosen or shown, not what it is: editing them makes nothing stale."""


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


class Lake:
    """A place for results. Raises `LakeError` with one clear line wherever the store says no."""

    def __init__(self, uri: str) -> None:
        self.uri = resolve(uri).rstrip("/")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.uri)
        except (ValueError, ImportError) as error:
            raise LakeError(f"cannot open lake '{uri}': {error}") from None

    def folder(self, run: str, stage: str) -> str:
        """Path of a stage's folder on this lake's file system."""
        return f"{self.root}/{NOTEBOOKS[stage].zone}/{run}/{stage}"

    def check_writable(self) -> None:
        """Write and remove one small file; raises `LakeError` when that fails."""
        probe = f"{self.root}/.probe-{uuid.uuid4().hex[:8]}"
        with explained(f"lake '{self.uri}' cannot be written"):
            self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(probe, b"ok")
            self.fs.rm_file(probe)

    def manifest(self, run: str, stage: str) -> Manifest | None:
        """The committed manifest, or None; raises `LakeError` when it is damaged."""
        path = f"{self.folder(run, stage)}/{MANIFEST}"
        raw = self._bytes(path)
        if raw is None:
            return None
        try:
            return Manifest.model_validate_json(raw)
        except ValueError as error:
            raise LakeError(f"{path} is not a manifest ({str(error).splitlines()[0]}); remove it") from None

    def _bytes(self, path: str) -> bytes | None:
        """A file's content, None where there is no such file."""
        with explained(f"cannot read {path}"):
            try:
                return self.fs.cat_file(path)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def commit_sha256(self, run: str, stage: str) -> str | None:
        """SHA-256 of the committed manifest's bytes, which names this one commit; None where there is none."""
        raw = self._bytes(f"{self.folder(run, stage)}/{MANIFEST}")
        return None if raw is None else hashlib.sha256(raw).hexdigest()

    def runs(self) -> list[str]:
        """Names of the runs that have a committed stage."""
        with explained(f"lake '{self.uri}' cannot be read"):
            patterns = [f"{self.root}/{cls.zone}/*/{cls.stage}/{MANIFEST}" for cls in NOTEBOOKS.values()]
            return sorted({path.split("/")[-3] for pattern in patterns for path in self.fs.glob(pattern)})

    def manifests(self, run: str) -> list[Manifest]:
        """The committed manifests of a run, in the order of the chain."""
        return [m for m in (self.manifest(run, stage) for stage in NOTEBOOKS) if m]

    def need(self, run: str, stage: str) -> Manifest:
        """The committed manifest; raises `MissingInput` that says how to make it."""
        found = self.manifest(run, stage)
        if found is None:
            how = f"--{'only' if stage in SIDE_TRIPS else 'until'} {stage[:2]}"
            raise MissingInput(
                f"{stage} has no result for run '{run}' in {self.uri}: "
                f"run 'kit run RECIPE {how}' or its notebook first"
            )
        return found

    def paths(self, manifest: Manifest, name: str = "") -> list[str]:
        """Paths of the manifest's files whose name starts with `name`, in their committed order."""
        base = self.folder(manifest.run, manifest.stage)
        return [f"{base}/{o.path}" for o in manifest.outputs if o.name.startswith(name)]

    def table(self, manifest: Manifest, name: str = "part", columns: list[str] | None = None) -> pa.Table:
        """All Parquet files named `name…` as one table; raises `LakeError` when one is missing or damaged."""
        paths = [path for path in self.paths(manifest, name) if path.endswith(".parquet")]
        if not paths:
            raise LakeError(f"{manifest.stage} of run '{manifest.run}' holds no '{name}'")
        with explained(f"cannot read {manifest.stage} of run '{manifest.run}'"):
            return pa.concat_tables(self.read_part(path, columns) for path in paths)

    def read_part(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """One Parquet file by its full path, in this or any process that the lake was sent to."""
        # no partitioning: a folder called a=b is a name, and no column of the table
        return pq.read_table(path, columns=columns, filesystem=self.fs, partitioning=None)

    def local_folder(self, manifest: Manifest, name: str) -> str:
        """The files under `name/` in one local folder; an object store's are copied to a cache once."""
        prefix = name.rstrip("/") + "/"
        outputs = [o for o in manifest.outputs if o.name.startswith(prefix)]
        if not outputs:
            raise LakeError(f"{manifest.stage} of run '{manifest.run}' holds no folder '{name}'")
        base = self.folder(manifest.run, manifest.stage)
        if self.uri == self.root:
            return str(Path(base, outputs[0].path[: outputs[0].path.index(prefix)] + prefix.rstrip("/")))
        target = ROOT / ".cache" / "lake" / manifest.content_sha256[:16] / name
        for output in outputs:
            local = target / output.name.removeprefix(prefix)
            if not local.exists():
                local.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{base}/{output.path}", str(local))
        return str(target)

    @contextmanager
    def stage(self, p: Stage) -> Iterator[StageWriter]:
        """Open a stage for writing: the clock starts here, `commit` on the writer ends it."""
        writer = StageWriter(self, p)
        with explained(f"{p.stage} could not write to {self.uri}"):
            yield writer
        if writer.committed is None:
            raise LakeError(f"{p.stage} ended without a commit; nothing was recorded")

    def execution(self, run: str, stage: str) -> Execution:
        """The record of the stage's last try; one that says nothing where there is none that holds for its last commit."""
        commit = self.commit_sha256(run, stage)
        raw = self._bytes(f"{self.folder(run, stage)}/{EXECUTION}")
        with suppress(ValueError):  # another version's, or damaged: no more than a note is lost
            record = Execution.model_validate_json(raw or b"")
            if record.commit == commit:
                return record
        return Execution(commit=commit)

    def record_execution(self, run: str, stage: str, **facts: Any) -> None:
        """Write what is known of the last try, as fields of `Execution`, over what its record says of the same commit."""
        known = self.execution(run, stage).model_dump(exclude={"written_at"})
        path = f"{self.folder(run, stage)}/{EXECUTION}"
        with explained(f"cannot write {path}"):
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            put(self, path, Execution(**known | facts).model_dump_json(indent=1).encode())


class StageWriter:
    """Collects the outputs and inputs of one attempt at a stage and commits them with one write."""

    def __init__(self, lake: Lake, p: Stage) -> None:
        self.lake, self.p = lake, p
        self.base = lake.folder(p.run, p.stage)
        self.parts = PartWriter(lake.uri, self.base, uuid.uuid4().hex[:8])
        self.inputs: list[Input] = []
        self.outputs: list[Output] = []
        self.committed: Manifest | None = None
        self.started = time.perf_counter()
        lake.fs.makedirs(self.base, exist_ok=True)

    def read(self, stage: str) -> Manifest:
        """The committed result of `stage`, noted as an input of this one."""
        manifest = self.lake.need(self.p.run, stage)
        self.inputs.append(
            Input(
                uri=f"{NOTEBOOKS[stage].zone}/{self.p.run}/{stage}",
                manifest_sha256=self.lake.commit_sha256(self.p.run, stage),
                content_sha256=manifest.content_sha256,
            )
        )
        return manifest

    def read_outside(self, uri: str) -> str:
        """Note a file or folder from outside the lake as an input; returns its absolute form."""
        self.inputs.append(Input(uri=uri, content_sha256=fingerprint(uri)))
        return resolve(uri)

    def same_work(self, last: Manifest, but: Set[str] = frozenset()) -> bool:
        """Whether `last` was made with the parameters, the inputs (noted so far) and the code of this attempt.

        Parameters named in `but` may differ.
        """
        code = code_identity(self.p.stage)["source_sha256"]
        now = Work.of(self.p.identity(), self.inputs, code, but)
        return now == Work.of(last.params, last.inputs, last.code["source_sha256"], but)

    def add(self, output: Output) -> None:
        """List a file that a worker has written with `parts`."""
        self.outputs.append(output)

    def table(self, name: str, table: pa.Table, *, measured: bool = False) -> None:
        """Write one Parquet file from here."""
        output = self.parts.table(name, table)
        self.add(output.model_copy(update={"measured": measured}))

    def rows(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        schema: pa.Schema | None = None,
        *,
        measured: bool = False,
    ) -> None:
        """Write rows as one Parquet file from here; without `schema`, with every column that some row has."""
        if schema is None:
            # pyarrow takes the first row's columns for all: were it one that failed, the others' numbers would be lost
            columns = dict.fromkeys(column for row in rows for column in row)
            table = pa.table({column: [row.get(column) for row in rows] for column in columns})
        else:
            table = pa.Table.from_pylist(list(rows), schema=schema)
        self.table(name, table, measured=measured)

    def bytes(self, name: str, data: bytes, *, rows: int = 0, measured: bool = False) -> None:
        """Write one file of any kind from here."""
        output = self.parts.bytes(name, data, rows)
        self.add(output.model_copy(update={"measured": measured}))

    def folder(self, name: str, local: str | Path) -> None:
        """Write every file of the local folder `local` as `name/…`, such as a model."""
        for path in sorted(p for p in Path(local).rglob("*") if p.is_file()):
            self.bytes(f"{name}/{path.relative_to(local).as_posix()}", path.read_bytes())

    def commit(self, counts: Counts, metrics: dict[str, Any] | None = None) -> Manifest:
        """Write the manifest. Raises `LakeError` when nothing was made: an empty result is a failure."""
        if not self.outputs or counts.records_out == 0:
            raise LakeError(f"{self.p.stage} yielded nothing: {losses(counts)}")
        outputs = sorted(self.outputs, key=lambda o: o.name)
        manifest = new_manifest(self.p, self.started, self.inputs, outputs, counts, metrics or {})
        before = self.lake.manifest(self.p.run, self.p.stage)
        put(self.lake, f"{self.base}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())
        self.committed = manifest
        self._sweep(manifest, before)
        return manifest

    def _sweep(self, *keep: Manifest | None) -> None:
        """Remove parts of killed attempts; the previous result stays for readers that opened it."""
        listed = {f"{self.base}/{o.path}" for m in keep if m for o in m.outputs}
        listed |= {f"{self.base}/{name}" for name in (MANIFEST, EXECUTION)}
        for path in self.lake.fs.find(self.base):
            if path not in listed:
                self.lake.fs.rm_file(path)


@dataclass(frozen=True)
class PartWriter:
    """Writes the files of one attempt at a stage, from whichever process it was sent to: it can be pickled.

    Every file gets a name that no other attempt or retried task uses, and counts once the stage's manifest lists it.
    """

    lake_uri: str
    folder: str
    """The stage's folder on the lake's file system."""
    attempt: str

    def table(self, name: str, table: pa.Table) -> Output:
        """Write one Parquet file, `name.parquet`."""
        return self.bytes(f"{name}.parquet", parquet_bytes(table), table.num_rows)

    def bytes(self, name: str, data: bytes, rows: int = 0) -> Output:
        """Write one file of any kind."""
        fs, _ = fsspec.core.url_to_fs(self.lake_uri)
        head, _, tail = name.rpartition("/")
        # files of a folder (a model) keep their names, inside a folder of their attempt's own
        unique = f"{_stem(tail)}-{uuid.uuid4().hex[:8]}{_suffix(tail)}"
        path = f"{self.attempt}/{head}/{tail}" if head else unique
        full = f"{self.folder}/{path}"
        with explained(f"cannot write {name}"):
            fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(full, data)
        return Output(
            name=name, path=path, rows=rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )


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
        told = [(source.uri, source.content_sha256) for source in inputs]
        return cls({k: v for k, v in params.items() if k not in but}, told, source_sha256)

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


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file (zstd), without the Arrow schema: the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue().to_pybytes()


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _suffix(name: str) -> str:
    return name[len(_stem(name)) :]


def put(lake: Lake, path: str, data: bytes) -> None:
    """One atomic write of a full path: an object store's put is; on a disk, a hidden file moved over."""
    if lake.uri == lake.root:
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{uuid.uuid4().hex}"
        part.write_bytes(data)
        part.replace(path)
    else:
        lake.fs.pipe_file(path, data)


def losses(counts: Counts) -> str:
    """One line that says where the records of `counts` went."""
    gone = {**counts.dropped, **counts.failed}
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(gone.items(), key=lambda x: -x[1]))
    return f"{counts.records_in} in, {counts.records_out} out" + (f" ({reasons})" if reasons else "")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn a store's refusal into a `LakeError` of one line."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise LakeError(f"{what}: the disk is full") from None
        raise LakeError(f"{what}: {error.strerror or error}") from None
    except (pa.ArrowInvalid, ValidationError) as error:
        raise LakeError(f"{what}: {str(error).splitlines()[-1].strip()}") from None
    except Exception as error:
        # an object store's client has errors of its own (no credentials, nobody there), which are no OSError
        if type(error).__module__.partition(".")[0] not in {"botocore", "aiobotocore", "aiohttp"}:
            raise
        raise LakeError(f"{what}: {error}") from None


def fingerprint(uri: str) -> str:
    """Content hash of something outside the lake: small files by content, large or remote ones by size and tag."""
    fs, path = fsspec.core.url_to_fs(resolve(uri))
    digest = hashlib.sha256()
    try:
        found = sorted(fs.find(path)) or [path]
        for file in found:
            info = fs.info(file)
            digest.update(file.removeprefix(path).encode())
            if "://" not in uri and info["size"] <= WHOLE_FILE_HASH_BYTES:
                digest.update(fs.cat_file(file))
            else:
                tag = info.get("ETag") or info.get("mtime") or ""
                digest.update(f"{info['size']} {tag}".encode())
    except FileNotFoundError:
        raise ParamError(f"'{uri}' does not exist") from None
    return digest.hexdigest()


@functools.cache
def code_identity(stage: str) -> dict[str, Any]:
    """`git_sha`, `dirty` and a hash of the stage's notebook and every kit module that it can reach."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        sha = git(["git", "rev-parse", "HEAD"]).stdout.strip() or None
        dirty = bool(git(["git", "status", "--porcelain", "--", "kit", "notebooks"]).stdout.strip())
    except OSError:  # no git, or a zip on a cluster: the source hash below still says which code ran
        sha, dirty = None, False
    return {"git_sha": sha, "dirty": dirty, "source_sha256": source_sha256(stage)}


def source_sha256(stage: str) -> str:
    """Hash over the notebook's code cells and the kit modules it imports, directly or not."""
    digest = hashlib.sha256()
    notebook = ROOT / "notebooks" / f"{stage}.ipynb"
    imports: set[str] = set()
    if notebook.exists():
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        # parameters are compared by value, so the cell that repeats the defaults is not code
        code = [
            c
            for c, cell in zip(code, (c for c in cells if c["cell_type"] == "code"), strict=True)
            if "parameters" not in cell["metadata"].get("tags", [])
        ]
        imports = {name for source in code for name in _kit_imports(source)}
        digest.update("\n".join(code).encode())
    digest.update(modules_sha256(imports).encode())
    return digest.hexdigest()


def modules_sha256(modules: set[str]) -> str:
    """Hash over kit modules and those they import, directly or not."""
    digest = hashlib.sha256()
    for module in sorted(_closure(modules) - NOT_IN_CONTENT):
        digest.update(f"{module}\n".encode() + _module_path(module).read_bytes())
    return digest.hexdigest()


def _closure(modules: set[str]) -> set[str]:
    seen: set[str] = set()
    todo = set(modules)
    while todo:
        module = todo.pop()
        seen.add(module)
        path = _module_path(module)
        if module not in NOT_IN_CONTENT:
            todo |= _kit_imports(path.read_text(encoding="utf-8")) - seen
    return seen


@functools.cache  # a module is read for every stage that reaches it
def _kit_imports(source: str) -> set[str]:
    """Names of kit modules that `source` imports, at any depth of its code."""
    found: set[str] = set()
    source = re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE)  # IPython magics are not Python
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return {m for m in found if m.split(".")[0] == "kit" and _module_path(m) is not None}


@functools.cache
def _module_path(module: str) -> Path | None:
    base = ROOT / Path(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            return path
    return None


@functools.cache
def environment() -> dict[str, str]:
    """Versions that a reader of a manifest will ask for; packages that are not installed are left out."""
    names = ("pyspark", "duckdb", "pyarrow", "torch", "transformers", "peft", "trl", "resiliparse")
    found = {name: metadata.version(name) for name in names if util.find_spec(name)}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}
