"""Measures the points of a study that are not done yet: here, one after another, or as SLURM arrays."""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from gfrnn.cli import say
from gfrnn.config import UserError
from gfrnn.scaling.folder import Result, StudyFolder
from gfrnn.scaling.group import Launcher, measured_here
from gfrnn.scaling.measure import failed
from gfrnn.scaling.plan import too_large
from gfrnn.scaling.records import Point
from gfrnn.scaling.store import Store

ROOT = Path(__file__).parents[3]
_MORE_MINUTES = 10  # of an array's task than of its point: to start, and to collect


def run_here(study: StudyFolder, numbers: Sequence[int], store: Store, launcher: Launcher, memory: float) -> None:
    """Measures points of one node that are not done, each in processes of its own.

    memory: bytes that a process may take; 0: its share of this machine's. A point that fails does not end the others.
    """
    send(study, store)  # what an earlier call could not
    for number in numbers:
        point, name = study.point(number), f"point {number} of {len(study.points)}, {study.point(number).name}"
        if study.result(point) is not None:
            continue
        if point.nodes > 1:
            say(f"{name}: it needs {point.nodes} nodes, with --slurm; left out")
            continue
        folder = study.of(point)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", blocking=False):
                say(f"{name} ...")
                why = too_large(point, study.how, memory) or measured_here(study, number, launcher)
                _settle(study, number, why)
        except Timeout:
            say(f"{name}: another study.py measures it; left out")
            continue
        _clean(study, number)
        send(study, store)


def collect(study: StudyFolder, number: int, why: str, store: Store) -> None:
    """After a point's processes have ended: a failed result if it has none, whose reason is `why`, and MLflow."""
    if study.result(study.point(number)) is None:
        _settle(study, number, why)
    _clean(study, number)
    send(study, store, [study.point(number)])  # others of the array see to theirs


def send(study: StudyFolder, store: Store, points: Sequence[Point] | None = None) -> None:
    """Brings MLflow up to date, of all points or these; where that fails the next call does it, and a line says so."""
    results = [result for point in points or study.points if (result := study.result(point)) is not None]
    failure = store.send(results)
    if failure:
        say(f"MLflow at {store.shown} fails ({failure}); the figures are in {study.path}, the same command sends them")


def _settle(study: StudyFolder, number: int, why: str) -> None:
    """Says what came of a point; writes a failed result if there is a reason."""
    point = study.point(number)
    if why:
        study.write(failed(study, point, why))
    result = study.result(point)
    assert result is not None
    say(f"point {number}: {describe(result)}")


def _clean(study: StudyFolder, number: int) -> None:
    """The corpus of a measurement is not kept with it; it trains in a folder that it leaves empty."""
    shutil.rmtree(study.of(study.point(number)) / "run", ignore_errors=True)


def describe(result: Result) -> str:
    """In words."""
    found = result.measurement
    if found.failed:
        return f"failed: {found.failed}"
    return (
        f"{1e3 * found.step_seconds:.1f} ms an update ({1e3 * found.step_seconds_low:.1f} to "
        f"{1e3 * found.step_seconds_high:.1f}), {found.communication_share:.0%} of it waiting, "
        f"{found.characters_per_second:,.0f} characters/s, {found.memory_bytes / 1e6:,.0f} MB"
    )


# ---------------------------------------------------------------------------------------------------------- SLURM


def refuse_large(study: StudyFolder, numbers: Sequence[int], memory: float) -> None:
    """Points that cannot fit in so many bytes a process are not submitted: they have failed."""
    for number in numbers:
        point = study.point(number)
        if study.result(point) is None and (why := too_large(point, study.how, memory)):
            _settle(study, number, why)


def arrays(
    study: StudyFolder, numbers: Sequence[int], sbatch: Sequence[str], experiment: str, *, again: bool = False
) -> list[list[str]]:
    """A call of sbatch for each shape of job among the points that are not done: an array has one.

    again: points that failed are not done.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for number in numbers:
        point = study.point(number)
        result = study.result(point)
        if result is None or (again and result.measurement.failed):
            shapes.setdefault((point.nodes, point.world_size // point.nodes), []).append(number)
    home = _home()
    return [
        [
            "sbatch",
            "--parsable",
            f"--array={','.join(map(str, shape))}",
            f"--nodes={nodes}",
            f"--ntasks-per-node={per_node}",
            f"--time={math.ceil(study.how.limit) + _MORE_MINUTES}",
            *sbatch,
            str(home / "slurm/measure.sbatch"),
            str(study.path.absolute()),
            experiment,
        ]
        for (nodes, per_node), shape in shapes.items()
    ]


def _home() -> Path:
    """The checkout: that of this file, or the current folder."""
    for folder in (ROOT, Path.cwd()):
        if (folder / "slurm/measure.sbatch").exists():
            return folder
    raise UserError("there is no slurm/measure.sbatch here: call study.py from a checkout of gfrnn")


def submit(study: StudyFolder, calls: Sequence[Sequence[str]], *, dry_run: bool) -> None:
    """Makes the calls, with their job numbers on stdout; or prints them. Raises UserError if some are refused."""
    if not calls:
        say("nothing is left to measure")
    if dry_run:
        for call in calls:
            print(shlex.join(call))
        return
    if calls and shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit from a login node, or look at the calls with --dry-run")
    refused = []
    for call in calls:  # one that is refused does not keep the others from their turn
        done = subprocess.run(call, cwd=_home(), stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            study.note_submitted()
            print("study", done.stdout.strip().partition(";")[0], flush=True)
        else:
            refused.append(shlex.join(call))
    if refused:
        raise UserError(f"sbatch refuses {'; '.join(refused)} (above); its flags come after --")
