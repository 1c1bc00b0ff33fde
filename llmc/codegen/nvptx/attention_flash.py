"""Attention by blocks of queries on a GPU: which kernels a stage of kind "attention" becomes.

Operands in f16 or bf16 with head sizes that fill tensor core tiles go to attention_prefill.py; for
paged_attention attention_decode.py stands beside it, which splits the keys of single queries over
blocks. All else is attention_general.py's.

Floors: prefill is bound by its multiply-adds, decode by reading the cache once.
"""

from __future__ import annotations

from dataclasses import replace

from llmc.codegen.host.attention_queries import Operand
from llmc.codegen.host.attention_views import result_view
from llmc.codegen.nvptx.attention_cluster import ClusterDecodeKernel
from llmc.codegen.nvptx.attention_decode import DecodeKernel
from llmc.codegen.nvptx.attention_general import GeneralKernel, Scoring
from llmc.codegen.nvptx.attention_places import (
    DenseSource,
    PackedSource,
    PagedSource,
    geometry_of,
)
from llmc.codegen.nvptx.attention_prefill import (
    PrefillKernel,
    choose_low_shape,
    choose_shape,
)
from llmc.codegen.nvptx.attention_store import stores_pairs
from llmc.codegen.nvptx.attention_tensor import BAND, Softmax
from llmc.codegen.nvptx.kernel import Kernel
from llmc.codegen.target import Target
from llmc.errors import CompileError
from llmc.ir.dims import bounds, known_multiple, maximum, minimum
from llmc.ir.dtypes import DType
from llmc.ir.graph import Node
from llmc.ir.program import Program, Stage, unsupported

_AnySource = PagedSource | PackedSource | DenseSource
_LARGEST = 256  # head size whose sums fit into a warp's registers on Hopper,
_LARGEST_BEFORE = 128  # and before it, where the assembler needs more of them
# Multiprocessors of the largest common part of each architecture.
_PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_90a": 132, "sm_100": 148}
_OTHER_PROCESSORS = 108
_BLOCKS_EACH = 2  # blocks of many queries that a multiprocessor holds at a time
_OPS = ("paged_attention", "packed_attention", "attention")


def flash_attention(stage: Stage, program: Program, target: Target) -> FlashAttention | None:
    """The kernels of a stage; None where operands are computed in the stage, or where few queries
    would leave most of a block idle and no tensor core kernel fits."""
    try:
        flash = FlashAttention(stage, program, target)
    except CompileError:
        return None
    return None if flash.is_general and flash.has_few_queries else flash


class FlashAttention:
    """The launches of one attention, in order."""

    def __init__(self, stage: Stage, program: Program, target: Target):
        nodes = [node for node in stage.body.nodes() if node.op in _OPS]
        if len(nodes) != 1:
            raise unsupported(stage, f"holds {len(nodes)} attention ops, not one")
        self.stage, self.program, self.target, self.node = stage, program, target, nodes[0]
        self.geometry = geometry_of(stage, self.node)
        self.result = Operand(program.buffers[stage.results[0]],
                              result_view(stage, stage.body, self.node))
        self.mask = _mask_operand(stage, program, self.node)
        source = self._source()
        self.is_general = not self._fills_tensor_cores(source)
        self.launches: list[Kernel] = (
            self._general(source) if self.is_general else self._tensor(source))

    @property
    def has_few_queries(self) -> bool:
        """Whether the shape key allows only few queries of a sequence, or tokens in all."""
        queries = self.node.inputs[0].shape[2 if self.node.op == "attention" else 0]
        most = bounds(queries)[1]
        return most is not None and most <= self.program.capabilities.few_rows

    def _source(self, skip_single: bool = False) -> _AnySource:
        stage, program, node, geometry = self.stage, self.program, self.node, self.geometry
        match node.op:
            case "paged_attention":
                return PagedSource(stage, program, node, geometry, skip_single)
            case "packed_attention":
                return PackedSource(stage, program, node, geometry)
        return DenseSource(stage, program, node, geometry)

    def _general(self, source: _AnySource) -> list[Kernel]:
        node = self.node
        scoring = Scoring(node["scale"], node["softcap"], self.mask is not None)
        return [GeneralKernel(source, self.geometry, scoring, key_dtype(source), self.result,
                              self.mask)]

    def _fills_tensor_cores(self, source: _AnySource) -> bool:
        geometry, dtype = self.geometry, source.query.dtype
        sizes = (geometry.size, geometry.value_size)
        largest = _LARGEST if self._is_hopper else _LARGEST_BEFORE
        return (self.mask is None and dtype.name in ("f16", "bf16")
                and key_dtype(source) is dtype and value_dtype(source) is dtype
                and all(size % BAND == 0 and size <= largest for size in sizes)
                and self.node["scale"] > 0 and stores_pairs(self.result)
                and all(_copies_whole(operand) for operand in row_operands(source)))

    def _tensor(self, source: _AnySource) -> list[Kernel]:
        """Decode alone where all tokens are few, else for sequences with a single query."""
        node, geometry = self.node, self.geometry
        softmax = Softmax(node["scale"], node["softcap"])
        if not isinstance(source, PagedSource):
            return self._many(source, softmax)
        few = self.has_few_queries
        clusters = few and self._is_hopper
        given = (source, geometry, softmax, source.query.dtype, self.result, few, self._processors)
        decode = DecodeKernel(*given, clusters_first=clusters)
        if clusters:
            return [ClusterDecodeKernel(*given), decode]
        if few:
            return [decode]
        return [*self._many(self._source(skip_single=True), softmax), decode]

    def _many(self, source: _AnySource, softmax: Softmax) -> list[Kernel]:
        """The kernels for many queries: where tiles are few, low ones instead."""
        given = (source, self.geometry, softmax, source.query.dtype, self.result)
        kernel = PrefillKernel(*given, choose_shape(self.geometry, self._is_hopper))
        low = choose_low_shape(self.geometry, self._is_hopper)
        if low is None:
            return [kernel]
        # Whether more blocks than multiprocessors hold at a time: 1 or 0.
        many = minimum(1, maximum(0, kernel.blocks() - _BLOCKS_EACH * self._processors))
        kernels = [PrefillKernel(*given, low, 1 - many),
                   PrefillKernel(*given, kernel.shape, many)]
        return [each for each in kernels if bounds(each.wanted) != (0, 0)]

    @property
    def _processors(self) -> int:
        return _PROCESSORS.get(self.target.cpu, _OTHER_PROCESSORS)

    @property
    def _is_hopper(self) -> bool:
        """Whether the architecture is Hopper's or a later one."""
        return int(self.target.cpu.removeprefix("sm_").rstrip("a")) >= 90


def key_dtype(source: _AnySource) -> DType:
    return source.key.type.dtype if isinstance(source, PagedSource) else source.key.dtype


def value_dtype(source: _AnySource) -> DType:
    return source.value.type.dtype if isinstance(source, PagedSource) else source.value.dtype


def row_operands(source: _AnySource) -> list[Operand]:
    """The operands whose rows strides reach."""
    if isinstance(source, PagedSource):
        return [source.query]
    return [source.query, source.key, source.value]


def _copies_whole(operand: Operand) -> bool:
    """Whether rows can be copied 16 bytes at a time."""
    view = operand.view
    return (view.strides[-1] == 1 and known_multiple(view.offset, 8)
            and all(known_multiple(stride, 8) for stride in view.strides[:-1]))


def _mask_operand(stage: Stage, program: Program, node: Node) -> Operand | None:
    if node.op != "attention" or len(node.inputs) < 4:
        return None
    mask = Operand.of(stage, program, node.inputs[3])
    return replace(mask, view=mask.view.broadcast(
        (*node.inputs[0].shape[:3], node.inputs[1].shape[2])))
