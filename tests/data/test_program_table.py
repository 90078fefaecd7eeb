"""The table of programs on disk: the same rows whoever makes it, made once, and refused where it is damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from program_samples import SETTINGS, expected, folders_of, load, rows_of

from gfrnn.config import UserError
from gfrnn.data import program_dataset, programs
from gfrnn.data.program_dataset import Programs, load_programs
from gfrnn.data.programs import Program


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nesting": 0}, "--nesting is 0; programs have 1 to 10"),
        ({"nesting": 11}, "--nesting is 11; programs have 1 to 10"),
        ({"length": 0}, "--length is 0; programs have 1 to 15"),
        ({"length": 16}, "--length is 16; programs have 1 to 15"),
        ({"curriculum": "hard"}, "--curriculum 'hard' is unknown; use one of baseline, naive, mix, blend"),
        ({"split": "dev"}, "split 'dev' is unknown; use one of train, valid, test"),
        (
            {"level": (4, 1)},
            "level (4, 1) is not on the ladder of --length 3 --nesting 2; "
            "use a (length, nesting) from (1, 1) to (3, 2)",
        ),
        ({"level": (0, 1)}, "level (0, 1) is not on the ladder"),
    ],
)
def test_what_cannot_be_made_is_said_at_once(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    recipe = {"length": 3, "nesting": 2, "curriculum": "mix", "split": "train", **changes}
    with pytest.raises(UserError) as error:
        programs.generate_programs(1, **recipe)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)
    with pytest.raises(UserError) as again:
        load_programs(tmp_path, num_programs=10, **recipe)  # type: ignore[arg-type]
    assert str(again.value) == str(error.value)
    assert "\n" not in str(error.value)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("num_proc", [1, 2, 3, 9])
def test_rows_do_not_depend_on_the_number_of_processes(num_proc: int, tmp_path: Path) -> None:
    table = load(tmp_path, num_proc=num_proc)
    (folder,) = folders_of(tmp_path)
    assert len(list(folder.glob("*.arrow"))) == min(num_proc, 4)  # really so many; there is work for 4
    assert rows_of(table) == expected()
    assert table.source_lengths.tolist() == [len(sample.program) for sample in expected()]
    assert table.target_lengths.tolist() == [len(sample.target) for sample in expected()]
    for codes in (table.sources, table.targets):
        assert codes.dtype == np.uint8
    for offsets in (table.source_offsets, table.target_offsets, table.source_lengths, table.target_lengths):
        assert offsets.dtype == np.int64
    assert len(table) + 1 == len(table.source_offsets) == len(table.target_offsets)


def test_the_builder_is_one_of_datasets(tmp_path: Path) -> None:
    for num_proc in (1, 2):
        builder = Programs(cache_dir=str(tmp_path / str(num_proc)), **SETTINGS)
        builder.download_and_prepare(num_proc=num_proc)
        rows = builder.as_dataset(split="train")
        assert rows.features == datasets.Features(dict.fromkeys(Program._fields, datasets.Value("string")))
        assert [Program(**row) for row in rows] == expected()
        assert builder.info.splits["train"].num_examples == 3500
    assert program_dataset.os is os  # and not one that datasets has made for builders that read remote files
    other = Programs(cache_dir=str(tmp_path), **{**SETTINGS, "seed": 4})
    assert other.cache_dir != Programs(cache_dir=str(tmp_path), **SETTINGS).cache_dir


def test_what_is_made_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows_of(load(tmp_path))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(program_dataset, "_build", None)
    assert rows_of(load(tmp_path)) == first
    assert rows_of(load(tmp_path, level=(1, 1), num_proc=2)) == first  # mix has no level
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps


def test_every_setting_makes_other_programs_in_a_folder_of_its_own(tmp_path: Path) -> None:
    few = {"num_programs": 7}
    changes: list[dict[str, object]] = [
        {"split": "valid"},
        {"nesting": 3},
        {"length": 4},
        {"curriculum": "baseline"},
        {"curriculum": "naive"},
        {"curriculum": "naive", "level": (5, 4)},
        {"curriculum": "blend", "level": (5, 4)},
        {"seed": 4},
        {"start": 7},
        {"num_programs": 1},
    ]
    for change in changes:
        assert rows_of(load(tmp_path, **{**few, **change})) == expected(**{**few, **change})
    assert len(folders_of(tmp_path)) == len(changes)


def test_small_tables_are_made_by_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [program_dataset._processes(n) for n in (1, 39_999, 40_000, 400_000)] == [1, 1, 2, 8]


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "missing", "none", "fewer", "characters", "offsets"])
def test_a_damaged_folder(tmp_path: Path, damage: str) -> None:
    load(tmp_path, num_proc=2)
    (folder,) = folders_of(tmp_path)
    first, second = sorted(folder.glob("*.arrow"))
    content = second.read_bytes()
    if damage == "missing":
        second.unlink()
    elif damage == "none":
        for path in list(folder.iterdir()):
            path.unlink()
    elif damage == "fewer":
        load(tmp_path / "other", num_programs=100)
        (arrow,) = (tmp_path / "other").rglob("*.arrow")
        second.write_bytes(arrow.read_bytes())
    elif damage == "characters":
        first.write_bytes(first.read_bytes().replace(b"print(", b"Print("))
    elif damage == "offsets":  # the first program reaches to the end of the second
        lengths = [len(sample.program) for sample in expected()[:3]]
        bounds = np.cumsum([0, *lengths]).astype(np.int32)
        assert bounds.tobytes() in first.read_bytes()
        wrong = bounds[[0, 2, 1, 3]]
        first.write_bytes(first.read_bytes().replace(bounds.tobytes(), wrong.tobytes()))
    else:
        second.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\xff" * 1000}[damage])
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert str(error.value) == f"{folder} is damaged; delete it, and it is made again"


@pytest.mark.parametrize(("folder", "reason"), [("file/below", "Not a directory"), ("/proc/kept", "No such file")])
def test_an_unwritable_data_dir_is_one_line(folder: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError) as error:
        load(tmp_path / folder)
    assert str(error.value).startswith(f"cannot keep programs in {tmp_path / folder}: {reason}")
    assert str(error.value).endswith("make room there or give another folder, --data-dir")


def test_no_programs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the number of train programs is 0; it must be greater than 0"):
        load(tmp_path, num_programs=0)


def test_importing_the_generator_is_cheap() -> None:
    code = "import sys, gfrnn.data.programs; print({'torch', 'datasets', 'pyarrow', 'multiprocess'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
