"""metrics.jsonl read from where reading ended, also after a resumed run has cut the file and written on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any, NamedTuple
from zlib import crc32

_MOST_LAYERS = 6  # of a net whose gates are metrics of their own, L * L of them


class Mark(NamedTuple):
    """A position in metrics.jsonl with what identifies everything before it."""

    offset: int = 0
    lines: int = 0
    last_step: int = 0
    crc: int = 0


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    timestamp: int  # milliseconds since 1970
    step: int


class MetricsReader:
    """Reads metrics.jsonl from where sending ended, also after the file was cut and written on.

    A resumed run drops the lines after its checkpoint and writes them again, so an offset alone could point into lines
    that were never sent. `marks` are checksums of the file's beginning, at distances that grow with it; the last one is
    the cursor. When the file is not what it was, reading goes on from the last mark that still holds.
    """

    def __init__(self, path: Path, marks: list[Mark]):
        self.path = path
        self.marks = marks
        self._tail: bytes | None = None  # the bytes just before the cursor; None: not looked at yet
        self._next = (marks[-1], b"")

    @property
    def cursor(self) -> Mark:
        return self.marks[-1]

    def read(self, limit: int) -> list[Point] | None:
        """At most `limit` points of the next complete lines; None if there is no such line. `commit` moves on."""
        try:
            f = self.path.open("rb")
        except FileNotFoundError:
            return None
        with f:
            mark = self._verify(f)
            f.seek(mark.offset)
            points: list[Point] = []
            last = b""
            while (line := f.readline()).endswith(b"\n"):  # a torn one is left for later
                step, more = _points(line) or (mark.last_step, [])
                if len(points) + len(more) > limit:
                    break
                points += more
                mark = Mark(mark.offset + len(line), mark.lines + 1, step, crc32(line, mark.crc))
                last = line
        self._next = (mark, last)
        return points if last else None

    def commit(self) -> None:
        """What was read last has arrived."""
        mark, self._tail = self._next
        # marks lie 5 % of the file apart: few in number, and a cut costs little more than what was cut
        if len(self.marks) > 1 and self.marks[-1].offset < 1.05 * self.marks[-2].offset + 4096:
            self.marks.pop()
        self.marks.append(mark)

    def unread(self) -> int:
        """Complete lines after the cursor."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as f:
            f.seek(self._verify(f).offset)
            return sum(line.endswith(b"\n") for line in f)

    def _verify(self, f: IO[bytes]) -> Mark:
        """The cursor, moved back if the file is not what was read before."""
        if self._tail is not None:
            f.seek(self.cursor.offset - len(self._tail))
            if f.read(len(self._tail)) == self._tail:
                return self.cursor
        f.seek(0)
        crc, good = 0, 0
        for i, mark in enumerate(self.marks):
            crc = crc32(f.read(mark.offset - f.tell()), crc)
            if f.tell() != mark.offset or crc != mark.crc:
                break
            good = i
        del self.marks[good + 1 :]
        start = max(0, self.cursor.offset - 256)
        f.seek(start)
        self._tail = f.read(self.cursor.offset - start)
        return self.cursor


def _points(line: bytes) -> tuple[int, list[Point]] | None:
    """Step and points of a line; None if a kill tore it and a later life wrote on after it."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    step, milliseconds = values.pop("step"), round(values.pop("time") * 1000)
    return step, [Point(key, float(value), milliseconds, step) for key, value in numbers(values)]


def numbers(values: dict[str, Any]) -> list[tuple[str, float]]:
    """(name, number) of the values that are numbers; and of global gates and timescales, of not too many layers."""
    found = [(k, v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    gates, timescales = values.get("mean_gates", []), values.get("timescales", [])
    if max(len(gates), len(timescales)) <= _MOST_LAYERS:
        found += [(f"gate_{i}_{j}", gate) for i, row in enumerate(gates, 1) for j, gate in enumerate(row, 1)]
        found += [(f"timescale_{j}", timescale) for j, timescale in enumerate(timescales, 1)]
    return found
