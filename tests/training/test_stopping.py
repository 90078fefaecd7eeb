"""The stop flag, with real signals to a real process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import types

import pytest

from gfrnn.training import stopping
from gfrnn.training.stopping import CAUSES, StopFlag
from launch import as_from_a_terminal, environment

PROGRAM = """
import time
from gfrnn.training.stopping import CAUSES, StopFlag
flag = StopFlag()
with flag.listening():
    print("listening", flush=True)
    while not flag.agreed(flag.wishes):
        time.sleep(0.01)
    print(flag.agreed(flag.wishes), flush=True)
    {linger}
    print("still here", flush=True)
print("left", flush=True)
time.sleep(30)
"""


def start(linger: str = "pass", *before: str) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", PROGRAM.format(linger=linger)]
    process = run(command)
    assert line(process) == "listening"
    return process


def run(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        preexec_fn=as_from_a_terminal,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_raises_the_flag_and_ends_nothing_until_listening_is_over(number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    assert [line(process) for _ in range(3)] == [number.name, "still here", "left"]
    process.send_signal(number)  # now it ends the process, as ever
    _, err = process.communicate(timeout=60)
    assert process.returncode == -number
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)


def test_later_signals_change_nothing() -> None:
    process = start(linger="input()")
    process.send_signal(signal.SIGUSR1)
    assert line(process) == "SIGUSR1"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        process.send_signal(number)
        time.sleep(0.02)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert [line(process) for _ in range(2)] == ["still here", "left"]
    process.kill()
    process.communicate(timeout=60)


def test_nohup_keeps_its_word() -> None:
    process = start("pass", "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert line(process) == "SIGTERM"
    process.kill()
    process.communicate(timeout=60)


def test_handlers_are_put_back_after_an_error() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]

    def lose() -> None:
        with StopFlag().listening():
            assert all(signal.getsignal(n) != old for n, old in zip(numbers, before, strict=True))
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        lose()
    assert [signal.getsignal(number) for number in numbers] == before


OUTSIDE = """
import time
from gfrnn.training.stopping import CAUSES, StopFlag, end_on_signals
end_on_signals()
if {listened}:
    with StopFlag().listening():
        pass
print("ready", flush=True)
{wait}
"""
IN_C = "import ctypes; libc = ctypes.CDLL(None); [libc.sleep(100) for _ in range(9)]"  # as torch waits for others


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("wait", ["time.sleep(100)", IN_C], ids=["in Python", "in C"])
@pytest.mark.parametrize("listened", [False, True])
def test_where_no_flag_listens_a_signal_ends_the_process_at_once(
    number: signal.Signals, wait: str, listened: bool
) -> None:
    process = run([sys.executable, "-c", OUTSIDE.format(wait=wait, listened=listened)])
    assert line(process) == "ready"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err == f"stopped: {number.name} while no update was under way; the same command goes on\n"


def test_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(stopping, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    flag = StopFlag(time_limit=0.3 / 60)
    clock[0] += 0.25
    assert flag.agreed(flag.wishes) is None
    clock[0] += 0.1
    assert flag.agreed(flag.wishes) == "time limit of 0.005 minutes"


def test_no_time_limit() -> None:
    flag = StopFlag()
    time.sleep(0.05)
    assert flag.agreed(flag.wishes) is None


def test_the_first_reason_stays() -> None:
    flag = StopFlag(time_limit=0.1 / 60)
    with flag.listening():
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(0.15)
        assert flag.agreed(flag.wishes) == "SIGUSR1"


def test_processes_that_have_different_wishes_give_one_reason() -> None:
    """A launcher that is killed is noticed by one process before the other, which has to say it too."""
    own = StopFlag(time_limit=2.0)
    sums = [0.0] * len(CAUSES)
    sums[CAUSES.index("launcher")] = 1.0  # the other's
    assert own.agreed(own.wishes) is None
    assert own.agreed(sums) == "the launcher was killed"
    sums[CAUSES.index("time limit")] = 2.0
    assert own.agreed(sums) == "the launcher was killed"
    sums[CAUSES.index("SIGTERM")] = 1.0
    assert own.agreed(sums) == "SIGTERM"
