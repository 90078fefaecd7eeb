"""The unrolled step of a trained net as an ONNX graph.

What reads the states at t-1 ungated waits for nothing, so for all layers together it is one product at the start of the
step, as in training. What is left of a layer is the layer below, and the gated states: since a gate is a scalar, they
are gated before the product, [g^1 h^1, .., g^L h^L] U, not after it.

Products whose right operand is a weight go through products.py, which knows precisions; nothing else differs by them.

Legend: B rows, L layers, H units, G, K, Lg as in gfrnn.nn.plan, U = (G - 1) * H unit gates' rows, S = L * H,
Y width of the net's output, V symbols. A layer's columns have the order unit gates, global gates, candidate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from torch import Tensor

from gfrnn.nn import GatedFeedbackRNN, LanguageModel, MultiplicativeRNN
from gfrnn.nn.language_model import SymbolRNN
from gfrnn.nn.plan import LayerWeights
from gfrnn.nn.units import NORM_EPS
from gfrnn_onnx import names
from gfrnn_onnx.names import PREFIX, WEIGHTS, Metadata
from gfrnn_onnx.precision import Precision
from gfrnn_onnx.products import Products

OPSET = 23
"""The newest that both the CPU and the CUDA provider have kernels for, of every operator here."""
IR_VERSION = 11
LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights that a protobuf holds, with room for the rest."""

Array = npt.NDArray[np.float32]
Parts = dict[str, ir.Value]
"""Of a layer's pre-activations, by name: unit [B, U], gates [B, Lg] (or both [B, U + Lg]), candidate [B, H]."""


class Graph:
    """Nodes and weights as they come. Calls name the operator: `graph("Add", a, b)`."""

    def __init__(self) -> None:
        self.tape = ir.tape.Tape()
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def __call__(self, operator: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        return self.tape.op(operator, inputs, attributes or None, domain=domain)

    def several(self, operator: str, count: int, *inputs: ir.Value | None, **attributes: Any) -> list[ir.Value]:
        """The outputs of an operator that has `count`."""
        return list(self.tape.op_multi_out(operator, inputs, attributes or None, num_outputs=count))

    def weight(self, name: str, value: npt.NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer."""
        return self.tape.initializer(ir.tensor(np.ascontiguousarray(value), dtype=dtype, name=name), name=name)

    def constant(self, *numbers: float, dtype: Any = np.int64, scalar: bool = False) -> ir.Value:
        """A small constant, [n] or a scalar; the same ones are made once."""
        key = (numbers, np.dtype(dtype).name, scalar)
        if key not in self._constants:
            value = np.array(numbers[0] if scalar else numbers, dtype)
            self._constants[key] = self.weight(f"constant_{len(self._constants)}", value)
        return self._constants[key]

    def split(self, value: ir.Value, sizes: Iterable[int]) -> list[ir.Value]:
        """Along the last axis; no node for one part."""
        sizes = list(sizes)
        if len(sizes) == 1:
            return [value]
        return self.several("Split", len(sizes), value, self.constant(*sizes), axis=-1)

    def join(self, values: list[ir.Value]) -> ir.Value:
        """Along the last axis; no node for one part."""
        return values[0] if len(values) == 1 else self("Concat", *values, axis=-1)

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self("Reshape", value, self.constant(*shape))

    def total(self, *values: ir.Value | None) -> ir.Value:
        """The sum of those that there are; at least one."""
        found = [value for value in values if value is not None]
        total = found[0]
        for value in found[1:]:
            total = self("Add", total, value)
        return total


def build_step(model: SymbolRNN, *, precision: Precision = "fp32", unroll: int = 1, gates: bool = False) -> ir.Model:
    """The step of a net, with its softmax where it has one.

    Inputs token int64 [batch] (unrolled: [batch, unroll]), h [batch, L, H], LSTM also c; outputs logits [batch, V]
    (unrolled: [batch, unroll, V]), h_next, c_next; with `gates` the global gates [batch, L to, L from] of gated
    feedback (of the last symbol), by which layers read each other. batch is any number.
    """
    graph = Graph()
    products = Products(graph, precision)
    rnn = model.rnn
    L, size, has_cell = rnn.num_layers, rnn.hidden_size, model.settings.unit == "lstm"
    states = [names.H, names.C][: 1 + has_cell]
    token = ir.val(names.TOKEN, ir.DataType.INT64, ["batch"] if unroll == 1 else ["batch", unroll])
    inputs = [ir.val(name, ir.DataType.FLOAT, ["batch", L, size]) for name in states]
    h, c = inputs[0], inputs[1] if has_cell else None
    net = (
        _Mrnn(graph, products, model) if isinstance(rnn, MultiplicativeRNN) else _GatedFeedback(graph, products, model)
    )
    tokens = [token] if unroll == 1 else graph.several("Split", unroll, token, axis=1, num_outputs=unroll)
    outputs = []
    for each in tokens:
        y, h, c = net.step(each if unroll == 1 else graph.reshape(each, -1), h, c)
        outputs.append(y)

    named = []
    if isinstance(model, LanguageModel):
        V = model.softmax.out_features
        if unroll > 1:  # one product for all steps
            y = graph.reshape(graph.join(outputs), -1, rnn.output_size)
        logits = products(y, "softmax", lambda: _array(model.softmax.weight).T, bounded=not model.settings.residual)
        logits = graph("Add", logits, graph.weight("softmax_bias", _array(model.softmax.bias)))
        if unroll > 1:
            logits = graph.reshape(logits, -1, unroll, V)
        named.append(_named(logits, names.LOGITS, ["batch", V] if unroll == 1 else ["batch", unroll, V]))
    named += [
        _named(value, name, ["batch", L, size])
        for name, value in zip([names.H_NEXT, names.C_NEXT], (h, c), strict=True)
        if value is not None
    ]
    if gates:
        named.append(_named(net.gates(), names.GATES, ["batch", L, L]))
    return ir.Model(
        ir.Graph(
            [token, *inputs],
            named,
            nodes=graph.tape.nodes,
            initializers=graph.tape.initializers,
            opset_imports={"": OPSET, **products.domains},
            name="step",
        ),
        ir_version=IR_VERSION,
        producer_name="gfrnn",
    )


def save_step(model: ir.Model, metadata: Metadata, path: Path) -> None:
    """Writes a step with what it says about itself; weights that are too large for one file lie beside it."""
    model.metadata_props.update(metadata.to_properties())
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, path, external_data=path.name + WEIGHTS if size > LARGEST_FILE else None)


def add_bpc(path: Path, bpc: dict[str, float]) -> None:
    """Adds bits a character to a step that was saved without: protobuf reads messages one after another as one."""
    entry = onnx.StringStringEntryProto(key=f"{PREFIX}bpc", value=json.dumps(bpc))
    with path.open("ab") as file:
        file.write(onnx.ModelProto(metadata_props=[entry]).SerializeToString())


def _named(value: ir.Value, name: str, shape: list[Any]) -> ir.Value:
    value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape(shape)
    return value


def _array(tensor: Tensor) -> Array:
    return tensor.detach().float().cpu().numpy()


class _GatedFeedback:
    """The step of a GatedFeedbackRNN. Equations: gfrnn.nn.reference."""

    def __init__(self, graph: Graph, products: Products, model: SymbolRNN):
        assert isinstance(model.rnn, GatedFeedbackRNN)
        self.graph, self.products, self.plan = graph, products, model.rnn.plan
        self.weights, from_input = model.rnn.layer_weights()
        table_VN = _table(model, from_input)
        plan = self.plan
        self.sizes = {
            "unit": plan.unit_rows - plan.hidden_size,
            "gates": plan.global_gates,
            "candidate": plan.hidden_size,
        }
        self.sizes = {name: size for name, size in self.sizes.items() if size}
        everywhere = plan.input_skips
        self.tables = {}  # by layer that reads the input, with its bias
        for j in range(plan.num_layers if everywhere else 1):
            columns = table_VN[:, j * plan.rows : (j + 1) * plan.rows]
            self.tables[j] = self._ordered(columns + self._bias(j))
        # what reads h at t-1 ungated: of all layers, or of the layer's own
        self.reads_all: list[str] = []
        self.reads_own: list[str] = []
        if "unit" in self.sizes:
            (self.reads_all if plan.unit_sources > 1 else self.reads_own).append("unit")
        if "gates" in self.sizes:
            self.reads_all.append("gates")
        if plan.feedback != "gated":
            (self.reads_all if plan.candidate_sources > 1 else self.reads_own).append("candidate")
        if self.reads_all == ["unit", "gates"] and not plan.layer_norm:  # side by side from sum to sigmoid: fewer nodes
            self.reads_all = ["both"]
            self.sizes = {"both": plan.rows - plan.hidden_size, "candidate": plan.hidden_size}
        self.last_gates: list[ir.Value] = []

    def _bias(self, j: int) -> Array:
        """[K] of layer j; what is normalised gets its own after that."""
        bias = _array(self.weights[j].bias).copy()
        if self.weights[j].gain is not None:
            bias[: self.plan.unit_rows] = 0
        return bias

    def _ordered(self, columns: Array) -> Array:
        """[.., K] from training's order (candidate, unit gates, global gates) to this file's."""
        size = self.plan.hidden_size
        return np.concatenate([columns[..., size:], columns[..., :size]], axis=-1)

    def _below(self, w: LayerWeights) -> Array:
        """[H, K]."""
        assert w.below is not None
        return self._ordered(_array(w.below).T)

    def _recurrent(self, weights: list[LayerWeights], parts: list[str]) -> Array:
        """[sources * H, columns of those parts of each layer]."""
        parts = [name for part in parts for name in (["unit", "gates"] if part == "both" else [part])]
        found = [{"unit": w.unit, "gates": w.gates, "candidate": w.candidate}[part] for w in weights for part in parts]
        return np.concatenate([_array(tensor).T for tensor in found if tensor is not None], axis=1)

    def _split(self, value: ir.Value, names: list[str]) -> Parts:
        return dict(zip(names, self.graph.split(value, (self.sizes[name] for name in names)), strict=True))

    def step(
        self, token: ir.Value, h_BLH: ir.Value, c_BLH: ir.Value | None
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """token [B] -> y [B, Y], states after it."""
        graph, products, plan = self.graph, self.products, self.plan
        L, size = plan.num_layers, plan.hidden_size
        h_BS = graph.reshape(h_BLH, -1, L * size)
        h_own = graph.split(h_BS, [size] * L) if self.reads_own or plan.unit == "gru" else []
        c_own = graph.split(graph.reshape(c_BLH, -1, L * size), [size] * L) if c_BLH is not None else []
        read = [products.look_up(f"input_l{j}", table, token) for j, table in self.tables.items()]
        recurrent = self._early(h_BS, h_own)
        h_next: list[ir.Value] = []
        c_next: list[ir.Value] = []
        passed: list[ir.Value] = []  # what each layer passes up
        self.last_gates = []
        for j, w in enumerate(self.weights):
            below = None
            if j > 0:
                below = products(passed[-1], f"below_l{j}", partial(self._below, w), bounded=not plan.residual)
                if j not in self.tables:
                    below = graph("Add", below, products.shared(f"bias_l{j}", self._ordered(self._bias(j))))
            x = self._split(graph.total(read[j] if j in self.tables else None, below), list(self.sizes))
            unit_gates, g_BL = self._gates(j, x, recurrent[j])
            if g_BL is not None:
                self.last_gates.append(g_BL)
                gated_BLH = graph("Mul", h_BLH, graph("Unsqueeze", g_BL, graph.constant(2)))
                gated_BS = graph.reshape(gated_BLH, -1, L * size)
                weight = partial(self._recurrent, [w], ["candidate"])
                # gates make states small: at their scale of 1/127 that costs ten times the bits
                recurrent[j]["candidate"] = products(gated_BS, f"candidate_l{j}", weight, bounded=False)
            before = h_own[j] if h_own else None, c_own[j] if c_own else None
            h, c = self._unit(j, x["candidate"], recurrent[j]["candidate"], unit_gates, *before)
            h_next.append(h)
            if c is not None:
                c_next.append(c)
            passed.append(graph("Add", h, passed[-1]) if plan.residual and j > 0 else h)
        y = graph.join(passed) if plan.output_skips else passed[-1]
        h_BLH = graph.reshape(graph.join(h_next), -1, L, size)
        return y, h_BLH, graph.reshape(graph.join(c_next), -1, L, size) if c_next else None

    def _early(self, h_BS: ir.Value, h_own: list[ir.Value]) -> list[Parts]:
        """By layer, what reads the states at t-1 ungated."""
        L = self.plan.num_layers
        found: list[Parts] = [{} for _ in range(L)]
        if self.reads_all:
            weight = partial(self._recurrent, self.weights, self.reads_all)
            product = self.products(h_BS, "recurrent", weight, bounded=True)
            parts = iter(self.graph.split(product, [self.sizes[name] for _ in range(L) for name in self.reads_all]))
            found = [{name: next(parts) for name in self.reads_all} for _ in range(L)]
        if self.reads_own:
            for j, (w, h) in enumerate(zip(self.weights, h_own, strict=True)):
                weight = partial(self._recurrent, [w], self.reads_own)
                product = self.products(h, f"recurrent_l{j}", weight, bounded=True)
                found[j] |= self._split(product, self.reads_own)
        return found

    def gates(self) -> ir.Value:
        """[B, L to, L from] of the last step."""
        L = self.plan.num_layers
        return self.graph.reshape(self.graph.join(self.last_gates), -1, L, L)

    def _gates(self, j: int, x: Parts, recurrent: Parts) -> tuple[list[ir.Value], ir.Value | None]:
        """One layer's unit gates [B, H] each, and its global gates [B, L]."""
        graph, H, w = self.graph, self.plan.hidden_size, self.weights[j]
        count = self.plan.unit_rows // H - 1
        if "both" in x:
            *gates, g_BL = graph.split(
                graph("Sigmoid", graph("Add", x["both"], recurrent["both"])), [H] * count + [self.plan.global_gates]
            )
            return gates, g_BL
        g = graph("Sigmoid", graph("Add", x["gates"], recurrent["gates"])) if "gates" in x else None
        if "unit" not in x:
            return [], g
        a = graph("Add", x["unit"], recurrent["unit"])
        if w.gain is None:
            return graph.split(graph("Sigmoid", a), [H] * count), g
        parts = enumerate(graph.split(a, [H] * count))
        return [graph("Sigmoid", self._normal(j, k + 1, part)) for k, part in parts], g

    def _unit(
        self,
        j: int,
        x: ir.Value,
        s: ir.Value,
        gates: list[ir.Value],
        h: ir.Value | None,
        c: ir.Value | None,
    ) -> tuple[ir.Value, ir.Value | None]:
        """One layer's new h [B, H] and c, from its candidate's sums of input and layer below, and of states."""
        graph, w = self.graph, self.weights[j]
        if self.plan.unit == "gru":
            r, z = gates
            if w.hidden_bias is not None:
                s = graph("Add", s, self.products.shared(f"hidden_bias_l{j}", _array(w.hidden_bias)))
            s = graph("Mul", r, s)
        n = graph("Tanh", self._normal(j, 0, graph("Add", x, s)))
        if self.plan.unit == "gru":
            return graph("Add", n, graph("Mul", z, graph("Sub", h, n))), None
        if self.plan.unit == "tanh":
            return n, None
        i, f, o = gates
        if self.plan.cap_input_gate:
            i = graph("Min", i, graph("Sub", graph.constant(1.0, dtype=np.float32, scalar=True), f))
        c = cell = graph("Add", graph("Mul", f, c), graph("Mul", i, n))
        if w.cell_gain is not None and w.cell_bias is not None:
            cell = self._layer_norm(cell, f"norm_cell_l{j}", _array(w.cell_gain), _array(w.cell_bias))
        return graph("Mul", o, graph("Tanh", cell)), c

    def _normal(self, j: int, block: int, a: ir.Value) -> ir.Value:
        """Layer norm of one block of H pre-activations (0: the candidate), where the net has it."""
        w, H = self.weights[j], self.plan.hidden_size
        if w.gain is None:
            return a
        rows = slice(block * H, (block + 1) * H)
        return self._layer_norm(a, f"norm_l{j}_{block}", _array(w.gain)[rows], _array(w.bias)[rows])

    def _layer_norm(self, a: ir.Value, name: str, gain: Array, bias: Array) -> ir.Value:
        scale, shift = self.products.shared(name, gain), self.products.shared(f"{name}_bias", bias)
        return self.graph("LayerNormalization", a, scale, shift, axis=-1, epsilon=NORM_EPS)


class _Mrnn:
    """The step of a MultiplicativeRNN."""

    def __init__(self, graph: Graph, products: Products, model: SymbolRNN):
        assert isinstance(model.rnn, MultiplicativeRNN)
        self.graph, self.products, self.rnn = graph, products, model.rnn
        H = model.rnn.hidden_size
        self.table_V2H = _table(model, model.rnn.weight_ih)
        self.table_V2H[:, :H] += _array(model.rnn.bias)

    def step(self, token: ir.Value, h_B1H: ir.Value, c: ir.Value | None) -> tuple[ir.Value, ir.Value, None]:
        """token [B] -> y [B, H], states after it."""
        graph, products, H = self.graph, self.products, self.rnn.hidden_size
        x = products.look_up("input", self.table_V2H, token)
        to_h, to_m = graph.split(x, [H, H])
        h_BH = graph.reshape(h_B1H, -1, H)
        m = graph("Mul", to_m, products(h_BH, "factors", lambda: _array(self.rnn.weight_mh).T, bounded=True))
        recurrent = products(m, "recurrent", lambda: _array(self.rnn.weight_hm).T, bounded=False)
        h = graph("Tanh", graph("Add", to_h, recurrent))
        return h, graph.reshape(h, -1, 1, H), None

    def gates(self) -> ir.Value:
        raise AssertionError("has none")


def _table(model: SymbolRNN, from_input_NI: Tensor) -> Array:
    """[V, N]: what each symbol adds to the pre-activations; an embedding is multiplied out."""
    weight = _array(from_input_NI).T
    return weight.copy() if model.embedding is None else _array(model.embedding.weight) @ weight
