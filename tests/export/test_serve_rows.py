"""Sequences of many requests in the server: side by side, with what they share, and gone when their clients are."""

from __future__ import annotations

import itertools
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server, as_text, serving

from gfrnn_onnx import Session
from gfrnn_onnx.server.prefixes import Prefixes, common_length


def test_a_seed_gives_the_same_text_among_63_others(server: Server, session: Session) -> None:
    expected = as_text(session.generate(b"Hello", 80, seed=77))

    def ask(k: int) -> str:
        if k % 8 == 5:
            return server.complete(prompt="Hello", max_tokens=80, seed=77)["choices"][0]["text"]
        stream = server.events if k % 2 else server.complete
        stream(prompt=f"{'x' * k} another", max_tokens=40 + k)
        return ""

    def together() -> float:
        """The rows of a step."""
        steps, rows = server.metric("gfrnn_step_seconds_count"), server.metric("gfrnn_step_rows_total")
        with ThreadPoolExecutor(64) as pool:
            texts = list(pool.map(ask, range(64)))
        assert [text for text in texts if text] == [expected] * 8
        server.wait_until_idle()
        return (server.metric("gfrnn_step_rows_total") - rows) / (server.metric("gfrnn_step_seconds_count") - steps)

    # they are stepped together, not one after another: once in three tries, as a busy machine may ask slowly
    assert any(together() > 4 for _ in range(3))


def test_more_than_there_are_rows(model: Path, session: Session) -> None:
    with serving(model, "--rows", "3") as small:
        answer = small.complete(prompt=[f"p{k}" for k in range(20)], seed=5, max_tokens=15)
        assert [c["text"] for c in answer["choices"]] == [
            as_text(session.generate(f"p{k}".encode(), 15, seed=5)) for k in range(20)
        ]


def test_a_common_beginning_is_read_once(server: Server, session: Session) -> None:
    def read_by(ask: Any) -> int:
        before = server.metric("gfrnn_prompt_symbols_total")
        ask()
        server.wait_until_idle()
        return int(server.metric("gfrnn_prompt_symbols_total") - before)

    prompt = "".join(chr(97 + k * k % 23) for k in range(900))
    expected = as_text(session.generate(prompt.encode(), 5, seed=1))

    def once() -> Any:
        return server.complete(prompt=prompt, max_tokens=5, seed=1)

    # n choices: the prompt once, and of the others its last symbol
    assert read_by(lambda: server.complete(prompt=prompt, n=5, max_tokens=3)) <= 900
    # known from before: nothing but the last symbol, and the same text
    assert read_by(once) == 0
    assert once()["choices"][0]["text"] == expected
    assert once()["usage"]["prompt_tokens_details"]["cached_tokens"] == 899
    # another end: from the last block's boundary on
    other = prompt[:800] + "!" * 20
    assert read_by(lambda: server.complete(prompt=other, max_tokens=3)) <= 820 - 500
    # several at once, all new, with 700 symbols in common
    new = "".join(chr(97 + k * k * k % 19) for k in range(700))
    assert (
        read_by(lambda: server.complete(prompt=[new + f"{k:02}" * 5 for k in range(20)], max_tokens=3)) <= 700 + 20 * 10
    )
    assert server.complete(prompt=new + "0101010101", max_tokens=5, seed=1)["choices"][0]["text"] == as_text(
        session.generate((new + "0101010101").encode(), 5, seed=1)
    )
    # where every step is asked for, nothing is left out
    assert (
        len(server.complete(prompt=prompt, max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]["tokens"])
        == 900
    )


def test_a_leader_that_goes_away_leaves_its_followers_well(server: Server, session: Session) -> None:
    prompt = "".join(chr(97 + k * k % 17) for k in range(15000))
    leader = server.open({"prompt": prompt, "max_tokens": 5})
    time.sleep(0.3)
    with ThreadPoolExecutor(1) as pool:
        follower = pool.submit(server.complete, prompt=prompt, max_tokens=5, seed=2)
        time.sleep(0.3)
        leader.close()
        assert follower.result()["choices"][0]["text"] == as_text(session.generate(prompt.encode(), 5, seed=2))
    server.wait_until_idle()


def test_a_longer_prompt_waits_only_until_the_shorter_is_read(model: Path, session: Session) -> None:
    prompt = "".join(chr(97 + k * k % 17) for k in range(3000))
    with serving(model, "--max-tokens", "1000000") as alone:
        leader = alone.open({"prompt": prompt, "max_tokens": 1_000_000})
        alone.wait_for("gfrnn_rows", 1)
        answer = alone.complete(prompt=prompt + " more", max_tokens=5, seed=1)
        assert alone.ask("/healthz")[1]["rows_in_use"] == 1  # the first still writes
        leader.close()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3000
        assert answer["choices"][0]["text"] == as_text(session.generate(f"{prompt} more".encode(), 5, seed=1))


def test_who_is_further_waits_for_nobody(model: Path) -> None:
    """A prompt whose state is known up to near its end, while another request reads all of it from its beginning."""
    prompt = "".join(chr(97 + k * k % 13) for k in range(16000))
    with serving(model, "--max-prompt-bytes", "900000") as alone:
        alone.complete(prompt=prompt[:15900], max_tokens=1)
        behind = alone.open({"text": prompt + "x" * 800_000}, "/v1/score")  # never shares
        alone.wait_for("gfrnn_rows", 1)
        answer = alone.complete(prompt=prompt, max_tokens=1)
        assert alone.ask("/healthz")[1]["rows_in_use"] == 1  # that one still reads
        behind.close()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 15000


@pytest.mark.parametrize(("stream", "begun"), [(False, False), (True, False), (True, True)])
def test_a_client_that_goes_away_frees_its_row(stream: bool, begun: bool, server: Server) -> None:
    """Before the first byte of the answer, or after it."""
    asked = {"prompt": "x", "max_tokens": 1_000_000, "stream": stream, "n": 4}
    before = server.metric("gfrnn_symbols_total")
    connection = server.open(asked)
    server.wait_for("gfrnn_rows", 4)
    if begun:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    server.wait_until_idle()
    assert server.metric("gfrnn_symbols_total") - before < 1_000_000  # long before it would have been done


def test_requests_are_counted_by_route_and_those_nobody_waits_for_apart(server: Server) -> None:
    connection = server.open({"text": "x" * 900_000}, "/v1/score")
    server.wait_for("gfrnn_rows", 1)
    connection.close()
    server.wait_until_idle()
    with socket.create_connection(("127.0.0.1", server.port)) as leaving:  # while it sends
        leaving.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    server.ask("/v1/models/small")
    counts = [
        f'gfrnn_requests_total{{path="{path}",status="{status}"}} '
        for path, status in (("/v1/score", 499), ("/tokenize", 499), ("/v1/models/{model:path}", 200))
    ]
    until = time.monotonic() + 60
    while not all(count in server.ask("/metrics")[1] for count in counts):
        assert time.monotonic() < until, server.ask("/metrics")[1]
        time.sleep(0.02)


def test_idle_it_costs_next_to_nothing(server: Server) -> None:
    server.complete(prompt="x", max_tokens=50)
    server.wait_until_idle()

    begin = server.cpu_seconds
    time.sleep(2)
    assert (server.cpu_seconds - begin) / 2 < 0.15


def test_prefixes_keep_what_was_used_last() -> None:
    state = (np.zeros((2, 5), np.float32),)  # 40 bytes
    prefixes = Prefixes(120)
    for text in (b"abc", b"abcdef", b"xyz"):
        prefixes.keep(text, state)
    assert prefixes.longest(b"abcdefg")[0] == 6
    assert prefixes.longest(b"abcdeg")[0] == 3
    assert prefixes.longest(b"ab") == (0, None)
    prefixes.keep(b"new", state)  # xyz was unused for longest
    assert [prefixes.longest(text)[0] for text in (b"xyz", b"abc", b"abcdef", b"new!")] == [0, 3, 6, 3]
    assert (len(prefixes), prefixes.bytes) == (3, 120)
    Prefixes(10).keep(b"abc", state)


def test_common_length() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        a, b = (bytes(random.integers(0, 2, random.integers(0, 12), dtype=np.uint8)) for _ in range(2))
        assert common_length(a, b) == sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
        )
