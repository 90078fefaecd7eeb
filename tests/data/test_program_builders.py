"""Processes that make a table of programs: several at once, killed at any moment, on a disk that takes no more."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from program_samples import SETTINGS, expected, folders_of, load, rows_of

from gfrnn.config import PROGRAM_SYMBOLS, TARGET_SYMBOLS
from gfrnn.data.programs import Program, encode

CHILD = """
import hashlib, json, logging, os, select, signal, sys, time
from pathlib import Path
from gfrnn.config import UserError
from gfrnn.data import program_dataset, programs

data_dir, settings, event, ending, linger = sys.argv[1:]
logging.basicConfig(level=logging.INFO)
this = os.getpid()

def die(now, arguments):
    if now == event and str(arguments[0]).endswith(ending):
        os.kill(this, signal.SIGKILL)

if event:
    sys.addaudithook(die)
if linger:  # so long before every range
    make = programs.Recipe.programs
    programs.Recipe.programs = lambda *arguments: time.sleep(float(linger)) or make(*arguments)

read_end, write_end = os.pipe()  # as a training does: it ends when it is told of a signal
os.set_blocking(write_end, False)
signal.set_wakeup_fd(write_end)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: None)
try:
    table = program_dataset.load_programs(Path(data_dir), **json.loads(settings))
except UserError as error:
    sys.exit(print(error, file=sys.stderr) or 2)
assert not select.select([read_end], [], [], 0)[0], "a signal that was another process'"
print(hashlib.md5(table.sources.tobytes() + table.targets.tobytes()).hexdigest())
"""


def _child(
    data_dir: Path, die_at: tuple[str, str] = ("", ""), linger: str = "", limit: int | None = None, **changes: object
) -> subprocess.Popen[str]:
    """A process that loads programs; with die_at it is killed, as by kill -9, just before it does that."""
    command = [sys.executable, "-c", CHILD, str(data_dir), json.dumps({**SETTINGS, **changes}), *die_at, linger]
    before = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before)


def _digest(rows: list[Program]) -> str:
    sources, targets = ("".join(texts) for texts in zip(*rows, strict=True))
    codes = encode(sources, PROGRAM_SYMBOLS).tobytes() + encode(targets, TARGET_SYMBOLS).tobytes()
    return hashlib.md5(codes).hexdigest() + "\n"


def _alive(data_dir: Path) -> list[psutil.Process]:
    """Processes that work in a data folder: children have their parent's command line."""
    return [
        p
        for p in psutil.process_iter(["cmdline", "status"])
        if str(data_dir) in (p.info["cmdline"] or []) and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder whose processes do not outlive a test that fails."""
    yield tmp_path
    for process in _alive(tmp_path):
        process.kill()


def _when_at_work(data_dir: Path, processes: int) -> None:
    """Returns when so many processes make programs."""
    deadline = time.monotonic() + 60
    while len(list(data_dir.rglob("*.arrow"))) < processes:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _nothing_left(data_dir: Path) -> None:
    assert not list((data_dir / "arrow").glob("*.building"))
    assert len(folders_of(data_dir)) == 1


def test_of_several_processes_one_works_and_the_others_wait(data_dir: Path) -> None:
    children = [_child(data_dir, num_proc=2, linger="0.3") for _ in range(3)]
    results = [child.communicate(timeout=60) for child in children]
    assert [out for out, _ in results] == [_digest(expected())] * 3, results
    assert sum(":making " in err for _, err in results) == 1
    _nothing_left(data_dir)


def test_a_builder_that_is_killed_takes_its_processes_with_it(data_dir: Path) -> None:
    child = _child(data_dir, num_proc=2, linger="60")
    _when_at_work(data_dir, 2)
    assert len(_alive(data_dir)) >= 3  # itself, and two that make programs
    waiting = _child(data_dir, num_proc=2)
    assert waiting.stderr
    assert "another process prepares" in waiting.stderr.readline()
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=30)
    out, error = waiting.communicate(timeout=60)
    assert out == _digest(expected()), error
    assert not _alive(data_dir)
    _nothing_left(data_dir)


def test_signals_to_its_processes_are_not_the_builder_s(data_dir: Path) -> None:
    child = _child(data_dir, num_proc=2, linger="0.7")
    _when_at_work(data_dir, 2)
    for process in psutil.Process(child.pid).children():
        process.send_signal(signal.SIGINT)  # as Ctrl-C to all of them
        process.send_signal(signal.SIGUSR1)
    out, error = child.communicate(timeout=60)
    assert out == _digest(expected()), error


def test_a_builder_that_loses_a_process_ends_the_others_at_once(data_dir: Path) -> None:
    child = _child(data_dir, num_proc=2, linger="60")
    _when_at_work(data_dir, 2)
    psutil.Process(child.pid).children()[0].kill()
    _, error = child.communicate(timeout=30)
    assert child.returncode == 1
    assert "One of the subprocesses has abruptly died" in error
    assert not _alive(data_dir)
    assert not folders_of(data_dir)


@pytest.mark.parametrize(
    "die_at",
    [
        ("open", "-00000-00000-of-NNNNN.arrow"),
        ("open", "dataset_info.json"),
        ("shutil.move", ".incomplete"),
        ("os.rename", "/programs"),  # all made, not yet in its place
    ],
)
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_builder_killed_at_any_moment_leaves_nothing_to_trust_or_wait_for(
    die_at: tuple[str, str], num_proc: int, data_dir: Path
) -> None:
    child = _child(data_dir, die_at, num_proc=num_proc)
    _, error = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, error
    assert rows_of(load(data_dir)) == expected()
    assert not _alive(data_dir)
    _nothing_left(data_dir)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(num_proc: int, data_dir: Path) -> None:
    """The kernel refuses to write on, at a file size here, which needs no root; the path is that of a full disk."""
    child = _child(data_dir, num_proc=num_proc, limit=20_000)
    _, error = child.communicate(timeout=60)
    assert f"cannot keep programs in {data_dir}: File too large; make room there or give another folder" in error
    assert "Traceback" not in error
    assert child.returncode == 2
    assert not folders_of(data_dir)
    assert rows_of(load(data_dir)) == expected()
