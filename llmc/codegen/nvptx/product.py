"""The matmul of a stage on the GPU, and what follows it.

Every matmul kernel is made of a `Product` (what is multiplied, and where it lies) and its
`Epilogue` (bias, residual, activation, gate * up, cast: the body behind the product).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmc.codegen.expr import Expression, Source, is_elementwise, operand_sources
from llmc.codegen.host.epilogue import dependents, matmul_result, split_row
from llmc.codegen.host.matmul import operand_buffer
from llmc.codegen.llvm import F32, F64, Emitter, i64, ir
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.ir.dims import Dim, evaluate, known_equal
from llmc.ir.dims import product as product_of
from llmc.ir.dtypes import DType
from llmc.ir.graph import Graph, Node
from llmc.ir.layouts import Columns, Rows
from llmc.ir.program import Buffer, Program, Stage, unsupported


@dataclass(frozen=True)
class RowTile:
    """Rows that a block takes: from `first` on, and before `stop`; group: which of the weight's
    matrices they are multiplied by. All i64."""

    first: ir.Value
    stop: ir.Value
    group: ir.Value


@dataclass(frozen=True)
class Product:
    """a[rows..., k] @ w[k, n]: rows in a plain buffer, w by columns, both of one dtype.

    parts: the body reads the result as so many equal slices of its last axis (gate and up), and a
    worker computes the same columns of every part; part_size: columns of each.
    """

    stage: Stage
    program: Program
    node: Node
    left: Buffer
    weight: Buffer
    parts: int

    @property
    def rows(self) -> Dim:
        return product_of(self.node.inputs[0].shape[:-1])

    @property
    def k(self) -> int:
        return evaluate(self.weight.type.shape[0], {})

    @property
    def stride(self) -> int:
        """Elements from one column of the weight to the next; zeros from k on."""
        assert isinstance(self.weight.layout, Columns)
        return evaluate(self.weight.layout.stride(self.weight.type.shape), {})

    @property
    def groups(self) -> int:
        """Matrices in the weight, each for rows of its own (see grouped.py)."""
        return 1

    @property
    def part_size(self) -> int:
        return evaluate(self.weight.type.shape[1], {}) // self.parts // self.groups

    @property
    def dtype(self) -> DType:
        """Of both operands."""
        return self.weight.type.dtype

    @property
    def element(self) -> ir.Type:
        """What sums are kept in."""
        return F64 if self.dtype.bits == 64 else F32

    def vector(self, most: int) -> int:
        """Elements of k in a vector: a power of two that divides k, at most `most` and 16 bytes."""
        width = min(most, 128 // self.dtype.bits)
        while self.k % width:
            width //= 2
        return width

    def row(self, e: Emitter, frame: DeviceFrame, row: ir.Value) -> ir.Value:
        """Number of a row's first element in the left buffer."""
        return e.b.mul(row, i64(self.k))

    def column(self, e: Emitter, tile: RowTile, part: ir.Value, column: ir.Value) -> ir.Value:
        """Number of the first element of a column of a part, in the weight."""
        column = e.b.add(column, e.b.mul(part, i64(self.part_size)))
        return e.b.mul(column, i64(self.stride))

    def all_rows(self, frame: DeviceFrame, first: ir.Value | None = None) -> RowTile:
        """The rows from `first` on, of a product by one matrix."""
        return RowTile(i64(0) if first is None else first, frame.dim(self.rows), i64(0))


def find_product(stage: Stage, program: Program) -> Product:
    """The product of a matmul stage; CompileError where its body is none that kernels take."""
    node = only_product(stage, "matmul")
    return Product(stage, program, node, *find_operands(stage, program, node),
                   count_parts(stage.body, node))


def only_product(stage: Stage, op: str) -> Node:
    """The one node of that op in a stage's body."""
    found = [node for node in stage.body.nodes() if node.op == op]
    if len(found) != 1:
        raise unsupported(stage, f"its body holds {len(found)} products, not one")
    return found[0]


def find_operands(stage: Stage, program: Program, node: Node) -> tuple[Buffer, Buffer]:
    """Where the rows and the weight of a product lie."""
    source, right = node.inputs[:2]
    while source.op == "reshape":  # changes nothing where rows lie one after the other
        source = source.inputs[0]
    left, weight = operand_buffer(stage, program, source), operand_buffer(stage, program, right)
    if weight is None or not isinstance(weight.layout, Columns):
        raise unsupported(stage, "its right operand is not a weight by columns")
    if left is None or left.layout != Rows() or left.type.dtype is not weight.type.dtype:
        raise unsupported(stage, f"its left operand does not lie in rows of {weight.type.dtype}")
    if weight.type.dtype.name not in ("f64", "f32", "bf16", "f16"):
        raise unsupported(stage, f"no kernel for weights of {weight.type.dtype}")
    return left, weight


def count_parts(body: Graph, product: Node) -> int:
    """How many equal slices tile the last axis, where the body reads nothing else; else 1."""
    users = body.users().get(product, [])
    width = evaluate(product.shape[-1], {})
    if not users or any(user.op != "slice" or user.shape[:-1] != product.shape[:-1]
                        for user in users):
        return 1
    sizes = {evaluate(user.shape[-1], {}) for user in users}
    size = sizes.pop()
    starts = sorted(user["starts"][-1] for user in users)
    return len(starts) if not sizes and starts == list(range(0, width, size)) else 1


class Epilogue:
    """The part of a stage's body behind its product; CompileError unless elementwise."""

    def __init__(self, product: Product):
        self.product = product
        stage, node = product.stage, product.node
        size = product.part_size
        self.parts: list[Node] = [node]
        if product.parts > 1:
            slices = {user["starts"][-1]: user for user in stage.body.users()[node]}
            self.parts = [slices[part * size] for part in range(product.parts)]
        self.results = [matmul_result(stage, product.program, name, value)
                        for name, (_, value) in zip(stage.results, stage.body.outputs, strict=True)]
        for result in self.results:
            self._check(result.value)

    def _check(self, output: Node) -> None:
        """Between product and output, every node is elementwise and of the output's shape."""
        stage = self.product.stage
        reached = dependents(stage, set(self.parts))
        pending, seen = [output], {output}
        while pending:
            node = pending.pop()
            if node not in reached:
                continue
            same = len(node.shape) == len(output.shape) and all(
                map(known_equal, node.shape, output.shape))
            if not same or not (node in self.parts or is_elementwise(node)):
                raise unsupported(stage, f"{node.op} : {node.type} follows its product")
            if node not in self.parts:
                pending += [source for source in node.inputs if source not in seen]
                seen.update(node.inputs)

    def emit(self, e: DeviceEmitter, frame: DeviceFrame, row: ir.Value, column: ir.Value,
             sums: Sequence[ir.Value]) -> None:
        """Results at a row and at `lanes` columns of a part from `column` on.

        sums: for each part, its sums (scalars, or vectors of lanes, which must divide the part's
        size and column). Row and column must lie inside.
        """
        self._values(e, frame, row, column, sums)()

    def emit_all(self, e: DeviceEmitter, frame: DeviceFrame, places: Sequence[Place]) -> None:
        """Results at several places: all that is read is asked for before the first is stored."""
        stores = [self._values(e, frame, place.row, place.column, place.sums) for place in places]
        for store, place in zip(stores, places, strict=True):
            with e.b.if_then(place.wanted):
                store()

    def _values(self, e: DeviceEmitter, frame: DeviceFrame, row: ir.Value, column: ir.Value,
                sums: Sequence[ir.Value]) -> Callable[[], None]:
        """Compute results; what is returned emits their stores."""
        product = self.product
        lanes = sums[0].type.count if isinstance(sums[0].type, ir.VectorType) else 1
        sources = operand_sources(product.stage.body, product.stage.operands,
                                  product.program.buffers)
        x = Expression(e, frame, sources, lanes)
        for node, value in zip(self.parts, sums, strict=True):
            x.bind(node, _always(value))
        first = x.scopes.integers.leaf(column, 0, lanes)
        index = (*split_row(x, product.node, x.index(row)), first)
        values = [x.value(result.value, index, lanes) for result in self.results]

        def store() -> None:
            for result, value in zip(self.results, values, strict=True):
                x.store(result.buffer, index,
                        value if isinstance(value.type, ir.VectorType) else e.splat(value, lanes))
        return store


@dataclass(frozen=True)
class Place:
    """Where results are wanted: row and first column (inside, wanted or not), and the sums there,
    as `Epilogue.emit` takes them; wanted (i1): whether they are stored."""

    row: ir.Value
    column: ir.Value
    sums: Sequence[ir.Value]
    wanted: ir.Value


def _always(value: ir.Value) -> Source:
    """A source of one value, whatever index it is asked for."""
    return lambda index, lanes, mask: value
