"""Products of activations with weights, and what it takes to have them in another precision.

fp32   MatMul.
fp16   operands in half precision, the result in fp32. Half the file. A speed for CUDA; a CPU computes it in fp32.
bf16   weights kept in bfloat16 and widened when the model is loaded. Half the file, fp32's range, and fp32's speed:
       CPUs have no such product in ONNX Runtime.
int8   weights 8 bits with one scale a column, of which they use -64 to 64: two products with activations then fit 16
       bits, in which CPUs without VNNI add them, so that every CPU computes the same; activations 8 bits, with the
       scale 1/127 where they are states, else one a row: so a row's result does not depend on the rows beside it, as
       it does by DynamicQuantizeLinear.
int4   weights 4 bits with one scale for each block of a column (MatMulNBits); activations in 8 bits inside it.

Tables that symbols are looked up in keep 16 bits where products have that or less.

Legend: B rows, K x N a weight, M columns of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfrnn_onnx.precision import Precision

if TYPE_CHECKING:
    from gfrnn_onnx.step import Graph

MICROSOFT = "com.microsoft"
Array = npt.NDArray[np.float32]
_LARGEST_BLOCK = 128
_ZERO = 128  # what 0 is in unsigned 8 bits
_LARGEST_WEIGHT = 64  # in 8 bits: 2 x 255 x 64 < 2^15, where x86's VPMADDUBSW saturates
_FLOAT, _FLOAT16 = int(ir.DataType.FLOAT), int(ir.DataType.FLOAT16)
_NARROW = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


class Products:
    """`products(x, name, weight)`: x [B, K] times weight() [K, N] -> [B, N]. A weight is made once by its name.

    bounded: whether x is in [-1, 1] and makes use of that, as states do.
    """

    def __init__(self, graph: Graph, precision: Precision):
        self.graph, self.precision = graph, precision
        self.domains = {MICROSOFT: 1} if precision in ("int8", "int4") else {}
        self._weights: dict[str, tuple[ir.Value, ...]] = {}
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._quantized: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value | None]] = {}

    def __call__(self, x: ir.Value, name: str, weight: Callable[[], Array], *, bounded: bool) -> ir.Value:
        if self.precision == "int8":
            return self._int8(x, name, weight, bounded)
        made: ir.Value = getattr(self, f"_{self.precision}")(x, name, weight)
        return made

    def shared(self, name: str, value: Array) -> ir.Value:
        """An initializer in fp32, made once."""
        return self._kept(name, lambda: (self.graph.weight(name, value),))[0]

    def look_up(self, name: str, table: Array, token: ir.Value) -> ir.Value:
        """Rows `token` [B] of a table [V, M] -> [B, M]."""
        dtype = np.dtype(np.float32) if self.precision == "fp32" else _NARROW.get(self.precision, _NARROW["fp16"])
        kept = self._kept(name, lambda: (self.graph.weight(name, table.astype(dtype)),))[0]
        rows = self.graph("Gather", kept, token)
        return rows if self.precision == "fp32" else self.graph("Cast", rows, to=_FLOAT)

    def _kept(self, name: str, make: Callable[[], tuple[ir.Value, ...]]) -> tuple[ir.Value, ...]:
        if name not in self._weights:
            self._weights[name] = make()
        return self._weights[name]

    def _fp32(self, x: ir.Value, name: str, weight: Callable[[], Array]) -> ir.Value:
        return self.graph("MatMul", x, *self._kept(name, lambda: (self.graph.weight(name, weight()),)))

    def _fp16(self, x: ir.Value, name: str, weight: Callable[[], Array]) -> ir.Value:
        graph = self.graph
        narrow = self._kept(name, lambda: (graph.weight(name, weight().astype(np.float16)),))
        return graph("Cast", graph("MatMul", graph("Cast", x, to=_FLOAT16), *narrow), to=_FLOAT)

    def _bf16(self, x: ir.Value, name: str, weight: Callable[[], Array]) -> ir.Value:
        def make() -> tuple[ir.Value, ...]:
            narrow = self.graph.weight(name, weight().astype(ml_dtypes.bfloat16))
            return (self.graph("Cast", narrow, to=_FLOAT),)

        return self.graph("MatMul", x, *self._kept(name, make))

    def _int8(self, x: ir.Value, name: str, weight: Callable[[], Array], bounded: bool) -> ir.Value:
        graph = self.graph

        def make() -> tuple[ir.Value, ...]:
            quantized, scale = quantize_columns(weight())
            return graph.weight(name, quantized), graph.weight(f"{name}_scale", scale)

        weight_KN, scale_N = self._kept(name, make)
        if x not in self._quantized:
            self._quantized[x] = self._by_number(x) if bounded else self._by_row(x)
        quantized, scale, scale_B1 = self._quantized[x]
        product = graph("MatMulIntegerToFloat", quantized, weight_KN, scale, scale_N, self._zero(), domain=MICROSOFT)
        return product if scale_B1 is None else graph("Mul", product, scale_B1)

    def _by_number(self, x: ir.Value) -> tuple[ir.Value, ir.Value, None]:
        """x in unsigned 8 bits, and the scale of all of it."""
        scale = self._number(1 / 127)
        return self.graph("QuantizeLinear", x, scale, self._zero()), scale, None

    def _by_row(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """x in unsigned 8 bits, a scale of 1, and each row's [B, 1]."""
        graph = self.graph
        largest = graph("ReduceMax", graph("Abs", x), graph.constant(-1), keepdims=1)
        scale = graph("Mul", graph("Max", largest, self._number(1e-30)), self._number(1 / 127))  # also of zeros
        one = self._number(1.0)
        return graph("QuantizeLinear", graph("Div", x, scale), one, self._zero()), one, scale

    def _number(self, value: float) -> ir.Value:
        return self.graph.constant(value, dtype=np.float32, scalar=True)

    def _zero(self) -> ir.Value:
        return self.graph.constant(_ZERO, dtype=np.uint8, scalar=True)

    def _int4(self, x: ir.Value, name: str, weight: Callable[[], Array]) -> ir.Value:
        graph = self.graph

        def make() -> tuple[ir.Value, ...]:
            weight_KN = weight()
            quantized, scale = quantize_blocks(weight_KN)
            self._sizes[name] = weight_KN.shape
            return graph.weight(name, quantized), graph.weight(f"{name}_scale", scale)

        parts = self._kept(name, make)
        K, N = self._sizes[name]
        sizes = {"K": K, "N": N, "bits": 4, "block_size": block_size(K)}
        return graph("MatMulNBits", x, *parts, domain=MICROSOFT, accuracy_level=4, **sizes)


def quantize_columns(weight_KN: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """A weight as 8 bits [K, N], -64 to 64, times a scale [N]."""
    scale_N = np.maximum(np.abs(weight_KN).max(0), 1e-30) / np.float32(_LARGEST_WEIGHT)
    return np.rint(weight_KN / scale_N).astype(np.int8), scale_N.astype(np.float32)


def block_size(K: int) -> int:
    """Rows of a column that share a scale, of K: a power of two from 16 to 128."""
    return int(min(_LARGEST_BLOCK, max(16, 1 << (K - 1).bit_length())))


def quantize_blocks(weight_KN: Array, tries: int = 12) -> tuple[npt.NDArray[np.uint8], Array]:
    """A weight as 4 bits [N, blocks, block / 2], 8 standing for 0, low half first, times scales [N, blocks].

    A block's scale is that of several which leaves the least squared error: to clip its largest weight a little often
    costs less than the coarser steps that it would ask for.
    """
    K, N = weight_KN.shape
    block = block_size(K)
    padded = np.zeros((N, -(-K // block) * block), np.float32)
    padded[:, :K] = weight_KN.T
    w = padded.reshape(N, -1, block)
    extreme = np.take_along_axis(w, np.abs(w).argmax(-1, keepdims=True), -1)
    best = np.full(extreme.shape, np.inf, np.float32)
    scale = np.ones_like(extreme)
    for part in np.linspace(0.7, 1.0, tries):
        # the extreme becomes -8, the one value that has no counterpart
        candidate = np.where(extreme == 0, 1, extreme * (part / -8)).astype(np.float32)
        error = ((np.clip(np.rint(w / candidate), -8, 7) * candidate - w) ** 2).sum(-1, keepdims=True)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, candidate, scale)
    q = (np.clip(np.rint(w / scale), -8, 7) + 8).astype(np.uint8)
    return q[..., 0::2] | q[..., 1::2] << 4, scale[..., 0]
