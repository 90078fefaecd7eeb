"""Corpora against a real server, real files and real processes that are killed."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import logging
import lzma
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gfrnn.config import DataSettings, UserError
from gfrnn.data import Text, corpus, load_text

PLAIN = np.random.default_rng(0).bytes(3_000_001)  # stands for enwik8 where a whole download is needed
IDENTITY = corpus.Identity(len(PLAIN), hashlib.md5(PLAIN).hexdigest())


def _zip(*texts: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, text in enumerate(texts):
            archive.writestr(f"text{number}", text)
    return file.getvalue()


def _name(value: str | bytes) -> str:
    """Of a test: archives have the time in them, and a test is called the same in every process."""
    return value if isinstance(value, str) else "content"


def _whole(text: Text) -> bytes:
    return b"".join(part.tobytes() for part in (text.train, text.valid, text.test))


class Server(http.server.ThreadingHTTPServer):
    """Serves `body`; can answer with an error, break the connection, hold it open, and continue from a range."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.body = _zip(PLAIN)
        self.statuses: list[int] = []  # of the next requests, in order; then 200
        self.cuts: list[int] = []  # of the next requests: so many bytes, then the connection breaks
        self.ranges = True
        self.hold: threading.Event | None = None  # before breaking the connection, wait for it
        self.requests: list[tuple[str, str | None]] = []
        self.asked = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/mirror"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.requests.append((self.path, self.headers["Range"]))
        status = server.statuses.pop(0) if server.statuses else 200
        if status != 200:
            return self.send_error(status)
        start = 0
        if server.ranges and (match := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")):
            start = int(match[1])
        body = server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)
        server.asked.set()
        if server.hold:
            server.hold.wait(300)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A mirror of what this process and its children take for enwik8."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("GFRNN_CORPUS_URL", server.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setitem(corpus.KNOWN, "enwik8", IDENTITY)
        monkeypatch.setattr(corpus, "_BACK_OFF", (0.05, 0.05, 0.05))
        yield server
        if server.hold:
            server.hold.set()
        server.shutdown()
        thread.join()


def _load(data_dir: Path, **settings: object) -> Text:
    return load_text(DataSettings(data_dir=data_dir, **settings))  # type: ignore[arg-type]


def _refused(data_dir: Path, **settings: object) -> str:
    with pytest.raises(UserError) as error:
        _load(data_dir, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- texts


def test_the_shipped_text_is_what_its_page_says(tmp_path: Path) -> None:
    text = _load(tmp_path, corpus="enwik8-1m")
    assert (text.name, text.md5) == ("enwik8-1m", "83a2cefd8ca00049e0445542dabd25a0")
    assert (len(text.train), len(text.valid), len(text.test)) == (900_000, 50_000, 50_000)
    assert hashlib.md5(_whole(text)).hexdigest() == text.md5
    assert text.train[:10].tobytes() == b"<mediawiki"
    page = Path(corpus.__file__).with_name("enwik8-1m.md").read_text()
    assert text.md5 in page
    assert "1,000,000" in page


def test_arrays_are_the_mapped_file_itself(tmp_path: Path) -> None:
    import pyarrow as pa

    before = pa.total_allocated_bytes()
    text = _load(tmp_path, corpus="enwik8-1m")
    assert pa.total_allocated_bytes() == before
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    for split in ("train", "valid", "test"):
        array = getattr(text, split)
        assert array.dtype == np.uint8
        assert not array.flags.writeable
        spans = [span.split("-") for span, *_, path in maps if path.endswith(f"text-{split}.arrow")]
        begin = array.__array_interface__["data"][0]
        assert any(int(low, 16) <= begin and begin + len(array) <= int(high, 16) for low, high in spans)


def test_a_data_dir_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(_load(Path("~/kept"), corpus="enwik8-1m").train) == 900_000
    assert (tmp_path / "kept" / "arrow").is_dir()


@pytest.mark.parametrize("size", [1000, 1001, 1019, 4099])
def test_the_split_is_90_5_5_in_order(size: int, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(PLAIN[:size])
    text = _load(tmp_path, corpus_file=path)
    assert (len(text.train), len(text.valid)) == (size * 90 // 100, size * 5 // 100)
    assert _whole(text) == PLAIN[:size]
    assert text.name == "mine.txt"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, _zip])
def test_a_corpus_file_is_known_by_its_content(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    plain = _load(tmp_path, corpus_file=_write(tmp_path / "plain", PLAIN[:50_000]))
    text = _load(tmp_path, corpus_file=_write(tmp_path / "misleading.xz.gz.zip.txt", pack(PLAIN[:50_000])))
    assert _whole(text) == PLAIN[:50_000]
    assert text.md5 == plain.md5 == hashlib.md5(PLAIN[:50_000]).hexdigest()
    assert sum(path.is_dir() for path in (tmp_path / "arrow").iterdir()) == 1  # the same text is kept once


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_file_with_new_content_is_a_new_text(tmp_path: Path) -> None:
    path = _write(tmp_path / "mine", PLAIN[:2000])
    stat = path.stat()
    first = _load(tmp_path, corpus_file=path)
    _write(path, PLAIN[2000:4000])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same path, size and time
    assert _whole(_load(tmp_path, corpus_file=path)) == PLAIN[2000:4000]
    assert _whole(first) == PLAIN[:2000]


def test_a_corpus_file_is_said_to_be_the_whole_corpus_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gfrnn.data.corpus")
    monkeypatch.setitem(corpus.KNOWN, "enwik8", IDENTITY)
    assert _load(tmp_path, corpus_file=_write(tmp_path / "part", PLAIN[:-1])).name == "part"
    assert "part is not the whole of enwik8" in caplog.text
    caplog.clear()
    assert _load(tmp_path, corpus_file=_write(tmp_path / "all", PLAIN)).name == "enwik8"
    assert "all is the whole of enwik8" in caplog.text


@pytest.mark.parametrize("name", ["enwik8", "enwik8.xz", "text8.gz"])
def test_a_file_named_as_a_corpus_must_be_it(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, lzma.compress(PLAIN) if name.endswith(".xz") else PLAIN)
    error = _refused(tmp_path / "kept", corpus_file=path)
    assert f"{path} is not {name.split('.')[0]}: expected 100,000,000 bytes with MD5" in error
    assert f"found {IDENTITY}; fetch it again, or rename it" in error
    assert not (tmp_path / "kept" / "arrow").exists()
    assert _load(tmp_path / "kept", corpus_file=path.rename(tmp_path / "mine")).name == "mine"


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "missing", "zeros"])
def test_a_damaged_arrow_file(tmp_path: Path, damage: str) -> None:
    path = _write(tmp_path / "text", PLAIN[:5000])
    _load(tmp_path, corpus_file=path)
    (arrow,) = (tmp_path / "arrow").rglob("text-valid.arrow")
    content = arrow.read_bytes()
    if damage == "missing":
        arrow.unlink()
    else:
        zeros = content.replace(PLAIN[4600:4700], bytes(100))  # of the right length
        assert zeros != content
        damaged = {"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\xff" * 1000, "zeros": zeros}
        arrow.write_bytes(damaged[damage])
    assert f"{arrow.parent} is damaged; delete it, and it is built again" in _refused(tmp_path, corpus_file=path)


def test_importing_is_cheap_and_a_built_text_needs_no_datasets(tmp_path: Path) -> None:
    _load(tmp_path, corpus="enwik8-1m")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code = (
        "import sys, pathlib, gfrnn.data as data; from gfrnn.config import DataSettings\n"
        "assert not {'torch', 'datasets', 'pyarrow', 'rich'} & set(sys.modules)\n"
        "data.load_text(DataSettings(corpus='enwik8-1m', data_dir=pathlib.Path(sys.argv[1])))\n"
        "assert not {'torch', 'datasets'} & set(sys.modules)\n"
        "assert data.Streams.__name__ == 'Streams' and 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


# ------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds 0 bytes of text, too few"),
        (PLAIN[:999], "holds 999 bytes of text, too few"),
        (gzip.compress(b""), "holds 0 bytes of text, too few"),
        (gzip.compress(PLAIN[:9000])[:5000], "truncated or damaged"),
        (gzip.compress(PLAIN[:9000])[:-4] + b"xxxx", "truncated or damaged"),
        (gzip.compress(PLAIN[:9000]).replace(PLAIN[100:104], b"\xff" * 4), "truncated or damaged"),
        (lzma.compress(PLAIN[:9000])[:5000], "truncated or damaged"),
        (lzma.compress(PLAIN[:9000])[:30] + bytes(9000), "truncated or damaged"),
        (_zip(PLAIN[:9000])[:5000], "truncated or damaged"),
        (_zip(PLAIN[:9000]).replace(PLAIN[100:104], b"\xff" * 4), "truncated or damaged"),
        (_zip(PLAIN[:9000], PLAIN[:10]), "is a zip of 2 files; it must hold exactly one"),
        (_zip(), "is a zip of 0 files; it must hold exactly one"),
    ],
    ids=_name,
)
def test_a_bad_corpus_file_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "bad", content)
    assert message in (error := _refused(tmp_path / "kept", corpus_file=path))
    assert str(path) in error
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nowhere/at/all", "No such file or directory"),
        ("/proc", "Is a directory"),
        ("/proc/self/mem", "Input/output error"),  # a file that even root cannot read
    ],
)
def test_an_unreadable_corpus_file_is_one_line(path: str, reason: str, tmp_path: Path) -> None:
    assert f"{path} cannot be read: {reason}" in _refused(tmp_path, corpus_file=Path(path))


def test_a_pipe_is_no_corpus_file(tmp_path: Path) -> None:
    ends = os.pipe()
    try:
        os.write(ends[1], PLAIN[:5000])
        assert "is a pipe" in _refused(tmp_path, corpus_file=Path(f"/dev/fd/{ends[0]}"))
    finally:
        for end in ends:
            os.close(end)


@pytest.mark.parametrize(("folder", "reason"), [("file/below", "Not a directory"), ("/proc/kept", "No such file")])
def test_an_unwritable_data_dir_is_one_line(folder: str, reason: str, tmp_path: Path) -> None:
    _write(tmp_path / "file", b"")
    error = _refused(tmp_path / folder, corpus="enwik8-1m")
    assert f"cannot keep the corpus in {tmp_path / folder}: {reason}" in error
    assert "--data-dir" in error


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses to write on, at a file size here, which needs no root; the path is that of a full disk."""
    child = _child(tmp_path, "enwik8-1m", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000,) * 2))
    _, error = child.communicate(timeout=60)
    assert f"cannot keep the corpus in {tmp_path}: File too large; make room there" in error
    assert child.returncode == 2
    assert not [path for path in (tmp_path / "arrow").iterdir() if path.is_dir()]
    assert len(_load(tmp_path, corpus="enwik8-1m").train) == 900_000


# -------------------------------------------------------------------------------------------- downloading


def test_a_corpus_is_fetched_once(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _whole(_load(tmp_path)) == PLAIN
    out, err = capfd.readouterr()
    assert out == ""
    assert "/enwik8.zip" in err
    assert os.listdir(tmp_path / "downloads") == ["enwik8.zip"]
    assert _load(tmp_path).name == "enwik8"
    assert server.requests == [("/mirror/enwik8.zip", None)]
    assert capfd.readouterr() == ("", "")


def test_the_beginning_of_a_corpus_is_cut_from_the_whole(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(PLAIN) // 3
    cut = corpus.Identity(size, hashlib.md5(PLAIN[:size]).hexdigest())
    monkeypatch.setitem(corpus.KNOWN, "enwik8-4m", cut)
    text = _load(tmp_path, corpus="enwik8-4m")
    assert (text.name, text.md5, _whole(text)) == ("enwik8-4m", cut.md5, PLAIN[:size])
    assert _whole(_load(tmp_path)) == PLAIN
    assert server.requests == [("/mirror/enwik8.zip", None)]
    assert _load(tmp_path, corpus_file=_write(tmp_path / "mine", PLAIN[:size])).name == "enwik8-4m"


def test_a_broken_download_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.cuts = [1_500_000, 1_000_000]
    assert _whole(_load(tmp_path)) == PLAIN
    assert [asked for _, asked in server.requests] == [None, "bytes=1500000-", "bytes=2500000-"]


def test_a_broken_download_starts_again_where_the_server_knows_no_ranges(server: Server, tmp_path: Path) -> None:
    server.cuts, server.ranges, server.statuses = [1_500_000, 0], False, [200, 503]
    assert _whole(_load(tmp_path)) == PLAIN
    assert len(server.requests) == 4


def test_a_download_that_always_breaks_is_given_up(server: Server, tmp_path: Path) -> None:
    server.cuts, server.ranges = [2_000_000] * 9, False
    error = _refused(tmp_path)
    assert f"cannot fetch {server.url}/enwik8.zip: connection broken after 2,000,000 of 3," in error
    assert len(server.requests) == 4
    assert os.listdir(tmp_path / "downloads") == []


def test_a_missing_page_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [404]
    assert f"cannot fetch {server.url}/enwik8.zip: HTTP status 404; put enwik8.zip or enwik8 into" in _refused(tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (_zip(PLAIN[:-1] + b"?"), f"expected {IDENTITY}, found 3,000,001 bytes with MD5 "),
        (_zip(PLAIN[:-1]), f"expected {IDENTITY}, found 3,000,000 bytes with MD5 "),
        (b"<html>log in to this network first</html>", "found 41 bytes with MD5 "),
        (b"", "found 0 bytes with MD5 "),
        (_zip(PLAIN)[:-100], "truncated or damaged"),
    ],
)
def test_a_wrong_download_is_refused_and_not_kept(server: Server, body: bytes, message: str, tmp_path: Path) -> None:
    server.body = body
    assert message in _refused(tmp_path)
    assert os.listdir(tmp_path / "downloads") == []
    server.body = _zip(PLAIN)
    assert _whole(_load(tmp_path)) == PLAIN


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "http://no-such-host.invalid/", "no url", "foo://bar", "http://["]
)
def test_without_a_network_one_line_says_what_to_do(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setenv("GFRNN_CORPUS_URL", url)
    error = _refused(tmp_path)
    assert f"cannot fetch {url.rstrip('/')}/enwik8.zip: " in error
    assert f"put enwik8.zip or enwik8 into {tmp_path}/downloads, or give the text with --corpus-file" in error


@pytest.mark.parametrize(
    ("name", "content"),
    [("enwik8", PLAIN), ("enwik8.zip", _zip(PLAIN)), ("enwik8.gz", gzip.compress(PLAIN)), ("enwik8.zip", PLAIN)],
    ids=_name,
)
def test_a_file_put_by_hand_is_used(server: Server, name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    _write(tmp_path / "downloads" / name, content[:-1])
    error = _refused(tmp_path)
    assert str(tmp_path / "downloads" / name) in error
    assert "truncated" in error or "delete it, or give it with --corpus-file" in error
    _write(tmp_path / "downloads" / name, content)
    assert _whole(_load(tmp_path)) == PLAIN
    assert server.requests == []


# ---------------------------------------------------------------------------------------------- processes

CHILD = """
import logging, os, signal, sys
from pathlib import Path
from gfrnn.config import DataSettings, UserError
from gfrnn.data import corpus

data_dir, name, event, ending, size, md5, beginning = sys.argv[1:]
logging.basicConfig(level=logging.INFO)
corpus.KNOWN["enwik8"] = corpus.Identity(int(size), md5)
corpus.KNOWN["enwik8-4m"] = corpus.Identity(1_000_000, beginning)

def die(now, arguments):
    if now == event and str(arguments[0]).endswith(ending):
        os.kill(os.getpid(), signal.SIGKILL)

if event:
    sys.addaudithook(die)
try:
    text = corpus.load_text(DataSettings(data_dir=Path(data_dir), corpus=name))
except UserError as error:
    sys.exit(print(error, file=sys.stderr) or 2)
print(text.md5, len(text.train), len(text.valid), len(text.test))
"""
LOADED = f"{IDENTITY.md5} 2700000 150000 150001\n"
BEGINNING = hashlib.md5(PLAIN[:1_000_000]).hexdigest()


def _child(
    data_dir: Path, name: str = "enwik8", die_at: tuple[str, str] = ("", ""), **options: object
) -> subprocess.Popen[str]:
    """A process that loads a text; with die_at it kills itself, as kill -9 does, just before it does that."""
    command = [sys.executable, "-c", CHILD, data_dir, name, *die_at, str(IDENTITY.size), IDENTITY.md5, BEGINNING]
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_of_several_processes_one_works_and_the_others_wait(server: Server, tmp_path: Path) -> None:
    children = [_child(tmp_path) for _ in range(3)]
    results = [child.communicate(timeout=60) for child in children]
    assert [out for out, _ in results] == [LOADED] * 3
    assert len(server.requests) == 1
    assert sum("/enwik8.zip" in err for _, err in results) == 1  # progress, from the one that downloads


def test_a_waiting_process_takes_over_from_one_that_is_killed(server: Server, tmp_path: Path) -> None:
    server.cuts, server.hold = [2_000_000], threading.Event()
    first = _child(tmp_path)
    assert server.asked.wait(60)  # 2 of 3 MB are sent, and nothing more comes
    second = _child(tmp_path)
    assert second.stderr
    assert "another process prepares the corpus" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    assert first.communicate(timeout=60)[0] == ""
    assert first.returncode == -signal.SIGKILL
    server.hold.set()
    assert second.communicate(timeout=60)[0] == LOADED
    assert [asked for _, asked in server.requests] == [None, None]
    assert os.listdir(tmp_path / "downloads") == ["enwik8.zip"]


def test_corpora_that_are_cut_from_the_same_are_fetched_once(server: Server, tmp_path: Path) -> None:
    server.cuts, server.hold = [2_000_000], threading.Event()
    whole = _child(tmp_path)
    assert server.asked.wait(60)
    beginning = _child(tmp_path, "enwik8-4m")
    assert beginning.stderr
    assert "another process prepares the corpus" in beginning.stderr.readline()
    server.hold.set()
    assert whole.communicate(timeout=60)[0] == LOADED
    assert beginning.communicate(timeout=60) == (f"{BEGINNING} 900000 50000 50000\n", "")


@pytest.mark.parametrize(
    ("die_at", "downloads"),
    [
        (("os.rename", "enwik8.zip.part"), 2),  # fetched and checked, not yet renamed
        (("open", "text-valid-00000-00000-of-NNNNN.arrow"), 1),  # train is built, valid begins
        (("open", "dataset_info.json"), 1),
        (("shutil.move", ".incomplete"), 1),  # all built, not yet renamed
    ],
)
def test_a_builder_killed_at_any_moment_leaves_nothing_to_trust_or_wait_for(
    die_at: tuple[str, str], downloads: int, server: Server, tmp_path: Path
) -> None:
    child = _child(tmp_path, die_at=die_at)
    _, error = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, error
    assert _whole(_load(tmp_path)) == PLAIN
    assert len(server.requests) == downloads
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("*.incomplete"))
