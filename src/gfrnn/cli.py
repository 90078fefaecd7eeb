"""What every entry script shares: a command line made from a dataclass, and how a program ends.

Exit status: 0 finished; 2 a user's error, one line; 3 the run failed; 75 stopped early with a checkpoint. A fault of
ours keeps its traceback (status 1).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import io
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from gfrnn.config import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_STOPPED,
    EXIT_USER,
    DataSettings,
    RunFailed,
    Stopped,
    UserError,
    at_home,
)

T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h

_MENDS = {
    errno.ENOSPC: "free space on that disk, then run the same command again",
    errno.EDQUOT: "your quota there is used up: free space, then run the same command again",
    errno.EACCES: "give a path that you may read and write",
    errno.EPERM: "give a path that you may read and write",
    errno.EROFS: "that file system is read-only: give another folder",
    errno.ENOTDIR: "a part of that path is a file: give another folder",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EISDIR: "a folder is where a file should be: move it away",
    errno.EEXIST: "something else is in that place: move it away",
    errno.EFBIG: "files may not become that large here: raise the limit (ulimit -f) or give another folder",
    errno.ELOOP: "links there go round in a circle: give another path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def parse(settings: type[T], argv: Sequence[str], default: T | None = None) -> T:
    """Fills a settings dataclass from flags; nested dataclasses' fields are flags of their own, without a prefix.

    Raises UserError with one line for anything wrong; --help prints and ends the program.
    """
    import tyro

    # the DeepSpeed launcher adds this to every script's command line; LOCAL_RANK in the environment says the same
    args = [arg for arg in argv if not arg.startswith("--local_rank=")]
    errors = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(errors):
            return _at_home(cast(T, tyro.cli(settings, args=args, config=(tyro.conf.OmitArgPrefixes,), **given)))
    except SystemExit as end:
        if end.code in (0, None):
            raise
    raise UserError(_one_line(errors.getvalue()))


def _at_home(settings: T) -> T:
    """With `~` in paths as the home folder: shells leave it in --flag=~/path. (A default is expanded where it is read,
    whoever that is by then.)"""
    changed: dict[str, Any] = {}
    for each in dataclasses.fields(cast(Any, settings)):
        value = getattr(settings, each.name)
        if dataclasses.is_dataclass(value):
            changed[each.name] = _at_home(value)
        elif isinstance(value, Path) and value != DataSettings.data_dir:
            changed[each.name] = at_home(value)
    return cast(T, dataclasses.replace(cast(Any, settings), **changed))


def _one_line(box: str) -> str:
    """tyro's framed, wrapped error as one line: its first section, with the flags that a later one suggests.

    A frame has its title in the top border; where the terminal has no such characters, title and rules are lines.
    """
    lines = [re.sub("^[│╭╰─ ]+|[│╮╯─ ]+$", "", line) for line in box.splitlines()]
    sections: list[list[str]] = [[]]
    for line in lines[1:]:
        if line.strip("-"):
            sections[-1].append(line)
        elif sections[-1]:
            sections.append([])
    suggested = [part for part in sections if part[:1] == ["Perhaps you meant:"]]
    nearest = [line.split()[0] for part in suggested for line in part if line.startswith("--")]
    hint = f"did you mean {' or '.join(nearest[:3])}? " if nearest else ""
    return f"{' '.join(sections[0]).rstrip('.')}; {hint}--help lists all flags"


def run(main: Callable[[], None]) -> None:
    """Runs a program and ends it with the status that its end means.

    Every end is an immediate exit, a good one too: tearing down an interpreter with a process group's threads in it
    now and then aborts (seen with gloo: "terminate called without an active exception", status -6).
    """
    _open_streams()
    _mend_streams()
    keep_freed_memory()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("gfrnn").setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    try:
        try:
            _check_environment()
            main()
        except SystemExit:  # --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here, where what goes wrong with it can still be said
    except UserError as error:
        end(f"error: {error}", EXIT_USER)
    except RunFailed as error:
        end(f"failed: {error}", EXIT_FAILED)
    except Stopped as stop:
        end(f"stopped: {stop}", EXIT_STOPPED)
    except KeyboardInterrupt:
        end("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone: end as other programs do, without a word
        os._exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _MENDS:
            raise
        end(f"error: {error.filename or 'output'}: {os.strerror(error.errno)}; {_MENDS[error.errno]}", EXIT_USER)
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for a CPU that runs out of memory
        if is_lost_peer(error):
            how = "gives no sign" if "imed out" in str(error) else "is gone"
            end(f"failed: another process {how}", EXIT_FAILED)
        reason = str(error).split("\n")[0]
        if os.strerror(errno.EMFILE) in reason:
            end(f"error: {os.strerror(errno.EMFILE)}; {_MENDS[errno.EMFILE]}", EXIT_USER)
        if not is_out_of_memory(error):
            raise
        said = f" ({reason})" if reason else ""
        end(f"error: out of memory{said}; take a smaller model, fewer --rows or --steps, or more processes", EXIT_USER)
    sys.stderr.flush()
    os._exit(EXIT_FINISHED)


def is_users(error: OSError) -> bool:
    """Whether it is for the user to mend: a full disk, say, not one that fails."""
    return error.errno in _MENDS


def is_out_of_memory(error: BaseException) -> bool:
    """Of a CPU or a GPU."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|can't allocate memory", str(error)))


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone, or gives no sign (gloo's words and NCCL's)."""
    return bool(
        re.search(
            "closed by peer|reset by peer|Connection refused|Broken pipe|Timed out waiting|Watchdog caught collective"
            "|remote process exited|NCCL communicator was aborted",
            str(error),
        )
    )


def keep_freed_memory() -> None:
    """Has the C library keep what is freed for what comes next, up to 32 MiB a piece, where it is glibc.

    By default it gives a step's tensors back to the system and asks for new ones at the next, and the system clears and
    maps each page anew, which took 5 to 10 % of a training step. Larger pieces, kept too, would come in 2 % faster, but
    find no place among each other: a third more memory, and never the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 64 << 20)


class _Unfailing(io.TextIOWrapper):
    """Output that may be lost: what cannot be written (a terminal or a reader that is gone, a full disk) is not."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def _open_streams() -> None:
    """Streams that were closed from the start (`>&-`) get /dev/null, else a file or pipe of ours took their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _mend_streams() -> None:
    """No run ends because of what it says on stderr, or on a terminal that closes.

    What was closed from the start (`>&-`) goes nowhere; characters that stdout's encoding lacks become '?'.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for the rest of the process
            continue
        errors = "replace" if name == "stdout" else stream.errors  # stderr escapes them
        if name == "stderr" or stream.isatty():
            setattr(sys, name, _Unfailing(stream.buffer, stream.encoding, errors, line_buffering=True))
        else:
            stream.reconfigure(errors=errors)


def check_writable(flag: str, file: Path) -> None:
    """Raises UserError if there can be no such file, before the work whose results it is for."""
    path = file.resolve()
    if not path.parent.is_dir() or (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {file}: cannot be written: give a file in a folder that exists")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def rank() -> int:
    """This process's number among all; 0 without a launcher."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def world_size() -> int:
    """How many processes there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_environment() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder has been removed; cd to one that is there") from None
    for variable, least in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
        text = os.environ.get(variable, "1")
        if not text.isdecimal() or int(text) < least:
            raise UserError(f"environment variable {variable} is {text!r}; it must be a number, {least} or more")
    for variable, most in (("LOCAL_SIZE", world_size()), ("LOCAL_WORLD_SIZE", world_size()), ("MASTER_PORT", 65535)):
        text = os.environ.get(variable) or "1"
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise UserError(f"environment variable {variable} is {text!r}; it must be a number from 1 to {most}")
    if rank() >= world_size():
        raise UserError(f"environment variable RANK is {rank()}, and WORLD_SIZE {world_size()}: ranks begin at 0")


def say(line: str) -> None:
    """A line to stderr, from one process only."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def end(line: str, status: int) -> None:
    """Says why and exits without waiting for anything (collectives' threads, background work).

    An error that all processes share is said by the first alone: the others wait for the launcher, which ends them
    when the first is gone, and speak only if it is not.
    """
    if rank() != 0 and status != EXIT_STOPPED:
        time.sleep(5)
        line = f"rank {rank()}: {line}"
    line = " ".join(line.splitlines())  # also where a path has line breaks in its name
    with contextlib.suppress(OSError):  # a full disk or a reader who has gone: the first error is the one that counts
        if rank() == 0 or status != EXIT_STOPPED:
            print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)
