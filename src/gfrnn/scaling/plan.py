"""What a study would take, before it is run: the memory of each point, and its time without a network to wait for."""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from gfrnn import cli
from gfrnn.config import UserError, networks
from gfrnn.scaling.folder import StudyFolder
from gfrnn.scaling.grid import How, prepared, updates_for_timing
from gfrnn.scaling.records import Point
from gfrnn.training.memory import Estimate, estimate

_START = 20.0  # seconds until a process group trains: imports, mostly
_SHARE = 0.5  # of the products' peak that training is assumed to reach


@dataclass(frozen=True)
class Planned:
    """One point, foretold."""

    point: Point
    memory_bytes: int
    """Of a process when it has most."""
    room_bytes: int
    """What a process may take."""
    flops: int
    """An update, of all processes."""
    step_seconds: float
    """An update without waiting for other processes."""
    seconds: float
    """The whole measurement."""
    refused: str = ""
    """Why it cannot be run."""


def plan(points: Sequence[Point], how: How, *, peak: Peak, memory: float) -> list[Planned]:
    """memory: bytes that a process may take; 0: its share of this machine's."""
    found = []
    for point in points:
        settings, config = prepared(point, how, Path("study"))
        step = networks(settings)[-1].train_flops * point.rows * point.steps
        seconds = step / (point.world_size * peak.of(point))
        updates = max(updates_for_timing(settings, how), how.train_updates)
        expected, there = estimate(settings, config, point.world_size, updates_alone=True), room(point, memory)
        found.append(
            Planned(
                point,
                expected.total,
                int(there),
                step,
                seconds,
                _START + updates * seconds + how.sweep_seconds * (point.world_size > 1),
                _refusal(expected, there),
            )
        )
    return found


def too_large(point: Point, how: How, memory: float) -> str:
    """Why a point cannot fit; "" if it can."""
    settings, config = prepared(point, how, Path("study"))
    return _refusal(estimate(settings, config, point.world_size, updates_alone=True), room(point, memory))


def _refusal(expected: Estimate, there: float) -> str:
    if expected.total <= there:
        return ""
    return (
        f"does not fit: a process would take {expected.total / 1e6:,.0f} MB ({expected.moment}) of the "
        f"{there / 1e6:,.0f} MB it may; --memory says otherwise"
    )


def room(point: Point, memory: float) -> float:
    """Bytes that a process of the point may take: what is given, else a GPU's, else a share of this machine's."""
    return memory or _gpu_memory() or _memory_here() / _per_node(point)


@functools.cache
def _gpu_memory() -> float:
    """Bytes of the smallest GPU here; 0 where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return min(float(line) for line in said.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0.0


def _memory_here() -> int:
    """Of this machine, or of the container that this runs in."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


class Peak:
    """FLOP/s that a process trains at: given; as measured points of the same preset did; or half this machine's peak.

    Args:
        gflops: of a process; 0: not known. measured: a study with such points; on a CPU one of as many threads.
        threads: of a process, on a CPU.
    """

    def __init__(self, gflops: float, measured: StudyFolder | None, threads: int) -> None:
        self._given, self._threads = 1e9 * gflops, min(threads, cli.cores())
        self._reached: dict[tuple[str, str], dict[int, list[float]]] = {}
        """By preset and dtype, then by processes a node."""
        self._here: dict[str, float] = {}
        if measured is not None:
            self._take(measured, threads)

    def _take(self, study: StudyFolder, threads: int) -> None:
        for point in study.points:
            result = study.result(point)
            if result is None or result.measurement.failed:
                continue
            found = result.measurement
            if found.machine.device == "cpu" and study.how.threads != threads:
                continue
            reached = found.flops / statistics.fmean(found.busy_seconds) / point.world_size
            by_share = self._reached.setdefault((point.preset, point.dtype), {})
            by_share.setdefault(_per_node(point), []).append(reached)

    def of(self, point: Point) -> float:
        """For a process of this point."""
        if self._given:
            return self._given
        per_node = _per_node(point)
        reached = self._reached.get((point.preset, point.dtype))
        if reached:
            nearest = min(reached, key=lambda number: abs(math.log2(number / per_node)))
            return statistics.median(reached[nearest])
        peak = _SHARE * self._measured(point.dtype)
        return peak if self._cuda else peak * min(1.0, cli.cores() / (per_node * self._threads))

    def notes(self, points: Sequence[Point]) -> list[str]:
        """What the points' times rest on, as far as it was measured on this machine."""
        if not self._here:
            return []
        rates = " and ".join(f"{_SHARE * peak / 1e9:.3g} GFLOP/s in {dtype}" for dtype, peak in self._here.items())
        found = [
            f"the times rest on {rates} a process, half of what large products reach here now (less while other "
            "programs run); --gflops or --measured give another rate"
        ]
        most, cores = max(map(_per_node, points)), cli.cores()
        if most > cores and not self._cuda:
            found.append(
                f"points have up to {most} processes a node, and this machine {cores} core{'s' * (cores > 1)}: their "
                "times are those of processes that share them"
            )
        return found

    @property
    def _cuda(self) -> bool:
        import torch

        return torch.cuda.is_available()

    def _measured(self, dtype: str) -> float:
        """Of large products on this machine (a GPU of it, or so many threads) now."""
        if dtype not in self._here:
            import torch

            from gfrnn.training.flops import gemm_peak

            device = torch.device("cuda" if self._cuda else "cpu")
            if not self._cuda:
                torch.set_num_threads(self._threads)
            self._here[dtype] = gemm_peak(device, torch.bfloat16 if dtype == "bf16" else torch.float32)
        return self._here[dtype]


def _per_node(point: Point) -> int:
    """Processes."""
    return point.world_size // point.nodes


# ------------------------------------------------------------------------------------------------- what is printed


def show(planned: Sequence[Planned]) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table

    runnable = [each for each in planned if not each.refused]
    caption = f"{len(runnable)} of {len(planned)} points can be run, in about {_time(sum(p.seconds for p in runnable))}"
    table = Table(
        title="A study", caption=f"{caption} one after another. An update's time is that of its products alone."
    )
    left = ("point", "")
    for column in ("", "point", "nodes", "processes", "rows", "GFLOP", "s an update", "in all", "MB a process"):
        table.add_column(column, justify="left" if column in left else "right")
    for number, each in enumerate(planned, 1):
        point = each.point
        size = f"{each.memory_bytes / 1e6:,.0f}"
        table.add_row(
            str(number),
            f"{point.preset} {Path(point.ds_config).stem} T={point.steps} {point.dtype}"
            + ("" if point.compression == "none" else f" {point.compression}"),
            str(point.nodes),
            str(point.world_size),
            str(point.rows),
            f"{each.flops / 1e9:,.1f}",
            f"{each.step_seconds:,.3f}",
            _time(each.seconds) if not each.refused else "not run",
            f"{size} > {each.room_bytes / 1e6:,.0f}" if each.refused else size,
            style="dim" if each.refused else None,
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def to_json(planned: Sequence[Planned]) -> str:
    """The table's figures, and all others."""
    rows: list[dict[str, Any]] = [{"name": each.point.name, **asdict(each)} for each in planned]
    return json.dumps(rows, indent=1) + "\n"


def training_flags(planned: Sequence[Planned], how: How) -> str:
    """The points that can be run as trainings: lines of flags of src/train.py, for slurm/study.sbatch.

    They read the preset's text, or what --corpus or --corpus-file name. Raises UserError for a point that no flags can
    say. What a line cannot say, how many processes, is in its comment.
    """
    text = [] if how.corpus == How.corpus else ["--corpus", how.corpus]
    if how.corpus_file is not None:
        text = ["--corpus-file", str(how.corpus_file)]
    lines = []
    for each in planned:
        if each.refused:
            continue
        point = each.point
        if point.compression == "bf16":
            raise UserError(
                f"--points: {point.name}: flags of src/train.py cannot say its compression; leave it out, and put "
                "communication_data_type bf16 into a config of your own"
            )
        settings, _ = prepared(point, how, Path("study"))
        assert settings.deepspeed is not None
        flags = [
            "--preset",
            point.preset,
            "--deepspeed",
            os.path.relpath(settings.deepspeed),
            "--rows",
            str(point.rows),
        ]
        flags += ["--steps", str(point.steps), "--dtype", point.dtype, "--output-dir", f"runs/{point.name}", *text]
        if point.compression != "none":
            flags += ["--compression", point.compression]
        lines.append(f"{shlex.join(flags)}  # {point.world_size} processes on {point.nodes} nodes\n")
    return "".join(lines)
