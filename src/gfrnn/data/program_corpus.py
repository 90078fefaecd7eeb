"""The programs of a run: kept as Arrow, those of a curriculum's levels made when they are reached."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gfrnn.config import LADDERS, BatchSettings, ProgramSettings, Settings, at_home
from gfrnn.data.corpus import Text, load_text
from gfrnn.data.programs import GENERATOR_VERSION, ProgramTable, Recipe, Split, ladder


class ProgramCorpus:
    """Tables of programs. Validation's and test's are as hard as training's will be in the end.

    Any number of processes may use one folder at the same time. Raises UserError for programs that cannot be kept.
    """

    def __init__(self, settings: ProgramSettings, data_dir: Path):
        self.settings, self.root = settings, at_home(data_dir)
        p = settings
        self.name = f"programs (length {p.length}, nesting {p.nesting}, {p.curriculum})"
        self.md5 = hashlib.md5(GENERATOR_VERSION.encode(), usedforsecurity=False).hexdigest()
        """Of the generator's version: all else that programs depend on is in the settings."""
        self.levels = ladder(p.length, p.nesting)
        self.has_levels = p.curriculum in LADDERS
        self.valid = self._kept("valid", p.valid_programs)
        self.test = self._kept("test", p.valid_programs)

    def prepare(self, batch: BatchSettings) -> str:
        """Makes what training begins with; what there is, in words."""
        train = self.train(0, 0)
        return f"{len(train):,} training, {len(self.valid):,} validation, {len(self.test):,} test programs"

    def train(self, level: int, part: int) -> ProgramTable:
        """A pass of training: without levels the same programs each, else new ones of the level's."""
        p = self.settings
        if not self.has_levels:
            return self._kept("train", p.num_programs)
        return self._made("train", level, part * p.level_programs, p.level_programs)

    def level_valid(self, level: int) -> ProgramTable:
        """Validation programs as hard as a level's."""
        return self._made("valid", level, 0, self.settings.valid_programs)

    def _made(self, split: Split, level: int, start: int, count: int) -> ProgramTable:
        """Of a level, in memory: they are read for a while only, and made in a moment."""
        p = self.settings
        recipe = Recipe(p.length, p.nesting, p.curriculum, self.levels[level], p.program_seed, split)
        return ProgramTable.of(recipe.programs(start, start + count))

    def _kept(self, split: Split, count: int) -> ProgramTable:
        """As hard as can be."""
        from gfrnn.data.program_dataset import load_programs

        p = self.settings
        return load_programs(
            self.root,
            split=split,
            nesting=p.nesting,
            length=p.length,
            num_programs=count,
            curriculum=p.curriculum,
            level=self.levels[-1],
            seed=p.program_seed,
        )


Corpus = Text | ProgramCorpus


def load_corpus(settings: Settings) -> Corpus:
    """What the settings' task learns from, fetched or made where it is missing. Raises UserError as its kind does."""
    if settings.task == "text":
        return load_text(settings.data)
    return ProgramCorpus(settings.programs, settings.data.data_dir)
