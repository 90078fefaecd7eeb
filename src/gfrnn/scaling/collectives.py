"""What a process sends: every collective it takes part in, seen where DeepSpeed and this package both call it.

DeepSpeed's own comms logger leaves out what does not go through deepspeed.comm, and counts what it sees in other units
from one collective to the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


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
    """Counts this process' collectives by kind, while `on`; barriers, which carry nothing, are left out.

    Make it before the process group: DeepSpeed keeps some of the functions from then on. It stays until the end.
    """

    def __init__(self) -> None:
        self.on = False
        self.traffic: dict[str, Traffic] = {}
        for name, (kind, message) in _MESSAGES.items():
            setattr(dist, name, self._watched(getattr(dist, name), kind, message))

    def _watched(
        self, function: Callable[..., Any], kind: str, message: Callable[[Sequence[Any]], int]
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            if self.on:
                traffic = self.traffic.setdefault(kind, Traffic())
                traffic.calls += 1
                traffic.bytes += message([*given, *(v for key, v in named.items() if key not in _NO_TENSORS)])
            return function(*given, **named)

        return call
