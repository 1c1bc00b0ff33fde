"""What decoders share: config values, attention over the paged cache, the gated MLP, the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dtypes import f32
from llmc.ir.ops import PAGE
from llmc.models.common import (
    POOL_PAGES,
    ModelConfig,
    Step,
    Weights,
    linear,
    merge_heads,
    module,
    split_heads,
)
from llmc.models.config import ConfigFile, head_size
from llmc.models.rope import Rope, read_rope

Rotation = tuple[Tensor, Tensor]  # cos and sin, f32[tokens, half of what turns of a head]


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """Sizes in elements; `epsilon` is that of the norms, `tied` whether embedding is head too."""

    intermediate_size: int
    heads: int
    kv_heads: int
    head_size: int
    rope: Rope
    epsilon: float
    activation: Callable[[Any], Any]
    tied: bool


def read_sizes(config: ConfigFile, rope: Rope | None = None) -> dict[str, Any]:
    """The sizes and rope of a DecoderConfig by name, under the keys that most families use."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_attention_heads", f"is {heads}, no multiple of {kv_heads=}")
    max_context = config.size("max_position_embeddings")
    rope = rope or read_rope(config, max_context)
    size = head_size(config, hidden, heads)
    turned = rope.rotated(size)
    if turned % 2 or not turned:
        raise config.error("head_dim", f"is {size}, of which {turned} elements turn; rotary"
                           " positions need an even number")
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden,
        "layers": config.size("num_hidden_layers"),
        "max_context": max_context,
        "intermediate_size": config.size("intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": size,
        "rope": rope,
    }


@module
def project_heads(
    config: DecoderConfig, weights: Weights, x: Tensor, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q [tokens, heads, head_size], k and v [tokens, kv_heads, head_size] of x [tokens, hidden]."""

    def project(name: str, heads: int) -> Tensor:
        width = heads * config.head_size
        projected = linear(x, weights.under(name), config.hidden_size, width, bias)
        return split_heads(projected, heads, config.head_size)

    return (
        project("q_proj", config.heads),
        project("k_proj", config.kv_heads),
        project("v_proj", config.kv_heads),
    )


def rotate(q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """q and k [tokens, .., head_size] turned by each token's position."""
    return (
        trace.rope(q, *rotation, interleaved=False),
        trace.rope(k, *rotation, interleaved=False),
    )


def attend(
    step: Step,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """[tokens, heads * size]: q attends to the layer's cache, which k and v extend.

    `scale` is 1 / sqrt(size) by default; with a window a token sees that many, itself included.
    """
    k_cache = extend_cache(step, f"layers.{layer}.k", k)
    v_cache = extend_cache(step, f"layers.{layer}.v", v)
    attended = trace.paged_attention(
        q, k_cache, v_cache, step.page_table, step.sequence, step.positions, step.offsets,
        scale=scale, window=window, softcap=softcap,
    )
    return merge_heads(attended)


@module
def attention(
    config: DecoderConfig,
    step: Step,
    layer: int,
    weights: Weights,
    x: Tensor,
    rotation: Rotation,
    *,
    bias: bool = False,
    window: int = 0,
    output: str = "o_proj",
) -> Tensor:
    """Self-attention of x [tokens, hidden] over the layer's cache, which it extends; `bias` is
    that of all four projections, `output` the last one's name."""
    q, k, v = project_heads(config, weights, x, bias)
    q, k = rotate(q, k, rotation)
    attended = attend(step, layer, q, k, v, window=window)
    return linear(attended, weights.under(output), attended.shape[-1], config.hidden_size, bias)


def extend_cache(step: Step, name: str, values: Tensor) -> Tensor:
    """The paged cache `name` after `values` [tokens, kv_heads, size] are written into it."""
    shape = (POOL_PAGES, PAGE, *values.shape[1:])
    cache = trace.state(name, step.dtype, shape, kind="paged", group="full")
    grown = trace.cache_append(cache, values, step.page_table, step.sequence, step.positions)
    trace.update(cache, grown)
    return grown


@module
def gated_mlp(
    config: DecoderConfig, weights: Weights, x: Tensor, bias: bool = False, inner: int = 0
) -> Tensor:
    """down(activation(gate(x)) * up(x)) of x [tokens, hidden]; `inner` is the width between, by
    default that of the config."""
    hidden, inner = config.hidden_size, inner or config.intermediate_size
    gate = linear(x, weights.under("gate_proj"), hidden, inner, bias)
    up = linear(x, weights.under("up_proj"), hidden, inner, bias)
    return linear(config.activation(gate) * up, weights.under("down_proj"), inner, hidden, bias)


def embedding_matrix(config: DecoderConfig, weights: Weights) -> Tensor:
    """[vocab_size, hidden]; a tied matrix may be stored under either of its names."""
    name = "model.embed_tokens.weight"
    if config.tied and not weights.has(name):
        name = "lm_head.weight"
    return weights(name, config.vocab_size, config.hidden_size)


def wanted_rows(step: Step, x: Tensor) -> Tensor:
    """The rows [rows, hidden] of x [tokens, hidden] whose logits the step asks for."""
    return trace.gather(x, step.rows, axis=0)


def head(config: DecoderConfig, step: Step, x: Tensor) -> Tensor:
    """Logits f32[rows, vocab_size] of the last norm's output x [rows, hidden]."""
    matrix = (
        embedding_matrix(config, step.weights)
        if config.tied
        else step.weights("lm_head.weight", config.vocab_size, config.hidden_size)
    )
    return trace.matmul(x, trace.transpose(matrix, (1, 0)), dtype=f32)
