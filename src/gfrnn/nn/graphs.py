"""The fused steps as CUDA graphs: one launch for all kernels of many steps, forward and back.

A graph reads and writes memory of its own: a call copies into it what it is given (weights too, in the products' type,
so that graphs know nothing of where a parameter lies), and no other call gets it until the last gradient of this one is
made. A shape is captured when it comes the second time.

Legend: as in steps.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from gfrnn.nn.fused import FusedSteps, FusedTrace, Left
from gfrnn.nn.gradients import Slopes
from gfrnn.nn.inputs import InputPart
from gfrnn.nn.plan import LayerWeights, Plan

_MOST = 8  # graphs of one memory: shapes that a module is called with, each as large as what backward needs
_CAPTURING = threading.Lock()
Found = TypeVar("Found")


class Graphs:
    """Of one module. Copies of the module start without."""

    def __init__(self) -> None:
        self.free: dict[Any, list[_Memory]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    @staticmethod
    def usable(device: torch.device) -> bool:
        """Whether calls can be graphs: not within somebody else's."""
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def take(
        self,
        plan: Plan,
        weights: list[LayerWeights],
        mask_LHB: Tensor | None,
        lengths_B: Tensor | None,
        dtype: torch.dtype,
        *,
        backward: bool,
    ) -> CapturedSteps:
        """What runs one call with these weights. backward: whether it will be asked for."""
        plan, device = dataclasses.replace(plan, recompute=0), weights[0].bias.device
        # what one stream frees another may not use before the first has come to that point: each has its own
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        free = self.free.setdefault((plan, dtype, device, stream), [])
        with _ordinary():
            if free:
                memory = free.pop()
                memory.left.load(weights)
            else:
                memory = _Memory(plan, weights, dtype)
        return CapturedSteps(memory, free, mask_LHB, lengths_B, backward=backward)


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    """Tensors of inference mode could not be written to outside of it."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


class _Memory:
    """The weights of a call, and the graphs that read them."""

    def __init__(self, plan: Plan, weights: list[LayerWeights], dtype: torch.dtype):
        self.plan, self.dtype = plan, dtype
        self.left = Left(plan, weights, plan.compute_dtype or dtype)
        self.graphs: dict[Any, _Graph | None] = {}
        """By shape, from the one whose use is longest ago; None of one that was seen once."""

    def graph(
        self, x: InputPart, steps: range, h_LHB: Tensor, mask_LHB: Tensor | None, lengths_B: Tensor | None
    ) -> _Graph | None:
        """For so many steps of such input; None the first time: it may be the last."""
        symbols = x.columns.shape[1] if x.symbols_TB is not None else None
        key = (len(steps), h_LHB.shape, symbols, x.scale_TB is None, mask_LHB is None, lengths_B is None, *_products())
        seen = key in self.graphs
        graph = self.graphs.pop(key, None)
        if seen and graph is None:
            graph = _Graph(self, x, len(steps), h_LHB, mask_LHB, lengths_B)
        self.graphs[key] = graph
        while sum(kept is not None for kept in self.graphs.values()) > _MOST:
            del self.graphs[next(key for key, kept in self.graphs.items() if kept is not None)]
        return graph


def _products() -> tuple[Any, ...]:
    """What a product's operands are rounded to, by what the user has set: a graph keeps to it."""
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return autocast, torch.backends.cuda.matmul.fp32_precision


class CapturedSteps:
    """As steps.Steps: runs one call's steps, and back. Its memory is free for another call when nobody holds it."""

    def __init__(
        self,
        memory: _Memory,
        free: list[_Memory],
        mask_LHB: Tensor | None,
        lengths_B: Tensor | None,
        *,
        backward: bool,
    ):
        self.memory, self.free, self.needs_backward = memory, free, backward
        self.mask_LHB, self.lengths_B = mask_LHB, lengths_B
        self.launched = FusedSteps(memory.plan, memory.left, mask_LHB, lengths_B, memory.dtype)

    def __del__(self) -> None:
        self.free.append(self.memory)

    def forward(self, x: InputPart, steps: range, h_LHB: Tensor, c_LHB: Tensor | None) -> CapturedTrace | FusedTrace:
        """As Steps.forward. The trace is valid until the next."""
        with _ordinary():
            graph = self.memory.graph(x, steps, h_LHB, self.mask_LHB, self.lengths_B)
            if graph is None:
                return self.launched.forward(x, steps, h_LHB, c_LHB)
            if self.needs_backward:  # now: little else lies in memory yet
                graph.capture_backward()
            graph.forward(x, steps, h_LHB, c_LHB, self.mask_LHB, self.lengths_B)
            return CapturedTrace(steps, graph.trace.hs_TLHB, graph.trace.cs_TLHB, graph.trace.g_TLLB, graph)

    def backward(
        self, trace: CapturedTrace | FusedTrace, d_y_TBY: Tensor, d_h_LHB: Tensor, d_c_LHB: Tensor, _: object = None
    ) -> tuple[Slopes, Tensor, Tensor]:
        """As Steps.backward. The slopes are valid until the next."""
        if isinstance(trace, FusedTrace):
            return self.launched.backward(trace, d_y_TBY, d_h_LHB, d_c_LHB)
        slopes, d_h_LHB, d_c_LHB = trace.graph.backward(d_y_TBY, d_h_LHB, d_c_LHB)
        return slopes._replace(owner=self), d_h_LHB.clone(), d_c_LHB.clone()


@dataclasses.dataclass
class CapturedTrace:
    """What the graph of some steps leaves for that of their backward."""

    steps: range
    hs_TLHB: Tensor
    cs_TLHB: Tensor
    g_TLLB: Tensor | None
    graph: _Graph


class _Graph:
    """So many steps forward, and back, with the memory that they read and write."""

    def __init__(
        self,
        memory: _Memory,
        x: InputPart,
        T: int,
        h_LHB: Tensor,
        mask_LHB: Tensor | None,
        lengths_B: Tensor | None,
    ):
        plan, new = memory.plan, h_LHB.new_zeros
        L, H, B = h_LHB.shape
        self.x = InputPart(
            torch.zeros_like(x.columns) if x.symbols_TB is not None else new(len(x.columns), T, B),
            torch.zeros_like(x.symbols_TB[:T]) if x.symbols_TB is not None else None,
            torch.zeros_like(x.scale_TB[:T]) if x.scale_TB is not None else None,
        )
        self.h_LHB, self.c_LHB = new(L, H, B), new(L, H, B) if plan.has_cell else None
        self.mask_LHB = torch.zeros_like(mask_LHB) if mask_LHB is not None else None
        self.lengths_B = torch.zeros_like(lengths_B) if lengths_B is not None else None
        self.runner = FusedSteps(plan, memory.left, self.mask_LHB, self.lengths_B, memory.dtype)
        self.trace, self.replay_forward = capture(
            lambda: self.runner.forward(self.x, range(T), self.h_LHB, self.c_LHB), h_LHB.device
        )
        self.found: tuple[Slopes, Tensor, Tensor] | None = None

    def capture_backward(self) -> None:
        """At its first use."""
        if self.found is None:
            plan, (L, H, B), T = self.runner.plan, self.h_LHB.shape, self.x.sizes[0]
            self.d_y_TBY = self.h_LHB.new_zeros(T, B, H * (L if plan.output_skips else 1))
            self.d_h_LHB, self.d_c_LHB = torch.zeros_like(self.h_LHB), torch.zeros_like(self.h_LHB)
            self.found, self.replay_backward = capture(
                lambda: self.runner.backward(self.trace, self.d_y_TBY, self.d_h_LHB, self.d_c_LHB), self.h_LHB.device
            )

    def forward(
        self,
        x: InputPart,
        steps: range,
        h_LHB: Tensor,
        c_LHB: Tensor | None,
        mask_LHB: Tensor | None,
        lengths_B: Tensor | None,
    ) -> FusedTrace:
        """From the state before the first of `steps`."""
        some = slice(steps.start, steps.stop)
        self.x.columns.copy_(x.columns[:, some] if x.symbols_TB is None else x.columns)
        for ours, given in (
            (self.x.symbols_TB, x.symbols_TB[some] if x.symbols_TB is not None else None),
            (self.x.scale_TB, x.scale_TB[some] if x.scale_TB is not None else None),
            (self.h_LHB, h_LHB),
            (self.c_LHB, c_LHB),
            (self.mask_LHB, mask_LHB),
            (self.lengths_B, lengths_B - steps.start if lengths_B is not None else None),  # the graph counts from 0
        ):
            if ours is not None and given is not None:
                ours.copy_(given)
        self.replay_forward()
        return self.trace

    def backward(self, d_y_TBY: Tensor, d_h_LHB: Tensor, d_c_LHB: Tensor) -> tuple[Slopes, Tensor, Tensor]:
        """Of the steps that `forward` ran last."""
        self.capture_backward()
        assert self.found is not None
        self.d_y_TBY.copy_(d_y_TBY)
        self.d_h_LHB.copy_(d_h_LHB)
        self.d_c_LHB.copy_(d_c_LHB)
        self.replay_backward()
        return self.found


def capture(function: Callable[[], Found], device: torch.device) -> tuple[Found, Callable[[], None]]:
    """What `function` returns, and a call that computes it again, in the same memory from the same memory."""
    with _CAPTURING, torch.cuda.device(device):  # a process may do it once at a time
        here = torch.cuda.current_stream()
        aside = _aside(device, here.cuda_stream)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            function()  # what is compiled and loaded at its first use cannot be captured
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):  # others may use the device
            found = function()
    return found, graph.replay


@functools.cache
def _aside(device: torch.device, stream: int) -> torch.cuda.Stream:
    """Where graphs that run on a stream are captured: they keep the memory that cuBLAS works in on this one."""
    return torch.cuda.Stream(device)
