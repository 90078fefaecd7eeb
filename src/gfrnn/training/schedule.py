"""The learning rate of an update: a function of its number, times a factor that falls when gradients explode."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gfrnn.config import OptimizerSettings


def learning_rate(settings: OptimizerSettings, update: int, total: int) -> float:
    """Of update number `update` (from 0) of `total`: linear warm-up, then the schedule's shape down to its end."""
    peak, end, warmup = settings.learning_rate, settings.final_learning_rate, settings.warmup_updates
    if update < warmup:
        return peak * (update + 1) / warmup
    if settings.schedule == "constant":
        return peak
    part = min(1.0, (update - warmup) / max(1, total - 1 - warmup))
    fall = part if settings.schedule == "linear" else (1 - math.cos(math.pi * part)) / 2
    return peak + (end - peak) * fall


@dataclass
class ExplosionGuard:
    """Halves the learning rate when a gradient norm exceeds `factor` times the running mean of those before it."""

    factor: float
    """0: never."""
    scale: float = 1.0
    """What the schedule's rate is multiplied by."""
    mean: float = 0.0
    """Running mean (decay 0.95) of the norms so far; 0: none yet."""

    def see(self, norm: float) -> bool:
        """Takes in an update's gradient norm before clipping; whether the rate was halved."""
        bar = self.factor * self.mean
        exploded = 0 < bar < norm
        if exploded:
            self.scale /= 2
            # one spike must not raise the bar much; but norms that have come to stay must not halve the rate for ever
            norm = bar
        self.mean = norm if self.mean == 0 else 0.95 * self.mean + 0.05 * norm
        return exploded
