"""The command line, and the statuses that programs end with (in real processes)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from gfrnn import cli
from gfrnn.config import DataSettings, Settings, UserError, preset
from launch import environment


def parse(*flags: str) -> Settings:
    return cli.parse(Settings, flags, default=preset("demo"))


def refusal(*flags: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*flags)
    message = str(caught.value)
    assert "\n" not in message
    assert not set(message) & set("│╭╰─")
    assert message.endswith("--help lists all flags")
    return message


# ------------------------------------------------------------------------------------------------- parse


def test_flags_are_flat_and_override_the_preset() -> None:
    settings = parse("--rows", "7", "--unit=gru", "--no-mlflow", "--corpus-file", "x.txt", "--seed", "3")
    assert (settings.batch.rows, settings.model.unit, settings.run.mlflow, settings.seed) == (7, "gru", False, 3)
    assert str(settings.data.corpus_file) == "x.txt"
    assert settings.model.hidden_size == preset("demo").model.hidden_size
    assert parse() == preset("demo")


def test_the_home_folder_is_found_as_a_shell_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = parse("--corpus-file=~/x.txt", "--output-dir=~/runs/a")
    assert (settings.data.corpus_file, settings.output_dir) == (tmp_path / "x.txt", tmp_path / "runs/a")
    assert settings.data.data_dir == DataSettings.data_dir  # whoever reads config.json has another home
    assert parse("--corpus-file=~book.txt").data.corpus_file == Path("~book.txt")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user without a home, as in containers
    with pytest.raises(UserError, match="no home folder here; give another path"):
        parse("--corpus-file=~/x.txt")


def test_the_launchers_own_flag_is_ignored() -> None:
    assert parse("--local_rank=3", "--rows", "7") == parse("--rows", "7")


def test_bad_value() -> None:
    assert refusal("--rows", "many").startswith("Error parsing --rows: ")
    assert "'many'" in refusal("--rows", "many")


def test_unknown_flag_is_answered_with_the_nearest() -> None:
    assert refusal("--rowz", "3").startswith("Unrecognized options: --rowz, 3; did you mean --rows? ")
    assert "did you mean --hidden-size" in refusal("--hiden-size=3")
    assert "did you mean" not in refusal("stray")


def test_bad_choice_lists_the_good_ones() -> None:
    message = refusal("--unit", "transformer")
    assert "'transformer'" in message
    assert "--unit" in message
    for choice in ("lstm", "gru", "tanh", "mrnn"):
        assert choice in message


def test_missing_value() -> None:
    assert "Missing value for argument '--rows'" in refusal("--rows")
    assert "Missing value for argument '--rows'" in refusal("--rows", "--steps", "5")


@pytest.mark.parametrize("extra", [{"COLUMNS": "30"}, {"PYTHONIOENCODING": "ascii"}, {"FORCE_COLOR": "1"}])
def test_errors_are_one_line_on_any_terminal(extra: dict[str, str]) -> None:
    code = f"cli.run(lambda: cli.parse({Settings.__name__}, ['--rowz', '3']))"
    status, _, err = program(code, **extra)
    assert (status, err) == (2, "error: Unrecognized options: --rowz, 3; did you mean --rows? --help lists all flags\n")


# --------------------------------------------------------------------------------------------------- run

HEAD = """
import sys, time, os
from gfrnn import cli
from gfrnn.config import RunFailed, Settings, UserError
from gfrnn.training.evaluate import EvaluateSettings
"""


def start(code: str, *, stdout: int | IO[str] = subprocess.PIPE, **extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HEAD + code]
    # buffered, as it is for a user: a full disk or a reader who has gone is found only when the program ends
    env = environment(**{"PYTHONUNBUFFERED": "", **extra})
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env)


def program(code: str, **kwargs: str) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a program."""
    process = start(code, stdout=subprocess.PIPE, **kwargs)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def raising(error: str, before: str = "print('so far')") -> str:
    return f"def main():\n    {before}\n    raise {error}\ncli.run(main)\n"


def test_finished() -> None:
    assert program("cli.run(lambda: print('done'))") == (0, "done\n", "")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        ("UserError('--rows is 0; mend it')", 2, "error: --rows is 0; mend it"),
        ("RunFailed('loss is not finite')", 3, "failed: loss is not finite"),
        ("cli.Stopped('SIGTERM at update 3')", 75, "stopped: SIGTERM at update 3"),
        ("KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_ends_with_one_line_and_its_status(error: str, status: int, line: str) -> None:
    assert program(raising(error)) == (status, "so far\n", line + "\n")


def test_a_bug_keeps_its_traceback() -> None:
    for error in ("KeyError('oops')", "FileNotFoundError(2, 'oops')"):
        status, out, err = program(raising(error))
        assert (status, out) == (1, "so far\n")
        assert "Traceback (most recent call last)" in err
        assert "oops" in err


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_no_status(streams: str) -> None:
    for body, status in (("print('x')", 0), ("raise UserError('mend it')", 2)):
        code = f"{HEAD}\ndef main():\n    {body}\ncli.run(main)\n"
        command = ["sh", "-c", f'exec "$0" -c "$1" {streams}', sys.executable, code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
        assert done.returncode == status
        assert done.stderr == ("error: mend it\n" if status == 2 and "2>" not in streams else "")


def test_characters_that_a_terminal_lacks() -> None:
    assert program("cli.run(lambda: print('a\u2603b'))", PYTHONIOENCODING="ascii") == (0, "a?b\n", "")


def test_too_little_memory_is_one_line() -> None:
    for code, reason in (("import torch; torch.empty(2**55)", " ("), ("bytearray(2**60)", "; ")):
        status, _, err = program(f"def main():\n    {code}\ncli.run(main)\n")
        assert status == 2
        assert err.startswith(f"error: out of memory{reason}")
        assert err.count("\n") == 1


def test_an_error_ends_the_process_though_a_thread_goes_on() -> None:
    forever = "import threading; threading.Thread(target=time.sleep, args=(1000,)).start()"
    assert program(raising("UserError('mend it')", before=forever))[0] == 2


@pytest.mark.parametrize(
    "code", ["cli.run(lambda: print('x'))", "cli.run(lambda: cli.parse(EvaluateSettings, ['--help']))"]
)
def test_full_disk_behind_stdout(code: str) -> None:
    with open("/dev/full", "w") as full:
        process = start(code, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: output: No space left on device; free space")
    assert err.count("\n") == 1


def test_full_disk_keeps_an_earlier_error() -> None:
    with open("/dev/full", "w") as full:
        process = start(raising("RunFailed('loss is not finite')"), stdout=full)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (3, "failed: loss is not finite\n")


def test_folders_one_may_not_write_to_are_named() -> None:
    assert program(raising("PermissionError(13, 'Permission denied', '/data/x')")) == (
        2,
        "so far\n",
        "error: /data/x: Permission denied; give a path that you may read and write\n",
    )
    status, _, err = program("cli.run(lambda: os.mkdir('/dev/null/x'))")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: /dev/null/x: Not a directory; ")


@pytest.mark.parametrize(
    "code", ["cli.run(lambda: print('x'))", "cli.run(lambda: cli.parse(EvaluateSettings, ['--help']))"]
)
def test_a_reader_who_has_gone_is_no_error_worth_a_word(code: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start(code, stdout=write_end)
    os.close(write_end)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signal.SIGPIPE, "")


def test_one_process_speaks_for_all() -> None:
    """The launcher ends the others soon after the first: they have nothing to add."""
    process = start(raising("UserError('mend it')", before="print('here', flush=True)"), RANK="1", WORLD_SIZE="2")
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    time.sleep(0.5)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGTERM, "")


def test_a_process_whose_error_is_its_own_says_so() -> None:
    assert program(raising("UserError('mend it')"), RANK="1", WORLD_SIZE="2") == (
        2,
        "so far\n",
        "rank 1: error: mend it\n",
    )


def test_all_processes_that_stop_end_at_once() -> None:
    process = start(raising("cli.Stopped('SIGTERM')", before="print('so far', flush=True)"), RANK="1", WORLD_SIZE="2")
    assert process.stdout is not None
    assert process.stdout.readline() == "so far\n"
    begin = time.monotonic()
    assert process.communicate(timeout=60) == ("", "")
    assert time.monotonic() - begin < 4  # an error is held back for 5 s
    assert process.returncode == 75


def test_nothing_of_ours_takes_a_closed_streams_place() -> None:
    code = "cli.run(lambda: print(*(os.readlink(f'/proc/self/fd/{number}') for number in range(2)), file=sys.stderr))"
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, f"import os, sys\n{HEAD}\n{code}\n"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stderr) == (0, f"{os.devnull} {os.devnull}\n")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"LOCAL_SIZE": "x"}, "LOCAL_SIZE is 'x'; it must be a number from 1 to 1"),
        ({"LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is '3'; it must be a number from 1 to 2"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'; it must be a number from 1 to 65535"),
        ({"RANK": "1"}, "RANK is 1, and WORLD_SIZE 1: ranks begin at 0"),
    ],
)
def test_a_launcher_that_contradicts_itself(extra: dict[str, str], said: str) -> None:
    status, _, err = program("cli.run(lambda: print('x'))", **extra)
    assert status == 2
    assert err.endswith(f"error: environment variable {said}\n")


def test_too_few_open_files_is_one_line() -> None:
    for body in ("[open(os.devnull) for _ in range(200)]", "raise RuntimeError('epoll: Too many open files')"):
        code = "import os, resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        status, _, err = program(f"{code}def main():\n    {body}\ncli.run(main)\n")
        assert status == 2
        assert err.startswith("error: ")
        assert err.endswith("Too many open files; raise the limit on open files (ulimit -n)\n")


@pytest.mark.parametrize("extra", [{"RANK": "abc"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "-1"}])
def test_a_launcher_that_sets_nonsense(extra: dict[str, str]) -> None:
    status, _, err = program("cli.run(lambda: print('x'))", **extra)
    ((name, value),) = extra.items()
    least = 1 if name == "WORLD_SIZE" else 0
    assert status == 2
    assert err == f"error: environment variable {name} is '{value}'; it must be a number, {least} or more\n"


def test_say_is_for_the_first_process() -> None:
    assert program("cli.say('hello')", RANK="0") == (0, "", "hello\n")
    assert program("cli.say('hello')", RANK="1") == (0, "", "")
