"""Convolutions, poolings, resizing and sampling, compiled, against onnx's reference evaluator."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from llmc.errors import ModelError
from llmc.frontend.onnx import import_onnx_bytes
from llmc.runtime.inference_session import InferenceSession

RANDOM = np.random.default_rng(6)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def model_of(nodes, inputs, outputs, opset=20, **tensors):
    """inputs: name -> shape, all f32."""
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
         for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def check(model, feeds, tolerance=1e-5):
    """Compiled outputs equal the reference's, relative to the largest item."""
    session = InferenceSession(model.SerializeToString(), threads=1)
    for given in feeds if isinstance(feeds, list) else [feeds]:
        found = session.run(None, given)
        for each, wanted in zip(found, ReferenceEvaluator(model).run(None, given), strict=True):
            assert each.shape == wanted.shape and each.dtype == wanted.dtype
            error = np.abs(each - wanted).max(initial=0)
            assert error <= tolerance * max(np.abs(wanted).max(initial=0), 1e-30)


@pytest.mark.parametrize(("spatial", "kernel", "attributes"), [
    ((17,), (3,), {"pads": [1, 1]}),
    ((33,), (3,), {"strides": [2], "pads": [1, 1]}),
    ((17, 9), (3, 2), {"strides": [2, 1], "dilations": [1, 3], "pads": [0, 2, 1, 3]}),
    ((5, 6, 7), (2, 3, 1), {"strides": [1, 2, 3]}),
    ((13, 11), (3, 4), {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
])
@pytest.mark.parametrize("group", [1, 2, 6])
def test_conv(spatial, kernel, attributes, group):
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], group=group, **attributes)
    weights = {"w": normal(12 if group == 2 else 6, 6 // group, *kernel)}
    weights["b"] = normal(weights["w"].shape[0])
    model = model_of([node], {"x": (3, 6, *spatial)}, ["y"], **weights)
    check(model, {"x": normal(3, 6, *spatial)})


def test_conv_of_any_length():
    """One program for all lengths, and for all batches."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2], pads=[1, 1])
    model = model_of([node], {"x": ("batch", 5, "length")}, ["y"], w=normal(7, 5, 3))
    check(model, [{"x": normal(b, 5, n)} for b, n in ((1, 3), (3, 17), (2, 1), (1, 33))])


def test_patch_convolution_is_one_product():
    """Stride and kernel alike: patches are reshaped, nothing is gathered or padded."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[4, 4])
    model = model_of([node], {"x": ("batch", 3, 16, 16)}, ["y"], w=normal(8, 3, 4, 4))
    ops = [each.op for each in import_onnx_bytes(model.SerializeToString()).graph.nodes()]
    assert ops.count("matmul") == 1 and not {"gather", "pad", "slice"} & set(ops)


@pytest.mark.parametrize("attributes", [
    {"strides": [2, 3], "pads": [1, 0, 0, 2]},
    {"dilations": [2, 1], "output_padding": [1, 0], "strides": [2, 2]},
])
def test_transposed_conv(attributes):
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], **attributes)
    weight = normal(6, 4, 3, 3)
    check(model_of([node], {"x": (2, 6, 5, 7)}, ["y"], w=weight), {"x": normal(2, 6, 5, 7)})


def test_groups_of_a_transposed_conv_are_convs_of_their_own():
    x, weight = normal(2, 6, 5, 7), normal(6, 4, 3, 3)
    found = []
    for group, data, w in ((3, x, weight), *((1, x[:, g : g + 2], weight[g : g + 2])
                                             for g in (0, 2, 4))):
        node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=group, strides=[2, 1])
        model = model_of([node], {"x": data.shape}, ["y"], w=w)
        found += InferenceSession(model.SerializeToString(), threads=1).run(None, {"x": data})
    np.testing.assert_allclose(found[0], np.concatenate(found[1:], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize("ceil_mode", [0, 1])
def test_pools(op, ceil_mode):
    node = helper.make_node(op, ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 2],
                            pads=[1, 0, 1, 1], ceil_mode=ceil_mode)
    check(model_of([node], {"x": (2, 3, 17, 9)}, ["y"]), {"x": normal(2, 3, 17, 9)})


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("place", ["half_pixel", "align_corners", "asymmetric"])
def test_resize(mode, place):
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode=mode,
                            coordinate_transformation_mode=place)
    sizes = np.array([1, 2, 11, 6], np.int64)
    check(model_of([node], {"x": (1, 2, 7, 9)}, ["y"], sizes=sizes), {"x": normal(1, 2, 7, 9)})


def test_resize_to_a_size_that_is_computed():
    """The size is an input of the model: code is made for each."""
    nodes = [helper.make_node("Cast", ["wanted"], ["sizes"], to=TensorProto.INT64),
             helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear")]
    model = model_of(nodes, {"x": ("n", 2, "h", 5), "wanted": (4,)}, ["y"])
    check(model, [{"x": normal(1, 2, h, 5), "wanted": np.array([1, 2, w, 7], np.float32)}
                  for h, w in ((3, 5), (4, 2))])


def test_unknown_modes_are_refused():
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="lanczos")
    model = model_of([node], {"x": (1, 2, 7, 9)}, ["y"], sizes=np.array([1, 2, 3, 4], np.int64))
    with pytest.raises(ModelError, match="lanczos"):
        InferenceSession(model.SerializeToString())


# ---- whole encoders -----------------------------------------------------------------------------


class Layers:
    """Nodes and weights of a transformer encoder, as exporters write it."""

    def __init__(self, width, heads):
        self.width, self.heads = width, heads
        self.nodes, self.weights = [], {}

    def add(self, op, *inputs, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def weight(self, array):
        name = f"w{len(self.weights)}"
        self.weights[name] = array
        return name

    def shape(self, *extents):
        return self.weight(np.array(extents, np.int64))

    def linear(self, x, width):
        product = self.add("MatMul", x, self.weight(normal(self.width, width) / 6))
        return self.add("Add", product, self.weight(normal(width)))

    def norm(self, x):
        return self.add("LayerNormalization", x, self.weight(normal(self.width) + 1),
                        self.weight(normal(self.width)), axis=-1)

    def attention(self, x):
        size = self.width // self.heads
        split = self.shape(0, -1, self.heads, size)
        q, k, v = (self.add("Transpose", self.add("Reshape", self.linear(x, self.width), split),
                            perm=perm) for perm in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)))
        scores = self.add("Mul", self.add("MatMul", q, k), self.weight(np.float32(size ** -0.5)))
        mixed = self.add("MatMul", self.add("Softmax", scores, axis=-1), v)
        rows = self.add("Transpose", mixed, perm=(0, 2, 1, 3))
        return self.linear(self.add("Reshape", rows, self.shape(0, -1, self.width)), self.width)

    def block(self, x):
        x = self.add("Add", x, self.attention(self.norm(x)))
        hidden = self.add("Gelu", self.linear(self.norm(x), self.width))
        return self.add("Add", x, self.linear(hidden, self.width))


def test_vision_transformer():
    layers = Layers(24, 3)
    conv = layers.add("Conv", "x", layers.weight(normal(24, 3, 4, 4) / 7),
                      layers.weight(normal(24)), strides=[4, 4])
    flat = layers.add("Reshape", conv, layers.shape(0, 24, -1))
    patches = layers.add("Transpose", flat, perm=(0, 2, 1))
    batch = layers.add("Shape", "x", start=0, end=1)
    shape = layers.add("Concat", batch, layers.shape(1, 24), axis=0)
    token = layers.add("Expand", layers.weight(normal(1, 1, 24)), shape)
    x = layers.add("Concat", token, patches, axis=1)
    x = layers.add("Add", x, layers.weight(normal(1, 13, 24)))
    x = layers.norm(layers.block(layers.block(x)))
    model = model_of(layers.nodes, {"x": ("batch", 3, 12, 16)}, [x], **layers.weights)
    check(model, [{"x": normal(b, 3, 12, 16)} for b in (1, 3)], 1e-4)


def test_speech_encoder():
    """Whisper's: two convolutions over time, the second halving it, then the layers."""
    layers = Layers(24, 2)
    x = layers.add("Gelu", layers.add("Conv", "x", layers.weight(normal(24, 8, 3) / 5),
                                      layers.weight(normal(24)), pads=[1, 1]))
    x = layers.add("Gelu", layers.add("Conv", x, layers.weight(normal(24, 24, 3) / 8),
                                      layers.weight(normal(24)), pads=[1, 1], strides=[2]))
    x = layers.add("Transpose", x, perm=(0, 2, 1))
    x = layers.add("Add", x, layers.weight(normal(17, 24)))
    x = layers.norm(layers.block(layers.block(x)))
    model = model_of(layers.nodes, {"x": ("batch", 8, 34)}, [x], **layers.weights)
    check(model, [{"x": normal(b, 8, 34)} for b in (1, 3)], 1e-4)


def test_attention_of_the_encoder_is_recognised():
    """Patches flow into one attention node, with no matrix of scores in memory."""
    from llmc.codegen.target import Target
    from llmc.passes.pipeline import optimize

    layers = Layers(24, 3)
    conv = layers.add("Conv", "x", layers.weight(normal(24, 3, 4, 4)), strides=[4, 4])
    flat = layers.add("Reshape", conv, layers.shape(0, 24, -1))
    x = layers.block(layers.add("Transpose", flat, perm=(0, 2, 1)))
    model = model_of(layers.nodes, {"x": ("batch", 3, 12, 16)}, [x], **layers.weights)
    graph = import_onnx_bytes(model.SerializeToString()).graph
    done = optimize(graph, Target.host().capabilities())
    ops = [each["anchor"] for each in done.nodes() if each.op == "fusion"]
    assert ops.count("attention") == 1
