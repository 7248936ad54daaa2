"""Work beside other work."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pleexport.parallel import beside


def test_both_results_arrive() -> None:
    with beside(lambda check: "rows") as rows:
        graph = "graph"
    assert (graph, rows.result()) == ("graph", "rows")


def test_work_stops_when_the_body_fails() -> None:
    started = threading.Event()

    def work(check: Callable[[], None]) -> None:
        started.set()
        while True:  # without `check` this test would not end
            check()

    def fail() -> None:
        started.wait()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), beside(work):
        fail()


def test_an_error_of_the_work_is_raised_where_its_result_is_asked_for() -> None:
    def work(check: Callable[[], None]) -> None:
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"), beside(work) as rows:
        rows.result()
