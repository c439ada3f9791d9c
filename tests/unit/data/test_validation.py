from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen3next_train.batch import IGNORE_INDEX, PackedBatch
from qwen3next_train.config.schema import Config, EvalConfig
from qwen3next_train.data.prepare import prepare_evaluation, prepare_stores
from qwen3next_train.data.prepared import PreparedData
from qwen3next_train.data.validation import ValidationData, open_validation
from qwen3next_train.errors import DataError
from qwen3next_train.row_slices import RowSlice
from qwen3next_train.topology import Topology
from tests.unit.data.corpus import counting_store, make_config


def prepared_of(tmp_path: Path, lengths: dict[str, list[int]]) -> tuple[PreparedData, Config]:
    for name, sizes in lengths.items():
        counting_store(tmp_path / name, sizes)
    sources = [{"source": str(tmp_path / name)} for name in lengths]
    config = make_config(tmp_path / "cache", sources[:1], validation_sources=sources)
    return prepare_stores(config), config


def first_tokens(data: ValidationData) -> list[int]:
    return [int(data.row(index).tokens[0]) for index in range(data.num_rows)]


def test_rows_are_distinct_fixed_and_spread(tmp_path: Path) -> None:
    prepared, config = prepared_of(tmp_path, {"a": [10, 30, 121]})
    assert first_tokens(ValidationData(prepared, config, num_rows=100)) == list(range(0, 160, 16))
    assert first_tokens(ValidationData(prepared, config, num_rows=4)) == [0, 32, 80, 112]
    assert ValidationData(prepared, config, num_rows=1).num_rows == 1


def test_the_digest_is_that_of_the_rows(tmp_path: Path) -> None:
    prepared, config = prepared_of(tmp_path, {"a": [200], "b": [40]})
    counting_store(tmp_path / "moved", [200])
    counting_store(tmp_path / "longer", [201])

    def digest(*sources: str, num_rows: int = 7, **data: object) -> str:
        paths = [{"source": str(tmp_path / name)} for name in sources]
        other = make_config(tmp_path / "cache", paths[:1], validation_sources=paths, **data)
        return ValidationData(prepare_stores(other), other, num_rows=num_rows).digest

    same = ValidationData(prepared, config, num_rows=7).digest
    assert digest("a", "b") == digest("moved", "b") == same
    assert digest("a", "b", num_rows=1000) == digest("a", "b", num_rows=2000)
    others = [
        digest("longer", "b"),
        digest("a"),
        digest("a", "b", num_rows=8),
        digest("a", "b", sequence_length=8),
        digest("a", "b", isolate_documents=False),
    ]
    assert len({same, *others}) == 6


def test_sources_take_turns(tmp_path: Path) -> None:
    prepared, config = prepared_of(tmp_path, {"a": [200], "b": [40], "c": [9]})
    data = ValidationData(prepared, config, num_rows=7)
    assert first_tokens(data) == [0, 32, 64, 112, 144, 0, 16]  # five of a's twelve rows, both of b's, none of c


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_all_ranks_do_equal_work_and_each_row_counts_once(tmp_path: Path, world: int, micro: int) -> None:
    prepared, config = prepared_of(tmp_path, {"a": [10, 30, 71]})
    data = ValidationData(prepared, config, num_rows=5)
    ranks = [data.batches(Topology(world, rank), micro_batch_size=micro, mtp_depths=2) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.num_rows == micro for batches in ranks for batch in batches)
    whole = PackedBatch.from_rows([data.row(index) for index in range(5)], mtp_depths=2)
    batches = [batch for batches in ranks for batch in batches]
    totals = tuple(sum(batch.num_targets[depth] for batch in batches) for depth in range(3))
    assert totals == whole.num_targets
    labels = torch.cat([batch.labels_T for batch in batches])
    expected = whole.labels_T[whole.labels_T != IGNORE_INDEX]
    assert sorted(labels[labels != IGNORE_INDEX].tolist()) == sorted(expected.tolist())
    assert sum(int((batch.labels_T != IGNORE_INDEX).sum()) for batch in batches) == totals[0]


def test_slices_of_rows_count_each_row_once_those_without_targets_too(tmp_path: Path) -> None:
    """Five rows over two groups of two ranks, two rows a micro-batch."""
    prepared, config = prepared_of(tmp_path, {"a": [10, 30, 71]})
    data = ValidationData(prepared, config, num_rows=5)
    found = []
    for rank in range(4):
        topology = Topology(4, rank, context_parallel_size=2)
        part = RowSlice(topology.context_parallel_rank, 2, halo=3)
        found.append(data.batches(topology, micro_batch_size=2, mtp_depths=2, part=part))
    assert {len(batches) for batches in found} == {2}
    assert {batch.num_tokens for batches in found for batch in batches} == {16}
    whole = PackedBatch.from_rows([data.row(index) for index in range(5)], mtp_depths=2)
    totals = [sum(batch.num_targets[depth] for batches in found for batch in batches) for depth in range(3)]
    assert tuple(totals) == whole.num_targets


@pytest.mark.parametrize("lengths", [[5], [16], [17], [1, 1, 1], [10, 7, 23, 1], [33], [32]])
def test_everything_is_a_target_but_the_first_token_of_a_document(tmp_path: Path, lengths: list[int]) -> None:
    counting_store(tmp_path / "a", lengths)
    config = make_config(tmp_path / "cache", [{"source": str(tmp_path / "a")}])
    prepared = prepare_evaluation(config, config.data.sources[0])
    data = ValidationData(prepared, config, num_rows=None)
    batches = data.batches(Topology(), micro_batch_size=2, mtp_depths=0)
    labels = torch.cat([batch.labels_T for batch in batches])
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    expected = [token for token in range(sum(lengths)) if token not in starts]
    assert labels[labels != IGNORE_INDEX].tolist() == expected
    assert sum(batch.num_targets[0] for batch in batches) == len(expected)


def test_bytes_per_token_weighs_sources_by_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 200)
    (tmp_path / "b.txt").write_text("ü" * 300)
    sources = [{"source": str(tmp_path / name)} for name in ("a.txt", "b.txt")]
    config = make_config(tmp_path / "cache", sources[:1], validation_sources=sources)
    prepared = prepare_stores(config)
    ratios = [source.num_bytes / source.documents.num_tokens for source in prepared.validation if source.num_bytes]
    data = ValidationData(prepared, config, num_rows=2)
    assert data.bytes_per_token == pytest.approx(sum(ratios) / 2)
    store, config = prepared_of(tmp_path, {"c": [100]})
    assert ValidationData(store, config, num_rows=2).bytes_per_token is None


def test_nothing_held_out(tmp_path: Path) -> None:
    counting_store(tmp_path / "a", [100])
    config = make_config(tmp_path / "cache", [{"source": str(tmp_path / "a")}], validation_fraction=0.0)
    with pytest.raises(
        DataError, match=r"validation_fraction: no document was held out; name data\.validation_sources"
    ):
        ValidationData(prepare_stores(config), config, num_rows=4)


def test_too_little_held_out(tmp_path: Path) -> None:
    prepared, config = prepared_of(tmp_path, {"a": [100], "b": [2]})
    small = PreparedData(prepared.train, prepared.validation[1:], None, prepared.vocab_size)
    with pytest.raises(DataError, match="b: 2 held-out tokens, a row needs 17"):
        ValidationData(small, config, num_rows=4)


def test_each_set_has_rows_of_its_own_the_same_at_any_layout(tmp_path: Path) -> None:
    counting_store(tmp_path / "train", [200])
    for name, lengths in (("a", [10, 30, 121]), ("b", [60]), ("c", [49])):
        counting_store(tmp_path / name, lengths)
    sets = {"one": [{"source": str(tmp_path / "a")}], "two": [{"source": str(tmp_path / name)} for name in "bc"]}
    config = make_config(
        tmp_path / "cache", [{"source": str(tmp_path / "train")}], validation_sets=sets, validation_fraction=0.0
    )
    config = config.model_copy(update={"eval": EvalConfig(interval=1, rows=5)})
    opened = open_validation(prepare_stores(config), config)
    assert {name: first_tokens(data) for name, data in opened.items()} == {
        "one": [0, 32, 64, 96, 128],
        "two": [0, 16, 32, 0, 16],
    }
    for data in opened.values():
        labels = {}
        for world, context in ((1, 1), (3, 1), (4, 2)):
            found = []
            for rank in range(world):
                topology = Topology(world, rank, context_parallel_size=context)
                part = RowSlice(topology.context_parallel_rank, context, halo=3)
                found += data.batches(topology, micro_batch_size=2, mtp_depths=0, part=part)
            targets = torch.cat([batch.labels_T for batch in found])
            labels[world] = sorted(targets[targets != IGNORE_INDEX].tolist())
        assert labels[1] == labels[3] == labels[4]


def test_sets_do_not_need_held_out_text_nor_take_it_away(tmp_path: Path) -> None:
    counting_store(tmp_path / "a", [10] * 100)
    sources = [{"source": str(tmp_path / "a")}]
    with_sets = make_config(tmp_path / "cache", sources, validation_sets={"all": sources}, validation_fraction=0.1)
    alone = make_config(tmp_path / "cache", sources, validation_fraction=0.1)
    prepared = prepare_stores(with_sets)
    assert prepared.fingerprint == prepare_stores(alone).fingerprint
    assert open_validation(prepared, with_sets) == {}
    config = with_sets.model_copy(update={"eval": EvalConfig(interval=1)})
    assert list(open_validation(prepared, config)) == ["", "all"]


def test_a_set_that_is_too_small_is_named(tmp_path: Path) -> None:
    counting_store(tmp_path / "a", [100])
    counting_store(tmp_path / "b", [9])
    sets = {"small": [{"source": str(tmp_path / "b")}]}
    config = make_config(tmp_path / "cache", [{"source": str(tmp_path / "a")}], validation_sets=sets)
    with pytest.raises(DataError, match=r"^data.validation_sets: small: .*b: 9 held-out tokens, a row needs 17"):
        ValidationData(prepare_stores(config), config, num_rows=4, name="small")
