"""Quantised models keep their codes: what is stored, how many stages, and the values."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import llmc
from llmc.codegen.target import Target
from llmc.frontend.model import load_model
from llmc.ir.activation_codes import coded
from llmc.passes.lower import lower
from llmc.passes.pipeline import optimize

GOLDENS = Path(__file__).parent.parent / "goldens" / "onnx"


def program_of(name, target):
    capabilities = Target.parse(target).capabilities()
    return lower(optimize(load_model(GOLDENS / name / "model.onnx").graph, capabilities),
                 capabilities)


@pytest.mark.parametrize("target", ["host", "x86_64:znver5"])
def test_int4_llama_has_the_stages_of_f32_and_a_fraction_of_its_bytes(target):
    codes, floats = program_of("llama_genai_int4", target), program_of("llama_genai_fp32", target)
    assert [stage.kind for stage in codes.stages()] == [stage.kind for stage in floats.stages()]
    products = [stage for stage in codes.stages() if stage.kind == "matmul"]
    assert len(products) == 2 * 4 + 1
    for stage in products:
        weights = [buffer for name in stage.operands
                   if (buffer := codes.buffers[name]).role == "weight" and buffer.type.rank == 2]
        assert [str(buffer.type.dtype) for buffer in weights] == ["i4", "f32"]  # codes, scales
        k, n = weights[0].type.shape
        padded = -(-n // 32) * 32
        assert sum(buffer.bytes() for buffer in weights) <= k * padded * 4 / 6


def test_targets_without_a_kernel_for_codes_get_floats():
    program = program_of("llama_genai_int4", "nvptx:sm_90a")
    assert all(buffer.type.dtype.is_float for buffer in program.with_role("weight"))


def packed(codes, bits):
    """u8[n, k] -> u8[n, ceil(k * bits / 8)], the first code in the low bits."""
    per_byte = 8 // bits
    padded = np.zeros((codes.shape[0], -(-codes.shape[1] // per_byte) * per_byte), np.uint8)
    padded[:, :codes.shape[1]] = codes
    places = padded.reshape(codes.shape[0], -1, per_byte)
    return sum(places[:, :, i].astype(np.uint32) << i * bits for i in range(per_byte)).astype(
        np.uint8)


@pytest.mark.parametrize("accuracy", [0, 4])
@pytest.mark.parametrize("bits, zeros, n, k, block", [
    (4, "none", 24, 64, 32), (4, "none", 9, 300, 256), (4, "packed", 17, 40, 16),
    (4, "f32", 8, 100, 32),
    (8, "none", 17, 48, 16), (8, "packed", 20, 64, 64), (2, "packed", 9, 64, 16)])
def test_matmul_n_bits(bits, zeros, n, k, block, accuracy, tmp_path):
    rng = np.random.default_rng(0)
    blocks = -(-k // block)
    codes = rng.integers(0, 1 << bits, (n, blocks * block)).astype(np.uint8)
    scales = rng.standard_normal((n, blocks)).astype(np.float32)
    points = {"none": np.full((n, blocks), 1 << (bits - 1), np.uint8),
              "packed": rng.integers(0, 1 << bits, (n, blocks)).astype(np.uint8),
              "f32": rng.uniform(0, 1 << bits, (n, blocks)).astype(np.float32)}[zeros]
    stored = {"codes": packed(codes, bits).reshape(n, blocks, -1), "scales": scales}
    if zeros != "none":
        stored["zeros"] = packed(points, bits) if zeros == "packed" else points
    node = helper.make_node("MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft", N=n, K=k,
                            bits=bits, block_size=block, accuracy_level=accuracy)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", n])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21),
                                                    helper.make_opsetid("com.microsoft", 1)])
    onnx.save(model, tmp_path / "model.onnx")
    x = rng.standard_normal((5, k)).astype(np.float32)
    of_column = np.arange(k) // block
    matrix = (codes[:, :k] - points.astype(np.float64)[:, of_column]) * scales[:, of_column]
    found = llmc.Runtime(str(tmp_path / "model.onnx")).run({"x": x})["y"]
    read = coded(x, min(block, 128)) if accuracy == 4 else x
    bound = (k + 2) * 2.0**-24 * (np.abs(x) @ (np.abs(matrix.T) + np.abs(scales.T)[of_column]))
    assert (np.abs(found - read @ matrix.T) <= bound).all()
