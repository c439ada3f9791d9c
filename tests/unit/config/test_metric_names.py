"""Names that metrics bear, and what is said of those that cannot stand in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3next_train.config.load import load_config
from qwen3next_train.config.metric_names import source_names, validation_metrics
from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ConfigError

TINY = Path(__file__).parents[3] / "configs" / "qwen3next_tiny.yaml"


def load(**settings: str) -> Config:
    """The tiny configuration with settings of the command line, ``__`` for dots."""
    return load_config([TINY], [(key.replace("__", "."), value) for key, value in settings.items()]).config


def test_sets_are_given_as_sources_are() -> None:
    config = load(data__validation_sets="{code: a.jsonl, prose: [b.txt, {source: c.txt, text_field: body}]}")
    sets = config.data.validation_sets
    assert {name: [source.source for source in sources] for name, sources in sets.items()} == {
        "code": ["a.jsonl"],
        "prose": ["b.txt", "c.txt"],
    }
    assert sets["prose"][1].text_field == "body"


def test_metrics_of_a_configuration() -> None:
    sets = {"data__validation_sets": "{code: a.jsonl}"}
    assert validation_metrics(load(eval__interval="0", **sets)) == []
    assert validation_metrics(load(eval__interval="5")) == ["eval/loss", "eval/bpb"]
    named = ["eval/code/loss", "eval/code/bpb"]
    assert validation_metrics(load(eval__interval="5", **sets)) == ["eval/loss", "eval/bpb", *named]
    assert validation_metrics(load(eval__interval="5", data__validation_fraction="0", **sets)) == named


def test_a_source_is_called_by_its_alias_or_the_last_part_of_its_path() -> None:
    config = load(
        data__sources="[builtin:python-stdlib, 'corpus/*.parquet', org/fineweb, 'a b/.x y.txt', '*', "
        "{source: a.txt, alias: books}]"
    )
    assert source_names(config) == ["python-stdlib", "corpus", "fineweb", "x-y.txt", "", "books"]


WRONG = [
    (
        {"data__validation_sets": "{a/b: a.jsonl}"},
        "--data.validation_sets: a set's name cannot stand in a metric's (got 'a/b'); give at most 64 letters, digits, "
        "'_', '.' and '-', the first a letter or digit",
    ),
    (
        {"data__validation_sets": "{a: []}"},
        "--data.validation_sets: the set a has no source (got []); name one, or leave the set out",
    ),
    (
        {"data__validation_sets": "a.jsonl"},
        "--data.validation_sets: not a mapping (got 'a.jsonl'); give a mapping of names to a list of sources each",
    ),
    (
        {"data__validation_sets": "{a: ['']}"},
        "--data.validation_sets: a source without a name (got ''); name a file, a data set or builtin:python-stdlib",
    ),
    (
        {"data__validation_sets": "{a: [{source: b, wait: 1}]}"},
        "--data.validation_sets.a[0].wait: unknown key (got 1); did you mean weight? --help all lists every key",
    ),
    (
        {"data__sources": "[{source: a, alias: x y}]"},
        "--data.sources: an alias cannot stand in a metric's name (got 'x y'); give at most 64 letters, digits, "
        "'_', '.' and '-', the first a letter or digit",
    ),
    (
        {"logging__loss_by": "[source]", "data__sources": "a/lm"},
        "--logging.loss_by: logging.loss_by source: 'a/lm' would be loss/lm, which is another metric; give its entry "
        "of data.sources an alias",
    ),
    (
        {"logging__loss_by": "[source]", "data__sources": "[position_16]"},
        "--logging.loss_by: logging.loss_by source: 'position_16' would be loss/position_16, which is another metric; "
        "give its entry of data.sources an alias",
    ),
    (
        {"logging__loss_by": "[source]", "data__sources": "[a/x, b/x]"},
        "--logging.loss_by: logging.loss_by source: 'a/x' would be loss/x, like another source; give its entry of "
        "data.sources an alias\n"
        "--logging.loss_by: logging.loss_by source: 'b/x' would be loss/x, like another source; give its entry of "
        "data.sources an alias",
    ),
    (
        {"logging__loss_by": "[source]", "data__sources": "['*']"},
        "--logging.loss_by: logging.loss_by source: '*' has nothing to call its metrics by; give its entry of "
        "data.sources an alias",
    ),
    (
        {"eval__interval": "5", "checkpoint__best": "loss/lm"},
        "--checkpoint.best: checkpoint.best 'loss/lm' is no metric of this run's validation; choose one of eval/loss, "
        "eval/bpb",
    ),
    (
        {"eval__interval": "0", "checkpoint__best": "eval/loss"},
        "--checkpoint.best: checkpoint.best eval/loss: the run has no validation; set eval.interval",
    ),
    (
        {"eval__interval": "5", "data__validation_fraction": "0", "eval__patience": "2"},
        "--eval.interval: eval.patience_metric eval/loss: the run has no validation; set eval.interval and name what "
        "to validate on (data.validation_sources, data.validation_sets)",
    ),
    (
        {"eval__interval": "4", "checkpoint__best": "eval/loss", "checkpoint__interval": "6"},
        "--checkpoint.best: checkpoint.best eval/loss needs a validation at every saved step; make "
        "checkpoint.interval 6 a multiple of eval.interval 4",
    ),
]


@pytest.mark.parametrize(("settings", "line"), WRONG)
def test_a_wrong_name_is_exactly_this_line(settings: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**settings)
    assert str(caught.value) == line


def test_an_unused_metric_of_patience_is_not_looked_at() -> None:
    assert load(eval__interval="0").eval.patience == 0
