"""What a folder's trainings are: one budget, one text, an optimizer and a learning rate a unit.

FOLDER/paper.json      budget, text and settings that all trainings in it share
FOLDER/tuned.json      what `tune` has found, unit by unit
FOLDER/trainings.json  who had the machine to themselves, and which machine
FOLDER/MODEL-seed-N/   run folders; FOLDER/tune-.../ those of `tune`
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gfrnn import cli
from gfrnn.config import OptimizerSettings, Settings, UserError, preset, validate
from gfrnn.data import load_text, segments_per_epoch
from gfrnn.runs import write_json
from paper.published import BASELINES, UNITS

Kind = Literal["characters", "updates", "epochs", "seconds"]
OPTIMIZERS = ("rmsprop", "adam")
SCHEDULES = ("constant", "cosine", "linear")
TUNING_SHARE = 1 / 5  # of the budget

_OWN = {"preset", "task", "unit", "feedback", "seed", "output-dir", "start-from", "corpus-file", "experiment"}
_OWN |= {"optimizer", "learning-rate", "eps", "schedule", "max-updates", "max-epochs", "time-limit", "patience"}
_OWN |= {"valid-every", "log-every", "checkpoint-every", "dry-run", "prepare"}
_LOOKS = ("valid_bytes", "eval_streams", "eval_warmup")  # of the run's settings: they change what is scored


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long each model is trained; the same for all."""

    kind: Kind
    amount: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise UserError(f"--{self.kind} is {self.amount:g}; it must be greater than 0")

    def __str__(self) -> str:
        return f"{self.amount:,.10g} {self.kind}"

    def share(self, part: float) -> Budget:
        return Budget(self.kind, self.amount * part)

    def updates(self, settings: Settings, updates_an_epoch: int) -> int | None:
        """Rounded up; None for seconds."""
        batch = settings.batch
        an_update = {"characters": batch.rows * batch.steps, "updates": 1, "epochs": 1 / updates_an_epoch}
        return None if self.kind == "seconds" else math.ceil(self.amount / an_update[self.kind] - 1e-9)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a unit is optimized."""

    optimizer: str
    learning_rate: float
    schedule: str = "constant"
    """Over the whole of a training's own budget."""
    source: str = "by hand"
    """tuned, by hand, or published: the preset's own."""

    def __str__(self) -> str:
        return f"{self.optimizer} {self.learning_rate:g}{f' {self.schedule}' if self.schedule != 'constant' else ''}"

    @property
    def flags(self) -> list[str]:
        """Of train.py. RMSProp is the paper's, with the preset's constants; Adam has its usual epsilon."""
        flags = ["--optimizer", self.optimizer, "--learning-rate", repr(self.learning_rate)]
        flags += ["--schedule", self.schedule]
        return flags if self.optimizer == "rmsprop" else [*flags, "--eps", repr(OptimizerSettings().eps)]


class Plan:
    """The folder, checked against what is asked for now. Raises UserError if it is of another budget, text or model.

    Args:
        data_flags: --corpus-file, if given. more: further flags of train.py.
    """

    def __init__(self, folder: Path, budget: Budget, data_flags: Sequence[str], more: Sequence[str]):
        for flag in more:
            name = flag.removeprefix("--").split("=")[0].replace("_", "-")
            if flag.startswith("--") and name in _OWN:
                raise UserError(f"--{name} is this script's own: leave it out after --")
        self.folder, self.budget, self.flags = folder, budget, [*data_flags, *more]
        settings = self.settings("lstm-3x191")
        text = load_text(settings.data)
        self.corpus = {"name": text.name, "md5": text.md5}
        batch = settings.batch
        self.updates_an_epoch = segments_per_epoch(len(text.train), batch.rows, batch.steps)
        self._settle(overrides(settings))

    def settings(self, model: str) -> Settings:
        """Of train.py for that model and these flags. Raises UserError for what it would refuse."""
        settings = cli.parse(Settings, self.flags, default=preset(model))
        validate(settings)
        return settings

    def _settle(self, shared: dict[str, Any]) -> None:
        now = {"budget": dataclasses.asdict(self.budget), "corpus": self.corpus["md5"], "settings": shared}
        path = self.folder / "paper.json"
        if not any((self.folder / name).exists() for name in ("tuned.json", "trainings.json")):  # nothing is trained
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, now)
            return
        then = read_json(path, *now)
        if then["budget"] != now["budget"]:
            raise UserError(
                f"{self.folder} is of a budget of {Budget(**then['budget'])}, not {self.budget}: "
                "give another folder, or that budget"
            )
        if then["corpus"] != now["corpus"]:
            raise UserError(f"{self.folder} is of another text than {self.corpus['name']}: give another folder")
        if then["settings"] != now["settings"]:
            raise UserError(
                f"{self.folder} is of models with {in_words(then['settings'])}, not {in_words(shared)}: "
                "give another folder, or the same flags after --"
            )

    def tuned(self) -> dict[str, Any]:
        """tuned.json: {unit: {"optimizer", "learning_rate", "schedule", "valid_bpc", ..., "tried": [...]}}."""
        path = self.folder / "tuned.json"
        return read_json(path) if path.exists() else {}

    def choice(self, unit: str) -> Choice:
        """What `tune` has chosen. Raises UserError if it has not been run."""
        found = self.tuned().get(unit)
        if found is None or "learning_rate" not in found:  # or with all that were tried the loss exploded
            raise UserError(
                f"no learning rate is tuned for {UNITS[unit]} in {self.folder}: run tune --units {unit} first, "
                "or give --learning-rate and --optimizer, or --published"
            )
        return Choice(found["optimizer"], found["learning_rate"], found["schedule"], "tuned")


def published_choice(model: str) -> Choice:
    """The preset's own, which is the paper's as far as it is known."""
    own = preset(model).optimization
    return Choice(own.optimizer, own.learning_rate, own.schedule, "published")


def overrides(settings: Settings) -> dict[str, Any]:
    """What differs from the preset and changes the figures, by the setting's name; not the optimizer, nor for how long.

    Empty for the paper's model as it is.
    """
    own = preset(settings.preset)
    found: dict[str, Any] = {}
    for group in ("model", "batch", "optimization", "communication", "run"):
        for name, value in dataclasses.asdict(getattr(settings, group)).items():
            if (group != "run" or name in _LOOKS) and value != getattr(getattr(own, group), name):
                found[name] = value
    return found


def in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "the presets' own settings"


def units_of(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in BASELINES:
            raise UserError(f"--units {name} is no unit; give some of {' '.join(BASELINES)}")
    return list(names)


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """An object with these names; raises UserError."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict) or any(name not in values for name in needed):
        raise UserError(f"{path} was not written by paper_tables.py: delete it, or give another folder")
    return values
