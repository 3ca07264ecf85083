"""Athena: valid requests, the schema of the true table, and SQL that means the same there and in DuckDB."""

import json
from pathlib import Path

import moto
import pyarrow.parquet as pq
import pytest
import sqlglot
from conftest import CRAWL, SAMPLE

from kit.data.select.index import Index, explore_index
from kit.errors import AthenaError, ParamError
from kit.lake.store import Lake
from kit.launch import athena
from kit.params import ExploreIndex, QueryWithAthena

FUNCTIONS = {"Coalesce", "Cast", "Count", "Sum", "Round", "Case", "If", "StartsWith", "SplitPart", "Split", "ArrayContains", "TimestampTrunc", "DateTrunc", "And", "Or"}  # fmt: skip
"""As sqlglot names them; each is an operator or in https://trino.io/docs/current/functions.html, which Athena follows."""
SELECTIONS = [
    {},
    {"languages": ["deu", "pol"], "keep_truncated": False, "min_record_kb": 1.5},
    {"domains": ["reelnotes.example", "o'hara.example"], "statuses": [], "mimes": [], "max_pages": 7},
]


@pytest.fixture
def asked() -> QueryWithAthena:
    return QueryWithAthena(site="https://www.reelnotes.example/film/")


@pytest.mark.parametrize("values", SELECTIONS, ids=["default", "filters", "domains"])
def test_as_athena_reads_them_the_questions_give_the_same_rows(asked: QueryWithAthena, values: dict) -> None:
    selection = ExploreIndex(**values)
    index = Index(selection)
    questions = [s for s in athena.statements(asked, selection) if not s.free]
    assert len(questions) == 5
    for s in questions:
        tree = sqlglot.parse_one(s.sql, read="athena")
        used = {type(f).__name__ for f in tree.find_all(sqlglot.exp.Func)}
        assert used <= FUNCTIONS, f"{s.name}: {used - FUNCTIONS} may be unknown to Athena"
        ours, theirs = index.table(s.sql), index.table(tree.sql(dialect="duckdb"))
        assert ours.column_names == theirs.column_names == tree.named_selects
        assert ours.to_pylist() == theirs.to_pylist() and ours.num_rows > 0, s.name


def test_the_selection_of_athena_is_the_one_that_stage_10_saved(
    data_lake: Lake, asked: QueryWithAthena
) -> None:
    explored = data_lake.need("sample", "10_explore_index")
    told = athena.statements(asked, athena.selection_of(asked, explored))
    sql = next(s.sql for s in told if s.name == "select")
    answer = Index(ExploreIndex()).sql(sql)
    # the identity of a row is made of the others, by stage 10 itself
    assert answer == data_lake.table(explored, columns=list(answer[0])).to_pylist()


def test_the_table_has_the_columns_and_types_of_the_true_one() -> None:
    path = next(SAMPLE.glob(f"cc-index/table/cc-main/warc/crawl={CRAWL}/subset=warc/*.parquet"))
    kinds = {"string": "string", "int32": "int", "int16": "smallint", "timestamp[ms]": "timestamp"}
    assert {f.name: kinds[str(f.type)] for f in pq.read_schema(path)} == athena.COLUMNS


def test_ddl_is_written_for_the_place_where_the_table_lies() -> None:
    def ddl(**values) -> dict[str, str]:
        return {s.name: s.sql for s in athena.statements(QueryWithAthena(**values), ExploreIndex()) if s.free}

    assert "LOCATION 's3://commoncrawl/cc-index/table/cc-main/warc/'" in ddl()["create_table"]
    own = ddl(index_path="s3://mine/table", crawl="CC-MAIN-2026-05")["add_partitions"]
    assert own.count("PARTITION (crawl = 'CC-MAIN-2026-05', subset = ") == 3
    assert "LOCATION 's3://mine/table/crawl=CC-MAIN-2026-05/subset=robotstxt/'" in own
    assert ddl()["repair_table"] == "MSCK REPAIR TABLE ccindex"


def test_a_request_that_athena_would_refuse_is_refused_here(monkeypatch, asked: QueryWithAthena) -> None:
    assert athena.requests(asked, ExploreIndex())["select"]["QueryExecutionContext"]["Database"] == "ccindex"
    monkeypatch.setattr(athena, "statements", lambda *_: [athena.Statement("empty", "")])
    with pytest.raises(AthenaError, match="empty.*QueryString"):
        athena.requests(asked, ExploreIndex())


def test_the_dry_run_commits_what_would_be_sent(tmp_path: Path, asked: QueryWithAthena) -> None:
    lake = Lake(str(tmp_path))
    explore_index(ExploreIndex(lake=lake.uri, languages=["deu"]), lake)
    manifest = athena.query_with_athena(asked, lake)
    paths = {o.name: lake.fs.cat_file(p) for o, p in zip(manifest.outputs, lake.paths(manifest), strict=True)}
    sent = json.loads(paths["requests.json"])
    assert sent == athena.requests(asked, ExploreIndex(languages=["deu"]))
    assert all(r["QueryString"] in paths["statements.sql"].decode() for r in sent.values())
    explored = lake.need("sample", "10_explore_index")
    explored.params["archive_paths"] = ["x.warc"]
    with pytest.raises(ParamError, match="cc-index table"):
        athena.selection_of(asked, explored)


def test_queries_are_followed_to_their_end_and_told_with_their_price(
    monkeypatch, asked: QueryWithAthena, capsys
) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with moto.mock_aws():
        rows = athena.submit(asked, ExploreIndex(), ["create_database", "count_by_language"])
    assert [r["statement"] for r in rows] == ["create_database", "count_by_language"]
    assert rows[0]["usd"] == 0 and rows[1]["usd"] == pytest.approx(10 / 1e6 * 5)  # ten MB at least
    assert rows[1]["id"] in capsys.readouterr().out


class Fake:
    """A client whose query goes through `states`."""

    def __init__(self, *states: str) -> None:
        self.states, self.stopped = list(states), []

    def get_query_execution(self, QueryExecutionId: str) -> dict:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return {"QueryExecution": {"Status": {"State": state, "StateChangeReason": "table not found"}}}

    def stop_query_execution(self, QueryExecutionId: str) -> None:
        self.stopped.append(QueryExecutionId)


def test_a_query_that_fails_is_an_error_and_one_left_behind_is_stopped(monkeypatch) -> None:
    monkeypatch.setattr(athena, "PAUSE_S", 0.01)
    done = Fake("QUEUED", "RUNNING", "SUCCEEDED")
    assert athena._follow(done, "id", "select")["Status"]["State"] == "SUCCEEDED"
    failed, slow = Fake("RUNNING", "FAILED"), Fake("RUNNING")
    with pytest.raises(AthenaError, match="select failed: table not found"):
        athena._follow(failed, "id", "select")
    monkeypatch.setattr(athena, "TIMEOUT_S", 0.05)
    with pytest.raises(AthenaError, match="longer than"):
        athena._follow(slow, "id", "select")
    assert (done.stopped, failed.stopped, slow.stopped) == ([], [], ["id"])
