"""The same on this machine: a drop zone is watched, and every file in it goes through `on_arrival.handle`.

On a disk the system tells what changed (`watchfiles`); an S3 server is asked for its list again and again, because
many, SeaweedFS among them, push no notifications, and a list loses nothing. Both become the events that AWS sends.
"""

from __future__ import annotations

import multiprocessing
import os
import posixpath
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

import pyarrow as pa
import watchfiles

from kit import process
from kit.errors import LakeError
from kit.lake.files import fingerprint
from kit.lake.manifest import Account, Input, Manifest
from kit.lake.store import MANIFEST, Lake
from kit.launch.arrival.on_arrival import (
    commit,
    commits,
    handle,
    put_file,
    put_table,
    read_manifest,
    step_tokens,
    zone,
)
from kit.params import RefineOnArrival
from kit.progress import progress

ENDS = {"refined", "quarantined", "ignored", "error"}
TRIES, SETTLE_S, POLL_S, RESCAN_S = 3, 0.05, 0.25, 10.0
WARM = b"<title>warm</title><p>" + b"What is loaded here need not be loaded when the first file comes. " * 9


def event_of(lake: Lake, name: str, when: float, order: str = "") -> dict[str, Any]:
    """The event that S3 would send of the lake's file `name`, written at `when` (Unix seconds)."""
    event_time = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    thing = {"key": quote(name), "sequencer": f"{int(when * 1e6):016x}{order}"}
    s3 = {"bucket": {"name": lake.root}, "object": thing}
    return {"Records": [{"eventName": "ObjectCreated:Put", "eventTime": event_time, "s3": s3}]}


def changes(
    p: RefineOnArrival, lake: Lake, ready: Callable[[], Any] | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Events of what is there and of what comes, for ever; an empty list where nothing came for a moment.

    A file that is still being written is left for a moment; should it go on later, that is a newer version. `ready`
    is called once nothing can be missed any more.
    """
    folders = [f"{lake.root}/raw/{p.run}", f"{lake.root}/{zone(p, 'extracted')}"]
    local, seen, waiting, due = lake.uri == lake.root, {}, set(), 0.0
    for folder in folders:
        lake.fs.makedirs(folder, exist_ok=True)
    settings = dict(watch_filter=None, step=20, debounce=200, rust_timeout=50, yield_on_timeout=True)
    ticks = watchfiles.watch(*folders, **settings) if local else iter(lambda: time.sleep(POLL_S) or (), None)
    for changed in ticks:
        look = waiting | {path for kind, path in changed if kind != watchfiles.Change.deleted}
        if not local or time.monotonic() > due:
            lake.fs.invalidate_cache()
            look, due = {*folders}, time.monotonic() + RESCAN_S
        events, waiting = [], set()
        files = (
            (k, v)
            for place in look
            for k, v in lake.fs.find(place, detail=True).items()
            if v["type"] == "file"
        )
        for path, info in sorted(files, key=itemgetter(0)):
            # on a disk the time of the inode's change: an older file that is moved in keeps its mtime
            when = info["created"] if local else info["LastModified"].timestamp()
            tag, name = (when, info["size"], info.get("ETag")), path.removeprefix(f"{lake.root}/")
            if local and 0 <= time.time() - when < SETTLE_S:
                waiting.add(path)
            elif seen.get(path) != tag and (name.startswith("raw/") or name.endswith(".json")):
                # a store's clock may have no more than seconds: then which came later is known only here
                again = path in seen and seen[path][0] == when
                seen[path] = tag
                events.append(event_of(lake, name, when, f"{time.time_ns():016x}" if again else ""))
        yield events
        if ready:
            ready()
            ready = None


def watch(
    p: RefineOnArrival, lake: Lake, ready: Callable[[], Any] | None = None, quiet_s: float | None = None
) -> Iterator[dict[str, Any]]:
    """Handle all that arrives with `p.workers` processes: yields each result, and errors after `TRIES`.

    Ends only if `quiet_s` is given: when nothing has come and nothing been done for so long.
    """
    # named after the code of now, which is what the workers load, whatever is edited meanwhile
    step_tokens(p)
    pool, todo, running, last = _pool(p), deque(), {}, time.monotonic()

    def submit(event: dict[str, Any], tries: int) -> None:
        nonlocal pool
        try:
            future = pool.submit(_work, event, p, lake.uri)
        except BrokenProcessPool:  # a worker was killed; what waited with it comes back and is sent again
            pool = _pool(p)
            future = pool.submit(_work, event, p, lake.uri)
        running[future] = event, tries

    try:
        for events in changes(p, lake, ready):
            for event in events:  # what is begun comes first
                begun = zone(p, "extracted") in event["Records"][0]["s3"]["object"]["key"]
                (todo.appendleft if begun else todo.append)((event, 1))
            while todo and len(running) < 2 * workers_of(p):
                submit(*todo.popleft())
            for future in [f for f in running if f.done()]:
                event, tries = running.pop(future)
                if not (error := future.exception()):
                    yield from future.result()
                elif tries < TRIES:  # behind the others, so after a while
                    todo.append((event, tries + 1))
                else:
                    key = unquote(event["Records"][0]["s3"]["object"]["key"])
                    yield {"path": key, "status": "error", "why": str(error)}
            last = time.monotonic() if todo or running else last
            if quiet_s is not None and time.monotonic() - last > quiet_s:
                return
    finally:
        pool.shutdown(cancel_futures=True)


def workers_of(p: RefineOnArrival) -> int:
    """How many files are refined at the same time."""
    return p.workers or process.cores()


def _pool(p: RefineOnArrival) -> ProcessPoolExecutor:
    """Worker processes that have loaded what they need. They come from a server that has no threads to fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kit.launch.arrival.watch"])
    # the server has the environment of its start, in which a notebook may not have had its credentials yet
    pool = ProcessPoolExecutor(workers_of(p), context, initializer=_warm, initargs=(p, dict(os.environ)))
    for future in [pool.submit(time.sleep, 0.1) for _ in range(workers_of(p))]:
        future.result()
    return pool


def _warm(p: RefineOnArrival, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with tempfile.TemporaryDirectory() as folder:
        lake, name = Lake(folder), f"raw/{p.run}/warm.html"
        put_file(lake, name, WARM)
        (result,) = handle(event_of(lake, name, 0), p, lake)["results"]
        handle(event_of(lake, result["commit"], 0), p, lake)


def _work(event: dict[str, Any], p: RefineOnArrival, uri: str) -> list[dict[str, Any]]:
    return handle(event, p, Lake(uri))["results"]


def outcomes(p: RefineOnArrival, lake: Lake) -> list[dict[str, Any]]:
    """What became of the latest version of every file that came, in the order of their names."""
    first, both = step_tokens(p)[0], ".".join(step_tokens(p))
    extracted, refined = (
        {c.path.split("/")[-2]: c for c in commits(lake, zone(p, step)) if c.token == token}
        for step, token in (("extracted", first), ("refined", both))
    )
    rows = []
    for key, c in extracted.items():
        one, then = read_manifest(lake, c.path), refined.get(key)
        two = read_manifest(lake, then.path) if then and then.sequencer == c.sequencer else None
        last, facts = two or one, one.metrics
        why = {k: n for m in (one, two) if m for k, n in (m.counts.dropped | m.counts.failed).items()}
        status = "quarantined" if "quarantine" in facts else "image" if facts["kind"] == "image" else ""
        status = status or ("no document" if not one.outputs else "refined" if two else "waiting")
        came, done = (
            datetime.fromisoformat(moment) for moment in (facts["event_time"], last.metrics["committed_at"])
        )
        rows.append(
            {"path": facts["path"], "kind": facts["kind"], "status": status, "records": one.counts.records_in,
             "documents": one.counts.records_out, "kept": two and two.counts.records_out,
             "why": ", ".join(f"{n} {k}" for k, n in why.items()), "seconds": (done - came).total_seconds(),
             "work_s": one.seconds + (two.seconds if two else 0), "extracted": c.path, "refined": two and then.path}
        )  # fmt: skip
    return sorted(rows, key=lambda r: r["path"])


def linked_images(
    p: RefineOnArrival, documents: pa.Table, files: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Every image that came with every document that shows it: alternative text, caption and the text beside it.

    A join of what is committed, so it does not matter which of the two came first. An image is known by its place
    beside the page, by its URL if the drop zone holds `<host>/<path>`, or by its name in the folder of the page.
    """
    came = {row["path"] for row in files if row["kind"] == "image"}
    columns = documents.select(["doc_id", "url", "warc_filename", "images"]).to_pylist() if came else []
    links = []
    for doc in columns:
        folder = posixpath.dirname(doc["warc_filename"])
        for image in doc["images"]:
            try:
                src, url = urlsplit(image["src"]), urlsplit(urljoin(doc["url"], image["src"]))
            except ValueError:
                continue
            near = "" if src.scheme or src.netloc else posixpath.normpath(f"{folder}/{unquote(src.path)}")
            beside = f"{folder}/{posixpath.basename(unquote(url.path))}"
            places = (near, f"raw/{p.run}/{url.hostname}{unquote(url.path)}", beside)
            if place := next((item for item in places if item in came), None):
                words = {k: image[k] for k in ("alt", "caption", "context")}
                links.append({"image": place, "page": doc["url"], "doc_id": doc["doc_id"]} | words)
    return sorted(links, key=lambda item: (item["image"], item["doc_id"]))


def refine_on_arrival(p: RefineOnArrival, lake: Lake, files: Mapping[str, bytes]) -> Manifest:
    """Drop `files` (name → bytes) into the raw zone, watch them being refined, then close the books.

    The manifest lists their refined parts, `files` (what became of each) and `images`; raises `LakeError` where one
    of them is not accounted for.
    """
    started, folder = time.perf_counter(), f"{p.zone}/{p.run}/{p.stage}"
    names = {f"raw/{p.run}/{name}" for name in files}
    left, since = set(names), ""

    def drop() -> None:
        nonlocal since
        # what an earlier landing left here comes first, and is not what is waited for; stores tell whole seconds
        since = f"{int(time.time()) * 10**6:016x}"
        for name, data in files.items():
            put_file(lake, f"raw/{p.run}/{name}", data)

    with progress(len(left), "arrived", "files") as bar, closing(watch(p, lake, drop, quiet_s=10)) as results:
        for result in results:
            new = since and result.get("sequencer", "") >= since
            if result["path"] in left and result["status"] in ENDS and (new or result["status"] == "error"):
                left.remove(result["path"])
                bar.update()
            if not left:
                break
    rows = [row for row in outcomes(p, lake) if row["path"] in names]
    if left or len(rows) < len(names) or any(row["status"] == "waiting" for row in rows):
        raise LakeError(f"{len(left)} of {len(names)} files were not refined: {', '.join(sorted(left)[:3])}")
    steps = [read_manifest(lake, row[step]) for row in rows for step in ("extracted", "refined") if row[step]]
    parts = [m.outputs[0] for m in steps if m.metrics["step"] == "refined"]
    outputs = [o.model_copy(update={"name": f"part-{i:05d}.parquet"}) for i, o in enumerate(parts)]
    tables = [lake.read_part(f"{lake.root}/{o.name}") for o in parts]
    images = linked_images(p, pa.concat_tables(tables), rows) if tables else []
    for name, table_rows in (("files", rows), ("images", images)):
        output = put_table(
            lake, f"{folder}/{name}-{uuid.uuid4().hex[:8]}.parquet", pa.Table.from_pylist(table_rows)
        )
        outputs.append(output.model_copy(update={"name": f"{name}.parquet", "measured": name == "files"}))
    account = Account(
        records_in=sum(row["records"] for row in rows),
        records_out=sum(row["kept"] or row["status"] == "image" for row in rows),
    )
    for m in steps:
        account.dropped.update(m.counts.dropped)
        account.failed.update(m.counts.failed)
    inputs = [Input(uri=uri, content_sha256=fingerprint(uri)) for uri in p.arrivals]
    facts = {"files": len(rows), "statuses": dict(sorted(Counter(row["status"] for row in rows).items()))}
    return commit(lake, p, f"{folder}/{MANIFEST}", started, account.counts(), inputs, outputs, facts)
