"""The memory that training will take, by formula: what --dry-run prints before torch is loaded.

It is the first process's, on a CPU, where the C library keeps what is freed for what comes next
(cli.keep_freed_memory). So what counts besides what is live is what finds no room in what was freed before it:
- small tensors leave no room for large ones (things that stay lie between them), only for a parameter's gradient;
- DeepSpeed's flat tensors, as large as all parameters or a process's share of them, grow the heap once each, unless
  one fits where the slopes were. They count at every moment; of all else the fullest moment of an update does.
Of a bucket that DeepSpeed allocates at a fixed size only what gradients fill counts: untouched pages take no memory.
These rules were found by measuring; docs/training.md has how far they are off.

Left out is what is under a percent of a run of a gigabyte: text, carried states, biases, temporaries of a step.

Legend: W processes, T steps, B rows of a micro-batch, L layers, H units, G, K as in nn/plan.py, Y width of the output.
"""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass
from typing import Any

import psutil

from gfrnn.config import Settings, sizes
from gfrnn.training.ds_config import stage_of

_GATES = {"tanh": 1, "gru": 3, "lstm": 4, "mrnn": 2}  # G of each unit
_FP32, _BF16 = 4, 2
_BUCKET = 5 * 10**8  # elements of DeepSpeed's reduction bucket, by default
_LIBRARIES = 60 * 10**6  # measured: threads, oneDNN's kernels and scratch, what the first products leave
_EVAL_STEPS, _EVAL_SYMBOLS, _EVAL_KEPT = 128, 1 << 15, 8  # evaluation.score reads so much at once; nn keeps steps

_Parts = dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process when it has most, by part."""

    moment: str
    """When that is."""
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


def estimate(settings: Settings, ds_config: dict[str, Any], world_size: int) -> Estimate:
    """Of a run with these settings, a config from resolve_ds_config and W processes."""
    stage, o = stage_of(ds_config), settings.optimization
    parameters = sizes(settings.model).total
    full, share = _FP32 * parameters, _FP32 * math.ceil(parameters / world_size)
    bf16 = bool(ds_config.get("bf16", {}).get("enabled"))  # DeepSpeed's own: the trained weights and their gradients
    width = _BF16 if bf16 else _FP32
    flat, flat_share = width * parameters, width * math.ceil(parameters / world_size)
    zero = ds_config["zero_optimization"]
    bucket = min(flat, width * int(zero.get("reduce_bucket_size", _BUCKET)))
    net = Network(settings, ds_config["train_micro_batch_size_per_gpu"], world_size)

    updated = full if stage == 0 else share  # what this process's optimizer works on
    averages = updated if o.average != "none" else 0
    states = 2 + (o.optimizer == "rmsprop" and o.momentum > 0)
    temporaries = (1 if o.optimizer == "rmsprop" else 2) + (o.weight_decay > 0 and o.optimizer != "adamw")
    trained = {0: full, 3: flat_share + share * bf16}.get(stage, flat + share)
    always: _Parts = {
        "weights": full + trained + averages,  # a plain model validates
        "gradients": flat_share if stage == 3 else 0,
        "optimizer": states * updated,
        "copies for products": full * bf16,
        "checkpoint": full,  # the file of the best weights, read for the test at the end
        "libraries": _LIBRARIES,
    }
    if stage == 0:
        reduced = flat
    elif stage < 3:  # buckets, one made flat for the others, own share, that flat
        reduced = bucket * (1 + bool(zero.get("overlap_comm")) + (world_size > 1)) + flat_share + share
    else:  # a bucket, flat, once more to send, own share flat; room of initialisation's, for gathered weights later
        reduced = 3 * bucket + share + 2 * flat
    # the optimizer's, less those with room where slopes and summed gradients were (at stage 0 moments lie there)
    flats = max(0, temporaries - int((net.one_piece + net.sums) // share)) if stage else 0
    grown: _Parts = {"gradients": reduced, "optimizer": flats * share}
    accumulated = flat if settings.batch.accumulation > 1 and stage < 2 else 0
    # what pieces leave has room for gradients, but for nothing larger: small things that stay lie between them
    update: dict[str, _Parts] = {
        "backward": {
            "gradients": max(net.sums, accumulated),
            "copies for products": net.transposed,
            "activations": net.kept,
        },
        "gradients of weights": {
            "gradients": flat if stage < 2 else net.sums + _FP32 * net.largest,
            "copies for products": net.transposed if net.sums else 0,
            "activations": net.slopes + max(0, net.pieces - flat),
        },
        "optimizer step": {
            "gradients": flat if stage < 2 else 0,
            "optimizer": _FP32 * temporaries * net.largest if stage == 0 else 0,
        },
    }
    moments = [_sum(name, always, grown, parts) for name, parts in update.items()]
    moments.append(_sum("validation", always, {"checkpoint": full, "activations": net.evaluation}))
    moments.append(_sum("checkpoint", always, {"checkpoint": full * (1 + states + (averages > 0))}))
    return max(moments, key=lambda moment: moment.total)


def _sum(moment: str, *several: _Parts) -> Estimate:
    names = ("weights", "gradients", "optimizer", "copies for products", "activations", "checkpoint", "libraries")
    return Estimate(moment, {name: round(sum(parts.get(name, 0) for parts in several)) for name in names})


class Network:
    """Bytes of what the network holds for a micro-batch on one process."""

    def __init__(self, settings: Settings, rows: int, world_size: int):
        m, b = settings.model, settings.batch
        T, B, L, H, V = b.steps, rows, m.num_layers, m.hidden_size, m.vocab_size
        K = _GATES[m.unit] * H + (L if m.feedback == "gated" else 0)
        Y, inputs = H * (L if m.output_skips else 1), m.embedding_size or V
        narrow = _BF16 if b.dtype == "bf16" else _FP32
        input_rows = K * (L if m.input_skips and m.unit != "mrnn" else 1)
        in_products = sizes(m).recurrent - input_rows * inputs
        at_once = min(b.recompute or T, T) if m.unit != "mrnn" else T
        again = at_once < T
        step = _FP32 * B * L * H  # one number a unit and row
        cell = m.unit == "lstm"

        recurrent = H * H * max(1, _GATES[m.unit] - 1) * (L if m.feedback != "none" else 1)
        self.largest = max(recurrent, K * (max(inputs, H) if L > 1 else inputs), V * Y, V * m.embedding_size)
        """Elements of the largest parameter."""
        self.sums = _FP32 * in_products if again else 0
        """Gradients of the steps that backward has done, while it does the others."""
        # transposed for backward; in bf16 also as they lie, for the steps that are computed again
        self.transposed = narrow * in_products * (2 if again and narrow == _BF16 else 1)
        if m.weight_dropout:
            self.transposed += 2 * _FP32 * in_products  # masks, and what they leave of the weights
        from_input = 2 * _FP32 * input_rows * (T * B if m.embedding_size else V)  # and its gradient
        starts = step * (1 + cell) * math.ceil(T / at_once) if again else 0
        at_ends = _FP32 * T * B * (2 * Y + 3 * V)  # output, logits, their logarithms; their gradients
        outside = from_input + starts + at_ends
        states = step * (1 + cell)
        # of a step: the unit's activations; GRU its pre-activations, gates, reset sum; what layer norm divides
        inside = {"lstm": 4.0, "gru": K / H + 3, "tanh": 1.0, "mrnn": 10.0}[m.unit]
        normed = (_GATES[m.unit] + cell) * m.layer_norm
        slopes = step * (K / H + (m.unit == "gru"))
        self.pieces = at_once * step * (inside + normed)
        """Of each step and layer, in tensors of their own."""
        self.one_piece = at_once * slopes
        """Slopes, the largest tensor."""
        self.kept = outside + self.pieces + at_once * (states + slopes)
        """At the start of backward through time: what forward left, and room for the slopes."""
        # slopes, states, states as an operand of products; gated ones made and put in order for one layer
        operands = step * narrow / _FP32 * ((m.feedback != "none") + (m.unit_gates == "own" or m.feedback == "none"))
        ordered = 2 * step if m.feedback == "gated" else 0
        self.slopes = outside + at_once * (slopes + step + operands + ordered)
        """While gradients of the weights are made of them, without `pieces`."""
        streams = max(1, settings.run.eval_streams // world_size)
        symbols = streams * min(_EVAL_STEPS, max(1, _EVAL_SYMBOLS // streams))
        own = _FP32 * L * H * streams * _EVAL_KEPT * (1 + cell + inside + normed)
        self.evaluation = _FP32 * symbols * (Y + 3 * V) + own + _FP32 * input_rows * V
        """While a text is scored."""


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Bytes of this process in memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
