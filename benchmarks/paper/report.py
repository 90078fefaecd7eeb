"""The report: results.md, its pictures, and all figures as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from gfrnn.config import UserError
from gfrnn.runs import replace_file
from paper import figures
from paper.compare import Gain, Line, Spread, alone_by_machine, gains, levels, lines, sections, ways
from paper.plan import Budget, in_words
from paper.published import COLUMNS, TEST_BPC, UNITS, Place
from paper.rows import Row

_NO_WAY = "-: not reached, or before the first validation."


def write_report(rows: Sequence[Row], output: Path, chosen_levels: Sequence[float]) -> None:
    """Writes results.md, PNGs, rows.csv, curves.csv and gains.csv. Raises UserError if there is nothing to report."""
    if not rows:
        raise UserError("nothing to report: no training there has finished; paper_tables.py run trains them")
    output.mkdir(parents=True, exist_ok=True)
    found = sections(rows)
    parts = ["# The paper's Table 1, as far as it is redone here\n"]
    all_gains: list[tuple[str, Gain]] = []
    for number, section in enumerate(found, 1):
        suffix = f"-{number}" if len(found) > 1 else ""
        table = lines(section)
        differences = [gain for line in table for gain in gains(line)]
        all_gains += [(heading(section[0]), gain) for gain in differences]
        parts += [f"## {heading(section[0])}\n", _sources(section), "### Test BPC\n", bpc_table(table)]
        parts += ["### Less the stack\n", gains_table(differences)] if differences else []
        name = f"bpc-characters{suffix}.png"
        figures.draw(table, "characters", output / name, heading(section[0]))
        parts += ["### Validation BPC\n", f"![validation BPC against characters read]({name})\n"]
        marks = list(chosen_levels) or levels(section)
        parts += _to_levels(table, marks, "characters", "Characters to a validation BPC")
        machines = alone_by_machine(section)
        for place, (machine, own) in enumerate(machines.items(), 1):
            name = f"bpc-seconds{suffix}{f'-{place}' if len(machines) > 1 else ''}.png"
            figures.draw(lines(own), "seconds", output / name, machine)
            parts.append(f"### Seconds, on {machine}\n")
            parts.append(f"{len(own)} trainings had the machine to themselves; seconds are those of updates alone.\n")
            parts.append(f"![validation BPC against seconds of training]({name})\n")
            parts += _to_levels(lines(own), marks, "seconds", "Seconds to a validation BPC")
        if not machines:
            parts.append("No training here had the machine to itself, so there are no figures of seconds.\n")
    replace_file(output / "results.md", "\n".join(parts).encode())
    _write_csv(rows, all_gains, output)


def heading(row: Row) -> str:
    return f"{Budget(**row.budget)} of {row.corpus['name']}{f', {in_words(row.others)}' if row.others else ''}"


def bpc_table(table: Sequence[Line]) -> str:
    """Test BPC, what the paper has above what is measured: mean (least to most, number of seeds)."""
    found = [["", *COLUMNS]]
    for unit in dict.fromkeys(line.unit for line in table):
        published = [TEST_BPC.get(Place(unit, column)) for column in COLUMNS]
        if any(published):
            found.append([f"{UNITS[unit]}, published", *("" if bpc is None else f"{bpc:.3f}" for bpc in published)])
        for line in table:
            if line.unit == unit:
                cells = [_spread(line.test(column), ".3f") for column in COLUMNS]
                found.append([f"{UNITS[unit]}, {line.choice}", *cells])
    note = "In brackets: least to most over seeds, and their number.\n"
    return f"{_markdown(found)}\n{note}"


def gains_table(found: Iterable[Gain]) -> str:
    """Differences of test BPC to the stack of the same unit and optimizer."""
    table = [["", "measured", "any seed against any", "seeds", "published", ""]]
    for gain in found:
        published = "" if gain.published is None else f"{gain.published:+.3f}"
        name = f"{UNITS[gain.unit]} ({gain.choice}), {gain.column} less stacked"
        table.append(
            [
                *[name, f"{gain.mean:+.3f}", f"{gain.low:+.3f} to {gain.high:+.3f}"],
                *[f"{gain.counts[0]}, {gain.counts[1]}", published, gain.verdict],
            ]
        )
    return f"{_markdown(table)}\nBelow 0 is better than the stack.\n"


def _to_levels(table: Sequence[Line], marks: Sequence[float], what: str, title: str) -> list[str]:
    """A table of what each model took to each BPC, and how many times sooner than the stack it was there."""
    if not marks:
        return []
    found = [["", *(f"{mark:.4g}" for mark in marks)]]
    for line in table:
        stack = [ways(line.rows.get("stacked", []), mark, what) for mark in marks]
        for column in COLUMNS:
            if column not in line.rows:
                continue
            rows, cells = line.rows[column], []
            for mark, base in zip(marks, stack, strict=True):
                own = ways(rows, mark, what)
                cell = _spread(own, ",.0f") if own is not None else "-"
                if own is not None and base is not None and column != "stacked":
                    cell += f", x {base.mean / own.mean:.2f}"
                cells.append(cell)
            found.append([f"{rows[0].model} ({line.choice})", *cells])
    note = f"x: how many times sooner than the stack, by means over seeds. {_NO_WAY}\n"
    return [f"{title}:\n", _markdown(found), note]


def _sources(section: Sequence[Row]) -> str:
    """Where the figures of a section come from, in a paragraph."""
    dates = sorted({row.date for row in section})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    machines = sorted({f"{row.machine['device']} ({row.machine['threads']} threads)" for row in section})
    chosen = sorted({f"{UNITS[row.unit]} {row.choice} ({row.chosen})" for row in section})
    counts = sorted({row.updates for row in section})
    updates = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    torch = sorted({row.versions["torch"] for row in section})
    return (
        f"{len(section)} trainings of {updates} updates, {when}, on {'; '.join(machines)}; "
        f"torch {', '.join(torch)}. Optimizers: {'; '.join(chosen)}.\n"
    )


def _spread(found: Spread | None, form: str) -> str:
    if found is None:
        return ""
    if found.seeds == 1:
        return f"{found.mean:{form}} (1)"
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}}, {found.seeds})"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(cells)} |" for cells in table)
    return "\n".join([head, f"|{'---|' * len(table[0])}", *rest, ""])


# ------------------------------------------------------------------------------------------------------------- CSV


def _write_csv(rows: Sequence[Row], found: Sequence[tuple[str, Gain]], output: Path) -> None:
    told = ["model", "unit", "column", "seed", "budget", "corpus", "optimizer", "learning_rate", "schedule", "others"]
    told += ["chosen", "alone", "device", "cores", "threads", "date", "commit", "torch"]
    figures_ = ["parameters", "updates", "characters", "train_seconds", "valid_bpc", "best_step", "test_bpc"]
    table: list[list[object]] = [[*told, *figures_]]
    curves: list[list[object]] = [
        ["model", "seed", "budget", "corpus", "choice", "others", "alone", "characters", "train_seconds", "valid_bpc"]
    ]
    for row in rows:
        budget, choice = str(Budget(**row.budget)), row.choice
        values: list[object] = [row.model, row.unit, row.column, row.seed, budget, row.corpus["name"]]
        values += [choice.optimizer, choice.learning_rate, choice.schedule, in_words(row.others), row.chosen, row.alone]
        values += [*(row.machine[name] for name in ("device", "cores", "threads")), row.date, row.commit]
        table.append([*values, row.versions["torch"], *(getattr(row, name) for name in figures_)])
        same = [row.model, row.seed, budget, row.corpus["name"], str(choice), in_words(row.others), row.alone]
        curves += [[*same, *point] for point in row.curve]
    _save_csv(output / "rows.csv", table)
    _save_csv(output / "curves.csv", curves)
    names = [field for field in Gain._fields if field != "counts"]
    head: list[object] = ["condition", *names, "seeds", "seeds_of_stack"]
    _save_csv(
        output / "gains.csv",
        [head, *([where, *(getattr(gain, name) for name in names), *gain.counts] for where, gain in found)],
    )


def _save_csv(path: Path, table: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    replace_file(path, text.getvalue().encode())


def shown(rows: Sequence[Row]) -> str:
    """The tables of test BPC, for a terminal."""
    parts = []
    for section in sections(rows):
        table = lines(section)
        parts += [heading(section[0]), "", bpc_table(table), gains_table(g for line in table for g in gains(line))]
    return "\n".join(parts)
