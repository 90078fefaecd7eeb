"""Learning is real: a small GF-LSTM gets below what any bigram model could reach on the same held-out bytes."""

from __future__ import annotations

import numpy as np

from gfrnn.config import DataSettings
from gfrnn.data import load_text
from launch import summary, train


def bigram_entropy(text: np.ndarray) -> float:
    """H(byte | byte before) of a text by its own counts, in bits: a bound for every model that sees one byte back."""
    pairs = np.zeros((256, 256))
    np.add.at(pairs, (text[:-1], text[1:]), 1)
    before = pairs.sum(1, keepdims=True)
    probability = np.divide(pairs, before, where=pairs > 0, out=np.ones_like(pairs))
    return float(-(pairs * np.log2(probability)).sum() / pairs.sum())


def test_below_the_bigram_entropy_of_held_out_text(tmp_path):
    test = load_text(DataSettings(corpus="enwik8-1m")).test
    bound = bigram_entropy(np.asarray(test))
    assert 3 < bound < 4.5  # of English with markup
    flags = ["--preset", "demo", "--hidden-size", "64", "--rows", "32", "--steps", "32", "--no-mlflow"]
    status, _, err = train(
        tmp_path / "run",
        [*flags, "--learning-rate", "6e-3", "--max-updates", "300", "--valid-every", "0", "--eval-streams", "16"],
        processes=2,
        stage="z2",
    )
    assert status == 0, err
    assert summary(tmp_path / "run")["test_bpc"] < bound
