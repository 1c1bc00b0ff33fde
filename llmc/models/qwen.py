"""Qwen 2 and 3: biases on q, k and v in the one, RMSNorm of each head of q and k in the other.

Qwen 2, Qwen 2.5 and Qwen 3, which are not mixtures of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.models.common import ACTIVATIONS, Step, Weights, linear, module, rms_norm, rope_tables
from llmc.models.config import ConfigFile, read_layer_windows, read_window
from llmc.models.decoder import (
    DecoderConfig,
    Rotation,
    attend,
    embedding_matrix,
    gated_mlp,
    head,
    project_heads,
    read_sizes,
    rotate,
    wanted_rows,
)


@dataclass(frozen=True)
class QwenConfig(DecoderConfig):
    qkv_bias: bool
    output_bias: bool
    head_norms: bool
    windows: tuple[int, ...]  # of each layer; 0 sees everything

    @classmethod
    def read_qwen2(cls, config: ConfigFile) -> QwenConfig:
        """Checked values of a Qwen 2 config.json. ModelError names file and key."""
        return cls(**read_values(config), qkv_bias=True, output_bias=False, head_norms=False)

    @classmethod
    def read_qwen3(cls, config: ConfigFile) -> QwenConfig:
        """Checked values of a Qwen 3 config.json. ModelError names file and key."""
        bias = config.flag("attention_bias", False)
        return cls(**read_values(config), qkv_bias=bias, output_bias=bias, head_norms=True)


def read_values(config: ConfigFile) -> dict[str, Any]:
    """What the configs of both have."""
    sizes = read_sizes(config)
    layers = sizes["layers"]
    window = read_window(config, 4096) if config.flag("use_sliding_window", False) else 0
    full_layers = config.integer("max_window_layers", 28)
    windowed = [layer >= full_layers for layer in range(layers)]
    return sizes | {
        "epsilon": config.positive("rms_norm_eps", 1e-6),
        "activation": config.choice("hidden_act", ACTIVATIONS, "silu"),
        "tied": config.flag("tie_word_embeddings", False),
        "windows": read_layer_windows(config, layers, window, windowed),
    }


def qwen(config: QwenConfig, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    x = trace.gather(embedding_matrix(config, step.weights), step.ids, axis=0)  # [tokens, hidden]
    rotation = rope_tables(config.rope, step.positions, config.head_size)

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            normed = rms_norm(x, weights.under("input_layernorm"), config.epsilon)
            x = x + attention(config, step, layer, weights.under("self_attn"), normed, rotation)
            normed = rms_norm(x, weights.under("post_attention_layernorm"), config.epsilon)
            x = x + gated_mlp(config, weights.under("mlp"), normed)

    normed = rms_norm(wanted_rows(step, x), step.weights.under("model.norm"), config.epsilon)
    return {"logits": head(config, step, normed)}


@module
def attention(
    config: QwenConfig, step: Step, layer: int, weights: Weights, x: Tensor, rotation: Rotation
) -> Tensor:
    """Self-attention of x [tokens, hidden] over the layer's cache, which it extends."""
    q, k, v = project_heads(config, weights, x, config.qkv_bias)
    if config.head_norms:
        q = rms_norm(q, weights.under("q_norm"), config.epsilon)
        k = rms_norm(k, weights.under("k_norm"), config.epsilon)
    q, k = rotate(q, k, rotation)
    attended = attend(step, layer, q, k, v, window=config.windows[layer])
    output = weights.under("o_proj")
    return linear(attended, output, attended.shape[-1], config.hidden_size, config.output_bias)
