"""What came of a training: a row, from its run folder, from MLflow or from a JSON file of rows.

The three give the same row: a run folder's metrics.jsonl and summary.json are what MLflow has a copy of, and what
MLflow cannot know (who had the machine, what for) is a tag there.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gfrnn.config import UserError
from gfrnn.runs import RunFolder, replace_file
from gfrnn.training.mlflow_sender import without_password
from paper.plan import Budget, Choice, Plan, overrides, read_json
from paper.published import MODELS
from paper.turns import Training, read_notes

FORM = "gfrnn.paper_tables.1"
EXPERIMENT = "paper-tables"
TOLD = "paper.json"
"""In a run folder: the row but for its figures."""
MOST_POINTS = 40  # of a curve
_ABOUT = "paper.about"  # a tag: the row but for its figures
_SERIES = ("valid_bpc", "characters", "train_seconds")
_CHOICE = ("optimizer", "learning_rate", "schedule")
_SINGLE = ("parameters", "best_step", "test_bpc")


class Point(NamedTuple):
    """A validation."""

    characters: int
    """Trained on so far."""
    seconds: float
    """Of training so far: updates alone."""
    bpc: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished training."""

    model: str
    seed: int
    budget: dict[str, Any]
    """kind and amount."""
    corpus: dict[str, str]
    """name and md5."""
    settings: dict[str, Any]
    """optimizer, learning_rate, schedule, and whatever differs from the preset."""
    chosen: str
    """The optimizer and its rate: tuned, by hand or published."""
    alone: bool
    """The user's word that nothing else ran on the machine, in all turns."""
    machine: dict[str, Any]
    """device, cores, threads."""
    versions: dict[str, str]
    commit: str | None
    date: str
    parameters: int
    updates: int
    characters: int
    train_seconds: float
    valid_bpc: float
    """The best; its weights are tested."""
    best_step: int
    test_bpc: float
    curve: tuple[Point, ...]

    @property
    def unit(self) -> str:
        return MODELS[self.model].unit

    @property
    def column(self) -> str:
        return MODELS[self.model].column

    @property
    def choice(self) -> Choice:
        optimizer, rate, schedule = (self.settings[name] for name in _CHOICE)
        return Choice(optimizer, rate, schedule, self.chosen)

    @property
    def others(self) -> dict[str, Any]:
        """Settings that are not the choice: none for the paper's model as it is."""
        return {k: v for k, v in self.settings.items() if k not in _CHOICE}

    @property
    def condition(self) -> tuple[str, str, str]:
        """What must be the same for two rows to be compared: budget, text, settings but the choice."""
        return str(Budget(**self.budget)), self.corpus["md5"], json.dumps(self.others, sort_keys=True)

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows the same one; their order too."""
        return (*self.condition, list(MODELS).index(self.model), str(self.choice), self.seed)


def about(plan: Plan, training: Training) -> dict[str, Any]:
    """What MLflow cannot know of a finished training: all of a row but its figures."""
    folder, choice = training.folder, training.choice
    config = json.loads(folder.config_path.read_text())
    notes = read_notes(plan.folder / "trainings.json")[folder.path.name]
    chosen = {name: getattr(choice, name) for name in _CHOICE}
    shared = overrides(plan.settings(training.model))
    return {
        "model": training.model,
        "seed": training.seed,
        "budget": dataclasses.asdict(plan.budget),
        "corpus": plan.corpus,
        "settings": chosen | shared,
        "chosen": choice.source,
        "alone": notes["alone"],
        "machine": notes["machine"],
        "versions": config["versions"],
        "commit": config["git_commit"],
        "date": time.strftime("%F", time.gmtime(folder.read_metrics()[-1]["time"])),
    }


def from_folder(told: Mapping[str, Any], folder: RunFolder) -> Row:
    """The row of a run, which must be finished."""
    series: dict[str, dict[int, float]] = {name: {} for name in _SERIES}
    for line in folder.read_metrics():
        for name in _SERIES:
            if name in line:
                series[name][line["step"]] = line[name]
    summary = folder.read_summary()
    assert summary is not None
    return _row(told, series, {name: summary[name] for name in _SINGLE})


def from_folders(folder: Path) -> list[Row]:
    """Rows of the trainings in a folder that `run` has seen finished. Raises UserError if it is another folder."""
    if not (folder / "paper.json").exists():
        raise UserError(f"{folder} is no folder of paper_tables.py: it has no paper.json")
    told = {path.parent: read_json(path, "model") for path in sorted(folder.glob(f"*/{TOLD}"))}
    return [checked(from_folder(values, RunFolder(run)), str(run)) for run, values in told.items()]


def _row(told: Mapping[str, Any], series: Mapping[str, Mapping[int, float]], single: Mapping[str, float]) -> Row:
    bpc, characters, seconds = (series[name] for name in _SERIES)
    last = max(characters)
    points = [
        Point(int(characters[step]), round(seconds[step], 3), round(bpc[step], 5))
        for step in sorted(bpc)
        if step in characters
    ]
    return Row(
        **told,
        parameters=int(single["parameters"]),
        updates=last,
        characters=int(characters[last]),
        train_seconds=seconds[last],
        valid_bpc=min(bpc.values()),
        best_step=int(single["best_step"]),
        test_bpc=single["test_bpc"],
        curve=thinned(points),
    )


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[Point, ...]:
    """So many at most, evenly from the first to the last."""
    if len(points) <= most:
        return tuple(points)
    places = {round(number * (len(points) - 1) / (most - 1)) for number in range(most)}
    return tuple(points[place] for place in sorted(places))


# ----------------------------------------------------------------------------------------------------------- MLflow


def tag(told: Mapping[str, Any], folder: Path) -> str:
    """Says in the training's MLflow run what it is; returns "" or what failed, in words."""
    from gfrnn.training.mlflow_sender import Sent, tracking_uri
    from gfrnn.training.tracking import quieten, reason

    quieten()
    from mlflow.tracking import MlflowClient

    sent = Sent.load(folder)
    if not sent.summary_sent:
        return f"it has not arrived there yet: python -m gfrnn.training.tracking {folder}, then this again"
    budget = str(Budget(**told["budget"]))
    tags = {"model": told["model"], "seed": told["seed"], "budget": budget, "alone": told["alone"]}
    try:
        client = MlflowClient(tracking_uri(folder))
        for name, value in {**tags, _ABOUT: json.dumps(told)}.items():
            client.set_tag(sent.run_id, name, value)
    except Exception as error:  # every kind of store raises errors of its own
        return reason(error)
    return ""


def from_mlflow(uri: str, experiment: str) -> list[Row]:
    """Rows of all finished trainings there. Raises UserError if the store or the experiment is not there."""
    from gfrnn.scaling.store import runs_of

    client, runs = runs_of(uri, experiment)
    rows = []
    for run in runs:
        if _ABOUT not in run.data.tags:  # still training, or of something else
            continue
        where = f"MLflow run {run.info.run_id} at {without_password(uri)}"
        series: dict[str, dict[int, float]] = {}
        for name in _SERIES:
            history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda point: point.timestamp)
            series[name] = {point.step: point.value for point in history}  # after a kill a step is logged again
        try:
            told = json.loads(run.data.tags[_ABOUT])
            rows.append(checked(_row(told, series, {name: run.data.metrics[name] for name in _SINGLE}), where))
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{where} is not a whole row of paper_tables.py ({error}): delete it") from error
    return rows


# ------------------------------------------------------------------------------------------------------------- JSON


def read_rows(path: Path) -> list[Row]:
    """Raises UserError for a file of another form."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); give a file that paper_tables.py run has written") from error
    if not isinstance(values, dict) or values.get("form") != FORM or not isinstance(values.get("rows"), list):
        raise UserError(f"{path} is not of the form {FORM}: give a file that paper_tables.py run has written")
    rows = []
    for number, each in enumerate(values["rows"], 1):
        try:
            rows.append(checked(Row(**{**each, "curve": tuple(Point(*point) for point in each["curve"])}), str(path)))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: row {number} is not a whole row ({error}): delete it") from error
    return rows


def checked(row: Row, where: str) -> Row:
    """Raises UserError for a model that is not in the table, KeyError and the like for what a report would miss."""
    if row.model not in MODELS:
        raise UserError(f"{where} has a row of {row.model}, no model of the paper's table: delete it")
    _ = row.key, row.versions["torch"], [row.machine[name] for name in ("device", "cores", "threads")]
    return row


def merged(rows: Iterable[Row]) -> list[Row]:
    """Sorted; of two of the same training the later, but one that had the machine alone before one that had not."""
    found: dict[Any, Row] = {}
    for row in rows:
        if row.key not in found or row.alone or not found[row.key].alone:
            found[row.key] = row
    return [found[key] for key in sorted(found)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Puts rows among those that are in the file; a row a line, so that differences can be read."""
    before = read_rows(path) if path.exists() else []
    lines = []
    for row in merged([*before, *rows]):
        lines.append(json.dumps(dataclasses.asdict(row)))
    text = f'{{"form": {json.dumps(FORM)}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"
    replace_file(path, text.encode())
