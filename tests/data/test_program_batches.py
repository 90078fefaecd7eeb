"""How programs become batches: each once a pass, of about one length, the same ones for any number of processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gfrnn.config import PROGRAM_SYMBOLS, TARGET_SYMBOLS, UserError
from gfrnn.data import ProgramBatches, ProgramTable, generate_programs
from gfrnn.data.program_batches import END, pad
from gfrnn.data.programs import decode, encode


def table(count: int, length: int = 3, nesting: int = 3) -> ProgramTable:
    found = list(generate_programs(count, length=length, nesting=nesting, seed=1))
    sources, targets = (
        [encode(p.program, PROGRAM_SYMBOLS) for p in found],
        [encode(p.target, TARGET_SYMBOLS) for p in found],
    )

    def offsets(parts: list[Any]) -> Any:
        return np.cumsum([0, *map(len, parts)])

    return ProgramTable(np.concatenate(sources), offsets(sources), np.concatenate(targets), offsets(targets))


TABLE = table(103)


def rows_of(batches: ProgramBatches, update: int, micros: int = 1) -> list[tuple[int, str, str]]:
    """(global row, program, target) of the rows that exist, read back from the padded tensors."""
    found = []
    for micro in range(micros):
        batch, rows = batches.batch(update, micro), batches.micro_rows(micro).tolist()
        for b, row in enumerate(rows):
            S, T = int(batch.source_lengths_B[b]), int(batch.target_lengths_B[b])
            if row < 0:
                assert (S, T) == (0, 0)
                continue
            assert batch.inputs_TB[:T, b].tolist() == [END, *batch.targets_TB[: T - 1, b].tolist()]
            source, target = batch.sources_SB[:S, b].numpy(), batch.targets_TB[:T, b].numpy()
            found.append((row, decode(source, PROGRAM_SYMBOLS), decode(target, TARGET_SYMBOLS)))
    return found


def test_a_pass_reads_every_program_once_but_the_rest() -> None:
    batches = ProgramBatches(TABLE, 10, seed=5)
    assert batches.updates == 10
    found = [row[1:] for update in range(10) for row in rows_of(batches, update)]
    every = [(TABLE.program(i), TABLE.target(i)) for i in range(103)]
    assert len(found) == 100
    assert all(found.count(sample) <= every.count(sample) for sample in found)


def test_passes_differ_and_a_seed_repeats_one() -> None:
    def order(seed: int) -> list[Any]:
        batches = ProgramBatches(TABLE, 10, seed=seed)
        return [rows_of(batches, update) for update in range(10)]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (3, 2), (7, 1), (1, 3)])
def test_the_same_rows_for_any_number_of_processes(processes: int, accumulation: int) -> None:
    whole = ProgramBatches(TABLE, 7, seed=3)
    parts = [
        ProgramBatches(TABLE, 7, seed=3, world_size=processes, rank=rank, accumulation=accumulation)
        for rank in range(processes)
    ]
    for update in range(whole.updates):
        found = [row for part in parts for row in rows_of(part, update, accumulation)]
        assert found == rows_of(whole, update)
        batch = whole.batch(update, 0)
        assert whole.source_characters(update) == batch.source_lengths_B.sum()
        assert whole.target_characters(update) == batch.target_lengths_B.sum()
        for part in parts:
            shape = part.batch(update, 0).sources_SB.shape
            assert shape[0] == batch.sources_SB.shape[0]  # of the longest of the global batch: all do the same steps
            assert part.target_characters(update) == whole.target_characters(update)
            for micro in range(accumulation):
                assert part.counted(update, micro) == part.batch(update, micro).target_lengths_B.sum()


def test_a_batch_has_about_one_length() -> None:
    many = table(2000, length=6, nesting=5)
    batches = ProgramBatches(many, 50, seed=0)
    read = sum(batches.batch(u, 0).sources_SB.numel() for u in range(batches.updates))
    assert read < 1.15 * sum(batches.source_characters(u) for u in range(batches.updates))
    longest = [batches.batch(u, 0).sources_SB.shape[0] for u in range(batches.updates)]
    assert sorted(longest) != longest != sorted(longest, reverse=True)  # short and long ones in turn


def test_padding_is_out_of_reach_of_lengths() -> None:
    batch = pad(TABLE, np.array([4, -1, 9]), torch.device("cpu"), (200, 40))
    assert batch.sources_SB.shape == (200, 3)
    assert batch.targets_TB.shape == (40, 3)
    assert batch.source_lengths_B.tolist() == [len(TABLE.program(4)), 0, len(TABLE.program(9))]
    assert batch.sources_SB.max() < len(PROGRAM_SYMBOLS)
    assert batch.targets_TB.max() < len(TARGET_SYMBOLS)


def test_errors_are_one_line() -> None:
    with pytest.raises(UserError, match="103 programs are too few for --rows 104"):
        ProgramBatches(TABLE, 104, seed=0)
    with pytest.raises(UserError, match="8 processes cannot share --rows 7"):
        ProgramBatches(TABLE, 7, seed=0, world_size=8)
