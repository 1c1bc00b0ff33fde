"""a @ w on the GPU: which kernel takes a stage, by a written rule.

f16, bf16   `TensorMatvec` for few rows, `TensorMatmul` for more: on tensor cores.
few rows    `MatrixVector`: each warp streams columns of the weight past all rows.
else        `TiledMatmul`: tiles through shared memory, any dtype, in FMAs: the kernel that is
            always right.
"""

from __future__ import annotations

from collections.abc import Callable

from llmc.codegen.nvptx.kernel import Kernel
from llmc.codegen.nvptx.matmul_rows import RangedMatmul, tensor_kernel
from llmc.codegen.nvptx.matrix_vector import MatrixVector
from llmc.codegen.nvptx.product import Product, find_product
from llmc.codegen.nvptx.tiled_matmul import TiledMatmul
from llmc.codegen.target import Target
from llmc.ir.dims import bounds
from llmc.ir.program import Program, Stage

# Each gives a kernel, or None where it does not fit the product or the architecture; in order.
KERNELS: list[Callable[[Product, Target], Kernel | RangedMatmul | None]] = [
    tensor_kernel,
    lambda product, target: MatrixVector(product, bounds(product.rows)) if _few(product) else None,
    lambda product, target: TiledMatmul(product),
]


def matmul(stage: Stage, program: Program, target: Target) -> Kernel | RangedMatmul:
    """The kernel of a matmul stage; CompileError where its body is no such product."""
    product = find_product(stage, program)
    return next(kernel for make in KERNELS if (kernel := make(product, target)))


def _few(product: Product) -> bool:
    high = bounds(product.rows)[1]
    return high is not None and high <= product.program.capabilities.few_rows
