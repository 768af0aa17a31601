"""What the chips could do, and the share of it that a step uses (model FLOPs utilisation)."""

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
