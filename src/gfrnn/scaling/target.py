"""How long to a target, and at what cost, against the number of GPUs: step time and statistical efficiency together.

By the model of large-batch training (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", eq. 2.11):
with B characters an update, a target is reached after

    updates     S(B) = S_min (1 + B_crit / B)
    characters  E(B) = B S(B) = E_min (1 + B / B_crit),    E_min = B_crit S_min

B_crit is about the gradient noise scale. One run that has reached the target at a known B gives S_min. Both hold for a
learning rate that is tuned at each B; a rule that scales it is a part of the claim, and checked by real runs
(docs/study.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

WORTH = 1.5
"""Doubling the GPUs is worth it where it shortens the way by this factor at least (2 is ideal)."""


class Reference(NamedTuple):
    """A run that has reached the target."""

    characters_per_update: int
    updates: float


class Target(NamedTuple):
    """What is to be reached, from a run that has reached it."""

    bpc: float
    reference: Reference
    critical: float
    """Critical batch size, characters."""


class Outlook(NamedTuple):
    """For a number of GPUs, at the batch that is fastest for them."""

    world_size: int
    rows: int
    """Global rows."""
    updates: float
    hours: float
    gpu_hours: float
    efficiency: float
    """Hours of one GPU / (W x hours): time and statistics together."""


def updates_needed(reference: Reference, critical: float, characters_per_update: float) -> float:
    """S(B) for B characters an update."""
    least = reference.updates / (1 + critical / reference.characters_per_update)
    return least * (1 + critical / characters_per_update)


def outlooks(
    reference: Reference,
    critical: float,
    step_seconds: Callable[[int, int], float],
    *,
    steps: int,
    world_sizes: Iterable[int],
    rows: Sequence[int],
) -> list[Outlook]:
    """For each world size (1 among them) the rows that reach the target first.

    Args:
        critical: critical batch size, characters. step_seconds: of (world size, global rows). steps: segment length T.
        rows: global rows to choose from; those fewer than the processes are left out.
    """
    found: list[Outlook] = []
    for world_size in sorted(world_sizes):
        ways = []
        for each in rows:
            if each >= world_size:
                updates = updates_needed(reference, critical, each * steps)
                ways.append((updates * step_seconds(world_size, each) / 3600, each, updates))
        if ways:
            hours, best, updates = min(ways)
            alone = found[0].hours if found else hours
            found.append(Outlook(world_size, best, updates, hours, hours * world_size, alone / (hours * world_size)))
    return found


def knee(found: Sequence[Outlook]) -> Outlook:
    """The largest number of GPUs up to which each doubling was worth it."""
    best = found[0]
    for each in found[1:]:
        if best.hours / each.hours < WORTH ** math.log2(each.world_size / best.world_size):
            break
        best = each
    return best
