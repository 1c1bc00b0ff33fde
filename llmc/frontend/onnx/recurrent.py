"""RNN, GRU and LSTM: the inputs' products for all steps at once, then a loop over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.frontend.onnx.turns import known_extent, repeated
from llmc.ir.dtypes import i64
from llmc.ir.graph import Node

Activation = Callable[[Node], Node]
Step = Callable[["Cell", Node, Sequence[Node], Sequence[Node]], list[Node]]


@dataclass(frozen=True)
class Cell:
    """One direction's step. `step(cell, products, states, operands)` gives the new states, the
    hidden one first; `products` [batch, gates * hidden] come from the input and the biases."""

    call: Call
    step: Step
    activations: tuple[Activation, ...]

    def product(self, hidden: Node, weight: Node) -> Node:
        """hidden @ weight^T."""
        return self.call.matmul(hidden, self.call.swap_last(weight))

    def gates(self, x: Node, count: int) -> list[Node]:
        """x [batch, count * hidden] in equal parts."""
        return self.call.split(x, 1, [self.call.divide(x.shape[1], count)] * count)

    def add(self, a: Node, b: Node) -> Node:
        return self.call.binary("add", a, b)

    def mul(self, a: Node, b: Node) -> Node:
        return self.call.binary("mul", a, b)

    def rest(self, share: Node) -> Node:
        """1 - share."""
        return self.call.binary("sub", self.call.scalar(1, share.dtype), share)


# ---- activations --------------------------------------------------------------------------------

PLAIN = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "softplus": "softplus"}
DEFAULTS: dict[str, tuple[float, ...]] = {
    "affine": (1.0, 0.0), "leakyrelu": (0.01,), "thresholdedrelu": (1.0,),
    "scaledtanh": (1.0, 1.0), "hardsigmoid": (0.2, 0.5), "elu": (1.0,), "softsign": (),
}


def activation(call: Call, name: str, alpha: float | None, beta: float | None) -> Activation:
    """ONNX's activation of that name; None stands for the usual value."""
    name = name.lower()
    if name in PLAIN:
        return lambda x: call.unary(PLAIN[name], x)
    if name not in DEFAULTS:
        raise call.error(f"activation {name!r} is not supported")
    a, b = (*DEFAULTS[name], 0.0, 0.0)[:2]
    a, b = a if alpha is None else alpha, b if beta is None else beta
    return lambda x: _activated(call, name, x, a, b)


def _activated(call: Builder, name: str, x: Node, a: float, b: float) -> Node:
    zero, one = call.scalar(0, x.dtype), call.scalar(1, x.dtype)
    if name == "affine":
        return call.shifted(call.scaled(x, a), b)
    if name == "hardsigmoid":
        return call.clamp(call.shifted(call.scaled(x, a), b), zero, one)
    if name == "scaledtanh":
        return call.scaled(call.unary("tanh", call.scaled(x, b)), a)
    if name == "softsign":
        return call.binary("div", x, call.shifted(call.unary("abs", x), 1.0))
    if name == "thresholdedrelu":
        return call.where(call.binary("greater", x, call.scalar(a, x.dtype)), x, zero)
    below = call.scaled(x, a) if name == "leakyrelu" else call.scaled(
        call.shifted(call.unary("exp", call.binary("min", x, zero)), -1.0), a)
    return call.where(call.binary("less", x, zero), below, x)


def cell(call: Call, step: Step, usual: tuple[str, ...], direction: int, count: int) -> Cell:
    """The cell of a direction with the activations that the node names for it."""
    names = list(call.attribute("activations") or [*usual] * count)
    if len(names) != len(usual) * count:
        raise call.error(f"{len(names)} activations for {count} directions")
    alphas = list(call.attribute("activation_alpha", []))
    betas = list(call.attribute("activation_beta", []))
    found: list[Activation] = []
    for name in names:
        wants = len(DEFAULTS.get(name.lower(), ()))
        alpha = alphas.pop(0) if wants > 0 and alphas else None
        beta = betas.pop(0) if wants > 1 and betas else None
        found.append(clipped(call, activation(call, name, alpha, beta)))
    first = direction * len(usual)
    return Cell(call, step, tuple(found[first : first + len(usual)]))


def clipped(call: Call, function: Activation) -> Activation:
    """The activation of what `clip` leaves."""
    limit = call.attribute("clip")
    if limit is None:
        return function

    def limited(x: Node) -> Node:
        low, high = call.scalar(-limit, x.dtype), call.scalar(limit, x.dtype)
        return function(call.clamp(x, low, high))

    return limited


# ---- steps --------------------------------------------------------------------------------------


def rnn_step(cell: Cell, x: Node, states: Sequence[Node], operands: Sequence[Node]) -> list[Node]:
    """h' = f(x W + h R)."""
    return [cell.activations[0](cell.add(x, cell.product(states[0], operands[0])))]


def gru_step(cell: Cell, x: Node, states: Sequence[Node], operands: Sequence[Node]) -> list[Node]:
    """z, r, h' = f(..), f(..), g(..); the new state is (1 - z) h' + z h. The last operand is the
    recurrent bias of h'."""
    (hidden,), (weight, bias) = states, operands
    f, g = cell.activations
    width = cell.call.divide(weight.shape[0], 3)
    x_z, x_r, x_h = cell.gates(x, 3)
    w_z, w_r, w_h = cell.call.split(weight, 0, [width] * 3)
    z = f(cell.add(x_z, cell.product(hidden, w_z)))
    r = f(cell.add(x_r, cell.product(hidden, w_r)))
    if cell.call.attribute("linear_before_reset", 0):
        inner = cell.mul(r, cell.add(cell.product(hidden, w_h), bias))
    else:
        inner = cell.add(cell.product(cell.mul(r, hidden), w_h), bias)
    new = g(cell.add(x_h, inner))
    return [cell.add(cell.mul(cell.rest(z), new), cell.mul(z, hidden))]


def lstm_step(cell: Cell, x: Node, states: Sequence[Node], operands: Sequence[Node]) -> list[Node]:
    """i, o, f, c of the input, the hidden state and, through peepholes, the cell state."""
    hidden, memory = states
    weight, *given = operands
    f, g, h = cell.activations
    products = cell.gates(x, 4), cell.gates(cell.product(hidden, weight), 4)
    i, o, forget, new = (cell.add(a, b) for a, b in zip(*products, strict=True))
    peepholes = cell.gates(given[0], 3) if given else []
    if peepholes:
        i = cell.add(i, cell.mul(peepholes[0], memory))
        forget = cell.add(forget, cell.mul(peepholes[2], memory))
    i = f(i)
    kept = cell.rest(i) if cell.call.attribute("input_forget", 0) else f(forget)
    memory = cell.add(cell.mul(kept, memory), cell.mul(i, g(new)))
    if peepholes:
        o = cell.add(o, cell.mul(peepholes[1], memory))
    o = f(o)
    return [cell.mul(o, h(memory)), memory]


# ---- the operators ------------------------------------------------------------------------------


@converter("RNN", inputs=(3, 6))
def rnn(call: Call) -> Result:
    return recurrent(call, rnn_step, ("Tanh",), 1)


@converter("GRU", inputs=(3, 6))
def gru(call: Call) -> Result:
    return recurrent(call, gru_step, ("Sigmoid", "Tanh"), 3)


@converter("LSTM", inputs=(3, 8))
def lstm(call: Call) -> Result:
    return recurrent(call, lstm_step, ("Sigmoid", "Tanh", "Tanh"), 4)


def recurrent(call: Call, step: Step, usual: tuple[str, ...], gates: int) -> Result:
    """All steps' outputs [steps, directions, batch, hidden] and the last states
    [directions, batch, hidden]; batch first with layout 1."""
    batch_first = bool(call.attribute("layout", 0))
    x, weight = call.input(0), call.input(1)
    x = call.transpose(x, (1, 0, 2)) if batch_first else x
    direction = str(call.attribute("direction", "forward"))
    backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
    if direction not in backwards:
        raise call.error(f"direction={direction!r} is not supported")
    turned = backwards[direction]
    known_extent(call, x.shape[0], "steps")
    call.require_equal(weight.shape[0], len(turned), "directions of the weights")
    results = []
    for number, reverse in enumerate(turned):
        one = cell(call, step, usual, number, len(turned))
        results.append(one_direction(one, x, number, gates, reverse))
    outputs, *states = (
        [call.unsqueeze(each, [axis]) for each in column]
        for axis, column in zip([1, 0, 0], zip(*results, strict=True), strict=False)
    )
    found = [call.concat(outputs, 1), *(call.concat(each, 0) for each in states)]
    if batch_first:
        found = [call.transpose(found[0], (2, 0, 1, 3)),
                 *(call.transpose(each, (1, 0, 2)) for each in found[1:])]
    return found


def part(call: Call, index: int, direction: int) -> Node | None:
    """One direction of an input, without that axis."""
    value = call.optional(index)
    if value is None:
        return None
    piece = call.slice_axis(value, 0, direction, direction + 1)
    return call.reshape(piece, value.shape[1:])


def one_direction(one: Cell, x: Node, direction: int, gates: int, reverse: bool) -> list[Node]:
    """(outputs of all steps, last states) of one direction; without steps the states stay."""
    call = one.call
    weight, loop = call.input(1), call.input(2)
    batch, hidden = x.shape[1], loop.shape[-1]
    states = [initial(call, 5, direction, (batch, hidden), x)]
    if gates == 4:
        states.append(initial(call, 6, direction, (batch, hidden), x))
    steps = known_extent(call, x.shape[0], "steps")
    if steps == 0:
        return [call.full(0, (0, batch, hidden), x.dtype), *states]
    weight = call.reshape(call.slice_axis(weight, 0, direction, direction + 1), weight.shape[1:])
    loop = call.reshape(call.slice_axis(loop, 0, direction, direction + 1), loop.shape[1:])
    lengths = call.cast(call.input(4), i64) if call.has(4) else None
    x = turned_round(call, x, lengths) if reverse else x
    products = call.matmul(x, call.swap_last(weight))
    bias = part(call, 3, direction)
    zero = call.full(0, (2 * gates * hidden,), x.dtype)
    own, recurrent_bias = call.split(zero if bias is None else bias, 0, [gates * hidden] * 2)
    operands = [loop]
    if gates == 3:  # the new state's recurrent bias may be inside the reset
        summed, last = call.split(recurrent_bias, 0, [2 * hidden, hidden])
        recurrent_bias = call.concat([summed, call.full(0, (hidden,), x.dtype)], 0)
        operands.append(call.unsqueeze(last, [0]))
    products = call.binary("add", products, call.binary("add", own, recurrent_bias))
    if gates == 4:
        peepholes = part(call, 7, direction)
        operands += [] if peepholes is None else [call.unsqueeze(peepholes, [0])]
    known = [products, *operands, *([] if lengths is None else [call.unsqueeze(lengths, [1])])]
    last_states, (outputs,) = repeated(
        call, steps, states, known, lambda *each: _turn(one, len(operands), *each))
    return [turned_round(call, outputs, lengths) if reverse else outputs, *last_states]


def _turn(
    one: Cell, count: int, turn: Node, states: Sequence[Node], known: Sequence[Node]
) -> tuple[list[Node], list[Node]]:
    """One step; a sequence that has ended keeps its states and puts out zeros."""
    call = one.call
    x = call.make("gather", known[0], turn, axis=0)
    new = one.step(one, x, states, known[1 : 1 + count])
    if len(known) == 1 + count:
        return new, [new[0]]
    runs = call.binary("less", turn, known[1 + count])
    out = call.where(runs, new[0], call.scalar(0, new[0].dtype))
    return [call.where(runs, a, b) for a, b in zip(new, states, strict=True)], [out]


def initial(call: Call, index: int, direction: int, shape: tuple, x: Node) -> Node:
    """A state before the first step: as given (batch first with layout 1), or zeros."""
    if not call.has(index):
        return call.full(0, shape, x.dtype)
    value = call.input(index)
    value = call.transpose(value, (1, 0, 2)) if call.attribute("layout", 0) else value
    return call.reshape(call.slice_axis(value, 0, direction, direction + 1), shape)


def turned_round(call: Builder, x: Node, lengths: Node | None) -> Node:
    """x[steps, batch, ...] backwards, each sequence within its own length."""
    if lengths is None:
        return call.slice_axes(x, {0: (0, x.shape[0], -1)})
    step = call.unsqueeze(call.iota(x.shape[0]), [1])
    mirrored = call.shifted(call.binary("sub", lengths, step), -1.0)
    index = call.where(call.binary("less", step, lengths), mirrored, step)
    index = call.broadcast(call.unsqueeze(index, [2]), x.shape)
    return call.make("gather_elements", x, index, axis=0)
