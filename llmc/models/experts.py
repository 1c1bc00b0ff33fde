"""Mixtures of experts: an MLP of which each token uses a few parts, chosen by a router."""

from __future__ import annotations

from dataclasses import dataclass

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
    activation: str
    names: tuple[str, str, str]  # of the gate, up and down projection of an expert

    def __call__(self, weights: Weights, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]; `weights` has `gate` and `experts.N`."""
        hidden = x.shape[-1]
        gate, up, down = self.names
        with trace.scope(weights.scope.removesuffix(".")):
            numbers, scores = self._chosen(weights, x)
            return trace.routed_experts(
                x, numbers, scores, self._stacked(weights, gate, self.inner, hidden),
                self._stacked(weights, up, self.inner, hidden),
                self._stacked(weights, down, hidden, self.inner),
                experts=self.count, activation=self.activation)

    def _stacked(self, weights: Weights, name: str, *shape: Dim) -> Tensor:
        """One matrix of every expert, one after another."""
        return trace.concat([weights(f"experts.{number}.{name}.weight", *shape)
                             for number in range(self.count)], axis=0)

    def _chosen(self, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and f32 scores [tokens, chosen] of each token's experts."""
        matrix = weights("gate.weight", self.count, x.shape[-1])
        logits = x @ trace.transpose(matrix, (1, 0))
        scores, numbers = trace.top_k(trace.softmax(trace.cast(logits, f32)), self.chosen)
        if self.normalised:
            scores = scores / trace.reduce_sum(scores, axes=1, keep=True)
        return numbers, scores


# Names in config.json -> activations of the op `routed_experts`.
EXPERT_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "sigmoid": "sigmoid", "tanh": "tanh",
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def count_chosen(config: ConfigFile, count: int, default: int) -> int:
    """`num_experts_per_tok`, from 1 to the number of experts."""
    chosen = config.size("num_experts_per_tok", default)
    if chosen > count:
        raise config.error("num_experts_per_tok", f"is {chosen}, but there are {count} experts")
    return chosen
