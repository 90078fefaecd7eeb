"""What a process sends, and how long it waits: every collective, seen where DeepSpeed and this package both call it.

DeepSpeed's own comms logger leaves out what does not go through deepspeed.comm, and counts what it sees in other units
from one collective to the next.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


@dataclass
class Traffic:
    """Of one kind of collective."""

    calls: int = 0
    bytes: int = 0
    """Of whole messages: what is reduced, what all have after an all-gather, what each had before a reduce-scatter."""


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


_MESSAGES: dict[str, tuple[str, Callable[[Sequence[Any]], int]]] = {
    "all_reduce": ("all_reduce", lambda given: _size(given[0])),
    "all_reduce_coalesced": ("all_reduce", lambda given: _size(*given[0])),
    "reduce": ("reduce", lambda given: _size(given[0])),
    "broadcast": ("broadcast", lambda given: _size(given[0])),
    "all_gather": ("all_gather", lambda given: _size(*given[0])),
    "all_gather_into_tensor": ("all_gather", lambda given: _size(given[0])),
    "reduce_scatter": ("reduce_scatter", lambda given: _size(*given[1])),
    "reduce_scatter_tensor": ("reduce_scatter", lambda given: _size(given[1])),
    "all_to_all_single": ("all_to_all", lambda given: _size(given[1])),
}
"""By function of torch.distributed: the kind, and the bytes of its message from its tensors, in their order."""

_NO_TENSORS = ("group", "op", "async_op", "src", "dst")


class Watch:
    """While `on`: counts this process' collectives by kind, and how long they keep it waiting, barriers too.

    Make it before the process group: DeepSpeed keeps some of the functions from then on. It stays until the end.
    """

    def __init__(self) -> None:
        self.on = False
        self.traffic: dict[str, Traffic] = {}
        self.blocked = 0.0
        """Seconds in calls that return when they are done, and in `wait` for those that do not. On CUDA, where both
        return before, this says little: see exposed.py."""
        self._inside = False
        for name, (kind, message) in _MESSAGES.items():
            setattr(dist, name, self._watched(getattr(dist, name), kind, message))
        dist.barrier = self._timed(dist.barrier)
        # stage 3 gathers several parameters at a time, and then waits for them together
        manager = getattr(distributed_c10d, "_CoalescingManager", None)
        if manager is not None:
            manager.wait = self._timed(manager.wait)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Adds to `blocked`, once where one collective is made of others."""
        if not self.on or self._inside:
            yield
            return
        self._inside, begin = True, time.perf_counter()
        try:
            yield
        finally:
            self._inside = False
            self.blocked += time.perf_counter() - begin

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            with self._waiting():
                return function(*given, **named)

        return call

    def _watched(
        self, function: Callable[..., Any], kind: str, message: Callable[[Sequence[Any]], int]
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            if not self.on:
                return function(*given, **named)
            traffic = self.traffic.setdefault(kind, Traffic())
            traffic.calls += 1
            traffic.bytes += message([*given, *(v for key, v in named.items() if key not in _NO_TENSORS)])
            with self._waiting():
                handle = function(*given, **named)
            return None if handle is None else _Handle(handle, self._timed(handle.wait))

        return call


class _Handle:
    """Of a collective that goes on: as torch's, but `wait` is timed."""

    def __init__(self, handle: Any, wait: Callable[..., Any]) -> None:
        self._handle, self.wait = handle, wait

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
