"""One exported step in ONNX Runtime: where it runs, and rows of carried state that it is run over.

Legend: B rows of a run, L layers, H units, V symbols, K symbols a run reads (1 unless unrolled).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime import OrtValue

from gfrnn_onnx import names
from gfrnn_onnx.names import GATES, LOGITS, TOKEN, Metadata, ModelError
from gfrnn_onnx.state import State

Symbols = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Provider = Literal["cpu", "cuda"]

log = logging.getLogger("gfrnn_onnx")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Step:
    """A step loaded and ready.

    Args:
        path: the .onnx file.
        provider: "cpu" or "cuda"; None: CUDA where it works, else (and for int8) the CPU.
        threads: of the CPU's products; None: ONNX Runtime's choice, one a physical core.
        cuda_graphs: on CUDA, replay each run as one launch, where that is possible.

    Raises:
        ModelError: no such file, not an exported step, damaged; a provider that is not here.
    """

    def __init__(
        self,
        path: str | Path,
        provider: Provider | None = None,
        *,
        threads: int | None = None,
        cuda_graphs: bool = True,
    ):
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelError(f"{path} is not there: give a file that to_onnx.py has written")
        if provider not in (None, *_PROVIDERS):
            raise ModelError(f"provider {provider!r} is unknown: give 'cpu' or 'cuda'")
        if provider == "cuda" and not _has_cuda_driver():
            raise ModelError("CUDA cannot be used here: there is no driver; take the provider 'cpu'")
        self.threads, self.graphs = threads, False
        wanted: Provider = provider or ("cuda" if _has_cuda_driver() else "cpu")
        why = ""
        try:
            self.session = self._load(wanted, cuda_graphs)
        except ModelError as error:
            if wanted == "cpu" or provider == "cuda":
                raise
            self.session, why = self._load("cpu", graphs=False), f" ({error})"  # its memory may be full
        self.provider: Provider = "cuda" if self.session.get_providers()[0] == _PROVIDERS["cuda"] else "cpu"
        if provider == "cuda" and self.provider != "cuda":
            raise ModelError("CUDA cannot be used here: see what ONNX Runtime says, or take the provider 'cpu'")
        if wanted != self.provider:
            log.warning("CUDA cannot be used here%s: on the CPU", why)
        try:
            self.metadata = Metadata.from_properties(self.session.get_modelmeta().custom_metadata_map)
        except ModelError as error:
            raise ModelError(f"{path} {error}") from error
        if provider is None and self.provider == "cuda" and self.metadata.precision == "int8":
            self.session, self.provider = self._load("cpu", graphs=False), "cpu"  # CUDA has no such products
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]
        states = [names.H, names.C][: len(self.inputs) - 1]
        if self.inputs != [TOKEN, *states] or not {names.H_NEXT, names.C_NEXT}.issuperset(self.state_outputs):
            raise ModelError(f"{path} has inputs {', '.join(self.inputs)}: not a step of gfrnn")
        shape = self.session.get_inputs()[1].shape
        self.shape: tuple[int, int] = (int(shape[1]), int(shape[2]))
        self.has_gates = GATES in self.outputs
        self.graph_ids = itertools.count()
        """Of CUDA graphs: each is of one shape, and of the addresses that it was captured with."""

    @property
    def state_outputs(self) -> list[str]:
        """h_next, for the LSTM also c_next."""
        return [name for name in self.outputs if name not in (LOGITS, GATES)]

    def _load(self, provider: Provider, graphs: bool) -> ort.InferenceSession:
        options = ort.SessionOptions()
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        # threads spin while they wait for a run's next part, not for the next run: full speed, and no burn when idle
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        providers: list[Any] = [_PROVIDERS["cpu"]]
        if provider == "cuda":
            exact = {"use_tf32": "0"}  # or products in fp32 would have 10 bits of fp32's 23
            providers.insert(0, (_PROVIDERS["cuda"], exact | ({"enable_cuda_graph": "1"} if graphs else {})))
        try:
            with contextlib.redirect_stdout(sys.stderr):  # they say there what they do not find
                if provider == "cuda":
                    ort.preload_dlls()
                session = ort.InferenceSession(str(self.path), options, providers=providers)
        except Exception as error:  # ONNX Runtime has a class of its own for each code, none of them public
            if provider == "cuda" and graphs:
                log.warning("CUDA graphs cannot be used here (%s): launches one by one", _first_line(error))
                return self._load(provider, graphs=False)
            raise ModelError(f"{self.path} cannot be loaded: {_first_line(error)}") from error
        self.graphs = graphs and session.get_providers()[0] == _PROVIDERS["cuda"]
        return session

    def check(self, symbols: Symbols) -> Symbols:
        """Symbols as int64 [B] (unrolled: [B, K]); raises ValueError for other shapes and for what is no symbol."""
        symbols = np.ascontiguousarray(symbols, np.int64)
        dims = 1 if self.metadata.unroll == 1 else 2
        if symbols.ndim != dims or (dims == 2 and symbols.shape[1] != self.metadata.unroll):
            wanted = "[batch]" if dims == 1 else f"[batch, {self.metadata.unroll}]"
            raise ValueError(f"symbols have shape {list(symbols.shape)}; this model reads {wanted}")
        if symbols.size and not (symbols.min() >= 0 and symbols.max() < self.vocabulary):
            raise ValueError(f"symbols must be from 0 to {self.vocabulary - 1}")
        return symbols

    @property
    def vocabulary(self) -> int:
        """Symbols that it reads."""
        return int(self.metadata.settings["vocab_size"])

    def zero_state(self, batch: int = 1) -> State:
        """What every sequence starts from."""
        parts = [np.zeros((batch, *self.shape), np.float32) for _ in self.state_outputs]
        return self._moved(State.of(*parts))

    def _moved(self, state: State) -> State:
        if self.provider == "cpu" or all(part.device_name() == "cuda" for part in state.values):
            return state
        return State([OrtValue.ortvalue_from_numpy(part, "cuda", 0) for part in state.arrays()])

    def __call__(self, symbols: Symbols, state: State | None = None) -> tuple[Logits | None, State]:
        """symbols [B] (unrolled [B, K]) and the state before them (None: zeros) -> logits [B, V] ([B, K, V]), state.

        An encoder has no logits: None. The state stays on the device. Raises ValueError for shapes that do not fit.
        """
        symbols = self.check(symbols)
        state = self.zero_state(len(symbols)) if state is None else self._moved(state)
        wanted = [len(symbols), *self.shape]
        if [part.shape() for part in state.values] != [wanted] * len(self.state_outputs):
            found = " and ".join(str(part.shape()) for part in state.values)
            raise ValueError(f"the state is {found}; this model has {len(self.state_outputs)} of {wanted}")
        binding = self.session.io_binding()
        binding.bind_cpu_input(TOKEN, symbols)
        for name, part in zip(self.inputs[1:], state.values, strict=True):
            binding.bind_ortvalue_input(name, part)
        # memory of their own: what a session allocates for its outputs, replays of its CUDA graphs may write to
        after = [OrtValue.ortvalue_from_shape_and_type(wanted, np.float32, self.provider, 0) for _ in state.values]
        for name, part in zip(self.state_outputs, after, strict=True):
            binding.bind_ortvalue_output(name, part)
        if has_logits := LOGITS in self.outputs:
            binding.bind_output(LOGITS, "cpu")
        options = ort.RunOptions()
        if self.graphs:
            options.add_run_config_entry("gpu_graph_id", "-1")  # addresses differ from call to call
        self.session.run_with_iobinding(binding, options)
        return binding.get_outputs()[-1].numpy() if has_logits else None, State(after)


class Rows:
    """A fixed number of rows of carried state, any first few of which are stepped together; nothing is allocated.

    Two buffers of states take turns as what a run reads and what it writes. On the CPU a run has as many rows as the
    least of `sizes` that holds those asked for; on CUDA always all, from which come two graphs at most. Not for several
    threads at once.
    """

    def __init__(self, step: Step, capacity: int):
        if step.metadata.unroll != 1:
            raise ModelError(f"{step.path} reads {step.metadata.unroll} symbols a run: export one without --unroll")
        self.step, self.capacity, self.on_cpu = step, capacity, step.provider == "cpu"
        sizes = _sizes(step, capacity)
        self.sizes = sizes if self.on_cpu else sizes[-1:]
        self.now = 0
        """Which of the two buffers has the present states."""
        most = self.sizes[-1]
        self.symbols = np.zeros(most, np.int64)
        """What each row reads in the next run."""
        shape = (most, *step.shape)
        self._states = [[np.zeros(shape, np.float32) for _ in step.state_outputs] for _ in range(2)]
        widths = {LOGITS: (_width(step),), GATES: (step.shape[0],) * 2}
        self._results = {
            name: np.zeros((most, *widths[name]), np.float32) for name in (LOGITS, GATES) if name in step.outputs
        }
        self._device_states = [[self._ort(part) for part in parts] for parts in self._states] if not self.on_cpu else []
        self._bindings: dict[tuple[int, int], tuple[ort.IOBinding, ort.RunOptions]] = {}
        if not self.on_cpu:
            self._device_symbols = self._ort(self.symbols)
            self._device_results = {name: self._ort(array) for name, array in self._results.items()}

    def _ort(self, array: npt.NDArray[Any]) -> OrtValue:
        device: tuple[Any, ...] = () if self.on_cpu else ("cuda", 0)
        return OrtValue.ortvalue_from_numpy(array, *device)

    def run(self, count: int) -> dict[str, Logits]:
        """Steps the first `count` rows. Returns their logits [count, V] (a decoder's or text's), and gates.

        What is returned is overwritten by the next run. Rows beyond `count` may have any state after it.
        """
        size = next(size for size in self.sizes if size >= count)
        binding, options = self._binding(size)
        if not self.on_cpu:
            self._device_symbols.update_inplace(self.symbols)
        self.step.session.run_with_iobinding(binding, options)
        if not self.on_cpu:
            for name, value in self._device_results.items():
                self._results[name] = value.numpy()
        self.now = 1 - self.now
        return {name: array[:count] for name, array in self._results.items()}

    def _binding(self, size: int) -> tuple[ort.IOBinding, ort.RunOptions]:
        key = (size, self.now)
        if key not in self._bindings:
            step, binding, options = self.step, self.step.session.io_binding(), ort.RunOptions()
            if step.graphs:
                options.add_run_config_entry("gpu_graph_id", str(next(step.graph_ids)))
            for side, bind in ((self.now, binding.bind_ortvalue_input), (1 - self.now, binding.bind_ortvalue_output)):
                of_states = step.inputs[1:] if side == self.now else step.state_outputs
                for k, name in enumerate(of_states):
                    part = self._ort(self._states[side][k][:size]) if self.on_cpu else self._device_states[side][k]
                    bind(name, part)
            symbols = self._ort(self.symbols[:size]) if self.on_cpu else self._device_symbols
            binding.bind_ortvalue_input(TOKEN, symbols)
            for name, array in self._results.items():
                value = self._ort(array[:size]) if self.on_cpu else self._device_results[name]
                binding.bind_ortvalue_output(name, value)
            self._bindings[key] = (binding, options)
        return self._bindings[key]

    def get(self, row: int) -> tuple[npt.NDArray[np.float32], ...]:
        """A copy of a row's state: (h,) or (h, c), [L, H]."""
        return tuple(part[row].copy() for part in self._host())

    def clear(self) -> None:
        """Sets every row's state to zeros."""
        parts = self._host()
        for part in parts:
            part[:] = 0
        self._to_device(parts)

    def put(self, row: int, state: tuple[npt.NDArray[np.float32], ...] | None) -> None:
        """Sets a row's state; None: zeros."""
        parts = self._host()
        for k, part in enumerate(parts):
            part[row] = 0 if state is None else state[k]
        self._to_device(parts)

    def move(self, source: int, target: int) -> None:
        """Copies a row's state (and the symbol that it reads next) over another's."""
        parts = self._host()
        for part in parts:
            part[target] = part[source]
        self.symbols[target] = self.symbols[source]
        self._to_device(parts)

    def _host(self) -> list[npt.NDArray[np.float32]]:
        """The present states in the computer's memory."""
        if self.on_cpu:
            return self._states[self.now]
        return [np.array(value.numpy()) for value in self._device_states[self.now]]

    def _to_device(self, parts: list[npt.NDArray[np.float32]]) -> None:
        if not self.on_cpu:
            for value, part in zip(self._device_states[self.now], parts, strict=True):
                value.update_inplace(part)


def _sizes(step: Step, capacity: int) -> list[int]:
    """Rows of a run: powers of two, so that there are few shapes, and the capacity.

    MatMulNBits computes an odd last row in another order than pairs of rows: there all are even, so that a row's result
    is the same in any company.
    """
    first = 2 if step.metadata.precision == "int4" else 1
    most = -(-capacity // first) * first
    return [*(1 << k for k in range(most.bit_length()) if first <= 1 << k < most), most]


def _width(step: Step) -> int:
    """V of its logits."""
    outputs = {each.name: each.shape for each in step.session.get_outputs()}
    return int(outputs[LOGITS][-1]) if LOGITS in outputs else 0


def _has_cuda_driver() -> bool:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return False
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
