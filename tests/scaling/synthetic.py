"""Machines that tests make up, and what would be measured on them."""

from __future__ import annotations

from typing import Any

import numpy as np

from gfrnn.config import preset, sizes
from gfrnn.scaling.compute import Compute, Part
from gfrnn.scaling.messages import messages, parameter_elements
from gfrnn.scaling.model import Model
from gfrnn.scaling.network import GLOO, Link, Network
from gfrnn.scaling.records import Machine, Measurement, Point, Timed

NETWORK = Network(Link(30e-6, 1.5e9), Link(600e-6, 0.11e9), call_seconds=100e-6, algorithms=GLOO)
MACHINE = Machine(device="cpu", threads=1, network="synthetic")
PEAK = 100e9
COEFFICIENTS = {
    "forward": {"arithmetic": 0.4 / PEAK, "weights": 3e-10},
    "backward": {"arithmetic": 0.8 / PEAK, "weights": 4e-10},
    "optimizer": {"parameter": 4e-9},
    "other": {"update": 0.01},
}
PRESET = "gf-lstm-3x140"
POINTS = [
    Point(PRESET, config, world_size=W, nodes=N, rows=rows * W, steps=20)
    for config in ("z0", "z2")
    for rows in (8, 32)
    for W, N in ((1, 1), (2, 1), (4, 1), (4, 4))
]


def ds_config_of(point: Point) -> dict[str, Any]:
    zero = {"stage": int(point.ds_config[1]), "reduce_bucket_size": 2**19}
    return {"zero_optimization": zero, "gradient_accumulation_steps": 1}


def truth(peaks: dict[tuple[str, int, int], float] | None = None, **changes: Any) -> Model:
    """The machine that measurements come from. A large peak is two processes on one core: half each."""
    weights = sizes(preset(PRESET)).train_flops / 6
    parts = {
        name: Part(tuple(terms), np.array(list(terms.values())), np.zeros((len(terms), len(terms))))
        for name, terms in COEFFICIENTS.items()
    }
    compute = Compute(parts, weights, peak_flops=PEAK)
    given: dict[str, Any] = {"network": NETWORK, "largest_world": 4, "peaks": peaks or {}} | changes
    return Model({(PRESET, "fp32"): compute, (PRESET, "bf16"): compute}, **given)


def measured(model: Model, point: Point, noise: float = 0.0, seed: int = 0) -> Measurement:
    """Noise is a factor on the whole step: what a shared machine is busy with."""
    random = np.random.default_rng([seed, *point.name.encode()])
    factor = float(np.exp(noise * random.normal()))
    found = model.predict(point, ds_config_of(point))
    sent = messages(ds_config_of(point), parameter_elements(preset(point.preset)), point.world_size)
    busy = found.step_seconds - found.parts["communication"]
    known = model.peaks.get((point.dtype, point.world_size, point.nodes), PEAK)
    return Measurement(
        point=point,
        machine=MACHINE,
        step_seconds=factor * found.step_seconds,
        parts={name: factor * seconds for name, seconds in found.parts.items()},
        busy_seconds=tuple(busy * (1 + model.straggling * random.normal(size=point.world_size))),
        calls={m.kind: m.calls for m in sent},
        bytes={m.kind: int(m.calls * m.bytes) for m in sent},
        peak_flops=known * point.world_size,
        characters=point.rows * point.steps,
    )


def sweep(noise: float = 0.0, seed: int = 0) -> list[Timed]:
    random = np.random.default_rng(seed)
    return [
        Timed(kind, size, W, N, NETWORK.seconds(kind, size, W, N) * float(np.exp(noise * random.normal())))
        for kind in ("all_reduce", "all_gather")
        for size in (1 << 10, 1 << 16, 1 << 21, 1 << 25)
        for W, N in ((2, 1), (4, 1), (4, 4))
    ]
