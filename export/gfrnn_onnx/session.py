"""Session: sequences that carry their own state through an exported model.

Text starts as if after one newline from a zero state, as everywhere in gfrnn. One thread at a time may use a session.

Legend: B sequences, V symbols, N bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from gfrnn_onnx.names import DECODER, ENCODER, LOGITS, NEWLINE, Metadata, ModelError, find_model
from gfrnn_onnx.runner import Logits, Provider, Rows, Step, Symbols
from gfrnn_onnx.sampling import Sampling, bits, draw, stop_length
from gfrnn_onnx.state import State

_MOST_CHARACTERS = 64  # of a prediction: more than any target has
_MOST_ROWS = 64  # stepped at once


class Session:
    """A model of text (a step.onnx), or of programs (a folder with encoder.onnx and decoder.onnx).

    Args:
        path: the file, the folder, or the name of a model that ships.
        provider: "cpu" or "cuda"; None: CUDA where it works, else (and for int8) the CPU. `provider` then says which.
        threads: of the CPU's products; None: one a physical core.

    Raises:
        ModelError (a ValueError): missing, damaged or foreign files, a provider that is not here.
    """

    def __init__(self, path: str | Path, provider: Provider | None = None, *, threads: int | None = None):
        path = find_model(path)
        self.encoder: Step | None = None
        if path.is_dir():
            self.encoder = Step(path / ENCODER, provider, threads=threads)
            self._step = Step(path / DECODER, provider, threads=threads)
            if (self.encoder.metadata.kind, self._step.metadata.kind) != ("encoder", "decoder"):
                raise ModelError(f"{path} has not an encoder and a decoder in it: export the run again")
            if self.encoder.metadata.run_id != self._step.metadata.run_id or self.encoder.shape != self._step.shape:
                raise ModelError(f"{path} has halves of two models in it: export the run again")
        else:
            self._step = Step(path, provider, threads=threads)
            if self._step.metadata.kind != "text":
                raise ModelError(f"{path} is half of a model of programs: give its folder")
        self._rows: dict[int, Rows] = {}
        self._encoder_rows: Rows | None = None

    @property
    def metadata(self) -> Metadata:
        """What the file (of programs: the decoder) says about itself."""
        return self._step.metadata

    @property
    def provider(self) -> Provider:
        """What runs it: "cpu" or "cuda"."""
        return self._step.provider

    def zero_state(self, batch: int = 1) -> State:
        """What every sequence starts from (text: before the newline that it starts with)."""
        return self._step.zero_state(batch)

    def step(self, token: Symbols | Sequence[int], state: State | None = None) -> tuple[Logits, State]:
        """One symbol of each of B sequences: token [B] -> logits of what comes next [B, V], the state after it.

        state: None starts from zeros. An unrolled model reads token [B, K] and gives logits [B, K, V]. The state given
        stays as it was, so one may be used again, in other ways. Raises ValueError for shapes that do not fit.
        """
        logits, after = self._step(np.asarray(token), state)
        assert logits is not None
        return logits, after

    @overload
    def score(self, text: bytes) -> npt.NDArray[np.float64]: ...
    @overload
    def score(self, text: Sequence[bytes]) -> list[npt.NDArray[np.float64]]: ...

    def score(self, text: bytes | Sequence[bytes]) -> npt.NDArray[np.float64] | list[npt.NDArray[np.float64]]:
        """Bits that the model needs for each byte: [N], -log2 p(byte | all before it); of several texts a list.

        Several are read side by side, which is faster than one after another.
        """
        self._check_text()
        if isinstance(text, bytes):
            return self.score([text])[0]
        found = [np.empty(len(each)) for each in text]
        order = sorted(range(len(text)), key=lambda k: -len(text[k]))  # those that run on stay at the front
        for begin in range(0, len(order), _MOST_ROWS):
            some = order[begin : begin + _MOST_ROWS]
            if self.metadata.unroll > 1:
                self._score_unrolled([text[k] for k in some], [found[k] for k in some])
                continue
            rows = self._start(len(some))
            rows.symbols[: len(some)] = NEWLINE
            count = len(some)
            for position in range(len(text[some[0]])):
                while len(text[some[count - 1]]) <= position:
                    count -= 1
                logits_BV = rows.run(count)[LOGITS]
                now_B = np.array([text[k][position] for k in some[:count]], np.int64)
                for row, value in enumerate(bits(logits_BV, now_B)):
                    found[some[row]][position] = value
                rows.symbols[:count] = now_B
        return found

    def _score_unrolled(self, texts: list[bytes], found: list[npt.NDArray[np.float64]]) -> None:
        K, longest = self.metadata.unroll, max(map(len, texts))
        padded = np.full((len(texts), -(-longest // K) * K + 1), NEWLINE, np.int64)
        for row, text in enumerate(texts):
            padded[row, 1 : 1 + len(text)] = np.frombuffer(text, np.uint8)
        state = self.zero_state(len(texts))
        for begin in range(0, longest, K):
            logits_BKV, state = self.step(padded[:, begin : begin + K], state)
            for k in range(min(K, longest - begin)):
                values_B = bits(logits_BKV[:, k], padded[:, begin + k + 1])
                for row, text in enumerate(texts):
                    if begin + k < len(text):
                        found[row][begin + k] = values_B[row]

    @overload
    def generate(self, prompt: bytes, length: int, **options: object) -> bytes: ...
    @overload
    def generate(self, prompt: Sequence[bytes], length: int, **options: object) -> list[bytes]: ...

    def generate(  # type: ignore[misc]
        self,
        prompt: bytes | Sequence[bytes],
        length: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: bytes | Sequence[bytes] = (),
    ) -> bytes | list[bytes]:
        """At most `length` bytes that continue the prompt; of several prompts a list, written side by side.

        Args:
            temperature, top_k, top_p: as in sampling.Sampling.
            seed: the same one gives the same bytes, of several prompts each the same as alone; None: other ones.
            stop: end before the first of these.
        """
        self._check_text()
        sampling = Sampling(temperature, top_k, top_p)
        stops = [stop] if isinstance(stop, bytes) else list(stop)
        if length < 0 or any(not each for each in stops):
            raise ValueError(f"length is {length} and stop {stops}; length must not be negative, nor a stop be empty")
        if isinstance(prompt, bytes):
            return self._generate([prompt], length, sampling, seed, stops)[0]
        found: list[bytes] = []
        for begin in range(0, len(prompt), _MOST_ROWS):
            found += self._generate(prompt[begin : begin + _MOST_ROWS], length, sampling, seed, stops)
        return found

    def _generate(
        self, prompts: Sequence[bytes], length: int, sampling: Sampling, seed: int | None, stops: list[bytes]
    ) -> list[bytes]:
        rows = self._start(len(prompts))
        left = [iter(prompt) for prompt in prompts]
        draws = [np.random.default_rng(seed) for _ in prompts]
        written = [bytearray() for _ in prompts]
        running = list(range(len(prompts)))  # the sequence of each row
        rows.symbols[: len(prompts)] = NEWLINE
        while running and length:
            logits_BV = rows.run(len(running))[LOGITS]
            known = [next(left[k], -1) for k in running]
            drawing = [row for row, symbol in enumerate(known) if symbol < 0]  # prompts that have been read
            if drawing:
                numbers = np.array([draws[running[row]].random() for row in drawing])
                drawn = draw(logits_BV[drawing], [sampling] * len(drawing), numbers)
                for row, symbol in zip(drawing, drawn, strict=True):
                    known[row] = int(symbol)
                    written[running[row]].append(int(symbol))
            rows.symbols[: len(known)] = known
            for row in reversed(drawing):
                text = written[running[row]]
                stopped = stop_length(text, stops)
                del text[len(text) - stopped :]
                if stopped or len(text) >= length:  # the last row takes its place
                    rows.move(len(running) - 1, row)
                    running[row] = running[-1]
                    running.pop()
        return [bytes(text) for text in written]

    def stream(
        self, prompt: bytes, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None
    ) -> Iterator[int]:
        """Bytes that continue the prompt one by one, without end. The session is not for others meanwhile."""
        self._check_text()
        sampling, draws = Sampling(temperature, top_k, top_p), np.random.default_rng(seed)
        rows = self._start(1)
        for symbol in (NEWLINE, *prompt):
            rows.symbols[0] = symbol
            logits_BV = rows.run(1)[LOGITS]
        while True:
            symbol = int(draw(logits_BV, [sampling], np.array([draws.random()]))[0])
            yield symbol
            rows.symbols[0] = symbol
            logits_BV = rows.run(1)[LOGITS]

    def predict(self, program: str) -> str:
        """What the model takes a program to print: the most likely character each time, up to the '.' (left out).

        Raises ValueError for a character that no program has; ModelError for a model of text.
        """
        if self.encoder is None:
            raise ModelError(f"{self._step.path} is a model of text: it predicts no programs")
        symbols, targets = self.encoder.metadata.symbols, self.metadata.symbols
        unknown = sorted(set(program) - set(symbols))
        if unknown:
            raise ValueError(f"programs have no {unknown[0]!r}: they are made of {symbols!r}")
        if self._encoder_rows is None:
            self._encoder_rows = Rows(self.encoder, 1)
        rows = self._encoder_rows
        rows.clear()
        for character in program:
            rows.symbols[0] = symbols.index(character)
            rows.run(1)
        state = rows.get(0)
        rows = self._start(1)
        rows.put(0, state)
        end = symbol = targets.index(".")
        written = ""
        while len(written) < _MOST_CHARACTERS:
            rows.symbols[0] = symbol
            symbol = int(rows.run(1)[LOGITS][0].argmax())
            if symbol == end:
                break
            written += targets[symbol]
        return written

    def _check_text(self) -> None:
        if self.encoder is not None:
            raise ModelError(f"{self._step.path.parent} is a model of programs: it can only predict")

    def _start(self, count: int) -> Rows:
        """Rows for `count` sequences, all of them before their first symbol."""
        capacity = 1 << max(0, count - 1).bit_length()
        if capacity not in self._rows:
            self._rows[capacity] = Rows(self._step, capacity)
        rows = self._rows[capacity]
        rows.clear()
        return rows
