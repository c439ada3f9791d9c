"""What the log ends with."""

import pytest

from qwen3next_train.metrics.summary import SummarySink


def summary(tmp_path, *, first_step=0, total_steps=440, checkpoint="step_00000440"):
    return SummarySink(
        tmp_path / "metrics.jsonl",
        first_step=first_step,
        total_steps=total_steps,
        newest_checkpoint=lambda: checkpoint,
    )


def row(step, loss, **more):
    return {"step": step, "tokens": step * 4096, "loss/lm": loss, **more}


def test_a_whole_run(tmp_path):
    sink = summary(tmp_path)
    for step, loss in ((1, 8.0), (2, 2.25), (440, 2.5)):
        sink.log(row(step, loss, **({"eval/loss": loss - 0.5, "eval/bpb": 1.7} if step > 1 else {})))
        sink.advance(step)
    assert sink.lines(200.0) == [
        "steps       440 of 440, in 3m20s",
        "tokens      1,802,240, 9.01 ktok/s on average",
        "loss        2.5000 at step 440, best 2.2500 at step 2",
        "eval loss   2.0000 at step 440 (1.7000 bits/byte), best 1.7500 at step 2",
        f"checkpoint  {tmp_path}/checkpoints/step_00000440",
        f"run         {tmp_path}: metrics.jsonl, log.txt, config.yaml, run.json",
    ]


def test_named_validation_sets_have_lines_of_their_own(tmp_path):
    sink = summary(tmp_path)
    sink.log(row(1, 8.0) | {"eval/loss": 7.0, "eval/code/loss": 6.0, "eval/code/bpb": 2.0, "eval/old-books/loss": 5.0})
    sink.log(row(2, 7.0) | {"eval/loss": 7.5, "eval/code/loss": 5.0, "eval/code/bpb": 1.0, "eval/old-books/loss": 5.5})
    sink.advance(2)
    assert sink.lines(1.0)[3:6] == [
        "eval loss   7.5000 at step 2, best 7.0000 at step 1",
        "eval code   5.0000 at step 2 (1.0000 bits/byte), best 5.0000 at step 2",
        "eval old-books 5.5000 at step 2, best 5.0000 at step 1",
    ]


def test_rows_of_earlier_attempts_count_as_far_as_they_hold_numbers(tmp_path):
    sink = summary(tmp_path, first_step=3)
    damaged = [{"step": 2, "loss/lm": "0.1"}, {"step": 2, "tokens": float("inf")}, {"step": 2, "loss/lm": 10**400}]
    for each in (row(1, 8.0), row(2, 1.5), *damaged, row(3, 3.0, extra=[1], more=None)):
        sink.take_earlier(each)
    sink.log(row(5, 2.0))
    sink.advance(6)
    assert sink.lines(2.0)[:3] == [
        "steps       6 of 440, 3 of them in this attempt, in 2s",
        "tokens      20,480, 4.10 ktok/s on average",
        "loss        2.0000 at step 5, best 1.5000 at step 2",
    ]


@pytest.mark.parametrize("losses", [(float("nan"), 3.0, 4.0), (3.0, float("nan"), 4.0)])
def test_not_a_number_is_never_the_best(tmp_path, losses):
    sink = summary(tmp_path, checkpoint=None)
    for step, loss in enumerate(losses, start=1):
        sink.log(row(step, loss, **{"optim/skipped_steps": 1}))
        sink.advance(step)
    lines = sink.lines(1.0)
    assert lines[0] == "steps       3 of 440, 1 skipped, in 1s"
    assert lines[2].endswith(f"best 3.0000 at step {losses.index(3.0) + 1}")
    assert lines[3] == "checkpoint  none"


def test_without_rows_of_earlier_attempts_no_rate_is_made_up(tmp_path):
    sink = summary(tmp_path, first_step=400)
    sink.log(row(401, 2.0))
    sink.advance(401)
    assert sink.lines(1.0)[1] == "tokens      1,642,496"


def test_an_attempt_without_a_step_says_nothing(tmp_path, capsys):
    summary(tmp_path, first_step=0).close()
    assert capsys.readouterr().err == ""


def test_closing_logs_it(tmp_path, capsys):
    sink = summary(tmp_path)
    sink.advance(1)
    sink.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["steps", "checkpoint", "run"]
