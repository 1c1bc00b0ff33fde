"""Losses: negative log likelihood, and softmax cross entropy."""

from __future__ import annotations

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.reduction import log_softmax
from llmc.frontend.onnx.registry import Result, converter
from llmc.ir.graph import Node


@converter("NegativeLogLikelihoodLoss", inputs=(2, 3))
def negative_log_likelihood(call: Call) -> Result:
    return likelihood_loss(call, call.input(0))


@converter("SoftmaxCrossEntropyLoss", inputs=(2, 3))
def softmax_cross_entropy(call: Call) -> Result:
    """The loss, and log(softmax(scores))."""
    log_probabilities = log_softmax(call, call.input(0), 1)
    return likelihood_loss(call, log_probabilities), log_probabilities


def likelihood_loss(call: Call, x: Node) -> Node:
    """-w[t] * x[n, t, ...] of log probabilities x [batch, classes, ...] and targets t [batch, ...]:
    all of them, their sum, or their mean weighted by w; ignored targets weigh nothing."""
    if x.rank < 2:
        raise call.error(f"its scores have rank {x.rank}, not 2 or more")
    target, ignored = call.input(1), call.attribute("ignore_index")
    picked, weight = target, call.optional(2)
    ones = call.full(1, target.shape, x.dtype)
    counts = None
    if ignored is not None:
        is_ignored = call.binary("equal", target, call.scalar(ignored, target.dtype))
        picked = call.where(is_ignored, call.scalar(0, target.dtype), target)
        counts = call.where(is_ignored, call.scalar(0, x.dtype), ones)
    if weight is not None:
        of_class = call.take(weight, picked)
        counts = of_class if counts is None else call.binary("mul", counts, of_class)
    found = call.make("gather_elements", x, call.unsqueeze(picked, [1]), axis=1)
    loss = call.unary("neg", call.reshape(found, target.shape))
    if counts is not None:
        loss = call.binary("mul", loss, counts)
    return reduced_loss(call, loss, ones if counts is None else counts)


def reduced_loss(call: Call, loss: Node, counts: Node) -> Node:
    """As the attribute `reduction` says; `counts` are the weights of a mean."""
    reduction = call.attribute("reduction", "mean")
    if reduction not in ("none", "sum", "mean"):
        raise call.error(f"reduction={reduction!r} is neither 'none', 'sum' nor 'mean'")
    if reduction == "none":
        return loss
    axes = range(loss.rank)
    total = call.reduce("reduce_sum", loss, axes, keep=False)
    if reduction == "sum":
        return total
    return call.binary("div", total, call.reduce("reduce_sum", counts, axes, keep=False))
