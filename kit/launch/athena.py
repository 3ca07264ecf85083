"""The index questions asked of Athena: the same SQL as DuckDB's, plus what makes the table known there.

Athena reads S3 only: an `index_path` elsewhere becomes Common Crawl's own bucket.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from kit.data.select.questions import (
    archives_query,
    count_query,
    find_query,
    reasons_query,
    select_query,
    text,
)
from kit.data.select.table import athena_usd
from kit.errors import AthenaError, ParamError
from kit.lake.manifest import Counts, Manifest
from kit.lake.store import Lake
from kit.params import ExploreIndex, QueryWithAthena

COMMON_CRAWL = "s3://commoncrawl/cc-index/table/cc-main/warc"
REGION = "us-east-1"
"""Where Common Crawl's bucket is: from there, reading it costs no transfer."""
SUBSETS = ("warc", "crawldiagnostics", "robotstxt")
COLUMNS = {
    name: kind
    for kind, names in {
        "string": "url_surtkey url url_host_name url_host_tld url_host_2nd_last_part url_host_3rd_last_part "
        "url_host_4th_last_part url_host_5th_last_part url_host_registry_suffix url_host_registered_domain "
        "url_host_private_suffix url_host_private_domain url_host_name_reversed url_protocol url_path url_query "
        "fetch_redirect content_digest content_mime_type content_mime_detected content_charset content_languages "
        "content_truncated warc_filename warc_segment",
        "int": "url_port warc_record_offset warc_record_length",
        "smallint": "fetch_status",
        "timestamp": "fetch_time",
    }.items()
    for name in names.split()
}
"""The cc-index schema with Athena's types; Parquet columns are found by name, so their order does not matter."""
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
TIMEOUT_S, PAUSE_S = 1800, 2


@dataclass(frozen=True)
class Statement:
    """One statement and its name; `free`: DDL, for which Athena charges nothing."""

    name: str
    sql: str
    free: bool = False


def statements(p: QueryWithAthena, selection: ExploreIndex) -> list[Statement]:
    """All of them in the order in which they are run; `selection` is what stage 10 was asked for."""
    location = (p.index_path if p.index_path.startswith("s3://") else COMMON_CRAWL).rstrip("/")
    columns = ",\n".join(f"  {name} {kind}" for name, kind in COLUMNS.items())
    table = f"""CREATE EXTERNAL TABLE IF NOT EXISTS ccindex (
{columns})
PARTITIONED BY (crawl string, subset string)
STORED AS PARQUET
LOCATION {text(location + "/")}"""
    partitions = "\n".join(
        f"  PARTITION (crawl = {text(p.crawl)}, subset = '{s}') LOCATION {text(f'{location}/crawl={p.crawl}/subset={s}/')}"
        for s in SUBSETS
    )
    return [
        Statement("create_database", f"CREATE DATABASE IF NOT EXISTS {p.athena_database}", free=True),
        Statement("create_table", table, free=True),
        Statement("add_partitions", f"ALTER TABLE ccindex ADD IF NOT EXISTS\n{partitions}", free=True),
        Statement("repair_table", "MSCK REPAIR TABLE ccindex", free=True),
        Statement("count_by_language", count_query(p.crawl, "content_languages")),
        Statement("find_site", find_query(p.crawl, p.site)),
        Statement("archives_of_site", archives_query(p.crawl, p.site)),
        Statement("reasons", reasons_query(selection)),
        Statement("select", select_query(selection)),
    ]


def requests(p: QueryWithAthena, selection: ExploreIndex) -> dict[str, dict[str, Any]]:
    """Every statement as a `StartQueryExecution` request; raises `AthenaError` where Athena's model refuses one."""
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    shape = get_session().get_service_model("athena").operation_model("StartQueryExecution").input_shape
    queries = {}
    for s in statements(p, selection):
        database = {} if s.name == "create_database" else {"Database": p.athena_database}
        queries[s.name] = {
            "QueryString": s.sql,
            "QueryExecutionContext": {"Catalog": "AwsDataCatalog"} | database,
            "ResultConfiguration": {"OutputLocation": p.athena_output},
        }
        report = ParamValidator().validate(queries[s.name], shape)
        if report.has_errors():
            raise AthenaError(f"{s.name}: {report.generate_report()}")
    return queries


def query_with_athena(p: QueryWithAthena, lake: Lake) -> Manifest:
    """The dry run: `statements.sql` and `requests.json`, exactly what `submit` would send; nothing is sent."""
    with lake.stage(p) as out:
        selection = selection_of(p, out.read("10_explore_index"))
        queries = requests(p, selection)
        script = "".join(f"-- {s.name}\n{s.sql};\n\n" for s in statements(p, selection))
        out.bytes("statements.sql", script.encode(), rows=len(queries))
        out.bytes("requests.json", json.dumps(queries, indent=1).encode(), rows=len(queries))
        return out.commit(Counts(records_in=len(queries), records_out=len(queries)))


def selection_of(p: QueryWithAthena, explored: Manifest) -> ExploreIndex:
    """What stage 10 selected, asked of this stage's table and crawl; of archives without an index there is nothing to ask."""
    asked = ExploreIndex(**explored.params)
    if asked.archive_paths:
        raise ParamError("stage 10 indexed your own archives: Athena can only be asked of a cc-index table")
    return asked.model_copy(update={"crawl": p.crawl, "index_path": p.index_path})


def submit(p: QueryWithAthena, selection: ExploreIndex, names: list[str]) -> list[dict[str, Any]]:
    """Run the statements `names` one after the other; a row each with id, bytes scanned, seconds and dollars.

    Raises `AthenaError` for a query that fails or takes longer than `TIMEOUT_S`, which is then stopped.
    """
    import boto3

    client = boto3.client("athena", region_name=REGION)
    queries, rows = requests(p, selection), []
    free = {s.name for s in statements(p, selection) if s.free}
    for name in names:
        key = client.start_query_execution(**queries[name])["QueryExecutionId"]
        statistics = _follow(client, key, name).get("Statistics", {})
        scanned = statistics.get("DataScannedInBytes", 0)
        usd = 0.0 if name in free else athena_usd(scanned, p.athena_usd_per_tb)
        seconds = statistics.get("TotalExecutionTimeInMillis", 0) / 1000
        rows.append({"statement": name, "id": key, "scanned_bytes": scanned, "s": seconds, "usd": usd})
        print(f"{name}: {scanned:,} bytes scanned, ${usd:.6f}, {p.athena_output.rstrip('/')}/{key}.csv")
    return rows


def _follow(client: Any, key: str, name: str) -> dict[str, Any]:
    """A query's last word; one that is left behind is stopped, for it would go on costing."""
    state, until = "", time.monotonic() + TIMEOUT_S
    try:
        while state not in ENDED:
            if time.monotonic() > until:
                raise AthenaError(f"{name} was stopped: it took longer than {TIMEOUT_S} s")
            time.sleep(PAUSE_S)
            execution = client.get_query_execution(QueryExecutionId=key)["QueryExecution"]
            state = execution["Status"]["State"]
    finally:
        if state not in ENDED:
            client.stop_query_execution(QueryExecutionId=key)
    if state != "SUCCEEDED":
        reason = execution["Status"].get("StateChangeReason", "no reason given")
        raise AthenaError(f"{name} {state.lower()}: {reason}")
    return execution
