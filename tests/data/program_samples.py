"""Programs for tests: recipes of every kind, the programs they give, and a small table of them on disk."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gfrnn.config import MOST_LENGTH, MOST_NESTING
from gfrnn.data import programs
from gfrnn.data.program_dataset import load_programs
from gfrnn.data.programs import CURRICULA, SPLITS, Program, ProgramTable, Recipe, ladder

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


def generate(count: int, length: int, nesting: int, curriculum: str = "baseline", **recipe: object) -> list[Program]:
    """The first so many."""
    arguments = {"length": length, "nesting": nesting, "curriculum": curriculum, **recipe}
    return list(programs.generate_programs(count, **arguments))  # type: ignore[arg-type]


def constants(tree: ast.AST) -> list[int]:
    """Every number written in it."""
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]  # type: ignore[misc]


def even(counts: Counter[object] | Sequence[int], kinds: int) -> None:
    """So many kinds occur, each about equally often: within 5 standard deviations."""
    values = list(counts.values()) if isinstance(counts, Counter) else list(counts)
    assert len(values) == kinds, counts
    total, share = sum(values), 1 / kinds
    assert total * share > 50, "too few to tell"
    assert max(abs(value - total * share) for value in values) < 5 * (total * share * (1 - share)) ** 0.5, counts


# A table of programs that several processes are worth: it is made in four pieces.
SETTINGS = {"split": "train", "nesting": 4, "length": 5, "num_programs": 3500, "curriculum": "mix", "seed": 3}


def expected(**changes: object) -> list[Program]:
    """The rows of a table with these settings, from the generator alone."""
    chosen = {**SETTINGS, **changes}
    return generate(chosen.pop("num_programs"), **chosen)  # type: ignore[arg-type]


def load(data_dir: Path, **changes: object) -> ProgramTable:
    return load_programs(data_dir, **{**SETTINGS, **changes})  # type: ignore[arg-type]


def rows_of(table: ProgramTable) -> list[Program]:
    return [Program(table.program(i), table.target(i)) for i in range(len(table))]


def folders_of(data_dir: Path) -> list[Path]:
    """Of the tables that are kept there."""
    return [path for path in (data_dir / "arrow").iterdir() if path.is_dir()]
