"""The memory that training will take, by formula: what --dry-run prints before torch is loaded.

It is the first process's, on a CPU, in a run that validates and saves checkpoints in between. The C library keeps what
is freed in pieces of up to 32 MiB for the next small ones, and gives larger ones back (cli.keep_freed_memory). So

- large pieces count while they are live, by moment of an update;
- small ones count at every moment: their room is kept, and large pieces rarely fit between the small ones that stay;
- a checkpoint is gathered a parameter at a time, in the room of gradients and in new room, which an update's large
  pieces take later: at stages 1 and 2 all but one of the flat tensors, as large as a process's share of the parameters,
  which finds too little of it in one stretch; at stage 3, where more small things stay, none of them finds it.

Of a bucket that DeepSpeed allocates at a fixed size only what gradients fill counts: untouched pages take no memory.
docs/training.md has how far all this is off.

Left out is what is under a percent of a run of a gigabyte: text, carried states, biases, temporaries of a step.

Legend: W processes, T steps, B rows of a micro-batch, L layers, H units, G, K as in nn/plan.py, Y width of the output.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gfrnn.config import GATES, TARGET_SYMBOLS, ModelSettings, Settings, model_sizes, sizes
from gfrnn.training.ds_config import stage_of

_GATES = GATES | {"mrnn": 2}
_FP32, _BF16 = 4, 2
_BUCKET = 5 * 10**8  # elements of DeepSpeed's reduction bucket, by default
_LARGE = 32 << 20  # bytes of a piece from which it is given back
_LIBRARIES = 110 * 10**6  # measured: threads, oneDNN's kernels and scratch, what finds no room between other pieces
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


def estimate(
    settings: Settings, ds_config: dict[str, Any], world_size: int, *, updates_alone: bool = False
) -> Estimate:
    """Of a run with these settings, a config from resolve_ds_config and W processes.

    updates_alone: of one that neither validates nor saves, as a study's points.
    """
    stage, o = stage_of(ds_config), settings.optimization
    parameters = sizes(settings).total
    full, share = _FP32 * parameters, _FP32 * math.ceil(parameters / world_size)
    bf16 = bool(ds_config.get("bf16", {}).get("enabled"))  # DeepSpeed's own: the trained weights and their gradients
    width = _BF16 if bf16 else _FP32
    flat, flat_share = width * parameters, width * math.ceil(parameters / world_size)
    zero = ds_config["zero_optimization"]
    bucket = min(flat, width * int(zero.get("reduce_bucket_size", _BUCKET)))
    net = networks_memory(settings, ds_config["train_micro_batch_size_per_gpu"], world_size)

    updated = full if stage == 0 else share  # what this process's optimizer works on
    averages = updated if o.average != "none" else 0
    states = 2 + (o.optimizer == "rmsprop" and o.momentum > 0)
    temporaries = (1 if o.optimizer == "rmsprop" else 2) + (o.weight_decay > 0 and o.optimizer != "adamw")
    trained = {0: full, 3: flat_share + share}.get(stage, flat + share)  # with the fp32 masters of a share
    accumulated = settings.batch.accumulation > 1
    # the gradients, a parameter at a time: at stage 0 all stay until the optimizer's step
    apart = flat if stage == 0 or (stage == 1 and accumulated) else 0
    errors = full if settings.communication.compression in ("powersgd", "topk") else 0  # what was not sent
    always: _Parts = {
        "weights": full + trained + averages,  # a plain model validates
        "gradients": max(apart, net.sums) + (flat_share + bucket if stage == 3 else 0) + errors,
        "optimizer": states * updated,
        "copies for products": full * bf16 + net.transposed - net.large_copies,
        "activations": net.small,
        "libraries": _LIBRARIES,
    }
    held = flat_share if stage == 2 and accumulated else 0  # summed over the micro-batches before
    if stage == 0:  # made flat to be reduced, after backward
        reducing, stepping = 0, flat
    elif stage < 3:  # buckets, one made flat for the others, and a process's share, which fills from bucket to bucket
        buckets = bucket * (1 + bool(zero.get("overlap_comm")) + (world_size > 1))
        reducing = buckets + flat_share + held
        stepping = share + flat_share * bf16
    else:  # a bucket once more, made flat to be sent
        reducing, stepping = bucket, share
    gathered = flat if stage == 3 and world_size > 1 else 0  # weights, for the time of the call
    temporary = temporaries * share if stage else 0  # at stage 0 a parameter's, one after the other
    moments: dict[str, _Parts] = {
        "backward": {
            "weights": gathered,
            "gradients": held,
            "copies for products": net.large_copies,
            "activations": net.backward,
        },
        "gradients of weights": {"weights": gathered, "gradients": reducing, "activations": net.products},
        "optimizer step": {"gradients": stepping, "optimizer": temporary},
        "validation": {"checkpoint": full, "gradients": -apart, "activations": net.evaluation},
        "after a checkpoint": {
            "checkpoint": full * (1 + states + (averages > 0)),
            "gradients": (share if stage else 0) - apart,
            "optimizer": temporary if stage == 3 else 0,
        },
    }
    if updates_alone:
        del moments["validation"], moments["after a checkpoint"]
    found = [_sum(name, always, parts) for name, parts in moments.items()]
    return max(found, key=lambda moment: moment.total)


def _sum(moment: str, *several: _Parts) -> Estimate:
    names = ("weights", "gradients", "optimizer", "copies for products", "activations", "checkpoint", "libraries")
    return Estimate(moment, {name: round(sum(parts.get(name, 0) for parts in several)) for name in names})


def networks_memory(settings: Settings, rows: int, world_size: int) -> Network:
    """Of the language model; of programs of the encoder, which reads the longest, and the decoder together."""
    m = settings.model
    if settings.task == "text":
        streams = max(1, settings.run.eval_streams // world_size)
        steps = min(_EVAL_STEPS, max(1, _EVAL_SYMBOLS // streams))
        return Network(settings, m, settings.batch.steps, m.vocab_size, rows, streams, steps)
    source, target = settings.programs.longest
    decoder = dataclasses.replace(m, vocab_size=len(TARGET_SYMBOLS))
    scored = max(1, _EVAL_SYMBOLS // source)
    reading = Network(settings, m, source, 0, rows, scored, source)
    return reading + Network(settings, decoder, target, decoder.vocab_size, rows, scored, target)


class Network:
    """Bytes of what a network holds for a micro-batch on one process.

    steps, outputs: T, V. scored, at_once: rows and steps that are evaluated at once.
    """

    def __init__(
        self, settings: Settings, m: ModelSettings, steps: int, outputs: int, rows: int, scored: int, at_once: int
    ):
        b = settings.batch
        T, B, L, H, V = steps, rows, m.num_layers, m.hidden_size, outputs
        K = _GATES[m.unit] * H + (L if m.feedback == "gated" else 0)
        Y, inputs = H * (L if m.output_skips else 1), m.embedding_size or m.vocab_size
        narrow = _BF16 if b.dtype == "bf16" else _FP32
        input_rows = K * (L if m.input_skips and m.unit != "mrnn" else 1)
        in_products = model_sizes(m).recurrent - input_rows * inputs
        piece = min(b.recompute or T, T) if m.unit != "mrnn" else T
        again = piece < T
        step = _FP32 * B * L * H  # one number a unit and row
        cell, fed = m.unit == "lstm", m.feedback != "none"
        every = m.unit_gates == "all" and fed  # unit gates read all layers

        unit = H * H * (_GATES[m.unit] - 1) * (L if every else 1)
        candidate = H * H * (L if fed else 1)
        below = K * H if L > 1 else 0
        self.sums = _FP32 * in_products if again else 0
        """Gradients of the steps that backward has done, while it does the others."""
        # in bf16 also as they lie, for the steps that are computed again; what reads all layers is one piece
        copies = narrow * (2 if again and narrow == _BF16 else 1)
        self.transposed = copies * in_products
        """Weights as backward's products read them."""
        together = L * ((unit if every else 0) + (L * L * H if m.feedback == "gated" else 0))
        apart = L * [candidate, 0 if every else unit] + (L - 1) * [below]
        self.large_copies = (copies // narrow) * _large(*(narrow * size for size in (together, *apart)))
        """Of those the large pieces."""
        if m.weight_dropout:
            self.transposed += 2 * _FP32 * in_products  # masks, and what they leave of the weights

        # of a step: the unit's activations; GRU its pre-activations, gates, reset sum; what layer norm divides
        inside = {"lstm": 4.0, "gru": K / H + 3, "tanh": 1.0, "mrnn": 10.0}[m.unit]
        normed = (_GATES[m.unit] + cell) * m.layer_norm
        starts = step * (1 + cell) * math.ceil(T / piece) if again else 0
        states, slopes = piece * step, piece * step * K / H
        traces = [states] * (1 + cell)  # h, c
        ends = [_FP32 * T * B * V] * 3  # logits, their logarithms, the gradient
        ends += [_FP32 * input_rows * (T * B if m.embedding_size else inputs)] * 2  # of the input, and the gradient
        sums = [slopes] + [states] * (m.unit == "gru")  # of a step's products, all gradients of them
        operand = states * narrow / _FP32
        made = [operand] + [operand] * fed  # states as they lie, packed
        ordered = [states, operand] if m.feedback == "gated" else []  # gated for one layer, in order
        self.backward = _large(*traces, *sums, *made, _FP32 * T * B * Y, *ends[3:])
        """Large pieces at the end of backward through time."""
        self.products = _large(states, *sums, *made[: 1 if every else 2], *ordered, *ends[3:])
        """Large pieces while gradients of the weights are made of them."""
        pieces = [*traces, *sums, *made, *ordered, *ends]
        self.small = piece * step * (inside + normed) + starts + sum(pieces) - _large(*pieces)
        """What each step and layer leaves, in pieces of its own, and other small ones."""
        own = _FP32 * L * H * scored * _EVAL_KEPT * (1 + cell + inside + normed)
        self.evaluation = _FP32 * scored * at_once * (Y + 3 * V) + own + _FP32 * input_rows * inputs
        """While data is scored."""

    def __add__(self, other: Network) -> Network:
        both = copy.copy(self)
        for name, size in vars(other).items():
            setattr(both, name, getattr(self, name) + size)
        return both


def _large(*pieces: float) -> float:
    """Bytes of those pieces that are given back when they are freed."""
    return sum(piece for piece in pieces if piece >= _LARGE)


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Bytes of this process in memory at most so far."""
    if sys.platform == "linux":  # whose ru_maxrss may be that of the process which started this one
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
        if found is not None:
            return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
