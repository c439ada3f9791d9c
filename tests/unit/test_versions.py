import subprocess
import sys

import qwen3next_train
from qwen3next_train.versions import git_revision, software_versions


def test_versions():
    versions = software_versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["qwen3next_train"] == qwen3next_train.__version__
    assert versions["deepspeed"].startswith("0.")
    assert set(versions) == {
        "python",
        "qwen3next_train",
        "torch",
        "deepspeed",
        "triton",
        "flash-linear-attention",
        "flash-qla",
        "tilelang",
        "numpy",
    }


def test_git_revision(tmp_path, monkeypatch):
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(qwen3next_train, "__file__", str(package / "__init__.py"))
    assert git_revision() is None
    git = ["git", "-C", str(package.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_revision() is None, "installed inside a repository, but not part of it"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_revision() == head
    (package / "__init__.py").write_text("x = 1")
    assert git_revision() == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None
