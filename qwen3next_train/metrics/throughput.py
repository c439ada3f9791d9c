"""Speed of the run: FLOP/s, MFU, tokens/s, time left."""

from __future__ import annotations

import statistics
from collections import deque

_ETA_WINDOW_STEPS = 50


class Throughput:
    """Turns each step's work and wall time into the ``perf/*`` metrics.

    Args:
        device_peak_flops: peak FLOP/s of one device in the training dtype, None when unknown.
        num_devices: devices of the run; on CPU, processes.
        flops_total: model FLOPs earlier attempts have spent (from the checkpoint).
    """

    def __init__(self, device_peak_flops: float | None, num_devices: int, *, flops_total: int = 0) -> None:
        assert num_devices > 0
        assert device_peak_flops is None or device_peak_flops > 0
        self._device_peak_flops = device_peak_flops
        self._num_devices = num_devices
        self._flops_total = flops_total
        self._recent_step_times_s: deque[float] = deque(maxlen=_ETA_WINDOW_STEPS)

    @property
    def flops_total(self) -> int:
        """Model FLOPs spent so far, earlier attempts included; goes into the checkpoint."""
        return self._flops_total

    def record_step(self, *, flops: int, tokens: int, step_time_s: float, data_wait_s: float) -> dict[str, float]:
        """Account for one step; to be called for every step, logged or not.

        Args:
            flops: model FLOPs of the step, all ranks.
            tokens: tokens of the global batch.
            step_time_s: wall time of the step, more than 0.
            data_wait_s: part of it spent waiting for data.

        Returns:
            The step's ``perf/*`` metrics; ``perf/mfu`` only when the device's peak is known.
        """
        assert step_time_s > 0
        self._flops_total += flops
        self._recent_step_times_s.append(step_time_s)
        flops_per_device_s = flops / (step_time_s * self._num_devices)
        metrics = {
            "perf/flops_per_step": flops,
            "perf/flops_total": self._flops_total,
            "perf/tflops_per_gpu": flops_per_device_s / 1e12,
            "perf/tokens_per_s": tokens / step_time_s,
            "perf/step_time_s": step_time_s,
            "perf/data_wait_s": data_wait_s,
        }
        if self._device_peak_flops is not None:
            metrics["perf/mfu"] = flops_per_device_s / self._device_peak_flops
        return metrics

    def eta_s(self, remaining_steps: int) -> float | None:
        """Seconds that ``remaining_steps`` will take at the median of recent steps, None before the first.

        The median leaves out what is not the usual step: compilation, a checkpoint, a validation.
        """
        if not self._recent_step_times_s:
            return None
        return remaining_steps * statistics.median(self._recent_step_times_s)
