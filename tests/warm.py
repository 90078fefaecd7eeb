"""Programs of src/ in processes of their own that need not import everything again.

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
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_parent: subprocess.Popen[str] | None = None


def run(
    command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None, input: str = ""
) -> subprocess.CompletedProcess[str]:
    """Of a command of python, to its end: a script and its flags."""
    global _parent
    if _parent is None:
        _parent = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(env)
        )
        atexit.register(_parent.communicate)  # it ends with its standard input
    assert _parent.stdin is not None
    assert _parent.stdout is not None
    with tempfile.TemporaryDirectory(prefix="gfrnn-") as folder:
        streams = [Path(folder) / name for name in ("in", "out", "err")]
        streams[0].write_text(input)
        order = {"argv": list(command), "env": dict(env), "cwd": str(cwd or Path.cwd())}
        _parent.stdin.write(json.dumps({**order, "streams": list(map(str, streams))}) + "\n")
        _parent.stdin.flush()
        status = _parent.stdout.readline()
        assert status, "the process that forks has ended"
        out, err = (path.read_text(errors="replace") for path in streams[1:])
    return subprocess.CompletedProcess(order["argv"], int(status), out, err)


def _serve() -> None:
    """Forks for each line of stdin; answers with the status that subprocess would give."""
    sys.path[0] = str(Path(__file__).parents[1] / "src")  # as it is for the scripts there
    before = dict(os.environ)
    import gfrnn.training.evaluate
    import gfrnn.training.loop
    import gfrnn.training.sample  # noqa: F401

    chosen = {name: value for name, value in os.environ.items() if name not in before}  # by the imports
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            order = json.loads(line)
            _become({**order, "env": chosen | order["env"]})
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(order: dict[str, Any]) -> NoReturn:
    """The program."""
    status = 1
    try:
        for number, path in enumerate(order["streams"]):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # what the old one has read is not this program's
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        sys.argv = order["argv"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
