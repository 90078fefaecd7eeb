"""Which collectives an update makes: kind, bytes and calls, by theory; volume.py has the bytes, the calls are here.

In words, for parameters in the order of the model and gradients that come the other way round, last layer first:

    stage 0     gradients flattened together, 500 M elements a call
    stages 1-2  gradients as they come fill a bucket of reduce_bucket_size elements, which is sent before the one that
                would not fit; so a parameter is never cut and may be larger than the bucket. Reduced to slices' owners
                (use_multi_rank_bucket_allreduce false) messages are cut between owners too. Weights: one all-gather
    stage 3     buckets as above, reduce-scattered; each parameter that is not kept whole is gathered alone, the others
                with the optimizer's step

and two scalars' worth: the gradient's norm; the loss and whether to stop. `calls` are within a factor of about 1.5 of
those counted (benchmarks/volume.py), which is enough: they only carry latency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gfrnn.config import GATES, TARGET_SYMBOLS, ModelSettings, Settings
from gfrnn.scaling.volume import predicted
from gfrnn.training.ds_config import stage_of

_STAGE_0_BUCKET = 500_000_000  # elements: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE
_BUCKET = 500_000_000  # elements: DeepSpeed's own, where the config is not resolved
_PERSISTENT = 10**5  # as in volume.py
_SCALARS = 40  # bytes


class Message(NamedTuple):
    """Equal calls of one collective."""

    kind: str
    bytes: float
    """Of the whole message of each call, as volume.py counts them."""
    calls: int


def messages(ds_config: dict[str, Any], parameters: Sequence[int], world_size: int) -> list[Message]:
    """The collectives of an update.

    Args:
        ds_config: from resolve_ds_config. parameters: elements of each, in the model's order.
    """
    if world_size == 1:
        return []
    calls, stage = {}, stage_of(ds_config)
    zero, micro_batches = ds_config["zero_optimization"], ds_config["gradient_accumulation_steps"]
    if stage == 0:
        calls["all_reduce"] = math.ceil(sum(parameters) / _STAGE_0_BUCKET)
    else:
        buckets = count_buckets(reversed(parameters), zero.get("reduce_bucket_size", _BUCKET))
        calls["all_reduce"] = calls["reduce_scatter"] = buckets * (micro_batches if stage > 1 else 1)
        calls["reduce"] = calls["all_reduce"] + world_size - 1
        calls["all_gather"] = 1 if stage < 3 else 1 + gathers(ds_config, parameters)
    found = [Message(kind, size / calls[kind], calls[kind]) for kind, size in predicted(ds_config, parameters).items()]
    return [*found, Message("all_reduce", _SCALARS, 2)]


def count_buckets(sizes: Iterable[int], bucket: int) -> int:
    """Messages that sizes make, filled into buckets in their order."""
    count, held = 0, 0
    for size in sizes:
        if held and held + size > bucket:
            count, held = count + 1, 0
        held += size
    return count + (held > 0)


def gathers(ds_config: dict[str, Any], parameters: Sequence[int]) -> int:
    """Parameters that stage 3 gathers, one by one, in an update; 0 at other stages."""
    if stage_of(ds_config) < 3:
        return 0
    zero = ds_config["zero_optimization"]
    most = zero.get("stage3_param_persistence_threshold", zero.get("param_persistence_threshold", _PERSISTENT))
    return int(ds_config["gradient_accumulation_steps"] * sum(size > most for size in parameters))


def parameter_elements(settings: Settings) -> tuple[int, ...]:
    """Elements of each parameter of what the settings train, in the order of the modules (a test holds them so)."""
    if settings.task == "text":
        return _elements(settings.model, settings.model.vocab_size, settings.model.vocab_size)
    targets = len(TARGET_SYMBOLS)
    return _elements(settings.model, settings.model.vocab_size, 0) + _elements(settings.model, targets, targets)


def _elements(model: ModelSettings, vocab_size: int, outputs: int) -> tuple[int, ...]:
    H, L = model.hidden_size, model.num_layers
    inputs = model.embedding_size or vocab_size
    found = [vocab_size * model.embedding_size]
    if model.unit == "mrnn":
        found += [2 * H * inputs, H * H, H * H, H]
    else:
        gated = model.feedback == "gated"
        candidate_sources = 1 if model.feedback == "none" else L
        unit_sources = L if model.feedback != "none" and model.unit_gates == "all" else 1
        rows = GATES[model.unit] * H + (L if gated else 0)
        cell = model.layer_norm and model.unit == "lstm"
        for layer in range(L):
            found += [
                rows * (H if layer else inputs),
                rows * inputs if layer and model.input_skips else 0,
                H * H * candidate_sources,
                (GATES[model.unit] - 1) * H * H * unit_sources,
                L * L * H if gated else 0,
                rows,
                H if model.unit == "gru" and model.hidden_bias else 0,
                GATES[model.unit] * H if model.layer_norm else 0,
                *((H, H) if cell else ()),
            ]
    found += [outputs * H * (L if model.output_skips else 1), outputs]
    return tuple(size for size in found if size)
