"""Scan stages of the host, compiled: both linear attentions and the convolution, against f64."""

import numpy as np
import pytest

from llmc.errors import CompileError
from llmc.ir.ops import make
from tests.codegen.harness import Runner, assert_close, leaf, reference, stage_program

TOKENS = 61
OFFSETS = np.array([0, 1, 6, 46, 61], np.int32)  # four sequences
STARTS = (7, 0, 2, 0)  # position of each one's first token
SLOTS = np.array([3, 0, 4, 1], np.int32)
RULES = ["linear", "gated", "delta", "gated_delta"]
# heads of state, queries and keys, sizes of keys and values, whether decay is by key
HEADS = [(4, 2, 2, 16, 12, False), (2, 4, 2, 17, 32, True), (3, 3, 1, 8, 16, False),
         (2, 2, 2, 64, 64, False), (1, 8, 1, 5, 3, True)]


def both(op, *inputs, **attributes):
    node = make(op, *inputs, **attributes)
    return make("get", node, index=0), make("get", node, index=1)


def addresses():
    """Leaves and arrays of slots, offsets and positions."""
    positions = np.concatenate([start + np.arange(count) for start, count in zip(
        STARTS, np.diff(OFFSETS), strict=True)]).astype(np.int32)
    arrays = {"slots": SLOTS, "offsets": OFFSETS, "positions": positions}
    return [leaf(name, "i32", len(array)) for name, array in arrays.items()], arrays


def operands(rule, heads, tokens, dtype, batch=()):
    """Leaves and arrays of q, k, v and the gates."""
    count, query_heads, key_heads, size, columns, per_key = heads
    rng = np.random.default_rng(0)
    lead = (*batch, tokens)
    arrays = {"q": rng.normal(size=(*lead, query_heads, size)),
              "k": rng.normal(size=(*lead, key_heads, size)) / np.sqrt(size),
              "v": rng.normal(size=(*lead, count, columns))}
    if "gated" in rule:
        arrays["decay"] = -rng.random((*lead, count, size) if per_key else (*lead, count))
    if "delta" in rule:
        arrays["beta"] = rng.random((*lead, count))
    leaves = [leaf(name, dtype, *array.shape) for name, array in arrays.items()]
    return leaves, {x["name"]: arrays[x["name"]].astype(x.dtype.numpy) for x in leaves}


def compare(outputs, arrays, states=(), workers=1):
    program = stage_program("scan", outputs, states=states)
    got = Runner(program, workers).run(arrays)
    wanted = reference(outputs, arrays, {})
    for name, node in outputs.items():
        used = SLOTS if name in states else slice(None)
        assert_close(got[name][used], wanted[name][used], node.dtype.name)
    return got


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heads", HEADS)
def test_slots(rule, heads):
    (q, k, v, *gates), arrays = operands(rule, heads, TOKENS, "f32")
    where, places = addresses()
    state = leaf("state", "f32", 6, heads[0], *heads[3:5])
    rng = np.random.default_rng(1)
    arrays |= places | {"state": rng.normal(size=state.shape).astype(np.float32)}
    arrays["state"][[0, 1, 2, 5]] = np.nan  # of new sequences, and of nobody
    y, new = both("slot_linear_attention", state, q, k, v, *where, *gates, rule=rule)
    got = compare({"y": y, "state": new}, arrays, ("state",), workers=3)
    assert np.isnan(got["state"][[2, 5]]).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_batches_in_small_types(rule, dtype):
    leaves, arrays = operands(rule, HEADS[1], 19, dtype, batch=(3,))
    state = leaf("state", "f32", 3, 2, 17, 32)
    arrays["state"] = np.random.default_rng(1).normal(size=state.shape).astype(np.float32)
    y, new = both("linear_attention", state, *leaves, rule=rule)
    compare({"y": y, "new": new}, arrays)


def test_what_is_computed_on_the_way_in():
    """Casts, views and products before the op, and a state of zeros."""
    (q, k, v, decay), arrays = operands("gated", HEADS[3], 9, "bf16", batch=(2,))
    wide = [make("cast", each, dtype="f32") for each in (q, k, v, decay)]
    times = make("mul", wide[2], make("reshape", wide[3], shape=(2, 9, 2, 1)))
    zero = make("broadcast", make("constant", dtype="f32", shape=(), data=bytes(4)),
                shape=(2, 2, 64, 64))
    y, new = both("linear_attention", zero, *wide[:2], times, wide[3])
    compare({"y": y, "new": new}, arrays)


@pytest.mark.parametrize("channels", [1, 24, 160])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("dtype, bias, activation",
                         [("f32", True, "silu"), ("bf16", False, "none")])
def test_convolution(channels, taps, dtype, bias, activation):
    rng = np.random.default_rng(0)
    where, arrays = addresses()
    shapes = {"state": (6, taps - 1, channels), "x": (TOKENS, channels), "weight": (channels, taps)}
    leaves = [leaf(name, dtype, *shape) for name, shape in shapes.items()]
    biases = [leaf("bias", dtype, channels)] if bias else []
    for each in (*leaves, *biases):
        arrays[each["name"]] = rng.normal(size=each.shape).astype(each.dtype.numpy)
    arrays["state"][[0, 1, 2, 5]] = np.nan
    arrays["sequence"] = np.repeat(np.arange(4), np.diff(OFFSETS)).astype(np.int32)
    sequence = leaf("sequence", "i32", TOKENS)
    y, new = both("slot_conv", *leaves, *where, sequence, *biases, activation=activation)
    got = compare({"y": y, "state": new}, arrays, ("state",), workers=2)
    assert np.isnan(got["state"][[2, 5]].astype(np.float32)).all()


def test_f64_is_refused():
    leaves, _ = operands("gated", HEADS[2], 4, "f64", batch=(1,))
    y, _ = both("linear_attention", leaf("state", "f64", 1, 3, 8, 16), *leaves)
    with pytest.raises(CompileError, match="f64"):
        Runner(stage_program("scan", {"y": y}))
