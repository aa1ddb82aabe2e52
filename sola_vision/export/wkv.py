# SPDX-License-Identifier: Apache-2.0
"""Eq. 9 in ONNX's standard operators, at a cost linear in N: batched matrix products with small tables.

With lam = e^{-w/N}, e = e^k and x = e v, chunks of 16 tokens and N padded to whole chunks:

    inside a chunk    [x | e] T with T_ij = lam^{|i-j|-1}, diagonal e^u
    between chunks    sums of each chunk, seen from its right and left end, form a sequence 16 times shorter, which is
                      scanned in the same way, twice; the remaining N / 4096 are scanned by one dense table

That table is smaller than the sequence itself up to 16 million tokens. Exponents are float32, relative to the largest
key of each image and channel: exact for keys within 60 of it, for w >= -24 and for a bonus within 60 of zero;
values beyond are clamped to these bounds, and none becomes NaN. Sizes are read at run time, so one graph serves all.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_CHUNK = 16
_LEVELS = 2  # of chunks of chunks, before the dense table
_SMALLEST_KEY = -60.0
# in both directions: for a single token e^u is the only weight, which must neither vanish nor overflow (e^89)
_LARGEST_BONUS = 60.0
_LARGEST_WEIGHT = 24.0  # three levels of padding may multiply: e^72 is finite in float32

_STEP = np.arange(_CHUNK, dtype=np.float32)
_APART = _STEP - _STEP[:, None]  # distance of token j (column) after token i (row)
_ENDS = np.stack((_CHUNK - 1 - _STEP, _STEP))  # tokens up to the right end and up to the left end

Value = ir.Value


def placeholder(domain: str) -> Any:
    """Return a translation for torch's exporter that writes a single node DOMAIN::wkv."""
    import onnx
    from onnxscript import values

    parameter = onnx.defs.OpSchema.FormalParameter
    schema = onnx.defs.OpSchema(
        "wkv",
        domain,
        1,
        inputs=[parameter(name, "T") for name in ("decay", "bonus", "key", "value")],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
    )
    operator = values.Op(values.Opset(domain, 1), "wkv", schema)

    def wkv(decay: Any, bonus: Any, key: Any, value: Any) -> Any:
        return operator(decay, bonus, key, value)

    return wkv


def expand(model: ir.Model, domain: str) -> None:
    """Replace every placeholder in the graph by standard operators."""
    from onnxscript.rewriter import pattern, rewrite

    def one(op: Any, decay: Value, bonus: Value, key: Value, value: Value) -> Value:
        return op.wkv(decay, bonus, key, value, _domain=domain)

    def plain(op: Any, decay: Value, bonus: Value, key: Value, value: Value) -> Value:
        return _Wkv(op)(decay, bonus, key, value)

    rewrite(model, [pattern.RewriteRule(one, plain)])


class _Wkv:
    """Writes the operator's nodes with an onnxscript builder."""

    def __init__(self, op: Any) -> None:
        self.op = op

    def __call__(self, decay: Value, bonus: Value, key: Value, value: Value) -> Value:
        """decay, bonus [C], key, value [B, N, C] -> [B, N, C]."""
        op, stored = self.op, value.dtype
        decay, bonus, key, value = (self.float32(x) for x in (decay, bonus, key, value))
        length = op.Shape(key, start=1, end=2)
        d = op.Div(decay, op.Cast(length, to=ir.DataType.FLOAT))
        e = op.Sub(key, op.ReduceMax(key, self.ints(1), keepdims=1))
        e = op.Exp(op.Max(e, self.floats(_SMALLEST_KEY)))
        s = op.Transpose(op.Concat(op.Mul(e, value), e, axis=0), perm=[2, 0, 1])  # [C, 2B, N]
        s, chunks = self.chunked(s, length)

        table = self.powers(d, np.concatenate((np.abs(_APART) - 1, _ENDS.T), axis=1))
        diagonal = self.floats(np.eye(_CHUNK, _CHUNK + 2, dtype=bool))
        bonus = op.Min(op.Max(bonus, self.floats(-_LARGEST_BONUS)), self.floats(_LARGEST_BONUS))
        table = op.Where(diagonal, op.Unsqueeze(op.Exp(bonus), self.ints(1, 2)), table)
        near, right, left = op.Split(op.MatMul(s, table), self.ints(_CHUNK, 1, 1), axis=2, _outputs=3)
        sequence = op.Concat(self.ints(0, -1), chunks, axis=0)
        sums = op.Concat(op.Reshape(right, sequence), self.flipped(op.Reshape(left, sequence)), axis=1)
        carried = self.scan(op.Mul(d, self.floats(_CHUNK)), sums, chunks, _LEVELS)
        from_left, from_right = op.Split(carried, axis=1, num_outputs=2, _outputs=2)
        column = self.ints(0, -1, 1)
        carried = op.Concat(op.Reshape(from_left, column), op.Reshape(self.flipped(from_right), column), axis=2)
        far = op.MatMul(carried, self.powers(d, _ENDS[::-1]))
        numerator, denominator = op.Split(
            self.unchunked(op.Add(near, far), length, chunks), axis=1, num_outputs=2, _outputs=2
        )
        y = op.Transpose(op.Div(numerator, denominator), perm=[1, 2, 0])
        return y if stored == ir.DataType.FLOAT else op.Cast(y, to=stored)

    def scan(self, d: Value, s: Value, length: Value, levels: int) -> Value:
        """sum_{i<t} e^{-(t-i-1) d} s_i for every t; d [C], s [C, rows, length] -> the same."""
        op = self.op
        if levels == 0:
            return op.MatMul(s, self.triangle(d, length))
        s, chunks = self.chunked(s, length)
        later = (_APART > 0).astype(np.float32)
        table = self.powers(d, np.concatenate(((_APART - 1) * later, _ENDS[:1].T), axis=1))
        table = op.Mul(table, self.floats(np.concatenate((later, np.ones_like(_ENDS[:1].T)), axis=1)))
        near, sums = op.Split(op.MatMul(s, table), self.ints(_CHUNK, 1), axis=2, _outputs=2)
        sums = op.Reshape(sums, op.Concat(self.ints(0, -1), chunks, axis=0))
        carried = self.scan(op.Mul(d, self.floats(_CHUNK)), sums, chunks, levels - 1)
        far = op.Mul(op.Reshape(carried, self.ints(0, -1, 1)), self.powers(d, _STEP[None]))
        return self.unchunked(op.Add(near, far), length, chunks)

    def triangle(self, d: Value, length: Value) -> Value:
        """Return [C, length, length]: the weight of position i (row) at position t > i (column)."""
        op, one = self.op, self.floats(1)
        positions = op.Cast(op.Range(self.scalar(0), op.Squeeze(length), self.scalar(1)), to=ir.DataType.FLOAT)
        between = op.Sub(op.Sub(positions, op.Unsqueeze(positions, self.ints(1))), one)
        exponents = op.Mul(op.Unsqueeze(op.Neg(d), self.ints(1, 2)), between)
        table = op.Exp(op.Min(exponents, self.floats(_LARGEST_WEIGHT)))
        return op.Where(op.Less(between, self.floats(0)), self.floats(0), table)

    def chunked(self, s: Value, length: Value) -> tuple[Value, Value]:
        """[C, rows, length] -> [C, rows * chunks, 16] with zeros at the end, and the number of chunks [1]."""
        op = self.op
        missing = op.Mod(op.Neg(length), self.ints(_CHUNK))
        s = op.Pad(s, op.Concat(self.ints(0, 0, 0, 0, 0), missing, axis=0))
        return op.Reshape(s, self.ints(0, -1, _CHUNK)), op.Div(op.Add(length, missing), self.ints(_CHUNK))

    def unchunked(self, s: Value, length: Value, chunks: Value) -> Value:
        """[C, rows * chunks, 16] -> [C, rows, length]."""
        op = self.op
        s = op.Reshape(s, op.Concat(self.ints(0, -1), op.Mul(chunks, self.ints(_CHUNK)), axis=0))
        return op.Slice(s, self.ints(0), length, self.ints(2))

    def powers(self, d: Value, steps: NDArray[np.float32]) -> Value:
        """lam^steps: [C] -> [C, *steps.shape]."""
        op = self.op
        exponents = op.Mul(op.Unsqueeze(d, self.ints(*range(1, steps.ndim + 1))), self.floats(-steps))
        return op.Exp(op.Min(exponents, self.floats(_LARGEST_WEIGHT)))

    def flipped(self, s: Value) -> Value:
        return self.op.Slice(s, self.ints(-1), self.ints(-(2**31) + 1), self.ints(2), self.ints(-1))

    def float32(self, x: Value) -> Value:
        return x if x.dtype == ir.DataType.FLOAT else self.op.Cast(x, to=ir.DataType.FLOAT)

    def ints(self, *values: int) -> Value:
        return self.op.Constant(value_ints=list(values))

    def scalar(self, value: int) -> Value:
        return self.op.Constant(value_int=value)

    def floats(self, values: Any) -> Value:
        array = np.asarray(values)
        return self.op.Constant(
            value=ir.tensor(np.ascontiguousarray(array, None if array.dtype == bool else "float32"))
        )
