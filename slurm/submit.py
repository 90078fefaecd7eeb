#!/usr/bin/env python3
"""Submits jobs: one training, a study, or a chain of training, evaluation and export.

    python slurm/submit.py train --nodes=4 --gpus-per-node=8 --cpus-per-task=32 -- --output-dir runs/large
    python slurm/submit.py study --points points.txt --at-once 4 --gpus-per-node=1 -- --max-updates 2000
    python slurm/submit.py chain --nodes=4 -- --output-dir runs/large

What stands before -- and is not named below is sbatch's; what comes after it is src/train.py's. The flags of the
training are looked at first: a job that cannot start is not submitted. slurm/site.sh is read, its settings for sbatch
hold where the command line says nothing else. Paths are those of the checkout. With --dry-run nothing is submitted:
the sbatch calls are printed as they would be made, and the scripts.

A chain's evaluation and export take --partition, --account, --qos, --constraint and --reservation from the training;
they start once it has finished, however often it was requeued, and are dropped if it fails.

On stdout: a line for each job, its kind and number. Exit status: 0; 2 a user's error. Needs Python 3.9, no package.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).resolve().parents[1]
USER = 2
WHERE = (  # sbatch's flags that say where jobs go, not how large they are
    ("-p", "--partition"),
    ("-A", "--account"),
    ("-q", "--qos"),
    ("-C", "--constraint"),
    ("--reservation",),
)
UNREACHED = (  # sbatch's words where it finds no controller
    "Unable to contact slurm controller",
    "Could not establish a configuration source",
    "slurm_persist_conn_open",
)


class Error(Exception):
    """One line for the user."""


class Job(NamedTuple):
    """One call of sbatch."""

    kind: str
    sbatch: list[str]
    script: str
    flags: list[str]

    def call(self) -> list[str]:
        return ["sbatch", "--parsable", *self.sbatch, f"slurm/{self.script}.sbatch", *self.flags]


# ---------------------------------------------------------------------------------------------------- what to submit


def plan(arguments: argparse.Namespace, sbatch: list[str], flags: list[str]) -> list[Job]:
    """The jobs, in order; each after the first depends on the first."""
    if arguments.kind == "train":
        return [Job("train", sbatch, "train", flags)]
    if arguments.kind == "study":
        points = read_points(arguments.points)
        array = f"--array=1-{len(points)}" + (f"%{arguments.at_once}" if arguments.at_once else "")
        return [Job("study", [array, *sbatch], "study", [str(arguments.points.resolve()), *flags])]
    run = values_of(flags, ["--output-dir"]).get("output_dir")
    if not run:
        raise Error("a chain needs --output-dir after --: the evaluation and the export must know the run folder")
    where = [f"--{name}={value}" for name, value in values_of(sbatch, *WHERE).items()]
    after = [*where, *shlex.split(arguments.after)]
    run = os.path.normpath(run)  # runs/large/ too: what is made of it stands beside it
    evaluation = [run, "--json", f"{run}.json", *shlex.split(arguments.evaluate_flags)]
    export = [run, "--output", f"{run}.onnx", *shlex.split(arguments.export_flags)]
    return [
        Job("train", sbatch, "train", flags),
        Job("evaluate", after, "evaluate", evaluation),
        Job("export", after, "export", export),
    ]


def read_points(path: Path) -> list[list[str]]:
    """The flags of each line of a file of points."""
    try:
        points = [shlex.split(line, comments=True) for line in path.read_text().splitlines()]
        points = [point for point in points if point]
    except (OSError, UnicodeDecodeError) as error:
        raise Error(f"--points {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    except ValueError as error:
        raise Error(f"--points {path}: {error}") from error
    if not points:
        raise Error(f"--points {path}: it has no point; a line is the flags of one training")
    return points


def print_point(path: Path, number: str) -> None:
    """For study.sbatch: the flags of one line, one a line."""
    points = read_points(path)
    if not number.isdigit() or not 0 < int(number) <= len(points):
        raise Error(f"{path} has no point {number or 'without a number'}: sbatch --array=1-{len(points)}")
    print("\n".join(points[int(number) - 1]))


def values_of(flags: Sequence[str], *names: Sequence[str]) -> dict[str, str]:
    """What flags are given, among others, by their long names; the last counts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(*name)
    found = vars(parser.parse_known_args(flags)[0])
    return {name: value for name, value in found.items() if value is not None}


# ------------------------------------------------------------------------------------------------------- submitting


def site() -> dict[str, str]:
    """The environment after slurm/site.sh."""
    path = os.environ.get("GFRNN_SITE") or str(HOME / "slurm/site.sh")
    command = ["bash", "-c", '. "$1" >&2 && env -0', "bash", path]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=HOME)
    if done.returncode != 0:
        raise Error(f"{path} ends with status {done.returncode}")
    entries = done.stdout.decode(errors="surrogateescape").split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if entry)


def check(jobs: list[Job], arguments: argparse.Namespace, environment: dict[str, str]) -> None:
    """Raises Error if src/train.py refuses the flags; where it cannot run here, nothing is known."""
    venv = HOME / ".venv/bin/python"
    python = environment.get("GFRNN_PYTHON") or (str(venv) if venv.exists() else "python3")
    command = [*environment.get("GFRNN_CONTAINER", "").split(), python, "src/train.py", "--dry-run"]
    if shutil.which(command[0], path=environment.get("PATH")) is None:
        return say(f"{command[0]} is not on this machine: the flags of the training are not looked at")
    flags = jobs[0].flags
    trainings = [("", "JOBID", flags)]
    if arguments.kind == "study":
        points = enumerate(read_points(arguments.points), 1)
        trainings = [(f"point {number}: ", f"JOBID-{number}", [*point, *flags[1:]]) for number, point in points]
    there = {**environment, "WORLD_SIZE": str(processes(jobs[0].sbatch, environment))}
    for name, of_job, each in trainings:
        if not values_of(each, ["--output-dir"]).get("output_dir"):
            each = [*each, "--output-dir", f"runs/gfrnn-{jobs[0].script}-{of_job}"]  # launch.sh's, a new one
        if not values_of(each, ["--deepspeed"]).get("deepspeed"):
            each = [*each, "--deepspeed", "ds_configs/z2.json"]  # launch.sh's own
        done = subprocess.run([*command, *each], cwd=HOME, env=there, capture_output=True)
        said = done.stderr.decode(errors="replace").strip().splitlines()
        if done.returncode == USER:
            raise Error(name + (said[-1].replace("error: ", "", 1) if said else "refused"))
        if done.returncode != 0:
            why = said[-1] if said else done.returncode
            return say(f"src/train.py cannot run on this machine ({why}); the flags were not checked")
    return None


def processes(sbatch: Sequence[str], environment: dict[str, str]) -> int:
    """How many a training will have, as launch.sh counts them; on 2 nodes if --nodes=2-4 is asked for.

    A node has one where GPUs are not asked for and site.sh does not say.
    """
    names = (("-N", "--nodes"), ("-n", "--ntasks"), ("-G", "--gpus"))
    asked = values_of(sbatch, *names, ["--ntasks-per-node"], ["--gpus-per-node"], ["--gres"])
    nodes = number_in(asked.get("nodes")) or 1
    tasks = nodes * number_in(asked.get("ntasks_per_node")) or number_in(asked.get("ntasks"))
    if tasks > nodes:
        return tasks
    gres = [part for part in asked.get("gres", "").split(",") if re.match(r"(gres[:/])?gpu\b", part)]
    gpus = gpus_in(asked.get("gpus_per_node") or environment.get("SBATCH_GPUS_PER_NODE") or ",".join(gres))
    each = number_in(environment.get("GFRNN_PROCESSES_PER_NODE")) or gpus or gpus_in(asked.get("gpus", "")) // nodes
    return nodes * max(1, each)


def number_in(text: str | None) -> int:
    """The first; 0 without one."""
    found = re.search(r"\d+", text or "")
    return int(found[0]) if found else 0


def gpus_in(text: str) -> int:
    """Of 8, a100:8 or a100:4,v100:4, say; a kind without a number is one."""
    counts = [part.rpartition(":")[2] for part in text.split(",") if part]
    return sum(int(count) if count.isdigit() else 1 for count in counts)


def submit(jobs: list[Job], environment: dict[str, str]) -> None:
    """Each job by its own sbatch; says their numbers."""
    if shutil.which("sbatch", path=environment.get("PATH")) is None:
        raise Error("there is no sbatch here: submit from a login node, or look at what it would be with --dry-run")
    numbers: list[str] = []
    for job in jobs:
        status, printed, said = call(depend(job, numbers).call(), environment)
        if status != 0:
            there = f"; job {' and '.join(numbers)} waits: scancel {' '.join(numbers)}" if numbers else ""
            if any(words in said for words in UNREACHED):
                raise Error(f"sbatch reaches no SLURM controller (above): submit from a login node, or later{there}")
            raise Error(f"sbatch refuses the {job.kind} job (above); flags of src/train.py come after --{there}")
        numbers.append(printed.strip().partition(";")[0])
        print(job.kind, numbers[-1], flush=True)
    say(
        f"submitted; squeue --job {','.join(numbers)} shows them, and they print to slurm-*-{numbers[0]}*.out in {HOME}"
    )


def call(sbatch: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Its status, stdout and stderr, whose lines are passed on as they come: it may try again for minutes."""
    pipe, said = subprocess.PIPE, b""
    with subprocess.Popen(sbatch, cwd=HOME, env=environment, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stderr:
            said += line
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
        printed = process.stdout.read()
    return process.returncode, printed.decode(), said.decode(errors="replace")


def depend(job: Job, numbers: list[str]) -> Job:
    """Jobs after the first start once it has ended well."""
    if not numbers:
        return job
    return job._replace(sbatch=[*job.sbatch, f"--dependency=afterok:{numbers[0]}", "--kill-on-invalid-dep=yes"])


def show(jobs: list[Job], environment: dict[str, str]) -> None:
    """What `submit` would do."""
    for name in sorted(environment):
        if name.startswith("SBATCH_"):
            print(f"# {name}={environment[name]}")
    for number, job in enumerate(jobs):
        print(join(depend(job, ["$train"] if number else []).call(), assigned=len(jobs) > 1 and number == 0))
    for script in dict.fromkeys(job.script for job in jobs):
        print(f"\n# ---------- slurm/{script}.sbatch")
        print((HOME / f"slurm/{script}.sbatch").read_text().rstrip())


def join(call: list[str], *, assigned: bool) -> str:
    """As one would type it."""
    line = " ".join(shlex.quote(word) for word in call).replace(
        "'--dependency=afterok:$train'", "--dependency=afterok:$train"
    )
    return f"train=$({line})" if assigned else line


def say(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of `| head`
    head, flags = sys.argv[1:], []
    if head[:1] == ["point"] and len(head) == 3:
        return guard(lambda: print_point(Path(head[1]), head[2]))
    if "--" in head:
        at = head.index("--")
        head, flags = head[:at], head[at + 1 :]
    if "--dry-run" in flags:  # src/train.py has one too, and a job that does nothing is not what is meant
        head, flags = [*head, "--dry-run"], [flag for flag in flags if flag != "--dry-run"]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="train|study|chain")
    for kind, what in (
        ("train", "one training, which goes on by itself until it has finished"),
        ("study", "an array: a training for each line of a file"),
        ("chain", "a training, and once it has finished its evaluation and export"),
    ):
        usage = f"submit.py {kind} [these options] [sbatch's flags] [-- src/train.py's flags]"
        sub = kinds.add_parser(kind, help=what, description=what, allow_abbrev=False, usage=usage)
        sub.add_argument("--dry-run", action="store_true", help="print the sbatch calls and scripts; submit nothing")
        if kind == "study":
            sub.add_argument("--points", type=Path, required=True, help="a line is flags of src/train.py")
            sub.add_argument("--at-once", type=int, default=0, metavar="N", help="how many may run together; 0: all")
        if kind == "chain":
            sub.add_argument("--evaluate-flags", default="", metavar="FLAGS", help="more flags for src/evaluate.py")
            sub.add_argument("--export-flags", default="", metavar="FLAGS", help="more flags for export/to_onnx.py")
            sub.add_argument("--after", default="", metavar="FLAGS", help="sbatch's flags for these two jobs")
    arguments, sbatch = parser.parse_known_args(head)
    return guard(lambda: run(arguments, sbatch, flags))


def run(arguments: argparse.Namespace, sbatch: list[str], flags: list[str]) -> None:
    jobs, environment = plan(arguments, sbatch, flags), site()
    check(jobs, arguments, environment)
    if arguments.dry_run:
        show(jobs, environment)
    else:
        submit(jobs, environment)


def guard(what: Callable[[], None]) -> None:
    """A user's error is one line."""
    try:
        what()
    except Error as error:
        say(f"error: {error}")
        sys.exit(USER)


if __name__ == "__main__":
    main()
