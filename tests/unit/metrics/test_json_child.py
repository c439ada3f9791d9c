import os
import signal

import pytest

from qwen3next_train.metrics.json_child import JsonChild, LineReader

ECHO = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"echo": json.loads(line)["text"]}), flush=True)
print("end of input", file=sys.stderr)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a child that runs the given source."""
    children: list[JsonChild] = []

    def start_child(source: str) -> JsonChild:
        (tmp_path / "the_child.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        children.append(JsonChild("the_child", tmp_path / "child.log"))
        return children[-1]

    yield start_child
    for child in children:
        child.close()


def test_talks_both_ways(start):
    child = start(ECHO)
    for text in ("a", "ü\n", "x" * 300_000):
        child.send({"text": text})
        assert child.receive(20) == {"echo": text}


def test_silence_and_death(start, tmp_path):
    child = start("import sys, time\nsys.stdin.readline()\nraise SystemExit('gone')")
    assert child.receive(0) == {}
    assert child.fate("silent") == "silent"
    child.send({})
    assert child.receive(20) == {}
    child.kill()
    assert child.fate("silent") == "process ended with code 1"
    with pytest.raises(OSError, match="Broken pipe"):
        child.send({})
    assert (tmp_path / "child.log").read_text() == "gone\n"


def test_kill_ends_what_ignores_signals(start):
    child = start(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('{}', flush=True)\ntime.sleep(600)"
    )
    child.receive(20)
    child.kill()
    assert child.fate("") == f"process ended with code {-signal.SIGKILL}"


def test_is_out_of_reach_of_the_terminal(start):
    child = start("import os\nprint('{\"session\": %d}' % os.getsid(0), flush=True)")
    assert child.receive(20)["session"] != os.getsid(0)


def test_working_directory_does_not_shadow_modules(start, tmp_path, monkeypatch):
    folder = tmp_path / "cwd"
    folder.mkdir()
    (folder / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(folder)
    child = start(ECHO)
    child.send({"text": "here"})
    assert child.receive(20) == {"echo": "here"}


def test_reads_whole_lines_only():
    reading, writing = os.pipe()
    lines = LineReader(reading)
    os.write(writing, b"one\ntwo\n\nthr")
    assert [lines.read(0), lines.read(0), lines.read(0), lines.read(0)] == [b"one", b"two", b"", None]
    assert not lines.at_end
    os.write(writing, b"ee\nrest")
    os.close(writing)
    assert lines.read(1) == b"three"
    assert lines.read(1) is None
    assert lines.at_end
    os.close(reading)
