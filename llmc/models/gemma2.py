"""Gemma 2: norms before and after each sublayer, soft caps, windows on alternate layers."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.models.common import ACTIVATIONS, Step, Weights, linear, module, rope_tables
from llmc.models.config import ConfigFile, read_layer_windows, read_window
from llmc.models.decoder import (
    DecoderConfig,
    Rotation,
    attend,
    gated_mlp,
    head,
    project_heads,
    read_sizes,
    rotate,
    wanted_rows,
)
from llmc.models.gemma import embed, norm, refuse_bidirectional


@dataclass(frozen=True)
class Gemma2Config(DecoderConfig):
    attention_bias: bool
    scale: float  # of the scores
    attention_cap: float  # 0: none
    final_cap: float
    windows: tuple[int, ...]  # of each layer; 0 sees everything

    @classmethod
    def read(cls, config: ConfigFile) -> Gemma2Config:
        """Checked values of a config.json. ModelError names file and key."""
        refuse_bidirectional(config)
        sizes = read_sizes(config)
        windowed = [layer % 2 == 0 for layer in range(sizes["layers"])]
        return cls(
            **sizes,
            epsilon=config.positive("rms_norm_eps", 1e-6),
            activation=config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
            tied=config.flag("tie_word_embeddings", True),
            attention_bias=config.flag("attention_bias", False),
            scale=config.positive("query_pre_attn_scalar", 256) ** -0.5,
            attention_cap=read_cap(config, "attn_logit_softcapping", 50.0),
            final_cap=read_cap(config, "final_logit_softcapping", 30.0),
            windows=read_layer_windows(
                config, sizes["layers"], read_window(config, 4096), windowed
            ),
        )


def read_cap(config: ConfigFile, key: str, default: float) -> float:
    """A number above 0; 0.0 for none, which null means; `default` where the key is missing."""
    if config.has(key):
        return config.positive(key)
    return 0.0 if key in config.values else default


def gemma2(config: Gemma2Config, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    x = embed(config, step)
    rotation = rope_tables(config.rope, step.positions, config.head_size)

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            normed = norm(x, weights.under("input_layernorm"), config.epsilon)
            y = attention(config, step, layer, weights.under("self_attn"), normed, rotation)
            x = x + norm(y, weights.under("post_attention_layernorm"), config.epsilon)
            normed = norm(x, weights.under("pre_feedforward_layernorm"), config.epsilon)
            y = gated_mlp(config, weights.under("mlp"), normed)
            x = x + norm(y, weights.under("post_feedforward_layernorm"), config.epsilon)

    normed = norm(wanted_rows(step, x), step.weights.under("model.norm"), config.epsilon)
    return {"logits": soft_cap(head(config, step, normed), config.final_cap)}


@module
def attention(
    config: Gemma2Config, step: Step, layer: int, weights: Weights, x: Tensor, rotation: Rotation
) -> Tensor:
    """Self-attention of x [tokens, hidden] over the layer's cache, which it extends."""
    q, k, v = project_heads(config, weights, x, config.attention_bias)
    q, k = rotate(q, k, rotation)
    attended = attend(
        step, layer, q, k, v,
        scale=config.scale, window=config.windows[layer], softcap=config.attention_cap,
    )
    output = weights.under("o_proj")
    return linear(attended, output, attended.shape[-1], config.hidden_size, config.attention_bias)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """tanh(x / cap) * cap; x itself where the cap is 0."""
    return trace.tanh(x / cap) * cap if cap else x
