from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3next_train.data.prepare import prepare_stores
from qwen3next_train.data.summary import (
    data_as_json,
    data_lines,
    format_epochs,
    log_data,
    planned_sets,
    planned_uses,
    set_lines,
    use_lines,
    uses_as_json,
    uses_of,
    warn_of_epochs,
)
from tests.unit.data.corpus import make_config, write_store


def test_epochs_follow_from_weights_and_tokens(tmp_path: Path) -> None:
    config = make_config(tmp_path, [{"source": "a", "weight": 3.0}, {"source": "b"}, {"source": "c"}])
    run = config.run.model_copy(update={"steps": 100, "global_batch_size": 10})
    uses = uses_of(config.model_copy(update={"run": run}), [9600, 100, None])
    assert [(use.label, use.share, use.epochs) for use in uses] == [("a", 0.6, 1.0), ("b", 0.2, 32.0), ("c", 0.2, None)]
    assert warn_of_epochs(uses) == ["b: 32 epochs, more than 4; add data, lower run.steps or the source's weight"]


@pytest.mark.parametrize(
    ("epochs", "text"), [(None, "unknown"), (0.0271, "0.027"), (1.34, "1.3"), (4.0, "4.0"), (1206.4, "1,206")]
)
def test_format_epochs(epochs: float | None, text: str) -> None:
    assert format_epochs(epochs) == text


def test_sources_of_a_run(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [[1] * 40] * 100)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"x {n}"}) + "\n" for n in range(9)) + '{"text": null}\n' * 2
    )
    (tmp_path / "text" / "b.pdf").write_bytes(b"12345")
    config = make_config(tmp_path / "cache", [{"source": str(tmp_path / "store")}], validation_fraction=0.1)
    run = config.run.model_copy(update={"steps": 9, "global_batch_size": 50})
    config = config.model_copy(update={"run": run})
    assert data_lines(prepare_stores(config), config) == [
        f"{tmp_path / 'store'}: 90 documents, 3,600 tokens, weight 1 (100.0%), 2.0 epochs",
        f"{tmp_path / 'store'}: 10 documents, 400 tokens held out",
    ]
    config = make_config(tmp_path / "cache", [{"source": str(tmp_path / "text")}], validation_fraction=0.0)
    (described,) = data_as_json(prepare_stores(config), config)
    assert json.loads(json.dumps(described)) == described
    assert described["source"] == str(tmp_path / "text")
    assert (described["documents"], described["left_out"]) == (9, {"null": {"count": 2, "example": "a.jsonl:10"}})
    assert described["passed_over"] == {".pdf": {"files": 1, "bytes": 5, "example": "b.pdf"}}


def test_a_plan_estimates_tokens_and_leaves_unknown_what_is_elsewhere(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [[1] * 40] * 100)
    (tmp_path / "a.txt").write_bytes(b"x" * 4000)
    (tmp_path / "b.txt.gz").write_bytes(b"x" * 4000)
    names = [
        str(tmp_path / "store"),
        str(tmp_path / "a.txt"),
        str(tmp_path / "b.txt.gz"),
        "owner/name",
        "/nowhere/*.txt",
    ]
    config = make_config(tmp_path, [{"source": name} for name in names])
    uses = planned_uses(config)
    assert [use.num_tokens for use in uses] == [4000, 1000, 3000, None, None]
    assert [use.epochs is None for use in uses] == [False, False, False, True, True]
    assert uses_as_json(uses)[3] == {"source": "owner/name", "share": 0.2, "tokens": None, "epochs": None}
    assert use_lines(uses)[3] == "owner/name: tokens unknown, 20.0% of the samples, unknown epochs"
    assert not (tmp_path / "cache").exists()


def test_validation_sets_are_said_with_their_tokens(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [[1] * 40] * 100)
    (tmp_path / "a.txt").write_bytes(b"x" * 4000)
    store, text = {"source": str(tmp_path / "store")}, {"source": str(tmp_path / "a.txt")}
    sets = {"both": [store, text], "far": [store, {"source": "owner/name"}]}
    planned = planned_sets(make_config(tmp_path / "cache", [store], validation_sets=sets))
    assert planned == {"both": 5000, "far": None}
    assert set_lines(planned) == ["validation set both: about 5,000 tokens", "validation set far: tokens unknown"]
    config = make_config(tmp_path / "cache", [store], validation_sets={"two": [store, store]}, validation_fraction=0.0)
    assert data_lines(prepare_stores(config), config)[1:] == ["validation set two: 200 documents, 8,000 tokens"]


def test_a_run_says_what_it_reads_and_warns_of_repetition(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_store(tmp_path / "store", [[1] * 40] * 100)
    config = make_config(tmp_path / "cache", [{"source": str(tmp_path / "store")}], validation_fraction=0.0)
    run = config.run.model_copy(update={"steps": 10 * 4000 // config.data.sequence_length, "global_batch_size": 1})
    config = config.model_copy(update={"run": run})
    with caplog.at_level("INFO", logger="qwen3next_train"):
        log_data(prepare_stores(config), config)
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("INFO", f"data: {tmp_path / 'store'}: 100 documents, 4,000 tokens, weight 1 (100.0%), 10 epochs") in said
    assert [message for level, message in said if level == "WARNING"] == [
        f"data: {tmp_path / 'store'}: 10 epochs, more than 4; add data, lower run.steps or the source's weight"
    ]
