"""Programs for people: short names, expressions, what was fused; and what stages cost."""

from __future__ import annotations

import pytest

from llmc.codegen.target import Target
from llmc.driver import variant_keys
from llmc.frontend.model import load_model
from llmc.ir.cost import Shape, program_cost, stage_cost
from llmc.ir.program import Program
from llmc.ir.summary import fused_ops, short_names, summarize
from llmc.passes.lower import lower
from llmc.passes.pipeline import optimize
from tests.conftest import EMBEDDED

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, SIZE, VOCABULARY = 64, 172, 5, 8, 4, 8, 512
PER_LAYER = (HIDDEN * (HEADS + 2 * KV_HEADS) * SIZE + HEADS * SIZE * HIDDEN + 3 * HIDDEN * INNER)


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    capabilities = Target.host().capabilities()
    graph = optimize(load_model(EMBEDDED).graph, capabilities)
    return {name: lower(graph, capabilities, key)
            for name, key in variant_keys(graph, capabilities, {}).items()}


def shape(tokens: int, sequences: int, context: int) -> Shape:
    return Shape({"tokens": tokens, "sequences": sequences, "rows": sequences,
                  "table_width": -(-context // 32), "pool_pages": 64}, context)


def test_the_summary_names_what_was_fused(programs):
    text = summarize(programs["few"])
    assert "rms_norm(x, input_layernorm[layer]) @ qkv_proj[layer]" in text
    assert "└ fuses rms_norm, 3 matmuls (q_proj, k_proj, v_proj)" in text
    assert "└ fuses rms_norm, 2 matmuls (gate_proj, up_proj), silu, mul" in text
    assert "silu(t[:172]) * t[172:] where t = rms_norm(" in text
    assert "k" in text.split("cache_append(")[0].splitlines()[-1].split()


def test_every_result_has_a_line(programs):
    for program in programs.values():
        text = summarize(program)
        assert text.count(" = ") >= len(list(program.stages()))
        assert all(str(program.buffers[result].type) in text
                   for stage in program.stages() for result in stage.results)


def test_short_names_are_unique_within_a_role(programs):
    for program in programs.values():
        names = short_names(program)
        assert names.keys() == program.buffers.keys()
        for buffer in program.buffers.values():
            others = [names[b.name] for b in program.with_role(buffer.role) if b is not buffer]
            assert names[buffer.name] not in others


def test_a_stage_of_a_single_op_fuses_nothing(programs):
    (attention,) = (s for s in programs["few"].stages() if s.kind == "attention")
    assert fused_ops(attention, programs["few"]) == []


@pytest.mark.parametrize(("sequences", "context"), [(1, 1), (1, 200), (3, 77)])
def test_a_decode_step_reads_every_weight_once_and_the_cache(programs, sequences, context):
    cost = program_cost(programs["few"], shape(sequences, sequences, context))
    norms = (2 * LAYERS + 1) * HIDDEN
    matrices = LAYERS * PER_LAYER + HIDDEN * VOCABULARY
    gathered = sequences * HIDDEN
    assert cost.weight_bytes == 4 * (matrices + norms + gathered)
    assert cost.state_bytes == 4 * LAYERS * 2 * sequences * context * KV_HEADS * SIZE
    attention = 4 * LAYERS * sequences * HEADS * SIZE * context
    assert cost.products == 2 * sequences * matrices + attention


def test_prefill_flops_count_the_keys_that_a_query_sees(programs):
    tokens = 33
    cost = program_cost(programs["generic"], shape(tokens, 1, tokens))
    matrices = 2 * (tokens * LAYERS * PER_LAYER + HIDDEN * VOCABULARY)
    pairs = tokens * (tokens + 1) // 2
    assert cost.products == matrices + 4 * LAYERS * HEADS * SIZE * pairs
    assert cost.flops > cost.products


def test_appended_values_are_written(programs):
    (append,) = (s for s in programs["few"].stages() if s.name == "rope_append")
    cost = stage_cost(append, programs["few"], shape(2, 2, 50))
    assert cost.written_bytes == 4 * 2 * (HEADS + 2 * KV_HEADS) * SIZE
    assert cost.state_bytes == 0
