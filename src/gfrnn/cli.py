"""What every entry script shares: a command line made from a dataclass, and how a program ends.

Exit status: 0 finished; 2 a user's error, one line; 3 the run failed; 75 stopped early with a checkpoint. A fault of
ours keeps its traceback (status 1).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from gfrnn.config import EXIT_FAILED, EXIT_STOPPED, EXIT_USER, RunFailed, UserError

T = TypeVar("T")

_MENDS = {
    errno.ENOSPC: "free space on that disk, then run the same command again",
    errno.EDQUOT: "your quota there is used up: free space, then run the same command again",
    errno.EACCES: "give a folder you may write to",
    errno.EPERM: "give a folder you may write to",
    errno.EROFS: "that file system is read-only: give another folder",
    errno.ENOTDIR: "a part of that path is a file: give another folder",
}


class Stopped(Exception):
    """The run stopped early with a checkpoint (a signal, a time limit); exit status 75."""


def parse(settings: type[T], argv: Sequence[str], default: T | None = None) -> T:
    """Fills a settings dataclass from flags; nested dataclasses' fields are flags of their own, without a prefix.

    Raises UserError with one line for anything wrong; --help prints and ends the program.
    """
    import tyro

    # the DeepSpeed launcher adds this to every script's command line; LOCAL_RANK in the environment says the same
    args = [arg for arg in argv if not arg.startswith("--local_rank=")]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(settings, args=args, default=default, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as end:
        if end.code in (0, None):
            raise
    raise UserError(_one_line(errors.getvalue()))


def _one_line(box: str) -> str:
    """The message of a framed, wrapped error as one line, with the flags it suggests."""
    lines = [re.sub("^[│╭╰─ ]+|[│╮╯─ ]+$", "", line) for line in box.splitlines()]
    lines = lines[1:] if lines and box.startswith("╭") else lines  # the frame's title
    head: list[str] = []
    for line in lines:
        if not line:
            break
        head.append(line)
    nearest = [line.split()[0] for line in lines[len(head) :] if line.startswith("--")] if "Unrecognized" in box else []
    hint = f"did you mean {' or '.join(nearest[:3])}? " if nearest else ""
    return f"{' '.join(head).rstrip('.')}; {hint}--help lists all flags"


def run(main: Callable[[], None]) -> None:
    """Runs a program and ends it with the status that its end means."""
    try:
        main()
    except UserError as error:
        _end(f"error: {error}", EXIT_USER)
    except RunFailed as error:
        _end(f"failed: {error}", EXIT_FAILED)
    except Stopped as stop:
        _end(f"stopped: {stop}", EXIT_STOPPED)
    except KeyboardInterrupt:
        _end("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _MENDS:
            raise
        _end(f"error: {error.filename or 'output'}: {os.strerror(error.errno)}; {_MENDS[error.errno]}", EXIT_USER)


def rank() -> int:
    """This process's number among all; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(line: str) -> None:
    """A line to stderr, from one process only."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def _end(line: str, status: int) -> None:
    """Says why and exits without waiting for anything (collectives' threads, background work).

    An error that all processes share is said by the first alone: the others wait for the launcher, which ends them
    when the first is gone, and speak only if it is not.
    """
    if rank() != 0 and status != EXIT_STOPPED:
        time.sleep(5)
        line = f"rank {rank()}: {line}"
    if rank() == 0 or status != EXIT_STOPPED:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
