"""What a target has no kernel for is decomposed, elementwise composites too."""

from __future__ import annotations

import dataclasses

import pytest

from llmc.codegen.target import Target
from llmc.ir.dims import symbol
from llmc.ir.dtypes import f32
from llmc.ir.graph import Graph, TensorType
from llmc.ir.ops import make
from llmc.passes.legalize import legalize


@pytest.mark.parametrize("op", ["sigmoid", "silu", "softplus", "gelu"])
def test_composites_without_a_kernel_are_decomposed(op: str):
    capabilities = Target.host().capabilities()
    x = make("input", name="x", type=TensorType(f32, (symbol("n"), 17)))
    graph = Graph("test", (x,), (("y", make(op, x)),))
    kept = {node.op for node in legalize(graph, capabilities).nodes()}
    assert op in kept
    without = dataclasses.replace(capabilities, kernels=capabilities.kernels - {op})
    decomposed = {node.op for node in legalize(graph, without).nodes()}
    assert op not in decomposed
    assert decomposed > {"input", "constant"}
