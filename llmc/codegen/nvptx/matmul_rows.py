"""Products of 16-bit floats on tensor cores: which kernel for which numbers of rows.

A stage whose rows may be few or many has a kernel for each range of them. All are launches of the
stage; those of other ranges have no blocks.

Measured on an H100 with bf16 at the layer shapes of 1B and 8B models (benchmarks/gpu_matmul.py),
as shares of cuBLAS's speed in the same run: 1.00 in the geometric mean for 8B (least 0.87), 0.99
for 1B (least 0.77); up to 8 rows 1.02 to 1.24, with 2.98 TB/s read at best.
"""

from __future__ import annotations

from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame, Kernel
from llmc.codegen.nvptx.matmul_tensor import TensorMatmul
from llmc.codegen.nvptx.matmul_tiles import MANY_ROWS
from llmc.codegen.nvptx.matvec import TensorMatvec
from llmc.codegen.nvptx.product import Product
from llmc.codegen.target import Target
from llmc.ir.dims import Dim, bounds, maximum, minimum

MATVEC_ROWS = 16  # beyond, reading the rows costs more than the weight
# The last rows of each range, but for the last. A tile for 2048 rows takes twice as long for 300 of
# a 1B shape as one for those; with these, 1.15 times at most by the estimate.
RANGES = (MATVEC_ROWS, 64, 256, 512, 1024, MANY_ROWS)
MOST_PARTS = 4
ENDLESS = 1 << 62  # the last row of a range without end


def tensor_kernel(product: Product, target: Target) -> Kernel | RangedMatmul | None:
    """The kernel, or kernels, for a product of 16-bit floats; None for other products."""
    if product.dtype.bits != 16 or product.parts > MOST_PARTS:
        return None
    low, high = bounds(product.rows)
    ranges = [each for each in _ranges() if (high is None or each[0] <= high) and low <= each[1]]
    kernels = [_kernel(product, target.cpu, min(last, high or last)) for _, last in ranges]
    if len(kernels) == 1:
        return kernels[0]
    return RangedMatmul([InRange(kernel, product.rows, first, last)
                         for kernel, (first, last) in zip(kernels, ranges, strict=True)])


def _ranges() -> list[tuple[int, int]]:
    """(first, last) rows of each; the last one is without end."""
    starts = [0, *(last + 1 for last in RANGES[:-1])]
    return list(zip(starts, [*RANGES[:-1], ENDLESS], strict=True))


def _kernel(product: Product, architecture: str, rows: int) -> TensorMatvec | TensorMatmul:
    kind = TensorMatvec if rows <= MATVEC_ROWS and product.parts <= 2 else TensorMatmul
    return kind(product, architecture, rows)


class InRange:
    """A kernel that has blocks only where first <= rows <= last."""

    def __init__(self, kernel: Kernel, rows: Dim, first: int, last: int):
        self.kernel, self.rows, self.first, self.last = kernel, rows, first, last
        self.threads, self.shared_bytes = kernel.threads, kernel.shared_bytes
        self.attributes: dict[str, int] = getattr(kernel, "attributes", {})
        self.awaits_earlier = getattr(kernel, "awaits_earlier", False)

    def blocks(self) -> Dim:
        inside: Dim = self._beyond(self.first - 1) if self.first else 1
        if self.last < ENDLESS:
            inside = inside - self._beyond(self.last)
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
