"""What an update sends, by theory: from the ZeRO stage, the rest of the DeepSpeed config, and the parameters.

In words, for P parameters, W processes, k micro-batches, gradients of b bytes on the wire and weights of w:

    stage 0     all-reduce bP, once an update
    stage 1     the same, and all-gather wP, as each process has updated a slice. With use_multi_rank_bucket_allreduce
                false a reduce to the slice's owner in place of the all-reduce
    stage 2     as stage 1, but gradients at every micro-batch: kbP
    stage 3     reduce-scatter kbP, all-gather kwP; parameters of few elements stay whole between micro-batches: once

and at stage 0 with --compression, always in fp32:

    powersgd    all-reduce 4r(n + m) of a matrix [n, m], where that is less than 4nm; of the rest 4 an element
    topk        all-gather 8sWP for a share s: values and indices
    local       all-reduce 4P(1 + moments of the optimizer) every K updates

Left out: padding, and two scalars' worth an update (the gradient's norm; the loss and whether to stop).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gfrnn.config import Settings
from gfrnn.training.ds_config import stage_of

_PERSISTENT = 10**5  # elements up to which stage 3 keeps a parameter whole, by default
_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2}


def predicted(
    ds_config: dict[str, Any],
    parameters: Sequence[int],
    settings: Settings | None = None,
    *,
    shapes: Sequence[Sequence[int]] = (),
    world_size: int = 1,
) -> dict[str, int]:
    """Bytes of whole messages of an update, by kind of collective; of local updates a mean over updates.

    Args:
        ds_config: from resolve_ds_config. parameters: elements of each.
        settings: for its compression, none if left out; then also shapes: of each parameter (powersgd), and
            world_size: processes (topk).
    """
    if settings is not None and settings.communication.compression != "none":
        return _compressed(settings, parameters, shapes, world_size)
    zero, micro_batches = ds_config["zero_optimization"], ds_config["gradient_accumulation_steps"]
    width = 2 if any(ds_config.get(name, {}).get("enabled") for name in ("bf16", "fp16")) else 4
    gradients = sum(parameters) * _WIDTHS.get(ds_config.get("communication_data_type") or "", width)
    weights = sum(parameters) * width
    stage = stage_of(ds_config)
    if stage == 0:
        return {"all_reduce": gradients}
    if stage == 3:
        most = zero.get("stage3_param_persistence_threshold", zero.get("param_persistence_threshold", _PERSISTENT))
        kept = width * sum(size for size in parameters if size <= most)
        return {
            "reduce_scatter": micro_batches * gradients,
            "all_gather": micro_batches * (weights - kept) + kept,
        }
    reducing = "all_reduce" if zero.get("use_multi_rank_bucket_allreduce", True) else "reduce"
    return {reducing: gradients * (micro_batches if stage == 2 else 1), "all_gather": weights}


def _compressed(
    settings: Settings, parameters: Sequence[int], shapes: Sequence[Sequence[int]], world_size: int
) -> dict[str, int]:
    from gfrnn.training.compression import largest, low_rank  # torch, which a prediction does without

    c, o = settings.communication, settings.optimization
    if c.compression == "topk":
        return {"all_gather": 8 * largest(sum(parameters), c.compression_share) * world_size}
    if c.compression == "local":
        moments = 2 if o.optimizer != "rmsprop" else 2 + (o.momentum > 0)
        return {"all_reduce": 4 * sum(parameters) * (1 + moments) // c.local_updates}
    elements = 0
    for size, shape in zip(parameters, shapes, strict=True):
        sizes = low_rank(shape, c.compression_rank)
        elements += size if sizes is None else sizes[2] * (sizes[0] + sizes[1])
    return {"all_reduce": 4 * elements}


def sent(messages: dict[str, int], world_size: int) -> float:
    """Bytes that a process sends at least: a ring's, which no other way of sending is below.

    A reduce is one of many, each to another owner, so a process has all but its own share to send.
    """
    once = (world_size - 1) / world_size
    passes = {"all_reduce": 2.0}
    return sum(passes.get(kind, 1.0) * once * size for kind, size in messages.items())
