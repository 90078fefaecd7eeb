"""Whatever the processes and micro-batches, an epoch reads the same bytes, each once, in its row's order."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gfrnn.config import UserError
from gfrnn.data import Streams


def _text(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def _read(text: np.ndarray, rows: int, steps: int, world_size: int, accumulation: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [R, S * T] as all processes together read them; every (row, segment) must be read once."""
    inputs, targets = (np.full((rows, len(text) // rows // steps * steps), -1) for _ in range(2))
    for rank in range(world_size):
        streams = Streams(text, rows, steps, world_size=world_size, rank=rank, accumulation=accumulation)
        for segment in range(streams.segments_per_epoch):
            for micro in range(accumulation):
                x_TB, y_TB = streams.batch(segment, micro)
                assert x_TB.shape == y_TB.shape == (steps, streams.rows_per_micro)
                assert x_TB.dtype == y_TB.dtype == torch.int64
                rows_B, weights_B = streams.micro_rows(micro), streams.weights(micro)
                assert rows_B.dtype == torch.int64
                assert weights_B.tolist() == [float(row >= 0) for row in rows_B]
                assert streams.counted(micro) == steps * weights_B.sum()
                span = slice(segment * steps, (segment + 1) * steps)
                for b, row in enumerate(rows_B.tolist()):
                    if row < 0:
                        assert row == -1
                        assert not x_TB[:, b].any()
                        assert not y_TB[:, b].any()
                        continue
                    assert (targets[row, span] == -1).all(), "read twice"
                    inputs[row, span], targets[row, span] = x_TB[:, b].numpy(), y_TB[:, b].numpy()
    return inputs, targets


@hypothesis_settings(deadline=None)
@given(
    rows=st.integers(1, 9),
    steps=st.integers(1, 7),
    segments=st.integers(1, 4),
    extra=st.integers(0, 80),
    world_size=st.integers(1, 4),
    accumulation=st.integers(1, 5),
)
@example(rows=5, steps=3, segments=2, extra=0, world_size=4, accumulation=1)  # the last process has padding only
@example(rows=3, steps=2, segments=2, extra=1, world_size=3, accumulation=3)  # more micro-batches than rows
def test_every_byte_is_read_once(
    rows: int, steps: int, segments: int, extra: int, world_size: int, accumulation: int
) -> None:
    text = _text(rows * steps * segments + extra, seed=rows + extra)
    world_size = min(world_size, rows)
    n = len(text) // rows
    kept = n // steps * steps
    inputs, targets = _read(text, rows, steps, world_size, accumulation)
    expected = text[: rows * n].reshape(rows, n)[:, :kept]
    np.testing.assert_array_equal(targets, expected)
    np.testing.assert_array_equal(inputs[:, 1:], expected[:, :-1])
    before = np.concatenate([[10], text[n - 1 : rows * n - 1 : n]])  # the byte before each row
    np.testing.assert_array_equal(inputs[:, 0], before)
    assert Streams(text, rows, steps).dropped_bytes == len(text) - targets.size


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_what_is_read_depends_on_neither_processes_nor_accumulation(world_size: int, accumulation: int) -> None:
    text = _text(1003)
    once = _read(text, 7, 11, 1, 1)
    again = _read(text, 7, 11, world_size, accumulation)
    np.testing.assert_array_equal(once, again)
    assert Streams(text, 7, 11, world_size=world_size, accumulation=accumulation).count_per_update == 7 * 11


def test_a_small_text_by_hand() -> None:
    text = np.frombuffer(b"abcdefghijklmnopq", np.uint8)  # 3 rows: abcde fghij klmno, pq left over
    streams = Streams(text, 3, 2, world_size=2, rank=0)
    assert streams.segments_per_epoch == 2
    assert streams.dropped_bytes == 3 + 2
    assert streams.micro_rows(0).tolist() == [0, 1]
    as_text = [["".join(map(chr, row)) for row in half.t().tolist()] for half in streams.batch(0, 0)]
    assert as_text == [["\na", "ef"], ["ab", "fg"]]
    as_text = [["".join(map(chr, row)) for row in half.t().tolist()] for half in streams.batch(1, 0)]
    assert as_text == [["bc", "gh"], ["cd", "hi"]]
    other = Streams(text, 3, 2, world_size=2, rank=1)
    assert other.micro_rows(0).tolist() == [2, -1]
    assert other.weights(0).tolist() == [1.0, 0.0]
    assert other.batch(1, 0)[1].t().tolist() == [list(b"mn"), [0, 0]]


def test_the_batches_are_copies() -> None:
    """The text is a read-only map of a file; a batch must not be a view of it, nor of the next batch."""
    text = _text(400)
    text.setflags(write=False)
    streams = Streams(text, 2, 10)
    inputs, targets = streams.batch(0, 0)
    inputs += 1
    targets += 1
    np.testing.assert_array_equal(streams.batch(0, 0)[1].t(), text.reshape(2, 200)[:, :10])


def test_more_processes_than_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"^5 processes cannot share --rows 4: use at most 4 processes") as error:
        Streams(_text(1000), 4, 10, world_size=5)
    assert "\n" not in str(error.value)


def test_a_text_too_short_is_refused_and_the_mend_works() -> None:
    with pytest.raises(UserError, match=r"1000 bytes is too short for 101 rows x 10 steps: use --rows of at most 100"):
        Streams(_text(1000), 101, 10)
    assert Streams(_text(1000), 100, 10).segments_per_epoch == 1
    with pytest.raises(UserError, match="use --steps of at most 1000"):
        Streams(_text(1000), 1, 1001)
    assert Streams(_text(1000), 1, 1000).segments_per_epoch == 1


def test_a_batch_takes_next_to_no_time() -> None:
    """100 rows x 100 steps from 90 MB: well under a millisecond; the bound leaves room for a busy machine."""
    streams = Streams(np.zeros(90_000_000, np.uint8), 100, 100)
    times = []
    for segment in range(200):
        start = time.perf_counter()
        streams.batch(segment * 40, 0)
        times.append(time.perf_counter() - start)
    assert sorted(times)[100] < 2e-3
