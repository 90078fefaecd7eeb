"""Programs against the interpreter: Python prints what their targets say, in the characters that a net knows."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from program_samples import QUICK, generate

from gfrnn.config import MOST_LENGTH, MOST_NESTING, PROGRAM_SYMBOLS, TARGET_SYMBOLS, UserError
from gfrnn.data.programs import CURRICULA, Program, decode, encode

RUN = """
import contextlib, io, json, sys
printed = []
for program in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(program, {})
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


@pytest.fixture(scope="module")
def everything() -> list[Program]:
    """Programs of every length, nesting and curriculum."""
    return [
        sample
        for length in range(1, MOST_LENGTH + 1)
        for nesting in range(1, MOST_NESTING + 1)
        for curriculum in CURRICULA
        for sample in generate(6, length, nesting, curriculum, level=(length, nesting), seed=7)
    ]


def test_python_prints_the_targets(everything: list[Program]) -> None:
    source = json.dumps([sample.program for sample in everything])
    printed = subprocess.run([sys.executable, "-c", RUN], input=source, capture_output=True, text=True, check=True)
    assert json.loads(printed.stdout) == [sample.target.replace(".", "\n") for sample in everything]
    assert len(everything) == 3600


def test_the_vocabularies_are_what_occurs(everything: list[Program]) -> None:
    assert {*"".join(sample.program for sample in everything)} == {*PROGRAM_SYMBOLS}
    assert {*"".join(sample.target for sample in everything)} == {*TARGET_SYMBOLS}
    for vocabulary in (PROGRAM_SYMBOLS, TARGET_SYMBOLS):
        assert len({*vocabulary}) == len(vocabulary)
        assert vocabulary.isascii()


@QUICK
@given(text=st.text(PROGRAM_SYMBOLS))
def test_encoding_and_decoding(text: str) -> None:
    codes = encode(text, PROGRAM_SYMBOLS)
    assert codes.dtype == np.uint8
    assert codes.tolist() == [PROGRAM_SYMBOLS.index(character) for character in text]
    assert decode(codes, PROGRAM_SYMBOLS) == text


@QUICK
@given(
    before=st.text(PROGRAM_SYMBOLS), wrong=st.characters().filter(lambda c: c not in PROGRAM_SYMBOLS), after=st.text()
)
def test_an_unknown_character_is_named_with_its_place(before: str, wrong: str, after: str) -> None:
    with pytest.raises(UserError) as error:
        encode(before + wrong + after, PROGRAM_SYMBOLS)
    lines = before.split("\n")
    assert str(error.value).startswith(
        f"character {wrong!r} in line {len(lines)}, column {len(lines[-1]) + 1} is unknown"
    )
    assert "\n" not in str(error.value)
