"""The server, really started, against the runtime and the clients that people use."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from exported import encoder_decoder, language_model, save_programs, save_step
from serving import Server, serving

from gfrnn_onnx import Session
from gfrnn_onnx.server.prefixes import Prefixes, common_length
from gfrnn_onnx.server.text import Characters, held_back, offsets
from launch import BIN, ROOT, environment


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_step(language_model(), tmp_path_factory.mktemp("model") / "small.onnx", gates=True)


@pytest.fixture(scope="module")
def session(model: Path) -> Session:
    return Session(model, "cpu", threads=1)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving(model, "--max-body-bytes", "1000000", "--max-prompt-bytes", "20000") as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def as_text(symbols: bytes) -> str:
    return symbols.decode(errors="replace")


# OpenAI's own client ----------------------------------------------------------------------------------------


def test_first_line_and_models(server: Server, client: openai.OpenAI) -> None:
    assert re.fullmatch(
        r"serving small \(3 x 24, fp32\) on cpu at http://127\.0\.0\.1:\d+ , 64 rows\n", server.first_line
    )
    assert [each.id for each in client.models.list().data] == ["small"]
    assert client.models.retrieve("small").owned_by == "gfrnn"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_every_form_of_prompt(client: openai.OpenAI, session: Session) -> None:
    first, second = session.generate(b"The ", 12, seed=3), session.generate(b"q\xc3\xa9", 12, seed=3)
    for prompt, expected in (
        ("The ", [first]),
        (["The ", "qé"], [first, second]),
        ([*b"The "], [first]),
        ([[*b"The "], [*"qé".encode()]], [first, second]),
        ("", [session.generate(b"", 12, seed=3)]),
        (None, [session.generate(b"", 12, seed=3)]),
    ):
        answer = client.completions.create(model="small", prompt=prompt, max_tokens=12, seed=3)
        assert [choice.text for choice in answer.choices] == [as_text(each) for each in expected]
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
        assert answer.object == "text_completion"
        assert answer.usage.completion_tokens == 12 * len(expected)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_null_means_default(server: Server) -> None:
    fields = (
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "stream",
        "logprobs",
        "echo",
        "stop",
        "best_of",
        "user",
        "model",
    )
    given = server.complete(prompt="abc", seed=1, **dict.fromkeys(fields))
    left_out = server.complete(prompt="abc", seed=1)
    assert given["choices"] == left_out["choices"]
    assert given["usage"]["completion_tokens"] == 16


def test_sampling_is_the_runtime_s(server: Server, session: Session) -> None:
    for options in ({"temperature": 0}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 3}, {"temperature": 3}):
        expected = session.generate(b"It was", 30, seed=11, **options)
        answer = server.complete(prompt="It was", max_tokens=30, seed=11, **options)
        assert answer["choices"][0]["text"] == as_text(expected)
    texts = {server.complete(prompt="It was", max_tokens=30)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3  # without a seed each is another


def test_choices_have_seeds_of_their_own(server: Server, session: Session) -> None:
    answer = server.complete(prompt=["ab", "cd"], n=3, seed=9, max_tokens=20)
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 6
    assert texts[0] == as_text(session.generate(b"ab", 20, seed=9))
    assert texts[3] == as_text(session.generate(b"cd", 20, seed=9))
    assert texts == [
        choice["text"] for choice in server.complete(prompt=["ab", "cd"], n=3, seed=9, max_tokens=20)["choices"]
    ]
    assert answer["usage"]["prompt_tokens"] == 4


def test_streams_equal_the_whole(client: openai.OpenAI, server: Server) -> None:
    asked: dict[str, Any] = {
        "prompt": ["caf\u00e9 ", "x"],
        "n": 2,
        "seed": 4,
        "max_tokens": 40,
        "echo": True,
        "logprobs": 2,
    }
    whole = server.complete(**asked)
    chunks = list(
        client.completions.create(model="small", stream=True, stream_options={"include_usage": True}, **asked)
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 160
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len(server.events(prompt="x", max_tokens=3000)) > 30  # as it comes, not all at the end
    for index, expected in enumerate(whole["choices"]):
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(part.text for part in parts) == expected["text"]
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
        said = [part.logprobs for part in parts if part.logprobs is not None]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for each in said for value in getattr(each, name)] == expected["logprobs"][name], name


def test_long_streams_take_no_longer_a_byte(server: Server) -> None:
    """With all that may be asked beside the text, whose places in it are counted on, not counted anew."""

    def seconds(length: int) -> float:
        begin = time.perf_counter()
        chunks = server.events(prompt="x", max_tokens=length, logprobs=1, gates=True, echo=True, seed=1)
        taken = time.perf_counter() - begin
        last = [chunk for chunk in chunks if chunk["choices"][0]["logprobs"]][-1]["choices"][0]["logprobs"]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert last["text_offset"][-1] == len(text) - 1
        return taken

    seconds(100)
    assert seconds(16000) / 16000 < 4 * seconds(2000) / 2000


def test_streams_have_whole_characters_only(server: Server) -> None:
    """The model's bytes are no UTF-8; whatever comes, no character comes in halves, and none is lost."""
    chunks = server.events(prompt="日本語 é€😀", max_tokens=60, seed=2, echo=True)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert (
        "".join(texts) == server.complete(prompt="日本語 é€😀", max_tokens=60, seed=2, echo=True)["choices"][0]["text"]
    )
    assert texts[0].startswith("日本語 é€😀")


def test_logprobs(server: Server, session: Session) -> None:
    choice = server.complete(prompt="aé", max_tokens=3, temperature=0, logprobs=3, echo=True)["choices"][0]
    said = choice["logprobs"]
    assert said["tokens"][:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert said["text_offset"][:4] == [0, 1, 1, 2]
    assert said["token_logprobs"][0] is said["top_logprobs"][0] is None
    text = "aé".encode() + session.generate("aé".encode(), 3, temperature=0)
    np.testing.assert_allclose(np.array(said["token_logprobs"][1:]) / -math.log(2), session.score(text)[1:], atol=1e-9)
    for top, own, token in zip(said["top_logprobs"][1:], said["token_logprobs"][1:], said["tokens"][1:], strict=True):
        assert top[token] == own  # to the bit: clients compare them
        assert 3 <= len(top) <= 4
    for top, own in list(zip(said["top_logprobs"], said["token_logprobs"], strict=True))[3:]:
        assert own == max(top.values())
    none = server.complete(prompt="a", max_tokens=2, logprobs=0)["choices"][0]["logprobs"]
    assert none["top_logprobs"] is None
    assert len(none["token_logprobs"]) == 2


def test_a_start_may_stand_before_ids(server: Server) -> None:
    plain = server.complete(prompt=[*b"ab"], max_tokens=3, temperature=0, echo=True, logprobs=1)["choices"][0]
    marked = server.complete(prompt=[256, *b"ab"], max_tokens=3, temperature=0, echo=True, logprobs=1)["choices"][0]
    assert marked["text"] == plain["text"]
    assert marked["logprobs"]["tokens"] == ["<|endoftext|>", *plain["logprobs"]["tokens"]]
    assert marked["logprobs"]["token_logprobs"][0] is None
    assert marked["logprobs"]["token_logprobs"][2:] == plain["logprobs"]["token_logprobs"][1:]
    bits = server.post("/v1/score", {"text": [256, *b"ab"]})[1]["scores"][0]["bits"]
    assert marked["logprobs"]["token_logprobs"][1] == pytest.approx(-math.log(2) * bits[0])
    streamed = server.events(prompt=[256, *b"ab"], max_tokens=3, temperature=0, echo=True, logprobs=1)
    tokens = [token for chunk in streamed for token in (chunk["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
    assert tokens == marked["logprobs"]["tokens"]
    assert server.post("/tokenize", {"prompt": "<|endoftext|>é"})[1]["tokens"] == [256, 0xC3, 0xA9]
    assert server.post("/detokenize", {"tokens": [256, 0xC3, 0xA9]})[1]["prompt"] == "<|endoftext|>é"
    assert server.post("/detokenize", {"tokens": []})[1]["prompt"] == ""


def test_echo_without_a_word_more(server: Server) -> None:
    choice = server.complete(prompt="abc", max_tokens=0, echo=True)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("abc", "length", None)
    choice = server.complete(prompt="abc", max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == 3
    for prompt in ("", "abc"):
        assert server.complete(prompt=prompt, max_tokens=0)["choices"][0]["text"] == ""
    assert server.complete(prompt="", max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]["tokens"] == []


def test_stops(server: Server, session: Session) -> None:
    whole = session.generate(b"q", 60, seed=1, top_k=40)
    found = re.search(rb"[ -~]{3}", whole)
    assert found
    stop = found[0].decode()
    expected = as_text(whole[: whole.index(stop.encode())])
    for stops in (stop, ["never there", stop]):
        choice = server.complete(prompt="q", max_tokens=60, seed=1, top_k=40, stop=stops, logprobs=1)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
        assert len(choice["logprobs"]["tokens"]) == whole.index(stop.encode())
        chunks = server.events(prompt="q", max_tokens=60, seed=1, top_k=40, stop=stops)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_errors_as_openai_words_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="small", prompt="x", max_tokens=-1)
    assert caught.value.body == {
        "message": "max_tokens: Input should be greater than or equal to 0",
        "type": "invalid_request_error",
        "param": "max_tokens",
        "code": None,
    }
    with pytest.raises(openai.NotFoundError, match="'gpt-5' does not exist"):
        client.completions.create(model="gpt-5", prompt="x")
    for unsupported in ({"best_of": 3}, {"suffix": "x"}, {"presence_penalty": 1.0}, {"logit_bias": {"5": 1}}):
        with pytest.raises(openai.BadRequestError, match="supported"):
            client.completions.create(model="small", prompt="x", **unsupported)


# Scores, and lm-eval ----------------------------------------------------------------------------------------


def test_scores(server: Server, session: Session) -> None:
    texts = ["Call me Ishmael.", "", "é"]
    status, answer = server.post("/v1/score", {"text": texts})
    assert status == 200
    for text, found in zip(texts, answer["scores"], strict=True):
        expected = session.score(text.encode())
        np.testing.assert_allclose(found["bits"], expected, atol=1e-9)
        assert found["total_bits"] == pytest.approx(expected.sum())
        assert found["bpc"] == (pytest.approx(expected.mean()) if text else None)
    assert server.post("/v1/score", {"text": [*b"ab"]})[1]["scores"][0]["bits"] == pytest.approx(session.score(b"ab"))


def test_lm_eval_finds_what_score_says(server: Server) -> None:
    """Its local-completions model, as `lm_eval --model local-completions` makes it, against /v1/score."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    evaluator = LocalCompletionsAPI(
        model="small", base_url=f"{server.url}/v1/completions", tokenized_requests=True, num_concurrent=1, batch_size=4
    )
    pairs = [("Call me", " Ishmael."), ("Some years ago", " - never mind how long"), ("é", "à"), ("x", "y")] * 3
    requests = [Instance("loglikelihood", {}, pair, k) for k, pair in enumerate(pairs)]
    found = evaluator.loglikelihood(requests)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        bits = server.post("/v1/score", {"text": context + continuation})[1]["scores"][0]["bits"]
        expected = -math.log(2) * sum(bits[len(context.encode()) :])
        assert total == pytest.approx(expected, abs=1e-9)
        assert greedy is False
    # what it is most likely to say it is said to be most likely to say
    likely = server.complete(prompt="Call me", max_tokens=1, temperature=0, top_k=1, logprobs=1)["choices"][0]
    if likely["text"].isascii():
        ((_, greedy),) = evaluator.loglikelihood([Instance("loglikelihood", {}, ("Call me", likely["text"]), 0)])
        assert greedy is True
    text = "It was a bright cold day in April."
    (rolling,) = evaluator.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert rolling == pytest.approx(
        -math.log(2) * server.post("/v1/score", {"text": text})[1]["scores"][0]["total_bits"]
    )
    (said,) = evaluator.generate_until(
        [Instance("generate_until", {}, ("ab", {"until": ["\n"], "max_gen_toks": 5}), 0)]
    )
    assert said == server.complete(prompt="ab", max_tokens=5, temperature=0, stop=["\n"])["choices"][0]["text"]


def test_curl(server: Server) -> None:
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d"]
    body = json.dumps({"prompt": "Hi", "max_tokens": 4, "stream": True, "seed": 1})
    done = subprocess.run([*command, body], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("data: [DONE]\n\n")
    assert server.ask("/healthz")[1]["status"] == "ok"


# Many at once -----------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_among_63_others(server: Server, session: Session) -> None:
    expected = as_text(session.generate(b"Hello", 80, seed=77))

    def ask(k: int) -> str:
        if k % 8 == 5:
            return server.complete(prompt="Hello", max_tokens=80, seed=77)["choices"][0]["text"]
        stream = server.events if k % 2 else server.complete
        stream(prompt=f"{'x' * k} another", max_tokens=40 + k)
        return ""

    steps, rows = server.metric("gfrnn_step_seconds_count"), server.metric("gfrnn_step_rows_total")
    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(ask, range(64)))
    assert [text for text in texts if text] == [expected] * 8
    server.wait_until_idle()
    together = (server.metric("gfrnn_step_rows_total") - rows) / (server.metric("gfrnn_step_seconds_count") - steps)
    assert together > 4  # they were stepped together, not one after another


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
    with serving(model) as alone:
        leader = alone.open({"prompt": prompt, "max_tokens": 16000})
        time.sleep(0.1)
        answer = alone.complete(prompt=prompt + " more", max_tokens=5, seed=1)
        assert alone.ask("/healthz")[1]["rows_in_use"] == 1  # the first still writes
        leader.close()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3000
        assert answer["choices"][0]["text"] == as_text(session.generate(f"{prompt} more".encode(), 5, seed=1))


def test_goes_on_from_a_state(server: Server, session: Session) -> None:
    first = server.complete(prompt="Once", max_tokens=10, temperature=0, return_state=True)["choices"][0]
    assert re.fullmatch("state-[0-9a-f]{32}", first["state"])
    whole = session.generate(b"Once", 40, temperature=0)
    assert first["text"] == as_text(whole[:10])
    for _ in range(2):  # a state stays as it is
        more = server.complete(state=first["state"], max_tokens=30, temperature=0)["choices"][0]
        assert (first["text"] + more["text"]).encode() == as_text(whole).encode()
    said = server.complete(state=first["state"], prompt=" and", max_tokens=0, echo=True, logprobs=0)["choices"][0]
    expected = session.score(b"Once" + whole[:10] + b" and")[-4:]
    np.testing.assert_allclose(np.array(said["logprobs"]["token_logprobs"]) / -math.log(2), expected, atol=1e-9)
    started = server.complete(prompt="Once", max_tokens=0, return_state=True)["choices"][0]["state"]
    assert server.complete(state=started, max_tokens=10, temperature=0)["choices"][0]["text"] == as_text(whole[:10])
    streamed = server.events(prompt="Once", max_tokens=10, temperature=0, return_state=True)[-1]["choices"][0]["state"]
    assert server.complete(state=streamed, max_tokens=30, temperature=0)["choices"][0]["text"] == more["text"]
    assert server.post("/v1/completions", {"state": "state-0", "max_tokens": 1})[0] == 404
    import urllib.request

    request = urllib.request.Request(f"{server.url}/v1/states/{streamed}", method="DELETE")
    assert urllib.request.urlopen(request).status == 204
    assert server.post("/v1/completions", {"state": streamed, "max_tokens": 1})[0] == 404


def test_gates_come_with_tokens(server: Server, session: Session, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"prompt": "ab", "max_tokens": 3, "temperature": 0, "echo": True, "gates": True}
    choice = server.complete(**asked)["choices"][0]
    gates = np.array(choice["gates"])
    assert gates.shape == (5, 3, 3)
    state, found = None, []
    for symbol in b"\nab" + session.generate(b"ab", 3, temperature=0)[:-1]:
        feeds = dict(zip("hc", (state or session.zero_state()).arrays(), strict=True))
        found.append(session._step.session.run(["gates"], {"token": np.array([symbol]), **feeds})[0][0])
        _, state = session.step([symbol], state)
    np.testing.assert_allclose(gates, found, atol=6e-4)
    streamed = [g for chunk in server.events(**asked) for g in chunk["choices"][0]["gates"]]
    assert streamed == choice["gates"]
    without = save_step(language_model(), tmp_path / "without.onnx")
    with serving(without) as other:
        status, error = other.post("/v1/completions", asked)
        assert (status, error["error"]["param"]) == (400, "gates")
        assert "export it with --gates" in error["error"]["message"]


# Clients that go away ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["before the first byte", "after it"])
def test_a_client_that_goes_away_frees_its_row(stream: bool, when: str, server: Server) -> None:
    asked = {"prompt": "x", "max_tokens": 16000, "stream": stream, "n": 4}
    connection = server.open(asked)
    until = time.monotonic() + 10
    while server.ask("/healthz")[1]["rows_in_use"] < 4:
        assert time.monotonic() < until
    if when == "after it" and stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    begin = time.monotonic()
    connection.close()
    server.wait_until_idle(5)
    assert time.monotonic() - begin < 2  # long before it would have been done


# Limits -----------------------------------------------------------------------------------------------------


def test_limits_have_clear_answers(model: Path) -> None:
    flags = "--max-prompt-bytes 50 --max-tokens 2000 --max-sequences 4 --max-body-bytes 5000 --rows 1 --max-waiting 1"
    with serving(model, *flags.split(), "--body-seconds", "0.7", "--request-seconds", "1.5") as small:
        for body, status, message in (
            ({"prompt": "x" * 51}, 400, "a prompt of 51 bytes is longer than 50"),
            ({"prompt": "x", "max_tokens": 2001}, 400, "max_tokens is 2001; at most 2000"),
            ({"prompt": ["x"] * 5}, 400, "more than 4 sequences"),
            ({"prompt": "x" * 6000}, 413, "larger than 5000 bytes"),
        ):
            found, error = small.post("/v1/completions", body)
            assert (found, message in error["error"]["message"]) == (status, True), error
        status, error = small.post("/v1/score", {"text": "x" * 51})
        assert (status, error["error"]["param"]) == (400, "text")

        # one has the row, one waits, the third is told to come again; OpenAI's client does
        busy = [small.open({"prompt": "x", "max_tokens": 2000}) for _ in range(2)]
        time.sleep(0.2)
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
            while stopping.ask("/healthz")[1]["rows_in_use"] == 0:
                pass
            stopping.process.send_signal(signal.SIGTERM)
            assert last.result()["choices"][0]["text"] == expected
        assert stopping.process.wait(20) == 0
        assert "stopped" in stopping.process.stderr.read()


def test_a_second_signal_ends_at_once(model: Path) -> None:
    with serving(model) as stopping:
        connection = stopping.open({"prompt": "x", "max_tokens": 16000, "n": 50})
        time.sleep(0.3)
        stopping.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert stopping.process.poll() is None
        stopping.process.send_signal(signal.SIGTERM)
        assert stopping.process.wait(5) == 128 + signal.SIGTERM
        connection.close()


# Hostile input ----------------------------------------------------------------------------------------------

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
    begin = time.monotonic()
    for name in (b"prompt", b"stop"):
        status, error = server.post(
            "/v1/completions", b'{"%s": [%s]}' % (name, b",".join([body] * (900_000 // len(body) // 2)))
        )
        assert status == 400, error
    assert time.monotonic() - begin < 5
    after = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    assert (int(after) - int(before)) * os.sysconf("SC_PAGE_SIZE") < 200 << 20


def test_other_paths_have_error_bodies_too(server: Server) -> None:
    for path, data, status in (
        ("/v1/nothing", None, 404),
        ("/v1/completions", None, 405),
        ("/v1/models/%00", None, 404),
    ):
        found, error = server.ask(path, data)
        assert (found, set(error)) == (status, {"error"})


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


# Starting ---------------------------------------------------------------------------------------------------


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
        ([model, "--rows", "0"], "--rows is 0; it must be from 1"),
        ([model, "--provider", "cuda"], "CUDA cannot be used here"),
        ([model, "--prot", "1"], "did you mean --port"),
    ):
        assert message in refusal(*flags)


def test_the_server_needs_no_torch(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps


def test_idle_it_costs_next_to_nothing(server: Server) -> None:
    server.complete(prompt="x", max_tokens=50)
    server.wait_until_idle()

    def used() -> float:
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    begin = used()
    time.sleep(2)
    assert (used() - begin) / 2 < 0.15


# Parts ------------------------------------------------------------------------------------------------------


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


def test_held_back_and_offsets() -> None:
    assert held_back(b"the sto", [b"stop", b"x"]) == 3
    assert held_back(b"the stop", [b"stopped"]) == 4
    assert held_back(b"the stop", [b"stop"]) == 4  # seen before it is taken off
    assert held_back(b"anything", [b"x"]) == held_back(b"", [b"ab"]) == 0
    assert offsets("aé€b".encode()) == [0, 1, 1, 2, 2, 2, 3]
    assert offsets(b"\xc3\xc3\xa9\xe2a\xff") == [0, 1, 1, 2, 3, 4]  # what is no UTF-8 is a character each
    characters = Characters()
    assert [characters.add(bytes([b])) for b in "é€".encode()] == ["", "é", "", "", "€"]
    assert characters.add(b"\xe2", final=True) == "\ufffd"


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
