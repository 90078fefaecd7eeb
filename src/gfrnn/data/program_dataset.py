"""From a recipe to a table of programs: made by a `datasets` builder in several processes, kept as Arrow, mapped.

Importing this imports datasets, which takes a second; `gfrnn.data.programs` does not. Layout of the data folder:

    arrow/programs-<generator's version>-<recipe>-<samples>/    programs-<split>.arrow, or several, -0000i-of-0000n

The name says all that the programs depend on, so what is kept cannot be stale. A folder appears by one rename when it
is complete, and the lock that its builder holds is the kernel's: killing it at any moment leaves nothing that a later
process trusts or waits for, and none of the processes that it has started.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on a hub; datasets reads this when it is imported

import datasets
import pyarrow as pa
from datasets.builder import Key
from multiprocess.util import register_after_fork  # type: ignore[import-untyped]  # whose processes datasets uses

from gfrnn.config import PROGRAM_SYMBOLS, TARGET_SYMBOLS, Curriculum, UserError, at_home
from gfrnn.data.corpus import Bytes, only_one
from gfrnn.data.programs import GENERATOR_VERSION, UNKNOWN, ProgramTable, Recipe, Split, places

log = logging.getLogger(__name__)

_patched_for_streaming = True  # so says datasets when it has put its own os, open and Path into a builder's module: no

_AT_ONCE = 1000  # programs that one process makes before it writes them
_WORTH_A_PROCESS = 20_000  # programs: making them takes about as long as starting a process


@dataclass
class ProgramsConfig(datasets.BuilderConfig):  # type: ignore[misc]  # datasets has no types
    """What a `Programs` builder makes: so many samples of a recipe (see programs.Recipe), from number `start` on.

    Raises UserError for what cannot be made.
    """

    split: Split = "train"
    nesting: int = 5
    length: int = 10
    num_programs: int = 400_000
    curriculum: Curriculum = "mix"
    level: tuple[int, int] | None = None
    seed: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        self.name = f"{self.recipe.key}-samples-{self.start}-{self.start + self.num_programs}"
        if self.num_programs < 1:
            raise UserError(f"the number of {self.split} programs is {self.num_programs}; it must be greater than 0")
        super().__post_init__()

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.length, self.nesting, self.curriculum, self.level, self.seed, self.split)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(start, stop) of the samples in parts that different processes may make."""
        stop = self.start + self.num_programs
        return [(start, min(start + _AT_ONCE, stop)) for start in range(self.start, stop, _AT_ONCE)]


class Programs(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """A `datasets` builder of one split: Programs(split="train", nesting=5, length=10, num_programs=1000, ...).

    Rows are {"program": str, "target": str}, the same in the same order whatever download_and_prepare's num_proc.
    """

    BUILDER_CONFIG_CLASS = ProgramsConfig
    VERSION = datasets.Version(GENERATOR_VERSION)
    config: ProgramsConfig

    def _info(self) -> datasets.DatasetInfo:
        text = datasets.Value("string")
        return datasets.DatasetInfo(features=datasets.Features({"program": text, "target": text}))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        split = datasets.SplitGenerator(name=self.config.split, gen_kwargs={"ranges": self.config.ranges})
        split.split_info.num_examples = self.config.num_programs  # what the progress bar ends at
        return [split]

    def _generate_tables(self, ranges: list[tuple[int, int]]) -> Iterator[tuple[Key, pa.Table]]:
        for number, (start, stop) in enumerate(ranges):
            programs, targets = zip(*self.config.recipe.programs(start, stop), strict=True)
            yield Key(number, 0), pa.table({"program": programs, "target": targets})

    def _prepare_split_single(self, **arguments: Any) -> Iterator[tuple[int, bool, Any]]:
        try:
            yield from super()._prepare_split_single(**arguments)
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error from None  # here, since an error's cause does not get out of a process


def load_programs(
    data_dir: Path,
    *,
    split: Split,
    nesting: int,
    length: int,
    num_programs: int,
    curriculum: Curriculum,
    level: tuple[int, int] | None = None,
    seed: int = 0,
    start: int = 0,
    num_proc: int | None = None,
) -> ProgramTable:
    """So many samples of a recipe (see programs.Recipe) from number `start` on: made where missing, else at once.

    num_proc: processes that make them, None for as many as there are cores and work for. Any number of processes may
    call this at the same time on one folder: one works, the others wait for it. Raises UserError for programs that
    cannot be made, read or kept.
    """
    settings: dict[str, Any] = {
        "split": split,
        "nesting": nesting,
        "length": length,
        "num_programs": num_programs,
        "curriculum": curriculum,
        "level": level,
        "seed": seed,
        "start": start,
    }
    config = ProgramsConfig(**settings)
    root = at_home(data_dir)
    folder = root / "arrow" / f"programs-{GENERATOR_VERSION}-{config.name}"
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with only_one(folder.with_name(folder.name + ".lock")):
                if not folder.is_dir():  # another process may have made it while this one waited
                    _build(folder, settings, min(num_proc or _processes(num_programs), len(config.ranges)))
        return _table(folder, num_programs)
    except (OSError, ValueError, LookupError) as error:
        number = getattr(error, "errno", None)
        if number in (None, errno.ENOENT) and folder.is_dir():  # what pyarrow finds out has no number
            raise UserError(f"{folder} is damaged; delete it, and it is made again") from error
        if number is None:
            raise
        raise UserError(
            f"cannot keep programs in {root}: {os.strerror(number)}; make room there or give another folder, --data-dir"
        ) from error


def _processes(num_programs: int) -> int:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    return max(1, min(cores, num_programs // _WORTH_A_PROCESS))


# ------------------------------------------------------------------------------------------------- Arrow


def _build(folder: Path, settings: dict[str, Any], num_proc: int) -> None:
    """Make `folder`, which appears when all of it is there. Only one process at a time may call this."""
    ending = ".building"
    for left in folder.parent.glob(f"{folder.name}.*{ending}"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if num_proc > 1:  # fewer take a moment
        log.info("making %s in %d processes", folder, num_proc)
    # A folder of this process alone: one that was killed a moment ago may have processes that still write into its own.
    building = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=ending, dir=folder.parent))
    try:
        with _children_end_with_this_process():
            builder = Programs(cache_dir=str(building), dataset_name="programs", **settings)
            builder.download_and_prepare(str(building / "programs"), num_proc=num_proc)
        (building / "programs").rename(folder)
    except OSError as error:
        hidden = error.__context__  # datasets turns an error of writing into one without a number
        raise (hidden if error.errno is None and hidden is not None else error) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _table(folder: Path, num_programs: int) -> ProgramTable:
    """What a folder holds. Raises OSError, ValueError or LookupError if that is not what was written."""
    files = sorted(folder.glob("*.arrow"))
    table = pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in files])
    table.validate(full=True)
    if len(table) != num_programs:
        raise ValueError(f"{len(table)} programs instead of {num_programs}")
    return ProgramTable(
        *_encoded(table.column("program"), PROGRAM_SYMBOLS),
        *_encoded(table.column("target"), TARGET_SYMBOLS),
    )


def _encoded(column: pa.ChunkedArray, vocabulary: str) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """The strings of a column as indices, uint8 [characters], and their offsets, int64 [rows + 1]."""
    strings = column.cast(pa.large_string()).combine_chunks()
    _, offsets, characters = strings.buffers()
    bounds = np.frombuffer(offsets, np.int64)[strings.offset :][: len(strings) + 1]
    codes = places(np.frombuffer(characters, np.uint8)[bounds[0] : bounds[-1]], vocabulary)
    if UNKNOWN in codes:
        raise ValueError("characters that no program has")
    return codes, bounds - bounds[0]


# --------------------------------------------------------------------------------------------- processes


class _Tie:
    """What ties the processes of a build to the one that starts them: a pipe that nobody else can write to."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.thread = threading.get_ident()

    def bind(self) -> None:
        """Called in a child. It ends when its parent does, however that ends; and signals are the parent's business.

        Without this, what a killed parent leaves waits forever; a handler that does not end the process would make the
        parent wait forever for it; and a signal in the child would be told to the parent, by its wake-up descriptor.
        (The kernel's PR_SET_PDEATHSIG would not do: it also acts when just the thread ends that started the child.)
        """
        if threading.get_ident() != self.thread:  # in place of one that was lost, by a thread of the pool: all is lost
            os._exit(1)  # at once, or it might miss the parent's SIGTERM, which ends them all
        os.close(self.write_end)
        threading.Thread(target=self._end_with_parent, daemon=True).start()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the parent ends it

    def _end_with_parent(self) -> None:
        os.read(self.read_end, 1)  # nothing is ever written
        os._exit(1)


@contextmanager
def _children_end_with_this_process() -> Iterator[None]:
    """Binds the processes that datasets forks in this context."""
    tie = _Tie()
    register_after_fork(tie, _Tie.bind)  # as long as `tie` lives
    try:
        yield
    finally:
        os.close(tie.read_end)
        os.close(tie.write_end)
        del tie
