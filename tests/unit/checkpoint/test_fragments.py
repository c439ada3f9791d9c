from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3next_train.checkpoint.fragments import (
    MAX_OPEN_FILES,
    FragmentIndex,
    FragmentReader,
    RankShare,
    write_rank_files,
)
from qwen3next_train.checkpoint.manager import VerifiedCheckpoint
from qwen3next_train.checkpoint.manifest import FileEntry, Manifest, WorldLayout, encode_manifest, parse_manifest
from qwen3next_train.engine.base import FRAGMENT_KINDS, Fragment, FragmentKind
from qwen3next_train.errors import CheckpointError, DivergedError, StorageError
from qwen3next_train.held_elements import Runs, runs_of_range
from qwen3next_train.parameters import Init, ParamSpec
from tests.unit.checkpoint.support import (
    PARAMETERS,
    HookedFilesystem,
    assert_holds,
    fragments_of,
    header,
    logical_state,
    manager,
    names,
    save,
    train_state,
)


def _write(directory: Path, shares: Sequence[Sequence[Fragment]], parameters: Sequence[ParamSpec]) -> Manifest:
    """Rank files and the manifest they belong to, without a manager."""
    directory.mkdir(exist_ok=True)
    files: list[FileEntry] = []
    kinds: tuple[FragmentKind, ...] = FRAGMENT_KINDS
    for rank, fragments in enumerate(shares):
        share = RankShare.collect(fragments, {})
        kinds = share.kinds if fragments else kinds
        files += write_rank_files(HookedFilesystem(), directory, share, rank=rank, parameters=parameters)
    return _manifest(files, parameters, kinds)


def _manifest(
    files: Sequence[FileEntry], parameters: Sequence[ParamSpec], kinds: Sequence[FragmentKind] = FRAGMENT_KINDS
) -> Manifest:
    layout = WorldLayout(world_size=len({file.rank for file in files}), expert_parallel_size=1, zero_stage=1)
    described = replace(header(), parameters=parameters, layout=layout)
    raw = encode_manifest(step=1, header=described, train_state=train_state(1), kinds=kinds, files=files)
    return parse_manifest(raw, step=1)


@st.composite
def _tilings(draw: st.DrawFn) -> tuple[list[ParamSpec], list[list[tuple[int, int, int]]]]:
    """Parameters, and for each of some ranks its pieces ``(parameter, start, stop)``: a tiling, in any order."""
    shapes = draw(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=4))
    parameters = [
        ParamSpec(f"p{index}.weight", tuple(shape), "norm", Init("constant", 0.0)) for index, shape in enumerate(shapes)
    ]
    num_ranks = draw(st.integers(1, 5))
    shares: list[list[tuple[int, int, int]]] = [[] for _ in range(num_ranks)]
    for index, spec in enumerate(parameters):
        cuts = draw(st.sets(st.integers(0, spec.numel), max_size=6)) | {0, spec.numel}
        edges = sorted(cuts)
        for start, stop in itertools.pairwise(edges):
            shares[draw(st.integers(0, num_ranks - 1))].append((index, start, stop))
    return parameters, [draw(st.permutations(share)) for share in shares]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=_tilings(), data=st.data())
def test_any_range_of_any_tiling_reads_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    written: tuple[list[ParamSpec], list[list[tuple[int, int, int]]]],
    data: st.DataObject,
) -> None:
    parameters, shares = written
    state = [{kind: torch.randn(spec.numel) for kind in FRAGMENT_KINDS} for spec in parameters]
    fragments = [
        [
            Fragment(
                parameters[index].name,
                Runs(start, stop - start),
                {kind: state[index][kind][start:stop] for kind in FRAGMENT_KINDS},
            )
            for index, start, stop in share
        ]
        for share in shares
    ]
    directory = tmp_path_factory.mktemp("tiling")
    manifest = _write(directory, fragments, parameters)
    FragmentIndex(manifest).check_tiling()
    reader = FragmentReader(directory, manifest)
    reader.check_parameters(parameters)
    for index, spec in enumerate(parameters):
        start = data.draw(st.integers(0, spec.numel))
        stop = data.draw(st.integers(start, spec.numel))
        for kind in FRAGMENT_KINDS:
            assert reader.read(spec.name, kind, start, stop).equal(state[index][kind][start:stop])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(1, 5),
    width=st.integers(1, 4),
    num_shares=st.sampled_from([1, 2, 4]),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    data=st.data(),
)
def test_ranges_of_a_matrix_written_by_columns_read_as_one_wrote_it(
    tmp_path_factory: pytest.TempPathFactory,
    num_rows: int,
    width: int,
    num_shares: int,
    cuts: list[int],
    data: st.DataObject,
) -> None:
    columns = num_shares * width
    matrix = torch.arange(float(num_rows * columns))
    own = num_rows * width
    bounds = sorted({0, own, *(min(cut, own) for cut in cuts)})
    shares = []
    for share in range(num_shares):
        held = [Runs(share * width, width, num_rows, columns)] if num_shares > 1 else [Runs(0, own)]
        for begin, end in itertools.pairwise(bounds):
            pieces = [runs for _, runs in runs_of_range(held, begin, end)]
            state = [dict.fromkeys(FRAGMENT_KINDS, runs.of(matrix).flatten()) for runs in pieces]
            shares.append([Fragment("w", runs, tensors) for runs, tensors in zip(pieces, state, strict=True)])
    parameters = [ParamSpec("w", (num_rows, columns), "norm", Init("constant", 0.0))]
    directory = tmp_path_factory.mktemp("columns")
    manifest = _write(directory, shares, parameters)
    FragmentIndex(manifest).check_tiling()
    # What an older version can read is written for it.
    assert manifest.format_version == (2 if any(file.strided_fragments for file in manifest.files) else 1)
    reader = FragmentReader(directory, manifest)
    start = data.draw(st.integers(0, matrix.numel()))
    stop = data.draw(st.integers(start, matrix.numel()))
    assert reader.read("w", "exp_avg", start, stop).equal(matrix[start:stop])


@pytest.mark.parametrize(
    ("strided", "reason"),
    [
        ([0, 0, 2, 2], "strided fragments are not quintuples"),
        ([0, 0, 2, 1, 5], r"strided fragment \(0, 0, 2, 1, 5\) is none"),
        ([0, 0, 0, 2, 5], r"strided fragment \(0, 0, 0, 2, 5\) is none"),
        ([0, 0, 3, 2, 2], r"strided fragment \(0, 0, 3, 2, 2\) is none"),
        ([0, 1, 5, 2, 5], r"strided fragment \(0, 1, 5, 2, 5\) lies outside its parameter"),
        ([1, 0, 2, 2, 5], r"strided fragment \(1, 0, 2, 2, 5\) lies outside its parameter"),
    ],
)
def test_a_strided_fragment_that_is_none_is_damage(tmp_path: Path, strided: list[int], reason: str) -> None:
    file = _write(tmp_path / "c", _simple((0, 10)), VECTOR).files[0]
    spoiled = file.model_copy(update={"strided_fragments": strided})
    with pytest.raises(CheckpointError, match=reason):
        _manifest([spoiled], VECTOR)


def _simple(*ranges: tuple[int, int]) -> list[list[Fragment]]:
    tensors = {kind: torch.arange(10.0) for kind in FRAGMENT_KINDS}
    return [
        [Fragment("w", Runs(start, stop - start), {kind: tensors[kind][start:stop] for kind in FRAGMENT_KINDS})]
        for start, stop in ranges
    ]


VECTOR = [ParamSpec("w", (10,), "norm", Init("constant", 0.0))]


def test_a_hole_is_named_with_its_range(tmp_path: Path) -> None:
    manifest = _write(tmp_path / "c", _simple((0, 4), (6, 10)), VECTOR)
    reader = FragmentReader(tmp_path / "c", manifest)
    assert reader.read("w", "master", 6, 9).tolist() == [6.0, 7.0, 8.0]
    with pytest.raises(CheckpointError, match="w: no file holds exp_avg from element 4 to 8"):
        reader.read("w", "exp_avg", 2, 8)
    with pytest.raises(RuntimeError, match="w: the ranks' fragments do not tile its 10 elements exactly once"):
        FragmentIndex(manifest).check_tiling()


@pytest.mark.parametrize("ranges", [((0, 6), (4, 10)), ((0, 10), (0, 10)), ((0, 9),), ((1, 10),), ()])
def test_overlaps_and_missing_ends_are_no_tiling(tmp_path: Path, ranges: tuple[tuple[int, int], ...]) -> None:
    manifest = _write(tmp_path / "c", _simple(*ranges) or [[]], VECTOR)
    with pytest.raises(RuntimeError, match="do not tile"):
        FragmentIndex(manifest).check_tiling()


def test_redundant_fragments_read_the_same(tmp_path: Path) -> None:
    reader = FragmentReader(tmp_path / "c", _write(tmp_path / "c", _simple((0, 6), (4, 10), (2, 5)), VECTOR))
    assert reader.read("w", "master", 1, 9).tolist() == [float(value) for value in range(1, 9)]


def test_weights_alone_read_with_zero_moments(tmp_path: Path) -> None:
    weights = [[Fragment("w", Runs(0, 10), {"master": torch.arange(10, dtype=torch.bfloat16)})]]
    manifest = _write(tmp_path / "c", weights, VECTOR)
    reader = FragmentReader(tmp_path / "c", manifest)
    assert manifest.kinds == ["master"]
    assert reader.read("w", "master", 8, 10).tolist() == [8.0, 9.0]
    assert reader.read("w", "exp_avg_sq", 8, 10).tolist() == [0.0, 0.0]
    assert reader.read("w", "master", 8, 10).dtype == torch.float32


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        (PARAMETERS[:2], "norm.weight is not part of the model"),
        ((*PARAMETERS, replace(PARAMETERS[2], name="extra.weight")), "extra.weight is missing"),
        (
            (replace(PARAMETERS[0], shape=(5, 7)), *PARAMETERS[1:]),
            r"embed.weight has shape \[7, 5\], the model wants \[5, 7\]",
        ),
        ((), r"embed.weight is not part of the model \(and 2 more differences\)"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path: Path, parameters: Sequence[ParamSpec], reason: str) -> None:
    manifest = _write(tmp_path / "c", [fragments_of(1)], PARAMETERS)
    with pytest.raises(CheckpointError, match=reason):
        FragmentReader(tmp_path / "c", manifest).check_parameters(parameters)


def test_unknown_names_and_impossible_ranges(tmp_path: Path) -> None:
    reader = FragmentReader(tmp_path / "c", _write(tmp_path / "c", [fragments_of(1)], PARAMETERS))
    with pytest.raises(CheckpointError, match="no parameter 'nope'"):
        reader.read("nope", "master", 0, 1)
    for start, stop in ((-1, 2), (3, 2), (0, 6)):
        with pytest.raises(ValueError, match=r"norm\.weight: range"):
            reader.read("norm.weight", "master", start, stop)
    with pytest.raises(CheckpointError, match="rank 1 has no file"):
        reader.rank_tensors(1)


def test_what_is_stored_in_one_run_is_not_copied(tmp_path: Path) -> None:
    shares = [fragments_of(1, rank, 2) for rank in range(2)]
    reader = FragmentReader(tmp_path / "c", _write(tmp_path / "c", shares, PARAMETERS))
    state = logical_state(1)["embed.weight"]["exp_avg"]
    # The first rank has 32 of the 35 elements.
    for start, stop, is_mapped in ((0, 32, True), (5, 20, True), (33, 35, True), (0, 35, False), (31, 33, False)):
        read = [reader.read("embed.weight", "exp_avg", start, stop) for _ in range(2)]
        assert (read[0].data_ptr() == read[1].data_ptr()) is is_mapped
        assert read[0].equal(state[start:stop])


@pytest.mark.parametrize("kind", FRAGMENT_KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("min_bytes", [10**6, 1])
def test_values_that_are_not_finite_are_not_saved(
    monkeypatch: pytest.MonkeyPatch, min_bytes: int, kind: FragmentKind, value: float
) -> None:
    monkeypatch.setattr("qwen3next_train.checkpoint.threads.MIN_BYTES", min_bytes)
    fragments = fragments_of(1)
    fragments[1].tensors[kind][3] = value
    # The first is named, whichever of several threads finds one.
    fragments[2].tensors["master"][0] = value
    with pytest.raises(DivergedError, match=rf"layers\.0\.experts: {kind} is not finite in elements \[0, 24\)"):
        RankShare.collect(fragments, {})


@pytest.mark.parametrize("at", [0, 8, 9, 34])
def test_threads_look_at_every_value_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr("qwen3next_train.checkpoint.fragments._MIN_FINITE_BYTES", 32)
    fragments = fragments_of(1)
    share = RankShare.collect(fragments, {})
    fragments[0].tensors["exp_avg_sq"][at] = math.inf
    files = write_rank_files(HookedFilesystem(), tmp_path, share, rank=0, parameters=PARAMETERS)
    reader = FragmentReader(tmp_path, _manifest(files, PARAMETERS))
    with pytest.raises(CheckpointError, match=r"embed\.weight: exp_avg_sq is not finite"):
        reader.read("embed.weight", "exp_avg_sq", 0, 35)
    assert reader.read("embed.weight", "master", 0, 35).equal(fragments[0].tensors["master"])


def test_values_that_are_not_finite_are_not_loaded(tmp_path: Path) -> None:
    fragments = fragments_of(1)
    share = RankShare.collect(fragments, {})
    # After the check of the save, as a bug or a bit flip in memory would.
    fragments[2].tensors["master"][1] = math.nan
    (tmp_path / "c").mkdir()
    files = write_rank_files(HookedFilesystem(), tmp_path / "c", share, rank=0, parameters=PARAMETERS)
    reader = FragmentReader(tmp_path / "c", _manifest(files, PARAMETERS))
    with pytest.raises(CheckpointError, match=r"norm\.weight: master is not finite"):
        reader.read("norm.weight", "master", 0, 5)
    assert reader.read("norm.weight", "master", 2, 5).shape == (3,)


@pytest.mark.parametrize(
    ("min_bytes", "held"),
    [
        (10**6, [{"embed.weight", "layers.0.experts", "norm.weight"}]),
        (385, [{"embed.weight", "layers.0.experts", "norm.weight"}]),
        # 35, 24 and 5 elements of three kinds: 768 bytes.
        (384, [{"embed.weight"}, {"layers.0.experts", "norm.weight"}]),
        (256, [{"embed.weight"}, {"layers.0.experts"}, {"norm.weight"}]),
        (1, [{"embed.weight"}, {"layers.0.experts"}, {"norm.weight"}]),
    ],
)
def test_a_large_share_is_spread_over_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, min_bytes: int, held: list[set[str]]
) -> None:
    monkeypatch.setattr("qwen3next_train.checkpoint.threads.MIN_BYTES", min_bytes)
    filesystem = HookedFilesystem()
    found = _saved(tmp_path, filesystem)
    files = found.manifest.files
    assert [file.name for file in files] == [
        "rank_00000.safetensors",
        "rank_00000_1.safetensors",
        "rank_00000_2.safetensors",
    ][: len(held)]
    assert [{PARAMETERS[index].name for index in file.fragments[::3]} for file in files] == held
    assert {file.rank for file in files} == {0}
    # What an older version can read is written for it.
    assert found.manifest.format_version == (3 if len(files) > 1 else 1)
    assert found.manifest.num_bytes == sum((found.path / file.name).stat().st_size for file in files)
    assert_holds(found, 1)
    assert FragmentReader(found.path, found.manifest).rank_tensors(0)["rng"].tolist() == [1, 0]


def _saved(directory: Path, filesystem: HookedFilesystem) -> VerifiedCheckpoint:
    save(manager(directory, filesystem=filesystem), 1)
    found = manager(directory).find_latest()
    assert found is not None
    return found


def test_at_most_four_files_take_a_share_and_about_as_much_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3next_train.checkpoint.threads.MIN_BYTES", 64)
    numels = [100, 7, 90, 1, 60, 55, 40, 30, 20, 10]
    parameters = [ParamSpec(f"p{i}", (numel,), "norm", Init("constant", 0.0)) for i, numel in enumerate(numels)]
    values = [torch.arange(numel, dtype=torch.float32) for numel in numels]
    fragments = [
        Fragment(spec.name, Runs(0, spec.numel), {"master": value})
        for spec, value in zip(parameters, values, strict=True)
    ]
    share = RankShare.collect(fragments, {})
    files = write_rank_files(HookedFilesystem(), tmp_path, share, rank=0, parameters=parameters)
    assert [sum(file.fragments[2::3]) for file in files] == [101, 110, 100, 102]
    assert sum(file.size for file in files) == share.num_bytes
    reader = FragmentReader(tmp_path, _manifest(files, parameters, ("master",)))
    for spec, value in zip(parameters, values, strict=True):
        assert reader.read(spec.name, "master", 0, spec.numel).equal(value)


def test_an_error_in_one_of_several_files_is_raised_when_all_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3next_train.checkpoint.threads.MIN_BYTES", 1)

    def fail(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write" and filesystem.path_of(arguments[0]).name == "rank_00000_1.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    filesystem = HookedFilesystem(fail)
    with pytest.raises(StorageError, match=r"rank 0: rank_00000_1\.safetensors: No space left on device; needed"):
        save(manager(tmp_path, filesystem=filesystem), 1)
    created, closed = (
        sorted(name for operation, name in filesystem.log if operation == wanted and name.startswith("rank_"))
        for wanted in ("create", "close")
    )
    assert created == closed
    assert "rank_00000_1.safetensors" in created
    assert names(tmp_path) == set()


@pytest.mark.gpu
def test_files_are_written_from_what_the_callers_stream_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3next_train.checkpoint.threads.MIN_BYTES", 1)
    parameters = [ParamSpec(f"p{i}", (5_000_000,), "norm", Init("constant", 0.0)) for i in range(4)]
    with torch.cuda.stream(torch.cuda.Stream()):
        values = [torch.zeros(spec.numel, device="cuda") for spec in parameters]
        torch.cuda.synchronize()
        fragments = [
            Fragment(spec.name, Runs(0, spec.numel), {"master": value})
            for spec, value in zip(parameters, values, strict=True)
        ]
        share = RankShare.collect(fragments, {})
        # Half a second of the device's time, behind which the values come.
        torch.cuda._sleep(1_000_000_000)
        for number, value in enumerate(values, start=1):
            value.fill_(number)
        files = write_rank_files(HookedFilesystem(), tmp_path, share, rank=0, parameters=parameters)
    reader = FragmentReader(tmp_path, _manifest(files, parameters, ("master",)))
    for number, spec in enumerate(parameters, start=1):
        assert reader.read(spec.name, "master", 0, spec.numel).eq(number).all()


def test_a_thousand_rank_files_keep_descriptors_and_open_files_few(tmp_path: Path) -> None:
    num_ranks = 1000
    values = torch.arange(float(num_ranks))
    parameters = [ParamSpec("w", (num_ranks,), "norm", Init("constant", 0.0))]
    shares = [
        [Fragment("w", Runs(rank, 1), dict.fromkeys(FRAGMENT_KINDS, values[rank : rank + 1]))]
        for rank in range(num_ranks)
    ]
    reader = FragmentReader(tmp_path / "c", _write(tmp_path / "c", shares, parameters))
    before = len(os.listdir("/proc/self/fd"))
    assert reader.read("w", "master", 0, num_ranks).equal(values)
    assert len(os.listdir("/proc/self/fd")) - before <= MAX_OPEN_FILES
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    assert 0 < len(mapped) <= MAX_OPEN_FILES


def test_a_file_that_vanishes_after_verification_is_one_error(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path / "c")
    save(checkpoints, 1)
    found = checkpoints.find_latest()
    assert found is not None
    (found.path / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: missing"):
        FragmentReader(found.path, found.manifest).read("norm.weight", "master", 0, 1)


def test_the_state_used_here_is_tiled_by_its_fragments() -> None:
    for world_size in (1, 2, 3, 7):
        pieces = [piece for rank in range(world_size) for piece in fragments_of(4, rank, world_size)]
        for name, kinds in logical_state(4).items():
            mine = sorted((piece for piece in pieces if piece.name == name), key=lambda piece: piece.runs.start)
            assert torch.cat([piece.tensors["master"] for piece in mine]).equal(kinds["master"])
