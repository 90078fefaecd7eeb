"""The server's interface, really started, against the runtime and the clients that people use."""

from __future__ import annotations

import json
import math
import re
import subprocess
import timeit
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from exported import language_model, save_step
from serving import Server, as_text, serving

from gfrnn_onnx import Session
from gfrnn_onnx.server.text import Characters, held_back, offsets


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


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


def test_an_echoed_prompt_comes_as_it_is_read(server: Server) -> None:
    asked: dict[str, Any] = {"prompt": "é long one " * 80, "max_tokens": 5, "seed": 1, "echo": True, "logprobs": 1}
    whole = server.complete(**asked)["choices"][0]
    parts = [chunk["choices"][0] for chunk in server.events(**asked)]
    assert len(parts) > 3
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, expected in whole["logprobs"].items():
        assert [value for part in parts if part["logprobs"] for value in part["logprobs"][name]] == expected, name
    for part in parts:  # the text and what is said of it come together; what the model writes may be no UTF-8
        if part["text"] and "\ufffd" not in part["text"]:
            assert len(part["logprobs"]["tokens"]) == len(part["text"].encode())


def test_the_first_symbol_is_one_that_the_model_wrote(server: Server) -> None:
    for asked, counted in (
        ({"max_tokens": 0, "echo": True}, 0),
        ({"max_tokens": 2, "echo": True, "logprobs": 0}, 1),
        ({"max_tokens": 2}, 1),
    ):
        before = server.metric("gfrnn_first_symbol_seconds_count")
        server.events(prompt="abc", **asked)
        assert server.metric("gfrnn_first_symbol_seconds_count") - before == counted, asked


def test_what_is_cached_is_a_part_of_the_prompts(server: Server) -> None:
    before = server.metric("gfrnn_cached_symbols_total")
    usage = server.complete(prompt="what is this " * 70, n=5, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == 910 >= usage["prompt_tokens_details"]["cached_tokens"]
    assert server.metric("gfrnn_cached_symbols_total") - before >= 4 * 900  # by those who waited for the first


def test_long_streams_take_no_longer_a_byte(server: Server) -> None:
    """With all that may be asked beside the text, whose places in it are counted on, not counted anew."""

    def seconds(length: int) -> float:
        begin = server.cpu_seconds
        chunks = server.events(prompt="x", max_tokens=length, logprobs=1, gates=True, echo=True, seed=1)
        taken = server.cpu_seconds - begin
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
    for place, given in (("stop.0", {"stop": [""]}), ("prompt.1.0", {"prompt": [[1], [-1]]}), ("stop", {"stop": 3})):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": "small", "prompt": "x", **given})
        assert caught.value.body["message"].startswith(f"{place}: ")
    with pytest.raises(openai.NotFoundError, match="'gpt-5' does not exist"):
        client.completions.create(model="gpt-5", prompt="x")
    for unsupported in ({"best_of": 3}, {"suffix": "x"}, {"presence_penalty": 1.0}, {"logit_bias": {"5": 1}}):
        with pytest.raises(openai.BadRequestError, match="supported"):
            client.completions.create(model="small", prompt="x", **unsupported)


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
    """-d says that what it sends is a form, and a header what it is."""
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-d"]
    body = json.dumps({"prompt": "Hi", "max_tokens": 4, "stream": True, "seed": 1})
    for header in ([], ["-H", "Content-Type: application/json"]):
        done = subprocess.run([*command, body, *header], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("data: [DONE]\n\n")
    assert server.ask("/healthz")[1]["status"] == "ok"


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


def test_held_back_and_offsets() -> None:
    assert held_back(b"the sto", [b"stop", b"x"]) == 3
    assert held_back(b"the stop", [b"stopped"]) == 4
    assert held_back(b"the stop", [b"stop"]) == 4  # seen before it is taken off
    assert held_back(b"anything", [b"x"]) == held_back(b"", [b"ab"]) == 0
    letters = np.random.default_rng(0)
    for _ in range(300):
        text, *stops = (letters.integers(97, 99, letters.integers(1, 7), np.uint8).tobytes() for _ in range(4))
        ends = [n for n in range(len(text) + 1) if any(stop.startswith(text[len(text) - n :]) for stop in stops)]
        assert held_back(text, stops) == max(ends)
    seconds = timeit.repeat(
        lambda: held_back(b"a" * 5000, [b"a" * 1023 + bytes([k]) for k in range(16)]), number=1, repeat=3
    )
    assert min(seconds) < 0.1
    assert offsets("aé€b".encode()) == [0, 1, 1, 2, 2, 2, 3]
    assert offsets(b"\xc3\xc3\xa9\xe2a\xff") == [0, 1, 1, 2, 3, 4]  # what is no UTF-8 is a character each
    characters = Characters()
    assert [characters.add(bytes([b])) for b in "é€".encode()] == ["", "é", "", "", "€"]
    assert characters.add(b"\xe2", final=True) == "\ufffd"
