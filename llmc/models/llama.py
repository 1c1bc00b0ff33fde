"""Llama: RMSNorm, rotary positions, grouped key/value heads, SwiGLU. Read `llama` first.

Llama 1 to 3.x, TinyLlama, SmolLM 1 and 2, the TinyStories models and others with
`LlamaForCausalLM` in their config.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dtypes import f32
from llmc.ir.ops import PAGE
from llmc.models.common import (
    ACTIVATIONS,
    POOL_PAGES,
    ModelConfig,
    Step,
    Weights,
    linear,
    merge_heads,
    rms_norm,
    rope_tables,
    split_heads,
)
from llmc.models.config import ConfigFile, head_size
from llmc.models.rope import Rope, read_rope


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    intermediate_size: int
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    rope: Rope
    activation: Callable[[Any], Any]
    attention_bias: bool
    mlp_bias: bool
    tied: bool

    @classmethod
    def read(cls, config: ConfigFile) -> LlamaConfig:
        """Checked values of a config.json. ModelError names file and key."""
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        kv_heads = config.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise config.error("num_attention_heads", f"is {heads}, no multiple of {kv_heads=}")
        size = head_size(config, hidden, heads)
        if size % 2:
            raise config.error("head_dim", f"is {size}; rotary positions need an even size")
        max_context = config.size("max_position_embeddings")
        return cls(
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden,
            layers=config.size("num_hidden_layers"),
            max_context=max_context,
            intermediate_size=config.size("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            epsilon=config.positive("rms_norm_eps", 1e-6),
            rope=read_rope(config, max_context),
            activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
            attention_bias=config.flag("attention_bias", False),
            mlp_bias=config.flag("mlp_bias", False),
            tied=config.flag("tie_word_embeddings", False),
        )


def llama(config: LlamaConfig, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    embedding = embedding_matrix(config, step.weights)
    x = trace.gather(embedding, step.ids, axis=0)  # [tokens, hidden]
    rotation = rope_tables(config.rope, step.positions, config.head_size)

    for number in range(config.layers):
        with trace.scope(f"layers.{number}"):
            weights = step.weights.under(f"model.layers.{number}")
            normed = rms_norm(x, weights.under("input_layernorm"), config.epsilon)
            x = x + attention(config, step, number, weights.under("self_attn"), normed, rotation)
            normed = rms_norm(x, weights.under("post_attention_layernorm"), config.epsilon)
            x = x + mlp(config, weights.under("mlp"), normed)

    wanted = trace.gather(x, step.rows, axis=0)  # [rows, hidden]
    normed = rms_norm(wanted, step.weights.under("model.norm"), config.epsilon)
    head = embedding if config.tied else step.weights(
        "lm_head.weight", config.vocab_size, config.hidden_size
    )
    return {"logits": trace.matmul(normed, trace.transpose(head, (1, 0)), dtype=f32)}


def attention(
    config: LlamaConfig,
    step: Step,
    layer: int,
    weights: Weights,
    x: Tensor,
    rotation: tuple[Tensor, Tensor],
) -> Tensor:
    """Self-attention of x [tokens, hidden] over the layer's cache, which it extends."""
    hidden, size, bias = config.hidden_size, config.head_size, config.attention_bias

    def project(name: str, heads: int) -> Tensor:
        projected = linear(x, weights.under(name), hidden, heads * size, bias)
        return split_heads(projected, heads, size)  # [tokens, heads, size]

    q = trace.rope(project("q_proj", config.heads), *rotation, interleaved=False)
    k = trace.rope(project("k_proj", config.kv_heads), *rotation, interleaved=False)
    v = project("v_proj", config.kv_heads)
    k_cache = append(config, step, f"layers.{layer}.k", k)
    v_cache = append(config, step, f"layers.{layer}.v", v)
    attended = trace.paged_attention(
        q, k_cache, v_cache, step.page_table, step.sequence, step.positions, step.offsets,
        scale=size**-0.5,
    )
    return linear(merge_heads(attended), weights.under("o_proj"), config.heads * size, hidden, bias)


def append(config: LlamaConfig, step: Step, name: str, values: Tensor) -> Tensor:
    """The paged cache `name` after `values` [tokens, kv_heads, size] are written into it."""
    shape = (POOL_PAGES, PAGE, config.kv_heads, config.head_size)
    cache = trace.state(name, step.dtype, shape, kind="paged", group="full")
    grown = trace.cache_append(cache, values, step.page_table, step.sequence, step.positions)
    trace.update(cache, grown)
    return grown


def mlp(config: LlamaConfig, weights: Weights, x: Tensor) -> Tensor:
    """down(activation(gate(x)) * up(x)) of x [tokens, hidden]."""
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    gate = linear(x, weights.under("gate_proj"), hidden, inner, bias)
    up = linear(x, weights.under("up_proj"), hidden, inner, bias)
    return linear(config.activation(gate) * up, weights.under("down_proj"), inner, hidden, bias)


def embedding_matrix(config: LlamaConfig, weights: Weights) -> Tensor:
    """[vocab_size, hidden]; a tied matrix may be stored under either of its names."""
    name = "model.embed_tokens.weight"
    if config.tied and not weights.has(name):
        name = "lm_head.weight"
    return weights(name, config.vocab_size, config.hidden_size)
