"""Sequences of many requests, stepped together in one run: each is a row that joins and leaves at any step.

A row reads its prompt, symbol by symbol, beside rows that write. What it draws depends on its own logits and its own
seed alone, and a row's logits do not depend on its company (products.py), so neither does its text. Two prompts with a
common beginning read it once: from states of prompts read before (prefixes.py), or, while one of them is being read,
by waiting for it.

One thread steps. What a job is told (text, tokens, done) it finds in its own fields; `changed` says when to look.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gfrnn_onnx.names import GATES, LOGITS, NEWLINE
from gfrnn_onnx.runner import Rows, Step
from gfrnn_onnx.sampling import Sampling, draw, log_probabilities, stop_length
from gfrnn_onnx.server.metrics import Metrics
from gfrnn_onnx.server.prefixes import Parts, Prefixes, common_length

_START = bytes([NEWLINE])
_WORTH_WAITING = 16  # symbols of a common beginning
_BLOCK = 512  # symbols between states that are kept of a prompt

log = logging.getLogger("gfrnn_onnx")


class Busy(Exception):
    """No more sequences may wait."""


class Snapshot(NamedTuple):
    """Where a sequence can go on: the state before `pending`, symbols that it has not read yet (one at least)."""

    parts: Parts | None
    pending: bytes


class Token(NamedTuple):
    """A byte with what the model said of it."""

    symbol: int
    log_probability: float
    """Natural logarithm; of the model itself, whatever the temperature."""
    top: list[tuple[int, float]]
    """The most likely symbols with theirs, as many as were asked for."""
    gates: npt.NDArray[np.float32] | None
    """[layers, layers] global gates of the step that says what comes here."""


@dataclass(eq=False)
class Job:
    """One sequence: what is asked, and what has come of it so far."""

    prompt: bytes
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | Sequence[int] | None = None
    stops: Sequence[bytes] = ()
    top: int | None = None
    """Keep tokens, each with so many most likely symbols; None: no tokens."""
    prompt_tokens: bool = False
    """Also of the prompt."""
    gates: bool = False
    start: Snapshot | None = None
    """Go on from here; None: the start of a text."""
    keep_state: bool = False
    streamed: bool = False
    """Say after every step that something has changed, not only at the end."""
    deadline: float = float("inf")
    """time.monotonic()."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there is news; several jobs may share one."""

    text: bytearray = field(default_factory=bytearray, init=False)
    tokens: list[Token] = field(default_factory=list, init=False)
    finish_reason: str | None = field(default=None, init=False)
    """stop, length; timeout, cancelled, failed: nothing more comes."""
    state: Snapshot | None = field(default=None, init=False)
    cached: int = field(default=0, init=False)
    """Symbols of the prompt that need not be read again."""

    def __post_init__(self) -> None:
        before = self.start or Snapshot(None, _START)
        self.symbols = before.pending + self.prompt
        self.position = 0  # symbols read
        self.parts = before.parts
        self.to_read = len(self.symbols) - (self.max_tokens == 0)  # the last is read for what comes after it
        self.random = np.random.default_rng(self.seed)
        self.followers: list[tuple[int, Job]] = []  # (symbols, who goes on from there)

    @property
    def shares(self) -> bool:
        """Whether it may go on from another's state: not where every step is wanted, or where the start is its own."""
        return self.start is None and not self.prompt_tokens


class Engine:
    """Steps jobs in a thread of its own until closed. capacity: rows. cache_bytes: of states of prompts.

    max_waiting: sequences without a row.
    """

    def __init__(self, step: Step, capacity: int, *, max_waiting: int, cache_bytes: int, metrics: Metrics):
        self.step, self.capacity, self.max_waiting = step, capacity, max_waiting
        self.metrics = metrics
        self.rows = Rows(step, capacity)
        self.prefixes = Prefixes(cache_bytes)
        self.running: list[Job] = []  # by row
        self._queue: deque[Job] = deque()
        self._followers = 0
        self._cancelled: set[Job] = set()
        self._lock = threading.Condition()
        self._closing = self._over = False
        self._thread = threading.Thread(target=self._work, name="steps", daemon=True)

    def start(self) -> None:
        """Called in the event loop that jobs are awaited in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Sequences that have no row yet."""
        return len(self._queue) + self._followers

    @property
    def healthy(self) -> bool:
        """Whether the stepping thread lives."""
        return self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs, all or none. Raises Busy if too many would wait. In the event loop of `start`."""
        with self._lock:
            if self._over:
                for job in jobs:
                    job.finish_reason = "failed"
                _wake(jobs)
                return
            room = self.max_waiting + self.capacity - len(self.running) - self.waiting
            if len(jobs) > room:
                raise Busy
            self._queue.extend(jobs)
            self._lock.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends jobs (those that have not ended) before the next step."""
        with self._lock:
            self._cancelled.update(job for job in jobs if job.finish_reason is None)
            self._lock.notify()

    def close(self) -> None:
        """Ends the thread, and with it whatever still runs."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join()

    # -- the stepping thread

    def _work(self) -> None:
        ended: list[Job] = []
        try:
            while True:
                with self._lock:
                    while not (self.running or self._queue or self._cancelled or self._closing):
                        self._lock.wait()
                    if self._closing:
                        break
                    ended = self._clear()
                    self._admit(ended)
                if self.running:
                    ended += self._step()
                self._tell(ended)
        except Exception:
            log.exception("the stepping thread failed")
        with self._lock:
            self._over = True
            left = [*self.running, *self._queue]
            left += [follower for job in left for _, follower in job.followers]
            self.running, self._queue = [], deque()
            for job in left:
                job.finish_reason = job.finish_reason or "failed"
            self._tell([*ended, *left])

    def _clear(self) -> list[Job]:
        """Takes out what was cancelled or is too late. Returns those jobs."""
        now, ended = time.monotonic(), []

        def out(job: Job) -> bool:
            if job in self._cancelled or now > job.deadline:
                job.finish_reason = "cancelled" if job in self._cancelled else "timeout"
                ended.append(job)
                return True
            return False

        for row in reversed([row for row, job in enumerate(self.running) if out(job)]):
            self._leave(row)
        if self._cancelled or any(job.deadline < now for job in self._queue):
            self._queue = deque([job for job in self._queue if not out(job)])
        for leader in self.running:
            staying = [pair for pair in leader.followers if not out(pair[1])]
            self._followers -= len(leader.followers) - len(staying)
            leader.followers = staying
        self._cancelled.clear()
        return ended

    def _admit(self, ended: list[Job]) -> None:
        """Gives rows to those who wait, first come first served."""
        while self._queue and len(self.running) < self.capacity:
            job = self._queue.popleft()
            if job.shares and job.position == 0:
                job.cached, job.parts = self.prefixes.longest(job.symbols[:-1])
                job.position = job.cached
            all_read = job.position >= job.to_read
            if not all_read and job.shares and job.position == job.cached and self._follow(job):
                continue
            self.metrics.cached_symbols.inc(max(0, job.cached - 1))
            if all_read:  # and nothing is to be written
                ended.append(self._finish(job, None, "length"))
                continue
            row = len(self.running)
            self.running.append(job)
            self.rows.put(row, job.parts)
            self.rows.symbols[row] = job.symbols[job.position]
            job.parts = None

    def _follow(self, job: Job) -> bool:
        """Whether it is better to wait until a running job has read their common beginning."""
        best, leader = job.position + _WORTH_WAITING, None
        for other in self.running:
            if other.start is None and job.position <= other.position < len(other.symbols) - 1:
                length = min(common_length(job.symbols, other.symbols), len(job.symbols) - 1)
                if length >= best and other.position < length <= other.to_read:
                    best, leader = length, other
        if leader is None:
            return False
        leader.followers.append((best, job))
        self._followers += 1
        return True

    def _step(self) -> list[Job]:
        """One run over all rows. Returns jobs that ended by it."""
        running, symbols = self.running, self.rows.symbols
        begin = time.perf_counter()
        found = self.rows.run(len(running))
        self.metrics.step(len(running), time.perf_counter() - begin)
        logits_BV, gates = found[LOGITS], found.get(GATES)

        drawing, reading, marked = [], 0, []
        for row, job in enumerate(running):
            job.position += 1
            if job.position < len(job.symbols):
                symbols[row] = job.symbols[job.position]
                reading += 1
                at_mark = job.position % _BLOCK == 0 or job.position == len(job.symbols) - 1
                worth_keeping = at_mark and job.start is None
            else:
                drawing.append(row)
                worth_keeping = False
            # who waits may want all of this prompt, which has been read when the first symbol is drawn
            if worth_keeping or any(length == job.position for length, _ in job.followers):
                marked.append(row)
        self.metrics.prompt_symbols.inc(reading)
        if drawing:
            some_BV = logits_BV if len(drawing) == len(running) else logits_BV[drawing]
            numbers = np.array([running[row].random.random() for row in drawing])
            symbols[drawing] = draw(some_BV, [running[row].sampling for row in drawing], numbers)
            self.metrics.symbols.inc(len(drawing))
        self._say(running, drawing, logits_BV, gates)
        for row in marked:
            self._keep_prefix(row)
        ended = []
        for row in drawing:
            job = running[row]
            job.text.append(int(symbols[row]))
            reason = _reason(job)
            if reason:
                ended.append(self._finish(job, row, reason))
        for job_row in [row for row, job in enumerate(running) if job.position >= job.to_read and not job.max_tokens]:
            ended.append(self._finish(running[job_row], job_row, "length"))
        for row in reversed([row for row, job in enumerate(running) if job.finish_reason]):
            self._leave(row)
        return ended

    def _say(
        self,
        running: list[Job],
        drawing: list[int],
        logits_BV: npt.NDArray[np.float32],
        gates: npt.NDArray[np.float32] | None,
    ) -> None:
        """Tokens of those who want them: of what was drawn, or of the prompt's next symbol."""
        drawn = set(drawing)
        wanted = [
            row
            for row, job in enumerate(running)
            if job.top is not None and (row in drawn or (job.prompt_tokens and job.position < len(job.symbols)))
        ]
        if not wanted:
            return
        known_B = self.rows.symbols[wanted]
        said_BV = log_probabilities(logits_BV[wanted])
        chosen_B = said_BV[np.arange(len(wanted)), known_B]
        for k, row in enumerate(wanted):
            job = running[row]
            top = _most_likely(said_BV[k], job.top or 0)
            own = gates[row].copy() if job.gates and gates is not None else None
            job.tokens.append(Token(int(known_B[k]), float(chosen_B[k]), top, own))

    def _keep_prefix(self, row: int) -> None:
        """Keeps a reading row's state, for others with the same beginning; lets those go on who wait for it."""
        job = self.running[row]
        due = [follower for length, follower in job.followers if length == job.position]
        parts = self.rows.get(row)
        self.prefixes.keep(job.symbols[: job.position], parts)
        if due:
            job.followers = [pair for pair in job.followers if pair[1] not in due]
            with self._lock:
                self._followers -= len(due)
                for follower in reversed(due):
                    follower.cached = follower.position = job.position
                    follower.parts = parts
                    self._queue.appendleft(follower)

    def _finish(self, job: Job, row: int | None, reason: str) -> Job:
        if job.keep_state:
            if row is None:
                job.state = Snapshot(job.parts, job.symbols[job.position :])
            else:
                read = job.symbols + bytes(job.text)
                job.state = Snapshot(self.rows.get(row), read[job.position :])
        if reason == "stop":
            del job.text[len(job.text) - stop_length(job.text, job.stops) :]
        job.finish_reason = reason
        return job

    def _leave(self, row: int) -> None:
        """The last row takes a row's place; who waited for its state has to read for themselves."""
        job = self.running[row]
        if job.followers:
            with self._lock:
                self._followers -= len(job.followers)
                self._queue.extendleft(follower for _, follower in reversed(job.followers))
            job.followers = []
        last = len(self.running) - 1
        if row != last:
            self.rows.move(last, row)
            self.running[row] = self.running[last]
        self.running.pop()

    def _tell(self, ended: list[Job]) -> None:
        """Wakes those who await a job, all by one call into their event loop."""
        changed = ended + [job for job in self.running if job.streamed and (job.text or job.tokens)]
        self.metrics.rows.set(len(self.running))
        self.metrics.waiting.set(self.waiting)
        if changed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_wake, changed)


async def finished(jobs: Sequence[Job]) -> None:
    """Waits until all of these, which share one event, have ended."""
    while any(job.finish_reason is None for job in jobs):
        await jobs[0].changed.wait()
        jobs[0].changed.clear()


def _wake(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.changed.set()


def _reason(job: Job) -> str | None:
    """Why a job ends with its last symbol, if it does."""
    if stop_length(job.text, job.stops):
        return "stop"
    return "length" if len(job.text) >= job.max_tokens else None


def _most_likely(said_V: npt.NDArray[np.float64], count: int) -> list[tuple[int, float]]:
    """The `count` most likely symbols, most likely first, the first of equals first."""
    if count == 0:
        return []
    if count == 1:
        best = int(said_V.argmax())
        return [(best, float(said_V[best]))]
    return [(int(symbol), float(said_V[symbol])) for symbol in np.argsort(-said_V, kind="stable")[:count]]


def choice_seed(seed: int | None, index: int) -> int | list[int] | None:
    """The seed of choice `index` of a request: the first has the request's own."""
    return seed if seed is None or index == 0 else [seed, index]
