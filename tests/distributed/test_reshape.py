"""A checkpoint of any layout goes on at any other, state bit for bit and curve as if never interrupted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch

from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.parameters import parameter_table
from tests.distributed.layout_matrix import Layout
from tests.distributed.layouts import Job, Outcome, train_all

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SAVED_AT = 2
STEPS = 4
LAYOUTS = [
    Layout(
        world_size,
        expert_parallel_size,
        zero_stage,
        1,
        packed=True,
        context_parallel_size=context_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
    )
    for world_size, expert_parallel_size, zero_stage, context_parallel_size, tensor_parallel_size in (
        (1, 1, 1, 1, 1),
        (2, 1, 3, 1, 2),
        (2, 2, 1, 2, 1),
        (4, 1, 2, 4, 1),
        (4, 2, 3, 2, 1),
        (4, 2, 1, 1, 2),
        (4, 4, 2, 2, 2),
    )
]


@dataclass(frozen=True)
class Reshaped:
    """Runs that saved, by layout; by ``(from, to)``, runs that loaded, and those of them that went on."""

    saved: dict[Layout, Outcome]
    loaded: dict[tuple[Layout, Layout], Outcome]
    continued: dict[tuple[Layout, Layout], Outcome]


def _job(layout: Layout, steps: int, *, load: Path | None = None, save: Path | None = None) -> Job:
    config = layout.job.config
    config = config.model_copy(update={"run": config.run.model_copy(update={"steps": steps})})
    return replace(layout.job, config=config, load=load, save=save)


def _is_loaded(origin: Layout, layout: Layout) -> bool:
    """One rank reads every layout's and is read by every layout; others read their own and those from which they go on.

    What is read of whose file is found for each parameter, whatever the layouts are
    (``tests/unit/checkpoint/test_fragments.py``).
    """
    return _goes_on(origin, layout) or origin == layout or 1 in (origin.world_size, layout.world_size)


def _goes_on(origin: Layout, layout: Layout) -> bool:
    """From the next layout's checkpoint, and two ranks, whose steps repeat to the bit, from their own.

    That the others' arrive bit for bit is all there is to see: the state is the same, whoever wrote it.
    """
    of_two = layout.world_size == 2 and origin == layout
    return of_two or origin == LAYOUTS[(LAYOUTS.index(layout) + 1) % len(LAYOUTS)]


@pytest.fixture(scope="module")
def reshaped(tmp_path_factory: pytest.TempPathFactory) -> Reshaped:
    """Save at every layout, then load at every layout from some, and go on from some of those.

    The first checkpoint is loaded into a new engine of the layout, the others into the same one after it has trained.
    Of the two steps that follow the first is one of the weights loaded, the second of the moments too.
    """
    folder = tmp_path_factory.mktemp("reshape")
    checkpoints = {layout: folder / f"checkpoints_{index}" for index, layout in enumerate(LAYOUTS)}
    saved: dict[Layout, Outcome] = {}
    loaded: dict[tuple[Layout, Layout], Outcome] = {}
    by_world = {size: [layout for layout in LAYOUTS if layout.world_size == size] for size in (1, 2, 4)}
    for size, layouts in by_world.items():
        saving = [_job(layout, SAVED_AT, save=checkpoints[layout]) for layout in layouts]
        saved.update(zip(layouts, train_all(saving, folder / f"save_{size}", num_processes=size), strict=True))
    for size, layouts in by_world.items():
        pairs = [(origin, layout) for layout in layouts for origin in LAYOUTS if _is_loaded(origin, layout)]
        # Those of one length in a row: they share an engine.
        pairs.sort(key=lambda pair: (LAYOUTS.index(pair[1]), not _goes_on(*pair)))
        jobs = [
            _job(layout, STEPS if _goes_on(origin, layout) else SAVED_AT, load=checkpoints[origin])
            for origin, layout in pairs
        ]
        loaded.update(zip(pairs, train_all(jobs, folder / f"load_{size}", num_processes=size), strict=True))
    return Reshaped(saved, loaded, {pair: outcome for pair, outcome in loaded.items() if _goes_on(*pair)})


def test_the_whole_state_arrives_bit_for_bit(reshaped: Reshaped) -> None:
    """Every expert's weights and moments among it."""
    assert len(reshaped.loaded) == 24
    for (origin, layout), outcome in reshaped.loaded.items():
        for key, tensor in reshaped.saved[origin].state.items():
            assert tensor.equal(outcome.loaded[key]), (origin, layout, key)


def test_no_two_experts_of_a_saved_state_are_alike(reshaped: Reshaped) -> None:
    """Or those that have changed places would not be seen."""
    experts = [spec for spec in parameter_table(LAYOUTS[0].job.config.model) if spec.expert]
    assert experts
    for spec, saved in product(experts, reshaped.saved.values()):
        kept = torch.cat(
            [saved.state[spec.name, kind].view(spec.shape[0], -1) for kind in ("master", "exp_avg", "exp_avg_sq")], 1
        )
        assert len(kept.unique(dim=0)) == spec.shape[0], spec.name


def test_the_curve_goes_on_as_if_never_interrupted(reshaped: Reshaped, tmp_path: Path) -> None:
    (whole,) = train_all([_job(LAYOUTS[0], STEPS)], tmp_path / "whole", num_processes=1)
    assert len(reshaped.continued) == len(LAYOUTS) + 2
    for (origin, layout), outcome in reshaped.continued.items():
        for expected, found in zip(whole.metrics[SAVED_AT:], outcome.metrics, strict=True):
            for name in ("loss/lm", "loss/mtp", "loss/load_balancing", "loss/z", "loss/total"):
                assert found[name] == pytest.approx(expected[name], rel=1e-6), (origin, layout, name)


def test_the_same_layout_goes_on_bit_for_bit(reshaped: Reshaped, tmp_path: Path) -> None:
    layouts = [layout for layout in LAYOUTS if layout.world_size == 2]
    whole = train_all([_job(layout, STEPS) for layout in layouts], tmp_path / "whole", num_processes=2)
    for layout, outcome in zip(layouts, whole, strict=True):
        continued = reshaped.continued[layout, layout]
        assert continued.metrics == outcome.metrics[SAVED_AT:]
        for key, tensor in outcome.state.items():
            assert tensor.equal(continued.state[key]), (layout, key)


def test_the_80b_of_one_node_goes_on_with_its_experts_over_half_its_ranks(tmp_path: Path) -> None:
    """The shipped file in small: saved with experts over all ranks, resumed with two sets of them, as EP 8 and EP 4 x 2
    of its eight GPUs; bf16 moments, whole layers recomputed.
    """
    narrow = {
        "model.num_hidden_layers": 2,
        "model.full_attention_interval": 2,
        "run.global_batch_size": 16,
        "model.hidden_size": 32,
        "model.vocab_size": 256,
        "model.num_experts": 32,
        "model.num_experts_per_tok": 4,
        "model.moe_intermediate_size": 16,
        "model.shared_expert_intermediate_size": 16,
        "model.num_attention_heads": 2,
        "model.num_key_value_heads": 1,
        "model.head_dim": 16,
        "model.linear_num_key_heads": 2,
        "model.linear_num_value_heads": 4,
        "model.linear_key_head_dim": 8,
        "model.linear_value_head_dim": 8,
        "data.sequence_length": 24,
        "run.device": "cpu",
        "run.precision": "fp32",
        "parallel.gradient_dtype": "fp32",
        "schedule.kind": "constant",
        "schedule.warmup_steps": 0,
    }

    def job(steps: int, size: int, **folders: Path) -> Job:
        settings = narrow | {"run.steps": steps, "parallel.expert_parallel_size": size}
        overrides = [(key, str(value)) for key, value in settings.items()]
        return Job(load_config([find_config("qwen3next_80b_8xh200.yaml")], overrides).config, **folders)

    folder = tmp_path / "checkpoints"
    saved, whole = train_all([job(1, 4, save=folder), job(2, 4)], tmp_path / "all", num_processes=4)
    assert len(saved.state) == 3 * len(parameter_table(job(1, 4).config.model))
    (resumed,) = train_all([job(2, 2, load=folder)], tmp_path / "half", num_processes=4)
    for key, tensor in saved.state.items():
        assert tensor.equal(resumed.loaded[key]), key
    assert len(resumed.metrics) == 1
    for name in ("loss/lm", "loss/mtp", "loss/load_balancing"):
        assert resumed.metrics[0][name] == pytest.approx(whole.metrics[1][name], rel=1e-6), name
