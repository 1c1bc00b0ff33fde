"""Optimiser steps: Momentum, Adagrad, Adam. Each takes the rate R, the update count T, then all
tensors, all their gradients, and all of each of their states."""

from __future__ import annotations

from collections.abc import Callable

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.ir.dtypes import i64
from llmc.ir.graph import Node

DOMAIN = "ai.onnx.preview.training"
Update = Callable[[Call, Node, Node, list[Node]], list[Node]]


def optimised(call: Call, states: int, update: Update) -> Result:
    """The new tensors, then the new states: update(call, x, gradient, states) gives one's."""
    count, rest = divmod(len(call.inputs) - 2, 2 + states)
    if rest or count < 1:
        raise call.error(f"its {len(call.inputs)} inputs are no tensors with gradient and states")
    groups = [[call.input(2 + group * count + number) for group in range(2 + states)]
              for number in range(count)]
    results = [update(call, x, regularized(call, x, gradient), list(state))
               for x, gradient, *state in groups]
    return [result[part] for part in range(1 + states) for result in results]


def regularized(call: Call, x: Node, gradient: Node) -> Node:
    """The gradient with that of norm_coefficient / 2 * |x|^2."""
    weight = call.attribute("norm_coefficient", 0.0)
    return call.binary("add", call.scaled(x, weight), gradient)


def is_later(call: Call) -> Node:
    """Whether this is not the first update."""
    return call.binary("greater", call.cast(call.input(1), i64), call.scalar(0, i64))


@converter("Momentum", inputs=(5, None), domain=DOMAIN)
def momentum(call: Call) -> Result:
    return optimised(call, 1, _momentum)


def _momentum(call: Call, x: Node, gradient: Node, states: list[Node]) -> list[Node]:
    alpha, mode = call.required("alpha"), call.required("mode")
    if mode not in ("standard", "nesterov"):
        raise call.error(f"mode={mode!r} is neither 'standard' nor 'nesterov'")
    beta = call.where(is_later(call), call.scalar(call.required("beta"), x.dtype),
                      call.scalar(1, x.dtype))
    new = call.binary("add", call.scaled(states[0], alpha), call.binary("mul", beta, gradient))
    step = new if mode == "standard" else call.binary("add", gradient, call.scaled(new, alpha))
    rate = call.cast(call.input(0), x.dtype)
    return [call.binary("sub", x, call.binary("mul", rate, step)), new]


@converter("Adagrad", inputs=(5, None), domain=DOMAIN)
def adagrad(call: Call) -> Result:
    return optimised(call, 1, _adagrad)


def _adagrad(call: Call, x: Node, gradient: Node, states: list[Node]) -> list[Node]:
    decay = call.scaled(call.cast(call.input(1), x.dtype), call.attribute("decay_factor", 0.0))
    rate = call.binary("div", call.cast(call.input(0), x.dtype), call.shifted(decay, 1))
    new = call.binary("add", states[0], call.binary("mul", gradient, gradient))
    scale = call.shifted(call.unary("sqrt", new), call.attribute("epsilon", 1e-6))
    step = call.binary("div", call.binary("mul", rate, gradient), scale)
    return [call.binary("sub", x, step), new]


@converter("Adam", inputs=(6, None), domain=DOMAIN)
def adam(call: Call) -> Result:
    return optimised(call, 2, _adam)


def _adam(call: Call, x: Node, gradient: Node, states: list[Node]) -> list[Node]:
    alpha, beta = call.attribute("alpha", 0.9), call.attribute("beta", 0.999)
    mean = blended(call, states[0], gradient, alpha)
    square = blended(call, states[1], call.binary("mul", gradient, gradient), beta)
    scale = call.shifted(call.unary("sqrt", square), call.attribute("epsilon", 1e-6))
    rate, count = (call.cast(call.input(index), x.dtype) for index in range(2))
    left, right = (call.shifted(call.unary("neg", call.binary(
        "pow", call.scalar(base, x.dtype), count)), 1) for base in (alpha, beta))
    adjusted = call.binary("div", call.binary("mul", rate, call.unary("sqrt", right)), left)
    rate = call.where(is_later(call), adjusted, rate)
    step = call.binary("div", call.binary("mul", rate, mean), scale)
    kept = 1 - call.attribute("norm_coefficient_post", 0.0)
    return [call.scaled(call.binary("sub", x, step), kept), mean, square]


def blended(call: Call, old: Node, new: Node, weight: float) -> Node:
    """weight * old + (1 - weight) * new."""
    return call.binary("add", call.scaled(old, weight), call.scaled(new, 1 - weight))
