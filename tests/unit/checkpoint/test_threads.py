from __future__ import annotations

import threading

import pytest

from qwen3next_train.checkpoint.threads import by_threads, num_threads


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, 1), ((512 << 20) - 1, 1), (512 << 20, 2), ((1 << 30) - 1, 3), (1 << 30, 4), (1 << 40, 4)],
)
def test_a_thread_for_every_256_mebibytes_up_to_four(num_bytes: int, expected: int) -> None:
    assert num_threads(num_bytes) == expected


def test_results_come_in_order_from_threads_that_run_side_by_side() -> None:
    together = threading.Barrier(4)

    def wait(item: int) -> tuple[int, int]:
        together.wait(timeout=20)
        return item * item, threading.get_ident()

    results = list(by_threads(wait, range(4), 4))
    assert [square for square, _ in results] == [0, 1, 4, 9]
    assert len({thread for _, thread in results}) == 4


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_comes_where_its_item_stands(threads: int) -> None:
    results = by_threads(_fail_from_one_on, range(100), threads)
    assert next(results) == 0
    with pytest.raises(ValueError, match=r"^1$"):
        next(results)
    assert list(results) == []


def _fail_from_one_on(item: int) -> int:
    if item:
        raise ValueError(str(item))
    return item


def test_one_thread_begins_nothing_that_is_not_asked_for() -> None:
    begun: list[int] = []
    results = by_threads(begun.append, range(100), 1)
    next(results)
    assert begun == [0]


@pytest.mark.parametrize("given", [0, 1, 2])
def test_what_the_system_gives_no_thread_for_is_done_by_others(monkeypatch: pytest.MonkeyPatch, given: int) -> None:
    start = threading.Thread.start
    asked: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        asked.append(thread.name)
        if len(asked) > given:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    begun: list[int] = []

    def square(item: int) -> int:
        begun.append(item)
        return item * item

    assert list(by_threads(square, range(9), 4)) == [item * item for item in range(9)]
    # Each once: a file cannot be created twice.
    assert sorted(begun) == list(range(9))
    assert len(asked) == given + 1


def test_threads_have_ended_when_nobody_listens_any_more() -> None:
    before = threading.active_count()
    begun: list[int] = []
    results = by_threads(begun.append, range(1000), 2)
    next(results)
    del results
    assert threading.active_count() == before


@pytest.mark.parametrize("is_heard", [True, False])
def test_work_that_goes_on_is_told_when_nobody_wants_it(is_heard: bool) -> None:
    enough = threading.Event()
    told: list[bool] = []
    running = threading.Event()

    def run(item: int) -> None:
        if item == 0:
            assert running.wait(20)
            assert is_heard
        else:
            running.set()
            told.append(enough.wait(20))

    results = by_threads(run, range(2), 2, enough=enough)
    if is_heard:
        next(results)
        del results
    else:
        with pytest.raises(AssertionError):
            next(results)
    assert told == [True]
