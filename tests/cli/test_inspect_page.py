"""The inspect page: whole without a network, and every op of the model has its place."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from llmc.cli.inspect_fusions import LEAVES, VIEWS, find_fusions
from llmc.cli.inspect_page import amount, find_cases, write_page
from llmc.codegen.target import Target
from llmc.driver import Compiled, compile_model
from llmc.ir.summary import fused_ops
from tests.conftest import EMBEDDED, GOLDENS

MODELS = {"llama": EMBEDDED, "bert": GOLDENS / "hf" / "bert",
          "onnx": GOLDENS / "onnx" / "llama_past_dynamo" / "model.onnx"}


@pytest.fixture(scope="module", params=MODELS)
def compiled(request) -> Compiled:
    return compile_model(MODELS[request.param], Target.host())


@pytest.fixture(scope="module")
def llama() -> Compiled:
    return compile_model(EMBEDDED, Target.host())


def page(compiled: Compiled, tmp_path: Path) -> str:
    variant = "few" if "few" in compiled.programs else "generic"
    write_page(tmp_path / "page.html", compiled, variant)
    return (tmp_path / "page.html").read_text()


def test_the_page_needs_no_network(compiled, tmp_path):
    text = page(compiled, tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|src=", text)
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_pictures_are_well_formed_and_links_have_targets(compiled, tmp_path):
    text = page(compiled, tmp_path)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 1 + len(find_cases(compiled))
    for picture in pictures:
        ElementTree.fromstring(picture)
    targets = re.findall(r"id='(stage-\d+)'", text)
    assert set(re.findall(r'href="#(stage-\d+)"', text)) <= set(targets)
    assert len(targets) == len(set(targets))


def test_every_stage_and_weight_has_a_row(compiled, tmp_path):
    text = page(compiled, tmp_path)
    for case in find_cases(compiled):
        for buffer in case.program.with_role("weight"):
            assert str(buffer.type) in text
        for stage in case.program.stages():
            for result in stage.results:
                assert str(case.program.buffers[result].type) in text


def test_ops_of_the_model_are_found_in_the_stages_that_compute_them(llama):
    program = llama.programs["few"]
    fusions = find_fusions(llama.model.graph, program)
    found: list[list[str]] = [[] for _ in program.stages()]
    for op in fusions.ops:
        found[op.stage].append(op.node.op)
    assert found == [
        ["gather"], ["mul", "cos", "sin"], ["rms_norm", "matmul", "matmul", "matmul"],
        ["rope", "rope", "cache_append", "cache_append"], ["paged_attention"], ["matmul", "add"],
        ["rms_norm", "matmul", "silu", "matmul", "mul"], ["matmul", "add"],
        ["gather", "rms_norm", "matmul"]]


def test_what_the_picture_shows_is_what_the_summary_counts(llama):
    program = llama.programs["few"]
    ops = find_fusions(llama.model.graph, program).ops
    for number, stage in enumerate(program.stages()):
        shown = [op for op in ops if op.stage == number]
        counted = sum(int((re.match(r"\d+", text) or ["1"])[0])
                      for text in fused_ops(stage, program)) or 1
        assert len(shown) == counted, stage.name


def test_ops_read_only_ops_that_come_before_them(compiled):
    program = next(iter(compiled.programs.values()))
    fusions = find_fusions(compiled.model.graph, program)
    for number, op in enumerate(fusions.ops):
        assert all(source < number for source in op.sources)
        assert op.node.op not in LEAVES | VIEWS
        assert 0 <= op.stage < len(list(program.stages()))


def test_decode_is_judged_by_bytes_and_prefill_by_flops(llama):
    decode, prefill = find_cases(llama)
    assert (decode.program, decode.bound) == (llama.programs["few"], "bytes")
    assert (prefill.program, prefill.bound) == (llama.programs["generic"], "flops")
    assert decode.shape.symbols["tokens"] == 1
    assert prefill.shape.symbols["tokens"] == 512


@pytest.mark.parametrize(("value", "text"), [
    (0, ""), (7, "7 B"), (999, "999 B"), (1234, "1.23 kB"), (12345, "12.3 kB"),
    (123456789, "123 MB"), (2.5e15, "2500 TB")])
def test_amounts(value, text):
    assert amount(value, "B") == text
