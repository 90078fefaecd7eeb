"""Full fp32 weights and optimizer state, by parameter name, out of and into a DeepSpeed engine of any ZeRO stage.

This is the one module that knows DeepSpeed's private attributes (0.19.8, pinned); its test tells when they change.

The idea: whatever the stage, a rank updates a list of local fp32 tensors ("flats"), and the torch optimizer keeps
its state per flat.

    stage 0     the parameters themselves, the same on every rank
    stages 1, 2 a group's parameters laid end to end (in DeepSpeed's order, with padding), cut into W equal slices;
                flat = this rank's slice
    stage 3     every parameter cut into W equal slices, the last ones padded; flat = this rank's slices of a sub-group

A `Piece` says which stretch of which parameter lies where in which flat. Gathering fills the pieces into zeros and
adds up over the ranks; scattering copies slices and needs no communication. What is shaped like the flats (moments,
averages) travels the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from gfrnn.training.compression import Exchange

_BUCKET = 2**24  # elements an all-reduce when gathering: 64 MiB


class Piece(NamedTuple):
    """`length` elements of parameter `name`, from `start` of its flattened form, lie in flat `flat` at `offset`."""

    name: str
    flat: int
    offset: int
    start: int
    length: int


class Shards:
    """The fp32 master weights of an engine and what its optimizer keeps about them.

    Full tensors are fp32, on the CPU, in the parameter's shape. Whatever gathers is collective: all ranks call it. With
    `on_all_ranks=False` only rank 0 keeps what was gathered and the others return an empty dict.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.parameters: dict[str, Tensor] = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        # A parameter's own shape is (0,) at stage 3.
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.parameters.items()}
        self.flats, self.pieces = _layout(engine, {id(p): name for name, p in self.parameters.items()})

    # ------------------------------------------------------------------------------------------------ weights

    def weights(self, *, on_all_ranks: bool = True) -> dict[str, Tensor]:
        """Every parameter, in full."""
        return self.gather(self.flats, on_all_ranks=on_all_ranks)

    @torch.no_grad()
    def load_weights(self, full: Mapping[str, Tensor]) -> None:
        """Set masters and model copies from full weights, the same on every rank. Optimizer state stays."""
        self.scatter(full, self.flats)
        if self.engine.zero_optimization_stage() == 3:
            z = self.engine.optimizer
            for copies, flat in zip(z.fp16_partitioned_groups_flat, self.flats, strict=True):
                copies.data.copy_(flat.data)
        for name, parameter in self.parameters.items():
            if not hasattr(parameter, "ds_status") or parameter.ds_status.name == "AVAILABLE":
                parameter.data.copy_(full[name])

    # ---------------------------------------------------------------------------------------- optimizer state

    def optimizer_state(self, *, on_all_ranks: bool = True) -> tuple[dict[str, dict[str, Tensor]], int]:
        """Moments, {state key: {parameter: full tensor}}, and the optimizer's count of steps; ({}, 0) before the first.

        A parameter that never had a gradient has moments of zero.
        """
        state = self.engine.basic_optimizer.state
        known = [state[flat] for flat in self.flats if state.get(flat)]
        if not known:
            return {}, 0
        keys = sorted(key for key in known[0] if key != "step")
        moments = {
            key: self.gather(
                [state[flat][key] if state.get(flat) else torch.zeros_like(flat) for flat in self.flats],
                on_all_ranks=on_all_ranks,
            )
            for key in keys
        }
        return moments, max(int(entry["step"]) for entry in known)

    @torch.no_grad()
    def load_optimizer_state(self, moments: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """The inverse of optimizer_state, into any engine, fresh ones too. Learning rates are not in it."""
        state = self.engine.basic_optimizer.state
        state.clear()
        if not step:
            return
        for flat in self.flats:
            state[flat] = {"step": torch.tensor(float(step))} | {key: torch.zeros_like(flat) for key in moments}
        for key, full in moments.items():
            self.scatter(full, [state[flat][key] for flat in self.flats])

    # --------------------------------------------------------------------------------------------- the two ways

    @torch.no_grad()
    def gather(self, tensors: Sequence[Tensor], *, on_all_ranks: bool = True) -> dict[str, Tensor]:
        """Full tensors by parameter name from local ones, shaped and ordered as the flats."""
        keep = on_all_ranks or dist.get_rank() == 0
        device = self.engine.device
        full: dict[str, Tensor] = {}
        for names in self._buckets():
            starts, size = {}, 0
            for name in names:
                starts[name] = size
                size += self.shapes[name].numel()
            bucket = torch.zeros(size, device=device)
            for piece in self.pieces:
                if piece.name in starts:
                    first = starts[piece.name] + piece.start
                    source = tensors[piece.flat].view(-1)[piece.offset : piece.offset + piece.length]
                    bucket[first : first + piece.length].copy_(source)
            if self.engine.zero_optimization_stage() > 0:
                # All but one rank have zeros, so adding the bits as integers is exact, signs of zero and NaN included.
                dist.all_reduce(bucket.view(torch.int32))
            if keep:
                for name in names:
                    part = bucket[starts[name] : starts[name] + self.shapes[name].numel()]
                    full[name] = part.view(self.shapes[name]).to("cpu", copy=True)
        return full

    @torch.no_grad()
    def scatter(self, full: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> None:
        """Fill local tensors, shaped and ordered as the flats, from full ones; padding becomes zero."""
        for tensor in tensors:
            tensor.data.zero_()
        for piece in self.pieces:
            source = full[piece.name].reshape(-1)[piece.start : piece.start + piece.length]
            tensors[piece.flat].data.view(-1)[piece.offset : piece.offset + piece.length].copy_(source)

    def _buckets(self) -> Iterator[list[str]]:
        names: list[str] = []
        size = 0
        for name, shape in self.shapes.items():
            if names and size + shape.numel() > _BUCKET:
                yield names
                names, size = [], 0
            names.append(name)
            size += shape.numel()
        yield names


class Average:
    """A running average of the weights in fp32, kept in shards as the weights are: a rank averages what it updates.

    `decay` between 0 and 1: exponential, ``a += (1 - decay) (w - a)``; of fewer than 1 / (1 - decay) weights it is
    their mean, so that the first ones do not outlast their worth.
    `decay` None: arithmetic mean of all weights it has seen.
    """

    def __init__(self, shards: Shards, decay: float | None) -> None:
        self.shards, self.decay = shards, decay
        self.count = 0
        self.tensors = [torch.zeros_like(flat, requires_grad=False) for flat in shards.flats]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current weights; call it after an optimizer step."""
        self.count += 1
        weight = max(1 / self.count, 1 - self.decay if self.decay is not None else 0.0)
        torch._foreach_lerp_(self.tensors, [flat.data for flat in self.shards.flats], weight)

    def weights(self, *, on_all_ranks: bool = True) -> dict[str, Tensor]:
        """The average by parameter name, in full (zeros before the first update)."""
        return self.shards.gather(self.tensors, on_all_ranks=on_all_ranks)

    def load(self, full: Mapping[str, Tensor], count: int) -> None:
        """The inverse of (weights(), count)."""
        self.shards.scatter(full, self.tensors)
        self.count = count


def leave_gradients(engine: Any) -> None:
    """At stage 0: backward() leaves each process its own gradients from now on, for `step` to have them exchanged."""
    engine.enable_backward_allreduce = False


def leave_clipping(engine: Any) -> float:
    """At stage 0: engine.step() does not clip from now on; DeepSpeed would by the mean of the processes' own norms.

    Returns the norm that it would have clipped at, 0 for none.
    """
    clip: float = engine.gradient_clipping()
    engine._config.gradient_clipping = 0.0
    return clip


def step(engine: Any, exchange: Exchange | None = None) -> Tensor | None:
    """engine.step(), and at the accumulation boundary the global L2 norm of the averaged gradient before clipping.

    A 0-dim tensor: float() of it waits for the device. Where the gradient is not finite, stages 1 to 3 skip the update
    and the norm is infinite; at stage 0 the norm is not finite either, but the weights are lost. None between
    boundaries. exchange: what is done about the processes' gradients at stage 0, after `leave_gradients`; where it
    leaves them apart, the norm is this process's own, and so is the clipping.
    """
    boundary = engine.is_gradient_accumulation_boundary()
    sharded = engine.zero_optimization_stage() > 0
    norm = None
    if boundary and exchange is not None:
        exchange.reduce()
    if boundary and not sharded:  # averaged by backward() or the exchange; DeepSpeed does not keep the norm it clips by
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        if exchange is not None and exchange.clip:
            torch.nn.utils.clip_grads_with_norm_(engine.module.parameters(), exchange.clip, norm)
    engine.step()
    if boundary and exchange is not None:
        exchange.stepped()
    if boundary and sharded:
        norm = torch.as_tensor(engine.get_global_grad_norm() if engine.was_step_applied() else float("inf"))
    return norm


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """For all parameter groups, from the next step on."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = learning_rate


def _layout(engine: Any, names: Mapping[int, str]) -> tuple[list[Tensor], list[Piece]]:
    """The flats this rank updates, and the pieces in them. `names` goes from id(parameter) to name."""
    z, stage, rank = engine.optimizer, engine.zero_optimization_stage(), dist.get_rank()
    pieces: list[Piece] = []
    if stage == 0:
        flats = [p for group in z.param_groups for p in group["params"]]
        return flats, [Piece(names[id(p)], i, 0, 0, p.numel()) for i, p in enumerate(flats)]
    if stage == 3:
        flats = list(z.fp32_partitioned_groups_flat)
        for i, group in enumerate(z.fp16_groups):
            offset = 0
            for p in group:
                size = p.partition_numel()
                start = rank * size
                length = min(size, p.ds_numel - start)
                if length > 0:
                    pieces.append(Piece(names[id(p)], i, offset, start, length))
                offset += size
        return flats, pieces
    flats = list(z.single_partition_of_fp32_groups)
    for i, flat in enumerate(flats):
        first, last = rank * flat.numel(), (rank + 1) * flat.numel()  # of the group's parameters laid end to end
        for p, offset in zip(z.round_robin_bit16_groups[i], z.round_robin_bit16_offsets[i], strict=True):
            low, high = max(offset, first), min(offset + p.numel(), last)
            if low < high:
                pieces.append(Piece(names[id(p)], i, low - first, low - offset, high - low))
    return flats, pieces
