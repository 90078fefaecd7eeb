"""Constants of a network from timed collectives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from gfrnn.config import UserError
from gfrnn.scaling.network import GLOO, Link, Network
from gfrnn.scaling.records import Timed

_OUTLIER = 0.1  # relative error beyond which one counts linearly, not squared
_UNKNOWN = 1.0  # relative standard deviation of what was not measured
_SATURATED = 0.1  # relative standard deviation if there are no more times than constants
_ENOUGH = 0.1  # relative errors of a layout with which the overall fit is left alone
_BETTER = 0.7  # of the overall fit's errors: from here a layout has constants of its own


def fit(sweep: Sequence[Timed], algorithms: tuple[str, ...] = GLOO) -> Network:
    """The constants, all nonnegative, that leave the least relative errors; large errors count less (soft L1).

    What the sweep cannot show is left out and named in `assumed`: a link without collectives over it, which is taken to
    be as the other and known badly, and the time of a call where all have as many processes (it would be the latency).
    Kinds that are missing have the factor 1. Raises UserError if no collective has two processes.
    """
    timed = [each for each in sweep if each.world_size > 1 and each.seconds > 0]
    if not timed:
        raise UserError("the sweep times no collective of two or more processes; run it with more processes")
    return _Fit(timed, algorithms).network()


def fit_layouts(
    sweep: Sequence[Timed], overall: Network, algorithms: tuple[str, ...] = GLOO
) -> dict[tuple[int, int], Network]:
    """Constants of their own, by world size and nodes, for layouts that the overall ones do not describe.

    More processes than cores are such: a step of a ring waits until the next process is scheduled. What is found holds
    for this layout alone, both links in one.
    """
    found = {}
    for layout in sorted({(each.world_size, each.nodes) for each in sweep if each.world_size > 1}):
        timed = [each for each in sweep if (each.world_size, each.nodes) == layout and each.seconds > 0]
        fitting = _Fit(timed, algorithms, alone=True)
        off = _winsorized(np.log1p(errors(overall, timed)), len(timed))
        if off < _ENOUGH or len(timed) < 2 * len(fitting.free):
            continue
        network = fitting.network()
        if network.spread < _BETTER * off:
            found[layout] = network
    return found


def errors(network: Network, sweep: Sequence[Timed]) -> list[float]:
    """Relative error of the network's time of each, predicted / measured - 1."""
    return [network.seconds(t.kind, t.bytes, t.world_size, t.nodes) / t.seconds - 1 for t in sweep]


class _Fit:
    def __init__(self, timed: list[Timed], algorithms: tuple[str, ...], alone: bool = False) -> None:
        self.timed, self.alone = timed, alone
        intra = any(each.nodes == 1 for each in timed)
        inter = any(each.nodes > 1 for each in timed)
        kinds = sorted({each.kind for each in timed}, key=lambda kind: (kind != "all_reduce", kind))
        links = [self.guess(between) for between in (False, True) if (intra, inter)[between]]
        self.start = Network(links[0], links[-1], links[0].latency, dict.fromkeys(kinds[1:], 1.0), algorithms)
        call = len({(each.world_size, each.nodes) for each in timed}) > intra + inter
        free = np.array([call, intra, intra, inter, inter] + [True] * len(kinds[1:]))
        self.free, self.intra, self.inter = np.flatnonzero(free), intra, inter
        self.assumed = tuple(name for name, is_free in zip(self.start.names, free, strict=True) if not is_free)
        self.scale = self.start.constants[self.free]

    def guess(self, between: bool) -> Link:
        """Of the order that the shortest and the largest message over the link say."""
        over = [each for each in self.timed if (each.nodes > 1) == between]
        shortest = min(over, key=lambda each: each.seconds)
        largest = max(over, key=lambda each: (each.bytes, each.nodes))
        sharing = largest.world_size // largest.nodes if between else 1
        return Link(shortest.seconds / shortest.world_size, max(largest.bytes, 1) / largest.seconds / sharing)

    def at(self, x: NDArray[np.float64]) -> Network:
        constants = self.start.constants
        if 0 not in self.free:
            constants[0] = 0.0
        constants[self.free] = x * self.scale
        if not self.intra:
            constants[1:3] = constants[3:5]
        elif not self.inter:
            constants[3:5] = constants[1:3]
        return self.start.with_constants(constants)

    def residuals(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        network = self.at(x)
        found = [network.seconds(t.kind, t.bytes, t.world_size, t.nodes) / t.seconds for t in self.timed]
        return np.log(np.maximum(found, 1e-9))

    def network(self) -> Network:
        # starts far apart, as the cheapest algorithm changes with the constants
        starts = [np.where(self.free < 5, factor, 1.0) for factor in (1.0, 0.1)]
        bounds = (1e-9, np.inf)
        found = [
            least_squares(self.residuals, x, bounds=bounds, loss="soft_l1", f_scale=_OUTLIER, x_scale="jac")
            for x in starts
        ]
        best = min(found, key=lambda each: float(each.cost))
        network, rest = self.at(best.x), self.residuals(best.x)
        spare = len(rest) - len(self.free)
        spread = _winsorized(rest, spare) if spare > 0 else _SATURATED
        jacobian = self.jacobian(best.x)
        inner = spread**2 * np.linalg.pinv(jacobian.T @ jacobian) * np.outer(self.scale, self.scale)
        unknown = _UNKNOWN * network.constants
        unknown[self.free] = 0.0
        moves = np.zeros((len(unknown), len(self.free)))  # how constants follow the free ones
        moves[self.free, np.arange(len(self.free))] = 1.0
        if self.alone:  # nobody asks for another layout, where the links would be told apart
            unknown[:] = 0.0
            moves[1:3] += moves[3:5] * (not self.intra)
            moves[3:5] += moves[1:3] * (not self.inter)
        variances = moves @ inner @ moves.T + np.diag(unknown**2)
        return Network(
            network.intra,
            network.inter,
            network.call_seconds,
            network.factors,
            network.algorithms,
            covariance=variances,
            spread=spread,
            assumed=self.assumed,
            largest_world=max(each.world_size for each in self.timed),
        )

    def jacobian(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of the residuals, without the weights of soft L1: those are for finding the constants."""
        base, columns = self.residuals(x), []
        for index in range(len(x)):
            moved = x.copy()
            moved[index] += 1e-5 * max(x[index], 1e-3)
            columns.append((self.residuals(moved) - base) / (moved[index] - x[index]))
        return np.stack(columns, axis=1)


def _winsorized(rest: NDArray[np.float64], spare: int) -> float:
    """Standard deviation with outliers taken as three of the others'; `spare` degrees of freedom."""
    typical = 1.4826 * float(np.median(np.abs(rest))) * (len(rest) / spare) ** 0.5
    return float(np.sqrt(np.sum(np.minimum(rest**2, (3 * typical) ** 2)) / spare))
