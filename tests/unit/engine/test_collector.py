"""Python's collector of cycles, held back."""

from __future__ import annotations

import gc

import pytest

from qwen3next_train.engine.collector import no_garbage_collection


def test_nothing_is_collected_inside_and_all_of_it_behind() -> None:
    collections: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collections.append(info["generation"])

    gc.callbacks.append(note)
    try:
        with no_garbage_collection():
            inside = [[index] for index in range(20 * gc.get_threshold()[0])]
            assert collections == []
        behind = [[index] for index in range(2)]
        assert len(collections) > 0
        assert len(inside) > len(behind)
    finally:
        gc.callbacks.remove(note)


def test_an_error_inside_lets_it_go_on() -> None:
    with pytest.raises(ValueError, match="inside"), no_garbage_collection():
        raise ValueError("inside")
    assert gc.isenabled()


def test_where_it_is_off_it_stays_off() -> None:
    gc.disable()
    try:
        with no_garbage_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
