"""metrics.jsonl is read once, line by line, whatever kills and resumed runs do to it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from gfrnn.runs import RunFolder
from gfrnn.training.metrics_reader import Mark, MetricsReader, numbers


def steps(reader: MetricsReader, limit: int = 1000) -> list[int]:
    """Reads to the end, as the sender does; the steps read."""
    found: list[int] = []
    while (points := reader.read(limit)) is not None:
        assert len(points) <= limit
        found += [point.step for point in points if point.key == "train_bpc"]
        reader.commit()
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def write(run: RunFolder, *steps: int) -> None:
    """Lines as the trainer writes them."""
    for step in steps:
        run.append_metrics({"step": step, "epoch": step // 10, "train_bpc": random.random()})


def test_reads_each_line_once_in_batches(run: RunFolder) -> None:
    reader = MetricsReader(run.metrics_path, [Mark()])
    assert reader.read(1000) is None
    write(run, *range(1, 25))
    assert steps(reader, limit=7) == list(range(1, 25))
    write(run, 25)
    assert steps(reader) == [25]
    assert reader.read(1000) is None


def test_what_was_not_committed_is_read_again(run: RunFolder) -> None:
    write(run, 1, 2)
    reader = MetricsReader(run.metrics_path, [Mark()])
    assert reader.read(1000) == reader.read(1000) != []
    assert steps(reader) == [1, 2]


def test_a_torn_line_is_left_until_it_is_whole(run: RunFolder) -> None:
    write(run, 1)
    reader = MetricsReader(run.metrics_path, [Mark()])
    with run.metrics_path.open("a") as f:
        f.write('{"step": 2, "train_b')
        f.flush()
        assert steps(reader) == [1]
        assert reader.unread() == 0
        f.write('pc": 1.0, "time": 5}\n')
    assert steps(reader) == [2]


def test_a_line_torn_by_a_kill_and_written_on_does_not_stop_the_rest(run: RunFolder) -> None:
    write(run, 1)
    with run.metrics_path.open("a") as f:
        f.write('{"step": 2, "tra')
        f.write('{"step": 2, "train_bpc": 1.0, "time": 5}\n{"step": 3, "train_bpc": 1.0, "time": 6}\n')
    assert steps(MetricsReader(run.metrics_path, [Mark()])) == [1, 3]


@pytest.mark.parametrize("kept", [0, 1, 150, 299, 300])
@pytest.mark.parametrize("more", [0, 10, 400])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_file_cut_and_written_on_loses_no_line(run: RunFolder, kept: int, more: int, restarted: bool) -> None:
    """Whether it is shorter or longer than before when it is looked at again."""
    reader = MetricsReader(run.metrics_path, [Mark()])
    for step in range(1, 301):
        write(run, step)
        assert steps(reader) == [step]
    assert len(reader.marks) < 100
    run.truncate_metrics(kept)
    write(run, *range(kept + 1, kept + more + 1))
    if restarted:
        stored = json.loads(json.dumps(reader.marks))
        reader = MetricsReader(run.metrics_path, [Mark(*mark) for mark in stored])
    read = steps(reader)
    assert read[len(read) - more :] == list(range(kept + 1, kept + more + 1))
    repeated = read[: len(read) - more]
    assert repeated == list(range(kept - len(repeated) + 1, kept + 1))
    assert len(repeated) <= 0.05 * kept + 60, "the beginning was not recognised"


def test_gates_and_timescales_are_metrics_unless_there_are_many() -> None:
    line = {"valid_bpc": 2.0, "mean_gates": [[0.1, 0.2], [0.3, 0.4]], "timescales": [5.0, 6.0], "sample": "of"}
    assert dict(numbers(line)) == {
        **{"valid_bpc": 2.0, "timescale_1": 5.0, "timescale_2": 6.0},
        **{"gate_1_1": 0.1, "gate_1_2": 0.2, "gate_2_1": 0.3, "gate_2_2": 0.4},
    }
    many = {"valid_bpc": 2.0, "mean_gates": [[0.5] * 7] * 7, "timescales": [1.0] * 7}
    assert numbers(many) == [("valid_bpc", 2.0)]
