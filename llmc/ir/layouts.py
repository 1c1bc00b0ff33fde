"""How a tensor lies in memory. One definition of each address serves packing, tests and codegen.

`address(shape, index)` is written with + * // % only, so that index may hold ints, NumPy arrays,
dims or a wrapper round LLVM values. Results count elements, not bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.errors import CompileError
from llmc.ir.dims import Dim, ceildiv, product
from llmc.ir.dtypes import DType, from_numpy


@dataclass(frozen=True)
class Rows:
    """Row-major and contiguous."""

    def elements(self, shape: Sequence[Dim]) -> Dim:
        return product(shape)

    def address(self, shape: Sequence[Any], index: Sequence[Any]) -> Any:
        offset = index[0] if len(index) else 0
        for size, position in zip(shape[1:], index[1:], strict=True):
            offset = offset * size + position
        return offset


@dataclass(frozen=True)
class Panels:
    """A matmul weight [k, n] in panels of `columns` columns, streamed from top to bottom.

    In memory: [panel][k / interleave][columns][interleave]; `interleave` consecutive k of one
    column fill one 32-bit lane (of 4-bit codes 8). With parts > 1 the n columns are that many equal
    parts (gate and up), and a panel holds columns / parts columns of each, side by side. k and n
    are padded with zeros.
    """

    columns: int
    interleave: int = 1
    parts: int = 1

    def panels(self, shape: Sequence[Dim]) -> Dim:
        return ceildiv(shape[1], self.columns) if self.parts == 1 else ceildiv(
            shape[1] // self.parts, self.columns // self.parts)

    def elements(self, shape: Sequence[Dim]) -> Dim:
        depth = ceildiv(shape[0], self.interleave) * self.interleave
        return self.panels(shape) * depth * self.columns

    def address(self, shape: Sequence[Any], index: Sequence[Any]) -> Any:
        k, n = index
        width = self.columns // self.parts
        depth = (shape[0] + self.interleave - 1) // self.interleave
        if self.parts == 1:
            panel, lane = n // width, n % width
        else:
            part_size = shape[1] // self.parts
            part, column = n // part_size, n % part_size
            panel, lane = column // width, part * width + column % width
        row = (panel * depth + k // self.interleave) * self.columns + lane
        return row * self.interleave + k % self.interleave


@dataclass(frozen=True)
class Columns:
    """A matmul weight [k, n], column after column: [n][k], each padded with zeros to a multiple of
    `multiple` elements. Every column is read in whole 16-byte pieces, and by bulk copies."""

    multiple: int = 64

    def stride(self, shape: Sequence[Dim]) -> Dim:
        """Elements from one column to the next."""
        return ceildiv(shape[0], self.multiple) * self.multiple

    def elements(self, shape: Sequence[Dim]) -> Dim:
        return shape[1] * self.stride(shape)

    def address(self, shape: Sequence[Any], index: Sequence[Any]) -> Any:
        k, n = index
        stride = (shape[0] + self.multiple - 1) // self.multiple * self.multiple
        return n * stride + k


@dataclass(frozen=True)
class RowBlocks:
    """Activations [rows..., k] in blocks of `rows` rows: [block][k / interleave][rows][interleave].

    As few blocks as will do, with the rows dealt out evenly (8 rows in blocks of 6 are 4 and 4): a
    block costs as much as its largest body. Rows beyond those dealt out are padding that kernels
    may read and must ignore.
    """

    rows: int
    interleave: int = 1

    def elements(self, shape: Sequence[Dim]) -> Dim:
        depth = ceildiv(shape[-1], self.interleave) * self.interleave
        return ceildiv(product(shape[:-1]), self.rows) * self.rows * depth

    def address(self, shape: Sequence[Any], index: Sequence[Any]) -> Any:
        row = Rows().address(shape[:-1], index[:-1])
        k = index[-1]
        depth = (shape[-1] + self.interleave - 1) // self.interleave
        own = self.rows_of_block(shape)
        line = (row // own) * depth + k // self.interleave
        return (line * self.rows + row % own) * self.interleave + k % self.interleave

    def rows_of_block(self, shape: Sequence[Any]) -> Any:
        """Rows in every block but the last, which may have fewer; at least 1."""
        rows = shape[0] if len(shape) > 1 else 1
        for size in shape[1:-1]:
            rows = rows * size
        rows = rows + 1 // (rows + 1)  # at least 1: these numbers have no maximum
        blocks = (rows + self.rows - 1) // self.rows
        return (rows + blocks - 1) // blocks


@dataclass(frozen=True)
class CodedRows:
    """Activations [rows..., k] of f32 rounded to int8 codes and a scale for each `group` k, in
    blocks of `rows` rows that are dealt out as in `RowBlocks`. In 32-bit words:

        [block][group]: f32 scales[rows], i32 sums[rows], codes [k / 4][rows] of four bytes

    The matmul reads weights of `bits` bits unpacked to bytes that are `offset` more than the codes.
    Below 8 bits, the four bytes of a word belong to the codes that one shift and mask unpack. A
    sum is what the product starts from: that of the group's codes times -offset, plus `start`; with
    `plain_sums` times 1, for weights with zeros. A group is padded with zeros to whole 16 codes.
    """

    rows: int
    group: int
    bits: int = 8
    offset: int = 0
    plain_sums: int = 0
    start: int = 0

    @property
    def group_words(self) -> int:
        """Words of a group of a block."""
        return self.rows * (2 + -(-self.group // 16) * 4)

    def elements(self, shape: Sequence[Dim]) -> Dim:
        blocks = ceildiv(product(shape[:-1]), self.rows)
        return blocks * ceildiv(shape[-1], self.group) * self.group_words

    def address(self, shape: Sequence[Any], index: Sequence[Any]) -> Any:
        """The word that holds the scale of an element."""
        row, k = Rows().address(shape[:-1], index[:-1]), index[-1]
        own = RowBlocks(self.rows).rows_of_block(shape)
        groups = (shape[-1] + self.group - 1) // self.group
        line = (row // own) * groups + k // self.group
        return line * self.group_words + row % own


@dataclass(frozen=True)
class KeyPages:
    """Cached keys [pages, PAGE, heads, size] as [page][head][size][PAGE]: scores of a whole page
    are vectors over its tokens, with no horizontal sums."""

    def elements(self, shape: Sequence[Dim]) -> Dim:
        return product(shape)

    def address(self, shape: Sequence[Any], index: Sequence[Any]) -> Any:
        page, token, head, component = index
        return ((page * shape[2] + head) * shape[3] + component) * shape[1] + token


@dataclass(frozen=True)
class ValuePages:
    """Cached values [pages, PAGE, heads, size] as [page][head][PAGE][size]."""

    def elements(self, shape: Sequence[Dim]) -> Dim:
        return product(shape)

    def address(self, shape: Sequence[Any], index: Sequence[Any]) -> Any:
        page, token, head, component = index
        return ((page * shape[2] + head) * shape[1] + token) * shape[3] + component


Layout = Rows | Panels | Columns | RowBlocks | CodedRows | KeyPages | ValuePages

_KINDS = {kind.__name__: kind for kind in (
    Rows, Panels, Columns, RowBlocks, CodedRows, KeyPages, ValuePages)}


def format_layout(layout: Layout) -> str:
    """`Panels(16,2,1)`; `parse_layout` is the inverse."""
    fields = ",".join(str(value) for value in vars(layout).values())
    return f"{type(layout).__name__}({fields})"


def parse_layout(text: str) -> Layout:
    """The layout of a text; CompileError for what is none."""
    name, _, rest = text.partition("(")
    if name not in _KINDS or not rest.endswith(")"):
        raise CompileError(f"unknown layout {text!r}")
    return _KINDS[name](*(int(field) for field in rest[:-1].split(",") if field))


def pack(array: np.ndarray, layout: Layout, out: np.ndarray | None = None,
         threads: int = 1) -> np.ndarray:
    """The elements of array in the order of the layout, as a flat array (written to out if given).

    2- and 4-bit elements come as bytes, several in each (see `join_bits`). Panels are packed panel
    by panel, so that no temporary is larger than a panel; NumPy's copies release the GIL, so
    threads help.
    """
    own = from_numpy(array.dtype)
    if own.bits < 8:
        joined = _pack_nibbles(array, layout, threads) if own.bits == 4 else None
        if joined is None:
            joined = join_bits(pack(array.view(np.uint8), layout, threads=threads), own)
        if out is None:
            return joined
        out[:] = joined
        return out
    size = layout.elements(array.shape)
    assert isinstance(size, int)
    if out is None:
        out = np.zeros(size, array.dtype)
    if isinstance(layout, Panels):
        _pack_panels(*_wide_lanes(array, layout, out), threads)
    elif isinstance(layout, Columns):
        _pack_columns(array, layout, out, threads)
    elif isinstance(layout, Rows):
        out[:] = array.reshape(-1)
    else:
        index = np.indices(array.shape, sparse=True)
        out[:] = 0
        out[layout.address(array.shape, index)] = array
    return out


def join_bits(flat: np.ndarray, dtype: DType) -> np.ndarray:
    """Bytes that hold a 2- or 4-bit element each -> u8 with 8 / bits elements each, the first in
    the low bits."""
    per_byte = 8 // dtype.bits
    padded = np.zeros((-(-flat.size // per_byte), per_byte), np.uint8)
    padded.reshape(-1)[:flat.size] = flat
    padded &= (1 << dtype.bits) - 1
    joined = padded[:, 0]
    for place in range(1, per_byte):
        joined = joined | padded[:, place] << np.uint8(place * dtype.bits)
    return joined


def _pack_nibbles(array: np.ndarray, layout: Layout, threads: int) -> np.ndarray | None:
    """4-bit elements in panels whose lanes are made of 8 k that already lie side by side: joined
    first, then copied lane by lane, which is ten times as fast. None of other arrays."""
    if not isinstance(layout, Panels) or layout.interleave != 8 or array.shape[0] % 8 \
            or array.strides[0] != 1 or not array.size:
        return None
    rows = array.view(np.uint8).T
    words = np.empty((rows.shape[0], rows.shape[1] // 8), np.uint32)
    step = max(1, (1 << 16) // rows.shape[1])
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first: _join_nibbles(rows[first:first + step],
                                                  words[first:first + step]),
                      range(0, len(rows), step)))
    lanes = Panels(layout.columns, 1, layout.parts)
    return pack(words.T, lanes, threads=threads).view(np.uint8)


def _join_nibbles(rows: np.ndarray, words: np.ndarray) -> None:
    """The low halves of 8 bytes as 32 bits, the first byte's lowest."""
    wide = rows.view(np.uint64) & np.uint64(0x0F0F0F0F0F0F0F0F)
    for distance, mask in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0xFFFFFFFF)):
        wide |= wide >> np.uint64(distance)
        wide &= np.uint64(mask)
    words[...] = wide


def split_bits(joined: np.ndarray, dtype: DType) -> np.ndarray:
    """The inverse of join_bits, as elements of the dtype (those that fill up the last byte too)."""
    shifts = np.arange(0, 8, dtype.bits, dtype=np.uint8)
    split = joined[:, None] >> shifts & np.uint8((1 << dtype.bits) - 1)
    return split.reshape(-1).view(dtype.numpy)


def unpack(flat: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of pack, of elements that fill whole bytes (`split_bits` makes them so)."""
    index = np.indices(shape, sparse=True)
    return flat[np.broadcast_to(layout.address(shape, index), shape)]


def _wide_lanes(array: np.ndarray, layout: Panels, out: np.ndarray
                ) -> tuple[np.ndarray, Panels, np.ndarray]:
    """The same packing over whole 32-bit lanes, where the k of a lane already lie side by side (a
    checkpoint's [n, k] matrix, transposed): copying lanes is ten times as fast."""
    lane = layout.interleave
    if lane == 1 or lane * array.itemsize != 4 or array.shape[0] % lane \
            or array.strides[0] != array.itemsize:
        return array, layout, out
    wide = array.T.view(np.uint32).T
    return wide, Panels(layout.columns, 1, layout.parts), out.view(np.uint32)


def _pack_panels(array: np.ndarray, layout: Panels, out: np.ndarray, threads: int) -> None:
    depth = -(-array.shape[0] // layout.interleave)
    panels = layout.panels(array.shape)
    assert isinstance(panels, int)
    view = out.reshape(panels, depth, layout.columns, layout.interleave)
    chunk = max(1, panels // (threads * 8))
    starts = range(0, panels, chunk)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda start: _pack_range(array, layout, view, start,
                                                min(start + chunk, panels)), starts))


def _pack_columns(array: np.ndarray, layout: Columns, out: np.ndarray, threads: int) -> None:
    k, n = array.shape
    view = out.reshape(n, -1) if n else out.reshape(0, k)
    chunk = max(1, n // (threads * 8))

    def copy(first: int) -> None:
        view[first:first + chunk, :k] = array[:, first:first + chunk].T
        view[first:first + chunk, k:] = 0

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, range(0, n, chunk)))


def _pack_range(array: np.ndarray, layout: Panels, view: np.ndarray, first: int, last: int) -> None:
    """Panels first..last; full ones by one strided copy, the ragged edge element by element."""
    k, n = array.shape
    part_size, width = n // layout.parts, layout.columns // layout.parts
    interleave = layout.interleave
    whole = k // interleave
    for part in range(layout.parts):
        lanes = slice(part * width, (part + 1) * width)
        full = min(last, part_size // width)
        if full > first:
            columns = array[:, part * part_size + first * width:part * part_size + full * width]
            source = columns[:whole * interleave].reshape(whole, interleave, full - first, width)
            view[first:full, :whole, lanes] = source.transpose(2, 0, 3, 1)
            if whole * interleave < k:
                tail = columns[whole * interleave:].reshape(-1, full - first, width)
                view[first:full, whole, lanes] = 0
                view[first:full, whole, lanes, :k % interleave] = tail.transpose(1, 2, 0)
        if full < last:
            _pack_ragged(array, layout, view, part, max(full, first))


def _pack_ragged(array: np.ndarray, layout: Panels, view: np.ndarray, part: int,
                 panel: int) -> None:
    k, n = array.shape
    part_size, width = n // layout.parts, layout.columns // layout.parts
    lanes = slice(part * width, (part + 1) * width)
    columns = array[:, part * part_size + panel * width:(part + 1) * part_size]
    padded = np.zeros((view.shape[1] * layout.interleave, width), array.dtype)
    padded[:k, :columns.shape[1]] = columns
    lines = padded.reshape(view.shape[1], layout.interleave, width)
    view[panel, :, lanes] = lines.transpose(0, 2, 1)
