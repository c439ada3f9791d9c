"""The shipped sizes between the tiny model and the 80B keep the rule that they state, and the plan that they show."""

from __future__ import annotations

import math
import re

import pytest

from qwen3next_train.accounting.workload import count_parameters
from qwen3next_train.cli.arguments import Option, parse_arguments
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import shipped_folder
from qwen3next_train.config.schema import Config
from qwen3next_train.parameters import parameter_table
from qwen3next_train.planner.plan import make_plan
from qwen3next_train.planner.report import format_plan
from tests.architecture.tree import ROOT

TOKENS = {"20m": 1e9, "100m": 5e9, "3b_a400m": 60e9}
recipes = pytest.mark.parametrize("name", TOKENS)


def recipe(name: str) -> tuple[str, Config]:
    path = shipped_folder() / f"qwen3next_{name}.yaml"
    return path.read_text(), load_config([path], []).config


@recipes
def test_rate_and_batch_follow_the_step_law(name: str) -> None:
    text, config = recipe(name)
    embedding = {"model.embed_tokens.weight", "lm_head.weight"}
    others = sum(math.prod(spec.shape) for spec in parameter_table(config.model) if spec.name not in embedding)
    tokens = TOKENS[name]
    assert config.optimizer.lr == pytest.approx(1.79 * others**-0.713 * tokens**0.307, rel=0.01)
    batch = config.run.global_batch_size * config.data.sequence_length
    # Whole micro-batches on every GPU leave this much.
    assert batch == pytest.approx(0.58 * tokens**0.571, rel=0.2)
    assert config.run.steps * batch == pytest.approx(tokens, rel=0.01)
    assert config.schedule.min_lr == 1e-5
    stated = re.search(r"N = ([\d.]+) (million|billion) .* D = ([\d.]+) billion", text)
    assert stated is not None
    assert float(stated[1]) * {"million": 1e6, "billion": 1e9}[stated[2]] == pytest.approx(others, rel=0.005)
    assert float(stated[3]) * 1e9 == tokens


def test_the_table_has_the_parameters_of_each_file() -> None:
    table = (ROOT / "configs/README.md").read_text()
    rows = re.findall(r"^\| `(\w+\.yaml)` \| (\d[^|]*) \|", table, re.MULTILINE)
    assert len(rows) == 9
    for name, stated in rows:
        found = count_parameters(load_config([shipped_folder() / name], []).config.model)
        counts = re.fullmatch(r"([\d.]+) ([MB])(?:, ([\d.]+) ([MB]) active)?", stated)
        assert counts is not None, name
        for number, unit, count in ((counts[1], counts[2], found.total), (counts[3], counts[4], found.active)):
            if number is not None:
                decimals = len(number.partition(".")[2])
                assert number == f"{count / {'M': 1e6, 'B': 1e9}[unit]:.{decimals}f}", name


@recipes
def test_the_header_is_what_plan_says(name: str) -> None:
    text, config = recipe(name)
    gpus = re.search(r"--gpus (\d+) --gpu (\w+)` says:\n", text)
    assert gpus is not None
    shown = re.findall(r"^#   (\S.*|  +\S.*)$", text[gpus.end() :], re.MULTILINE)
    assert len(shown) == 5
    said = format_plan(make_plan(config, gpus=int(gpus[1]), gpu=gpus[2], mfu=None, tokens=None)).splitlines()
    assert [line for line in shown if line not in said] == []


def test_the_header_of_the_80b_on_one_node_is_what_plan_says_of_both_lengths() -> None:
    path = shipped_folder() / "qwen3next_80b_8xh200.yaml"
    text = path.read_text()
    commands = re.findall(r"`qwen3next-train (plan [^`]*)` says:\n((?:#   .*\n)+)", text)
    assert len(commands) == 2
    for command, shown in commands:
        words = command.replace("\n#", " ").split()
        args = parse_arguments(words[1:], {name: Option(name, "X", "") for name in ("--config", "--gpus", "--gpu")})
        config = load_config([path], args.overrides).config
        gpus, gpu = int(args.options["--gpus"][0]), args.options["--gpu"][0]
        plan = make_plan(config, gpus=gpus, gpu=gpu, mfu=None, tokens=None)
        said = format_plan(plan).splitlines()
        lines = [line.removeprefix("#   ") for line in shown.splitlines()]
        assert len(lines) == 9
        assert [line for line in lines if line not in said] == []
        assert plan.fits
        # 32768 tokens a GPU in the second, 4 x 4096 in the first, and eight of them.
        assert plan.workload.num_tokens // 8 in (4 * 4096, 32768)
        exact = load_config([path], [*args.overrides, ("parallel.token_exchange", "exact")]).config
        other = make_plan(exact, gpus=gpus, gpu=gpu, mfu=None, tokens=None)
        assert plan.step_time_s is not None
        assert other.step_time_s is not None
        assert plan.step_time_s < other.step_time_s


@recipes
def test_users_bring_their_text(name: str) -> None:
    _, config = recipe(name)
    assert config.data.sources == []
