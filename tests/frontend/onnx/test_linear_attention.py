"""LinearAttention and CausalConvWithState in steps: the state that comes out goes in again."""

import numpy as np
import onnx
import pytest

import llmc
from llmc.errors import ModelError

ATTENTION = """<ir_version: 10, opset_import: ["" : 27]>
g (float[b, t, 24] q, float[b, t, 12] k, float[b, t, 10] v, float[b, 2, 6, 5] past,
   float[b, t, 2] decay, float[b, t, 1] beta) => (float[b, t, 20] y, float[b, 2, 6, 5] present) {
    y, present = LinearAttention <kv_num_heads = 2, q_num_heads = 4, update_rule = "RULE">
                                 (q, k, v, past, decay, beta)
}"""
CONV = """<ir_version: 10, opset_import: ["" : 27]>
g (float[b, 6, t] x, float[6, 1, 4] w, float[6] bias, float[b, 6, 3] past)
    => (float[b, 6, t] y, float[b, 6, 3] present) {
    y, present = CausalConvWithState <activation = "silu"> (x, w, bias, past)
}"""
RNG = np.random.default_rng(0)


def session(text):
    return llmc.InferenceSession(onnx.parser.parse_model(text).SerializeToString())


def random(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def stepped(model, given, state, axis, sizes):
    """y of all tokens, and the last state, with the tokens in pieces."""
    parts, start = [], 0
    for size in sizes:
        part = {name: array if name in ("w", "bias") else array.take(
            range(start, start + size), axis) for name, array in given.items()}
        y, state = model.run(["y", "present"], part | {"past": state})
        parts.append(y)
        start += size
    return np.concatenate(parts, axis), state


def test_attention_in_pieces():
    model = session(ATTENTION.replace("RULE", "gated_delta"))
    given = {"q": random(3, 19, 24), "k": random(3, 19, 12) / 4, "v": random(3, 19, 10),
             "decay": -np.abs(random(3, 19, 2)), "beta": np.abs(random(3, 19, 1)) % 1}
    past = random(3, 2, 6, 5)
    whole, parts = (stepped(model, given, past, 1, sizes) for sizes in ([19], [1, 16, 2]))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_convolution_in_pieces():
    model = session(CONV)
    given = {"x": random(2, 6, 11), "w": random(6, 1, 4), "bias": random(6)}
    past = random(2, 6, 3)
    whole, parts = (stepped(model, given, past, 2, sizes) for sizes in ([11], [1, 1, 7, 2]))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    padded = np.concatenate([past, given["x"]], 2)
    total = sum(padded[:, :, tap:tap + 11] * given["w"][:, 0, tap, None] for tap in range(4))
    total += given["bias"][:, None]
    np.testing.assert_allclose(whole[0], total / (1 + np.exp(-total)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule, message", [("linear", "forbids decay"), ("gated", "forbids beta"),
                                           ("gold", "update_rule")])
def test_what_does_not_fit_the_rule_is_refused(rule, message):
    with pytest.raises(ModelError, match=message):
        session(ATTENTION.replace("RULE", rule))
