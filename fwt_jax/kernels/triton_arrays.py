"""Products, loads and stores of the kernels in the Triton language."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """A product of matrices with float32 sums; PRECISION is that of float32 numbers."""
    if INTERPRETED:  # The interpreter holds bfloat16 as integers, and would multiply those.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in dtype, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # The interpreter would truncate.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load(pointer, row, column, row_stride, column_stride, num_rows, num_columns,
         MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):  # fmt: skip
    """The entries of a matrix at some rows and columns; 0 outside of it."""
    entries = pointer + row[:, None] * row_stride + column[None, :] * column_stride
    if MASK_ROWS and MASK_COLUMNS:
        x = tl.load(entries, mask=(row < num_rows)[:, None] & (column < num_columns)[None, :], other=0.0)
    elif MASK_ROWS:
        x = tl.load(entries, mask=(row < num_rows)[:, None], other=0.0)
    elif MASK_COLUMNS:
        x = tl.load(entries, mask=(column < num_columns)[None, :], other=0.0)
    else:
        x = tl.load(entries)
    return x


@triton.jit
def store(pointer, x, row, column, row_stride, column_stride, num_rows, num_columns,
          MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):  # fmt: skip
    """Stores entries of a matrix at some rows and columns, but none outside of it."""
    entries = pointer + row[:, None] * row_stride + column[None, :] * column_stride
    x = rounded(x, pointer.dtype.element_ty)
    if MASK_ROWS or MASK_COLUMNS:
        tl.store(entries, x, mask=(row < num_rows)[:, None] & (column < num_columns)[None, :])
    else:
        tl.store(entries, x)


@triton.jit
def multiple_of_chunk(length, CHUNK: tl.constexpr, EXACT: tl.constexpr):
    """T. If it is a multiple of C, the compiler may load numbers of tokens 16 bytes at a time."""
    if EXACT:  # not tl.multiple_of, which says nothing of a number that is no pointer
        length = length // CHUNK * CHUNK
    return length


@triton.jit
def load_numbers(pointer, token, length, EXACT: tl.constexpr):
    """One number for each token; 0 past the end."""
    if EXACT:
        x = tl.load(pointer + token)
    else:
        x = tl.load(pointer + token, mask=token < length, other=0.0)
    return x
