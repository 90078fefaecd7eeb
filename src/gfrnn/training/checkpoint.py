"""From a running trainer to a Checkpoint and back, whatever the ZeRO stage and the number of processes.

All functions are collective: every rank calls them, rank 0 gets the result.
Legend: L layers, B rows of a micro-batch, R global rows, H units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gfrnn.data import Streams
from gfrnn.nn import LanguageModel, State
from gfrnn.runs import TensorsByName
from gfrnn.training.shards import Average, Shards

_PREFIX = "model."  # of parameter names in SegmentLoss; a checkpoint has those of LanguageModel


def model_names(full: TensorsByName) -> TensorsByName:
    return {name.removeprefix(_PREFIX): tensor for name, tensor in full.items()}


def engine_names(full: TensorsByName) -> TensorsByName:
    return {_PREFIX + name: tensor for name, tensor in full.items()}


def gather_weights(shards: Shards, average: Average | None, *, on_all_ranks: bool) -> TensorsByName:
    """The weights that validation and sampling use, by name: the averages once there are any, else the weights."""
    source = average if average is not None and average.count else shards
    return model_names(source.weights(on_all_ranks=on_all_ranks))


def gather_optimizer(shards: Shards) -> tuple[dict[str, TensorsByName], int]:
    """The optimizer's state by key and parameter name, and its count of steps; empty but on rank 0."""
    moments, step = shards.optimizer_state(on_all_ranks=False)
    return {key: model_names(full) for key, full in moments.items()}, step


def gather_state(states: Sequence[State], streams: Streams) -> TensorsByName:
    """The carried state by global row: h (and c) [L, R, H]."""
    full: TensorsByName = {}
    for key, parts in _by_key(states).items():
        L, _, H = parts[0].shape
        whole = parts[0].new_zeros(L, streams.rows, H)
        for micro, part in enumerate(parts):
            rows, own = _own_rows(streams, micro)
            whole[:, rows] = part[:, own]
        dist.all_reduce(whole)  # every row belongs to one process, the others have zeros
        full[key] = whole.cpu()
    return full


def scatter_state(
    full: TensorsByName, model: LanguageModel, streams: Streams, accumulation: int, device: torch.device
) -> list[State]:
    """The inverse of gather_state: each micro-batch's slice; padding rows start at zero."""
    states = []
    for micro in range(accumulation):
        state = model.zero_state(streams.rows_per_micro, device)
        rows, own = _own_rows(streams, micro)
        for key, (part,) in _by_key([state]).items():
            part[:, own] = full[key].to(device)[:, rows]
        states.append(state)
    return states


def _by_key(states: Sequence[State]) -> dict[str, list[Tensor]]:
    if isinstance(states[0], tuple):
        return {"h": [s[0] for s in states], "c": [s[1] for s in states]}
    return {"h": [s for s in states if isinstance(s, Tensor)]}


def _own_rows(streams: Streams, micro: int) -> tuple[Tensor, Tensor]:
    """Global rows of a micro-batch, and their places in it, padding left out."""
    own = streams.weights(micro) > 0
    return streams.micro_rows(micro)[own], own
