"""Trainings that take turns: each is src/train.py, stopped after a while and started again later.

A turn is the trainer's own `--time-limit`: it ends at an update, writes a checkpoint and ends with status 75; started
again it goes on bit for bit. The next turn is always that of the training that has done the least of its budget, so
all advance together, and a minute in which the machine is slow hits every model alike, fast or slow. A start and a
checkpoint are outside what is counted as training, so a turn costs patience, not accuracy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gfrnn import cli
from gfrnn.config import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USER, RunFailed, Stopped, UserError
from gfrnn.runs import RunFolder, write_json
from paper.plan import Budget, Choice, Plan, read_json
from trainings import end_with_parent

TRAIN = Path(__file__).parents[2] / "src/train.py"
VALIDATIONS = 20  # in a budget
_ENDLESS = 10**9  # updates: a budget of seconds ends it


@dataclasses.dataclass(frozen=True)
class Training:
    """One model, one seed, in its run folder."""

    model: str
    seed: int
    folder: RunFolder
    choice: Choice
    budget: Budget
    updates: int | None
    """None: until `budget` seconds are over."""
    flags: tuple[str, ...]

    @property
    def finished(self) -> bool:
        summary = self.folder.read_summary()
        return summary is not None and summary["finished"]

    def position(self) -> tuple[int, float]:
        """(updates, seconds of training) in the latest checkpoint."""
        latest = self.folder.named_checkpoint("latest")
        if latest is None:
            return 0, 0.0
        position = json.loads((latest / "trainer.json").read_text())["position"]
        return position["step"], position["train_seconds"]

    @property
    def done(self) -> float:
        """Share of the budget."""
        updates, seconds = self.position()
        return seconds / self.budget.amount if self.updates is None else updates / self.updates

    def command(self, minutes: float) -> list[str]:
        """To go on for so many minutes; 0: to the end."""
        total = self.updates
        if total is None:
            updates, seconds = self.position()
            left = self.budget.amount - seconds
            total = _ENDLESS if left > 0 else updates + 1  # the last one, after which it validates and tests
            minutes = min(minutes or math.inf, max(left, 1.0) / 60) if left > 0 else 0.0
        return [
            *[sys.executable, str(TRAIN), "--preset", self.model, "--seed", str(self.seed)],
            *["--output-dir", str(self.folder.path), "--max-updates", str(total), "--time-limit", f"{minutes:.6f}"],
            *["--checkpoint-every", "0", "--patience", "0", *self.choice.flags, *self.flags],
        ]


def training(
    plan: Plan,
    model: str,
    seed: int,
    choice: Choice,
    *,
    part: float = 1.0,
    valid_every: int = 0,
    experiment: str,
    name: str = "",
) -> Training:
    """Of a plan's model, for that part of its budget.

    Raises UserError for settings that do not go together, and for a folder that was trained with another choice.

    valid_every: updates; 0: twenty times in all, or every 30 updates of a budget of seconds.
    """
    budget = plan.budget.share(part)
    updates = budget.updates(plan.settings(model), plan.updates_an_epoch)
    if updates is None and choice.schedule != "constant":
        raise UserError(f"--schedule {choice.schedule} must know the end: give --characters, --updates or --epochs")
    every = valid_every or (30 if updates is None else max(1, updates // VALIDATIONS))
    if not valid_every and every > 10:
        every -= every % 10
    # each validation has a logged line of its update, which has the characters and the seconds
    looks = ["--valid-every", str(every), "--log-every", str(math.gcd(every, 10)), "--experiment", experiment]
    folder = RunFolder(plan.folder / (name or f"{model}-seed-{seed}"))
    if folder.read_summary() is not None:  # what has ended is not started, so the trainer does not compare it
        own = folder.read_settings().optimization
        then = Choice(own.optimizer, own.learning_rate, own.schedule)
        if str(then) != str(choice):
            raise UserError(f"{folder.path} was trained with {then}, not {choice}: give another folder")
    return Training(model, seed, folder, choice, budget, updates, (*looks, *plan.flags))


class Interrupts:
    """Has Ctrl-C, SIGTERM and SIGHUP stop the training under way, with a checkpoint, and then this program."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.caught = ""

    @contextlib.contextmanager
    def listening(self) -> Iterator[Interrupts]:
        def on_signal(number: int, frame: object) -> None:
            self.caught = signal.Signals(number).name
            if self.process is not None:
                self.process.terminate()

        wanted = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, on_signal) for number in wanted}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        if self.caught:
            raise Stopped(f"{self.caught}; the same command goes on")


def take_turns(
    trainings: Sequence[Training], minutes: float, threads: int, notes: Notes, interrupts: Interrupts
) -> list[Training]:
    """Trains all to the end; returns those that failed (a loss that is not finite). Raises Stopped."""
    failed: list[Training] = []
    while pending := [each for each in trainings if each not in failed and not each.finished]:
        interrupts.check()
        turn = min(pending, key=lambda each: each.done)
        before = turn.position()
        notes.begin(turn)
        status = _start(turn.command(minutes if len(pending) > 1 else 0.0), turn, threads, interrupts)
        updates, seconds = turn.position()
        cli.say(f"{turn.folder.path.name}: {updates:,} updates, {turn.done:.0%} of the budget, {seconds:.1f} s")
        interrupts.check()
        if status == EXIT_FAILED:
            cli.say(f"{turn.folder.path.name} {_last_words(turn)}")
            failed.append(turn)
        elif status == EXIT_USER:
            raise UserError(_last_words(turn).removeprefix("error: "))
        elif status not in (EXIT_FINISHED, EXIT_STOPPED) or (status == EXIT_STOPPED and (updates, seconds) == before):
            raise RunFailed(
                f"{turn.folder.path.name} ended with status {status}: see {_log(turn)}; the same command goes on"
            )
    return failed


def _start(command: list[str], turn: Training, threads: int, interrupts: Interrupts) -> int:
    source = str(TRAIN.parent)
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
    with _log(turn).open("ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        interrupts.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # Ctrl-C comes to it once, from here
            preexec_fn=end_with_parent,
        )
        try:
            if interrupts.caught:  # in the moment before
                interrupts.process.terminate()
            return interrupts.process.wait()
        finally:
            interrupts.process = None


def _log(turn: Training) -> Path:
    return turn.folder.path.with_name(f"{turn.folder.path.name}.log")


def _last_words(turn: Training) -> str:
    lines = _log(turn).read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith(("error: ", "failed: "))), lines[-1])


# -------------------------------------------------------------------------------------------------- who was there


def this_machine(threads: int) -> dict[str, Any]:
    """CPU (or GPU) by name, cores that may be used, threads of a training."""
    names: list[str] = []
    if Path("/proc/driver/nvidia").exists():  # else there is no need to load torch
        import torch

        if torch.cuda.is_available():
            names = [torch.cuda.get_device_name()]
    if not names and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return {"device": name, "cores": cli.cores(), "threads": threads}


class Notes:
    """trainings.json: whether each training had the machine to itself in all its turns, and which machine.

    Args:
        alone: the user's word for the turns to come.
    """

    def __init__(self, folder: Path, machine: dict[str, Any], *, alone: bool):
        self.path, self.machine, self.alone = folder / "trainings.json", machine, alone

    def begin(self, turn: Training) -> None:
        """Before the turn, so that a kill loses nothing."""
        kept = read_notes(self.path)
        name = turn.folder.path.name
        before = kept.get(name) if turn.position() != (0, 0.0) else None
        alone, turns = self.alone, 1
        if before is not None:
            if before["machine"] != self.machine and before["alone"]:
                cli.say(f"note: {name} goes on on another machine, or with other threads: its seconds will not count")
            alone = alone and before["alone"] and before["machine"] == self.machine
            turns += before["turns"]
        kept[name] = {"alone": alone, "machine": self.machine, "turns": turns}
        write_json(self.path, kept)


def read_notes(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
