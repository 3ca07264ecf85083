"""A file lands in the raw zone and is refined at once; `handler` is the entry point of a Lambda function.

    raw/<run>/…                      the drop zone: HTML, text, JSON with `text`, WARC/ARC/WET, images and their page
    raw/<run>/_quarantine/…          copies of files that cannot be read, each with a note of its reason
    intermediate/<run>/31_refine_on_arrival/extracted/<path id>/    step 1, started by the object in raw
    intermediate/<run>/31_refine_on_arrival/refined/<path id>/      step 2, started by the manifest of step 1

A step writes Parquet, then a manifest: that one put is its commit, and its event starts the next step. Names are
made of the event's sequencer, the content and a token of what the step does (parameters, code): a retry makes the
same again, an older version that comes late lies behind the newer, and a changed step starts from the last good
intermediate. Parts of names that begin with `_` or `.` are left alone: upload as `.name`, then rename, to be sure.

On AWS send object-created events of `raw/<run>/` and of `…/extracted/` (suffix `.json`), straight or through SQS with
ReportBatchItemFailures; the environment variable KIT_PARAMS (JSON) or KIT_RECIPE (a file) holds the parameters.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from kit.data.engine import guard
from kit.data.extract.schema import DOCUMENT
from kit.data.refine.refine import REFINED, refine_batch
from kit.errors import LakeError
from kit.lake import store as lakes
from kit.lake.code import modules_sha256
from kit.lake.files import fingerprint, parquet_bytes, store_errors
from kit.lake.manifest import Account, Counts, Input, Manifest, Output, Work, new_manifest
from kit.lake.store import Lake
from kit.launch.arrival.event import Landed, landed
from kit.launch.arrival.landed import documents_of
from kit.params import Extracting, RefineOnArrival, Refining, Stage, for_stage, load_recipe


class Commit(NamedTuple):
    """What a manifest's file name says; `token` stands for the parameters and the code of every step so far."""

    path: str
    sequencer: str
    digest: str
    token: str


def handler(event: Mapping[str, Any], context: Any = None) -> dict[str, Any]:
    """The Lambda entry point: `handle` with the parameters of the environment."""
    return handle(event, *_configured(os.environ.get("KIT_PARAMS", ""), os.environ.get("KIT_RECIPE", "")))


@functools.cache
def _configured(params: str, recipe: str) -> tuple[RefineOnArrival, Lake]:
    p = for_stage(RefineOnArrival, json.loads(params) if params else load_recipe(recipe) if recipe else {})
    return p, Lake(p.lake)


def handle(event: Mapping[str, Any], p: RefineOnArrival, lake: Lake) -> dict[str, Any]:
    """Every object of `event` through its step: `results`; for SQS `batchItemFailures`, which alone are sent again.

    A file that cannot be read is a result (`quarantined`). What may do better next time, such as a store that does
    not answer, is raised, after the other objects of the event have had their turn.
    """
    records, results, errors = event.get("Records"), [], []
    queued = bool(records) and "body" in records[0]
    for part in [{"Records": [r]} for r in records] if records else [event]:
        try:
            results += [process(arrived, p, lake) for arrived in landed(part)]
        except Exception as error:  # whatever it is, it must not take the other objects along
            print(f"kit: {type(error).__name__}: {error}", file=sys.stderr)
            errors.append((part, error))
    if queued:
        failures = [{"itemIdentifier": part["Records"][0]["messageId"]} for part, _ in errors]
        return {"batchItemFailures": failures}
    if errors:
        raise errors[0][1]
    return {"results": results}


def process(arrived: Landed, p: RefineOnArrival, lake: Lake) -> dict[str, Any]:
    """One object through its step: `{path, status, …}` with status `extracted`, `refined`, `quarantined`, `duplicate`,
    `older` (than what is committed), `gone` or `ignored`."""
    name, status = arrived.path.removeprefix(f"{lake.root}/"), "ignored"
    hidden = any(part.startswith(("_", ".")) or not part for part in name.split("/")[2:])
    with store_errors(f"cannot process {name}"):
        try:
            if name.startswith(f"raw/{p.run}/") and not hidden:
                return {"path": name, "sequencer": arrived.sequencer} | _extract(name, arrived, p, lake)
            if name.startswith(f"{zone(p, 'extracted')}/") and name.endswith(".json") and not hidden:
                return _refine(name, p, lake)
        except FileNotFoundError:
            status = "gone"
    return {"path": name, "status": status}


def zone(p: RefineOnArrival, step: str) -> str:
    """Where a step's results lie in the lake."""
    return f"{p.zone}/{p.run}/{p.stage}/{step}"


def path_id(name: str) -> str:
    """Identity of a path of the drop zone, `raw/<run>/…`."""
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=10).hexdigest()


@functools.cache
def _code(module: str) -> str:
    return modules_sha256({module})


def step_tokens(p: RefineOnArrival) -> tuple[str, str]:
    """What the steps are named by: all that changes what they make, their parameters and their code."""
    own = [cls.model_fields.keys() - Stage.model_fields.keys() for cls in (Extracting, Refining)]
    # what judges is asked in step 1 by the prefilter alone; bounds that are moved by `thresholds`, too
    asked = own[0] | {"thresholds"} if p.prefilter else own[0] - Extracting.judging()
    first, second = p.model_dump(include=asked), p.model_dump(include=own[1])
    if p.blocked_urls:
        second["blocked_urls"] = fingerprint(p.blocked_urls)
    steps = (
        Work(first, [], _code("kit.launch.arrival.landed")),
        Work(second, [], _code("kit.data.refine.refine")),
    )
    return tuple(step.key[:8] for step in steps)


def commits(lake: Lake, folder: str) -> list[Commit]:
    """The manifests below a folder of the lake; of one path, the oldest version first."""
    lake.fs.invalidate_cache()
    files = [f.removeprefix(f"{lake.root}/") for f in lake.fs.find(f"{lake.root}/{folder}")]
    return sorted(Commit(f, *f.rpartition("/")[2][:-5].split(".", 2)) for f in files if f.endswith(".json"))


def read_manifest(lake: Lake, path: str) -> Manifest:
    """The manifest of a commit."""
    return Manifest.model_validate_json(lake.fs.cat_file(f"{lake.root}/{path}"))


def _settled(lake: Lake, folder: str, order: str, token: str) -> str:
    """`duplicate` or `older` for a version of a path that needs no work."""
    committed = commits(lake, folder)
    if any(c.sequencer > order for c in committed):
        return "older"
    return "duplicate" if any(c.sequencer == order and c.token == token for c in committed) else ""


def put_file(lake: Lake, name: str, data: bytes) -> Output:
    """Write one file of the lake at once: nobody, and no watch, ever sees half of it."""
    lakes.put_bytes(lake, f"{lake.root}/{name}", data)
    digest = hashlib.sha256(data).hexdigest()
    return Output(name=name, path="/".join(name.split("/")[3:]), rows=0, bytes=len(data), sha256=digest)


def put_table(lake: Lake, name: str, table: pa.Table) -> Output:
    """The same for a table."""
    return put_file(lake, name, parquet_bytes(table)).model_copy(update={"rows": table.num_rows})


def commit(
    lake: Lake, p: RefineOnArrival, path: str, started: float, counts: Counts, inputs: list[Input],
    outputs: list[Output], facts: dict[str, Any],
) -> Manifest:  # fmt: skip
    """Write a manifest, which makes its outputs count."""
    facts = facts | {"committed_at": datetime.now(UTC).isoformat(timespec="milliseconds")}
    manifest = new_manifest(p, started, inputs, outputs, counts, facts)
    put_file(lake, path, manifest.model_dump_json(indent=1).encode())
    return manifest


def _extract(name: str, arrived: Landed, p: RefineOnArrival, lake: Lake) -> dict[str, Any]:
    """Step 1: the documents of a file; one that gives none and holds damage is quarantined."""
    started, token = time.perf_counter(), step_tokens(p)[0]
    folder = f"{zone(p, 'extracted')}/{path_id(name)}"
    if status := _settled(lake, folder, arrived.sequencer, token):
        return {"status": status}
    fs, version = lake.fs, {}
    if arrived.version and "s3" in fs.protocol:
        fs, version = fsspec.filesystem("s3", version_aware=True), {"version_id": arrived.version}
    info = fs.info(arrived.path, **version)
    if info["type"] != "file":
        return {"status": "ignored"}
    facts = {
        "path": name,
        "version": arrived.version,
        "sequencer": arrived.sequencer,
        "event_time": arrived.time,
    }
    with tempfile.TemporaryDirectory() as temp:
        local, digest = Path(temp, "file"), hashlib.sha256(f"{info['size']} {info.get('ETag')}".encode())
        if info["size"] <= p.max_file_mb * 1e6:
            fs.get_file(arrived.path, str(local), **version)
            with local.open("rb") as f:
                digest = hashlib.file_digest(f, "sha256")
            kind, table, counts = documents_of(str(local), name, arrived.time, p)
        else:
            kind, table = "unknown", None
            counts = Counts(records_in=1, records_out=0, failed={"file too large": 1})
        facts |= {"step": "extracted", "kind": kind, "bytes": info["size"], "sha256": digest.hexdigest()}
        if not counts.records_out and counts.failed:
            facts["quarantine"] = max(counts.failed, key=counts.failed.get)
            # a copy: to remove the original could hit a newer version, and it is what was received
            place = f"raw/{p.run}/_quarantine/{name.split('/', 2)[2]}"
            if local.exists():
                put_file(lake, place, local.read_bytes())
            note = json.dumps(facts | {"reason": facts["quarantine"]}, indent=1)
            put_file(lake, f"{place}.reason.json", note.encode())
    content = f"{digest.hexdigest()[:16]}.{token}"
    outputs = [put_table(lake, f"{folder}/{content}.parquet", table)] if table else []
    path = f"{folder}/{arrived.sequencer}.{content}.json"
    inputs = [Input(uri=name, content_sha256=facts["sha256"])]
    commit(lake, p, path, started, counts, inputs, outputs, facts)
    return {"status": "quarantined" if "quarantine" in facts else "extracted", "commit": path}


def _refine(name: str, p: RefineOnArrival, lake: Lake) -> dict[str, Any]:
    """Step 2: what step 1 committed, refined."""
    started, source, (before, own) = time.perf_counter(), read_manifest(lake, name), step_tokens(p)
    folder, key, file = name.removesuffix(".json").rsplit("/", 2)
    order, content = file.split(".", 1)
    origin, target = {"path": source.metrics["path"], "sequencer": order}, f"{zone(p, 'refined')}/{key}"
    if not source.outputs or not content.endswith(before):  # what was extracted another way comes again
        return origin | {"status": "ignored"}
    if _settled(lake, f"{folder}/{key}", order, before) == "older":
        return origin | {"status": "older"}
    if status := _settled(lake, target, order, f"{before}.{own}"):
        return origin | {"status": status}
    raw = lake.fs.cat_file(f"{lake.root}/{source.outputs[0].name}")
    if hashlib.sha256(raw).hexdigest() != source.outputs[0].sha256:
        raise LakeError(f"{source.outputs[0].name} is not what its manifest says")
    documents = pq.read_table(pa.BufferReader(raw))
    _load(p.model_dump_json())
    rows = [documents.slice(i, 1) for i in range(documents.num_rows)]
    packed, dead = guard.in_child(functools.partial(_refined, p=p), rows, p.page_timeout_s, p.page_memory_mb)
    table = pa.ipc.open_stream(packed).read_all()
    account = Account.of_verdicts(table["drop_reason"].to_pylist())
    counts = Account.total([account, Account(len(dead), failed=Counter(dead.values()))]).counts()
    facts = source.metrics | {"step": "refined"}
    outputs = [put_table(lake, f"{target}/{content}.{own}.parquet", table)]
    inputs, path = [Input(uri=name, content_sha256=source.content_sha256)], f"{target}/{file}.{own}.json"
    commit(lake, p, path, started, counts, inputs, outputs, facts)
    return origin | {"status": "refined", "commit": path}


@functools.lru_cache(maxsize=1)
def _load(params: str) -> None:
    """Refine a harmless document here: what this process has loaded need not be loaded in every child."""
    p = RefineOnArrival.model_validate_json(params)
    anything = {"quality_rules": [], "min_lang_score": 0.0, "keep_languages": []}
    text = "On Monday Anna Smith of London wrote that she can be called at +44 20 7946 0958."
    row = {"text": text, "url": "https://x.example/", "images": [], "links": [], "reviews": []}
    refine_batch(pa.Table.from_pylist([row], schema=DOCUMENT), p.model_copy(update=anything))


def _refined(items: list[tuple[int, pa.Table]], beat: Callable[[int], None], p: RefineOnArrival) -> bytes:
    """Documents, each for itself, as an Arrow stream. Runs in a child."""
    tables, sink = [REFINED.empty_table()], pa.BufferOutputStream()
    for i, document in items:
        beat(i)
        tables.append(refine_batch(document, p))
    beat(-1)
    with pa.ipc.new_stream(sink, REFINED) as stream:
        stream.write_table(pa.concat_tables(tables))
    return sink.getvalue().to_pybytes()
