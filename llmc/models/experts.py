"""Mixtures of experts: an MLP of which each token uses a few parts, chosen by a router.

Every expert is evaluated for every token, and those that were not chosen weigh nothing: one wide
product for all gates and ups, one for all downs. That is right, and reads all weights in each step;
products that only touch the chosen experts need a kernel of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dims import Dim
from llmc.ir.dtypes import f32
from llmc.models.common import Weights
from llmc.models.config import ConfigFile


@dataclass(frozen=True)
class Experts:
    """`chosen` of `count` experts work for a token; their scores add up to 1 if `normalised`."""

    count: int
    chosen: int
    inner: int
    normalised: bool
    activation: Callable[[Any], Any]
    names: tuple[str, str, str]  # of the gate, up and down projection of an expert

    def __call__(self, weights: Weights, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]; `weights` has `gate` and `experts.N`."""
        tokens, hidden = x.shape
        gate, up, down = self.names
        width = self.count * self.inner
        gates = x @ trace.transpose(self._stacked(weights, gate, (self.inner, hidden), 0), (1, 0))
        ups = x @ trace.transpose(self._stacked(weights, up, (self.inner, hidden), 0), (1, 0))
        inner = trace.reshape(self.activation(gates) * ups, (tokens, self.count, self.inner))
        scores = trace.reshape(self._scores(weights, x), (tokens, self.count, 1))
        # Chosen by `where`: what an expert that was not chosen makes of x may be infinite.
        weighted = trace.where(scores > 0.0, inner * trace.cast(scores, x.dtype), 0.0)
        downs = self._stacked(weights, down, (hidden, self.inner), 1)  # [hidden, width]
        return trace.reshape(weighted, (tokens, width)) @ trace.transpose(downs, (1, 0))

    def _stacked(self, weights: Weights, name: str, shape: Sequence[Dim], axis: int) -> Tensor:
        """One matrix of every expert, one after another along the axis."""
        matrices = [weights(f"experts.{number}.{name}.weight", *shape)
                    for number in range(self.count)]
        return trace.concat(matrices, axis=axis)

    def _scores(self, weights: Weights, x: Tensor) -> Tensor:
        """f32[tokens, count]: what each expert's result counts; 0 for those not chosen."""
        matrix = weights("gate.weight", self.count, x.shape[-1])
        logits = x @ trace.transpose(matrix, (1, 0))
        values, numbers = trace.top_k(trace.softmax(trace.cast(logits, f32)), self.chosen)
        if self.normalised:
            values = values / trace.reduce_sum(values, axes=1, keep=True)
        expert = trace.iota(numbers.dtype, (1, self.count), axis=1)
        scores = [
            trace.where(numbers[:, rank : rank + 1] == expert, values[:, rank : rank + 1], 0.0)
            for rank in range(self.chosen)
        ]
        return sum(scores[1:], scores[0])


def count_chosen(config: ConfigFile, count: int, default: int) -> int:
    """`num_experts_per_tok`, from 1 to the number of experts."""
    chosen = config.size("num_experts_per_tok", default)
    if chosen > count:
        raise config.error("num_experts_per_tok", f"is {chosen}, but there are {count} experts")
    return chosen
