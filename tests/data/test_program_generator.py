"""The generator against its grammar and its dice: every choice is fair, any range of programs a part of the whole."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st
from program_samples import QUICK, constants, even, generate, recipes

from gfrnn.data import programs
from gfrnn.data.programs import Recipe

SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Lt: "<", ast.Gt: ">"}


def written(node: ast.AST) -> str:
    """The one way to write it, of all that Python allows; fails for what no program has."""
    match node:
        case ast.Module(body=lines):
            return "\n".join(map(written, lines))
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return f"{name}={written(value)}"
        case ast.For(
            target=ast.Name(id="x"),
            iter=ast.Call(func=ast.Name(id="range"), args=[ast.Constant(value=k)]),
            body=[ast.AugAssign(target=ast.Name(id=name), op=ast.Add() | ast.Sub() as op, value=value)],
        ):
            return f"for x in range({k}):{name}{SIGNS[type(op)]}={written(value)}"
        case ast.Expr(value=ast.Call(func=ast.Name(id="print"), args=[value])):
            return f"print({written(value)})"
        case ast.BinOp(left=left, op=op, right=right):
            return f"({written(left)}{SIGNS[type(op)]}{written(right)})"
        case ast.IfExp(test=ast.Compare(left=left, ops=[op], comparators=[right]), body=one, orelse=other):
            return f"({written(one)} if {written(left)}{SIGNS[type(op)]}{written(right)} else {written(other)})"
        case ast.Name(id=name):
            return name
        case ast.Constant(value=int(value)):
            return str(value)
    raise AssertionError(ast.dump(node))


def operands(node: ast.AST) -> list[ast.expr]:
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
        assert written(tree) == text
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
                assert written(line).split(":")[1][0] == written(before)[0]
                assert isinstance(before, ast.Assign)

        # A chain: of an operation's operands one at most is not fresh, and every result is used once.
        fresh_names = re.findall(r"^(.)=\d+$", text, re.MULTILINE)
        for node in nodes:
            earlier = [part for part in operands(node) if not isinstance(part, ast.Constant)]
            assert sum(not (isinstance(part, ast.Name) and part.id in fresh_names) for part in earlier) <= 1
        read = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        assert sorted(read) == sorted([*stored, "print", *["range"] * text.count("range")])

        for node in nodes:
            if isinstance(node, ast.For):
                assert all(1 <= k <= 4 * length for k in constants(node.iter))
            fresh = [part.value for part in operands(node) if isinstance(part, ast.Constant)]
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                fresh.remove(min(fresh))  # type: ignore[type-var]
                assert min(constants(node)) <= 4 * length
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


def operation(program: str) -> str:
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
    found = Counter(operation(sample.program) for sample in generate(12_000, 4, 1))
    kinds: Counter[object] = Counter()
    for name, times in found.items():
        kinds[name.rstrip("+-<>")] += times
    even(kinds, 6)
    for kind, (one, other) in {"pair": "+-", "variable": "+-", "loop": "+-", "if": "<>"}.items():
        even([found[kind + one], found[kind + other]], 2)


def test_literals_and_small_numbers_are_uniform_with_both_ends() -> None:
    ones = [sample.program for sample in generate(15_000, 1, 1)]
    equalities = Counter(int(text[6:-1]) for text in ones if text[6:-1].isdigit())
    assert set(equalities) == set(range(1, 11))  # never 0; and 10 is 10^1
    even(equalities, 10)
    even(Counter(constants(ast.parse(text.split("\n")[1]))[0] for text in ones if "for" in text), 4)
    long = [text for text, _ in generate(60_000, 15, 1) if "*" in text]  # an operand below 61 has odds of 10^-13
    factors = [[int(factor) for factor in text[7:-2].split("*")] for text in long]
    even(Counter(min(pair) for pair in factors), 60)
    even(Counter(pair[0] < pair[1] for pair in factors), 2)  # a*k or k*a
    high = [value for pair in factors for value in pair if value > 60]
    even(Counter(10 * (value - 1) // 10**15 for value in high), 10)


def test_the_previous_result_lands_in_every_slot() -> None:
    """A product is told from all fresh operands, and it is used once."""
    conditional: Counter[object] = Counter()
    pair: Counter[object] = Counter()
    loop: Counter[object] = Counter()
    for sample in generate(60_000, 6, 2):
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
    even(conditional, 4)
    even(pair, 2)
    even(loop, 2)


def test_names_come_in_random_order() -> None:
    names = [re.findall("^(.)=", text, re.MULTILINE) for text, _ in generate(16_000, 1, 4)]
    even(Counter(taken[0] for taken in names if taken), 10)
    even(Counter(tuple(taken[:2]) for taken in names if len(taken) > 1), 90)
