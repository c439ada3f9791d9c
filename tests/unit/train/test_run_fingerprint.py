"""What ranks compare before they start."""

import torch

from qwen3next_train.config.schema import Config, DataConfig, RunConfig
from qwen3next_train.train.resume import Resume
from qwen3next_train.train.run_fingerprint import run_fingerprint, sources_digest


def test_settings_and_versions_are_declared():
    fingerprint = run_fingerprint(Config())
    assert fingerprint.software["torch"] == torch.__version__
    assert len(fingerprint.software["qwen3next_train sources"]) == 12
    assert fingerprint.settings["run.seed"] == "1234"
    assert fingerprint.settings["logging.wandb.mode"] == '"auto"'


def test_another_setting_is_another_declaration_but_for_a_disk_of_the_node():
    first = run_fingerprint(Config())
    assert run_fingerprint(Config(run=RunConfig(seed=7))) != first
    assert run_fingerprint(Config(data=DataConfig(cache_dir="/local/of/this/node"))) == first


def test_ranks_that_resume_otherwise_are_declared():
    resume = run_fingerprint(Config(), Resume(("run.steps",), 300))
    assert resume != run_fingerprint(Config())
    assert resume.settings["--resume.accept"] == '["run.steps"]'
    assert resume.settings["--resume.from"] == "300"


def test_digest_changes_with_name_and_content(tmp_path):
    def digest(**files: str) -> str:
        for path in tmp_path.iterdir():
            path.unlink()
        for name, content in files.items():
            (tmp_path / f"{name}.py").write_text(content)
        return sources_digest(tmp_path)

    found = {
        digest(a="x", b="y"),
        digest(a="y", b="x"),
        digest(a="x"),
        digest(b="x"),
        digest(ax="", b="y"),
    }
    assert len(found) == 5
    assert digest(a="x", b="y") in found
