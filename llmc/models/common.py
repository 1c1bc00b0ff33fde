"""What the families share: the step they run in, its weights, and the layers of every transformer.

A family is a function `(config, step) -> {output name: Tensor}`, traced once. Hidden states are
[tokens, hidden] in the step's compute dtype: tokens of all sequences one after another, no padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from llmc.errors import ModelError
from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dims import Dim, symbol
from llmc.ir.dtypes import DType, f32
from llmc.models.rope import Rope

TOKENS, SEQUENCES, ROWS = symbol("tokens"), symbol("sequences"), symbol("rows", 0)
TABLE_WIDTH, POOL_PAGES = symbol("table_width"), symbol("pool_pages")

# Inputs of a step by name, all i32. `sequence` is the index of each token's sequence, `offsets`
# the first token of each sequence and then the end, `rows` the tokens whose logits are wanted.
PACKED_INPUTS: dict[str, tuple[Dim, ...]] = {
    "ids": (TOKENS,),
    "positions": (TOKENS,),
    "sequence": (TOKENS,),
    "offsets": (SEQUENCES + 1,),
}
CAUSAL_INPUTS = PACKED_INPUTS | {"page_table": (SEQUENCES, TABLE_WIDTH), "rows": (ROWS,)}
# Of recurrent layers: where the state of each sequence is kept.
SLOT_INPUTS: dict[str, tuple[Dim, ...]] = {"slots": (SEQUENCES,)}
# Of each sequence: how many of its first tokens are keys, and which token is pooled.
ENCODER_INPUTS = PACKED_INPUTS | {
    "token_types": (TOKENS,), "lengths": (SEQUENCES,), "pooled": (SEQUENCES,),
}


@dataclass(frozen=True)
class ModelConfig:
    """What every family's config has; sizes in elements, `max_context` in tokens.

    A sequence of up to `growth_limit` tokens must not grow past it in a later step (0: it may).
    """

    vocab_size: int
    hidden_size: int
    layers: int
    max_context: int
    growth_limit: int = field(default=0, kw_only=True)


class Stored(Protocol):
    """What `Weights` asks of a stored tensor."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors as parameters of the graph that is being traced.

    Calling it with a name and shape declares the parameter as the file has it and casts it to
    `dtype`. `optional_prefix` is the part of names that some exporters leave out.
    """

    path: str
    stored: Mapping[str, Stored]
    dtype: DType
    optional_prefix: str
    scope: str = ""
    used: set[str] = field(default_factory=set)

    def under(self, scope: str) -> Weights:
        """The same weights, names relative to `scope`."""
        scope = f"{self.scope}{scope}."
        return Weights(self.path, self.stored, self.dtype, self.optional_prefix, scope, self.used)

    def cast_to(self, dtype: DType) -> Weights:
        """The same weights, cast to another dtype than the compute dtype."""
        return replace(self, dtype=dtype)

    def has(self, name: str) -> bool:
        return self._find(self.scope + name) is not None

    def __call__(self, name: str, *shape: Dim) -> Tensor:
        """The tensor in the compute dtype; ModelError if it is missing or of another shape."""
        full_name = self.scope + name
        found = self._find(full_name)
        if found is None:
            raise ModelError(f"{self.path}: tensor '{full_name}' is missing"
                             f" (expected shape {list(shape)})")
        tensor = self.stored[found]
        if tensor.shape != shape:
            raise ModelError(f"{self.path}: tensor '{found}' has shape {list(tensor.shape)};"
                             f" config.json asks for {list(shape)}")
        if not tensor.dtype.is_float:
            raise ModelError(f"{self.path}: tensor '{found}' has dtype {tensor.dtype};"
                             " expected floating point (quantised weights are not read yet)")
        self.used.add(found)
        return trace.cast(trace.parameter(found, tensor.dtype, shape), self.dtype)

    def _find(self, full_name: str) -> str | None:
        candidates = (full_name, full_name.removeprefix(self.optional_prefix))
        return next((name for name in candidates if name in self.stored), None)


@dataclass(frozen=True)
class Step:
    """One step of a model: its inputs (see CAUSAL_INPUTS, ENCODER_INPUTS) and weights."""

    inputs: Mapping[str, Tensor]
    weights: Weights

    @property
    def dtype(self) -> DType:
        """The compute dtype."""
        return self.weights.dtype

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.inputs[name]
        except KeyError:
            raise AttributeError(f"this step has no input {name!r}") from None


Function = TypeVar("Function", bound=Callable[..., Any])


def module(function: Function) -> Function:
    """Marks the ops that a function makes as made by the module whose weights it is given."""

    @functools.wraps(function)
    def inside(*arguments: Any, **options: Any) -> Any:
        weights = next(each for each in arguments if isinstance(each, Weights))
        with trace.scope(weights.scope.removesuffix(".")):
            return function(*arguments, **options)

    return inside  # type: ignore[return-value]


@module
def linear(x: Tensor, weights: Weights, inner: Dim, outer: Dim, bias: bool = False,
           dtype: DType | None = None) -> Tensor:
    """x [.., inner] times `weight` [outer, inner] transposed, plus `bias` [outer]; dtype: of the
    result, by default the operands'."""
    matrix = trace.transpose(weights("weight", outer, inner), (1, 0))
    result = trace.matmul(x, matrix, dtype=dtype)
    return result + weights.cast_to(result.dtype)("bias", outer) if bias else result


@module
def rms_norm(x: Tensor, weights: Weights, epsilon: float) -> Tensor:
    return trace.rms_norm(x, weights("weight", x.shape[-1]), epsilon=epsilon)


@module
def layer_norm(x: Tensor, weights: Weights, epsilon: float) -> Tensor:
    size = x.shape[-1]
    return trace.layer_norm(x, weights("weight", size), weights("bias", size), epsilon=epsilon)


def split_heads(x: Tensor, heads: int, size: int) -> Tensor:
    """[tokens, heads * size] -> [tokens, heads, size]"""
    return trace.reshape(x, (x.shape[0], heads, size))


def merge_heads(x: Tensor) -> Tensor:
    """[tokens, heads, size] -> [tokens, heads * size]"""
    tokens, heads, size = x.shape
    return trace.reshape(x, (tokens, heads * size))


def rope_tables(rope: Rope, positions: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """cos and sin, f32[tokens, half of what turns of a head], of each token's position."""
    frequencies = trace.constant(rope.inverse_frequencies(rope.rotated(head_size)))
    angles = trace.reshape(trace.cast(positions, f32), (positions.shape[0], 1)) * frequencies
    cos, sin = trace.cos(angles), trace.sin(angles)
    return (cos, sin) if rope.amplitude == 1 else (cos * rope.amplitude, sin * rope.amplitude)


def gelu_tanh(x: Tensor) -> Tensor:
    return trace.gelu(x, approximate="tanh")


def gelu_erf(x: Tensor) -> Tensor:
    return trace.gelu(x, approximate="none")


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": trace.silu,
    "swish": trace.silu,
    "relu": trace.relu,
    "tanh": trace.tanh,
    "sigmoid": trace.sigmoid,
    "gelu": gelu_erf,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * trace.sigmoid(x * 1.702),
}
