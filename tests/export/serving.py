"""Starts the real server as a user would, and asks it things."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from launch import ROOT, as_from_a_terminal, environment


class Server:
    """export/serve.py at work."""

    def __init__(self, process: subprocess.Popen[str], url: str, first_line: str):
        self.process, self.url, self.first_line = process, url, first_line
        self.port = int(url.rsplit(":", 1)[1])

    def post(self, path: str, body: Any, *, key: str | None = None, timeout: float = 60) -> tuple[int, Any]:
        """(status, answer) of a JSON body, or of bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask(path, data, key=key, timeout=timeout)

    def ask(
        self, path: str, data: bytes | None = None, *, key: str | None = None, timeout: float = 60
    ) -> tuple[int, Any]:
        """(status, answer): JSON where it is, else text."""
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, content, kind = answer.status, answer.read(), answer.headers.get_content_type()
        except urllib.error.HTTPError as error:
            status, content, kind = error.code, error.read(), error.headers.get_content_type()
        return status, json.loads(content) if kind == "application/json" else content.decode()

    def complete(self, **body: Any) -> Any:
        """The answer to a completion request; fails if it is an error."""
        status, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        return answer

    def events(self, **body: Any) -> list[Any]:
        """The chunks of a streamed completion, without [DONE], which must be there."""
        status, text = self.post("/v1/completions", {**body, "stream": True})
        assert status == 200, text
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = self.ask("/metrics")[1]
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Until no row is in use and nothing waits."""
        until = time.monotonic() + seconds
        while True:
            health = self.ask("/healthz")[1]
            if health["rows_in_use"] == health["waiting"] == 0:
                return
            assert time.monotonic() < until, health
            time.sleep(0.02)

    def wait_for(self, metric: str, least: float) -> None:
        """Until a metric is so large."""
        until = time.monotonic() + 60
        while self.metric(metric) < least:
            assert time.monotonic() < until, metric
            time.sleep(0.02)

    @property
    def cpu_seconds(self) -> float:
        """That it has computed for so far: a busy machine adds little to them."""
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def open(self, body: Any, path: str = "/v1/completions") -> socket.socket:
        """A connection that has asked for something and not read anything yet."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection


@contextmanager
def serving(model: Path, *flags: str, **variables: str) -> Iterator[Server]:
    """A server with these flags, until the block ends."""
    command = [sys.executable, str(ROOT / "export/serve.py"), str(model), "--port", "0", "--threads", "1", *flags]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(**variables), preexec_fn=as_from_a_terminal
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://[\d.]+:\d+", line)
        assert found, line + process.stderr.read()
        yield Server(process, found[0], line)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def as_text(symbols: bytes) -> str:
    return symbols.decode(errors="replace")
