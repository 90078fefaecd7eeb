"""The programs of a run: what its settings say, made when it is asked for and kept as Arrow."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from gfrnn.config import LADDERS, BatchSettings, ProgramSettings, Settings
from gfrnn.data.corpus import Text, data_folder, load_text
from gfrnn.data.programs import GENERATOR_VERSION, Level, Split, ladder

if TYPE_CHECKING:
    from gfrnn.data.programs import ProgramTable


class ProgramCorpus:
    """Tables of programs. Validation's and test's are as hard as training's will be in the end.

    Any number of processes may make one of the same folder at the same time. Every method raises UserError for programs
    that cannot be kept.
    """

    def __init__(self, settings: ProgramSettings, data_dir: Path):
        self.settings, self.root = settings, data_folder(data_dir)
        p = settings
        self.name = f"programs (length {p.length}, nesting {p.nesting}, {p.curriculum})"
        self.md5 = hashlib.md5(GENERATOR_VERSION.encode(), usedforsecurity=False).hexdigest()
        """Of the generator: all else is in the settings."""
        self.levels = ladder(p.length, p.nesting)
        self.valid = self._load("valid", p.valid_programs, self.levels[-1])
        self.test = self._load("test", p.valid_programs, self.levels[-1])

    def check(self, batch: BatchSettings) -> None:
        """Nothing is left to be found out: config.validate has seen the numbers."""

    def prepare(self) -> str:
        """Makes what training begins with; what there is, in words."""
        train = self.train(0, 0)
        return f"{len(train):,} training, {len(self.valid):,} validation, {len(self.test):,} test programs"

    def train(self, level: int, part: int) -> ProgramTable:
        """A pass of training: without a ladder the same programs each, else new ones of the level's."""
        p = self.settings
        if p.curriculum not in LADDERS:
            return self._load("train", p.num_programs, None)
        return self._load("train", p.level_programs, self.levels[level], start=part * p.level_programs)

    def level_valid(self, level: int) -> ProgramTable:
        """Validation programs as hard as a level's."""
        return self._load("valid", self.settings.valid_programs, self.levels[level])

    def _load(self, split: Split, count: int, level: Level | None, start: int = 0) -> ProgramTable:
        from gfrnn.data.program_dataset import load_programs

        p = self.settings
        return load_programs(
            self.root,
            split=split,
            nesting=p.nesting,
            length=p.length,
            num_programs=count,
            start=start,
            curriculum=p.curriculum,
            level=level if p.curriculum in LADDERS else None,
            seed=p.program_seed,
        )


Corpus = Text | ProgramCorpus


def load_corpus(settings: Settings) -> Corpus:
    """What the settings' task learns from, fetched or made where it is missing. Raises UserError as its kind does."""
    if settings.task == "text":
        return load_text(settings.data)
    return ProgramCorpus(settings.programs, settings.data.data_dir)
