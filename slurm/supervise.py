"""What a batch script becomes: it runs preflight and training by srun, watches the ranks, and decides what comes after.

SLURM's warning (USR1) and TERM become the file `stop` of the control folder: all ranks checkpoint at one update and
end, and the job requeues itself. The launcher is not signalled: it would signal its ranks one after another. Ranks that
die, hang or fall silent (their heartbeats: gfrnn/training/heartbeat.py) end the training: the job says which, on which
node, excludes that node and requeues; unless it failed three times with no checkpoint in between, or the failure is
one that another start would meet again (verdicts.py). Whether a run has finished is what its summary.json says.

    RUN/.job-JOBID/RESTART/     hostfile, stop, preflight.json, rank-00000.json ...
    RUN/.job-JOBID/ends.jsonl   how each start of the job ended

It runs where SLURM's programs are, so outside a container, and needs Python 3.9 and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from verdicts import FAILED, STOPPED, USER, Limits, Ranks, Record, Verdict, judge

FAILURES_ALLOWED = 3
POLL = 0.5
UNREACHABLE = ("Unable to contact", "Socket timed out", "Zero Bytes were transmitted")
"""What commands say when slurmctld is being started again."""
PATIENCE = 300.0
"""Seconds that it may take."""


# ------------------------------------------------------------------------------------------------------------ SLURM


class Job:
    """This job, as SLURM has it."""

    def __init__(self) -> None:
        self.id = os.environ["SLURM_JOB_ID"]
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        # one task of an array has the array's own number, and by that number scontrol means all tasks
        self.name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else self.id
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)

    def shown(self) -> dict[str, str]:
        """`scontrol show job`; nothing if SLURM does not answer."""
        _, said = slurm("scontrol", "show", "job", self.name)
        return dict(re.findall(r"(\S+?)=(\S*)", said))

    def is_ours(self, shown: dict[str, str]) -> bool:
        """Whether no later restart has begun while this process lived on unseen (its slurmd was lost, say)."""
        return int(shown.get("Restarts", self.restart)) == self.restart

    def is_out_of_time(self, shown: dict[str, str]) -> bool:
        """Whether the job has had all of its time: then SLURM is ending it, else a user."""
        limit, spent = (_seconds(shown.get(name, "")) for name in ("TimeLimit", "RunTime"))
        return limit is not None and spent is not None and spent >= limit

    def requeue(self) -> str | None:
        """Asks SLURM to start this job again; returns why not."""
        status, said = slurm("scontrol", "requeue", self.name)
        return None if status == 0 else said

    def exclude(self, nodes: Sequence[str]) -> str:
        """Keeps the requeued job off nodes, if it can do without them; says what came of it."""
        shown = self.shown()
        names = " and ".join(nodes)
        wanted = set(nodes) & _hostnames(shown.get("ReqNodeList"))
        if wanted:
            return f"{names}: not excluded, as the job asks for {' '.join(sorted(wanted))} by --nodelist"
        excluded = {*nodes, *_hostnames(shown.get("ExcNodeList"))}
        least = self._least_nodes(shown)
        others = usable_nodes(shown) - excluded
        if len(others) < least:
            up = " ".join(sorted(others)) or "none"
            return f"{names}: not excluded, as the job needs {least} nodes, and of others like it there are: {up}"
        status, said = slurm("scontrol", "update", f"JobId={self.name}", f"ExcNodeList={','.join(sorted(excluded))}")
        return f"{names}: excluded" if status == 0 else f"{names}: could not be excluded: {said}"

    def _least_nodes(self, shown: dict[str, str]) -> int:
        """How few nodes the job may have: what it asked for, else as many as it was given.

        NumNodes is what it was given as long as it has not left them, and then what is left of these. The request is in
        ReqTRES from SLURM 23.02 on, and before that in squeue's JSON alone.
        """
        requested = shown.get("ReqTRES")
        if requested is None:
            try:
                jobs = json.loads(slurm("squeue", "--json")[1])["jobs"]
                requested = next(job["tres_req_str"] for job in jobs if str(job["job_id"]) == self.id)
            except (ValueError, KeyError, StopIteration):
                requested = ""
        found = re.search(r"\bnode=(\d+)", requested)
        return int(found[1]) if found else int(os.environ["SLURM_JOB_NUM_NODES"])


def usable_nodes(shown: dict[str, str]) -> set[str]:
    """Nodes of a job's partition that are up, and have what it asks for: its features, and GRES by name and type.

    Features that are more than names joined by & are left to SLURM: then any node counts. Reserved ones do not, unless
    the job is in a reservation.
    """
    columns = "NodeList:200,StateCompact:30,Features:1000,Gres:1000"
    status, said = slurm(
        "sinfo", "--noheader", "--Node", "--partition", shown.get("Partition", ""), "--Format", columns
    )
    features = shown.get("Features", "(null)")
    needed = set(features.split("&")) if re.fullmatch(r"[\w&-]+", features) else set()
    asked = ",".join(shown.get(name, "") for name in ("TresPerNode", "TresPerTask", "TresPerJob"))
    words = re.findall(r"gres[:/]([\w-]+)(?::([A-Za-z][\w.-]*))?", asked)  # gpu, and a type where there is one
    gres = {word for pair in words for word in pair if word}
    unusable = ["down", "drain", "drng", "fail", "maint", "unk", "boot", "pow"]
    if shown.get("Reservation", "(null)") in ("", "(null)"):
        unusable.append("resv")
    found = set()
    for line in said.splitlines() if status == 0 else []:
        name, state, has, devices = line.split()
        fits = needed <= set(has.split(",")) and gres <= set(re.split(r"[:,()]", devices))
        if fits and not state.startswith(tuple(unusable)) and not state.endswith("*"):
            found.add(name)
    return found


def _hostnames(listed: str | None) -> set[str]:
    """Of node[1-3], say."""
    if listed in (None, "", "(null)"):
        return set()
    return set(slurm("scontrol", "show", "hostnames", str(listed))[1].split())


def _seconds(text: str) -> int | None:
    """Of [DAYS-]HH:MM:SS; None for words."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def slurm(*command: str) -> tuple[int, str]:
    """The status of a command of SLURM's, and what it says.

    As a requeue sends TERM to all processes of the job, and so to a command that runs just then, that one is run again;
    so is one that finds no slurmctld, for a while.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        done = subprocess.run(command, capture_output=True)
        said = done.stdout.decode(errors="replace") or " ".join(done.stderr.decode(errors="replace").split())
        if done.returncode != 0 and any(words in said for words in UNREACHABLE) and time.monotonic() < deadline:
            time.sleep(5)
        elif done.returncode != -signal.SIGTERM:
            return done.returncode, said.strip()


# ------------------------------------------------------------------------------------------------- a start of the job


class Supervisor:
    """One start of the job."""

    def __init__(self, run: Path, limits: Limits):
        self.job, self.run, self.limits = Job(), run, limits
        self.control = Path(os.environ["GFRNN_CONTROL"])
        self.nodes = os.environ["GFRNN_NODES"].split()
        self.per_node = int(os.environ["GFRNN_PER_NODE"])
        self.signal: str | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.signal = self.signal or signal.Signals(number).name

    def preflight(self, command: Sequence[str]) -> Verdict | None:
        """Why there is nothing to train, if so."""
        limit = self.limits.start + 60  # nodes wait for one another as long as that, and say who is missing
        deadline = time.monotonic() + limit

        def look() -> Verdict | None:
            if time.monotonic() < deadline:
                return None
            return Verdict("failed", f"preflight did not end within {limit:g} s", FAILED)

        status, trouble = self._wait_for(subprocess.Popen(command), look)
        if self.signal is not None:
            return Verdict("stopped", f"{self.signal} before training began", STOPPED)
        if trouble is not None:
            return trouble
        if status == 0:
            return None
        problems = []
        if (self.control / "preflight.json").exists():
            problems = json.loads((self.control / "preflight.json").read_text())["problems"]
        broken = [problem for problem in problems if problem["broken"]]
        if broken:
            why = "; ".join(f"{problem['node']}: {problem['what']}" for problem in broken)
            return Verdict("failed", why, FAILED, None, tuple(dict.fromkeys(problem["node"] for problem in broken)))
        if problems:
            return Verdict("given up", "preflight was not passed", USER)
        return Verdict("failed", f"preflight ended with status {status}", FAILED)

    def train(self, command: Sequence[str]) -> Verdict:
        """Trains, and says how it ended."""
        ranks = Ranks(self.control, self.nodes, self.per_node)
        summary = self._summary()

        def look() -> Verdict | None:
            ranks.look()
            return ranks.trouble(self.limits)

        status, trouble = self._wait_for(subprocess.Popen(command), look)
        ranks.look()
        now = self._summary()
        finished = bool(now.get("finished")) and (now != summary or ranks.of_kind("finished") is not None)
        return judge(ranks, status, finished=finished, trouble=trouble, stopping=self.signal is not None)

    def _wait_for(
        self, step: subprocess.Popen[bytes], look: Callable[[], Verdict | None]
    ) -> tuple[int, Verdict | None]:
        """srun's status, and the trouble for which it was not waited for any longer."""
        stopped_at: float | None = None
        while step.poll() is None:
            time.sleep(POLL)
            trouble = look()
            if trouble is not None:
                return FAILED, trouble
            if self.signal is not None and stopped_at is None:
                stopped_at = time.monotonic()
                say(f"{self.signal} from SLURM: a checkpoint, and then a requeue")
                with contextlib.suppress(OSError):  # on a full disk the file is made, and is enough
                    (self.control / "stop").write_text(f"{self.signal} from SLURM\n")
            if stopped_at is not None and time.monotonic() - stopped_at > self.limits.stop:
                return FAILED, Verdict("stopped", f"did not stop within {self.limits.stop:g} s", STOPPED)
        return step.returncode, None

    def _summary(self) -> Record:
        try:
            found: Record = json.loads((self.run / "summary.json").read_text())
            return found
        except (OSError, ValueError):
            return {}

    # -- after it

    def last_step(self) -> int:
        """Of the latest checkpoint; 0 without one."""
        try:
            return int((self.run / "checkpoints/latest").read_text().strip().rpartition("-")[2])
        except (OSError, ValueError):
            return 0

    def ends(self) -> list[Record]:
        """How earlier starts of this job ended; without lines that a full disk has torn."""
        found: list[Record] = []
        with contextlib.suppress(OSError):
            for line in self._ends_path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    @property
    def _ends_path(self) -> Path:
        return self.control.parent / "ends.jsonl"

    def note(self, verdict: Verdict, restart: int) -> None:
        """Keeps how a start ended."""
        line = json.dumps({"restart": restart, "step": self.last_step(), **verdict._asdict()})
        try:
            with self._ends_path.open("a") as f:
                f.write(line + "\n")
        except OSError as error:
            say(f"{self._ends_path} cannot be written ({error.strerror}): {line}")

    def note_lost_start(self) -> None:
        """If the start before this one could not say how it ended, SLURM ended it: says whom it heard of least.

        Exits if that was once too often: a job that takes its batch node down each time has nobody else to stop it.
        """
        before = self.job.restart - 1
        if before < 0 or any(end["restart"] == before for end in self.ends()):
            return
        beats = [(path.stat().st_mtime, path) for path in (self.control.parent / str(before)).glob("rank-*.json")]
        who = ""
        with contextlib.suppress(OSError, ValueError, KeyError):  # it may have been cut off with its node
            last = json.loads(min(beats)[1].read_text())
            who = f"; rank {last['rank']} on {last['node']} fell silent first, at update {last['step']}"
        verdict = Verdict("failed", f"SLURM ended restart {before} by itself: a node was lost{who}", FAILED)
        if (self.control.parent / str(before) / "stop").exists():
            verdict = Verdict(
                "stopped", f"restart {before} was warned, and was ended before it had saved{who}", STOPPED
            )
        say(verdict.why)
        self.note(verdict, before)
        if verdict.cause == "failed" and self.fails_again_and_again(verdict):
            sys.exit(FAILED)

    def fails_again_and_again(self, verdict: Verdict) -> bool:
        """Whether there was no checkpoint between this failure, which is noted, and others; then says so."""
        times, step = self.ends_here("failed"), self.last_step()
        if times < FAILURES_ALLOWED:
            return False
        say(f"given up: failed {times} times {_after(step)}; the last time: {verdict.why}")
        return True

    def ends_here(self, cause: str) -> int:
        """How many starts have ended so since the latest checkpoint was written."""
        step = self.last_step()
        return sum(end["cause"] == cause and end["step"] == step for end in self.ends())

    def conclude(self, verdict: Verdict) -> int:
        """Requeues, or gives the job's status."""
        shown = self.job.shown()
        if not self.job.is_ours(shown):
            say(f"restart {shown['Restarts']} of job {self.job.name} goes on; nothing is left to do here")
            return STOPPED
        if verdict.cause == "failed" and shown.get("PreemptTime", "None") not in ("None", "Unknown", "(null)"):
            verdict = Verdict("stopped", f"pre-empted; {verdict.why}", STOPPED)
        self.note(verdict, self.job.restart)
        say(f"{verdict.cause}: {verdict.why}" if verdict.why else verdict.cause)
        if verdict.cause in ("finished", "taken over", "given up"):
            return verdict.status
        if verdict.cause == "failed" and self.fails_again_and_again(verdict):
            return FAILED
        if verdict.cause == "stopped" and self.ends_here("stopped") > FAILURES_ALLOWED:  # one of them saved it
            where = _after(self.last_step())
            say(f"given up: stopped again and again {where}, with no update since; raise --time, or lower --signal")
            return FAILED
        state = shown.get("JobState", "RUNNING")
        if state != "RUNNING" and not (state == "COMPLETING" and self.job.is_out_of_time(shown)):
            say(f"the job was cancelled ({state}): not requeued; the same sbatch line goes on")
            return STOPPED
        refused = self.job.requeue()
        if refused is not None:
            say(f"SLURM does not requeue the job ({refused}); the same sbatch line goes on")
            return STOPPED
        if verdict.nodes:
            say(self.job.exclude(verdict.nodes))
        say(f"requeued: goes on after update {self.last_step()}")
        while True:  # until SLURM ends this: a script that ends by itself may be taken for finished
            time.sleep(60)


def _after(step: int) -> str:
    return f"after the checkpoint of update {step}" if step else "before the first checkpoint"


def say(line: str) -> None:
    print(f"{time.strftime('%T')} {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="the run folder")
    parser.add_argument("--preflight", nargs="+", required=True, metavar="COMMAND", help="ends with 0 if all is well")
    parser.add_argument("--training", nargs="+", required=True, metavar="COMMAND", help="the job's step")
    for name, default, what in (
        ("start", 300, "until every rank has begun"),
        ("silent", 60, "that a rank may give no sign"),
        ("stalled", 900, "that ranks may spend in one part of an update; four times as long elsewhere"),
        ("stop", 240, "from SLURM's warning to the last checkpoint"),
    ):
        value = os.environ.get(f"GFRNN_{name.upper()}_SECONDS", default)
        help_ = f"seconds {what} (GFRNN_{name.upper()}_SECONDS; default: {default})"
        parser.add_argument(f"--{name}", type=float, default=float(value), help=help_)
    head, preflight, training = split(sys.argv[1:])
    given = [flag for flag, part in (("--preflight", preflight), ("--training", training)) if part]
    arguments = parser.parse_args([*head, *(f"{flag}=..." for flag in given)])
    limits = Limits(arguments.start, arguments.silent, arguments.stalled, arguments.stop)
    supervisor = Supervisor(arguments.output_dir, limits)
    supervisor.note_lost_start()
    verdict = supervisor.preflight(preflight)
    if verdict is None:
        verdict = supervisor.train(training)
    sys.exit(supervisor.conclude(verdict))


def split(arguments: list[str]) -> list[list[str]]:
    """The supervisor's own arguments, the preflight's command and the training's: these have flags of their own."""
    parts: list[list[str]] = [[], [], []]
    flags = ["--preflight", "--training"]
    for argument in arguments:
        if flags and argument == flags[0]:
            flags.pop(0)
        else:
            parts[2 - len(flags)].append(argument)
    return parts


if __name__ == "__main__":
    main()
