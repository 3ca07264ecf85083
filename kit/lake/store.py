"""The lake: `<lake>/<zone>/<run>/<stage>/`, on a disk or on `s3://`, with the manifest as the commit.

A stage writes parts under new names, then one `_manifest.json`. That single write is the commit: a reader
sees either the last good result or the new one, never a mixture, and a killed stage leaves nothing to clean
up. There is no rename, so the same code is right on an object store.

Every manifest satisfies the accounting identity, or is refused:
`records_in + created == records_out + Σ dropped + Σ failed`.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from kit import ROOT, resolve_path
from kit.errors import LakeError, MissingInput
from kit.lake.code import code_identity
from kit.lake.files import PartWriter, fingerprint, store_errors
from kit.lake.manifest import Counts, Execution, Input, Manifest, Output, Work, counts_line, new_manifest
from kit.params import NOTEBOOKS, SIDE_TRIPS, Stage

MANIFEST = "_manifest.json"
EXECUTION = "_execution.json"


class Lake:
    """A place for results. Raises `LakeError` with one clear line wherever the store says no."""

    def __init__(self, uri: str) -> None:
        self.uri = resolve_path(uri).rstrip("/")
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
        with store_errors(f"lake '{self.uri}' cannot be written"):
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
        with store_errors(f"cannot read {path}"):
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
        with store_errors(f"lake '{self.uri}' cannot be read"):
            patterns = [f"{self.root}/{cls.zone}/*/{cls.stage}/{MANIFEST}" for cls in NOTEBOOKS.values()]
            return sorted({path.split("/")[-3] for pattern in patterns for path in self.fs.glob(pattern)})

    def manifests(self, run: str) -> list[Manifest]:
        """The committed manifests of a run, in the order of the chain."""
        return [m for m in (self.manifest(run, stage) for stage in NOTEBOOKS) if m]

    def need(self, run: str, stage: str) -> Manifest:
        """The committed manifest; raises `MissingInput` that says how to make it."""
        manifest = self.manifest(run, stage)
        if manifest is None:
            how = f"--{'only' if stage in SIDE_TRIPS else 'until'} {stage[:2]}"
            raise MissingInput(
                f"{stage} has no result for run '{run}' in {self.uri}: "
                f"run 'kit run RECIPE {how}' or its notebook first"
            )
        return manifest

    def paths(self, manifest: Manifest, name: str = "") -> list[str]:
        """Paths of the manifest's files whose name starts with `name`, in their committed order."""
        base = self.folder(manifest.run, manifest.stage)
        return [f"{base}/{o.path}" for o in manifest.outputs if o.name.startswith(name)]

    def table(self, manifest: Manifest, name: str = "part", columns: list[str] | None = None) -> pa.Table:
        """All Parquet files named `name…` as one table; raises `LakeError` when one is missing or damaged."""
        paths = [path for path in self.paths(manifest, name) if path.endswith(".parquet")]
        if not paths:
            raise LakeError(f"{manifest.stage} of run '{manifest.run}' holds no '{name}'")
        with store_errors(f"cannot read {manifest.stage} of run '{manifest.run}'"):
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
        with store_errors(f"{p.stage} could not write to {self.uri}"):
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
        with store_errors(f"cannot write {path}"):
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            put_bytes(self, path, Execution(**known | facts).model_dump_json(indent=1).encode())


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
        return resolve_path(uri)

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
            raise LakeError(f"{self.p.stage} yielded nothing: {counts_line(counts)}")
        outputs = sorted(self.outputs, key=lambda o: o.name)
        manifest = new_manifest(self.p, self.started, self.inputs, outputs, counts, metrics or {})
        before = self.lake.manifest(self.p.run, self.p.stage)
        put_bytes(self.lake, f"{self.base}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())
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


def put_bytes(lake: Lake, path: str, data: bytes) -> None:
    """One atomic write of a full path: an object store's put is; on a disk, a hidden file moved over."""
    if lake.uri == lake.root:
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{uuid.uuid4().hex}"
        part.write_bytes(data)
        part.replace(path)
    else:
        lake.fs.pipe_file(path, data)
