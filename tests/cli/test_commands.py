"""What the commands print when all is well."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.cli import COMMANDS
from llmc.cli.compile import _rate
from tests.conftest import EMBEDDED, GOLDENS

STAGES = ("imported", "optimized", "program", "llvm", "asm")


def golden_cases() -> list:
    cases = []
    for name, model in (("stories260K", EMBEDDED),
                        ("tinystories656K", GOLDENS / "models" / "tinystories656K")):
        text = (GOLDENS / "models" / name / "golden.json").read_text()
        cases += [pytest.param(model, golden, id=f"{name}: {golden['prompt'][:20]}")
                  for golden in json.loads(text)["goldens"]]
    return cases


@pytest.mark.parametrize(("model", "golden"), golden_cases())
def test_generate_json_equals_the_goldens(llmc_command, model, golden):
    result = llmc_command("generate", model, "--prompt", golden["prompt"], "--temperature", 0,
                          "--max-tokens", 64, "--ignore-eos", "--dtype", "f32", "--json")
    assert result.status == 0, result.err
    made = json.loads(result.out)
    assert made["prompt_ids"] == golden["prompt_ids"]
    assert made["token_ids"] == golden["greedy_ids"]
    assert made["text"] == golden["text"]
    assert set(made["timings"]) == {"load", "prefill", "decode", "tokens_per_second"}


def test_generate_streams_the_text_of_the_golden(llmc_command, embedded_goldens):
    result = llmc_command("generate", "--max-tokens", 64, "--ignore-eos")
    assert result.status == 0
    assert result.out == embedded_goldens[0]["text"] + "\n"
    assert "[5 + 64 tokens; load" in result.err
    assert "tokens/s]" in result.err


def test_generate_ends_its_line_before_the_summary():
    environment = os.environ | {"PYTHONPATH": str(Path(llmc.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "llmc", "generate", "--max-tokens", "5", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=60,
        check=True)
    assert any(line.startswith("[5 + 5 tokens; load") for line in done.stdout.splitlines())


def test_version(llmc_command):
    result = llmc_command("--version")
    assert (result.status, result.out) == (0, f"llmc {llmc.__version__}\n")


def test_compile_gives_a_rate_of_small_weights_too(llmc_command, tmp_path):
    result = llmc_command("compile", EMBEDDED, "-o", tmp_path / "story.llmc")
    rate = re.search(r"packed at ([\d.e+]+) [MG]B/s", result.out)
    assert rate and float(rate[1]) > 0, result


@pytest.mark.parametrize(("gigabytes", "shown"), [
    (2.5, "2.50 GB/s"), (0.1, "0.10 GB/s"), (0.0994, "99 MB/s"), (0.0004, "0.4 MB/s")])
def test_rates_are_never_rounded_to_nothing(gigabytes, shown):
    assert _rate(gigabytes) == shown


@pytest.mark.parametrize(("options", "reason"), [
    (("--max-tokens", 3), "length"), (("--max-tokens", 600), "stop"),
    (("--max-tokens", 600, "--max-context", 50), "context")])
def test_generate_says_why_it_stopped(llmc_command, options, reason):
    made = llmc_command("generate", *options, "--json")
    assert json.loads(made.out)["finish_reason"] == reason
    said = "context of 50 tokens is full" in llmc_command("generate", *options).err
    assert said == (reason == "context")


def test_generate_from_a_fresh_process(embedded_artifact, embedded_goldens):
    environment = os.environ | {"PYTHONPATH": str(Path(llmc.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "llmc", "generate", str(embedded_artifact), "--json", "--prompt",
         "Once upon a time", "--max-tokens", "16"],
        capture_output=True, text=True, env=environment, timeout=60, check=True)
    assert json.loads(done.stdout)["token_ids"] == embedded_goldens[0]["greedy_ids"][:16]
    assert not done.stderr


def test_compile_writes_an_artifact_that_generates(llmc_command, tmp_path, embedded_goldens):
    output = tmp_path / "stories.llmc"
    result = llmc_command("compile", EMBEDDED, "-o", output, "--json")
    report = json.loads(result.out)
    assert report["artifact"] == str(output)
    assert report["weight_bytes"] == (output / "weights.bin").stat().st_size
    assert {"import", "passes", "lower", "codegen", "weights"} <= set(report["timings"])
    assert llmc_command("inspect", output, "--verify").status == 0
    made = llmc_command("generate", output, "--prompt", "Once upon a time", "--max-tokens", 9,
                        "--json")
    assert json.loads(made.out)["token_ids"] == embedded_goldens[0]["greedy_ids"][:9]


def test_compile_tells_as_json_what_was_quantised(llmc_command, tmp_path):
    command = ("compile", EMBEDDED, "-o", tmp_path / "small.llmc", "--json")
    assert "quantization" not in json.loads(llmc_command(*command).out)
    options = ("--quantize", "int4", "--group", 64, "--calibrate", "never")
    told = json.loads(llmc_command(*command, *options).out)["quantization"]
    text = llmc_command(*command[:-1], *options).out
    assert f"{told['matrices']} matrices quantised, " in text
    assert f" {told['bits_per_weight']:.3f} bits a weight; {told['kept']} stay" in text
    assert told["matrices"] == 36 and told["bytes"] * 8 < 5 * told["source_bytes"] / 4
    assert (told["options"]["group"], told["options"]["calibrate"]) == (64, "never")
    assert (told["calibrated"], told["calibration_seconds"], told["uncalibrated"]) == (0, 0, "")


def test_compile_tells_as_json_why_nothing_was_calibrated(llmc_command, tmp_path, monkeypatch):
    monkeypatch.setattr("llmc.calibrate.LIMIT", 0)
    made = llmc_command("compile", EMBEDDED, "-o", tmp_path / "small.llmc", "--json",
                        "--quantize", "int4")
    told = json.loads(made.out)["quantization"]
    assert told["calibrated"] == 0 and "--calibrate always" in told["uncalibrated"]


@pytest.mark.parametrize("shape", ["tokens=1:7,sequences=1", "tokens=1", "rows=0:1,tokens=1:3"])
def test_compile_for_narrow_shapes(llmc_command, tmp_path, shape, embedded_goldens):
    """What does not fit one step is run in several."""
    golden, output = embedded_goldens[-1], tmp_path / "narrow.llmc"
    assert llmc_command("compile", EMBEDDED, "-o", output, "--shape", shape).status == 0
    made = llmc_command("generate", output, "--prompt", golden["prompt"], "--max-tokens", 9,
                        "--ignore-eos", "--json")
    assert json.loads(made.out)["token_ids"] == golden["greedy_ids"][:9]


def test_run_writes_every_output(llmc_command, tmp_path, embedded_runtime):
    ids = np.array([[1, 403, 407, 261, 378]])
    np.save(tmp_path / "ids.npy", ids)
    result = llmc_command("run", EMBEDDED, "--input", f"input_ids={tmp_path / 'ids.npy'}",
                          "--output", tmp_path / "out")
    assert result.out == "logits: float32[1, 5, 512]\n"
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "logits.npy")[0],
                                  embedded_runtime.run(ids[0]))


@pytest.mark.parametrize("stage", STAGES)
def test_inspect_prints_every_stage(llmc_command, stage):
    result = llmc_command("inspect", "--stage", stage)
    assert result.status == 0, result.err
    expected = {"imported": "rms_norm", "optimized": "fusion", "program": "repeat layer in 0..5",
                "llvm": "define", "asm": "llmc_step"}[stage]
    assert expected in result.out


def test_inspect_program_text_parses_back(llmc_command):
    from llmc.ir.program_text import format_program, parse_program

    text = llmc_command("inspect", "--stage", "program", "--text").out
    assert format_program(parse_program(text)) == text


def test_inspect_graphs_parse_back(llmc_command):
    from llmc.ir.text import format_graph, parse_graph

    for stage in ("imported", "optimized"):
        text = llmc_command("inspect", "--stage", stage).out
        assert format_graph(parse_graph(text)) == text


def test_inspect_an_artifact(llmc_command, embedded_artifact):
    program = llmc_command("inspect", embedded_artifact, "--stage", "program").out
    assert program == llmc_command("inspect", EMBEDDED, "--stage", "program").out
    manifest = json.loads(llmc_command("inspect", embedded_artifact, "--json").out)
    assert manifest["kind"] == "causal_lm"


def test_a_layer_takes_six_stages(llmc_command):
    lines = llmc_command("inspect", "--stage", "program", "--variant", "few").out.splitlines()
    assert sum(line.startswith("    ") and " = " in line for line in lines) == 6


def test_bench_reports_rates_beside_their_ceilings(llmc_command):
    result = llmc_command("bench", "--prompt-tokens", 33, "--generate-tokens", 5, "--repeat", 2,
                          "--batch", 2, "--json")
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert report["decode"].keys() >= {
        "tokens_per_second", "ms_per_token", "bytes_per_token", "gb_per_second",
        "read_bandwidth_gb_per_second", "share"}
    assert report["prefill"].keys() >= {
        "tokens", "tokens_per_second", "tflops", "peak_tflops", "peak_dtype", "share"}
    assert report["first_token_seconds"] > 0
    assert report["threads"] == 2
    assert report["dtype"] == "f32"
    assert 0 < report["prefill"]["share"] < 1
    # a step reads every weight once (1 MB) for both sequences
    assert 500_000 < report["decode"]["bytes_per_token"] < 600_000


def test_bench_of_an_encoder(llmc_command):
    result = llmc_command("bench", GOLDENS / "hf" / "bert", "--batch", 3, "--repeat", 1, "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["encode"]["sentences_per_second"] > 0


def test_bench_for_people(llmc_command):
    result = llmc_command("bench", "--prompt-tokens", 9, "--generate-tokens", 3, "--repeat", 1)
    assert result.status == 0, result.err
    assert "GB/s of" in result.out
    assert "TFLOP/s of" in result.out


def test_devices(llmc_command):
    host, *_ = json.loads(llmc_command("devices", "--json").out)
    assert host["target"] == "host"
    assert host["threads"] == 2
    assert llmc_command("devices").out.startswith("host")


def test_cache(llmc_command, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMC_CACHE_DIR", str(tmp_path))
    assert llmc_command("cache").out == ""
    llmc_command("generate", "--max-tokens", 1)
    assert "llama" in llmc_command("cache", "ls").out
    assert llmc_command("cache", "clear").out.startswith("freed 1.")
    freed = json.loads(llmc_command("cache", "clear", "--json").out)
    assert freed == {"freed_bytes": 0, "directory": str(tmp_path)}
    assert llmc_command("cache").out == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(llmc_command, command):
    result = llmc_command(command, "--help")
    assert result.status == 0
    assert f"example:\n  llmc {command}" in result.out
