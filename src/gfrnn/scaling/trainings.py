"""Trainings in MLflow that say how many updates a target takes, and how large a batch is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gfrnn.config import UserError
from gfrnn.scaling.target import Reference, Target
from gfrnn.training.mlflow_sender import without_password

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_LAST = 0.25  # of a training's noise scales: the end's, as it rises all along


def find_target(uris: Sequence[str], experiment: str, preset: str, bpc: float, critical: float = 0.0) -> Target:
    """From the training of the preset that has reached the validation BPC after the fewest characters.

    Args:
        uris: of MLflow stores. critical: critical batch size, characters; 0: that training's gradient noise scale.

    Raises UserError if none has reached it, or there is no noise scale.
    """
    from gfrnn.scaling.store import runs_of

    found: list[tuple[float, Reference, MlflowClient, str]] = []
    best = float("inf")
    for uri in uris:
        client, runs = runs_of(uri, experiment)
        for run in runs:
            if run.data.tags.get("preset") != preset:
                continue
            rows, steps = (int(run.data.params.get(f"batch.{name}", 0)) for name in ("rows", "steps"))
            points = client.get_metric_history(run.info.run_id, "valid_bpc")
            best = min([best, *(point.value for point in points)])
            reached = [point.step for point in points if point.value <= bpc and point.step > 0]
            if reached:
                found.append(
                    (min(reached) * rows * steps, Reference(rows * steps, min(reached)), client, run.info.run_id)
                )
    where = f"of {preset} in experiment {experiment} at {', '.join(map(without_password, uris))}"
    if not found:
        reached_ = f"the best is {best:.3f}" if best < float("inf") else "there is none"
        raise UserError(f"--target-bpc {bpc:g}: no training {where} has reached it: {reached_}")
    _, reference, client, run_id = min(found, key=lambda each: each[0])
    return Target(bpc, reference, critical or _noise_scale(client, run_id, where))


def _noise_scale(client: MlflowClient, run_id: str, where: str) -> float:
    """The mean of the last quarter of a training's."""
    values = [point.value for point in client.get_metric_history(run_id, "noise_scale")]
    last = [value for value in values[int(len(values) * (1 - _LAST)) :] if value > 0]
    if not last:
        raise UserError(
            f"the training {where} has no gradient noise scale: train with --noise-scale, or give --critical-batch"
        )
    return sum(last) / len(last)
