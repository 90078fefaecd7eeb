"""Our programs in processes of their own that need not import everything again.

A short training is mostly imports: torch and DeepSpeed take 3 of its 4 seconds. Here one python process imports them
once, and forks for each program; so that this is as good as a start of its own for all but what happens in the imports
(answers that come before them, the memory they take) and for what is done to a process from outside.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_parent: subprocess.Popen[str] | None = None
_SECONDS_AFTER_A_FAILURE, _MOST_SECONDS = 30, 500


def run(
    command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None, input: str = ""
) -> subprocess.CompletedProcess[str]:
    """Of a command of python, to its end: a script and its flags, or -m, a module and its flags."""
    (done,) = run_together(command, [env], cwd=cwd, input=input)
    return done


def run_together(
    command: Sequence[str], envs: Sequence[Mapping[str, str]], *, cwd: Path | None = None, input: str = ""
) -> list[subprocess.CompletedProcess[str]]:
    """The same command as several processes at a time, to their ends, each with an environment of its own.

    Those that are there half a minute after one has failed, or after 500 seconds, are killed.
    """
    global _parent
    if _parent is None:
        _parent = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(_parent.communicate)  # it ends with its standard input
    assert _parent.stdin is not None
    assert _parent.stdout is not None
    with tempfile.TemporaryDirectory(prefix="gfrnn-") as folder:
        (Path(folder) / "in").write_text(input)
        streams = [[Path(folder) / name for name in ("in", f"out-{n}", f"err-{n}")] for n in range(len(envs))]
        order = {"argv": list(command), "cwd": str(cwd or Path.cwd())}
        processes = [{"env": dict(env), "streams": list(map(str, own))} for env, own in zip(envs, streams, strict=True)]
        _parent.stdin.write(json.dumps({**order, "processes": processes}) + "\n")
        _parent.stdin.flush()
        answer = _parent.stdout.readline()
        assert answer, "the process that forks has ended"
        return [
            subprocess.CompletedProcess(list(command), status, *(path.read_text(errors="replace") for path in own[1:]))
            for status, own in zip(json.loads(answer), streams, strict=True)
        ]


def _serve() -> None:
    """Forks for each line of stdin; answers with the statuses that subprocess would give."""
    sys.path[0] = str(Path(__file__).parents[1] / "src")  # as it is for the scripts there
    before = dict(os.environ)
    import gfrnn.training.evaluate
    import gfrnn.training.loop
    import gfrnn.training.sample  # noqa: F401

    chosen = {name: value for name, value in os.environ.items() if name not in before}  # by the imports
    for line in sys.stdin:
        order = json.loads(line)
        children = []
        for process in order["processes"]:
            child = os.fork()
            if child == 0:
                _become(order, {"env": chosen | process["env"], "streams": process["streams"]})
            children.append(child)
        print(json.dumps(_wait(children)), flush=True)


def _wait(children: Sequence[int]) -> list[int]:
    """Their statuses."""
    statuses: dict[int, int] = {}

    def kill_the_rest(*_: object) -> None:
        for child in set(children) - set(statuses):
            with contextlib.suppress(ProcessLookupError):  # it has ended at this moment
                os.kill(child, signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, kill_the_rest)
    signal.alarm(_MOST_SECONDS)
    while len(statuses) < len(children):
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if status:
            signal.alarm(_SECONDS_AFTER_A_FAILURE)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return [statuses[child] for child in children]


def _become(order: dict[str, Any], process: dict[str, Any]) -> NoReturn:
    """The program."""
    status = 1
    try:
        for number, path in enumerate(process["streams"]):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # what the old one has read is not this program's
        os.environ.clear()
        os.environ.update(process["env"])
        os.chdir(order["cwd"])
        if order["argv"][0] == "-m":
            sys.argv = order["argv"][1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = order["argv"]
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):  # as the interpreter does
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
