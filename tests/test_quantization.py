"""Quantised models from end to end: how far their logits are from those of floats, where they go,
and what artifacts tell."""

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest

import llmc
from llmc import calibrate
from llmc.cli import main
from llmc.codegen.target import Target
from llmc.driver import compile_imported
from llmc.errors import LlmcError
from llmc.frontend.model import load_model
from llmc.ir.quantization import Quantization
from llmc.runtime.pages import Sequence
from llmc.runtime.step import Chunk
from tests.conftest import EMBEDDED, GOLDENS


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def divergence(wanted, found):
    """Mean Kullback-Leibler divergence of rows of logits, in nats."""
    p, q = log_softmax(wanted), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def texts(embedded_goldens):
    return [text["prompt_ids"] + text["greedy_ids"] for text in embedded_goldens]


@pytest.fixture(scope="module")
def wanted(texts):
    with llmc.Runtime(EMBEDDED) as runtime:
        return np.concatenate(runtime.run(texts))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Options -> an artifact, compiled once."""
    made = {}

    def artifact(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            if options["weights"] == "int4":  # however busy this machine is
                options = {"calibrate": "always", **options}
            made[key] = llmc.compile(EMBEDDED, quantize=Quantization(activations="float",
                                                                     **options))
        return made[key]

    return artifact


def divergence_of(compiled, texts, wanted):
    with llmc.Runtime(compiled) as runtime:
        return divergence(wanted, np.concatenate(runtime.run(texts)))


@pytest.mark.parametrize("options, bound", [
    ({"weights": "int8"}, 0.001),
    pytest.param({"weights": "int8", "symmetric": False, "group": 32}, 0.001,
                 marks=pytest.mark.slow),
    ({"weights": "int4"}, 0.06),
    ({"weights": "int4", "calibrate": "never"}, 0.09)])
def test_divergence_of_the_embedded_model(options, bound, artifacts, texts, wanted):
    """Plain rounding of int4 in groups of 32, with the head in int8, gives 0.105."""
    assert divergence_of(artifacts(**options), texts, wanted) < bound


@pytest.mark.slow
def test_any_draw_of_the_text_will_do(monkeypatch, tmp_path, texts, wanted):
    """At most 0.6 of plain rounding's 0.105, of which the default draw is not the only case."""
    for seed in range(1, 4):
        monkeypatch.setattr(calibrate, "SEED", seed)
        quantization = Quantization("int4", activations="float", calibrate="always")
        with llmc.Runtime(EMBEDDED, quantize=quantization, cache_dir=tmp_path / str(seed)) as found:
            assert divergence(wanted, np.concatenate(found.run(texts))) < 0.6 * 0.105


def test_calibration_pays(artifacts, texts, wanted):
    calibrated, plain = (divergence_of(artifacts(weights="int4", **more), texts, wanted)
                         for more in ({}, {"calibrate": "never"}))
    assert calibrated < 0.7 * plain


def test_the_text_is_readable(artifacts):
    with llmc.Runtime(artifacts(weights="int4")) as runtime:
        made = runtime.decode(list(runtime.generate(runtime.encode("Once upon a time"), 24)))
    assert made.startswith(", there was a little girl named Lily. She loved to play")


def test_the_artifact_tells_what_was_done(artifacts, tmp_path, capsys):
    compiled = artifacts(weights="int4")
    info = compiled.manifest.quantization
    assert info.options["weights"] == "int4" and info.kept == () and info.calibration > 0
    assert len(info.quantized) == 1 + 5 * 7
    head, query = info.quantized[:2]
    assert (head.name, head.dtype, head.shape) == ("model.embed_tokens", "i8", (512, 64))
    assert (query.name, query.dtype, query.group) == ("model.layers.0.self_attn.q_proj", "i4", 32)
    assert head.error < 0.01 < query.error < 0.15 and query.calibrated and not head.calibrated
    assert query.bytes * 8 == 64 * 64 * 4.5 and query.source_bytes == 64 * 64 * 4
    stored = sum(each.bytes for each in info.quantized)
    assert stored < compiled.manifest.weight_bytes < 1.2 * stored
    assert main(["inspect", str(compiled.path), "--stage", "quantization"]) == 0
    printed = capsys.readouterr().out
    assert "i4/32*  model.layers.4.mlp.down_proj" in printed and "36 matrices" in printed
    assert main(["inspect", str(compiled.path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["quantization"]["quantized"]) == 36


def test_an_artifact_moves_and_checks_what_is_asked_of_it(artifacts, tmp_path):
    compiled = artifacts(weights="int8")
    moved = tmp_path / "moved.llmc"
    shutil.copytree(compiled.path, moved)
    with llmc.Runtime(moved) as runtime, llmc.Runtime(compiled) as other:
        np.testing.assert_array_equal(runtime.run([1, 2, 3]), other.run([1, 2, 3]))
    with pytest.raises(LlmcError, match="not weights=int4"):
        llmc.Runtime(moved, quantize="int4")


def test_options_are_keys_of_the_cache(artifacts):
    paths = {artifacts(weights="int8").path, artifacts(weights="int4").path,
             llmc.compile(EMBEDDED).path}
    assert len(paths) == 3


@pytest.mark.parametrize("name", ["llama_gqa4_tied",
                                  pytest.param("gpt2", marks=pytest.mark.slow)])
def test_int8_of_other_families(name):
    """Wide random logits: each matrix adds some 0.6 % of noise."""
    path = GOLDENS / "hf" / name
    ids = np.arange(1, 20)
    options = Quantization("int8", activations="float")
    with llmc.Runtime(path, quantize=options) as codes, llmc.Runtime(path) as floats:
        wanted = floats.run(ids)
        lost = codes.run(ids) - wanted
        reasons = {reason for _, reason in codes.manifest.quantization.kept}
    assert reasons <= {"it has fewer than 32 columns"}
    assert np.square(lost).mean() < 0.03**2 * np.square(wanted).mean()


def test_experts_stay_floats_and_routers_too():
    compiled = llmc.compile(GOLDENS / "hf" / "mixtral", quantize="int8")
    reasons = sorted({reason for _, reason in compiled.manifest.quantization.kept})
    assert len(reasons) == 2 and "experts" in reasons[1] and "columns" in reasons[0]


def test_onnx_graphs_are_quantised_too():
    path = GOLDENS / "onnx" / "bert_torchscript_opset14" / "model.onnx"
    inputs = {"input_ids": np.array([[1, 5, 7, 2]]), "attention_mask": np.ones((1, 4), np.int64),
              "token_type_ids": np.zeros((1, 4), np.int64)}
    options = Quantization("int8", activations="float")
    with llmc.Runtime(path, quantize=options) as codes, llmc.Runtime(path) as floats:
        assert codes.manifest.quantization.quantized
        given = {tensor.name: inputs[tensor.name] for tensor in codes.executor.inputs}
        for name, wanted in floats.run(given).items():
            lost = codes.run(given)[name] - wanted
            assert np.square(lost).mean() < 0.03**2 * np.square(wanted).mean()


def test_traced_graphs_are_quantised_too():
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((70, 128), (3, 70)))
    # Of 128 columns every target's panels are full.
    graph = llmc.trace(lambda x: x @ llmc.frontend.trace.parameter("w", "f32", (70, 128)),
                       llmc.Spec("x", "f32", (3, 70)))
    with llmc.Runtime(graph, parameters={"w": w}, quantize="int8") as runtime:
        found = runtime.run({"x": x})["output"]
        assert runtime.manifest.weight_bytes < w.nbytes / 3
    assert np.abs(found - x @ w).max() < 0.3
    with pytest.raises(LlmcError, match="makes no text"):
        llmc.compile(graph, parameters={"w": w}, quantize=Quantization("int4", calibrate="always"))


def test_what_cannot_be_calibrated_says_so(tmp_path):
    path = GOLDENS / "hf" / "bert"
    with pytest.raises(LlmcError, match=r"makes no text to calibrate with.*leave calibrate out"):
        llmc.compile(path, quantize=Quantization("int4", calibrate="always"))
    info = llmc.compile(path, quantize="int4").manifest.quantization
    assert "makes no text" in info.uncalibrated


@pytest.mark.parametrize("options", [
    {"weights": "int8"}, {"weights": "float", "kv_cache": "int8"}, {"weights": "float"},
    {"weights": "float", "head": "int4"}, {"weights": "int8", "head": "float"}])
def test_what_is_not_int4_is_not_calibrated(options):
    with pytest.raises(LlmcError, match=r"calibrate always is for int4.*leave calibrate out"):
        Quantization(**options, calibrate="always")


def test_an_int4_head_alone_is_calibrated():
    quantization = Quantization("int8", head="int4", calibrate="always")
    found = calibrate.calibrate(load_model(EMBEDDED), quantization)
    assert list(found.names) == ["model.embed_tokens"]


def test_a_model_without_a_matrix_to_calibrate_says_so(monkeypatch):
    monkeypatch.setattr(calibrate, "candidates", lambda *_: [])
    with pytest.raises(LlmcError, match="none of its matrices becomes int4"):
        calibrate.calibrate(load_model(EMBEDDED), Quantization("int4", calibrate="always"))


def test_the_command_line_refuses_to_calibrate_int8(tmp_path, capsys):
    for command in (["compile", "-o", str(tmp_path / "m.llmc")], ["generate"]):
        model = [command[0], str(EMBEDDED), *command[1:]]
        assert main([*model, "--quantize", "int8", "--calibrate", "always"]) == 1
        assert "leave calibrate out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt2", "starcoder2"])
def test_a_first_token_beyond_the_vocabulary_begins_no_text(name):
    quantization = Quantization("int4", calibrate="always")
    info = llmc.compile(GOLDENS / "hf" / name, quantize=quantization).manifest.quantization
    assert any(each.calibrated for each in info.quantized)


def test_command_line(tmp_path, capsys):
    target = tmp_path / "model.llmc"
    assert main(["compile", str(EMBEDDED), "--quantize", "int4", "--group", "64", "--asymmetric",
                 "--quantize-head", "float", "--calibrate", "never", "--activations", "float",
                 "-o", str(target)]) == 0
    assert "35 matrices quantised" in capsys.readouterr().out
    options = llmc.load(target).manifest.quantization.options
    assert options == {"weights": "int4", "group": 64, "symmetric": False, "head": "float",
                       "activations": "float", "calibrate": "never", "kv_cache": "float"}
    assert main(["compile", str(EMBEDDED), "--group", "64", "-o", str(target)]) == 1
    assert "go with --quantize" in capsys.readouterr().err
    assert main(["inspect", str(EMBEDDED), "--stage", "quantization"]) == 1
    assert "is no artifact" in capsys.readouterr().err


@pytest.mark.parametrize("codes", ["i8", "i4"])
def test_inspect_shows_what_compile_would_make(codes, capsys):
    model = [str(EMBEDDED), "--stage", "optimized", "--quantize", f"int{codes[1:]}"]
    assert main(["inspect", *model, "--quantize-head", "float"]) == 0
    assert f" : {codes}[" in capsys.readouterr().out
    assert main(["inspect", str(EMBEDDED), "--stage", "optimized"]) == 0
    assert f" : {codes}[" not in capsys.readouterr().out


def test_inspect_of_an_artifact_takes_no_options_of_quantisation(artifacts, capsys):
    assert main(["inspect", str(artifacts(weights="int8").path), "--quantize", "int8"]) == 1
    assert "is an artifact: options of quantisation" in capsys.readouterr().err


# ---- how long calibration may take -------------------------------------------------------------


def test_calibration_that_takes_too_long_is_left_out_and_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(calibrate, "LIMIT", 1e-4)
    command = ["compile", str(EMBEDDED), "--quantize", "int4", "-o", str(tmp_path / "m.llmc")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "not calibrated: it would take about" in printed and "--calibrate always" in printed
    info = llmc.load(tmp_path / "m.llmc").manifest.quantization
    assert info.uncalibrated and not any(each.calibrated for each in info.quantized)


@pytest.mark.parametrize("limit, value, steps", [
    ("TEXT", 1, 64), ("TEXT", 2 * 32 * (226_560 + 512 * 64) * 100, 100), ("MEMORY", 1, 32),
    ("LENGTH", 256, 256)])
def test_large_models_make_less_text(monkeypatch, limit, value, steps):
    monkeypatch.setattr(calibrate, limit, value)
    model, quantization = load_model(EMBEDDED), Quantization("int4")
    found, wanted, _ = calibrate._candidates(model, quantization)
    points = {each.name: each.product.inputs[0] for each in wanted}
    work = calibrate._Work.of(model, found, wanted, points)
    assert work.steps == steps
    assert work.seconds(2e9) == pytest.approx(work.seconds(1e9) / 2)


@pytest.mark.slow
def test_steps_that_take_long_end_the_text(monkeypatch):
    steps = []

    def slow(logits, random):
        steps.append(time.sleep(1.0))
        return np.ones(len(logits), np.int32)

    monkeypatch.setattr(calibrate, "_sampled", slow)
    found = calibrate.calibrate(load_model(EMBEDDED), Quantization("int4"))
    assert not found.names and "it would take about" in found.skipped
    assert len(steps) <= calibrate.TRIAL


def test_tokens_are_sampled_as_often_as_is_likely():
    wanted = np.array([0.5, 0.0, 0.2, 0.3])
    with np.errstate(divide="ignore"):
        logits = np.tile(np.log(wanted).astype(np.float32) + 7, (20_000, 1))
    found = calibrate._sampled(logits, np.random.default_rng(0))
    assert found.dtype == np.int32
    np.testing.assert_allclose(np.bincount(found, minlength=4) / len(found), wanted, atol=0.015)


def test_matrices_behind_the_limit_are_rounded_without_moments(tmp_path):
    quantization = Quantization("int4", activations="float", calibrate="always")
    model = load_model(EMBEDDED)
    found = calibrate.calibrate(model, quantization)
    compiled = compile_imported(model, Target.host(), quantization=quantization,
                                calibration=replace(found, limit=found.seconds + 1e-9))
    compiled.write(tmp_path / "model")
    assert sum(each.calibrated for each in compiled.report.quantized) == 1
    assert "too busy" in compiled.report.uncalibrated


# ---- the cache ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coded_cache():
    return llmc.compile(EMBEDDED, kv_cache="int8")


def test_a_coded_cache_stays_close_and_takes_less_memory(coded_cache, texts, wanted):
    assert divergence_of(coded_cache, texts, wanted) < 0.002

    def bytes_of_a_token(path):
        with llmc.Runtime(path) as runtime:
            return sum(np.prod(state.concrete_shape({"pool_pages": 1})) * state.dtype.bits // 8
                       * state.count for state in runtime.executor.states) / 32

    # f32 heads of 8: 32 bytes become 8 and a bf16 scale.
    assert bytes_of_a_token(coded_cache) == bytes_of_a_token(EMBEDDED) * 10 / 32


def test_a_coded_cache_gives_the_same_in_one_step_and_in_many(coded_cache):
    ids = np.arange(1, 70)
    with llmc.Runtime(coded_cache) as runtime:
        whole = runtime.run(ids)
        sequence = Sequence()
        model = runtime.language_model
        parts = [runtime.step([Chunk(sequence, ids[start:start + size], size)])
                 for start, size in ((0, 33), (33, 1), (34, 1), (35, 34))]
        runtime.release(sequence)
        assert model.reuses_prefixes
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=0.3)
    assert divergence(whole, np.concatenate(parts)) < 1e-3


def test_a_coded_cache_and_codes_for_weights_go_together(texts, wanted):
    compiled = llmc.compile(EMBEDDED, quantize=Quantization("int8", activations="float"),
                            kv_cache="int8")
    assert compiled.manifest.quantization.options["kv_cache"] == "int8"
    assert divergence_of(compiled, texts, wanted) < 0.003
    with llmc.Runtime(compiled) as runtime:
        made = runtime.decode(list(runtime.generate(runtime.encode("Once upon a time"), 16)))
    assert made.startswith(", there was a little girl named")


def test_where_there_is_no_cache_of_pages_it_says_so():
    with pytest.raises(LlmcError, match="has no KV cache of pages"):
        llmc.compile(GOLDENS / "hf" / "bert", kv_cache="int8")
    with pytest.raises(LlmcError, match="reads no 8-bit cache"):
        llmc.compile(EMBEDDED, target="nvptx", kv_cache="int8")
