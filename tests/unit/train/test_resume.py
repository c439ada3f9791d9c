"""What a start may change: the options, and which settings they let pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.config.describe import Change
from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ConfigError, DataError
from qwen3next_train.train.resume import NEWEST, DataChange, Resume, accepted_changes, parse_resume

SAME = DataChange(same_stream=True, all_known=True, some_known=True, old="d0", new="d0")
RUN = Path("runs/mine")


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


def changes(new: Config, *accept: str, data: DataChange | None = SAME, step: int = 10) -> list[Change]:
    return accepted_changes(Config().model_dump(), new, Resume(accept), data, step=step, place=RUN)


def test_options() -> None:
    assert parse_resume([], None) == NEWEST
    assert parse_resume(["optimizer.lr, run.steps", "optimizer.lr"], "300") == Resume(
        ("optimizer.lr", "run.steps"), 300
    )
    assert parse_resume([], "runs/other").start == Path("runs/other")
    assert parse_resume([], "./300").start == Path("300")
    assert Resume(("b", "a"), Path("x")).settings() == {"--resume.accept": ["a", "b"], "--resume.from": "x"}


@pytest.mark.parametrize(
    ("accept", "start", "line"),
    [
        (
            ["optimizer.learning_rate"],
            None,
            "--resume.accept: unknown key (got 'optimizer.learning_rate'); did you mean optimizer.lr? --help all lists "
            "every key",
        ),
        (
            ["optimizer.lr,"],
            None,
            "--resume.accept: a key is empty (got ''); give keys with commas between, such as optimizer.lr,run.steps",
        ),
        ([], " ", "--resume.from: empty (got ' '); give the step of a checkpoint of run.dir, or a path"),
        ([], "a\0b", "--resume.from: has a NUL byte (got 'a\\x00b'); give another name"),
    ],
)
def test_options_that_make_no_sense_are_one_line(accept: list[str], start: str | None, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_resume(accept, start)
    assert str(caught.value) == line


def test_what_is_not_accepted_names_the_switch_a_line_per_key() -> None:
    new = config(optimizer={"lr": 1e-3}, run={"global_batch_size": 512}, logging={"interval": 7})
    with pytest.raises(ConfigError) as caught:
        changes(new)
    assert str(caught.value).splitlines() == [
        "run.global_batch_size: was 256, now 512: runs/mine belongs to another configuration; go on with the change by "
        "--resume.accept run.global_batch_size, or choose another run.dir",
        "optimizer.lr: was 0.0003, now 0.001: runs/mine belongs to another configuration; go on with the change by "
        "--resume.accept optimizer.lr, or choose another run.dir",
    ]
    with pytest.raises(ConfigError, match=r"^run\.global_batch_size: was 256[^\n]*$"):
        changes(new, "optimizer.lr")
    accepted = changes(new, "optimizer.lr", "run.global_batch_size", "run.steps")
    assert accepted == [Change("run.global_batch_size", 256, 512), Change("optimizer.lr", 3e-4, 1e-3)]
    assert changes(Config(), "optimizer.lr") == []


@pytest.mark.parametrize(
    ("sections", "key", "reason"),
    [
        ({"model": {"hidden_size": 64}}, "model.hidden_size", "the checkpoint's tensors are of that shape"),
        ({"model": {"num_experts": 256}}, "model.num_experts", "the checkpoint's tensors are of that shape"),
        ({"data": {"tokenizer": "other"}}, "data.tokenizer", "the weights know the tokens of that tokenizer only"),
    ],
)
def test_what_cannot_change_is_refused_even_when_it_is_listed(sections: Any, key: str, reason: str) -> None:
    other = DataChange(same_stream=False, all_known=False, some_known=False, old="d0", new="d1")
    with pytest.raises(ConfigError, match=rf"^{key}: was .*, and this cannot change: {reason}; give {key} its old"):
        changes(config(**sections), key, data=other)


def test_the_same_tokens_under_another_name_are_no_change() -> None:
    moved = config(data={"sources": [{"source": "moved"}], "tokenizer": "moved"})
    assert changes(moved) == []
    other = DataChange(same_stream=False, all_known=False, some_known=True, old="d0", new="d1")
    with pytest.raises(ConfigError) as caught:
        changes(moved, data=other)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["data.sources", "data.tokenizer"]
    assert len(changes(moved, "data.sources", "data.tokenizer", data=other)) == 2


def test_text_that_changed_under_the_same_settings_is_damage_until_it_is_accepted() -> None:
    other = DataChange(same_stream=False, all_known=False, some_known=False, old="d0", new="d1")
    with pytest.raises(DataError) as caught:
        changes(Config(), data=other)
    assert str(caught.value) == (
        "run.dir: runs/mine: the training data is not what the run started with; restore it, go on with what it is now "
        "by --resume.accept data.sources, or choose another run.dir"
    )
    assert changes(Config(), "data.sources", data=other) == [Change("data.sources", "d0", "d1")]
    # Another row length explains nothing of other text.
    with pytest.raises(DataError):
        changes(config(data={"sequence_length": 128}), "data.sequence_length", data=other)


def test_without_a_checkpoint_there_is_no_data_to_compare() -> None:
    new = config(checkpoint={"init_from": "imported"})
    with pytest.raises(ConfigError, match=r"^checkpoint\.init_from: was '', now imported"):
        changes(new, data=None, step=0)
    assert changes(new, "checkpoint.init_from", data=None, step=0) == [Change("checkpoint.init_from", "", "imported")]
