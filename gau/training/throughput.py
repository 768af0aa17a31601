"""How fast a run is: its clock, and the share of what the chips could do (model FLOPs utilisation)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

# Dense bfloat16 peak in FLOP/s of one JAX device, by a piece of its `device_kind`; vendors' data sheets.
PEAK_FLOPS = {
    'H200': 989e12,  # NVIDIA H200 SXM data sheet
    'H100': 989e12,  # NVIDIA H100 SXM data sheet
    'H100 PCIe': 756e12,  # NVIDIA H100 data sheet, without sparsity
    'L40S': 362e12,  # NVIDIA L40S data sheet, without sparsity
    'A100': 312e12,  # NVIDIA A100 data sheet
    'L4': 121e12,  # NVIDIA L4 data sheet, without sparsity
    'TPU v2': 22.5e12,  # 45 TFLOP/s a chip, a device is one of its two cores; Google Cloud TPU documentation
    'TPU v3': 61.5e12,  # 123 TFLOP/s a chip, two devices; the same
    'TPU v4': 275e12,  # the same
    'TPU v5 lite': 197e12,  # v5e; the same
    'TPU v5': 459e12,  # v5p; the same
    'TPU v6 lite': 918e12,  # v6e; the same
}


def peak_flops(device: jax.Device | None = None) -> float | None:
    """Returns the peak of one device in bfloat16 FLOP/s; None where the chip is unknown, as on a CPU."""
    return peak_flops_of((device or jax.devices()[0]).device_kind)


def peak_flops_of(kind: str) -> float | None:
    """Returns the same of a `device_kind`."""
    # Longest name first: "TPU v5 lite" is not a "TPU v5".
    return next((PEAK_FLOPS[name] for name in sorted(PEAK_FLOPS, key=len, reverse=True) if name in kind), None)


def training_mfu(*, flops_per_token: float, tokens_per_second: float, devices: int) -> float | None:
    """Share of the peak of all devices that training uses; None where the chip is unknown.

    Args:
      flops_per_token: of one forward pass; the backward pass counts twice that, recomputation is not counted.
      tokens_per_second: of the whole run, over all devices.
      devices: how many there are.
    """
    peak = peak_flops()
    if peak is None:
        return None
    return 3 * flops_per_token * tokens_per_second / (peak * devices)


class Clock:
    """Seconds a step, over the steps since the last log line, without the time spent in evaluation and saving."""

    def __init__(self, step: int):
        """Starts at `step`."""
        self._start = self._last = (step, None)
        self._pause = 0.0
        self._recent: dict[str, float | None] = {'tokens_per_second': None, 'step_seconds': None}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in this context does not count."""
        began = time.monotonic()
        yield
        self._pause += time.monotonic() - began

    def tick(self, step: int, tokens_per_step: int) -> dict[str, float | None]:
        """Marks a finished step; returns the speed since the window began."""
        now = time.monotonic() - self._pause
        if self._start[1] is None:
            # The first step compiles; the window begins at its end.
            self._start = (step, now)
        self._last = (step, now)
        steps = self._last[0] - self._start[0]
        if steps:
            seconds = (self._last[1] - self._start[1]) / steps
            self._recent = {'tokens_per_second': tokens_per_step / seconds, 'step_seconds': seconds}
        return self._recent

    def window(self, step: int, tokens_per_step: int) -> dict[str, float | None]:
        """Returns the speed of the window and begins the next one."""
        self._start = self._last
        return self._recent
