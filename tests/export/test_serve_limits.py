"""What the server refuses, and how it starts and ends: limits, a key, hostile input, signals."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from exported import encoder_decoder, language_model, save_programs, save_step
from serving import Server, as_text, serving

from gfrnn_onnx import Session
from gfrnn_onnx.runner import Step
from gfrnn_onnx.server import app, completions
from gfrnn_onnx.server.app import Service, make_app
from gfrnn_onnx.server.limits import Gate, Limits
from launch import BIN, ROOT, environment


def test_limits_have_clear_answers(model: Path) -> None:
    flags = "--max-prompt-bytes 50 --max-tokens 1000000 --max-sequences 4 --max-body-bytes 5000 --rows 1"
    with serving(model, *flags.split(), "--max-waiting", "1", "--body-seconds", "2", "--request-seconds", "4") as small:
        for body, status, message in (
            ({"prompt": "x" * 51}, 400, "a prompt of 51 bytes is longer than 50"),
            ({"prompt": "x", "max_tokens": 1000001}, 400, "max_tokens is 1000001; at most 1000000"),
            ({"prompt": ["x"] * 5}, 400, "5 texts with n=1 are more than 2 sequences"),  # for more there is never room
            ({"prompt": "x" * 6000}, 413, "larger than 5000 bytes"),
        ):
            found, error = small.post("/v1/completions", body)
            assert (found, message in error["error"]["message"]) == (status, True), error
        status, error = small.post("/v1/score", {"text": "x" * 51})
        assert (status, error["error"]["param"]) == (400, "text")

        # one has the row, one waits, the third is told to come again; OpenAI's client does
        busy = [small.open({"prompt": "x", "max_tokens": 1000000}) for _ in range(2)]
        small.wait_for("gfrnn_rows", 1)
        small.wait_for("gfrnn_waiting", 1)
        status, error = small.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
        if status == 200:  # they were quicker than we
            pytest.fail("the rows were free already")
        assert (status, error["error"]["type"]) == (429, "rate_limit_error")
        patient = openai.OpenAI(base_url=f"{small.url}/v1", api_key="any", max_retries=8)
        assert patient.completions.create(model="small", prompt="x", max_tokens=1).usage.completion_tokens == 1
        for connection in busy:
            connection.close()
        small.wait_until_idle()

        # a body that does not come
        with socket.create_connection(("127.0.0.1", small.port)) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        # one that says no length and does not end
        with socket.create_connection(("127.0.0.1", small.port)) as endless:
            endless.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            answer = b""
            try:
                for _ in range(100):
                    endless.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
                answer = endless.recv(1000)
            except (BrokenPipeError, ConnectionResetError):
                pass
            assert answer.startswith(b"HTTP/1.1 413 ") or not answer


def test_a_request_that_takes_too_long(tmp_path: Path) -> None:
    big = save_step(language_model(), tmp_path / "m.onnx")
    with serving(big, "--request-seconds", "0.3", "--max-tokens", "1000000") as hasty:
        status, error = hasty.post("/v1/completions", {"prompt": "x", "max_tokens": 1000000})
        assert (status, error["error"]["code"]) == (408, "timeout")
        status, text = hasty.post("/v1/completions", {"prompt": "x", "max_tokens": 1000000, "stream": True})
        assert status == 200
        assert json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        hasty.wait_until_idle()
    with serving(big, "--request-seconds", "0.3", "--max-tokens", "1000000", "--rows", "1") as hasty:
        both = {"prompt": ["x", "y"], "max_tokens": 300_000, "echo": True, "logprobs": 1, "stream": True}
        status, text = hasty.post("/v1/completions", both)  # of the second nothing has come
        assert status == 200
        assert json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_key(model: Path) -> None:
    with serving(model, GFRNN_API_KEY="let-me-in") as locked:
        assert "let-me-in" not in locked.first_line
        for key, expected in ((None, 401), ("wrong", 401), ("let-me-in", 200)):
            assert locked.post("/v1/completions", {"prompt": "x"}, key=key)[0] == expected
            assert locked.ask("/v1/models", key=key)[0] == expected
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            openai.OpenAI(base_url=f"{locked.url}/v1", api_key="x").models.list()
        assert locked.ask("/healthz")[0] == 200


def test_sigterm_finishes_what_runs(model: Path, session: Session) -> None:
    with serving(model) as stopping:
        expected = as_text(session.generate(b"last", 3000, seed=8))
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(stopping.complete, prompt="last", max_tokens=3000, seed=8)
            stopping.wait_for("gfrnn_step_rows_total", 1)
            stopping.process.send_signal(signal.SIGTERM)
            assert last.result()["choices"][0]["text"] == expected
        assert stopping.process.wait(60) == 0
        assert "stopped" in stopping.process.stderr.read()


@pytest.mark.parametrize("limit", [["--request-seconds", "2"], ["--idle-seconds", "1"]], ids="".join)
def test_who_never_reads_holds_up_no_end(limit: list[str], tmp_path: Path) -> None:
    big = save_step(language_model(), tmp_path / "m.onnx")
    with serving(big, *limit, "--max-tokens", "1000000") as stopping:
        deaf = stopping.open({"prompt": "x", "max_tokens": 1000000, "logprobs": 0, "stream": True})
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        time.sleep(1)
        stopping.process.send_signal(signal.SIGTERM)
        assert stopping.process.wait(60) == 0
        deaf.close()


def test_a_second_signal_ends_at_once(model: Path) -> None:
    with serving(model, "--max-tokens", "1000000") as stopping:
        connection = stopping.open({"prompt": "x", "max_tokens": 1000000, "n": 50})
        stopping.wait_for("gfrnn_rows", 50)
        stopping.process.send_signal(signal.SIGTERM)
        assert stopping.process.stderr.readline().startswith("stopping: ")
        assert stopping.process.poll() is None
        stopping.process.send_signal(signal.SIGTERM)
        assert stopping.process.wait(30) == 128 + signal.SIGTERM  # long before it would have been done
        connection.close()


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{{{",
    "half of it": b'{"prompt": "x',
    "no object": b"[1, 2]",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "half a pair as a name": b'{"\\ud800": 1}',
    "half a pair as the model": b'{"model": "\\udfff", "prompt": "x"}',
    "half a pair as the state": b'{"state": "\\udfff", "prompt": "x"}',
    "half a pair as a stop": b'{"prompt": "x", "stop": "\\ud800"}',
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": Infinity}',
    "a huge number": b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    "a huge float": b'{"prompt": "x", "max_tokens": 1e999}',
    "a negative count": b'{"prompt": "x", "max_tokens": -1}',
    "a fraction": b'{"prompt": "x", "max_tokens": 1.5}',
    "true as a number": b'{"prompt": "x", "max_tokens": true}',
    "a text as a number": b'{"prompt": "x", "max_tokens": "5"}',
    "n of 0": b'{"prompt": "x", "n": 0}',
    "an id too large": b'{"prompt": [1, 257]}',
    "a start in the middle": b'{"prompt": [1, 256]}',
    "a negative id": b'{"prompt": [-1]}',
    "a mixture": b'{"prompt": ["a", 1]}',
    "no prompt at all": b'{"prompt": []}',
    "an object as prompt": b'{"prompt": {"a": 1}}',
    "an empty stop": b'{"prompt": "x", "stop": ""}',
    "many stops": json.dumps({"prompt": "x", "stop": [*"abcdefghijklmnopq"]}).encode(),
    "a long stop": json.dumps({"prompt": "x", "stop": "x" * 1025}).encode(),
    "a long unknown name": b'{"prompt": "x", "%s": 1}' % (b"x" * 100_000),
    "logprobs of too much": json.dumps({"prompt": "x", "logprobs": 20, "max_tokens": 16384, "n": 6}).encode(),
    "too many logprobs": b'{"prompt": "x", "logprobs": 300}',
    "unknown field": b'{"prompt": "x", "prompts": "y"}',
    "seed of a float": b'{"prompt": "x", "seed": 0.5}',
    "top_p of 0": b'{"prompt": "x", "top_p": 0}',
    "10 MB": b'{"prompt": "' + b"x" * 10_000_000 + b'"}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_input(case: str, server: Server) -> None:
    status, error = server.post("/v1/completions", HOSTILE[case])
    assert 400 <= status < 500, error
    assert set(error) == {"error"}
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert isinstance(error["error"]["message"], str)
    assert len(error["error"]["message"]) < 1000
    assert server.complete(prompt="x", max_tokens=1)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("body", [b"300", b'"\\ud800"', b"[300]", b"null"])
def test_a_list_of_mistakes_costs_no_more_than_one(body: bytes, server: Server) -> None:
    before = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    begin = server.cpu_seconds
    for name in (b"prompt", b"stop"):
        status, error = server.post(
            "/v1/completions", b'{"%s": [%s]}' % (name, b",".join([body] * (900_000 // len(body) // 2)))
        )
        assert status == 400, error
    biases = b",".join(b'"%x":%s' % (k, body) for k in range(900_000 // (len(body) + 8)))
    status, error = server.post("/v1/completions", b'{"logit_bias": {%s}}' % biases)
    assert (status, error["error"]["param"]) == (400, "logit_bias")
    assert server.cpu_seconds - begin < 5
    after = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    assert (int(after) - int(before)) * os.sysconf("SC_PAGE_SIZE") < 200 << 20


def test_a_name_that_is_unknown_is_the_only_one_read(server: Server) -> None:
    begin = server.cpu_seconds
    status, error = server.post("/v1/completions", {f"field {k}": 1 for k in range(50_000)})
    assert (status, error["error"]["message"]) == (400, "Unrecognized request argument supplied: field 0")
    assert server.cpu_seconds - begin < 1
    status, error = server.post("/v1/completions", {"x" * 500_000: 1})
    assert status == 400
    assert len(error["error"]["param"]) < 2000


def test_a_report_on_too_much(model: Path) -> None:
    with serving(model, "--max-values", "100") as small:
        assert small.post("/v1/score", {"text": "x" * 50})[0] == 200
        status, error = small.post("/v1/score", {"text": ["x" * 50, "y"]})
        assert (status, error["error"]["param"]) == (400, "text")
        assert small.post("/v1/completions", {"prompt": "x", "max_tokens": 1000})[0] == 200  # reports on none


def test_other_paths_have_error_bodies_too(server: Server) -> None:
    for path, data, status in (
        ("/v1/nothing", None, 404),
        ("/v1/completions", None, 405),
        ("/v1/models/%00", None, 404),
    ):
        found, error = server.ask(path, data)
        assert (found, set(error)) == (status, {"error"})


def test_what_is_no_http_has_an_error_body_too(model: Path) -> None:
    head = b"/v1/nothing HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade\r\n"
    with serving(model) as asked:

        def answer(request: bytes) -> tuple[bytes, Any]:
            with socket.create_connection(("127.0.0.1", asked.port), timeout=60) as client:
                client.sendall(request)
                found, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
            return found.split()[1], json.loads(body)

        for request in (b"hello\r\n\r\n", b"POST " + head + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n"):
            status, error = answer(request)
            assert (status, error["error"]["type"]) == (b"400", "invalid_request_error")
        status, error = answer(b"GET " + head + b"Upgrade: websocket\r\n\r\n")
        assert (status, error["error"]["type"]) == (b"404", "not_found_error")
        asked.process.send_signal(signal.SIGTERM)
        log = asked.process.stderr.read().splitlines()
    assert [line for line in log if not line.startswith(("stop", "WARNING:  Invalid HTTP"))] == []


def test_out_of_descriptors_new_clients_wait(model: Path) -> None:
    """And are told of in a line each second, until there are some again."""
    with serving(model) as short:
        process = psutil.Process(short.process.pid)
        assert short.ask("/healthz")[0] == 200
        process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 20, process.rlimit(psutil.RLIMIT_NOFILE)[1]))
        begin = time.monotonic()
        crowd = [socket.create_connection(("127.0.0.1", short.port)) for _ in range(60)]
        line = "new clients wait: Too many open files\n"
        assert short.process.stderr.readline() == line
        for each in crowd:
            each.close()
        assert short.ask("/healthz")[0] == 200
        short.process.send_signal(signal.SIGTERM)
        assert short.process.stderr.read().count(line) <= time.monotonic() - begin


def test_a_thousand_connections(server: Server) -> None:
    async def ask(k: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            if k % 3 == 0:  # says nothing
                await asyncio.sleep(1)
                return b""
            body = json.dumps({"prompt": f"{k}", "max_tokens": 4}).encode()
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return await asyncio.wait_for(reader.readline(), 60)
        finally:
            writer.close()

    async def all_of_them() -> list[bytes]:
        return await asyncio.gather(*(ask(k) for k in range(1000)))

    answers = asyncio.run(all_of_them())
    statuses = {answer.split()[1] for answer in answers if answer}
    assert statuses <= {b"200", b"429"}
    assert b"200" in statuses
    server.wait_until_idle()
    assert server.complete(prompt="x", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_threads_do_not_share_a_mistake(server: Server) -> None:
    """Errors and successes side by side."""
    results: list[int] = []

    def ask(k: int) -> None:
        body = {"prompt": "x", "max_tokens": 5} if k % 2 else {"prompt": "x", "max_tokens": -5}
        results.append(server.post("/v1/completions", body)[0])

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [200] * 20 + [400] * 20


def test_schemathesis_finds_no_fault(model: Path) -> None:
    """What the schema allows and what it does not: never a 5xx, never an answer that the schema does not have."""
    with serving(model, "--max-tokens", "50") as tried:
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        command = [str(BIN / "schemathesis"), "run", f"{tried.url}/openapi.json", "-c", checks, "--seed", "1"]
        command += ["--max-examples", "40", "--no-color"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=model.parent)
        assert done.returncode == 0, done.stdout
        generated = re.search(r"(\d+) generated", done.stdout)
        assert generated
        assert int(generated[1]) > 300
        tried.wait_until_idle()


def refusal(*flags: str | Path) -> str:
    command = [sys.executable, str(ROOT / "export/serve.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    return done.stderr


def test_what_cannot_be_served_is_one_line(server: Server, model: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.onnx").write_bytes(model.read_bytes()[:5000])
    (tmp_path / "text.onnx").write_bytes(b"hello")
    programs = save_programs(encoder_decoder(), tmp_path / "programs")
    for flags, message in (
        ([tmp_path / "none.onnx"], "is not there"),
        ([tmp_path / "torn.onnx"], "cannot be loaded"),
        ([programs], "only models of text are served"),
        ([programs / "decoder.onnx"], "half of a model of programs"),
        ([model, "--port", str(server.port)], f"cannot listen at 127.0.0.1:{server.port}"),
        ([model, "--port", "0", "--host", "127.0.0..1"], "cannot listen at 127.0.0..1:0"),
        ([model, "--port", "0", "--api-key", " "], "the key (--api-key, or GFRNN_API_KEY) is empty"),
        ([model, "--port", "0", "--api-key", "\udcff"], "the key (--api-key, or GFRNN_API_KEY) is not UTF-8"),
        ([model, "--name", "\udcff"], "is not UTF-8; give another name"),
        ([shutil.copy(model, tmp_path / "\udcff.onnx")], "its name is not UTF-8"),
        ([model, "--rows", "0"], "--rows is 0; it must be from 1"),
        ([model, "--idle-seconds", "0"], "--idle-seconds is 0.0; it must be from 0.001"),
        ([model, "--provider", "cuda"], "CUDA cannot be used here"),
        ([model, "--prot", "1"], "did you mean --port"),
    ):
        assert message in refusal(*flags)


def test_the_server_needs_no_torch(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps


# ------------------------------------------------------------------------------------- clients that stall


@pytest.fixture(scope="module")
def hasty(model: Path) -> Iterator[Server]:
    with serving(model, "--idle-seconds", "2", "--max-body-bytes", "16000000") as started:
        yield started


def test_half_a_head_is_not_waited_for(hasty: Server) -> None:
    with (
        socket.create_connection(("127.0.0.1", hasty.port), timeout=60) as silent,
        socket.create_connection(("127.0.0.1", hasty.port), timeout=60) as slow,
    ):
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: ")
        until = time.monotonic() + 60
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < until:
                slow.sendall(b"x")  # a little more of it comes all the time
                time.sleep(0.1)
        assert time.monotonic() < until
        assert silent.recv(100) == b""


def test_who_reads_nothing_of_a_large_answer_is_cut(hasty: Server) -> None:
    process = psutil.Process(hasty.process.pid)
    deaf = hasty.open({"prompt": "x" * 9_000_000}, "/tokenize")  # 36 MB of ids
    own = deaf.getsockname()[1]
    received = len(deaf.recv(1))
    held = 0
    until = time.monotonic() + 60
    while any(each.raddr and each.raddr.port == own for each in process.net_connections()):
        held = max(held, process.memory_info().rss)
        assert time.monotonic() < until
        time.sleep(0.05)
    assert held - process.memory_info().rss > 20 << 20
    with suppress(ConnectionResetError):
        while part := deaf.recv(1 << 20):
            received += len(part)
    assert received < 18_000_000  # what was on its way
    deaf.close()


def test_who_reads_slowly_gets_it_all(hasty: Server) -> None:
    slow = hasty.open({"prompt": "x" * 1_000_000}, "/tokenize")
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
    begin, answer = time.monotonic(), bytearray()
    while part := slow.recv(1 << 17):
        answer += part
        time.sleep(0.12)
    slow.close()
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(body)["tokens"] == [ord("x")] * 1_000_000
    assert time.monotonic() - begin > 3


def test_a_connection_that_asks_again_stays(hasty: Server) -> None:
    kept = http.client.HTTPConnection("127.0.0.1", hasty.port, timeout=60)
    for _ in range(4):
        kept.request("GET", "/healthz")  # fails where the server has closed it
        assert json.loads(kept.getresponse().read())["status"] == "ok"
        time.sleep(1)
    assert kept.sock is not None
    assert kept.sock.recv(1) == b""  # asked nothing more
    kept.close()


# ------------------------------------------------------------------------------------ in this process


async def ask(served: Gate, path: str, body: Any = None) -> tuple[int, Any]:
    """(status, JSON) that an application answers."""
    scope: dict[str, Any] = {"type": "http", "http_version": "1.1", "scheme": "http", "root_path": "", "headers": []}
    scope |= {"method": "GET" if body is None else "POST", "path": path, "query_string": b""}
    coming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    answer: list[Any] = []

    async def receive() -> Any:
        if not coming:
            await asyncio.Event().wait()
        return coming.pop()

    async def send(message: Any) -> None:
        answer.append(message)

    await served(scope, receive, send)
    return answer[0]["status"], json.loads(b"".join(message["body"] for message in answer[1:]))


@asynccontextmanager
async def application(model: Path, **limits: Any) -> AsyncIterator[Gate]:
    service = Service(Step(model, "cpu", threads=1), "small", Limits(**limits))
    served = make_app(service)
    service.engine.start()
    try:
        async with asyncio.timeout(60):
            yield served
    finally:
        service.engine.close()


@pytest.mark.parametrize(
    ("path", "given", "owner", "name"),
    [
        ("/v1/completions", "prompt", completions, "decode"),
        ("/v1/completions", "prompt", completions.Completion, "model_dump_json"),
        ("/v1/score", "text", app, "_score"),
        ("/v1/score", "text", app.ScoreAnswer, "model_dump_json"),
        ("/tokenize", "prompt", app.Tokens, "model_dump_json"),
        ("/detokenize", "tokens", app.Text, "model_dump_json"),
    ],
)
def test_nobody_waits_while_an_answer_is_built(
    path: str, given: str, owner: Any, name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, begun, answered = getattr(owner, name), threading.Event(), threading.Event()

    def building(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert answered.wait(30)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, building)
    asked = [ord("x")] * 1001 if given == "tokens" else "x" * 1001

    async def both() -> tuple[int, Any]:
        async with application(model) as served:
            large = asyncio.create_task(ask(served, path, {given: asked}))
            while not begun.is_set():
                await asyncio.sleep(0.01)
            assert (await ask(served, "/healthz"))[0] == 200
            answered.set()
            return await large

    status, answer = asyncio.run(both())
    assert status == 200
    assert {"choices", "scores", "tokens", "prompt"} & set(answer)


def test_no_max_tokens_is_no_more_than_may_be(model: Path) -> None:
    async def usage() -> Any:
        async with application(model, max_tokens=5) as served:
            return await ask(served, "/v1/completions", {"prompt": "x"})

    status, answer = asyncio.run(usage())
    assert (status, answer["usage"]["completion_tokens"]) == (200, 5)
