"""What this machine can do, which model FLOP utilisation is measured against."""

from __future__ import annotations

import time

import torch


def gemm_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of a large product on this device now: the best of as many as fit into `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)

    def flops() -> float:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 2 * size**3 / (time.perf_counter() - start)

    flops()  # the first one loads what it needs
    best, begin = 0.0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        best = max(best, flops())
    return best
