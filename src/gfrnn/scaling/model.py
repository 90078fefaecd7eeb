"""An update's time, predicted: what a process computes, what it waits for, and how sure both are.

    step           forward + backward + communication + optimizer + other
    communication  exposed * (the network's seconds for the update's messages) + copying * their bytes + stragglers
    stragglers     s E(W) (what a process computes): processes differ by s, relative, and the slowest of W normal ones
                   lies E(W) standard deviations above the mean, Phi^-1((W - 0.375) / (W + 0.25)) (Blom 1958)

`exposed` is what is waited for of a second of communication: 1 where nothing is hidden behind the computation, as with
DeepSpeed on gloo, whose calls wait; less than 1 where something is. `copying` is what a collective in training takes
beyond one that is timed alone, cold caches and tensors laid end to end: seconds a byte, whatever the network.

Intervals hold 90 %. Their width has four sources: the constants' covariances (which extrapolate: a latency counts W
times), errors of the points that were measured, what a configuration's waiting differs by, and what no fit knows, that
far from the points other things may matter: 5 % for each doubling of processes, 5 % of rows a process beyond those
measured (20 % where rows were never varied), 15 % of the parameters of another preset. Errors of a step's parts are
taken to go together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from gfrnn.config import Settings, UserError, preset, sizes
from gfrnn.scaling.compute import Compute, Load, at, far
from gfrnn.scaling.messages import Message, gathers, messages, parameter_elements
from gfrnn.scaling.network import Network
from gfrnn.scaling.records import Measurement, Point, Products
from gfrnn.training.ds_config import stage_of

INTERVAL = 0.9
THEORY = ("none", "bf16")
"""Compressions whose messages are known by theory."""
_DOUBLING, _DOUBLING_UNVARIED, _DOUBLING_PRESET = 0.05, 0.2, 0.15
_STRAGGLERS_DEVIATION = 0.5  # relative


@dataclass(frozen=True)
class Prediction:
    """Of an update in steady state. `low` to `high` holds 90 %."""

    point: Point
    step_seconds: float
    low: float
    high: float
    parts: dict[str, float]
    """Seconds by records.PARTS; they add up to the step."""
    network_seconds: float
    """All of communication, hidden or waited for."""
    straggler_seconds: float
    """In the part communication: waiting for the slowest process' computation."""
    characters: int
    """An update, of all processes."""
    flops: int
    """Of all processes."""
    efficiency: float
    """Characters/s a process over those of one process: with as many rows a process, or as `compared` says."""
    efficiency_low: float
    efficiency_high: float
    compared: Point

    @property
    def characters_per_second(self) -> float:
        return self.characters / self.step_seconds


class _Estimate(NamedTuple):
    parts: dict[str, float]
    terms: dict[str, NDArray[np.float64]]
    """By part: what its coefficients are multiplied with."""
    network_seconds: float
    stragglers: float
    waited: float
    """Seconds: standard deviation of the part communication, from the network's constants, exposed and stragglers."""
    extra: float
    """Relative standard deviation of extrapolation."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Model:
    """Predicts points on the machines it was fitted to, or on a described cluster (prediction.py)."""

    computes: dict[tuple[str, str], Compute]
    """By preset and dtype."""
    network: Network | None = None
    """None: no sweep, so one process alone is predicted."""
    layouts: Mapping[tuple[int, int], Network] = field(default_factory=dict)
    """By world size and nodes, where these have constants of their own (network_fit.py)."""
    exposed: dict[str, float] = field(default_factory=dict)
    """By Point.ds_config."""
    exposed_elsewhere: float = 1.0
    copying: dict[str, float] = field(default_factory=dict)
    """Seconds a byte, by Point.ds_config."""
    copying_elsewhere: float = 0.0
    exposed_deviation: float = 0.0
    """Relative standard deviation of the communication that is waited for."""
    straggling: float = 0.0
    """s: relative standard deviation of the processes' computation."""
    spread: float = 0.0
    """Standard deviation of the relative errors of the measured steps."""
    spare: float = math.inf
    """Degrees of freedom that `spread` was found with."""
    largest_world: int = 1
    """Most processes measured, whole steps or collectives."""
    peaks: Mapping[tuple[str, int, int], float] = field(default_factory=dict)
    """FLOP/s of one process' large products, by dtype, world size and nodes."""

    def predict(
        self,
        point: Point,
        ds_config: dict[str, Any],
        *,
        sent: list[Message] | None = None,
        compared: Point | None = None,
    ) -> Prediction:
        """A step of `point`.

        Args:
            ds_config: from resolve_ds_config, for this point.
            sent: what it sends, if not by theory (messages.py), which knows no compression but bf16.
            compared: the one process that efficiency is against; without it one with as many rows a process.

        Raises UserError if there is no sweep for several processes, or nothing was measured in this dtype.
        """
        settings = preset(point.preset)
        each = math.ceil(point.rows / point.world_size)
        compared = compared or dataclasses.replace(point, world_size=1, nodes=1, rows=each)
        base = self._estimate(compared, settings, ds_config, [])
        found = self._estimate(point, settings, ds_config, sent)
        seconds = found.seconds
        sure = float(stdtrit(self.spare, 0.5 + INTERVAL / 2)) if math.isfinite(self.spare) else 1.645
        wide = math.exp(sure * math.hypot(self._deviation(point, found, None), self.spread))
        efficiency = (point.rows * point.steps / seconds) / (
            point.world_size * compared.rows * compared.steps / base.seconds
        )
        unsure = math.exp(sure * self._deviation(point, found, base))
        return Prediction(
            point=point,
            step_seconds=seconds,
            low=seconds / wide,
            high=seconds * wide,
            parts=found.parts,
            network_seconds=found.network_seconds,
            straggler_seconds=found.stragglers,
            characters=point.rows * point.steps,
            flops=sizes(settings).train_flops * point.rows * point.steps,
            efficiency=efficiency,
            efficiency_low=efficiency / unsure,
            efficiency_high=min(efficiency * unsure, max(1.0, efficiency)),  # nothing in the model is faster together
            compared=compared,
        )

    def load(
        self,
        point: Point,
        settings: Settings,
        ds_config: dict[str, Any],
        compute: Compute,
        beside: Measurement | None = None,
    ) -> Load:
        """What the busiest process of a point does.

        beside: the point's measurement, of which its products are used, and the peak of large ones: how fast the
            machine was there and then. Without it those of measured points with the nearest number of processes, which
            say how much processes of a machine slow one another.
        """
        parameters, counts = parameter_elements(settings), sizes(settings)
        micro_batches = ds_config["gradient_accumulation_steps"]
        rows = math.ceil(math.ceil(point.rows / point.world_size) / micro_batches) * micro_batches
        updated = sum(parameters) / (point.world_size if stage_of(ds_config) else 1)
        offload = (ds_config["zero_optimization"].get("offload_optimizer") or {}).get("device") == "cpu"
        peak = beside.peak_flops / point.world_size if beside and beside.peak_flops else self._peak(point)
        weights, at_once = counts.train_flops / 6, rows // micro_batches
        if beside and beside.products:
            products: Products | None = at(beside.products, at_once)
        else:
            products = compute.products_of(weights, at_once, point.world_size, point.nodes)
        return Load(
            flops=counts.train_flops * rows * point.steps,
            weights=weights,
            steps=point.steps,
            rows=rows,
            micro_batches=micro_batches,
            updated=updated,
            offloaded=updated if offload else 0.0,
            gathers=gathers(ds_config, parameters),
            products=products,
            slowdown=compute.peak_flops / peak if peak and compute.peak_flops else 1.0,
        )

    def compute_of(self, point: Point, settings: Settings) -> tuple[Compute, float]:
        """The preset's, or that of the preset of the nearest size in this dtype; and the doublings between them."""
        weights = sizes(settings).train_flops / 6
        fitting = {key: compute for key, compute in self.computes.items() if key[1] == point.dtype}
        if (point.preset, point.dtype) in fitting:
            return fitting[point.preset, point.dtype], 0.0
        if not fitting:
            raise UserError(f"nothing was measured in {point.dtype}; measure a point of {point.preset} in it")
        doublings = {key: abs(math.log2(weights / compute.weights)) for key, compute in fitting.items()}
        nearest = min(doublings, key=lambda key: doublings[key])
        return fitting[nearest], doublings[nearest] + 1  # another model of the same size is not the same

    def network_at(self, point: Point) -> Network:
        """Its layout's. Raises UserError if there was no sweep."""
        if self.network is None:
            raise UserError("the collectives were not timed; run the sweep before several processes are predicted")
        return self.layouts.get((point.world_size, point.nodes), self.network)

    def _peak(self, point: Point) -> float | None:
        known = {key[1:]: peak for key, peak in self.peaks.items() if key[0] == point.dtype}
        return known[min(known, key=lambda key: far(key, (point.world_size, point.nodes)))] if known else None

    def _estimate(
        self,
        point: Point,
        settings: Settings,
        ds_config: dict[str, Any],
        sent: list[Message] | None,
    ) -> _Estimate:
        compute, doublings = self.compute_of(point, settings)
        load = self.load(point, settings, ds_config, compute)
        parts = compute.seconds(load)
        computed = sum(parts.values())
        low, high = compute.rows
        beyond = max(0.0, math.log2(low / load.rows_at_once), math.log2(load.rows_at_once) - math.log2(high))
        extra = [
            (_DOUBLING_UNVARIED if low == high else _DOUBLING) * beyond,
            _DOUBLING_PRESET * doublings,
            _DOUBLING * max(0.0, math.log2(point.world_size / self.largest_world)),
        ]
        seconds, stragglers, waited = 0.0, 0.0, 0.0
        if point.world_size > 1:
            if sent is None:
                sent = messages_of(point, ds_config, parameter_elements(settings))
            network = self.network_at(point)
            seconds = network.total(sent, point.world_size, point.nodes)
            exposed = self.exposed.get(point.ds_config, self.exposed_elsewhere)
            copying = self.copying.get(point.ds_config, self.copying_elsewhere) * size_of(sent)
            stragglers = self.straggling * slowest(point.world_size) * computed
            waited = math.hypot(
                exposed * network.deviation(sent, point.world_size, point.nodes),
                self.exposed_deviation * (exposed * seconds + copying),
                _STRAGGLERS_DEVIATION * stragglers,
            )
            parts["communication"] = exposed * seconds + copying + stragglers
        else:
            parts["communication"] = 0.0
        terms = {name: load.terms(part.terms) for name, part in compute.parts.items()}
        return _Estimate(parts, terms, seconds, stragglers, waited, math.hypot(*extra))

    def _deviation(self, point: Point, found: _Estimate, base: _Estimate | None) -> float:
        """Relative standard deviation of a step, or of its ratio to another's of the same preset."""
        compute, _ = self.compute_of(point, preset(point.preset))
        computed = 0.0
        for name, part in compute.parts.items():
            terms = found.terms[name] / found.seconds
            if base is not None:
                terms = terms - base.terms[name] / base.seconds
            computed += part.deviation(terms)
        extra = found.extra - (base.extra if base else 0.0)
        return math.hypot(computed, found.waited / found.seconds, extra)


def messages_of(point: Point, ds_config: dict[str, Any], parameters: tuple[int, ...]) -> list[Message]:
    """By theory. Raises ValueError for compression that has none here; then give what is sent."""
    if point.compression == "bf16":
        ds_config = ds_config | {"communication_data_type": "bf16"}
    elif point.compression != "none":
        raise ValueError(f"no theory of what {point.compression} sends; give predict what is sent")
    return messages(ds_config, parameters, point.world_size)


def size_of(sent: list[Message]) -> float:
    """Bytes of whole messages."""
    return sum(message.bytes * message.calls for message in sent)


def slowest(world_size: int) -> float:
    """E(W): how far the largest of W standard normal numbers lies above 0, in the mean (within 5 %)."""
    return float(ndtri((world_size - 0.375) / (world_size + 0.25))) if world_size > 1 else 0.0
