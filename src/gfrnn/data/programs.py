"""Short Python programs and what they print: a corpus without end, made by composition.

Source: W. Zaremba and I. Sutskever, "Learning to Execute", 2014, arXiv 1410.4615: its six operations, two knobs and
four curricula. Two things differ: lines are joined by newlines, so that a program is Python 3, and values are exact.

- Length is the number of digits of fresh operands, nesting the number of operations that are composed. A program is a
  chain: each operation takes the previous result as one of its operands and draws the others, uniform on 1..10^length.
- Sample number i is a function of i and of its recipe (seed, split, curriculum, difficulty) alone: all its choices are
  the digits of one large number, a hash of these. So any process on any machine can make any range of samples.
- A program belongs to the split that its own text hashes to, so no program is in two splits, whatever the recipes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from gfrnn.config import (
    LADDERS,
    MOST_LENGTH,
    PROGRAM_SYMBOLS,
    TARGET_SYMBOLS,
    Curriculum,
    UserError,
    check_difficulty,
)
from gfrnn.data.corpus import Bytes

Split = Literal["train", "valid", "test"]
CURRICULA: tuple[Curriculum, ...] = get_args(Curriculum)
SPLITS: tuple[Split, ...] = get_args(Split)

GENERATOR_VERSION = "1.0.0"
"""Changes whenever the same recipe would give other programs: part of every sample's hash and of every cache's name."""

_NAMES = "abcdefghij"  # as many as MOST_NESTING; not x, which is the loops' own


class Program(NamedTuple):
    """One sample."""

    program: str
    """Python 3 source, lines joined by newlines, none at the end. The last line is print(...)."""
    target: str
    """What it prints, an integer, with '.' in place of the newline."""


class Level(NamedTuple):
    """A difficulty on the ladder that `naive` and `blend` climb."""

    length: int
    nesting: int


def ladder(length: int, nesting: int) -> list[Level]:
    """The levels up to a target, easiest first: for each nesting from 1 on every length from 1 on."""
    return [Level(lower, fewer) for fewer in range(1, nesting + 1) for lower in range(1, length + 1)]


@dataclass(frozen=True)
class Recipe:
    """What sample number i depends on, i aside. Raises UserError for what cannot be made.

    length, nesting: the target difficulty. curriculum: `baseline` is always at the target; `mix` draws nesting anew for
    each program and the digits for each operand and each small number, uniform up to the target; `naive` is at `level`;
    `blend` is `mix` with probability 1/5, else at `level`. level: (length, nesting) on the target's ladder, its first
    if None; `baseline` and `mix` have no level and are the same programs at any. split: only programs that belong to
    it; None for all.
    """

    length: int
    nesting: int
    curriculum: Curriculum = "mix"
    level: tuple[int, int] | None = None
    seed: int = 0
    split: Split | None = None

    def __post_init__(self) -> None:
        check_difficulty(self.nesting, self.length)
        if self.curriculum not in CURRICULA:
            raise UserError(f"--curriculum {self.curriculum!r} is unknown; use one of {', '.join(CURRICULA)}")
        if self.split is not None and self.split not in SPLITS:
            raise UserError(f"split {self.split!r} is unknown; use one of {', '.join(SPLITS)}")
        if self.level is not None and tuple(self.level) not in ladder(self.length, self.nesting):
            raise UserError(
                f"level {tuple(self.level)} is not on the ladder of --length {self.length} --nesting {self.nesting}; "
                f"use a (length, nesting) from (1, 1) to ({self.length}, {self.nesting})"
            )

    @property
    def key(self) -> str:
        """Names the recipe; equal for recipes of the same programs."""
        length, nesting = self.level or (1, 1)
        level = f"-at-{length}x{nesting}" if self.curriculum in LADDERS else ""
        return f"{self.split or 'all'}-{self.curriculum}-{self.length}x{self.nesting}{level}-seed-{self.seed}"

    def programs(self, start: int, stop: int) -> Iterator[Program]:
        """Samples number start to stop - 1."""
        numbers = hashlib.shake_128(f"{GENERATOR_VERSION}/{self.key}/".encode())
        size = _random_bytes(self.length, self.nesting)
        for number in range(start, stop):
            for attempt in itertools.count():
                own = numbers.copy()
                own.update(b"%d/%d" % (number, attempt))
                sample = self._sample(_Draws(int.from_bytes(own.digest(size), "little")))
                if self.split is None or self.split == split_of(sample):
                    yield sample
                    break

    def _sample(self, draws: _Draws) -> Program:
        if self.curriculum == "mix" or (self.curriculum == "blend" and draws.below(5) == 0):
            return _compose(draws, self.length, 1 + draws.below(self.nesting), mixed=True)
        at_target = self.curriculum == "baseline"
        length, nesting = (self.length, self.nesting) if at_target else self.level or (1, 1)
        return _compose(draws, length, nesting, mixed=False)


def generate_programs(
    count: int,
    *,
    length: int,
    nesting: int,
    curriculum: Curriculum = "mix",
    seed: int = 0,
    split: Split | None = None,
    level: tuple[int, int] | None = None,
    start: int = 0,
) -> Iterator[Program]:
    """Samples number `start` to start + count - 1 of a recipe (see Recipe), which is checked at once."""
    return Recipe(length, nesting, curriculum, level, seed, split).programs(start, start + count)


def split_of(sample: Program) -> Split:
    """The split that a program belongs to, whatever the recipe that makes it."""
    text = "\n".join(sample).encode()
    return SPLITS[int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") % len(SPLITS)]


# ------------------------------------------------------------------------------------------------ symbols


UNKNOWN = 255
"""The place of a character that a vocabulary lacks."""


def places(characters: Bytes, vocabulary: str) -> Bytes:
    """Where in the vocabulary each character is, UNKNOWN if it is not: uint8 [characters], ASCII in."""
    table = np.full(256, UNKNOWN, np.uint8)
    table[list(vocabulary.encode())] = np.arange(len(vocabulary))
    return table[characters]


def encode(text: str, vocabulary: str) -> Bytes:
    """The place of each character in the vocabulary: uint8 [characters].

    Raises UserError naming the first character that the vocabulary lacks.
    """
    codes = places(np.frombuffer(text.encode("ascii", "replace"), np.uint8), vocabulary)  # with '?', which both lack
    unknown = codes == UNKNOWN
    if unknown.any():
        at = int(unknown.argmax())
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        raise UserError(
            f"character {text[at]!r} in line {line}, column {column} is unknown; use only these: {vocabulary!r}"
        )
    return codes


def decode(codes: Bytes, vocabulary: str) -> str:
    """The text that `encode` turned into these indices, uint8 [characters]."""
    return np.frombuffer(vocabulary.encode(), np.uint8)[codes].tobytes().decode()


@dataclass(frozen=True, eq=False)
class ProgramTable:
    """P samples, encoded, one after another: sample i is at offsets[i] .. offsets[i + 1] of the characters."""

    sources: Bytes
    """Indices into PROGRAM_SYMBOLS: uint8 [characters of all programs]."""
    source_offsets: npt.NDArray[np.int64]
    """int64 [P + 1]."""
    targets: Bytes
    """Indices into TARGET_SYMBOLS: uint8 [characters of all targets]."""
    target_offsets: npt.NDArray[np.int64]
    """int64 [P + 1]."""

    @classmethod
    def of(cls, samples: Iterable[Program]) -> ProgramTable:
        """A table of these."""
        programs, targets = zip(*samples, strict=True)

        def offsets(texts: tuple[str, ...]) -> npt.NDArray[np.int64]:
            return np.cumsum([0, *map(len, texts)])

        return cls(
            encode("".join(programs), PROGRAM_SYMBOLS),
            offsets(programs),
            encode("".join(targets), TARGET_SYMBOLS),
            offsets(targets),
        )

    def __len__(self) -> int:
        return len(self.source_offsets) - 1

    @cached_property
    def source_lengths(self) -> npt.NDArray[np.int64]:
        """Characters of each program: int64 [P]."""
        return np.diff(self.source_offsets)

    @cached_property
    def target_lengths(self) -> npt.NDArray[np.int64]:
        """Characters of each target, '.' included: int64 [P]."""
        return np.diff(self.target_offsets)

    def program(self, i: int) -> str:
        return decode(self.sources[self.source_offsets[i] : self.source_offsets[i + 1]], PROGRAM_SYMBOLS)

    def target(self, i: int) -> str:
        return decode(self.targets[self.target_offsets[i] : self.target_offsets[i + 1]], TARGET_SYMBOLS)


# ------------------------------------------------------------------------------------------- composition


class _Draws:
    """Choices as the digits of one random number, in whatever radix the next one needs.

    A choice below n is uniform to within n / (what is left of the number).
    """

    __slots__ = ("rest",)

    def __init__(self, number: int) -> None:
        self.rest = number

    def below(self, n: int) -> int:
        """Uniform on 0..n-1."""
        self.rest, digit = divmod(self.rest, n)
        return digit


def _random_bytes(length: int, nesting: int) -> int:
    """Enough for every choice of one sample, with 128 bits left at the end, so that none is biased."""
    operand = 4 * length + 4  # bits: log2(10) is less than 4, and so is that of MOST_LENGTH
    return (128 + 8 + nesting * (4 * operand + 16)) // 8


Operand = tuple[str, int]  # its text and its value


class _Draft:
    """A program while operations are appended to it. `result` is the last one's: the next one's operand."""

    def __init__(self, draws: _Draws, length: int, mixed: bool) -> None:
        self._below, self._length, self._mixed = draws.below, length, mixed
        self._names = list(_NAMES)
        self.lines: list[str] = []
        self.result: Operand | None = None

    def pair(self) -> None:
        self._combine(*self._operands(2))

    def small_multiplication(self) -> None:
        ((a, a_value),) = self._operands(1)
        k = self._small()
        self.result = f"({a}*{k})" if self._below(2) else f"({k}*{a})", a_value * k

    def equality(self) -> None:
        (self.result,) = self._operands(1)

    def variable(self) -> None:
        a, b = self._operands(2)
        self._combine(self._assign(a), b)

    def small_loop(self) -> None:
        a, (b, b_value) = self._operands(2)
        name, value = self._assign(a)
        k, sign = self._small(), self._sign()
        self.lines.append(f"for x in range({k}):{name}{sign}={b}")
        self.result = name, value + k * b_value if sign == "+" else value - k * b_value

    def conditional(self) -> None:
        (a, a_value), (b, b_value), (c, c_value), (d, d_value) = self._operands(4)
        if self._below(2):
            self.result = f"({c} if {a}>{b} else {d})", c_value if a_value > b_value else d_value
        else:
            self.result = f"({c} if {a}<{b} else {d})", c_value if a_value < b_value else d_value

    def _combine(self, first: Operand, second: Operand) -> None:
        (a, a_value), (b, b_value) = first, second
        sign = self._sign()
        self.result = f"({a}{sign}{b})", a_value + b_value if sign == "+" else a_value - b_value

    def _assign(self, operand: Operand) -> Operand:
        """Gives the operand a name of its own."""
        text, value = operand
        name = self._names.pop(self._below(len(self._names)))
        self.lines.append(f"{name}={text}")
        return name, value

    def _operands(self, count: int) -> list[Operand]:
        """The previous result and fresh ones, in random order: these are drawn alike, so only its own place counts."""
        fresh = count if self.result is None else count - 1
        values = [1 + self._below(_POWERS[self._digits()]) for _ in range(fresh)]
        operands = [(str(value), value) for value in values]
        if self.result is not None:
            operands.insert(self._below(count), self.result)
        return operands

    def _digits(self) -> int:
        return 1 + self._below(self._length) if self._mixed else self._length

    def _small(self) -> int:
        return 1 + self._below(4 * self._digits())

    def _sign(self) -> str:
        return "+-"[self._below(2)]


_POWERS = [10**digits for digits in range(MOST_LENGTH + 1)]
_OPERATIONS = (
    _Draft.pair,
    _Draft.small_multiplication,
    _Draft.equality,
    _Draft.variable,
    _Draft.small_loop,
    _Draft.conditional,
)


def _compose(draws: _Draws, length: int, nesting: int, mixed: bool) -> Program:
    """A program of `nesting` operations on operands of `length` digits; if mixed, of 1..length, anew for each."""
    draft = _Draft(draws, length, mixed)
    for _ in range(nesting):
        _OPERATIONS[draws.below(len(_OPERATIONS))](draft)
    assert draft.result is not None
    text, value = draft.result
    return Program("\n".join([*draft.lines, f"print({text})"]), f"{value}.")
