"""What an update sends, by theory: from the ZeRO stage, the rest of the DeepSpeed config, and the parameters.

In words, for P parameters, W processes, k micro-batches, gradients of b bytes on the wire and weights of w:

    stage 0     all-reduce bP, once an update
    stage 1     the same, and all-gather wP, as each process has updated a slice. With use_multi_rank_bucket_allreduce
                false a reduce to the slice's owner in place of the all-reduce
    stage 2     as stage 1, but gradients at every micro-batch: kbP
    stage 3     reduce-scatter kbP, all-gather kwP; parameters of few elements stay whole between micro-batches: once

Left out: padding, and two scalars' worth an update (the gradient's norm; the loss and whether to stop).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gfrnn.training.ds_config import stage_of

_PERSISTENT = 10**5  # elements up to which stage 3 keeps a parameter whole, by default
_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2}


def predicted(ds_config: dict[str, Any], parameters: Sequence[int]) -> dict[str, int]:
    """Bytes of whole messages of an update, by kind of collective.

    Args:
        ds_config: from resolve_ds_config. parameters: elements of each.
    """
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


def sent(messages: dict[str, int], world_size: int) -> float:
    """Bytes that a process sends at least: a ring's, which no other way of sending is below.

    A reduce is one of many, each to another owner, so a process has all but its own share to send.
    """
    once = (world_size - 1) / world_size
    passes = {"all_reduce": 2.0}
    return sum(passes.get(kind, 1.0) * once * size for kind, size in messages.items())
