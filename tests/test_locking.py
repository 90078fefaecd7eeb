"""Whose a run folder is: one training's, and of the restarts of one job the newest's."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from gfrnn import runs
from gfrnn.config import UserError
from gfrnn.runs import RunFolder, TakenOver


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_SECONDS_FOR_ANOTHER_TO_END", 0.5)
    monkeypatch.delenv("GFRNN_RESTART", raising=False)


def owner(folder: Path, restart: str, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Who holds the folder as this restart."""
    monkeypatch.setenv("GFRNN_RESTART", restart)
    run = RunFolder(folder)
    run.lock()
    run.check_owned()
    return run


def test_one_training_keeps_others_out(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.lock()
    with pytest.raises(UserError, match="is being trained in by another process"):
        RunFolder(tmp_path).lock()
    first.check_owned()


def test_another_job_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = owner(tmp_path, "9.0", monkeypatch)
    monkeypatch.setenv("GFRNN_RESTART", "10.5")
    with pytest.raises(UserError, match="is being trained in by another process"):
        RunFolder(tmp_path).lock()
    first.check_owned()


def test_a_newer_restart_takes_the_folder_and_the_older_finds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = owner(tmp_path, "9.0", monkeypatch)
    second = owner(tmp_path, "9.1", monkeypatch)
    with pytest.raises(TakenOver, match=r"restart 1 of job 9 trains in"):
        first.check_owned()
    second.check_owned()


def test_an_older_restart_does_not_take_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = owner(tmp_path, "9.1", monkeypatch)
    monkeypatch.setenv("GFRNN_RESTART", "9.0")
    with pytest.raises(TakenOver, match=r"restart 1 of job 9 trains in"):
        RunFolder(tmp_path).lock()
    second.check_owned()


def test_one_that_waits_for_the_folder_gives_way_to_a_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restart 1 waits for the lock of 0, which stands still; meanwhile 2 comes."""
    first = owner(tmp_path, "9.0", monkeypatch)
    monkeypatch.setattr(runs, "_SECONDS_FOR_ANOTHER_TO_END", 3.0)
    monkeypatch.setenv("GFRNN_RESTART", "9.1")
    second, said = RunFolder(tmp_path), []

    def wait() -> None:
        try:
            second.lock()
        except TakenOver as error:
            said.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    while True:  # until restart 1 has put its name there
        try:
            first.check_owned()
        except TakenOver:
            break
    third = owner(tmp_path, "9.2", monkeypatch)
    waiting.join()
    assert said == [f"restart 2 of job 9 trains in {tmp_path} now"]
    third.check_owned()


def test_an_older_claim_of_the_same_moment_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner(tmp_path, "9.0", monkeypatch)
    older = (tmp_path / ".owner.json").read_text()
    second = owner(tmp_path, "9.1", monkeypatch)
    (tmp_path / ".owner.json").write_text(older)  # restart 0 had looked just before
    second.check_owned()
    assert '"restart": 1' in (tmp_path / ".owner.json").read_text()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a file in place of the kernel's lock would keep out for good after a kill; .owner.json tells the earlier."""

    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.lock()
    assert capsys.readouterr().err.count("is on a file system without locks") == 1
    second.lock()
    second.check_owned()
    with pytest.raises(TakenOver):
        first.check_owned()
