"""Work beside other work."""

from __future__ import annotations

import threading

import pytest

from pleexport.parallel import Work, beside


def test_both_results_arrive_and_progress_is_told() -> None:
    done: list[int] = []
    work = Work(done.append)

    def rows() -> str:
        work.advance(3)
        return "rows"

    with beside(rows, work) as future:
        graph = "graph"
    assert (graph, future.result(), done) == ("graph", "rows", [3])


def test_work_stops_when_the_body_fails() -> None:
    started, work = threading.Event(), Work()

    def rows() -> None:
        started.set()
        while True:  # if nobody stopped it, this test would not end
            work.advance(1)

    def fail() -> None:
        started.wait()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), beside(rows, work):
        fail()


def test_the_body_stops_when_the_work_fails_and_the_error_is_the_one_of_the_work() -> None:
    work = Work()

    def rows() -> None:
        raise ValueError("bad row")

    def go_on() -> None:
        while True:
            work.advance(1)

    with pytest.raises(ValueError, match="bad row"), beside(rows, work):
        go_on()


def test_an_error_of_the_work_is_raised_where_its_result_is_asked_for() -> None:
    def rows() -> None:
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"), beside(rows, Work()) as future:
        future.result()
