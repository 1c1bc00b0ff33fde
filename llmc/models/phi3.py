"""Phi-3, 3.5 and 4: Llama with fused projections and, for long contexts, longrope.

With longrope a sequence that reaches past the original context is turned by other frequencies,
from its first token on. A step chooses by the longest position of each sequence in it, so a
sequence must not grow past that point in a later step (`growth_limit`): its cache is turned by the
frequencies of the short ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.models.common import (
    ACTIVATIONS,
    Step,
    Weights,
    linear,
    module,
    rms_norm,
    rope_tables,
    split_heads,
)
from llmc.models.config import ConfigFile, read_window
from llmc.models.decoder import (
    DecoderConfig,
    Rotation,
    attend,
    embedding_matrix,
    head,
    read_sizes,
    rotate,
    wanted_rows,
)
from llmc.models.rope import Rope, read_part

ROPE_TYPES = {"default": False, "longrope": True, "su": True, "yarn": True}  # whether longrope


@dataclass(frozen=True)
class Phi3Config(DecoderConfig):
    """`rope` is that of sequences of up to `growth_limit` tokens, `long_rope` of longer ones."""

    long_rope: Rope | None
    window: int  # 0 sees everything

    @classmethod
    def read(cls, config: ConfigFile) -> Phi3Config:
        """Checked values of a config.json. ModelError names file and key."""
        short, long = read_ropes(config)
        sizes = read_sizes(config, short)
        for rope in (short, long):
            pairs = short.rotated(sizes["head_size"]) // 2
            if rope is not None and rope.divisors and len(rope.divisors) != pairs:
                raise config.error("rope_scaling", f"has {len(rope.divisors)} factors for {pairs}"
                                   " pairs of a head's elements")
        return cls(
            **sizes,
            growth_limit=short.original_context if long is not None else 0,
            epsilon=config.positive("rms_norm_eps", 1e-5),
            activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
            tied=config.flag("tie_word_embeddings", False),
            long_rope=long,
            window=read_window(config),
        )


def read_ropes(config: ConfigFile) -> tuple[Rope, Rope | None]:
    """The rope of short sequences, and with longrope that of long ones."""
    scaling = config.section("rope_parameters") or config.section("rope_scaling")
    section = scaling or config
    owner = section if section.has("rope_theta") else config
    plain = Rope(owner.positive("rope_theta", 10000.0))
    owner = section if section.has("partial_rotary_factor") else config
    plain = replace(plain, part=read_part(owner, "partial_rotary_factor", 1.0))
    if scaling is None:
        return plain, None
    type_key = "rope_type" if scaling.has("rope_type") else "type"
    if not scaling.choice(type_key, ROPE_TYPES, "default"):
        return plain, None
    owner = config if config.has("original_max_position_embeddings") else scaling
    original = owner.size("original_max_position_embeddings", 4096)
    amplitude = read_amplitude(scaling, config.size("max_position_embeddings"), original)
    plain = replace(plain, type="longrope", original_context=original, amplitude=amplitude)
    short = replace(plain, divisors=scaling.positives("short_factor"))
    return short, replace(plain, divisors=scaling.positives("long_factor"))


def read_amplitude(scaling: ConfigFile, longest: int, original: int) -> float:
    """`attention_factor`, or what the paper makes of the growth of the context."""
    if scaling.has("attention_factor"):
        return scaling.positive("attention_factor")
    factor = scaling.positive("factor", longest / original)
    if factor <= 1 or original == 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


def phi3(config: Phi3Config, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    x = trace.gather(embedding_matrix(config, step.weights), step.ids, axis=0)  # [tokens, hidden]
    rotation = rotation_tables(config, step)

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            normed = rms_norm(x, weights.under("input_layernorm"), config.epsilon)
            x = x + attention(config, step, layer, weights.under("self_attn"), normed, rotation)
            normed = rms_norm(x, weights.under("post_attention_layernorm"), config.epsilon)
            x = x + mlp(config, weights.under("mlp"), normed)

    normed = rms_norm(wanted_rows(step, x), step.weights.under("model.norm"), config.epsilon)
    return {"logits": head(config, step, normed)}


def rotation_tables(config: Phi3Config, step: Step) -> Rotation:
    """cos and sin of each token, by the frequencies for the length of its sequence."""
    short = rope_tables(config.rope, step.positions, config.head_size)
    if config.long_rope is None:
        return short
    long = rope_tables(config.long_rope, step.positions, config.head_size)
    last = trace.gather(step.positions, step.offsets[1:] - 1, axis=0)  # [sequences]
    reached = trace.gather(last, step.sequence, axis=0)  # [tokens]
    is_long = trace.reshape(reached >= config.growth_limit, (reached.shape[0], 1))
    cos, sin = (trace.where(is_long, a, b) for a, b in zip(long, short, strict=True))
    return cos, sin


@module
def attention(
    config: Phi3Config, step: Step, layer: int, weights: Weights, x: Tensor, rotation: Rotation
) -> Tensor:
    """Self-attention of x [tokens, hidden] over the layer's cache, which it extends."""
    hidden, size = config.hidden_size, config.head_size
    q_width, kv_width = config.heads * size, config.kv_heads * size
    fused = linear(x, weights.under("qkv_proj"), hidden, q_width + 2 * kv_width)
    q = split_heads(fused[:, :q_width], config.heads, size)
    k = split_heads(fused[:, q_width : q_width + kv_width], config.kv_heads, size)
    v = split_heads(fused[:, q_width + kv_width :], config.kv_heads, size)
    q, k = rotate(q, k, rotation)
    attended = attend(step, layer, q, k, v, window=config.window)
    return linear(attended, weights.under("o_proj"), q_width, hidden)


@module
def mlp(config: Phi3Config, weights: Weights, x: Tensor) -> Tensor:
    """down(activation(gate) * up), gate and up being halves of one product."""
    hidden, inner = config.hidden_size, config.intermediate_size
    fused = linear(x, weights.under("gate_up_proj"), hidden, 2 * inner)
    gate, up = fused[:, :inner], fused[:, inner:]
    return linear(config.activation(gate) * up, weights.under("down_proj"), inner, hidden)
