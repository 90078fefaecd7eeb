"""Programs against the interpreter, the grammar and the dice; their table against processes that are killed."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gfrnn.config import MOST_LENGTH, MOST_NESTING, PROGRAM_SYMBOLS, TARGET_SYMBOLS, UserError
from gfrnn.data import programs
from gfrnn.data.programs import CURRICULA, SPLITS, Program, ProgramTable, Recipe, decode, encode, ladder, split_of

QUICK = hypothesis_settings(max_examples=100, deadline=None)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    length, nesting = draw(st.integers(1, MOST_LENGTH)), draw(st.integers(1, MOST_NESTING))
    return Recipe(
        length,
        nesting,
        draw(st.sampled_from(CURRICULA)),
        draw(st.none() | st.sampled_from(ladder(length, nesting))),
        draw(st.integers(0, 2**70)),
        draw(st.none() | st.sampled_from(SPLITS)),
    )


def _generate(count: int, length: int, nesting: int, curriculum: str = "baseline", **recipe: object) -> list[Program]:
    arguments = {"length": length, "nesting": nesting, "curriculum": curriculum, **recipe}
    return list(programs.generate_programs(count, **arguments))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ the interpreter

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
        for sample in _generate(6, length, nesting, curriculum, level=(length, nesting), seed=7)
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


# ----------------------------------------------------------------------------------------------- the grammar


SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Lt: "<", ast.Gt: ">"}


def _constants(tree: ast.AST) -> list[int]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]  # type: ignore[misc]


def _written(node: ast.AST) -> str:
    """The one way to write it, of all that Python allows; fails for what no program has."""
    match node:
        case ast.Module(body=lines):
            return "\n".join(map(_written, lines))
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return f"{name}={_written(value)}"
        case ast.For(
            target=ast.Name(id="x"),
            iter=ast.Call(func=ast.Name(id="range"), args=[ast.Constant(value=k)]),
            body=[ast.AugAssign(target=ast.Name(id=name), op=ast.Add() | ast.Sub() as op, value=value)],
        ):
            return f"for x in range({k}):{name}{SIGNS[type(op)]}={_written(value)}"
        case ast.Expr(value=ast.Call(func=ast.Name(id="print"), args=[value])):
            return f"print({_written(value)})"
        case ast.BinOp(left=left, op=op, right=right):
            return f"({_written(left)}{SIGNS[type(op)]}{_written(right)})"
        case ast.IfExp(test=ast.Compare(left=left, ops=[op], comparators=[right]), body=one, orelse=other):
            return f"({_written(one)} if {_written(left)}{SIGNS[type(op)]}{_written(right)} else {_written(other)})"
        case ast.Name(id=name):
            return name
        case ast.Constant(value=int(value)):
            return str(value)
    raise AssertionError(ast.dump(node))


def _operands(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.BinOp(left=left, right=right):
            return [left, right]
        case ast.IfExp(test=ast.Compare(left=left, comparators=[right]), body=one, orelse=other):
            return [one, left, right, other]
        case ast.Assign(value=value) | ast.AugAssign(value=value):
            return [value]
    return []


@QUICK
@given(recipe=recipes(), start=st.integers(0, 10**12))
def test_programs_keep_to_the_grammar(recipe: Recipe, start: int) -> None:
    length, nesting = recipe.length, recipe.nesting
    if recipe.curriculum == "naive":
        length, nesting = recipe.level or (1, 1)
    for text, _ in recipe.programs(start, start + 3):
        tree = ast.parse(text)
        assert _written(tree) == text
        nodes = list(ast.walk(tree))
        assert isinstance(tree.body[-1], ast.Expr)
        assert not any(isinstance(line, ast.Expr) for line in tree.body[:-1])

        operations = sum(isinstance(node, ast.BinOp | ast.IfExp | ast.For) for node in nodes)
        assert operations <= nesting  # an equality leaves no trace
        stored = [line.targets[0].id for line in tree.body if isinstance(line, ast.Assign)]  # type: ignore[attr-defined]
        assert len(set(stored)) == len(stored) <= operations
        assert set(stored) <= set("abcdefghij")
        for before, line in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(line, ast.For):  # it adds to the variable of the line above
                assert _written(line).split(":")[1][0] == _written(before)[0]
                assert isinstance(before, ast.Assign)

        # A chain: of an operation's operands one at most is not fresh, and every result is used once.
        fresh_names = re.findall(r"^(.)=\d+$", text, re.MULTILINE)
        for node in nodes:
            earlier = [part for part in _operands(node) if not isinstance(part, ast.Constant)]
            assert sum(not (isinstance(part, ast.Name) and part.id in fresh_names) for part in earlier) <= 1
        read = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        assert sorted(read) == sorted([*stored, "print", *["range"] * text.count("range")])

        for node in nodes:
            if isinstance(node, ast.For):
                assert all(1 <= k <= 4 * length for k in _constants(node.iter))
            fresh = [part.value for part in _operands(node) if isinstance(part, ast.Constant)]
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                fresh.remove(min(fresh))  # type: ignore[type-var]
                assert min(_constants(node)) <= 4 * length
            assert all(1 <= value <= 10**length for value in fresh)  # type: ignore[operator]


@QUICK
@given(recipe=recipes(), start=st.integers(0, 50), counts=st.lists(st.integers(0, 5), max_size=4))
def test_any_range_is_a_part_of_the_whole(recipe: Recipe, start: int, counts: list[int]) -> None:
    whole = list(recipe.programs(start, start + sum(counts)))
    parts = []
    for count in counts:
        fields = ("length", "nesting", "curriculum", "level", "seed", "split")
        chosen = {name: getattr(recipe, name) for name in fields}
        parts += programs.generate_programs(count, start=start + len(parts), **chosen)
    assert parts == whole


@QUICK
@given(recipe=recipes())
def test_there_is_randomness_for_every_choice(recipe: Recipe) -> None:
    """The largest that every choice may use still leaves 128 bits, so that the last one is as uniform as the first."""
    size = 8 * programs._random_bytes(recipe.length, recipe.nesting)
    rest = 2**size - 1
    for n in [recipe.nesting, 5] + [6, 2, 4, 10] * recipe.nesting:
        rest //= n
    for n in [recipe.length, 10**recipe.length] * (4 * recipe.nesting):
        rest //= n
    assert rest.bit_length() >= 128
    draws = programs._Draws(2**size - 1)
    programs._compose(draws, recipe.length, recipe.nesting, mixed=True)
    assert draws.rest.bit_length() >= 128


# -------------------------------------------------------------------------------------------------- the dice


def _even(counts: Counter[object] | Sequence[int], kinds: int) -> None:
    """So many kinds occur, each about equally often: within 5 standard deviations."""
    values = list(counts.values()) if isinstance(counts, Counter) else list(counts)
    assert len(values) == kinds, counts
    total, share = sum(values), 1 / kinds
    assert total * share > 50, "too few to tell"
    assert max(abs(value - total * share) for value in values) < 5 * (total * share * (1 - share)) ** 0.5, counts


def _operation(program: str) -> str:
    """Which operation a program of one is, and which side its coin fell."""
    tree = ast.parse(program)
    if len(tree.body) == 3:
        return "loop-" if "-=" in program else "loop+"
    (value,) = tree.body[-1].value.args  # type: ignore[attr-defined]
    if isinstance(value, ast.Constant):
        return "equality"
    if isinstance(value, ast.IfExp):
        return "if>" if ">" in program else "if<"
    if isinstance(value.op, ast.Mult):
        return "multiplication"
    return ("variable" if len(tree.body) == 2 else "pair") + ("-" if isinstance(value.op, ast.Sub) else "+")


def test_six_operations_and_their_coins_are_fair() -> None:
    found = Counter(_operation(sample.program) for sample in _generate(12_000, 4, 1))
    kinds: Counter[object] = Counter()
    for name, times in found.items():
        kinds[name.rstrip("+-<>")] += times
    _even(kinds, 6)
    for kind, (one, other) in {"pair": "+-", "variable": "+-", "loop": "+-", "if": "<>"}.items():
        _even([found[kind + one], found[kind + other]], 2)


def test_literals_and_small_numbers_are_uniform_with_both_ends() -> None:
    ones = [sample.program for sample in _generate(15_000, 1, 1)]
    equalities = Counter(int(text[6:-1]) for text in ones if text[6:-1].isdigit())
    assert set(equalities) == set(range(1, 11))  # never 0; and 10 is 10^1
    _even(equalities, 10)
    _even(Counter(_constants(ast.parse(text.split("\n")[1]))[0] for text in ones if "for" in text), 4)
    long = [text for text, _ in _generate(60_000, 15, 1) if "*" in text]  # an operand below 61 has odds of 10^-13
    factors = [[int(factor) for factor in text[7:-2].split("*")] for text in long]
    _even(Counter(min(pair) for pair in factors), 60)
    _even(Counter(pair[0] < pair[1] for pair in factors), 2)  # a*k or k*a
    high = [value for pair in factors for value in pair if value > 60]
    _even(Counter(10 * (value - 1) // 10**15 for value in high), 10)


def test_the_previous_result_lands_in_every_slot() -> None:
    """A product is told from all fresh operands, and it is used once."""
    conditional: Counter[object] = Counter()
    pair: Counter[object] = Counter()
    loop: Counter[object] = Counter()
    for sample in _generate(60_000, 6, 2):
        if sample.program.count("*") != 1:
            continue
        tree = ast.parse(sample.program)
        (value,) = tree.body[-1].value.args  # type: ignore[attr-defined]
        slots: Iterable[ast.AST]
        if isinstance(value, ast.IfExp) and isinstance(value.test, ast.Compare):
            slots, counter = (value.body, value.test.left, *value.test.comparators, value.orelse), conditional
        elif isinstance(value, ast.BinOp) and len(tree.body) == 1 and not isinstance(value.op, ast.Mult):
            slots, counter = (value.left, value.right), pair
        elif len(tree.body) == 3 and isinstance(tree.body[1], ast.For):
            slots, counter = tree.body[:2], loop
        else:
            continue
        (place,) = [i for i, slot in enumerate(slots) if "*" in ast.unparse(slot)] or [None]
        if place is not None:  # else it is the product that came last
            counter[place] += 1
    _even(conditional, 4)
    _even(pair, 2)
    _even(loop, 2)


def test_names_come_in_random_order() -> None:
    names = [re.findall("^(.)=", text, re.MULTILINE) for text, _ in _generate(16_000, 1, 4)]
    _even(Counter(taken[0] for taken in names if taken), 10)
    _even(Counter(tuple(taken[:2]) for taken in names if len(taken) > 1), 90)


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
    _generate(50, 6, 4, "baseline", level=(2, 3))
    _generate(50, 6, 4, "naive", level=(2, 3))
    _generate(50, 6, 4, "naive")
    assert Counter(composed) == {(6, 4, False): 50, (2, 3, False): 50, (1, 1, False): 50}
    composed.clear()
    _generate(4000, 6, 4, "mix")
    assert {(length, mixed) for length, _, mixed in composed} == {(6, True)}
    _even(Counter(nesting for _, nesting, _ in composed), 4)
    composed.clear()
    _generate(8000, 6, 4, "blend", level=(2, 3))
    mixed = [call for call in composed if call[2]]
    assert abs(len(mixed) - 8000 / 5) < 5 * (8000 * 0.2 * 0.8) ** 0.5
    assert {call for call in composed if not call[2]} == {(2, 3, False)}
    assert {length for length, _, _ in mixed} == {6}
    _even(Counter(nesting for _, nesting, _ in mixed), 4)


def test_mix_draws_digits_anew_within_a_program() -> None:
    """Of literals up to 10^10 a tenth has each number of digits, nearly; in a program they differ."""
    literals = [
        [len(str(value)) for value in _constants(ast.parse(sample.program)) if value > 40]
        for sample in _generate(5000, 10, 5, "mix")
    ]
    several = [digits for digits in literals if len(digits) >= 4]
    assert len(several) > 1000
    assert sum(len(set(digits)) > 1 for digits in several) > 0.98 * len(several)
    share = np.bincount([n for digits in literals for n in digits], minlength=11)[3:11] / sum(map(len, literals))
    assert (abs(share - share.mean()) < 0.03).all(), share
    of_baseline = [len(str(value)) for text, _ in _generate(500, 10, 5) for value in _constants(ast.parse(text))]
    assert np.mean([n >= 9 for n in of_baseline if n > 2]) > 0.97
    bounds = [
        _constants(ast.parse(text.split("\n")[1]))[0] for text, _ in _generate(30_000, 10, 1, "mix") if "for" in text
    ]
    share_of_small = np.mean([k <= 4 for k in bounds])  # the mean of 4 / (4 d) over d = 1..10
    assert abs(share_of_small - np.mean(1 / np.arange(1, 11))) < 0.04


def test_the_ladder_has_every_level_once_easiest_first() -> None:
    assert ladder(3, 2) == [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)]
    assert ladder(1, 1) == [(1, 1)]


# --------------------------------------------------------------------------------------------------- splits


def test_splits_are_disjoint_whatever_the_recipes() -> None:
    """Small programs, of which all splits would otherwise have the same."""
    seen: dict[str, set[Program]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in range(3):
            for curriculum in CURRICULA:
                seen[split].update(_generate(500, 2, 1, curriculum, seed=seed, split=split))
        assert {split_of(sample) for sample in seen[split]} == {split}
        assert len(seen[split]) > 1000
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    everyone = _generate(6000, 2, 1)
    _even(Counter(split_of(sample) for sample in set(_generate(6000, 6, 3))), 3)
    assert {split_of(sample) for sample in everyone} == set(SPLITS)


def test_programs_are_those_of_the_first_version() -> None:
    """Fails when the generator changes: then GENERATOR_VERSION must change with it."""
    assert programs.GENERATOR_VERSION == "1.0.0"
    assert _generate(2, 6, 3, "mix", seed=1, split="train", start=1) == [
        Program("c=512213\nfor x in range(2):c-=88575\nprint(c)", "335063."),
        Program("f=39345\nprint((f+889))", "40234."),
    ]
    assert _generate(1, 6, 3, "mix", split="train", start=1) == [
        Program("e=878\nprint((e-(2268 if 362<669903 else 3545)))", "-1390.")
    ]
    assert _generate(1, 15, 10, "blend", level=(15, 10), seed=2**80, start=10**15, split="test") == [
        Program(
            "i=121699391023865\nfor x in range(44):i+=(35*(41*743245678642273))\na=i\n"
            "j=437327040138836\nfor x in range(46):j+=(a+759969706781621)\n"
            "print((791129841618377 if 575521609696927<675223481694902 else "
            "(359489863550490+((808757068313484 if 745860103926383<j else 76887805122166)*8))))",
            "791129841618377.",
        )
    ]
    digest = hashlib.md5("\n".join(p + t for c in CURRICULA for p, t in _generate(50, 9, 5, c, level=(3, 2))).encode())
    assert digest.hexdigest() == "93a8fba6bde9f44463ae6da86bcd56f2"


@QUICK
@given(recipe=recipes(), other=recipes())
def test_a_key_names_the_programs(recipe: Recipe, other: Recipe) -> None:
    assert (recipe.key == other.key) == (list(recipe.programs(0, 8)) == list(other.programs(0, 8)))
    assert replace(recipe, seed=recipe.seed + 1).key != recipe.key
    assert "/" not in recipe.key


# ---------------------------------------------------------------------------------------------------- errors


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
    from gfrnn.data.program_dataset import load_programs

    recipe = {"length": 3, "nesting": 2, "curriculum": "mix", "split": "train", **changes}
    with pytest.raises(UserError) as error:
        programs.generate_programs(1, **recipe)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)
    with pytest.raises(UserError) as again:
        load_programs(tmp_path, num_programs=10, **recipe)  # type: ignore[arg-type]
    assert str(again.value) == str(error.value)
    assert "\n" not in str(error.value)
    assert not os.listdir(tmp_path)


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


# ------------------------------------------------------------------------------------------------- the table

SETTINGS = {"split": "train", "nesting": 4, "length": 5, "num_programs": 3500, "curriculum": "mix", "seed": 3}


def _expected(**changes: object) -> list[Program]:
    chosen = {**SETTINGS, **changes}
    return _generate(chosen.pop("num_programs"), **chosen)  # type: ignore[arg-type]


def _load(data_dir: Path, **changes: object) -> ProgramTable:
    from gfrnn.data.program_dataset import load_programs

    return load_programs(data_dir, **{**SETTINGS, **changes})  # type: ignore[arg-type]


def _rows(table: ProgramTable) -> list[Program]:
    return [Program(table.program(i), table.target(i)) for i in range(len(table))]


def _folders(data_dir: Path) -> list[Path]:
    return [path for path in (data_dir / "arrow").iterdir() if path.is_dir()]


@pytest.mark.parametrize("num_proc", [1, 2, 3, 9])
def test_rows_do_not_depend_on_the_number_of_processes(num_proc: int, tmp_path: Path) -> None:
    table = _load(tmp_path, num_proc=num_proc)
    (folder,) = _folders(tmp_path)
    assert len(list(folder.glob("*.arrow"))) == min(num_proc, 4)  # really so many; there is work for 4
    assert _rows(table) == _expected()
    assert table.source_lengths.tolist() == [len(sample.program) for sample in _expected()]
    assert table.target_lengths.tolist() == [len(sample.target) for sample in _expected()]
    for codes in (table.sources, table.targets):
        assert codes.dtype == np.uint8
    for offsets in (table.source_offsets, table.target_offsets, table.source_lengths, table.target_lengths):
        assert offsets.dtype == np.int64
    assert len(table) + 1 == len(table.source_offsets) == len(table.target_offsets)


def test_the_builder_is_one_of_datasets(tmp_path: Path) -> None:
    import datasets

    from gfrnn.data import program_dataset
    from gfrnn.data.program_dataset import Programs

    for num_proc in (1, 2):
        builder = Programs(cache_dir=str(tmp_path / str(num_proc)), **SETTINGS)
        builder.download_and_prepare(num_proc=num_proc)
        rows = builder.as_dataset(split="train")
        assert rows.features == datasets.Features(dict.fromkeys(Program._fields, datasets.Value("string")))
        assert [Program(**row) for row in rows] == _expected()
        assert builder.info.splits["train"].num_examples == 3500
    assert program_dataset.os is os  # and not one that datasets has made for builders that read remote files
    other = Programs(cache_dir=str(tmp_path), **{**SETTINGS, "seed": 4})
    assert other.cache_dir != Programs(cache_dir=str(tmp_path), **SETTINGS).cache_dir


def test_what_is_made_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gfrnn.data import program_dataset

    first = _rows(_load(tmp_path))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(program_dataset, "_build", None)
    assert _rows(_load(tmp_path)) == first
    assert _rows(_load(tmp_path, level=(1, 1), num_proc=2)) == first  # mix has no level
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
        assert _rows(_load(tmp_path, **{**few, **change})) == _expected(**{**few, **change})
    assert len(_folders(tmp_path)) == len(changes)


def test_small_tables_are_made_by_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from gfrnn.data import program_dataset

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [program_dataset._processes(n) for n in (1, 39_999, 40_000, 400_000)] == [1, 1, 2, 8]


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "missing", "none", "fewer", "characters", "offsets"])
def test_a_damaged_folder(tmp_path: Path, damage: str) -> None:
    _load(tmp_path, num_proc=2)
    (folder,) = _folders(tmp_path)
    first, second = sorted(folder.glob("*.arrow"))
    content = second.read_bytes()
    if damage == "missing":
        second.unlink()
    elif damage == "none":
        for path in list(folder.iterdir()):
            path.unlink()
    elif damage == "fewer":
        _load(tmp_path / "other", num_programs=100)
        (arrow,) = (tmp_path / "other").rglob("*.arrow")
        second.write_bytes(arrow.read_bytes())
    elif damage == "characters":
        first.write_bytes(first.read_bytes().replace(b"print(", b"Print("))
    elif damage == "offsets":  # the first program reaches to the end of the second
        lengths = [len(sample.program) for sample in _expected()[:3]]
        bounds = np.cumsum([0, *lengths]).astype(np.int32)
        assert bounds.tobytes() in first.read_bytes()
        wrong = bounds[[0, 2, 1, 3]]
        first.write_bytes(first.read_bytes().replace(bounds.tobytes(), wrong.tobytes()))
    else:
        second.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\xff" * 1000}[damage])
    with pytest.raises(UserError) as error:
        _load(tmp_path)
    assert str(error.value) == f"{folder} is damaged; delete it, and it is made again"


@pytest.mark.parametrize(("folder", "reason"), [("file/below", "Not a directory"), ("/proc/kept", "No such file")])
def test_an_unwritable_data_dir_is_one_line(folder: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError) as error:
        _load(tmp_path / folder)
    assert str(error.value).startswith(f"cannot keep programs in {tmp_path / folder}: {reason}")
    assert str(error.value).endswith("make room there or give another folder, --data-dir")


def test_no_programs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the number of train programs is 0; it must be greater than 0"):
        _load(tmp_path, num_programs=0)


def test_importing_the_generator_is_cheap() -> None:
    code = "import sys, gfrnn.data.programs; print({'torch', 'datasets', 'pyarrow', 'multiprocess'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


# ------------------------------------------------------------------------------------------------- processes

CHILD = """
import hashlib, json, logging, os, select, signal, sys, time
from pathlib import Path
from gfrnn.config import UserError
from gfrnn.data import program_dataset, programs

data_dir, settings, event, ending, linger = sys.argv[1:]
logging.basicConfig(level=logging.INFO)
this = os.getpid()

def die(now, arguments):
    if now == event and str(arguments[0]).endswith(ending):
        os.kill(this, signal.SIGKILL)

if event:
    sys.addaudithook(die)
if linger:  # so long before every range
    make = programs.Recipe.programs
    programs.Recipe.programs = lambda *arguments: time.sleep(float(linger)) or make(*arguments)

read_end, write_end = os.pipe()  # as a training does: it ends when it is told of a signal
os.set_blocking(write_end, False)
signal.set_wakeup_fd(write_end)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: None)
try:
    table = program_dataset.load_programs(Path(data_dir), **json.loads(settings))
except UserError as error:
    sys.exit(print(error, file=sys.stderr) or 2)
assert not select.select([read_end], [], [], 0)[0], "a signal that was another process'"
print(hashlib.md5(table.sources.tobytes() + table.targets.tobytes()).hexdigest())
"""


def _child(
    data_dir: Path, die_at: tuple[str, str] = ("", ""), linger: str = "", limit: int | None = None, **changes: object
) -> subprocess.Popen[str]:
    """A process that loads programs; with die_at it is killed, as by kill -9, just before it does that."""
    command = [sys.executable, "-c", CHILD, str(data_dir), json.dumps({**SETTINGS, **changes}), *die_at, linger]
    before = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before)


def _digest(rows: list[Program]) -> str:
    sources, targets = ("".join(texts) for texts in zip(*rows, strict=True))
    codes = encode(sources, PROGRAM_SYMBOLS).tobytes() + encode(targets, TARGET_SYMBOLS).tobytes()
    return hashlib.md5(codes).hexdigest() + "\n"


def _alive(data_dir: Path) -> list[psutil.Process]:
    """Processes that work in a data folder: children have their parent's command line."""
    return [
        p
        for p in psutil.process_iter(["cmdline", "status"])
        if str(data_dir) in (p.info["cmdline"] or []) and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder whose processes do not outlive a test that fails."""
    yield tmp_path
    for process in _alive(tmp_path):
        process.kill()


def _when_at_work(data_dir: Path, processes: int) -> None:
    """Returns when so many processes make programs."""
    deadline = time.monotonic() + 60
    while len(list(data_dir.rglob("*.arrow"))) < processes:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _nothing_left(data_dir: Path) -> None:
    assert not list((data_dir / "arrow").glob("*.building"))
    assert len(_folders(data_dir)) == 1


def test_of_several_processes_one_works_and_the_others_wait(data_dir: Path) -> None:
    children = [_child(data_dir, num_proc=2, linger="0.3") for _ in range(3)]
    results = [child.communicate(timeout=60) for child in children]
    assert [out for out, _ in results] == [_digest(_expected())] * 3, results
    assert sum(":making " in err for _, err in results) == 1
    _nothing_left(data_dir)


def test_a_builder_that_is_killed_takes_its_processes_with_it(data_dir: Path) -> None:
    child = _child(data_dir, num_proc=2, linger="60")
    _when_at_work(data_dir, 2)
    assert len(_alive(data_dir)) >= 3  # itself, and two that make programs
    waiting = _child(data_dir, num_proc=2)
    assert waiting.stderr
    assert "another process prepares" in waiting.stderr.readline()
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=30)
    out, error = waiting.communicate(timeout=60)
    assert out == _digest(_expected()), error
    assert not _alive(data_dir)
    _nothing_left(data_dir)


def test_signals_to_its_processes_are_not_the_builder_s(data_dir: Path) -> None:
    child = _child(data_dir, num_proc=2, linger="0.7")
    _when_at_work(data_dir, 2)
    for process in psutil.Process(child.pid).children():
        process.send_signal(signal.SIGINT)  # as Ctrl-C to all of them
        process.send_signal(signal.SIGUSR1)
    out, error = child.communicate(timeout=60)
    assert out == _digest(_expected()), error


def test_a_builder_that_loses_a_process_ends_the_others_at_once(data_dir: Path) -> None:
    child = _child(data_dir, num_proc=2, linger="60")
    _when_at_work(data_dir, 2)
    psutil.Process(child.pid).children()[0].kill()
    _, error = child.communicate(timeout=30)
    assert child.returncode == 1
    assert "One of the subprocesses has abruptly died" in error
    assert not _alive(data_dir)
    assert not _folders(data_dir)


@pytest.mark.parametrize(
    "die_at",
    [
        ("open", "-00000-00000-of-NNNNN.arrow"),
        ("open", "dataset_info.json"),
        ("shutil.move", ".incomplete"),
        ("os.rename", "/programs"),  # all made, not yet in its place
    ],
)
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_builder_killed_at_any_moment_leaves_nothing_to_trust_or_wait_for(
    die_at: tuple[str, str], num_proc: int, data_dir: Path
) -> None:
    child = _child(data_dir, die_at, num_proc=num_proc)
    _, error = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, error
    assert _rows(_load(data_dir)) == _expected()
    assert not _alive(data_dir)
    _nothing_left(data_dir)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(num_proc: int, data_dir: Path) -> None:
    """The kernel refuses to write on, at a file size here, which needs no root; the path is that of a full disk."""
    child = _child(data_dir, num_proc=num_proc, limit=20_000)
    _, error = child.communicate(timeout=60)
    assert f"cannot keep programs in {data_dir}: File too large; make room there or give another folder" in error
    assert "Traceback" not in error
    assert child.returncode == 2
    assert not _folders(data_dir)
    assert _rows(_load(data_dir)) == _expected()
