"""From a training row or document back to its bytes, with every decision taken on the way."""

from __future__ import annotations

import hashlib
import html
import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from kit import resolve_path
from kit.data.extract.source import open_archive
from kit.data.read import archive, rows
from kit.data.read.charset import decode
from kit.data.refine import pii
from kit.data.refine.refine import REFINED
from kit.errors import LakeError, RecordError
from kit.lake.manifest import Manifest
from kit.lake.store import Lake
from kit.show import printable

PLACEHOLDER = re.compile("|".join(f"<{kind.upper()}>" for kind in pii.TYPES))
WORD = re.compile(r"\w+")


def trace(lake: Lake, wanted: str, runs: list[str]) -> str:
    """The way back as lines of text; raises `LakeError` when no run knows the id `wanted`."""
    for run in runs:
        copy = _find(lake, run, "51_augment_text", ("train",), row_id=wanted)
        if copy and copy["source_row"]:
            changes = printable("; ".join(copy["changes"]))
            origin = f"row       {wanted} of run '{run}': {copy['operation']} of the row below\n          {changes}"
            return f"{origin}\n{trace(lake, copy['source_row'], [run])}"
        row = _find(lake, run, "50_build_datasets", ("train", "heldout"), row_id=wanted)
        pair = _find(lake, run, "50_build_datasets", ("preferences",), pair_id=wanted)
        from_file = row or pair
        if from_file and from_file.get("source"):
            return _file_line(lake, run, wanted, from_file)
        if pair:
            sides = [trace(lake, pair[side], [run]) for side in ("chosen_row", "rejected_row")]
            return f"pair {wanted} of run '{run}', about {pair['item']}\n\nchosen\n{sides[0]}\n\nrejected\n{sides[1]}"
        doc = _find(lake, run, "20_extract_text", doc_id=row["doc_id"] if row else wanted)
        if doc:
            return "\n".join(_lines(lake, run, row, doc))
        if came := _arrived(lake, run, wanted):
            return "\n".join(_lines(lake, run, None, *came))
    raise LakeError(f"no row, pair or document '{wanted}' in {lake.uri} ({', '.join(runs) or 'no run'})")


def _file_line(lake: Lake, run: str, wanted: str, row: dict[str, Any]) -> str:
    """A row or pair that came from a line of a file of instructions or preferences."""
    file, _, line = row["source"].rpartition(":")
    inputs = {i.uri: i.content_sha256 for i in lake.need(run, "50_build_datasets").inputs}
    text = _short(row["prompt"] + (row.get("completion") or row.get("chosen")))
    return (
        f"{'row' if 'row_id' in row else 'pair'}       {wanted} of run '{run}'\n          {text}\n"
        f"file      {printable(file)}, line {line}, content sha256 {inputs[file]}"
    )


def _find(
    lake: Lake, run: str, stage: str, names: tuple[str, ...] = ("part",), **wanted: Any
) -> dict[str, Any] | None:
    """The first row of a stage's result with the `wanted` values, None if the stage or the row is missing."""
    manifest = lake.manifest(run, stage)
    for name in names if manifest else ():
        if any(o.name.startswith(name) and o.name.endswith(".parquet") for o in manifest.outputs):
            table = lake.table(manifest, name)
            for column, value in wanted.items():
                table = table.filter(pc.equal(table[column], pa.scalar(value)))
            if table.num_rows:
                return table.slice(0, 1).to_pylist()[0]
    return None


def _arrived(lake: Lake, run: str, wanted: str) -> tuple[dict[str, Any], list[str]] | None:
    """A document that came by 31_refine_on_arrival, the latest version, and its way with the file read again."""
    files = lake.fs.find(f"{lake.folder(run, '31_refine_on_arrival')}/refined")
    if not (parts := [f for f in files if f.endswith(".parquet")]):
        return None
    documents = ds.dataset(parts, filesystem=lake.fs).filter(ds.field("doc_id") == wanted)
    rows = {r["__filename"]: r for r in documents.to_table([*REFINED.names, "__filename"]).to_pylist()}
    keys = {re.sub(r"/[^/]*$", "", part) for part in rows}
    manifests = [
        Manifest.model_validate_json(lake.fs.cat_file(f))
        for f in files
        if f.endswith(".json") and f.rpartition("/")[0] in keys
    ]
    if not manifests:
        return None
    last = max(manifests, key=lambda m: (m.metrics["sequencer"], m.metrics["committed_at"]))
    raw = lake.fs.cat_file(f"{lake.root}/{last.metrics['path']}")
    same = hashlib.sha256(raw).hexdigest() == last.metrics["sha256"]
    way = "\n          → ".join([last.metrics["path"], last.inputs[0].uri, last.outputs[0].name])
    proof = f"{len(raw):,} bytes, {'the file is the same' if same else 'THE FILE CHANGED'}"
    doc = rows.get(f"{lake.root}/{last.outputs[0].name}")
    return (doc, [f"steps     {way}", f"          read again: {proof}"]) if doc else None


def _lines(
    lake: Lake, run: str, row: dict[str, Any] | None, doc: dict[str, Any], came: list[str] | None = None
) -> list[str]:
    refined = doc if came else _find(lake, run, "30_refine_text", doc_id=doc["doc_id"])
    cluster = _find(lake, run, "40_deduplicate", doc_id=doc["doc_id"])
    place = {k: doc[k] for k in ("warc_filename", "warc_record_offset", "url")}
    selected = _find(lake, run, "10_explore_index", **place)
    lines = []
    if row:
        about = f" about '{row['item']}'" if row["item"] else ""
        about += f", rated {row['rating']:g}" if row["rating"] is not None else ""
        lines.append(f"row       {row['row_id']} of run '{run}': {row['kind']}{about}")
        lines.append(f"          {_short(row['prompt'] + row['completion'])}")
    lines.append(
        f"document  {doc['doc_id']} by {doc['extractor']}, charset {doc['charset']}: {_short(doc['title'])}"
    )
    if refined:
        words = refined["tags"]["words"]  # not counted where no rule asks for it
        size = "" if words is None else f"{words:.0f} words, "
        masked = ", ".join(f"{v} {k}" for k, v in refined["pii"].items() if v) or "nothing"
        lines.append(
            f"refined   language {refined['lang']} ({refined['lang_score']:.2f}), {size}"
            f"masked {masked}, {'dropped: ' + refined['drop_reason'] if refined['drop_reason'] else 'kept'}"
        )
    if cluster:
        lines.append(f"dedup     {_fate(lake.need(run, '40_deduplicate'), cluster, lake)}")
    lines.append(f"page      {printable(doc['url'])}, fetched {doc['fetch_time']}, status {doc['status']}")
    lines.append(
        f"bytes     {doc['warc_filename']}, offset {doc['warc_record_offset']}, length {doc['warc_record_length']}"
    )
    if came:
        return [*lines, *came]
    text = row["completion"] if row else (refined or doc)["text"]
    manifest = lake.need(run, "10_explore_index")
    return [
        *lines,
        f"          {_proof(resolve_path(manifest.metrics['archive_base']), selected or doc, doc, text)}",
    ]


def _fate(manifest: Manifest, cluster: dict[str, Any], lake: Lake) -> str:
    """What deduplication decided about a document, and by what."""
    if not cluster["keep"]:
        near = f"{cluster['reason']} of {cluster['survivor']} (Jaccard {cluster['jaccard']:.2f})"
        return f"cluster {cluster['cluster_id']}: goes, {near}"
    stays = lake.table(manifest, "part", ["survivor"])["survivor"]
    copies = pc.sum(pc.equal(stays, cluster["doc_id"])).as_py() - 1
    rule = manifest.metrics["survivor_rule"]
    return (
        f"cluster {cluster['cluster_id']}: stays by the rule '{rule}', {copies} go" if copies else "no copies"
    )


def _proof(base: str, selected: dict[str, Any], doc: dict[str, Any], text: str) -> str:
    """Read the bytes again and say how much of `text` they hold, in order: words between masks and mark-up."""
    try:
        wrapping = selected.get("wrapping", "member")
        with open_archive(f"{base}/{doc['warc_filename']}", wrapping) as f:
            raw = archive.read_bytes(
                f, doc["warc_record_offset"], doc["warc_record_length"], wrapping, 1 << 30
            )
        is_row = wrapping in rows.WRAPPINGS
        page = rows.row_page(raw, doc["url"]) if is_row else archive.parse_page(raw, 1 << 30)
    except RecordError as error:
        return f"the bytes there cannot be read now: {error}"
    source = decode(page.payload, page.charset)[0]
    there = " ".join(WORD.findall(_unescaped(source)))
    pieces = [" ".join(WORD.findall(s)) for s in re.split(r"[.!?\n]", PLACEHOLDER.sub("\n", text))]
    pieces = [s for s in pieces if s]
    held = sum(s in there for s in pieces)
    same = "digest the same" if page.digests[0] == doc["payload_digest"] else "DIGEST CHANGED"
    return (
        f"read again: {len(raw):,} bytes, {same}, {held} of {len(pieces)} sentences of the text found in them"
    )


def _unescaped(source: str) -> str:
    """HTML with mark-up, entities and JSON escapes undone, so that text can be looked for in it."""
    plain = html.unescape(re.sub(r"<[^<>]{0,2000}>", " ", source))
    return (
        plain
        + " "
        + re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), html.unescape(source))
        .replace("\\n", " ")
        .replace("\\/", "/")
    )


def _short(text: str | None, width: int = 150) -> str:
    plain = printable(" ".join((text or "").split()))
    return plain if len(plain) <= width else plain[: width - 1] + "…"
