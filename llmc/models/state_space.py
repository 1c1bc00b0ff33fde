"""The Mamba-2 mixer: a causal convolution and a gated recurrence, each with a state of a sequence.

For every head, with time step dt and decay A < 0, the state S [state_size, head_size] and the
output y are S = exp(dt A) S + B (dt x)^T and y = S^T C + D x.

A recurrence magnifies what is rounded. Between its two projections the mixer therefore computes in
f32, as do the norms of what layers add up, with vectors of weights as the file has them, never by
way of bf16 or f16; only the convolution has its weights, state and results in the step's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dims import symbol
from llmc.ir.dtypes import f32
from llmc.models.common import Step, Weights, linear, module, rms_norm

POOL_SLOTS = symbol("pool_slots")


@dataclass(frozen=True)
class Mixer:
    """Sizes in elements. The time step is kept within `least_step` and `most_step`; `bias` is that
    of the projections."""

    inner: int
    heads: int
    groups: int  # of heads that share B and C, and of the norm
    state_size: int
    taps: int  # tokens that the convolution sees
    conv_bias: bool
    bias: bool
    epsilon: float
    least_step: float
    most_step: float

    @property
    def head_size(self) -> int:
        return self.inner // self.heads

    @property
    def channels(self) -> int:
        """x, B and C, which the convolution runs over."""
        return self.inner + 2 * self.groups * self.state_size


@module
def mix(mixer: Mixer, step: Step, layer: int, weights: Weights, x: Tensor) -> Tensor:
    """[tokens, hidden] of x [tokens, hidden]; extends the layer's two states."""
    hidden = x.shape[1]
    width = mixer.inner + mixer.channels + mixer.heads
    projected = linear(x, weights.under("in_proj"), hidden, width, mixer.bias, f32)
    gate, mixed, steps = _split(projected, mixer.inner, mixer.channels, mixer.heads)
    mixed = convolve(mixer, step, layer, weights.under("conv1d"), mixed)
    groups = mixer.groups * mixer.state_size
    values, keys, queries = _split(mixed, mixer.inner, groups, groups)
    y = recur(mixer, step, layer, weights, values, keys, queries, steps)
    normed = gated_norm(mixer, weights.under("norm"), y, gate)
    return linear(trace.cast(normed, step.dtype), weights.under("out_proj"), mixer.inner, hidden,
                  mixer.bias)


def _split(x: Tensor, *sizes: int) -> list[Tensor]:
    """x [tokens, sum of sizes] cut into columns."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [x[:, start:start + size] for start, size in zip(starts, sizes, strict=True)]


def convolve(mixer: Mixer, step: Step, layer: int, weights: Weights, x: Tensor) -> Tensor:
    """silu(conv(x)) of x [tokens, channels], each channel over its sequence's last tokens."""
    channels = mixer.channels
    state = trace.state(f"layers.{layer}.conv", step.dtype, (POOL_SLOTS, mixer.taps - 1, channels),
                        kind="slot", group="recurrent")
    weight = trace.reshape(weights("weight", channels, 1, mixer.taps), (channels, mixer.taps))
    bias = weights("bias", channels) if mixer.conv_bias else None
    y, new = trace.slot_conv(state, trace.cast(x, step.dtype), weight, step.slots, step.offsets,
                             step.positions, step.sequence, bias, activation="silu")
    trace.update(state, new)
    return y


def recur(mixer: Mixer, step: Step, layer: int, weights: Weights, values: Tensor, keys: Tensor,
          queries: Tensor, steps: Tensor) -> Tensor:
    """f32[tokens, heads, head_size] of values [tokens, inner], keys and queries [tokens, groups *
    state_size] and raw time steps [tokens, heads]."""
    tokens, heads = values.shape[0], mixer.heads

    def by_head(name: str) -> Tensor:
        return weights.cast_to(f32)(name, heads)

    def split(x: Tensor, count: int, size: int) -> Tensor:
        return trace.cast(trace.reshape(x, (tokens, count, size)), f32)

    dt = trace.softplus(trace.cast(steps, f32) + by_head("dt_bias"))
    if mixer.least_step > 0 or mixer.most_step < math.inf:
        dt = trace.clamp(dt, mixer.least_step, mixer.most_step)
    x = split(values, heads, mixer.head_size)
    state = trace.state(f"layers.{layer}.state", f32,
                        (POOL_SLOTS, heads, mixer.state_size, mixer.head_size),
                        kind="slot", group="recurrent")
    y, new = trace.slot_linear_attention(
        state, split(queries, mixer.groups, mixer.state_size),
        split(keys, mixer.groups, mixer.state_size),
        x * trace.reshape(dt, (tokens, heads, 1)), step.slots, step.offsets, step.positions,
        decay=dt * -trace.exp(by_head("A_log")), rule="gated", scale=1.0)
    trace.update(state, new)
    return y + x * trace.reshape(by_head("D"), (heads, 1))


def gated_norm(mixer: Mixer, weights: Weights, y: Tensor, gate: Tensor) -> Tensor:
    """f32[tokens, inner]: y * silu(gate), each group by its RMS, times the weights."""
    tokens, inner = y.shape[0], mixer.inner
    weight = weights.cast_to(f32)("weight", inner)
    gated = trace.reshape(y, (tokens, inner)) * trace.silu(trace.cast(gate, f32))
    if mixer.groups == 1:
        return trace.rms_norm(gated, weight, epsilon=mixer.epsilon)
    size = inner // mixer.groups
    ones = trace.constant(numpy.ones(size, numpy.float32))
    grouped = trace.reshape(gated, (tokens, mixer.groups, size))
    normed = trace.rms_norm(grouped, ones, epsilon=mixer.epsilon)
    return trace.reshape(normed, (tokens, inner)) * weight


def wide_norm(x: Tensor, weights: Weights, epsilon: float, step: Step) -> Tensor:
    """The norm of x in the step's dtype, whatever dtype x has."""
    if x.dtype is step.dtype:
        return rms_norm(x, weights, epsilon)
    weight = weights.cast_to(x.dtype)("weight", x.shape[-1])
    return trace.cast(trace.rms_norm(x, weight, epsilon=epsilon), step.dtype)
