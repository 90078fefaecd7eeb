"""The folder of a study.

    study.json                      its points, in order, and how they are measured
    points/NAME/measurement.json    what came of one: the measurement, and the collectives timed beside it
    points/NAME/rank-0.txt ...      what its processes said
    points/.submitted               some were given to SLURM

A point is done once its measurement.json is there, a failed one too; each file is written whole or not at all. A study
has begun once there is anything in points/.
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfrnn.config import UserError
from gfrnn.runs import write_json
from gfrnn.scaling.grid import How, prepared
from gfrnn.scaling.records import Machine, Measurement, Point, Products, Timed

FORM = 1
"""Of study.json and measurement.json, and of what is kept in MLflow."""


@dataclass(frozen=True)
class Result:
    """What came of a point."""

    measurement: Measurement
    sweep: tuple[Timed, ...] = ()
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    """By which it is found again in MLflow."""


class StudyFolder:
    """See above; `points` and `how` are read or made with `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.points: list[Point] = []
        self.how = How()
        self._file = path / "study.json"

    def read(self) -> StudyFolder:
        """Raises UserError if there is no study here."""
        if not self._file.exists():
            raise UserError(f"{self.path} is not a study: it has no study.json; study.py run makes one")
        values = _read(self._file)
        try:
            self.points = [Point(**point) for point in values["points"]]
            how = values["how"]
            how["corpus_file"] = None if how["corpus_file"] is None else Path(how["corpus_file"])
            self.how = How(**how)
        except (KeyError, TypeError) as error:
            raise UserError(f"{self._file} is of another version of gfrnn ({error}); take another folder") from error
        return self

    def begin(self, points: list[Point], how: How) -> None:
        """Makes the study, or adds points to it. Raises UserError if it is measured in another way.

        One that has not begun takes these points, if there are any, and this way in place of its own.
        """
        if how.corpus_file is not None:  # processes may be started elsewhere
            how = dataclasses.replace(how, corpus_file=how.corpus_file.absolute())
        if self._file.exists():
            self.read()
            if any(self.path.glob("points/*")):
                self._check_same(how)
                how = self.how
            elif points:
                self.points = []
            elif how == How():
                how = self.how
            else:
                for point in self.points:
                    prepared(point, how, self.path)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path} is there, and is not a study: give a new folder")
        self.points, self.how = list(dict.fromkeys([*self.points, *points])), how
        (self.path / "points").mkdir(parents=True, exist_ok=True)
        values = {"form": FORM, "how": _plain(how), "points": [dataclasses.asdict(point) for point in self.points]}
        write_json(self._file, values)

    def _check_same(self, how: How) -> None:
        was, now = (dataclasses.asdict(each) for each in (self.how, how))
        other = next((name for name in was if was[name] != now[name]), None)
        if other is not None and how != How():
            flag = f"--{other.replace('_', '-')}"
            raise UserError(f"{self.path} is measured with {flag} {was[other]}, not {now[other]}; take another folder")

    def note_submitted(self) -> None:
        """That SLURM will measure its points: it has begun."""
        (self.path / "points/.submitted").touch()

    def of(self, point: Point) -> Path:
        """The folder of a point."""
        return self.path / "points" / re.sub("[^A-Za-z0-9._-]", "_", point.name)[-200:]

    def point(self, number: int) -> Point:
        """The first is 1. Raises UserError."""
        if not 1 <= number <= len(self.points):
            raise UserError(f"{self.path} has no point {number}; it has {len(self.points)}")
        return self.points[number - 1]

    def result(self, point: Point) -> Result | None:
        """What came of a point, once it is done."""
        file = self.of(point) / "measurement.json"
        if not file.exists():
            return None
        values = _read(file)
        try:
            return result_from(values)
        except (KeyError, TypeError) as error:
            raise UserError(f"{file} is of another version of gfrnn ({error}): remove it") from error

    def write(self, result: Result) -> None:
        folder = self.of(result.measurement.point)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "measurement.json", result_to(result))


def result_to(result: Result) -> dict[str, Any]:
    """As JSON; every number survives exactly."""
    return {"form": FORM, **dataclasses.asdict(result)}


def result_from(values: dict[str, Any]) -> Result:
    """The inverse. Raises KeyError or TypeError for another form."""
    if values["form"] != FORM:
        raise TypeError(f"form {values['form']}")
    given = dict(values["measurement"])
    point, machine = Point(**given.pop("point")), Machine(**given.pop("machine"))
    busy = tuple(given.pop("busy_seconds"))
    products = tuple(Products(**each) for each in given.pop("products", ()))  # earlier versions timed none
    measurement = Measurement(point, machine, busy_seconds=busy, products=products, **given)
    return Result(measurement, tuple(Timed(**timed) for timed in values["sweep"]), values["id"])


def _plain(how: How) -> dict[str, Any]:
    values = dataclasses.asdict(how)
    return values | {"corpus_file": None if how.corpus_file is None else str(how.corpus_file)}


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged: not JSON ({error}); remove it") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: no JSON object; remove it")
    return values
