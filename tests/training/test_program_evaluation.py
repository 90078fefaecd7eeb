"""Scores of programs against what the model says one character after another, and intervals against repetition."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from gfrnn.config import PROGRAM_SYMBOLS, TARGET_SYMBOLS, ModelSettings, UserError, preset
from gfrnn.data.program_dataset import load_programs
from gfrnn.data.programs import ProgramTable, encode
from gfrnn.nn import EncoderDecoder, build_model
from gfrnn.training.grid import difference, ratio, score_grid
from gfrnn.training.program_evaluation import predict, score_programs


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ProgramTable:
    return load_programs(
        tmp_path_factory.mktemp("data"), split="test", nesting=1, length=1, num_programs=150, curriculum="mix"
    )


@pytest.fixture(scope="module")
def model(table: ProgramTable) -> EncoderDecoder:
    """Trained for a moment, so that some targets come out right and some do not."""
    settings = dataclasses.replace(
        preset("programs-demo"), model=ModelSettings(num_layers=2, hidden_size=24, vocab_size=len(PROGRAM_SYMBOLS))
    )
    model = build_model(settings)
    assert isinstance(model, EncoderDecoder)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    from gfrnn.data.program_batches import pad
    from gfrnn.training.program_evaluation import row_sums

    batch = pad(table, np.arange(60), torch.device("cpu"))
    for _ in range(60):
        loss = row_sums(model(batch.sources_SB, batch.source_lengths_B, batch.inputs_TB), batch).bits_B.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_a_score_is_that_of_the_characters_one_by_one(model: EncoderDecoder, table: ProgramTable) -> None:
    scores = score_programs(model, table)
    assert scores.program.tolist() == list(range(150))
    for number in range(0, 150, 7):
        target = torch.from_numpy(encode(table.target(number), TARGET_SYMBOLS).astype(np.int64))
        source = torch.from_numpy(encode(table.program(number), PROGRAM_SYMBOLS).astype(np.int64))
        bits, right, state, symbol = 0.0, 0, model.encode(source.unsqueeze(1)), TARGET_SYMBOLS.index(".")
        for wanted in target.tolist():
            logits, state = model.decoder(torch.tensor([[symbol]]), state)
            bits -= torch.log_softmax(logits[0, 0], 0)[wanted].item() / np.log(2)
            right += int(logits[0, 0].argmax()) == wanted
            symbol = wanted
        assert abs(scores.bits[number] - bits) < 1e-4 * bits
        assert (scores.right[number], scores.characters[number]) == (right, len(target))


def test_exact_is_what_the_model_writes_by_itself(model: EncoderDecoder, table: ProgramTable) -> None:
    scores = score_programs(model, table)
    assert 0 < scores.exact.sum() < 150
    written = [predict(model, table.program(number)) + "." == table.target(number) for number in range(150)]
    assert written == scores.exact.tolist()


def test_processes_share_the_programs(model: EncoderDecoder, table: ProgramTable) -> None:
    whole = score_programs(model, table)
    parts = [score_programs(model, table, rank=rank, world_size=4) for rank in range(4)]
    order = np.concatenate([part.program for part in parts]).argsort()
    for name in ("program", "characters", "right", "bits"):
        shared = np.concatenate([getattr(part, name) for part in parts])[order]
        assert np.allclose(shared, getattr(whole, name), rtol=1e-5)


def test_a_program_with_a_character_that_none_has(model: EncoderDecoder) -> None:
    with pytest.raises(UserError, match=r"'%' in line 2, column 9"):
        predict(model, "a=3\nprint((a%4))")


def test_the_interval_of_a_share_holds_the_truth_as_often_as_it_says() -> None:
    """Characters of one program are right together: as many trials as characters would be far too narrow."""
    random = np.random.RandomState(0)
    truth, held = 0.3, 0
    for _ in range(400):
        lengths = random.randint(2, 9, size=120)
        right = np.where(random.rand(120) < truth, lengths, 0)
        found = ratio(right, lengths)
        assert found.low <= found.value <= found.high
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_wilson_where_all_or_nothing_is_right() -> None:
    ones = np.ones(100)
    assert ratio(np.zeros(100), ones)[0] == 0.0
    assert ratio(np.zeros(100), ones).high == pytest.approx(0.0370, abs=1e-4)
    assert ratio(ones, ones).low == pytest.approx(0.9630, abs=1e-4)
    half = ratio(np.repeat([0, 1], 50), ones)
    assert half[:2] == pytest.approx((0.5, 0.4038), abs=2e-3)


def test_a_difference_is_paired() -> None:
    random = np.random.RandomState(1)
    ours = random.rand(1000) < 0.5
    theirs = ours.copy()
    theirs[:30] = ~theirs[:30]
    found = difference(ours, theirs, np.ones(1000))
    alone = ratio(ours, np.ones(1000))
    assert found.value == pytest.approx(ours.mean() - theirs.mean())
    assert found.high - found.low < 0.5 * (alone.high - alone.low)


def test_a_handful_of_programs_is_no_gain() -> None:
    """As the sign test has it: 5 of 5 are not significant, 6 of 6 are."""
    theirs, ones = np.zeros(2000), np.ones(2000)
    for better, significant in ((0, False), (4, False), (6, True)):
        ours = theirs.copy()
        ours[:better] = 1
        found = difference(ours, theirs, ones)
        assert found.value == better / 2000
        assert (found.low > 0) == significant
        assert found.high > found.value


def test_the_interval_of_a_gain_holds_the_truth_as_often_as_it_says() -> None:
    random, held = np.random.RandomState(2), 0
    for _ in range(400):
        lengths = random.randint(2, 9, size=150)
        both, ours, theirs = (random.rand(150) < share for share in (0.4, 0.2, 0.1))
        found = difference((both | ours) * lengths, (both | theirs) * lengths, lengths)
        held += found.low <= 0.6 * 0.1 <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_the_grid_has_programs_of_each_cell_alone(model: EncoderDecoder, tmp_path: Path) -> None:
    done: list[float] = []
    cells = score_grid([model, model], tmp_path, nesting=2, length=3, programs=40, progress=done.append)
    assert [(cell.nesting, cell.length) for cell in cells] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert done[-1] == 1.0
    lengths = [cell.scores[0].characters.mean() for cell in cells]
    assert lengths[0] < lengths[1] < lengths[2]
    for cell in cells:
        values = cell.to_json()
        assert values["programs"] == 40
        assert values["accuracy_low"] <= values["accuracy"] <= values["accuracy_high"]
        assert values["accuracy_gain"] == values["exact_gain"] == 0.0
        assert values["exact_gain_low"] < 0 < values["exact_gain_high"]
        assert values["accuracy"] == values["other_accuracy"]
