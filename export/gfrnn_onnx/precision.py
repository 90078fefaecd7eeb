"""The precisions that products can be exported in. Imports nothing: a command line is made from this."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

OPERATORS = {
    "fp32": "MatMul",
    "fp16": "MatMul",
    "bf16": "MatMul",
    "int8": "MatMulIntegerToFloat",
    "int4": "MatMulNBits",
}
"""Which operator makes the products."""

MEANING = {
    "fp32": "as trained",
    "fp16": "half the file; CUDA's fast products; on a CPU as fast as fp32",
    "bf16": "half the file, with fp32's range; as fast as fp32 everywhere",
    "int8": "a quarter of the file; for CPUs, several sequences or one",
    "int4": "an eighth of the file; for CPUs and one sequence at a time",
}
"""What each is for."""
