"""Plan, run and report a study of how training scales: gfrnn-study, python src/study.py."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Union, cast

import tyro

from gfrnn import cli
from gfrnn.config import EXIT_FAILED, EXIT_STOPPED, UserError
from gfrnn.scaling.folder import StudyFolder
from gfrnn.scaling.grid import Grid, How, expand
from gfrnn.scaling.group import LIFELINE, Launcher
from gfrnn.training import stopping  # early: it looks who started this process

_Study = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY_DIR")]
_Number = Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="POINT")]
_Gigabytes = Annotated[float, tyro.conf.arg(metavar="GB")]


@dataclass(frozen=True)
class PlanCommand:
    """The grid's points, what each would take, and which cannot be run. Runs none."""

    grid: Grid = field(default_factory=Grid)
    how: How = field(default_factory=How)
    memory: _Gigabytes = 0.0
    """That a process may take. Default: its share of this machine's memory."""
    gflops: float = 0.0
    """GFLOP/s that a process trains at. Default: as --measured has it, else half of this machine's peak."""
    measured: Path | None = None
    """A study that has measured points of the same presets, on a CPU with as many threads."""
    json: Path | None = None
    """Write the plan there too."""
    points: Path | None = None
    """Write the points there as trainings: lines for slurm/study.sbatch."""

    def __call__(self) -> None:
        from gfrnn.scaling.plan import Peak, plan, show, to_json, training_flags

        self.how.check()
        points = expand(self.grid, self.how)
        for flag, file in (("--json", self.json), ("--points", self.points)):
            if file is not None:
                cli.check_writable(flag, file)
        measured = StudyFolder(self.measured).read() if self.measured is not None else None
        peak = Peak(self.gflops, measured, self.how.threads)
        planned = plan(points, self.how, peak=peak, memory=1e9 * self.memory)
        trainings = training_flags(planned, self.how) if self.points is not None else ""
        show(planned)
        for each in planned:
            if each.refused:
                cli.say(f"note: {each.point.name} {each.refused}")
        for note in peak.notes(points):
            cli.say(f"note: {note}")
        if self.json is not None:
            self.json.write_text(to_json(planned))
        if self.points is not None:
            self.points.write_text(trainings)


@dataclass(frozen=True)
class RunCommand:
    """Measure the points of a study that are not done: here, or with --slurm (sbatch's flags after --).

    A study that is there goes on; flags of a grid add points to it, or replace them while nothing has begun. Results go
    to its folder and to MLflow.
    """

    study: _Study
    grid: Grid = field(default_factory=Grid)
    how: How = field(default_factory=How)
    memory: _Gigabytes = 0.0
    """That a process may take. Default: its share of this machine's memory."""
    launcher: Launcher = "plain"
    """What starts the processes here: environment variables alone, or DeepSpeed's launcher."""
    only: tuple[int, ...] = ()
    """Points by their numbers; the first is 1."""
    again: bool = False
    """Measure points that failed once more."""
    slurm: bool = False
    """Submit an array for each number of nodes and processes, in place of measuring here."""
    dry_run: bool = False
    """Print the calls of sbatch; submit nothing. The study is made, but has not begun."""
    experiment: str = "gfrnn-study"
    """MLflow's."""

    def __call__(self, sbatch: list[str]) -> None:
        from gfrnn.scaling.run import arrays, refuse_large, run_here, send, submit
        from gfrnn.scaling.store import Store

        if sbatch and not self.slurm:
            raise UserError("what comes after -- is for sbatch; add --slurm")
        self.how.check()
        store = Store(self.study, self.experiment)
        study = StudyFolder(self.study)
        known = (self.study / "study.json").exists() and self.grid == Grid()
        study.begin([] if known else expand(self.grid, self.how), self.how)
        numbers = list(self.only) or list(range(1, len(study.points) + 1))
        points = [study.point(number) for number in numbers]
        if self.again and not self.dry_run:
            for point in points:
                result = study.result(point)
                if result is not None and result.measurement.failed:
                    (study.of(point) / "measurement.json").unlink()
        if self.slurm or self.dry_run:
            if not self.dry_run:
                if self.memory:  # of this machine nothing follows for a cluster's
                    refuse_large(study, numbers, 1e9 * self.memory)
                send(study, store)
            calls = arrays(study, numbers, sbatch, self.experiment, again=self.again and self.dry_run)
            submit(study, calls, dry_run=self.dry_run)
            return
        run_here(study, numbers, store, self.launcher, 1e9 * self.memory)
        done = [study.result(point) for point in study.points]
        failed = sum(result is not None and bool(result.measurement.failed) for result in done)
        print(f"{sum(result is not None for result in done)} of {len(done)} points are done, {failed} of them failed")
        print(f"study: {self.study}")
        print(f"MLflow: experiment {self.experiment} at {store.shown}")


@dataclass(frozen=True)
class MeasureCommand:
    """Measure one point, as one of its processes: what run and SLURM start."""

    study: _Study
    number: _Number

    def __call__(self) -> None:
        from gfrnn.scaling.measure import measure

        if os.environ.get(LIFELINE):
            threading.Thread(target=_end_with_stdin, daemon=True).start()
        study = StudyFolder(self.study).read()
        if not os.environ.get(LIFELINE):  # else who started it looks at the clock
            _end_after(study.how.limit)
        point = study.point(self.number)
        if study.result(point) is not None:
            cli.say(f"point {self.number} is done: {point.name}")
            return
        measure(study, point)


@dataclass(frozen=True)
class CollectCommand:
    """After `measure` under SLURM: note how it ended, and bring MLflow up to date."""

    study: _Study
    number: _Number
    status: int = 0
    """It ended with."""
    said: Path | None = None
    """A file of what it printed."""
    experiment: str = "gfrnn-study"
    """MLflow's."""

    def __call__(self) -> None:
        from gfrnn.scaling.group import reason
        from gfrnn.scaling.run import collect
        from gfrnn.scaling.store import Store

        said = self.said.read_text(errors="replace") if self.said is not None and self.said.exists() else ""
        store = Store(self.study, self.experiment)
        collect(StudyFolder(self.study).read(), self.number, reason([self.status], [said]), store)


@dataclass(frozen=True)
class ReportCommand:
    """Make the report of an experiment from MLflow alone: a page, pictures, tables and conclusions."""

    output: Path = Path("report")
    """Folder for index.html, and a PNG and CSV of each section."""
    tracking_uris: tuple[str, ...] = ()
    """MLflow stores, of several machines maybe. Default: MLFLOW_TRACKING_URI."""
    experiment: str = "gfrnn-study"
    """MLflow's."""
    preset: str = ""
    """Of the measurements to report, where there are several."""
    clusters: tuple[str, ...] = ()
    """Clusters to predict: presets (dgx-h100, say) or YAML files."""
    target_bpc: float = 0.0
    """Also the time and cost to this validation BPC, from a training in the same stores that has reached it."""
    training_experiment: str = "gfrnn"
    """Where that training is."""
    critical_batch: float = 0.0
    """Critical batch size in characters. Default: that training's gradient noise scale (--noise-scale)."""

    def __call__(self) -> None:
        from gfrnn.scaling.clusters import load_cluster
        from gfrnn.scaling.page import write, written
        from gfrnn.scaling.report import make
        from gfrnn.scaling.store import log_report, read
        from gfrnn.scaling.trainings import find_target

        clusters = [load_cluster(name) for name in self.clusters]
        uris = list(self.tracking_uris) or [os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")]
        measurements, sweep = [], []
        for uri in uris:
            found, timed = read(uri, self.experiment)
            measurements += found
            sweep += timed
        if self.preset:
            measurements = [each for each in measurements if each.point.preset == self.preset]
            if not measurements:
                raise UserError(f"--preset {self.preset}: no measurement in {self.experiment} is of it")
        target = None
        if self.target_bpc:
            target = find_target(
                uris, self.training_experiment, measurements[0].point.preset, self.target_bpc, self.critical_batch
            )
        made = make(measurements, sweep, clusters=clusters, target=target)
        page = write(made, self.output)
        for line in made.conclusions:
            print(f"- {line}")
        print(f"page: {page}")
        failing = log_report(uris[0], self.experiment, written(made, self.output))
        if failing:
            cli.say(f"note: the report is not in MLflow: {failing}")


def _end_with_stdin() -> None:
    """Who started this process holds the other end."""
    while sys.stdin.buffer.read(1):
        pass
    os._exit(EXIT_STOPPED)


def _end_after(minutes: float) -> None:
    """This process, as failed."""
    timer = threading.Timer(60 * minutes, cli.end, (f"failed: took more than {minutes:g} minutes", EXIT_FAILED))
    timer.daemon = True
    timer.start()


Command = Union[  # noqa: UP007  # tyro reads it at run time; another subcommand is a line here
    Annotated[PlanCommand, tyro.conf.subcommand("plan")],
    Annotated[RunCommand, tyro.conf.subcommand("run")],
    Annotated[ReportCommand, tyro.conf.subcommand("report")],
    Annotated[MeasureCommand, tyro.conf.subcommand("measure")],
    Annotated[CollectCommand, tyro.conf.subcommand("collect")],
]


def main() -> None:
    """gfrnn-study."""
    stopping.end_on_signals()
    cli.run(_main)


def _main() -> None:
    argv, sbatch = sys.argv[1:], []
    if "--" in argv:
        at = argv.index("--")
        argv, sbatch = argv[:at], argv[at + 1 :]
    command = cli.parse(cast(type[Any], Command), argv)
    if isinstance(command, RunCommand):
        command(sbatch)
    elif sbatch:
        raise UserError("what comes after -- is for sbatch, which only study.py run --slurm calls")
    else:
        command()


if __name__ == "__main__":
    main()
