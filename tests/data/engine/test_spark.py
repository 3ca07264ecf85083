"""Spark: tasks planned by bytes alone, results in order, errors of one line."""

import pytest

from kit.data.engine.spark import java_home, java_version, plan_parts, run_tasks, session
from kit.errors import KitError, SparkError
from kit.params import Cores

P = Cores(cores=2)


@pytest.mark.parametrize(
    "sizes, part, ranges",
    [
        ([], 10, []),
        ([3], 10, [(0, 1)]),
        ([5, 5, 5], 10, [(0, 2), (2, 3)]),
        ([50, 1, 1], 10, [(0, 1), (1, 3)]),
        ([1, 50, 1], 10, [(0, 1), (1, 2), (2, 3)]),
        ([0, 0, 0], 10, [(0, 3)]),
    ],
)
def test_plan(sizes: list[int], part: float, ranges: list[tuple[int, int]]) -> None:
    assert [(r.start, r.stop) for r in plan_parts(sizes, part)] == ranges


def test_java_is_found_and_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert java_version(java_home()) >= 17
    assert java_version("/nowhere") == 0
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    assert java_version(java_home()) >= 17


def test_results_come_in_the_order_of_the_tasks() -> None:
    tasks = [(1, i) for i in range(9)]
    assert [r["x"] for r in run_tasks(P, lambda i: {"done": 1, "x": i * i}, tasks, "t", "u")] == [
        i * i for i in range(9)
    ]
    assert run_tasks(P, lambda i: {"done": 1}, [], "t", "u") == []


def test_an_error_of_a_task_is_one_line(capfd: pytest.CaptureFixture) -> None:
    def user_mistake(task: int) -> dict:
        raise KitError("the file is not there")

    def crash(task: int) -> dict:
        raise ZeroDivisionError("by nought")

    with pytest.raises(KitError, match="^the file is not there$"):
        run_tasks(P, user_mistake, [(1, 1)], "t", "u")
    with pytest.raises(SparkError, match="ZeroDivisionError: by nought") as error:
        run_tasks(P, crash, [(1, 1)], "t", "u")
    assert "\n" not in str(error.value)


def test_one_session_serves_all_and_follows_the_cores() -> None:
    first = session(P)
    assert session(Cores(cores=2)) is first
    assert first.sparkContext.master == "local[2]"
