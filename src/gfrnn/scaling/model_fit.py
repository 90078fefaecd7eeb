"""A model of the step (model.py) from measured points and timed collectives."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gfrnn.config import UserError, preset
from gfrnn.scaling import compute as computing
from gfrnn.scaling import network_fit
from gfrnn.scaling.compute import Compute
from gfrnn.scaling.messages import parameter_elements
from gfrnn.scaling.model import THEORY, Model, messages_of, size_of, slowest
from gfrnn.scaling.network import GLOO, NCCL
from gfrnn.scaling.records import Measurement, Point, Products, Timed

Configs = Callable[[Point], dict[str, Any]]

_LEAST_SPREAD = 0.01  # relative: no clock is better
_FEW = 0.2  # relative deviation of what is waited for, where too few points show it


def fit(measurements: Sequence[Measurement], sweep: Sequence[Timed], ds_config_of: Configs) -> Model:
    """From points and timed collectives of the same machines; failed points and those that send otherwise are left out.

    Without a sweep the model predicts one process alone. Raises UserError if nothing is left, ValueError if the points
    are of several kinds of machine.
    """
    used = usable(measurements)
    if not used:
        raise UserError("no point was measured; run one before the model is fitted")
    kinds = {(each.machine.device, each.machine.threads, each.machine.network) for each in used}
    if len(kinds) > 1:
        raise ValueError(f"points of several kinds of machine: {sorted(kinds)}; fit one at a time")
    algorithms = GLOO if used[0].machine.device == "cpu" else NCCL
    worlds = [each.point.world_size for each in used] + [timed.world_size for timed in sweep]
    peaks: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for each in used:
        if each.peak_flops:
            peaks[each.point.dtype, each.point.world_size, each.point.nodes].append(_peak(each))
    network = network_fit.fit(sweep, algorithms) if sweep else None
    model = Model(
        computes={},
        network=network,
        layouts=network_fit.fit_layouts(sweep, network, algorithms) if network else {},
        largest_world=max(worlds),
        peaks={key: statistics.median(found) for key, found in peaks.items()},
        straggling=_straggling(used),
    )
    model = dataclasses.replace(model, computes=_computes(model, used, ds_config_of))
    model = _with_exposed(model, used, ds_config_of)
    return _with_spread(model, used, ds_config_of)


def usable(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those that a model is fitted to: with figures, and what they send known by theory."""
    return [each for each in measurements if not each.failed and each.point.compression in THEORY]


def _peak(each: Measurement) -> float:
    return each.peak_flops / each.point.world_size


def _computes(model: Model, used: Sequence[Measurement], ds_config_of: Configs) -> dict[tuple[str, str], Compute]:
    groups: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for each in used:
        groups[each.point.preset, each.point.dtype].append(each)
    found = {}
    for key, members in groups.items():
        settings = preset(key[0])
        # all or none: seconds of the fastest machine do not mix with others
        peak = max(map(_peak, members)) if all(each.peak_flops for each in members) else 0.0
        unit = Compute({}, 1.0, peak_flops=peak)
        loads = [model.load(each.point, settings, ds_config_of(each.point), unit, each) for each in members]
        found[key] = computing.fit(loads, [each.parts for each in members], peak, _products(members))
    return found


def _products(members: Sequence[Measurement]) -> dict[tuple[int, int], list[Products]]:
    """By world size and nodes: medians of what the points of one preset and dtype have timed."""
    layouts: dict[tuple[int, int], dict[int, list[Products]]] = defaultdict(lambda: defaultdict(list))
    for each in members:
        for products in each.products:
            layouts[each.point.world_size, each.point.nodes][products.rows].append(products)
    return {
        layout: [Products.summary(several, statistics.median) for _, several in sorted(by_rows.items())]
        for layout, by_rows in layouts.items()
    }


def _straggling(used: Sequence[Measurement]) -> float:
    """Relative standard deviation of what processes of a point compute, pooled."""
    busy = [np.array(each.busy_seconds) for each in used if len(each.busy_seconds) > 1]
    if not busy:
        return 0.0
    variances = [float(np.var(each, ddof=1) / np.mean(each) ** 2) for each in busy]
    return math.sqrt(np.average(variances, weights=[len(each) - 1 for each in busy]))


def _with_exposed(model: Model, used: Sequence[Measurement], ds_config_of: Configs) -> Model:
    """With what is waited for of a second of communication, and beyond it, stragglers taken off; medians by config."""
    waits: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for each in used:
        point = each.point
        if model.network is None or point.world_size == 1:
            continue
        parameters = parameter_elements(preset(point.preset))
        sent = messages_of(point, ds_config_of(point), parameters)
        computed = sum(each.parts.values()) - each.parts["communication"]
        stragglers = model.straggling * slowest(point.world_size) * computed
        seconds = model.network_at(point).total(sent, point.world_size, point.nodes)
        waits[point.ds_config].append((max(0.0, each.parts["communication"] - stragglers), seconds, size_of(sent)))
    if not waits:
        return model
    exposed = {
        name: min(1.0, statistics.median(wait / seconds for wait, seconds, _ in own)) for name, own in waits.items()
    }
    copying = {
        name: max(0.0, statistics.median((wait - seconds) / size for wait, seconds, size in own))
        for name, own in waits.items()
    }
    rest = []
    for name, own in waits.items():
        for wait, seconds, size in own:
            predicted = exposed[name] * seconds + copying[name] * size
            rest += [wait / predicted - 1] * (predicted > 0)
    spare = len(rest) - len(exposed)
    deviation = math.sqrt(sum(each**2 for each in rest) / spare) if spare > 1 else _FEW
    # of the median of n points; how much a single one differs is part of the spread
    fewest = min(len(own) for own in waits.values())
    return dataclasses.replace(
        model,
        exposed=exposed,
        exposed_elsewhere=statistics.median(exposed.values()),
        copying=copying,
        copying_elsewhere=statistics.median(copying.values()),
        exposed_deviation=deviation / math.sqrt(fewest),
    )


def _with_spread(model: Model, used: Sequence[Measurement], ds_config_of: Configs) -> Model:
    """With the errors that are left, or those of the points' own repetitions if these are larger."""
    rest = []
    for each in used:
        predicted = model.predict(each.point, ds_config_of(each.point))
        rest.append(math.log(predicted.step_seconds / each.step_seconds))
    constants = sum(max(len(part.terms) for part in each.parts.values()) for each in model.computes.values())
    spare = max(1, len(rest) - constants - len(model.exposed))
    spread = math.sqrt(sum(each**2 for each in rest) / spare)
    repeated = [(each.step_seconds_high - each.step_seconds_low) / 1.349 / each.step_seconds for each in used]
    own = statistics.median(repeated) if all(each.step_seconds_high for each in used) else 0.0
    return dataclasses.replace(model, spread=max(spread, own, _LEAST_SPREAD), spare=float(spare))
