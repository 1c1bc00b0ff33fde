"""Records what onnxruntime computes for operators of com.microsoft, in contrib_cases.npz.

    python tests/frontend/onnx/make_contrib_cases.py        (needs onnxruntime; the tests do not)

A case `NAME` has `NAME/model`, the bytes of a model of one node, its inputs `NAME/in/...` and its
outputs `NAME/out/...`. Left out are 8-bit products of u8 by i8 beyond 7 bits, which onnxruntime
saturates on this CPU, and rows that it leaves undefined.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

PATH = Path(__file__).with_name("contrib_cases.npz")
KINDS = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64,
         "uint8": TensorProto.UINT8, "int8": TensorProto.INT8}
BATCH, LENGTH, KEYS, HEADS, SIZE = 2, 3, 5, 4, 8

recorded: dict[str, np.ndarray] = {}
random = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    """Of few bits, so that the file stays small."""
    return (np.round(random.normal(size=shape) * 32 * scale) / 32).astype(np.float32)


def scales(*shape):
    return np.asarray(random.random(shape) * 0.02 + 0.001, np.float32)


def codes(*shape, bits=8):
    return random.integers(0, 1 << bits, shape).astype(np.uint8)


def packed(values, bits):
    per_byte = 8 // bits
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per_byte)])
    parts = values.reshape(*values.shape[:-1], -1, per_byte)
    return (parts << np.arange(0, 8, bits)).sum(-1).astype(np.uint8)


def declared(name, array):
    return helper.make_tensor_value_info(name, KINDS[array.dtype.name], array.shape)


def model_of(node, given, weights, outputs):
    graph = helper.make_graph(
        [node], "case", [declared(name, array) for name, array in given.items()], outputs,
        initializer=[numpy_helper.from_array(array, name) for name, array in weights.items()])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def case(name, operator, inputs, outputs=1, constants=(), skipped=(), **attributes):
    """Runs one node; inputs in order (None: left out), `constants` as initializers."""
    names = ["" if array is None else f"i{k}" for k, array in enumerate(inputs)]
    results = ["" if k in skipped else f"o{k}" for k in range(outputs)]
    node = helper.make_node(operator, names, results, domain="com.microsoft", **attributes)
    tensors = {n: a for n, a in zip(names, inputs, strict=True) if n}
    weights = {n: a for n, a in tensors.items() if int(n[1:]) in constants}
    given = {n: a for n, a in tensors.items() if n not in weights}
    unknown = [helper.make_empty_tensor_value_info(each) for each in results if each]
    bare = model_of(node, given, weights, unknown).SerializeToString()
    found = dict(zip([each for each in results if each],
                     onnxruntime.InferenceSession(bare).run(None, given), strict=True))
    for key in list(found):
        if operator == "GroupQueryAttention" and key != "o0":
            for sequence, last in enumerate(inputs[5]):
                found[key][sequence, :, last + 1:] = 0
    model = model_of(node, given, weights, [declared(n, a) for n, a in found.items()])
    recorded[f"{name}/model"] = np.frombuffer(model.SerializeToString(), np.uint8)
    recorded.update({f"{name}/in/{key}": array for key, array in given.items()})
    recorded.update({f"{name}/out/{key}": array for key, array in found.items()})


# ---- attention ---------------------------------------------------------------------------------


def grouped(name, batch=2, length=1, past=5, last=None, buffer=None, extra=None, packed_qkv=False,
            **attributes):
    heads, groups, size = 4, 2, 16
    last = [past + length - 1] * batch if last is None else last
    q, k, v = (normal(batch, length, n * size) for n in (heads, groups, groups))
    inputs = [np.concatenate([q, k, v], 2), None, None] if packed_qkv else [q, k, v]
    inputs += [normal(batch, groups, buffer or past, size) for _ in range(2)]
    inputs += [np.array(last, np.int32), np.array(max(last) + 1, np.int32)]
    if attributes.get("do_rotary"):
        angles = normal(16, 8)
        inputs += [np.cos(angles), np.sin(angles)]
    for index, array in (extra or {}).items():
        inputs += [None] * (index + 1 - len(inputs))
        inputs[index] = array
    case(f"grouped {name}", "GroupQueryAttention", inputs, 3, (6, 7, 8), num_heads=heads,
         kv_num_heads=groups, **attributes)


def multi_head(name, k, v, bias=None, mask=None, added=None, past=None, outputs=1, **attributes):
    query = normal(BATCH, LENGTH, HEADS * SIZE)
    past_k, past_v = past or (None, None)
    inputs = [query, k, v, bias, mask, added, past_k, past_v]
    case(f"multi-head {name}", "MultiHeadAttention", inputs, outputs, num_heads=HEADS, **attributes)


def projected(name, mask=None, past=None, added=None, outputs=1, width=96, **attributes):
    inputs = [normal(BATCH, LENGTH, 20), normal(20, width, scale=0.3), normal(width), mask, past,
              added]
    case(f"projected {name}", "Attention", inputs, outputs, (1, 2), num_heads=HEADS, **attributes)


def attention_cases():
    grouped("decode")
    grouped("ragged, rotary", last=[5, 3], do_rotary=1)
    grouped("packed, interleaved", packed_qkv=True, do_rotary=1, rotary_interleaved=1)
    grouped("prompt", length=4, past=0)
    grouped("chunk in a shared buffer", batch=1, length=3, past=4, buffer=10)
    grouped("shared buffer, ragged", buffer=12, last=[5, 3], do_rotary=1)
    grouped("window, soft cap", local_window_size=3, softcap=5.0, scale=0.3)
    grouped("bias", extra={10: normal(1, 4, 1, 6)})
    grouped("smooth", smooth_softmax=1)
    grouped("sink, window", extra={11: normal(4)}, local_window_size=3)
    grouped("not causal", batch=1, length=3, past=4, causal=0)
    k, v = (normal(BATCH, KEYS, HEADS * SIZE) for _ in range(2))
    own = [normal(BATCH, LENGTH, HEADS * SIZE) for _ in range(2)]
    past = [normal(BATCH, HEADS, 4, SIZE) for _ in range(2)]
    right = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], np.int32)
    multi_head("bias, mask", k, v, normal(3 * HEADS * SIZE), right)
    multi_head("lengths", k, v, mask=np.array([5, 3], np.int32))
    multi_head("mask by query", k, v,
               mask=(random.random((BATCH, LENGTH, KEYS)) > 0.4).astype(np.int32))
    multi_head("added, mask", k, v, mask=right, added=normal(1, 1, LENGTH, KEYS), scale=0.2)
    multi_head("past, causal", *own, past=past, outputs=3, unidirectional=1)
    multi_head("keys as heads", *(normal(BATCH, HEADS, KEYS, SIZE) for _ in range(2)),
               normal(3 * HEADS * SIZE))
    projected("causal", unidirectional=1)
    projected("lengths", np.array([3, 2], np.int32))
    projected("ends and beginnings", np.array([3, 2, 0, 1], np.int32))
    projected("past, mask", np.array([[1] * 7, [0, 1, 1, 1, 1, 1, 1]], np.int32),
              normal(2, BATCH, HEADS, 4, SIZE), outputs=2)
    projected("wider values", width=112, qkv_hidden_sizes=[32, 32, 48])


# ---- quantised ---------------------------------------------------------------------------------


def quantized_cases():
    low = random.integers(-50, 50, (20, 7)).astype(np.int8)
    case("integer to float", "MatMulIntegerToFloat",
         [codes(2, 3, 20), low, scales(1), scales(7), np.array([100], np.uint8), low[0],
          normal(7)], constants=(1, 3, 5, 6))
    case("dynamic", "DynamicQuantizeMatMul",
         [normal(2, 3, 20), codes(20, 7), scales(7), codes(7), normal(7)], constants=(1, 2, 3, 4))
    for bits in (2, 4, 8):
        zeros = packed(codes(6, 4, bits=bits), bits)
        case(f"{bits} bits", "MatMulNBits",
             [normal(2, 3, 50), packed(codes(6, 4, 16, bits=bits), bits), scales(6, 4), zeros, None,
              normal(6)], constants=(1, 2, 3, 5), bits=bits, block_size=16, K=50, N=6)
        table, index = packed(codes(9, 64, bits=bits), bits), random.integers(0, 9, (2, 3))
        case(f"rows of {bits} bits", "GatherBlockQuantized",
             [table, index, scales(9, 4), packed(codes(9, 4, bits=bits), bits)],
             constants=(0, 2, 3), bits=bits, block_size=16)
    order = random.permutation(np.arange(64) // 16).astype(np.int32)
    case("4 bits, groups in any order", "MatMulNBits",
         [normal(3, 64), packed(codes(6, 4, 16, bits=4), 4), scales(6, 4), None, order],
         constants=(1, 2, 3, 4), bits=4, block_size=16, K=64, N=6)


# ---- experts -----------------------------------------------------------------------------------


def experts(name, kind, count=4, hidden=32, inner=16, fused=1, **attributes):
    inputs = [normal(6, hidden), normal(6, count),
              normal(count, fused * inner, hidden, scale=0.3), normal(count, fused * inner),
              normal(count, hidden, inner, scale=0.3), normal(count, hidden)]
    case(f"experts {name}", "MoE", inputs, constants=(2, 3, 4, 5), k=2, activation_type=kind,
         **attributes)


def quantized_experts(name, kind, bits, block=None, zeros=False, fused=1, **attributes):
    count, hidden, inner = 4, 32, 16
    inputs, points = [normal(6, hidden), normal(6, count)], [None] * 3
    for outputs, width in ((fused * inner, hidden), (hidden, inner)):
        shape = (count, outputs) if block is None else (count, outputs, width // block)
        inputs += [packed(codes(count, outputs, width, bits=bits), bits), scales(*shape),
                   normal(count, outputs)]
        points.append(packed(codes(*shape, bits=bits), bits))
    if block is not None:
        attributes["block_size"] = block
    case(f"quantised experts {name}", "QMoE", inputs + (points if zeros else []),
         constants=range(2, 13), k=2, activation_type=kind, expert_weight_bits=bits,
         normalize_routing_weights=1, **attributes)


def expert_cases():
    clamped = {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 7.0}
    experts("relu", "relu")
    experts("gelu, normalised", "gelu", normalize_routing_weights=1)
    experts("gated", "swiglu", fused=2, swiglu_fusion=1, **clamped)
    quantized_experts("4 bits", "silu", 4)
    quantized_experts("8 bits, zeros", "silu", 8, zeros=True)
    quantized_experts("4 bits, blocks, gated", "swiglu", 4, 16, True, 2, swiglu_fusion=1, **clamped)


# ---- the others --------------------------------------------------------------------------------


def other_cases():
    x = (BATCH, LENGTH, 16)
    ids = random.integers(0, 9, (BATCH, LENGTH)).astype(np.int32)
    case("embeddings", "EmbedLayerNormalization",
         [ids, ids % 2, normal(9, 16), normal(7, 16), normal(2, 16), normal(16), normal(16),
          np.array([[1, 1, 0], [1, 1, 1]], np.int32)], 2, (2, 3, 4, 5, 6), epsilon=1e-5)
    case("skip norm", "SkipLayerNormalization",
         [normal(*x), normal(1, LENGTH, 16), normal(16), normal(16), normal(16)], 4,
         skipped=(1, 2), epsilon=1e-5)
    case("skip rms norm", "SkipSimplifiedLayerNormalization",
         [normal(*x), normal(*x), normal(16), normal(16)], 4, skipped=(1, 2))
    angles = normal(16, 4)
    case("rotary, part of a head", "RotaryEmbedding",
         [normal(BATCH, LENGTH, 64), np.array([4]), np.cos(angles), np.sin(angles)],
         constants=(2, 3), num_heads=4, rotary_embedding_dim=8)
    case("quick gelu", "QuickGelu", [normal(*x)])
    case("fast gelu", "FastGelu", [normal(*x), normal(16)])
    case("bias gelu", "BiasGelu", [normal(*x), normal(16)])
    case("fused matmul", "FusedMatMul", [normal(2, 5, 3), normal(2, 7, 5)], transA=1, transB=1,
         alpha=0.5)
    case("batches last", "FusedMatMul", [normal(2, 3, 5), normal(4, 2, 5)], transB=1, transBatchB=1)
    case("fused gemm", "FusedGemm", [normal(3, 5), normal(5, 4), normal(4)], activation="Relu")


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(4)
    attention_cases()
    quantized_cases()
    expert_cases()
    other_cases()
    np.savez_compressed(PATH, **recorded)
