"""Zamba 2: Mamba-2 layers, before some of which a block of attention and MLP runs that several of
them share. What a shared block adapts to its place is of low rank. Read `mamba2` first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dtypes import f32
from llmc.models.common import ACTIVATIONS, Step, Weights, linear, module, rms_norm, rope_tables
from llmc.models.config import ConfigFile
from llmc.models.decoder import (
    DecoderConfig,
    Rotation,
    attend,
    embedding_matrix,
    head,
    rotate,
    split_heads,
    wanted_rows,
)
from llmc.models.rope import read_rope
from llmc.models.state_space import Mixer, mix, wide_norm

LAYER_TYPES = ("mamba", "linear_attention", "hybrid")
NORM_EPSILON = 1e-5  # of the mixer's gated norm
LONG_CONTEXT = 16384


@dataclass(frozen=True)
class Zamba2Config(DecoderConfig):
    """`hybrid`: numbers of the layers that a shared block comes before, in order; they take the
    `blocks` shared blocks in turn. `rank`: of the adapters."""

    mixer: Mixer
    hybrid: tuple[int, ...]
    blocks: int
    rank: int
    adapts_attention: bool
    rotates: bool
    bias: bool

    @classmethod
    def read(cls, config: ConfigFile) -> Zamba2Config:
        """Checked values of a config.json. ModelError names file and key."""
        hidden, layers = config.size("hidden_size", 2560), config.size("num_hidden_layers", 54)
        heads = config.size("num_attention_heads", 32)
        kv_heads = config.size("num_key_value_heads", heads)
        if 2 * hidden % heads or heads % kv_heads:
            raise config.error("num_attention_heads", f"is {heads}; it must divide {2 * hidden} and"
                               f" be a multiple of num_key_value_heads {kv_heads}")
        context = config.size("max_position_embeddings", 4096)
        if config.flag("use_long_context", False):
            context = LONG_CONTEXT
        bias = config.flag("add_bias_linear", False)
        return cls(
            vocab_size=config.size("vocab_size", 32000),
            hidden_size=hidden,
            layers=layers,
            max_context=context,
            intermediate_size=config.size("intermediate_size", 4 * hidden),
            heads=heads,
            kv_heads=kv_heads,
            head_size=2 * hidden // heads,
            rope=read_rope(config, context),
            epsilon=config.positive("rms_norm_eps", 1e-5),
            activation=config.choice("hidden_act", ACTIVATIONS, "gelu"),
            tied=config.flag("tie_word_embeddings", True),
            mixer=read_mixer(config, hidden, bias),
            hybrid=read_hybrid(config, layers),
            blocks=config.size("num_mem_blocks", 1),
            rank=config.size("adapter_rank", 128),
            adapts_attention=config.flag("use_shared_attention_adapter", False),
            rotates=config.flag("use_mem_rope", False),
            bias=bias,
        )


def read_mixer(config: ConfigFile, hidden: int, bias: bool) -> Mixer:
    """The mixer of a Zamba-2 config. The time step has a least value, and no greatest."""
    inner = config.multiple("mamba_expand", hidden, 2)
    heads, groups = config.size("n_mamba_heads", 8), config.size("mamba_ngroups", 1)
    if inner % heads or heads % groups:
        raise config.error("n_mamba_heads", f"is {heads}; it must divide {inner} and be a multiple"
                           f" of mamba_ngroups {groups}")
    return Mixer(
        inner=inner,
        heads=heads,
        groups=groups,
        state_size=config.size("mamba_d_state", 64),
        taps=config.integer("mamba_d_conv", 4, low=2),
        conv_bias=True,
        bias=bias,
        epsilon=NORM_EPSILON,
        least_step=config.positive("time_step_min", 0.001),
        most_step=math.inf,
    )


def read_hybrid(config: ConfigFile, layers: int) -> tuple[int, ...]:
    """Which layers have a block before them: `layers_block_type`, else that of Zamba2-2.7B."""
    types = config.strings("layers_block_type", LAYER_TYPES, layers)
    if types is not None:
        return tuple(number for number, each in enumerate(types) if each == "hybrid")
    if layers != 54:
        raise config.error("layers_block_type", "is missing")
    return (*range(6, 43, 6), 47, 51)


def zamba2(config: Zamba2Config, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    embedded = trace.gather(embedding_matrix(config, step.weights), step.ids, axis=0)
    rotation = rope_tables(config.rope, step.positions, config.head_size)
    # What layers add up stays in f32, as in Mamba-2: rounded to bf16, long sums drift.
    x = trace.cast(embedded, f32)  # [tokens, hidden]

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            y = x
            if layer in config.hybrid:
                narrow = trace.cast(x, step.dtype)
                shared = shared_block(config, step, layer, narrow, embedded, rotation)
                hidden = config.hidden_size
                shared = linear(shared, weights.under("linear"), hidden, hidden)
                y = x + trace.cast(shared, f32)
                weights = weights.under("mamba_decoder")
            normed = wide_norm(y, weights.under("input_layernorm"), config.epsilon, step)
            mixed = mix(config.mixer, step, layer, weights.under("mamba"), normed)
            x = x + trace.cast(mixed, f32)

    normed = wide_norm(wanted_rows(step, x), step.weights.under("model.final_layernorm"),
                       config.epsilon, step)
    return {"logits": head(config, step, normed)}


def shared_block(config: Zamba2Config, step: Step, layer: int, x: Tensor, embedded: Tensor,
                 rotation: Rotation) -> Tensor:
    """Attention and MLP over x beside the embedding, both [tokens, hidden]. The block's weights
    stand at the first layer that uses it."""
    place = config.hybrid.index(layer)
    owner = config.hybrid[place % config.blocks]
    weights = step.weights.under(f"model.layers.{owner}.shared_transformer")
    both = trace.concat([x, embedded], axis=1)
    normed = rms_norm(both, weights.under("input_layernorm"), config.epsilon)
    y = attention(config, step, layer, place, weights.under("self_attn"), normed, rotation)
    normed = rms_norm(y, weights.under("pre_ff_layernorm"), config.epsilon)
    return mlp(config, place, weights.under("feed_forward"), normed)


@module
def attention(config: Zamba2Config, step: Step, layer: int, place: int, weights: Weights,
              x: Tensor, rotation: Rotation) -> Tensor:
    """Self-attention of x [tokens, 2 * hidden] over the layer's cache, which it extends."""
    width, size = 2 * config.hidden_size, config.head_size

    def project(name: str, heads: int) -> Tensor:
        y = linear(x, weights.under(f"{name}_proj"), width, heads * size)
        if config.adapts_attention:
            adapters = weights.under(f"linear_{name}_adapter_list.{place}")
            y = y + adapt(adapters, x, config.rank, heads * size)
        return split_heads(y, heads, size)

    q, k, v = (project(name, heads) for name, heads in (
        ("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)))
    if config.rotates:
        q, k = rotate(q, k, rotation)
    attended = attend(step, layer, q, k, v, scale=(size / 2) ** -0.5)
    return linear(attended, weights.under("o_proj"), config.heads * size, config.hidden_size)


@module
def mlp(config: Zamba2Config, place: int, weights: Weights, x: Tensor) -> Tensor:
    """down(activation(gate(x)) * up(x)) of x [tokens, hidden]; an adapter adds to gate and up."""
    hidden, inner = config.hidden_size, config.intermediate_size
    both = linear(x, weights.under("gate_up_proj"), hidden, 2 * inner, config.bias)
    both = both + adapt(weights.under(f"gate_up_proj_adapter_list.{place}"), x, config.rank,
                        2 * inner)
    y = config.activation(both[:, :inner]) * both[:, inner:]
    return linear(y, weights.under("down_proj"), inner, hidden, config.bias)


def adapt(weights: Weights, x: Tensor, rank: int, width: int) -> Tensor:
    """[tokens, width] of x [tokens, inner], through `rank` elements."""
    narrow = linear(x, weights.under("0"), x.shape[-1], rank)
    return linear(narrow, weights.under("1"), rank, width)
