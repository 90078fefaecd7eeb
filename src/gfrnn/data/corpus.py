"""From a corpus' name or file to three memory-mapped arrays of bytes: fetch, check, keep as Arrow, map.

The plain bytes are identified by their MD5 and size, and what is kept on disk is named by them, so it cannot be
stale. Layout of the data folder:

    downloads/                    enwik8.zip, text8.zip as fetched; or put there by hand (plain, .zip, .gz or .xz)
    arrow/<md5>-<size>-90-5-5/    text-train.arrow, text-valid.arrow, text-test.arrow: one row, one large_binary column

A folder under arrow/ appears by one rename when it is complete, and the lock that its builder holds is the kernel's
(flock): killing the builder at any moment leaves nothing that a later process trusts or waits for.

Environment: GFRNN_CORPUS_URL, base URL of a mirror, to which enwik8.zip or text8.zip is appended.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import logging
import lzma
import os
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from gfrnn.config import BatchSettings, DataSettings, UserError, at_home

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
NEWLINE = 10
"""Every text is read as if one newline came before it."""


@dataclass(frozen=True)
class Text:
    """A corpus cut in file order: 90 % train, 5 % valid, the rest test. Arrays are uint8 [bytes], read-only, mapped."""

    name: str
    """The corpus' name where the content is known, else the file's name."""
    md5: str
    """Of the whole plain text."""
    train: Bytes
    valid: Bytes
    test: Bytes

    def prepare(self, batch: BatchSettings) -> str:
        """What there is of it, in words: all is made already. Raises UserError if it is too short for such updates."""
        segments_per_epoch(len(self.train), batch.rows, batch.steps)
        return f"{len(self.train):,} training, {len(self.valid):,} validation, {len(self.test):,} test bytes"


@dataclass(frozen=True)
class Identity:
    """What makes two texts the same one: size in bytes and MD5 of the plain bytes."""

    size: int
    md5: str

    def __str__(self) -> str:
        return f"{self.size:,} bytes with MD5 {self.md5}"


KNOWN = {
    "enwik8": Identity(100_000_000, "a1fa5ffddb56f4953e226637dabbb36a"),
    "text8": Identity(100_000_000, "3bea1919949baf155f99411df5fada7e"),
    "enwik8-1m": Identity(1_000_000, "83a2cefd8ca00049e0445542dabd25a0"),
    "enwik8-4m": Identity(4_000_000, "9b21778ef6fea6251152fc5e4e496f13"),
}
URL = "https://mattmahoney.net/dc/"
SPLIT = {"train": 90, "valid": 5, "test": 5}  # percent, in file order; part of the Arrow folder's name
MIN_BYTES = 1000

_FETCHED = ("enwik8", "text8")
_BEGINNINGS = {"enwik8-4m": "enwik8"}  # the first bytes of what is fetched
_SHIPPED = Path(__file__).with_name("enwik8-1m.xz")
_CHUNK = 1 << 20
_BACK_OFF = (0.5, 1.0, 2.0, 4.0)  # seconds before each new attempt at a download that broke off
_TIMEOUT = 30.0  # seconds without an answer


def load_text(settings: DataSettings) -> Text:
    """The text `settings` name, fetched and built where missing, else at once.

    Any number of processes may call this at the same time on one folder: one works, the others wait for it.
    Raises UserError for a corpus that cannot be had, read or kept.
    """
    root = at_home(settings.data_dir)
    read: Callable[[], bytearray]  # called only where the text is not built yet
    if settings.corpus_file is not None:
        path = at_home(settings.corpus_file)
        identity = _identify(path)
        name = _name(path, identity, settings.corpus)
        read = partial(_read, path, identity, "the text that it was a moment ago", "wait until nothing writes to it")
    else:
        name, identity = settings.corpus, KNOWN[settings.corpus]
        if name == "enwik8-1m":
            read = partial(_read, _SHIPPED, identity, name, "install gfrnn again")
        else:
            read = partial(_beginning, _BEGINNINGS.get(name, name), identity.size, root / "downloads")

    folder = root / "arrow" / "-".join([identity.md5, str(identity.size), *map(str, SPLIT.values())])
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with only_one(folder.with_name(folder.name + ".lock")):
                if not folder.is_dir():  # another process may have built it while this one waited
                    _build(folder, read())
        try:
            parts = {split: _mapped(folder / f"text-{split}.arrow") for split in SPLIT}
            md5 = hashlib.md5(usedforsecurity=False)
            for part in parts.values():
                md5.update(part.data)
            damaged = md5.hexdigest() != identity.md5
        except (OSError, ValueError, LookupError) as error:
            if getattr(error, "errno", None) not in (None, errno.ENOENT):  # what pyarrow finds out has no number
                raise
            damaged = True
        if damaged:
            raise UserError(f"{folder} is damaged; delete it, and it is built again")
        return Text(name, identity.md5, **parts)
    except OSError as error:
        raise UserError(
            f"cannot keep the corpus in {root}: {error.strerror}; make room there or give another folder, --data-dir"
        ) from error


def segments_per_epoch(size: int, rows: int, steps: int) -> int:
    """Segments of `steps` bytes that each of `rows` equal rows of a text holds; raises UserError if that is none."""
    segments = size // rows // steps
    if segments == 0:
        most = size // steps
        mend = f"use --rows of at most {most}" if most else f"use --steps of at most {size}, or a longer text"
        raise UserError(f"a training text of {size} bytes is too short for {rows} rows x {steps} steps: {mend}")
    return segments


def _name(path: Path, identity: Identity, expected: str) -> str:
    """The name of the text in `path`; raises UserError for one too short, or named enwik8 or text8 and not that."""
    if identity.size < MIN_BYTES:
        raise UserError(f"{path} holds {identity.size} bytes of text, too few to split: give at least {MIN_BYTES}")
    name = next((name for name, known in KNOWN.items() if known == identity), None)
    claimed = next((claim for claim in _FETCHED if path.name in _file_names(claim)), None)
    if claimed not in (None, name):
        raise UserError(
            f"{path} is not {claimed}: expected {KNOWN[claimed]}, found {identity}; "
            "fetch it again, or rename it if it is another text"
        )
    which = f"the whole of {name}" if name else f"not the whole of {expected}: a part of it or another text"
    log.info("%s is %s (%s)", path, which, identity)
    return name or path.name


def _file_names(name: str) -> list[str]:
    """What a fetched corpus' file may be called."""
    return [name + suffix for suffix in ("", ".zip", ".gz", ".xz")]


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process prepares the corpus (it holds %s); waiting for it", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# ------------------------------------------------------------------------------------------------- Arrow


def _build(folder: Path, text: bytearray) -> None:
    """Write `text`'s splits under `folder`, which appears when all of it is there."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on a hub
    import datasets
    import pyarrow as pa
    from datasets.builder import Key

    class ByteText(datasets.ArrowBasedBuilder):  # type: ignore[misc]  # datasets has no types
        """One row a split: the split's bytes."""

        def _info(self) -> datasets.DatasetInfo:
            return datasets.DatasetInfo(features=datasets.Features({"text": datasets.Value("large_binary")}))

        def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
            train_end = len(text) * SPLIT["train"] // 100
            valid_end = train_end + len(text) * SPLIT["valid"] // 100
            ends = {"train": (0, train_end), "valid": (train_end, valid_end), "test": (valid_end, len(text))}
            return [
                datasets.SplitGenerator(name=split, gen_kwargs={"start": start, "stop": stop})
                for split, (start, stop) in ends.items()
            ]

        def _generate_tables(self, start: int, stop: int) -> Iterator[tuple[Key, Any]]:
            offsets = pa.py_buffer(np.array([0, stop - start], np.int64))
            values = pa.py_buffer(text).slice(start, stop - start)  # no copy
            row = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, values])
            yield Key(0, 0), pa.table({"text": row})

    datasets.disable_progress_bars()
    try:
        ByteText(cache_dir=str(folder.parent), dataset_name="text").download_and_prepare(str(folder))
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None  # what really happened, such as a full disk


def _mapped(path: Path) -> Bytes:
    """The one row of an Arrow file as an array over the mapped file: uint8 [bytes], read-only, no copy."""
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    _, offsets, values = table.column("text").chunk(0).buffers()  # indexing the chunk would copy the row
    start, stop = np.frombuffer(offsets, np.int64, count=2)
    return np.frombuffer(values, np.uint8)[start:stop]


# ----------------------------------------------------------------------------------------------- reading


def _plain(path: Path) -> Iterator[bytes]:
    """The plain bytes of a file, whatever its name: .gz, .xz and .zip are known by their first bytes."""
    try:
        with path.open("rb") as file:
            if not file.seekable():
                raise UserError(f"{path} is a pipe, and it is read more than once: give a file")
            magic = file.read(6)
            file.seek(0)
            if magic.startswith(b"\x1f\x8b"):
                with gzip.open(file) as plain:
                    yield from _chunks(plain)
            elif magic == b"\xfd7zXZ\x00":
                with lzma.open(file) as plain:
                    yield from _chunks(plain)
            elif magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                with zipfile.ZipFile(file) as archive:
                    members = [member for member in archive.infolist() if not member.is_dir()]
                    if len(members) != 1:
                        raise UserError(f"{path} is a zip of {len(members)} files; it must hold exactly one, the text")
                    with archive.open(members[0]) as member:
                        yield from _chunks(member)
            else:
                yield from _chunks(file)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        # RuntimeError: a zip that is encrypted, or (NotImplementedError) compressed by a method unknown here
        raise UserError(f"{path} cannot be unpacked: truncated or damaged ({error}); copy or fetch it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; give a readable file") from error


def read_bytes(path: Path) -> Bytes:
    """The plain bytes of a file, uint8 [bytes]: .gz, .xz and .zip are unpacked. Raises UserError for an empty one."""
    text = b"".join(_plain(path))
    if not text:
        raise UserError(f"{path} is empty; give a file with text in it")
    return np.frombuffer(text, np.uint8)


def _chunks(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _identify(path: Path) -> Identity:
    size, md5 = 0, hashlib.md5(usedforsecurity=False)
    for chunk in _plain(path):
        size += len(chunk)
        md5.update(chunk)
    return Identity(size, md5.hexdigest())


def _read(path: Path, expected: Identity, what: str, mend: str) -> bytearray:
    """The plain bytes of `path`, which must be `expected`."""
    text = bytearray()
    for chunk in _plain(path):
        text += chunk
    found = Identity(len(text), hashlib.md5(text, usedforsecurity=False).hexdigest())
    if found != expected:
        raise UserError(f"{path} is not {what}: expected {expected}, found {found}; {mend}")
    return text


# ------------------------------------------------------------------------------------------- downloading


def _beginning(name: str, size: int, folder: Path) -> bytearray:
    """The first `size` bytes of a fetched corpus, which is checked as a whole."""
    text = _obtain(name, KNOWN[name], folder)
    del text[size:]  # in place: a slice would copy all of enwik8 where all of it is wanted
    return text


def _obtain(name: str, expected: Identity, folder: Path) -> bytearray:
    """The plain bytes of a corpus that lies in the downloads folder, or is fetched into it."""
    with only_one(folder.with_name(f".{name}.lock")):  # another corpus may be cut from the same
        for path in map(folder.joinpath, _file_names(name)):
            if path.exists():
                return _read(path, expected, name, "delete it, or give it with --corpus-file")
        return _fetch(name, expected, folder)


def _fetch(name: str, expected: Identity, folder: Path) -> bytearray:
    folder.mkdir(exist_ok=True)
    url = os.environ.get("GFRNN_CORPUS_URL", URL).rstrip("/") + f"/{name}.zip"
    target = folder / f"{name}.zip"
    part = folder / f"{name}.zip.part"
    mend = f"put {target.name} or {name} into {folder}, or give the text with --corpus-file"
    try:
        _download(url, part, mend)
        text = _read(part, expected, f"{name}, as fetched from {url}", mend)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return text


def _download(url: str, target: Path, mend: str) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress, target.open("wb") as file:
        task = progress.add_task(url, total=None)
        for position, total, chunk in _receive(url, mend):
            file.seek(position)
            file.write(chunk)
            progress.update(task, completed=position + len(chunk), total=total)


def _receive(url: str, mend: str) -> Iterator[tuple[int, int | None, bytes]]:
    """(position, total size, chunk) in order. After a break goes on from there, or from 0 if the server cannot."""
    position = 0
    reason = ""
    for wait in (0.0, *_BACK_OFF):
        time.sleep(wait)
        again = True
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={position}-"} if position else {})
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                if response.status != 206:
                    position = 0
                length = response.headers["Content-Length"]
                total = None if length is None else position + int(length)
                while chunk := response.read(_CHUNK):
                    yield position, total, chunk
                    position += len(chunk)
                if total is None or position == total:
                    return
                reason = f"connection broken after {position:,} of {total:,} bytes"  # read() ends without an error
        except urllib.error.HTTPError as error:
            reason, again = f"HTTP status {error.code}", error.code >= 500
        except urllib.error.URLError as error:  # no network, no such server: if it never worked, say so at once
            reason, again = str(error.reason), position > 0
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        except ValueError as error:  # GFRNN_CORPUS_URL is not a URL
            reason, again = str(error), False
        if not again:
            break
    raise UserError(f"cannot fetch {url}: {reason}; {mend}")
