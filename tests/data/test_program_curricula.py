"""What each curriculum composes, its ladder of levels, and splits that share no program."""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from program_samples import QUICK, constants, even, generate, recipes

from gfrnn.data import programs
from gfrnn.data.programs import CURRICULA, SPLITS, Program, Recipe, ladder, split_of


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """(length, nesting, mixed) of every program that is composed."""
    calls = []
    compose = programs._compose

    def spy(draws: programs._Draws, length: int, nesting: int, mixed: bool) -> Program:
        calls.append((length, nesting, mixed))
        return compose(draws, length, nesting, mixed)

    monkeypatch.setattr(programs, "_compose", spy)
    return calls


def test_curricula_compose_what_they_say(composed: list[tuple[int, int, bool]]) -> None:
    generate(50, 6, 4, "baseline", level=(2, 3))
    generate(50, 6, 4, "naive", level=(2, 3))
    generate(50, 6, 4, "naive")
    assert Counter(composed) == {(6, 4, False): 50, (2, 3, False): 50, (1, 1, False): 50}
    composed.clear()
    generate(4000, 6, 4, "mix")
    assert {(length, mixed) for length, _, mixed in composed} == {(6, True)}
    even(Counter(nesting for _, nesting, _ in composed), 4)
    composed.clear()
    generate(8000, 6, 4, "blend", level=(2, 3))
    mixed = [call for call in composed if call[2]]
    assert abs(len(mixed) - 8000 / 5) < 5 * (8000 * 0.2 * 0.8) ** 0.5
    assert {call for call in composed if not call[2]} == {(2, 3, False)}
    assert {length for length, _, _ in mixed} == {6}
    even(Counter(nesting for _, nesting, _ in mixed), 4)


def test_mix_draws_digits_anew_within_a_program() -> None:
    """Of literals up to 10^10 a tenth has each number of digits, nearly; in a program they differ."""
    literals = [
        [len(str(value)) for value in constants(ast.parse(sample.program)) if value > 40]
        for sample in generate(5000, 10, 5, "mix")
    ]
    several = [digits for digits in literals if len(digits) >= 4]
    assert len(several) > 1000
    assert sum(len(set(digits)) > 1 for digits in several) > 0.98 * len(several)
    share = np.bincount([n for digits in literals for n in digits], minlength=11)[3:11] / sum(map(len, literals))
    assert (abs(share - share.mean()) < 0.03).all(), share
    of_baseline = [len(str(value)) for text, _ in generate(500, 10, 5) for value in constants(ast.parse(text))]
    assert np.mean([n >= 9 for n in of_baseline if n > 2]) > 0.97
    bounds = [
        constants(ast.parse(text.split("\n")[1]))[0] for text, _ in generate(30_000, 10, 1, "mix") if "for" in text
    ]
    share_of_small = np.mean([k <= 4 for k in bounds])  # the mean of 4 / (4 d) over d = 1..10
    assert abs(share_of_small - np.mean(1 / np.arange(1, 11))) < 0.04


def test_the_ladder_has_every_level_once_easiest_first() -> None:
    assert ladder(3, 2) == [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)]
    assert ladder(1, 1) == [(1, 1)]


def test_splits_are_disjoint_whatever_the_recipes() -> None:
    """Small programs, of which all splits would otherwise have the same."""
    seen: dict[str, set[Program]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in range(3):
            for curriculum in CURRICULA:
                seen[split].update(generate(500, 2, 1, curriculum, seed=seed, split=split))
        assert {split_of(sample) for sample in seen[split]} == {split}
        assert len(seen[split]) > 1000
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    everyone = generate(6000, 2, 1)
    even(Counter(split_of(sample) for sample in set(generate(6000, 6, 3))), 3)
    assert {split_of(sample) for sample in everyone} == set(SPLITS)


def test_programs_are_those_of_the_first_version() -> None:
    """Fails when the generator changes: then GENERATOR_VERSION must change with it."""
    assert programs.GENERATOR_VERSION == "1.0.0"
    assert generate(2, 6, 3, "mix", seed=1, split="train", start=1) == [
        Program("c=512213\nfor x in range(2):c-=88575\nprint(c)", "335063."),
        Program("f=39345\nprint((f+889))", "40234."),
    ]
    assert generate(1, 6, 3, "mix", split="train", start=1) == [
        Program("e=878\nprint((e-(2268 if 362<669903 else 3545)))", "-1390.")
    ]
    assert generate(1, 15, 10, "blend", level=(15, 10), seed=2**80, start=10**15, split="test") == [
        Program(
            "i=121699391023865\nfor x in range(44):i+=(35*(41*743245678642273))\na=i\n"
            "j=437327040138836\nfor x in range(46):j+=(a+759969706781621)\n"
            "print((791129841618377 if 575521609696927<675223481694902 else "
            "(359489863550490+((808757068313484 if 745860103926383<j else 76887805122166)*8))))",
            "791129841618377.",
        )
    ]
    digest = hashlib.md5("\n".join(p + t for c in CURRICULA for p, t in generate(50, 9, 5, c, level=(3, 2))).encode())
    assert digest.hexdigest() == "93a8fba6bde9f44463ae6da86bcd56f2"


@QUICK
@given(recipe=recipes(), other=recipes())
def test_a_key_names_the_programs(recipe: Recipe, other: Recipe) -> None:
    assert (recipe.key == other.key) == (list(recipe.programs(0, 8)) == list(other.programs(0, 8)))
    assert replace(recipe, seed=recipe.seed + 1).key != recipe.key
    assert "/" not in recipe.key
