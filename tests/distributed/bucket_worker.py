"""Train under ZeRO-1 and ZeRO-2 on small gradient buckets and write what each rank saw of them.

A task of :mod:`tests.distributed.ranks`. Steps have one, three and two micro-batches, with an evaluation between. In
the second step's second micro-batch rank 1 has no gradients of MTP, unless experts are spread.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from qwen3next_train.accounting import memory
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import memory_per_gpu
from qwen3next_train.config.schema import Config
from qwen3next_train.engine import zero_engine
from qwen3next_train.engine.base import Report, StepTotals
from qwen3next_train.engine.gradient_buckets import _Bucket
from qwen3next_train.model.mtp import MultiTokenPredictor
from qwen3next_train.model.router_losses import RouterStats
from qwen3next_train.parallel.process_groups import ProcessContext
from tests.distributed.engine import build_engine
from tests.distributed.layout_worker import rank_batches

MICRO_BATCHES = (1, 3, 2)


class _Watch:
    """What one training does with its buckets, by backward pass.

    ``launched``: numbers of the buckets, in order; ``peaks``: the most bytes of buffers at a time; ``between``: those
    that forward passes find, of buckets that no reduction is using.
    """

    def __init__(self) -> None:
        self.buckets: list[_Bucket] = []
        self.launched: list[list[int]] = []
        self.peaks: list[int] = []
        self.between: list[int] = []
        self._launch, self._whole = _Bucket.launch, _Bucket._whole

    def begin_pass(self, *_: Any) -> None:
        self.launched.append([])
        self.peaks.append(0)
        self.between.append(sum(self._held(bucket) for bucket in self.buckets if not bucket.is_pending))

    def launch(self, bucket: _Bucket) -> None:
        self.launched[-1].append(self.buckets.index(bucket))
        self._launch(bucket)

    def whole(self, bucket: _Bucket) -> torch.Tensor:
        buffer = self._whole(bucket)
        if self.peaks:
            self.peaks[-1] = max(self.peaks[-1], sum(map(self._held, self.buckets)))
        return buffer

    @staticmethod
    def _held(bucket: _Bucket) -> int:
        return 0 if bucket._buffer is None or bucket._stays else bucket._buffer.nbytes


class _WithoutMtp:
    """MTP whose outputs have no gradient in the chosen call, counted from 0."""

    def __init__(self, call: int) -> None:
        self._call, self._calls = call, 0
        self._forward = MultiTokenPredictor.forward

    def forward(self, mtp: MultiTokenPredictor, *args: Any) -> Any:
        outputs, stats = self._forward(mtp, *args)
        self._calls += 1
        if self._calls - 1 == self._call:
            return [output.detach() for output in outputs], [_detached(each) for each in stats]
        return outputs, stats


def _detached(stats: RouterStats) -> RouterStats:
    return RouterStats(**{name: tensor.detach() for name, tensor in vars(stats).items()})


def _train(config: Config, context: ProcessContext) -> tuple[dict[str, Any], dict[tuple[str, str], torch.Tensor]]:
    """What was seen, and this rank's state after the last step."""
    topology, watch = context.topology(config.parallel), _Watch()
    # With experts of other ranks, whose backward passes exchange tokens, all ranks have MTP.
    without = _WithoutMtp(2 if context.rank == 1 and config.parallel.expert_parallel_size == 1 else -1)
    with (
        patch.object(_Bucket, "launch", lambda bucket: watch.launch(bucket)),
        patch.object(_Bucket, "_whole", lambda bucket: watch.whole(bucket)),
        patch.object(MultiTokenPredictor, "forward", lambda *args: without.forward(*args)),
    ):
        engine = build_engine(config, context)
        watch.buckets = engine._zero._buckets
        norms = []
        for step, count in enumerate(MICRO_BATCHES):
            batches = rank_batches(config, topology, step, packed=True)[:count]
            totals = StepTotals.over_ranks(batches, context.control.sum_ints)
            handle = engine._model.register_forward_pre_hook(watch.begin_pass)
            norms.append(
                engine.train_step(batches, totals=totals, lr=0.0, report=Report.SUMMARY).metrics["optim/grad_norm"]
            )
            handle.remove()
            engine.eval_loss(batches[:1])
    state = {(f.name, kind): t.clone() for f in engine.fragments() for kind, t in f.tensors.items()}
    seen = {
        "launched": watch.launched,
        "peaks": watch.peaks,
        "between": watch.between,
        "lent": [bucket.lent_bytes for bucket in watch.buckets],
        "partitions": sum(bucket.partition.nbytes for bucket in watch.buckets),
        "norms": norms,
    }
    return seen, state


def perform(context: ProcessContext, jobs_path: str) -> None:
    """Each job is a configuration, the elements of a bucket and a folder for what the ranks saw."""
    for job in json.loads(Path(jobs_path).read_text()):
        config = Config.model_validate(job["config"])
        first = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": 1})})
        numel = job["bucket_numel"]
        with patch.object(zero_engine, "BUCKET_NUMEL", numel), patch.object(memory, "BUCKET_NUMEL", numel):
            expected_seen, expected = _train(first, context)
            seen, state = _train(config, context)
            _, again = _train(config, context)
            counted = memory_per_gpu(config.model, Layout.of(config, context.world_size))
        moments = {key: tensor for key, tensor in expected.items() if key[1] == "exp_avg"}
        seen |= {
            "counted": {name: counted[name] for name in ("gradients", "zero_buffers")},
            "norms of stage 1": expected_seen["norms"],
            "launched under stage 1": expected_seen["launched"],
            "error": max(float((state[key] - t).norm() / t.norm().clamp_min(1e-30)) for key, t in moments.items()),
            "repeats": all(torch.equal(again[key], tensor) for key, tensor in state.items()),
        }
        (Path(job["out"]) / f"rank_{context.rank}.json").write_text(json.dumps(seen))
