"""The fast kernel: compiled by numba, run on torch's own threads.

Tokens are taken in blocks. Both matrices' blocks are transposed into scratch that fits a core's cache, so
that each wanted entry is a dot product of two contiguous runs. Sixteen entries are summed at a time, in
vectors of sixteen floats whatever the machine's own width is, so the order of every sum is written down here
and not left to the compiler. numba cannot say "vector" in Python; the two inner steps are therefore given to
it as LLVM code.

Importing this module imports numba and compiles (about 1 s, or half of that from numba's cache on disk).
Nothing else in the package does, and it is imported when it is first needed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numba
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils
from numba.extending import intrinsic
from torch.nn import functional

from fedmask.kernels.pattern import Pattern

LANES = 16
BLOCK = 32
"""Tokens in a block: scratch takes 128 bytes a feature, 640 KiB for the widest layer of a 355 M model."""

_ADDRESS = ir.IntType(64)
_INDEX = ir.IntType(32)
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_ROW_BYTES = 4 * BLOCK
_JOB_SIZE = 20
_Job = ctypes.c_int64 * _JOB_SIZE  # what the compiled code is told: numbers, bytes and addresses


def _int(value: int) -> ir.Constant:
    return ir.Constant(_ADDRESS, value)


def _at(b: Any, address: Any, offset: Any, kind: Any = _VECTOR) -> Any:
    return b.inttoptr(b.add(address, offset), kind.as_pointer())


def _swap(b: Any, low: Any, high: Any, bit: int) -> tuple[Any, Any]:
    """Exchange the lanes of ``low`` whose number has ``bit`` for the lanes of ``high`` that do not."""

    def pick(lanes: list[int]) -> Any:
        return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(_INDEX, LANES), lanes))

    lanes = range(LANES)
    kept = [i if not i & bit else LANES + (i ^ bit) for i in lanes]
    moved = [i | bit if not i & bit else LANES + i for i in lanes]
    return pick(kept), pick(moved)


def _transpose(half: bool) -> Any:
    """Code that writes a tile of 16 tokens and 16 features as columns.

    ``half``: the matrix is bfloat16, else float32. Arguments: address of the tile, bytes from token to
    token, number of tokens (those beyond read as ``zeros``), address of 64 zero bytes, address of the
    tile's first column in scratch.
    """

    def typed(context: Any, tile: Any, stride: Any, tokens: Any, zeros: Any, scratch: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            tile, stride, tokens, zeros, scratch = arguments
            lines = []
            for token in range(LANES):
                line = b.add(tile, b.mul(stride, _int(token)))
                line = b.select(b.icmp_signed("<", _int(token), tokens), line, zeros)
                if half:
                    wide = ir.VectorType(_INDEX, LANES)
                    bits = b.load(_at(b, line, _int(0), ir.VectorType(ir.IntType(16), LANES)), align=2)
                    shifted = b.shl(b.zext(bits, wide), ir.Constant(wide, [16] * LANES))
                    lines.append(b.bitcast(shifted, _VECTOR))
                else:
                    lines.append(b.load(_at(b, line, _int(0)), align=4))
            for bit in (1, 2, 4, 8):
                for i in range(LANES):
                    if not i & bit:
                        lines[i], lines[i | bit] = _swap(b, lines[i], lines[i | bit], bit)
            for feature, line in enumerate(lines):
                b.store(line, _at(b, scratch, _int(feature * _ROW_BYTES)), align=64)
            return context.get_dummy_value()

        return numba.void(*[numba.int64] * 5), generate

    return intrinsic(typed)


def _add_dots(context: Any, left: Any, right: Any, rows: Any, cols: Any, count: Any, sums: Any) -> Any:
    """Code that adds to ``sums[i]`` the dot product of columns ``left[rows[i]]`` and ``right[cols[i]]``.

    Arguments are addresses, but for ``count``: entries from there on repeat the last and are not used.
    """

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        left, right, rows, cols, count, sums = arguments
        name, kind = f"llvm.fmuladd.v{LANES}f32", ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        fma = cgutils.get_or_insert_function(b.module, kind, name)

        def column(base: Any, indices: Any, offset: Any) -> Any:
            index = b.sext(b.load(_at(b, indices, offset, _INDEX), align=4), _ADDRESS)
            return b.add(base, b.mul(index, _int(_ROW_BYTES)))

        last = b.sub(count, _int(1))
        dots = []
        for entry in range(LANES):
            offset = b.mul(b.select(b.icmp_signed("<", _int(entry), count), _int(entry), last), _int(4))
            one, other = column(left, rows, offset), column(right, cols, offset)
            dot = ir.Constant(_VECTOR, [0.0] * LANES)
            for start in range(0, _ROW_BYTES, 4 * LANES):
                pair = [b.load(_at(b, side, _int(start)), align=64) for side in (one, other)]
                dot = b.call(fma, [*pair, dot])
            dots.append(dot)
        for bit in (1, 2, 4, 8):  # each turn folds lanes in two and joins two entries, as a transpose would
            dots = [b.fadd(*_swap(b, dots[i], dots[i + 1], bit)) for i in range(0, len(dots), 2)]
        place = _at(b, sums, _int(0))
        b.store(b.fadd(b.load(place, align=4), dots[0]), place, align=4)
        return context.get_dummy_value()

    return numba.void(*[numba.int64] * 6), generate


def _take(context: Any, counter: Any) -> Any:
    """Code that returns the number at an address and adds one to it, as one step for all threads."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.atomic_rmw("add", _at(b, arguments[0], _int(0), _ADDRESS), _int(1), "monotonic")

    return numba.int64(numba.int64), generate


_transpose_float = _transpose(half=False)
_transpose_half = _transpose(half=True)
_add_sixteen = intrinsic(_add_dots)
_take_next = intrinsic(_take)


def _columns(
    matrix: int, stride: int, half: int, size: int, first: int, last: int, zeros: int, scratch: int
) -> None:
    """Transpose the tokens from ``first`` to ``last`` of one matrix into scratch, and zeros up to a block."""
    for start in range(0, BLOCK, LANES):
        line = matrix + (first + start) * stride
        for left_edge in range(0, size, LANES):
            feature = min(left_edge, size - LANES)  # the last tile overlaps, not to end short
            column = scratch + feature * _ROW_BYTES + 4 * start
            if half:
                _transpose_half(line + 2 * feature, stride, last - first - start, zeros, column)
            else:
                _transpose_float(line + 4 * feature, stride, last - first - start, zeros, column)


_columns_compiled = numba.njit(nogil=True, error_model="numpy")(_columns)


def _work(pointer: Any) -> None:
    """Sum parts of the tokens until none is left; any number of threads may do so at once.

    Which thread takes which part changes nothing: a part has its own scratch and its own sums.
    """
    job = numba.carray(pointer, (_JOB_SIZE,), numba.int64)
    parts, part_tokens, tokens = job[1], job[2], job[3]
    grad, grad_stride, grad_half, outputs = job[4], job[5], job[6], job[7]
    inputs, input_stride, input_half, features = job[8], job[9], job[10], job[11]
    rows, cols, k, zeros = job[12], job[13], job[14], job[15]
    scratch, scratch_bytes, all_sums, sums_bytes = job[16], job[17], job[18], job[19]
    while True:
        part = _take_next(job.ctypes.data)
        if part >= parts:
            break
        left = scratch + part * scratch_bytes
        right = left + outputs * _ROW_BYTES
        sums = all_sums + part * sums_bytes
        end = min(tokens, (part + 1) * part_tokens)
        for first in range(part * part_tokens, end, BLOCK):
            last = min(end, first + BLOCK)
            _columns_compiled(grad, grad_stride, grad_half, outputs, first, last, zeros, left)
            _columns_compiled(inputs, input_stride, input_half, features, first, last, zeros, right)
            for entry in range(0, k, LANES):
                at = 4 * entry
                _add_sixteen(left, right, rows + at, cols + at, k - entry, sums + at)


def _compile() -> Any:
    """The compiled ``_work``: from numba's cache on disk where there is one that can be written."""
    signature = numba.void(numba.types.voidptr)
    try:
        return numba.cfunc(signature, cache=True)(_work)
    except RuntimeError:  # numba found no folder for its cache: a read-only install and no home
        return numba.cfunc(signature)(_work)


def _find_team() -> Callable[[int, int, int, int], None] | None:
    """What starts a function on torch's own OpenMP threads, or None where torch has another thread library.

    A pool of our own would fight for the cores with torch's threads, which spin between two of its calls.
    """
    try:
        start = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    start.restype = None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return start


# At import, under Python's import lock: two threads that compiled at once could free each other's code.
_CODE = _compile()
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_CODE.address)  # releases the interpreter lock
_TEAM = _find_team()


class _Workspace(threading.local):
    """One thread's scratch. It grows to the widest layer's need and serves every layer after that."""

    def __init__(self) -> None:
        self.floats = torch.empty(0)

    def reserve(self, size: int) -> torch.Tensor:
        """At least ``size`` floats from a multiple of 64 bytes on; they hold what was last left there."""
        if self.floats.shape[0] < size:
            memory = torch.empty(size + LANES)
            self.floats = memory[-memory.data_ptr() % 64 // 4 :]
        return self.floats


_workspace = _Workspace()


def _readable(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix in float32 or bfloat16, features side by side, at least a tile wide; itself if so."""
    if matrix.dtype not in (torch.float32, torch.bfloat16):
        matrix = matrix.float()
    if matrix.shape[1] < LANES:
        return functional.pad(matrix, (0, LANES - matrix.shape[1]))
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def sampled_gradient(
    grad_output: torch.Tensor, inputs: torch.Tensor, pattern: Pattern, threads: int
) -> torch.Tensor:
    """float32[k]: the pattern's entries of ``grad_output``^T ``inputs`` ([T, rows] and [T, cols]).

    The tokens are cut into at most ``threads`` parts of whole blocks, which are summed apart and then added
    in order: the result depends on ``threads``, never on how many threads really ran.
    """
    tokens, k = inputs.shape[0], pattern.k
    if not tokens or not k:
        return torch.zeros(k)
    grad_output, inputs = _readable(grad_output), _readable(inputs)
    blocks = -(-tokens // BLOCK)
    part_blocks = -(-blocks // threads)
    parts = -(-blocks // part_blocks)
    # Scratch: a line of zeros, each part's sums, each part's columns; all start at multiples of 64 bytes.
    padded, columns = -(-k // LANES) * LANES, (grad_output.shape[1] + inputs.shape[1]) * BLOCK
    zeroed = LANES + parts * padded
    floats = _workspace.reserve(zeroed + parts * columns)
    base = floats.data_ptr()
    ctypes.memset(base, 0, 4 * zeroed)
    job = _Job(
        *(0, parts, part_blocks * BLOCK, tokens),
        *_matrix(grad_output),
        *_matrix(inputs),
        *(pattern.rows.data_ptr(), pattern.cols.data_ptr(), k, base),
        *(base + 4 * zeroed, 4 * columns, base + 4 * LANES, 4 * padded),
    )
    if parts > 1 and _TEAM:
        # All of torch's threads, even where fewer have work: a smaller team would end the others' lives.
        _TEAM(_CODE.address, ctypes.addressof(job), threads, 0)
    else:
        _RUN(ctypes.addressof(job))
    result = floats[LANES : LANES + k].clone()
    for start in range(LANES + padded, zeroed, padded):
        result += floats[start : start + k]
    return result


def _matrix(matrix: torch.Tensor) -> tuple[int, int, int, int]:
    half = matrix.dtype == torch.bfloat16
    return matrix.data_ptr(), matrix.stride(0) * matrix.element_size(), int(half), matrix.shape[1]
