"""Products of 16-bit floats on tensor cores: which kernel for which numbers of rows.

A stage whose rows may be few or many has a kernel for each range of them. All are launches of the
stage; those of other ranges have no blocks.

Measured on H100 and H200 with bf16 at the layer shapes of 1B and 8B models (gpu_matmul.py of the
benchmarks): 0.98 of cuBLAS's speed in the geometric mean on an H200, where tiles were not tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame, Kernel
from llmc.codegen.nvptx.matmul_tensor import TensorMatmul
from llmc.codegen.nvptx.matmul_tiles import choose_ranges
from llmc.codegen.nvptx.matvec import TensorMatvec
from llmc.codegen.nvptx.product import Product
from llmc.codegen.target import Target
from llmc.ir.dims import Dim, bounds, maximum, minimum

MATVEC_ROWS = 8  # one fragment of them; with two, tiles through shared memory are as fast
MOST_PARTS = 4
ENDLESS = 1 << 62  # the last row of a range without end

Ranges = Sequence[tuple[int, int]]  # (first, last row) of each


def tensor_kernel(product: Product, target: Target) -> Kernel | RangedMatmul | None:
    """The kernel, or kernels, for a product of 16-bit floats; None for other products."""
    if product.dtype.bits != 16 or product.parts > MOST_PARTS:
        return None
    low, high = bounds(product.rows)
    kernels = list(_kernels(product, target.cpu, low, ENDLESS if high is None else high))
    if len(kernels) == 1:
        return kernels[0][0]
    return RangedMatmul([InRange(kernel, product.rows, ranges) for kernel, ranges in kernels])


def _kernels(product: Product, architecture: str, low: int, high: int
             ) -> Iterator[tuple[TensorMatvec | TensorMatmul, Ranges]]:
    """Every kernel, with the ranges of low..high that it is for."""
    first = low
    if low <= MATVEC_ROWS and product.parts <= 2:
        last = min(MATVEC_ROWS, high)
        yield TensorMatvec(product, architecture, last), [(low, last)]
        first = MATVEC_ROWS + 1
    if first <= high:
        for tiling, ranges in choose_ranges(product, architecture, first, high).items():
            yield TensorMatmul(product, architecture, tiling), ranges


class InRange:
    """A kernel that has blocks only where the number of rows is in one of its ranges."""

    def __init__(self, kernel: Kernel, rows: Dim, ranges: Ranges):
        self.kernel, self.rows, self.ranges = kernel, rows, ranges
        self.threads, self.shared_bytes = kernel.threads, kernel.shared_bytes
        self.attributes: dict[str, int] = getattr(kernel, "attributes", {})
        self.awaits_earlier = getattr(kernel, "awaits_earlier", False)

    def blocks(self) -> Dim:
        inside: Dim = 0
        for first, last in self.ranges:
            inside = inside + (self._beyond(first - 1) if first else 1)
            inside = inside - (self._beyond(last) if last < ENDLESS else 0)
        return self.kernel.blocks() * inside

    def _beyond(self, rows: int) -> Dim:
        """1 where there are more rows, else 0."""
        return minimum(1, maximum(0, self.rows - rows))

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        self.kernel.emit(e, frame)


class RangedMatmul:
    """The launches of a matmul stage, one for each range of rows."""

    def __init__(self, launches: list[InRange]):
        self.launches = launches
