"""From a running trainer to a Checkpoint and back, whatever the ZeRO stage and the number of processes.

Every rank calls all of it: what gathers is collective, and weights, moments and averages arrive on rank 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from gfrnn.config import OptimizerSettings, RunFailed, Settings, UserError
from gfrnn.runs import Checkpoint, RunFolder, TensorsByName
from gfrnn.training.compression import Exchange, TensorsByKey
from gfrnn.training.shards import Average, Shards

_PREFIX = "model."  # of parameter names in an objective; a checkpoint has those of its model


@dataclass
class Window:
    """Sums since the last logged line."""

    figures: dict[str, float] = field(default_factory=dict)
    """Of the updates' means."""
    characters: int = 0
    flops: int = 0
    updates: int = 0
    seconds: float = 0.0
    overhead_seconds: float = 0.0
    """Of those, spent on fetching batches and on writing the line before this window."""


@dataclass
class Position:
    """Where a run is: plain values, kept in trainer.json."""

    step: int = 0
    """Updates done."""
    wall_clock_s: float = 0.0
    """Seconds of training so far, restarts included."""
    train_seconds: float = 0.0
    """Of those, in updates: no start, validation, checkpoint or log line. What a kill lost is not counted."""
    characters: int = 0
    """Read so far."""
    best: dict[str, float] = field(default_factory=dict)
    """Figures of the best validation; none before the first."""
    best_step: int = 0
    without_best: int = 0
    """Validations since the best one."""
    rate_scale: float = 1.0
    mean_norm: float = 0.0
    """Of ExplosionGuard."""
    window: Window = field(default_factory=Window)
    noise_spread: float = 0.0
    noise_signal: float = 0.0
    """Of NoiseScale."""
    average_count: int = 0
    optimizer_step: int = 0


def gather_checkpoint(
    position: Position,
    settings: Settings,
    shards: Shards,
    average: Average | None,
    exchange: Exchange,
    state: TensorsByName,
    values: dict[str, Any],
    mlflow_run_id: str | None,
    corpus_md5: str,
) -> Checkpoint:
    """Everything that must survive a restart; counts of the optimizer and the average go into `position` first.

    state, values: the task's.
    """
    moments, position.optimizer_step = shards.optimizer_state(on_all_ranks=False)
    averages = None
    if average is not None and average.count:
        position.average_count = average.count
        averages = _model_names(average.weights(on_all_ranks=False))
    return Checkpoint(
        weights=_model_names(shards.weights(on_all_ranks=False)),
        optimizer={key: _model_names(full) for key, full in moments.items()},
        averages=averages,
        state={**state, **_flat(exchange.gather())},
        trainer={
            "position": dataclasses.asdict(position),
            "settings": settings.to_json(),
            "mlflow_run_id": mlflow_run_id,
            "corpus_md5": corpus_md5,
            **values,
        },
    )


def write_checkpoint(
    run: RunFolder, saved: Checkpoint, step: int, *, best: bool, keep_last: int, device: torch.device
) -> None:
    """Rank 0 writes what gather_checkpoint gave it; every rank raises if that fails."""
    with on_first_process("write the checkpoint", device) as first:
        if first:
            run.save(saved, step, best=best, keep_last=keep_last)


@contextmanager
def on_first_process(what: str, device: torch.device) -> Iterator[bool]:
    """For a block that only rank 0 works in: yields whether this is it; every rank raises if the block fails there.

    Of a full disk, say, the others must hear, and not of a lost connection.
    """
    failure = None
    try:
        yield dist.get_rank() == 0
    except (OSError, UserError) as error:
        failure = error
    failures = torch.tensor(float(failure is not None), device=device)
    dist.all_reduce(failures)
    if failures:
        raise failure or RunFailed(f"the first process could not {what}")


def restore(
    saved: Checkpoint, settings: Settings, shards: Shards, average: Average | None, exchange: Exchange
) -> Position:
    """Loads weights, averages, what was left to be sent and, if it is of the settings' kind, the optimizer's state.

    No communication.

    Returns where the run was that wrote the checkpoint.
    """
    position = _position_of(saved)
    shards.load_weights(_engine_names(saved.weights))
    if _has_state_of(saved.trainer["settings"]["optimization"], settings.optimization):
        moments = {key: _engine_names(full) for key, full in saved.optimizer.items()}
        shards.load_optimizer_state(moments, position.optimizer_step)
    if average is not None and saved.averages is not None:
        average.load(_engine_names(saved.averages), position.average_count)
    exchange.load(_unflat(saved.state))
    return position


def _has_state_of(then: dict[str, Any], now: OptimizerSettings) -> bool:
    """Whether the optimizer of a checkpoint's settings keeps what this one does. RMSProp may do without momentum."""
    kept = then["optimizer"], then["optimizer"] == "rmsprop" and then["momentum"] > 0
    return kept == (now.optimizer, now.optimizer == "rmsprop" and now.momentum > 0)


def _position_of(saved: Checkpoint) -> Position:
    """Raises UserError if there is none in it."""
    try:
        values = saved.trainer["position"]
        return Position(**{**values, "window": Window(**values["window"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"trainer.json of the checkpoint has no position, or another version's ({error})") from error


def best_weights(shards: Shards, average: Average | None) -> TensorsByName:
    """What validation uses, by name, on every rank: the averages once there are any, else the weights."""
    return _model_names((average if average is not None and average.count else shards).weights())


def _flat(kept: TensorsByKey) -> TensorsByName:
    """An exchange's state as it lies among the carried one: error/rnn.weight_ih_l0 and so on."""
    return {f"{key}/{name}": t for key, full in kept.items() for name, t in _model_names(full).items()}


def _unflat(state: TensorsByName) -> TensorsByKey:
    kept: TensorsByKey = {}
    for full_name, tensor in state.items():
        key, slash, name = full_name.partition("/")
        if slash:
            kept.setdefault(key, {})[_PREFIX + name] = tensor
    return kept


def _model_names(full: TensorsByName) -> TensorsByName:
    return {name.removeprefix(_PREFIX): tensor for name, tensor in full.items()}


def _engine_names(full: TensorsByName) -> TensorsByName:
    return {_PREFIX + name: tensor for name, tensor in full.items()}
