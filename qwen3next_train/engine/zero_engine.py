"""The engine: the model under DeepSpeed's ZeRO, one optimizer step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules

from qwen3next_train.accounting.activations import expert_room, expert_rows
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import BUCKET_NUMEL
from qwen3next_train.batch import PackedBatch
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import Fragment, ReadFragment, Report, StepResult, StepTotals, nothing
from qwen3next_train.engine.collector import no_garbage_collection
from qwen3next_train.engine.deepspeed_config import deepspeed_config
from qwen3next_train.engine.deepspeed_patches import (
    PartitionedOptimizer,
    gather_one_by_one,
    order_by_one_stream,
    patched_optimizers,
    quiet_start,
    set_group_timeouts,
)
from qwen3next_train.engine.divided_parameters import mark_divided_parameters
from qwen3next_train.engine.expert_block import ZeroMoeBlock, exchange_densely, mark_expert_parameters
from qwen3next_train.engine.gradient_buckets import GradientBucketOptimizer, bucketed_groups
from qwen3next_train.engine.loss_groups import LossGroups
from qwen3next_train.engine.partitioned_parameters import PartitionedParameterOptimizer
from qwen3next_train.engine.step_clock import Part, StepClock
from qwen3next_train.engine.step_report import StepReport
from qwen3next_train.engine.zero_state import PartitionedOptimizerState, PartitionedParameterState, ZeroState
from qwen3next_train.generate.decode import continue_prompts
from qwen3next_train.generate.sampling import Continuation, Sampling
from qwen3next_train.held_elements import held_runs
from qwen3next_train.kernels.selection import DTYPES, KernelSet, select_adamw_update
from qwen3next_train.log import get_logger
from qwen3next_train.model.block import DecoderLayer
from qwen3next_train.model.init import initialize
from qwen3next_train.model.qwen3_next import LossScales, Qwen3NextForCausalLM
from qwen3next_train.optim.adamw import build_adamw
from qwen3next_train.optim.param_groups import parameter_groups
from qwen3next_train.parallel.context_parallel import make_context_group, make_row_group
from qwen3next_train.parallel.expert_parallel import ExpertRoom
from qwen3next_train.parallel.tensor_parallel import make_tensor_group
from qwen3next_train.parallel.transfers import begin_sum
from qwen3next_train.parameters import ParamSpec, parameter_table
from qwen3next_train.topology import Topology

_NOTHING: AbstractContextManager[None] = nullcontext()
_GROUP_NUMEL = 178_956_971
"""Elements of an optimizer group outside of buckets, DeepSpeed's own default."""


class ZeroEngine:
    """Model, AdamW and ZeRO of one rank.

    Mixed precision with ``run.precision: bf16``: bf16 weights (the router, ``A_log`` and ``dt_bias`` fp32), fp32 master
    weights, and sums of gradients in fp32 or ``parallel.gradient_dtype``.

    torch.distributed is initialised before. Every run goes through ZeRO stage >= 1, one process included:
    DeepSpeed's stage 0 clips experts by a wrong norm.

    Args:
        config: the resolved configuration.
        topology: this rank's place.
        kernels: selected backends.
        device: where the model lives.
        num_micro_batches: micro-batches per step and rank, of the steps that have most.
        clock: times the parts of the steps that are reported; None for no times.
    """

    def __init__(
        self,
        config: Config,
        *,
        topology: Topology,
        kernels: KernelSet,
        device: torch.device,
        num_micro_batches: int,
        clock: StepClock | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._loss_groups = LossGroups(config)
        self._layout = Layout.of(config, topology.world_size, ranks_per_node=topology.ranks_per_node)
        self._world_size = topology.world_size
        self._device = device
        table = parameter_table(config.model)
        local_experts = topology.local_experts(config.model.num_experts)
        with torch.device("meta"):
            model = Qwen3NextForCausalLM(
                config.model,
                kernels=kernels,
                moe_block=ZeroMoeBlock,
                local_experts=local_experts,
                recompute=config.parallel.recompute,
                weights_stay=config.parallel.zero_stage < 3,
                head_shares=topology.tensor_parallel_size,
            )
        dtype = DTYPES[config.run.precision]
        initialize(model, table, seed=config.run.seed, topology=topology, device=device, dtype=dtype)
        mark_expert_parameters(model)
        timeout_s = config.run.peer_timeout_s
        mark_divided_parameters(model, table, topology, timeout_s=timeout_s)
        if topology.world_size > 1:
            model.reduce_counts = begin_sum
        context_group = make_context_group(topology, timeout_s=timeout_s)
        row_group = make_row_group(topology, context_group, timeout_s=timeout_s)
        model.sequence_group = context_group
        model.head_group = make_tensor_group(topology, kernels.token_permutation, timeout_s=timeout_s)
        if row_group is not None:
            model.reduce_row_counts = row_group.begin_sum
        self._model = model
        self._in_buckets = self._layout.sums_in_buckets
        self._one_pass = self._layout.updates_in_one_pass
        self._in_flight = self._layout.micro_batches_in_flight
        num_passes = -(-num_micro_batches // self._in_flight)
        self._engine = _wrap(config, model, table, device=device, num_passes=num_passes, layout=self._layout)
        self._room: ExpertRoom | None = None
        if self._layout.exchanges_densely:
            expected = expert_rows(config.model, self._layout)
            self._room = ExpertRoom(expert_room(config.model, self._layout, expected), device)
            exchange_densely(model, self._room)
        state = PartitionedParameterState if config.parallel.zero_stage == 3 else PartitionedOptimizerState
        self._zero = self._engine.optimizer
        # DeepSpeed averages gradients over the ranks, which makes their sum of a loss that is as many times larger.
        self._loss_factor = 1 if self._one_pass else topology.world_size
        if self._in_buckets:
            self._zero.allocate(
                model.parameters(),
                DTYPES[config.parallel.gradient_dtype],
                partitions_only=config.parallel.zero_stage == 2,
            )
            self._wait_for_weights_in_forward()
        self._state: ZeroState = state(
            self._engine.optimizer,
            dict(model.named_parameters()),
            {spec.name: held_runs(spec, topology) for spec in table},
            moments_dtype=DTYPES[config.optimizer.moments_dtype],
        )

    def train_step(
        self,
        batches: Sequence[PackedBatch],
        *,
        totals: StepTotals,
        lr: float,
        report: Report,
        before_update: Callable[[], None] = nothing,
    ) -> StepResult:
        """Gradient accumulation: forward and backward over this rank's micro-batches, then one optimizer update.

        The loss is normalised once, by counts of the whole global batch (:class:`LossScales`), so a
        micro-batch's loss is its exact share of the step's loss and gradients have to be summed over micro-batches
        and ranks. Gradient buckets and stage 3 do so; where DeepSpeed averages over ranks, the loss is multiplied by
        their number here and nowhere else. Its division by the number of accumulation steps is switched off.

        A step in which a rank's experts got more rows than they have room for is repeated with more room.

        Args:
            batches: this rank's micro-batches, the same number on every rank.
            totals: counts over all ranks.
            lr: learning rate of this step.
            report: what to reduce and return as metrics.
            before_update: called when only the update is left; more than once in a step that is repeated.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        scales = LossScales(num_targets=totals.num_targets, num_micro_batches=totals.num_micro_batches)
        self._engine.train()
        while True:
            with no_garbage_collection():
                collected, loss = self._accumulate_and_update(batches, scales, report, before_update)
                norm, skipped = self._outcome()
            if not (skipped and self._makes_room(loss)):
                break
        if report is Report.NONE:
            return StepResult({}, skipped)
        metrics = collected.metrics(totals, with_layers=report is Report.LAYERS)
        metrics["optim/lr"] = lr
        metrics["optim/grad_norm"] = float(norm)
        if self._clock is not None:
            metrics |= self._clock.read()
        return StepResult(metrics, skipped)

    def _accumulate_and_update(
        self,
        batches: Sequence[PackedBatch],
        scales: LossScales,
        report: Report,
        before_update: Callable[[], None],
    ) -> tuple[StepReport, torch.Tensor]:
        """What the micro-batches report, and this rank's loss as it came out of the model; without a room 0."""
        collected = StepReport(self._config.model, self._loss_groups)
        token_losses = report is not Report.NONE and bool(self._loss_groups)
        part: Callable[[Part], AbstractContextManager[None]] = _untimed
        if self._clock is not None and report is not Report.NONE:
            self._clock.begin_step()
            part = self._clock.part
        loss = torch.zeros((), device=self._device)
        if self._room is not None:
            self._room.begin_step()
        self._model.begin_step()
        for start in range(0, len(batches), self._in_flight):
            is_last = start + self._in_flight >= len(batches)
            # Steps may have different numbers of micro-batches, of which DeepSpeed's own count knows nothing.
            self._engine.set_gradient_accumulation_boundary(is_last)
            with part("forward"):
                in_flight = [batch.to(self._device) for batch in batches[start : start + self._in_flight]]
                outputs = self._engine(in_flight, scales, token_losses=token_losses)
            total = torch.stack([output.total for output in outputs]).sum()
            if self._room is not None:
                loss += total.detach()
                total = self._room.spoil(total)
            # In this thread: another one would take turns with it at the interpreter, a quarter of the host's time.
            with part("backward"), torch.autograd.set_multithreading_enabled(False):
                self._engine.backward(total * self._loss_factor, scale_wrt_gas=False)
            if report is not Report.NONE:
                for output, batch in zip(outputs, in_flight, strict=True):
                    collected.add(output, batch)
                if is_last:
                    collected.begin_reduce(self._sum_over_ranks)
            # Or the graph of these micro-batches would live through the forward pass of the next.
            outputs.clear()
            del total
            if is_last:
                before_update()
            # Only the step's last call, at the gradient-accumulation boundary, clips, updates the weights and clears
            # the gradients; the calls before it do none of that.
            with part("optimizer"):
                self._engine.step()
        return collected, loss

    def _outcome(self) -> tuple[float | torch.Tensor, bool]:
        """Gradient norm of the step that was just taken, and whether it was skipped."""
        if self._one_pass:
            norm, skipped = self._zero.outcome()
            return norm, skipped
        return self._engine.get_global_grad_norm(), bool(self._zero.overflow)

    def _makes_room(self, loss: torch.Tensor) -> bool:
        """Whether a skipped step is worth repeating: for want of room for experts' rows, of which there is more now.

        All ranks agree. Rows without room are left out, so the model's loss is finite nevertheless; where it is not,
        the routing behind it is of numbers that are not finite either and says nothing of the room that is needed.

        Args:
            loss: this rank's, of all micro-batches.
        """
        if self._room is None:
            return False
        needed = torch.stack([self._room.largest, (~torch.isfinite(loss)).long()])
        dist.all_reduce(needed, op=dist.ReduceOp.MAX)
        rows, diverged = needed.tolist()
        if diverged or rows <= self._room.rows:
            return False
        before, self._room.rows = self._room.rows, expert_room(self._config.model, self._layout, rows)
        get_logger().warning(
            "parallel.token_exchange: a rank's experts got %d rows in a layer and have room for %d; "
            "the step is repeated with room for %d",
            rows,
            before,
            self._room.rows,
        )
        return True

    def eval_loss(self, batches: Sequence[PackedBatch]) -> tuple[float, int]:
        """Mean next-token loss in nats over all ranks' ``batches`` and the number of targets."""
        self._engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        with torch.no_grad():
            for batch in batches:
                sums[0] += self._model.next_token_nll(batch.to(self._device)).double()
                sums[1] += batch.num_targets[0]
        total, count = self._sum_over_ranks(sums).tolist()
        return total / max(count, 1), int(count)

    def continue_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        end_token_id: int | None,
        max_batch_tokens: int,
    ) -> list[Continuation]:
        """Text of the model as it is; every rank computes all of it, since each may have weights that others need."""
        self._engine.eval()
        return continue_prompts(
            self._model,
            prompts,
            sampling,
            end_token_id=end_token_id,
            max_batch_tokens=max_batch_tokens,
            device=self._device,
            agree=self._of_first_rank,
        )

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of the training state."""
        if self._in_buckets:
            self._zero.wait_for_weights()
        return self._state.fragments()

    def load_state(self, read: ReadFragment, optimizer_step: int) -> None:
        """Fill weights, master weights and moments from a checkpoint of any layout."""
        self._state.load(read, optimizer_step)

    def _wait_for_weights_in_forward(self) -> None:
        """Let each part of the model wait for its own weights only, so that the others are gathered meanwhile."""
        model = self._model
        for part in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head, model.mtp):
            if part is not None:
                buckets = self._zero.buckets_of(part)
                part.register_forward_pre_hook(lambda *_, buckets=buckets: self._zero.wait_for_weights(buckets))

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        if self._world_size > 1:
            dist.all_reduce(values)
        return values

    def _of_first_rank(self, values: torch.Tensor) -> torch.Tensor:
        if self._world_size > 1:
            dist.broadcast(values, src=0)
        return values


def _untimed(name: Part) -> AbstractContextManager[None]:
    return _NOTHING


def _wrap(
    config: Config,
    model: Qwen3NextForCausalLM,
    table: Sequence[ParamSpec],
    *,
    device: torch.device,
    num_passes: int,
    layout: Layout,
) -> deepspeed.DeepSpeedEngine:
    """Build AdamW over DeepSpeed's kind of groups and hand the model to DeepSpeed."""
    quiet_start()
    in_buckets, offloaded = layout.sums_in_buckets, layout.offload_optimizer
    groups = bucketed_groups(
        parameter_groups(model, table, config.optimizer),
        max_numel=BUCKET_NUMEL if in_buckets else _GROUP_NUMEL,
    )
    # Updates in host memory take as long as they read and write it: once over it, not once for each operation.
    fused = device.type == "cuda" or offloaded
    update = select_adamw_update(config.kernels, device) if layout.updates_in_one_pass else None
    optimizer = build_adamw(groups, config.optimizer, fused=fused, update=update)
    # Under ZeRO-3 a layer's weights are gathered and its gradients reduced together, also on a rank whose experts
    # received no token. By itself DeepSpeed does so for each of its twenty modules, at 6 ms more of the
    # host's time a layer and micro-batch.
    set_z3_leaf_modules(model, [DecoderLayer])
    partitioned = GradientBucketOptimizer if in_buckets else PartitionedOptimizer
    with patched_optimizers(partitioned, PartitionedParameterOptimizer):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, num_passes=num_passes, in_buckets=in_buckets),
            dist_init_required=False if deepspeed.comm.is_initialized() else None,
        )
    assert engine.has_moe_layers, "DeepSpeed did not recognise the expert layers"
    set_group_timeouts(config.run.peer_timeout_s)
    order_by_one_stream(get_accelerator(), is_ordered=config.parallel.zero_stage == 3)
    if config.parallel.zero_stage == 3:
        gather_one_by_one(model.parameters())
    return engine
