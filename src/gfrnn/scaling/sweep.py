"""The network there and then: collectives of 1 KB to 64 MB, each timed on its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from gfrnn.scaling.records import Timed

SIZES = tuple(2**power for power in range(10, 27, 2))
"""Bytes of whole messages."""
KINDS = ("all_reduce", "reduce", "all_gather", "reduce_scatter")
_FEWEST, _MOST = 3, 20  # calls of one size


def sweep(device: torch.device, *, nodes: int, seconds: float) -> list[Timed]:
    """Times all kinds, the small messages first, for about so many seconds; collective.

    What the next size would take is known from the last: one that would overrun is left out, and all larger ones.
    """
    world_size = dist.get_world_size()
    found: list[Timed] = []
    if world_size == 1:
        return found
    budget = dict.fromkeys(KINDS, seconds / len(KINDS))
    for kind in KINDS:
        for size in SIZES:
            elements = -(-size // (4 * world_size)) * world_size  # equal shares
            call = _call(kind, elements, device)
            first = _slowest([_time(call, device)], device)[0]
            calls = max(_FEWEST, min(_MOST, int(budget[kind] / 4 / first)))
            times = _slowest([_time(call, device) for _ in range(calls)], device)
            found.append(Timed(kind, 4 * elements, world_size, nodes, statistics.median(times)))
            budget[kind] -= first + sum(times)
            if 4 * first * _FEWEST > budget[kind]:  # all processes have the same figures
                break
    return found


def _call(kind: str, elements: int, device: torch.device) -> Callable[[], object]:
    whole = torch.zeros(elements, device=device)
    share = torch.zeros(elements // dist.get_world_size(), device=device)
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, share)
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(share, whole)
    if kind == "reduce":
        return lambda: dist.reduce(whole, dst=0)
    return lambda: dist.all_reduce(whole)


def _time(call: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _slowest(times: list[float], device: torch.device) -> list[float]:
    """Of each call, the process it took longest."""
    slowest = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    found: list[float] = slowest.tolist()
    return found
