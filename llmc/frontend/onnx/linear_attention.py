"""LinearAttention and CausalConvWithState: recurrences whose state comes in and goes out."""

from __future__ import annotations

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.ir.dims import Dim
from llmc.ir.graph import Node
from llmc.ir.ops_recurrent import RULES, is_delta, is_gated


@converter("LinearAttention", inputs=(3, 6))
def linear_attention(call: Call) -> Result:
    rule = call.attribute("update_rule", "gated_delta")
    if rule not in RULES:
        raise call.error(f"update_rule is {rule!r}; expected one of {', '.join(RULES)}")
    for index, name, wanted in ((4, "decay", is_gated(rule)), (5, "beta", is_delta(rule))):
        if call.has(index) != wanted:
            raise call.error(f"the rule {rule} {'needs' if wanted else 'forbids'} {name}")
    heads, query_heads = call.required("kv_num_heads"), call.required("q_num_heads")
    if heads < 1 or query_heads < 1 or query_heads % heads:
        raise call.error(f"q_num_heads {query_heads} is no multiple of kv_num_heads {heads}")
    q, k, v = (_heads(call, index, count)
               for index, count in ((0, query_heads), (1, heads), (2, heads)))
    state = call.optional(3)
    if state is None:
        state = call.full(0, (q.shape[0], heads, k.shape[-1], v.shape[-1]), q.dtype)
    gates = [_decay(call, heads, k.shape[-1])] if is_gated(rule) else []
    gates += [_beta(call, heads)] if is_delta(rule) else []
    both = call.make("linear_attention", state, q, k, v, *gates, rule=rule,
                     scale=call.attribute("scale", 0.0) or None)
    y, present = (call.make("get", both, index=index) for index in range(2))
    batch, tokens, count, size = y.shape
    return call.reshape(y, (batch, tokens, count * size)), present


def _heads(call: Call, index: int, heads: int) -> Node:
    """An input [batch, tokens, heads * size] as [batch, tokens, heads, size]."""
    x = call.input(index)
    if x.rank != 3:
        raise call.error(f"input {index} has rank {x.rank}, not 3")
    return call.reshape(x, (*x.shape[:2], heads, call.divide(x.shape[-1], heads)))


def _decay(call: Call, heads: int, size: Dim) -> Node:
    """[batch, tokens, heads], or [.., heads, size] where each element of a key has its own."""
    decay = call.input(4)
    return decay if decay.shape[-1] == heads else _sized(call, decay, heads, size)


def _sized(call: Call, decay: Node, heads: int, size: Dim) -> Node:
    call.require_equal(decay.shape[-1], heads * size, "last axis of decay")
    return call.reshape(decay, (*decay.shape[:-1], heads, size))


def _beta(call: Call, heads: int) -> Node:
    """[batch, tokens, heads]; one for all heads is repeated."""
    beta = call.input(5)
    return call.broadcast(beta, (*beta.shape[:-1], heads))


@converter("CausalConvWithState", inputs=(2, 4))
def causal_conv_with_state(call: Call) -> Result:
    """[batch, channels, length]: a sum over shifted windows of the state and what follows it."""
    activation = call.attribute("activation", "none")
    if activation not in ("none", "silu", "swish"):
        raise call.error(f"activation is {activation!r}; expected none, silu or swish")
    x, weight = call.input(0), call.input(1)
    if x.rank != 3 or weight.rank != 3 or not isinstance(weight.shape[-1], int):
        raise call.error("takes an input of rank 3 and a filter [channels, 1, n] of known length")
    batch, channels, length = x.shape
    call.require_equal(weight.shape[0], channels, "channels")
    taps = weight.shape[-1]
    past = call.optional(3)
    if past is None:
        past = call.full(0, (batch, channels, taps - 1), x.dtype)
    padded = call.concat([past, x], 2)
    total = None if not call.has(2) else call.reshape(call.input(2), (channels, 1))
    for tap in range(taps):
        window = call.slice_axis(padded, 2, tap, tap + length)
        column = call.reshape(call.slice_axis(weight, 2, tap, tap + 1), (channels, 1))
        product = call.binary("mul", window, column)
        total = product if total is None else call.binary("add", total, product)
    assert total is not None
    if activation != "none":
        total = call.unary("silu", total)
    return total, call.slice_axis(padded, 2, length, length + taps - 1)
