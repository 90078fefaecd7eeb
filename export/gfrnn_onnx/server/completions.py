"""From a request to jobs, and from what comes of them to answers, whole or in pieces."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from gfrnn_onnx.sampling import Sampling
from gfrnn_onnx.server.engine import Busy, Engine, Job, Snapshot, Token, choice_seed, finished
from gfrnn_onnx.server.limits import Limits
from gfrnn_onnx.server.protocol import (
    START_TEXT,
    ApiError,
    Choice,
    Completion,
    CompletionRequest,
    Given,
    Logprobs,
    Prompt,
    Usage,
    encode,
    texts,
)
from gfrnn_onnx.server.text import Characters, decode, held_back, name, offsets

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MOST_STOPS, _LONGEST_STOP = 16, 1024
_SMALL = 1000  # bytes that an answer is about
_BUILDER = ThreadPoolExecutor(1, "answers")
"""One thread: more would take turns anyway, and each would hold on to memory of its own."""


class States:
    """Snapshots that clients may go on from, by name; the longest unused are thrown out."""

    def __init__(self, most: int, seconds: float):
        self.most, self.seconds = most, seconds
        self._kept: OrderedDict[str, tuple[float, Snapshot]] = OrderedDict()

    def __len__(self) -> int:
        self._expire()
        return len(self._kept)

    def keep(self, snapshot: Snapshot) -> str:
        """Its name from now on."""
        self._expire()
        while len(self._kept) >= max(1, self.most):
            self._kept.popitem(last=False)
        key = f"state-{uuid.uuid4().hex}"
        self._kept[key] = (time.monotonic(), snapshot)
        return key

    def get(self, key: str) -> Snapshot:
        """Raises ApiError for a name that is unknown, or no longer kept."""
        self._expire()
        if key not in self._kept:
            raise ApiError(404, f"no state {key!r}: it never was, or was not used for long", param="state")
        snapshot = self._kept.pop(key)[1]
        self._kept[key] = (time.monotonic(), snapshot)
        return snapshot

    def remove(self, key: str) -> None:
        """Raises ApiError likewise."""
        self.get(key)
        del self._kept[key]

    def _expire(self) -> None:
        oldest = time.monotonic() - self.seconds
        while self._kept and next(iter(self._kept.values()))[0] < oldest:
            self._kept.popitem(last=False)


def read_texts(prompt: Prompt, param: str, limits: Limits, *, choices: int | None = None) -> list[Given]:
    """A request's texts. Raises ApiError for what is none, for too many (times choices) and for too long ones."""
    # counted before they are made: there may be a million
    count = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    if count * (choices or 1) > limits.most_sequences:
        times = "" if choices is None else f" with n={choices}"
        raise ApiError(
            400,
            f"{count} texts{times} are more than {limits.most_sequences} sequences",
            param=param if choices is None else "n",
        )
    found = texts(prompt, param)
    longest = max(len(given.symbols) for given in found)
    if longest > limits.max_prompt_bytes:
        raise ApiError(
            400,
            f"a {param} of {longest} bytes is longer than {limits.max_prompt_bytes}",
            param=param,
            code="context_length_exceeded",
        )
    return found


def check_values(tokens: int, each: int, param: str, limits: Limits) -> None:
    """Raises ApiError for a report on so many tokens, with so many numbers each, that its memory would be felt."""
    if tokens * (each + 2) > limits.max_values:
        raise ApiError(
            400,
            f"a report on {tokens} bytes, with {each + 2} values each, is more than {limits.max_values} values: "
            "ask for less at once",
            param=param,
        )


def submit(engine: Engine, jobs: list[Job], limits: Limits) -> None:
    """Queues a request's jobs. Raises ApiError if too many wait already."""
    try:
        engine.submit(jobs)
    except Busy:
        raise ApiError(
            429,
            f"more than {limits.max_waiting} sequences wait already; try again",
            code="too_many_requests",
            retry=1,
        ) from None


def check_ends(jobs: list[Job]) -> None:
    """Raises ApiError if work on one of them was given up."""
    reasons = {job.finish_reason for job in jobs}
    if "failed" in reasons:
        raise ApiError(500, "the server's stepping thread failed; its log says why")
    if "timeout" in reasons:
        raise ApiError(408, "the request took longer than this server allows", code="timeout")


def size(jobs: list[Job]) -> int:
    """Bytes that an answer about jobs is about."""
    return sum(len(job.prompt) + len(job.text) for job in jobs)


async def built(answer: Callable[[], bytes], about: int) -> bytes:
    """An answer about so many bytes; a large one is built beside the event loop, which others wait for."""
    if about <= _SMALL:
        return answer()
    return await asyncio.get_running_loop().run_in_executor(_BUILDER, answer)


class Run:
    """A request at work. Raises ApiError for what cannot be asked."""

    def __init__(self, request: CompletionRequest, engine: Engine, limits: Limits, states: States, model: str):
        self.request, self.engine, self.states, self.model = request, engine, states, model
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        if request.model not in (None, model):
            raise ApiError(
                404,
                f"The model {request.model!r} does not exist; this is {model!r}",
                param="model",
                code="model_not_found",
            )
        _refuse_unsupported(request)
        if request.gates and not engine.step.has_gates:
            raise ApiError(400, "this model has no output for its gates: export it with --gates", param="gates")
        n = request.n or 1
        prompts = read_texts("" if request.prompt is None else request.prompt, "prompt", limits, choices=n)
        usual = min(_DEFAULT_MAX_TOKENS, limits.max_tokens)
        max_tokens = usual if request.max_tokens is None else request.max_tokens
        if max_tokens > limits.max_tokens:
            raise ApiError(400, f"max_tokens is {max_tokens}; at most {limits.max_tokens}", param="max_tokens")
        self.stops = _stops(request)
        sampling = Sampling(
            1.0 if request.temperature is None else float(request.temperature),
            request.top_k or 0,
            1.0 if request.top_p is None else float(request.top_p),
        )
        # seeds are any number for OpenAI, numpy's are not negative
        seed = None if request.seed is None else request.seed % 2**64
        start = None if request.state is None else states.get(request.state)
        self.changed = asyncio.Event()
        self.jobs = [
            Job(
                prompt.symbols,
                max_tokens,
                sampling,
                choice_seed(seed, k),
                self.stops,
                top=request.logprobs if request.logprobs is not None or not request.gates else 0,
                prompt_tokens=bool(request.echo) and (request.logprobs is not None or bool(request.gates)),
                gates=bool(request.gates),
                start=start,
                keep_state=bool(request.return_state),
                streamed=bool(request.stream),
                deadline=time.monotonic() + limits.request_seconds,
                changed=self.changed,
            )
            for prompt in prompts
            for k in range(n)
        ]
        if request.logprobs is not None or request.gates:
            told = sum(max_tokens + len(job.prompt) * job.prompt_tokens for job in self.jobs)
            each = (request.logprobs or 0) + engine.step.shape[0] ** 2 * bool(request.gates)
            check_values(told, each, "logprobs" if request.logprobs is not None else "gates", limits)
        self.marked = [prompt.marked for prompt in prompts for _ in range(n)]
        self.begun = False
        """Whether a piece has had a byte in it that the model wrote."""
        submit(engine, self.jobs, limits)

    def cancel(self) -> None:
        """Ends what is not done."""
        self.engine.cancel(self.jobs)

    async def whole(self) -> bytes:
        """The answer as JSON, when it is there. Raises ApiError if the work was given up."""
        await finished(self.jobs)
        check_ends(self.jobs)
        kept = [None if job.state is None else self.states.keep(job.state) for job in self.jobs]
        return await built(lambda: self._answer(kept), size(self.jobs))

    def _answer(self, kept: list[str | None]) -> bytes:
        """kept: the names of the choices' states."""
        choices = []
        for index, (job, state) in enumerate(zip(self.jobs, kept, strict=True)):
            text = decode((job.prompt if self.request.echo else b"") + bytes(job.text))
            logprobs = self._logprobs(index, 0, _visible(job), 0)
            choice = Choice(index=index, text=text, logprobs=logprobs, finish_reason=_reason(job))
            if self.request.gates:
                choice.gates = _gates(job.tokens[: _visible(job)])
            if state is not None:
                choice.state = state
            choices.append(choice)
        answer = Completion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=self._usage(),
        )
        return answer.model_dump_json(exclude_unset=True).encode()

    async def pieces(self) -> AsyncIterator[str]:
        """The answer as server-sent events, of whole characters each."""
        shown = [_Shown(self, index, job) for index, job in enumerate(self.jobs)]
        while shown:
            await self.changed.wait()
            self.changed.clear()
            events = []
            for each in list(shown):
                done = each.job.finish_reason is not None  # looked at once: it may end meanwhile
                if done:
                    shown.remove(each)
                choice = each.next(done)
                if choice is not None:
                    events.append(self._event([choice]))
            if events:
                yield "".join(events)
        try:
            check_ends(self.jobs)
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        options, usage = self.request.stream_options, self._usage()
        if options is not None and options.include_usage:
            yield self._event([], usage)
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> str:
        values: dict[str, Any] = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if usage is not None:
            values["usage"] = usage.model_dump()
        return f"data: {json.dumps(values)}\n\n"

    def _usage(self) -> Usage:
        n = self.request.n or 1
        prompts = sum(len(job.prompt) for job in self.jobs[::n])
        written = sum(len(job.text) for job in self.jobs)
        cached = sum(max(0, job.cached - 1) for job in self.jobs[::n])
        return Usage(
            prompt_tokens=prompts,
            completion_tokens=written,
            total_tokens=prompts + written,
            prompt_tokens_details={"cached_tokens": cached},
        )

    def _logprobs(self, index: int, begin: int, end: int, before: int) -> Logprobs | None:
        """Of tokens begin to end of a job; `before`: characters of the text before them."""
        if self.request.logprobs is None:
            return None
        job, marked = self.jobs[index], self.marked[index]
        tokens = job.tokens[begin:end]
        names = [name(token.symbol) for token in tokens]
        said: list[float | None] = [token.log_probability for token in tokens]
        top: list[dict[str, float] | None] = [_named(token) for token in tokens]
        places = [before + place for place in offsets(token.symbol for token in tokens)]
        if begin == 0 and self.request.echo and job.start is None:  # nothing stands before an echoed text
            if marked:
                names, said, top, places = [START_TEXT, *names], [None, *said], [None, *top], [0, *places]
            elif job.prompt and said:
                said[0] = top[0] = None
        return Logprobs(
            tokens=names,
            token_logprobs=said,
            top_logprobs=top if self.request.logprobs else None,
            text_offset=places,
        )


class _Shown:
    """What has been sent of a job."""

    def __init__(self, run: Run, index: int, job: Job):
        self.run, self.index, self.job = run, index, job
        self.characters, self.bytes, self.tokens = Characters(), 0, 0
        self.count = 0  # characters sent

    def next(self, done: bool) -> dict[str, Any] | None:
        """A choice with what is new; None if no character is whole yet."""
        run, job, request = self.run, self.job, self.run.request
        written = bytes(job.text)  # once: the stepping thread writes on, or takes a stop off again
        text = (job.prompt if request.echo else b"") + written
        ready = len(text) if done else len(text) - held_back(written, run.stops)
        if job.prompt_tokens:  # an echoed prompt is shown as it is read
            ready = min(ready, len(job.tokens))
        ready = max(self.bytes, ready)  # of several stops one may reach further back than another
        part = text[self.bytes : ready]
        new = self.characters.add(part, final=done)
        self.bytes = ready
        if not new and not done:
            return None
        run.begun |= self.bytes > (len(job.prompt) if request.echo else 0)
        choice: dict[str, Any] = {
            "index": self.index,
            "text": new,
            "logprobs": None,
            "finish_reason": _reason(job) if done else None,
        }
        if job.top is not None:
            # tokens of the characters shown: a byte of one that is not whole waits with it
            end = max(self.tokens, min(len(job.tokens), ready - self.characters.unfinished))
            logprobs = run._logprobs(self.index, self.tokens, end, self.count) if end > self.tokens or done else None
            if logprobs is not None:
                choice["logprobs"] = logprobs.model_dump()
            if request.gates:
                choice["gates"] = _gates(job.tokens[self.tokens : end])
            self.tokens = end
        self.count += len(new)
        if done and job.state is not None:
            choice["state"] = run.states.keep(job.state)
        return choice


def _visible(job: Job) -> int:
    """Tokens of a finished job that belong to its text: not those of a stop."""
    return min(len(job.tokens), (len(job.prompt) if job.prompt_tokens else 0) + len(job.text))


def _reason(job: Job) -> Literal["stop", "length"] | None:
    if job.finish_reason == "stop":
        return "stop"
    return "length" if job.finish_reason == "length" else None


def _named(token: Token) -> dict[str, float]:
    """The most likely bytes by name, with the one that came among them."""
    found = {name(symbol): value for symbol, value in token.top}
    found.setdefault(name(token.symbol), token.log_probability)
    return found


def _gates(tokens: list[Token]) -> list[list[list[float]] | None]:
    return [None if token.gates is None else token.gates.round(3).astype(float).round(3).tolist() for token in tokens]


def _stops(request: CompletionRequest) -> list[bytes]:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > _MOST_STOPS:
        raise ApiError(400, f"stop has {len(stops)} texts; at most {_MOST_STOPS}", param="stop")
    found = [encode(stop, "stop") for stop in stops]
    if any(len(stop) > _LONGEST_STOP for stop in found):
        raise ApiError(400, f"stop has a text of more than {_LONGEST_STOP} bytes", param="stop")
    return found


def _refuse_unsupported(request: CompletionRequest) -> None:
    for param in ("presence_penalty", "frequency_penalty", "logit_bias", "suffix"):
        if getattr(request, param):
            raise ApiError(400, f"{param} is not supported; leave it out", param=param)
    if request.best_of not in (None, request.n or 1):
        raise ApiError(400, f"best_of is {request.best_of}; only n ({request.n or 1}) is supported", param="best_of")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only for stream: true", param="stream_options")
