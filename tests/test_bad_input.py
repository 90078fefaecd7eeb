"""What a user can get wrong, in real processes: one line on stderr and status 2, at once where torch is not needed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from launch import (
    BIN,
    ROOT,
    SMALL,
    environment,
    free_port,
    script,
    script_at_once,
    start_ranks,
    start_training,
    train,
    wait_until_listening,
    warm_script,
)

RUN = [*SMALL, "--max-updates", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a text of its own, `text` beside it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").write_bytes(b"All work and no play. " * 300)
    status, _, err = train(folder / "run", [*RUN, "--corpus-file", str(folder / "text")])
    assert status == 0, err
    return folder / "run"


@pytest.fixture(scope="module")
def other(run: Path) -> Path:
    """A run on the same text, of a smaller model."""
    status, _, err = train(
        run.parent / "other", [*RUN, "--corpus-file", str(run.parent / "text"), "--hidden-size", "8"]
    )
    assert status == 0, err
    return run.parent / "other"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def refusal(name: str, *flags: str | Path, warm: bool = False) -> str:
    """At once; warm: for what is found after the imports, however long these take."""
    done = (warm_script if warm else script_at_once)(name, *flags)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    # a notice of what a --corpus-file is may come before the error
    lines = [line for line in done.stderr.splitlines() if " is not the whole of " not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return done.stderr


# --------------------------------------------------------------------------------------- answered at once

FLAGS = {
    "unknown preset": (["--preset", "demmo"], "did you mean demo"),
    "empty preset": (["--preset="], "--preset '' is unknown"),
    "the last preset counts": (["--preset", "nope", "--preset", "demo", "--rows", "0"], "--rows is 0"),
    "no value": (["--preset"], "Missing value"),
    "not finite": (["--learning-rate", "1e400"], "--learning-rate is inf; it must be a finite number"),
    "not a number": (["--forget-bias", "nan"], "--forget-bias is nan"),
    "huge seed": (["--seed", str(2**63)], "--seed is 9223372036854775808; it must be less than 2^63"),
    "huge size": (["--embedding-size", str(10**17)], "less than 2^31"),
    "no experiment": (["--experiment", " "], "--experiment is empty"),
    "text too short": (["--steps", "10000000"], "too short for 5 rows x 10000000 steps"),
    "no corpus file": (["--corpus-file", "/nowhere/text"], "No such file"),
    "line break in a name": (["--corpus-file", "/no\nwhere"], "/no where cannot be read"),
    "no config": (["--deepspeed", "nope.json"], "nope.json: No such file"),
    "unwritable corpus folder": (["--data-dir", "/proc/x"], "cannot keep the corpus in /proc/x"),
    "a name too long": (["--output-dir", "/tmp/" + "x" * 300], "File name too long; give a shorter path"),
    "not UTF-8": (["--output-dir", "/tmp/\udcff"], "its name is not UTF-8"),
    "folder under a file": (["--output-dir", str(ROOT / "LICENSE/run")], "is not a folder"),
    "a file as folder": (["--output-dir", str(ROOT / "LICENSE")], "is not a folder"),
    "someone else's folder": (["--output-dir", str(ROOT / "src")], "no config.json"),
}


@pytest.mark.parametrize(("flags", "said"), FLAGS.values(), ids=FLAGS)
def test_bad_flags(flags: list[str], said: str, tmp_path: Path) -> None:
    assert said in refusal("train", *RUN, "--output-dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


CONFIGS = {
    "malformed": ('{"zero_optimization": {\n  "stage": two}}', "config.json:2:12: not JSON"),
    "contradicts": ('{"gradient_clipping": 3.5}', "gradient_clipping is 3.5"),
    "unknown key": ('{"zero_optimisation": {"stage": 2}}', "did you mean zero_optimization?"),
}


@pytest.mark.parametrize(("content", "said"), CONFIGS.values(), ids=CONFIGS)
def test_bad_configs(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    flags = ["--output-dir", tmp_path / "run", "--deepspeed", tmp_path / "config.json"]
    assert said in refusal("train", *RUN, *flags)


CORPORA = {
    "truncated": (b"The first part of it. " * 100, "downloads/enwik8 is not enwik8: expected 100,000,000 bytes"),
    "truncated archive": (b"\xfd7zXZ\x00\x00\x04", "cannot be unpacked: truncated or damaged"),
}


@pytest.mark.parametrize(("content", "said"), CORPORA.values(), ids=CORPORA)
def test_truncated_corpora(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/enwik8").write_bytes(content)
    flags = ["--corpus", "enwik8", "--data-dir", tmp_path, "--output-dir", tmp_path / "run"]
    assert said in refusal("train", *RUN, *flags)


def test_wrong_md5(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    with (tmp_path / "downloads/text8").open("wb") as f:
        f.truncate(100_000_000)
    flags = ["--corpus", "text8", "--data-dir", tmp_path, "--output-dir", tmp_path / "run"]
    assert "found 100,000,000 bytes with MD5 0f86d7c5a6180cf9584c1d21144d85b0" in refusal("train", *RUN, *flags)


def test_no_network_and_no_file(tmp_path: Path) -> None:
    env = environment(GFRNN_CORPUS_URL=f"http://127.0.0.1:{free_port()}")
    done = script("train", *RUN, "--corpus", "enwik8", "--data-dir", tmp_path, "--output-dir", tmp_path / "r", env=env)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot fetch")
    assert str(tmp_path / "downloads") in last
    assert "--corpus-file" in last


def test_folder_of_another_configuration(run: Path) -> None:
    flags = [*RUN, "--corpus-file", run.parent / "text", "--output-dir", run, "--max-updates", "3"]
    assert "holds a run with --hidden-size = 16, not 17" in refusal("train", *flags, "--hidden-size", "17")


def test_the_text_changed_between_runs(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes((run.parent / "text").read_bytes() + b"!")
    flags = [*RUN, "--corpus-file", tmp_path / "text", "--output-dir", run, "--max-updates", "3"]
    assert "holds a run on another text" in refusal("train", *flags)


PROGRAMS = {
    "no run": ("evaluate", ["/nowhere"], "no such folder"),
    "no run to sample": ("sample", ["/nowhere"], "no such folder"),
    "no checkpoint": ("sample", [str(ROOT / "tests")], "has no checkpoint"),
    "no stream": ("evaluate", ["RUN", "--streams", "0"], "--streams is 0"),
    "infinite rate": ("evaluate", ["RUN", "--dynamic", "--dynamic-learning-rate", "inf"], "finite"),
    "empty text": ("evaluate", ["RUN", "--text-file", "/dev/null"], "is empty"),
    "no text": ("evaluate", ["RUN", "--text-file", "/nowhere"], "No such file"),
    "no folder for the results": ("evaluate", ["RUN", "--json", "/nowhere/x.json"], "cannot be written"),
    "no such device": ("evaluate", ["RUN", "--device", "abacus"], "--device abacus is unknown"),
    "negative length": ("sample", ["RUN", "--length", "-1"], "--length is -1"),
    "seed too large": ("sample", ["RUN", "--seed", str(2**63)], "2^63 - 1"),
}


@pytest.mark.parametrize(("name", "flags", "said"), PROGRAMS.values(), ids=PROGRAMS)
def test_bad_flags_of_the_other_programs(name: str, flags: list[str], said: str, run: Path) -> None:
    assert said in refusal(name, *[str(run) if flag == "RUN" else flag for flag in flags])


@pytest.mark.parametrize("flags", [["--help"], ["--preset", "list"], ["--dry-run"]], ids=lambda flags: flags[0])
def test_questions_are_answered_at_once(flags: list[str], tmp_path: Path) -> None:
    done = script_at_once("train", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gf-lstm-5x700" in done.stdout


# ------------------------------------------------------------------------------------------- damaged runs

DAMAGE = {
    "config.json": (b"{", "config.json is damaged"),
    "summary.json": (b"{", "summary.json is damaged"),
    "metrics.jsonl": (b"{}\n{\n", "metrics.jsonl:1: damaged; delete that line"),
    "checkpoints/latest": (b"step-00000007", "names 'step-00000007', no checkpoint there"),
    "checkpoints/step-00000002/state.safetensors": (b"", "state.safetensors is missing or damaged"),
    "checkpoints/step-00000002/trainer.json": (b"{", "trainer.json is damaged"),
}


FOLDERS = {"summary.json": "/summary.json: Is a directory", "checkpoints/latest": "/latest: Is a directory"}


def test_evaluation_on_another_text_than_the_runs(run: Path) -> None:
    message = refusal("evaluate", run, "--corpus-file", ROOT / "LICENSE", warm=True)
    assert "LICENSE is not the text that the run was trained on; score it with --text-file" in message


def test_a_run_that_another_one_began_in_its_folder_meanwhile(run: Path, tmp_path: Path) -> None:
    """Its check of the folder was before the other's config.json, and its turn comes after the other's end."""
    output_dir = tmp_path / "new"
    output_dir.mkdir()
    lock = FileLock(output_dir / ".lock")
    lock.acquire()
    flags = [*RUN, "--corpus-file", str(run.parent / "text"), "--seed", "1"]
    process = start_training(output_dir, flags)
    wait_until_listening(process)  # to its process group, the last thing before it asks for the lock
    time.sleep(1)
    shutil.copytree(run, output_dir, dirs_exist_ok=True, ignore=lambda *_: [".lock"])
    lock.release()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith(f"error: --output-dir {output_dir} holds a run with --seed = 0, not 1")
    assert (output_dir / "config.json").read_bytes() == (run / "config.json").read_bytes()


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = script("train", *RUN, "--output-dir", tmp_path / "run", env=environment(**variables))
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert f"(127.0.0.1 on lo) cannot meet the other processes at 127.0.0.1:{port}" in last
    assert "; give another port, --master_port" in last
    del variables["MASTER_ADDR"]
    done = script("train", *RUN, "--output-dir", tmp_path / "run", env=environment(**variables))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "error: RANK is set, but not MASTER_ADDR; start with the deepspeed command, or unset RANK",
    )


def test_a_reader_of_progress_that_goes_away_ends_no_training(run: Path, tmp_path: Path) -> None:
    flags = [*RUN, "--corpus-file", str(run.parent / "text"), "--output-dir", str(tmp_path / "run")]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = script("train", *flags, capture_output=False, stdout=subprocess.DEVNULL, stderr=write_end)
    os.close(write_end)
    assert done.returncode == 0
    assert (tmp_path / "run" / "summary.json").exists()


MEANINGLESS = {
    "summary.json": (b'{"finished": true, "step": 2, "without_best": 0}', "it has no 'test_bpc'"),
    "mlflow.json": (b"[]", "mlflow.json was not written by gfrnn"),
    "config.json": (b'{"settings": 5, "corpus_md5": ""}', "Settings are 5 in a file"),
}


@pytest.mark.parametrize("file", MEANINGLESS)
def test_files_that_say_nothing(file: str, run: Path, copy: Path) -> None:
    content, said = MEANINGLESS[file]
    (copy / file).write_bytes(content)
    flags = [*RUN, "--corpus-file", run.parent / "text", "--output-dir", copy]
    more = [] if file == "summary.json" else ["--max-updates", "3"]
    assert said in refusal("train", *flags, *more, warm=True)


@pytest.mark.parametrize("file", FOLDERS)
def test_a_folder_in_a_files_place(file: str, run: Path, copy: Path) -> None:
    (copy / file).unlink()
    (copy / file).mkdir()
    flags = [*RUN, "--corpus-file", run.parent / "text", "--output-dir", copy, "--max-updates", "3"]
    assert FOLDERS[file] in refusal("train", *flags, warm=True)


def test_a_checkpoint_put_together_from_two(run: Path, other: Path, copy: Path) -> None:
    flags = [*RUN, "--corpus-file", run.parent / "text", "--output-dir", copy, "--max-updates", "3"]
    for file, said in {
        "optimizer.safetensors": "optimizer.safetensors is not of the model in weights.safetensors",
        "averages.safetensors": "averages.safetensors is not of the model in weights.safetensors",
        "state.safetensors": "state.safetensors of the checkpoint is not of this model and --rows",
    }.items():
        target = copy / "checkpoints/step-00000002" / file
        before = target.read_bytes()
        target.write_bytes((other / "checkpoints/step-00000002" / file).read_bytes())
        assert said in refusal("train", *flags, warm=True)
        target.write_bytes(before)


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_run_is_not_gone_on_with(file: str, run: Path, copy: Path) -> None:
    content, said = DAMAGE[file]
    (copy / file).write_bytes(content)
    flags = [*RUN, "--corpus-file", run.parent / "text", "--output-dir", copy, "--max-updates", "3"]
    assert said in refusal("train", *flags, warm=True)
    assert (copy / file).read_bytes() == content


def test_checkpoint_of_another_model(run: Path, other: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(other / "checkpoints", copy / "checkpoints")
    flags = [*RUN, "--corpus-file", run.parent / "text", "--output-dir", copy, "--max-updates", "3"]
    message = refusal("train", *flags, warm=True)
    assert "is of another model: rnn.bias_cell_l0 is (8,) there and (16,) here" in message


# ------------------------------------------------------------------------------------ under the launcher


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that not even root may write to."""
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    immutable = os.geteuid() == 0
    if immutable:
        subprocess.run(["chattr", "+i", str(folder)], check=True)
    yield folder
    if immutable:
        subprocess.run(["chattr", "-i", str(folder)], check=True)


def launched(*flags: str | Path, processes: int = 2) -> tuple[int, list[str], str]:
    """(status, the lines of ours, all of stderr) of `deepspeed src/train.py`."""
    head = [str(BIN / "deepspeed"), "--quiet", "--num_gpus", str(processes), "--master_port", str(free_port())]
    command = [*head, str(ROOT / "src/train.py"), *RUN, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    return done.returncode, lines, done.stderr


def test_an_unwritable_folder(read_only: Path) -> None:
    assert "may not be written to; give another --output-dir" in refusal(
        "train", *RUN, "--output-dir", read_only / "run"
    )
    status, lines, err = launched("--output-dir", read_only / "run")
    assert (status, len(lines)) == (2, 1), err
    assert "Traceback" not in err


TOGETHER = {
    "more processes than rows": (["--rows", "2"], 3, "3 processes cannot share --rows 2"),
    "no corpus": (["--corpus-file", "/nowhere"], 2, "/nowhere cannot be read"),
    "unknown preset": (["--preset", "nope"], 2, "--preset 'nope' is unknown"),
    "text too short": (["--steps", "10000000"], 2, "too short"),
}
LAUNCHED = ["more processes than rows", "no corpus"]  # one before there are settings, one after


@pytest.mark.parametrize(("flags", "processes", "said"), [TOGETHER[name] for name in LAUNCHED], ids=LAUNCHED)
def test_one_process_speaks_under_the_launcher(flags: list[str], processes: int, said: str, tmp_path: Path) -> None:
    status, lines, err = launched("--output-dir", tmp_path / "run", *flags, processes=processes)
    assert status == 2, err
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize(("flags", "processes", "said"), TOGETHER.values(), ids=TOGETHER)
def test_the_first_process_speaks_and_the_others_wait(
    flags: list[str], processes: int, said: str, tmp_path: Path
) -> None:
    """What the launcher relies on, which ends them when the first has gone."""
    first, *others = start_ranks([ROOT / "src/train.py", *RUN, "--output-dir", tmp_path / "run", *flags], processes)
    out, err = first.communicate(timeout=120)
    for process in others:
        assert process.poll() is None
        process.kill()
        assert process.communicate(timeout=60) == ("", "")
    assert (first.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert said in line
