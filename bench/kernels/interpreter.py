"""Repairs to Triton 3.7.1's interpreter (TRITON_INTERPRET=1), so that its numbers equal those of a compiled kernel.

`repair()` corrects three faults:
    A bfloat16 block is stored as bit patterns in uint16, and most operations then compute on them as integers.
    Functions of libdevice return None.
    Float arguments stay Python floats and get no Triton type.
The interpreter still does not model races between programs, tf32, inline assembly and loads out of bounds.
"""

from math import erf

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.extra import libdevice
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
LIBDEVICE = {
    "tanh": np.tanh, "exp": np.exp, "expm1": np.expm1, "log": np.log, "log1p": np.log1p, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "pow": np.power, "isnan": np.isnan, "fast_expf": np.exp, "fast_logf": np.log,
    "erf": np.vectorize(erf, otypes=[np.float32]),
}  # fmt: skip


def repair() -> None:
    """Repair the interpreter of this process. A second call changes nothing."""
    if not getattr(InterpreterBuilder, "_repaired", False):
        InterpreterBuilder._repaired = True
        _repair_arithmetic(InterpreterBuilder)
        _repair_products_and_casts(InterpreterBuilder)
        _repair_sums()
        _repair_float_arguments()
        for name, function in LIBDEVICE.items():
            setattr(libdevice, name, _library_function(name, function))


def from_bits(x: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_bits(x: np.ndarray) -> np.ndarray:
    """The bfloat16 bit patterns of numbers, rounded to nearest with ties to even. NaN stays NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: TensorHandle) -> np.ndarray:
    return from_bits(handle.data) if _is_bf16(handle) and handle.data.dtype == np.uint16 else handle.data


def _bf16(values: np.ndarray, other=tl.int1) -> TensorHandle:
    """A bfloat16 handle of float values. The result of a comparison keeps its own type."""
    return TensorHandle(to_bits(values), tl.bfloat16) if values.dtype.kind == "f" else TensorHandle(values, other)


def _repair_arithmetic(builder) -> None:
    unary, binary, ternary = builder.unary_op, builder.binary_op, builder.ternary_op
    fma = builder.create_fma

    def repaired_binary(self, a, b, op):
        if _is_bf16(a) and _is_bf16(b) and op not in BITWISE:
            return _bf16(op(_values(a), _values(b)))
        return binary(self, a, b, op)

    def repaired_ternary(self, a, b, c, op):
        if op is not np.where and _is_bf16(c):
            return _bf16(op(_values(a), _values(b), _values(c)))
        return ternary(self, a, b, c, op)

    builder.unary_op = lambda self, a, op: _bf16(op(_values(a))) if _is_bf16(a) else unary(self, a, op)
    builder.binary_op = repaired_binary
    builder.ternary_op = repaired_ternary
    builder.create_fma = lambda self, a, b, c: (
        _bf16(_values(a) * _values(b) + _values(c)) if _is_bf16(c) else fma(self, a, b, c)
    )
    if not hasattr(builder, "get_bf16"):  # absent from 3.7.1: constants of type bfloat16
        builder.get_bf16 = lambda self, value: _bf16(np.array([value], dtype=np.float32))


def _repair_products_and_casts(builder) -> None:
    dot, cast = builder.create_dot, builder.cast_impl

    def repaired_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if not (_is_bf16(a) or _is_bf16(b) or a.dtype.primitive_bitwidth == 16):
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        a, b = (np.ascontiguousarray(_values(x), dtype=np.float32) for x in (a, b))
        return TensorHandle((a @ b + d.data).astype(d.data.dtype), d.dtype.scalar)

    def repaired_cast(self, x, dtype):
        if dtype.scalar == tl.bfloat16 and not _is_bf16(x):
            return TensorHandle(to_bits(x.data), tl.bfloat16)
        if _is_bf16(x) and dtype.scalar not in (tl.bfloat16, tl.float32):
            x = TensorHandle(_values(x), tl.float32)
        return cast(self, x, dtype)

    builder.create_dot, builder.cast_impl = repaired_dot, repaired_cast


def _repair_sums() -> None:
    total = interpreter.ReduceOps.sum

    def repaired(self, x):
        if not _is_bf16(x.handle):
            return total(self, x)
        sums = np.sum(_values(x.handle), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(to_bits(sums), x.dtype)

    interpreter.ReduceOps.sum = repaired


def _repair_float_arguments() -> None:
    convert = interpreter._implicit_cvt

    def repaired(arg):
        if isinstance(arg, float):  # a compiled kernel sees a float32 scalar
            return tl.tensor(TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return convert(arg)

    interpreter._implicit_cvt = repaired


def _library_function(name: str, function):
    def call(x, *others, _semantic=None):
        handle = x.handle if isinstance(x, tl.tensor) else interpreter.interpreter_semantic.to_tensor(x).handle
        values = function(_values(handle), *(_values(y.handle) if isinstance(y, tl.tensor) else y for y in others))
        out = _bf16(values) if _is_bf16(handle) else TensorHandle(values.astype(handle.data.dtype), handle.dtype.scalar)
        return tl.tensor(out, x.type)

    call.__name__ = name
    return call
