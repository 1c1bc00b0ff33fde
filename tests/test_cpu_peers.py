"""benchmarks/cpu_peers.py: what is measured, and what its lines come to."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from cpu_cells import Cell, cells, elements, own_bytes
from cpu_peers import noise_figures, report
from cpu_summary import verdicts

GROUPS = ["decode", "prefill", "encoder", "matmul", "noise"]


def options(**given) -> argparse.Namespace:
    defaults = {"only": GROUPS, "shapes": ["1b", "110m"], "dtypes": ["bf16", "int8", "int4"],
                "encoder_dtypes": ["f32", "bf16", "int8"], "matmul_dtypes": ["f32", "bf16"],
                "prompts": None, "contexts": None}
    return argparse.Namespace(**defaults | given)


def line(group: str, name: str, own: float, peer: float, dtype: str = "bf16",
         shape: str = "1b", engine: str = "openvino") -> dict:
    cell = Cell(group, name, shape, dtype, {}, "bf16", 8e9, tokens=512)
    return {"threads": 4, **report(cell, {"llmc": [own, own], engine: [peer, 2 * peer]},
                                   [10e9, 10e9])}


def values(lines: list[dict]) -> dict[str, tuple[float, bool]]:
    return {each["what"]: (each["value"], each["holds"]) for each in verdicts(lines)}


def test_cells_are_told_apart_and_have_work():
    found = list(cells(options()))
    assert len({(c.group, c.shape, c.dtype, c.name) for c in found}) == len(found)
    assert {c.group for c in found} == set(GROUPS)
    assert all(c.work > 0 for c in found)


def test_sizes_of_shapes():
    assert elements("1b") == 1_235_746_816  # Llama 3.2 1B's matrices
    assert own_bytes("1b", "bf16") == 2 * elements("1b")
    assert own_bytes("1b", "int4") < own_bytes("1b", "int8") < own_bytes("1b", "bf16")


def test_prompts_and_contexts_can_be_chosen():
    found = list(cells(options(only=["decode", "prefill"], shapes=["1b"], dtypes=["int8"],
                               prompts=[16], contexts=[32])))
    assert [c.job for c in found] == [{"work": "prefill", "tokens": 16},
                                      {"work": "decode", "context": 32, "tokens": 32}]


def test_a_line_has_medians_and_ratios_of_rounds():
    found = line("prefill", "512 tokens", own=1.0, peer=2.0)
    assert found["engines"]["llmc"] == {"ms": 1000.0, "share": 0.8, "tokens_per_second": 512.0}
    assert found["engines"]["openvino"]["ms"] == 3000.0
    assert found["ahead"] == {"openvino": 3.0, "best": 3.0}


def test_verdicts_take_the_worst_cell():
    found = values([line("prefill", "128 tokens", 1.0, 2.0),
                    line("prefill", "512 tokens", 1.0, 0.7)])
    assert found["1B prefill bf16: least times as fast as openvino"] == (pytest.approx(1.05), False)
    assert found["1B prefill bf16, 512 tokens: share of the peak"] == (0.8, False)


def test_a_peer_counts_at_its_best_setting():
    slow, fast = line("prefill", "512 tokens", 1.0, 2.0), {"openvino f32": 1.2, "best": 1.2}
    slow["ahead"] |= fast
    assert values([slow])["1B prefill bf16: least times as fast as openvino"] == (1.2, True)


def test_quantised_prefill_is_beside_the_best_of_all_weights():
    lines = [line("prefill", "512 tokens", 1.0, 2.0, "int8"),
             line("prefill", "512 tokens", 1.0, 1.0, "int4")]
    found = values(lines)
    what = "1B prefill {}: least times as fast as openvino's best quantised"
    assert found[what.format("int8")] == found[what.format("int4")] == (1.5, True)


def test_what_was_not_measured_has_no_verdict():
    assert verdicts([]) == []
    assert all("decode" not in what for what in values([line("prefill", "512 tokens", 1.0, 2.0)]))


def test_a_loss_is_of_speed():
    found = noise_figures([(1.0, 4.0), (3.0, 4.0), (2.0, 4.0)])
    assert found == {"quiet_ms": 2000.0, "ms": 4000.0, "loss": 0.5}
