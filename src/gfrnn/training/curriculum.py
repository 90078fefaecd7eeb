"""How hard the programs are that training reads: Zaremba and Sutskever 2014 (arXiv 1410.4615), section 4.

baseline and mix stay what they are. naive and blend have levels, from one digit and one operation up to the target: a
check, after each validation, goes on to the next where the present one is learned or nothing more is.
"""

from __future__ import annotations

from dataclasses import dataclass

LEARNED = 0.95
"""Accuracy on a level's validation programs from which on it is learned."""
PATIENCE = 5
"""Checks without a new best training accuracy after which nothing more is."""
DECAY = 0.8
"""After the last level each such check multiplies the learning rate by so much."""


@dataclass
class Curriculum:
    """Where a run is on the ladder: plain values, kept in trainer.json."""

    level: int = 0
    """From 0."""
    begun: int = 0
    """Updates that were done when the level began."""
    checks_without_rise: int = 0
    best_accuracy: float = 0.0
    """In training on this level, between two checks."""
    accuracy: float = 0.0
    updates: int = 0
    """Sum of training accuracy since the last check, and of how many updates."""
    rate_scale: float = 1.0

    def see(self, accuracy: float) -> None:
        """An update's training accuracy."""
        self.accuracy += accuracy
        self.updates += 1

    def check(self, update: int, valid_accuracy: float, last: int) -> bool:
        """After `update` updates; last: the ladder's last level. Whether the level, or else the rate, was changed."""
        accuracy = self.accuracy / max(self.updates, 1)
        self.accuracy, self.updates = 0.0, 0
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.checks_without_rise = accuracy, 0
        else:
            self.checks_without_rise += 1
        if valid_accuracy <= LEARNED and self.checks_without_rise < PATIENCE:
            return False
        self.checks_without_rise = 0
        if self.level == last:
            self.rate_scale *= DECAY
        else:
            self.level, self.begun, self.best_accuracy = self.level + 1, update, 0.0
        return True
