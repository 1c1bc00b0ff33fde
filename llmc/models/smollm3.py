"""SmolLM 3: Llama in which some layers, every fourth, have no rope. Read `llama` first."""

from __future__ import annotations

from dataclasses import dataclass

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
class SmolLM3Config(DecoderConfig):
    attention_bias: bool
    mlp_bias: bool
    with_rope: tuple[bool, ...]  # of each layer
    windows: tuple[int, ...]  # of each layer; 0 sees everything

    @classmethod
    def read(cls, config: ConfigFile) -> SmolLM3Config:
        """Checked values of a config.json. ModelError names file and key."""
        sizes = read_sizes(config)
        layers = sizes["layers"]
        with_rope = read_layers_with_rope(config, layers)
        window = read_window(config) if config.flag("use_sliding_window", False) else 0
        windowed = [not each for each in with_rope]
        return cls(
            **sizes,
            epsilon=config.positive("rms_norm_eps", 1e-6),
            activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
            tied=config.flag("tie_word_embeddings", True),
            attention_bias=config.flag("attention_bias", False),
            mlp_bias=config.flag("mlp_bias", False),
            with_rope=with_rope,
            windows=read_layer_windows(config, layers, window, windowed),
        )


def read_layers_with_rope(config: ConfigFile, layers: int) -> tuple[bool, ...]:
    """`no_rope_layers`, where 1 means, despite its name, that the layer has rope."""
    interval = config.size("no_rope_layer_interval", 4)
    flags = config.values.get("no_rope_layers")
    if flags is None:
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(flags, list) or len(flags) != layers or not all(
            type(each) is int and each in (0, 1) for each in flags):
        raise config.error("no_rope_layers", f"is {flags!r}; expected {layers} of 0 and 1")
    return tuple(each == 1 for each in flags)


def smollm3(config: SmolLM3Config, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    x = trace.gather(embedding_matrix(config, step.weights), step.ids, axis=0)  # [tokens, hidden]
    rotation = rope_tables(config.rope, step.positions, config.head_size)

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            normed = rms_norm(x, weights.under("input_layernorm"), config.epsilon)
            x = x + attention(config, step, layer, weights.under("self_attn"), normed, rotation)
            normed = rms_norm(x, weights.under("post_attention_layernorm"), config.epsilon)
            x = x + gated_mlp(config, weights.under("mlp"), normed, config.mlp_bias)

    normed = rms_norm(wanted_rows(step, x), step.weights.under("model.norm"), config.epsilon)
    return {"logits": head(config, step, normed)}


@module
def attention(
    config: SmolLM3Config, step: Step, layer: int, weights: Weights, x: Tensor, rotation: Rotation
) -> Tensor:
    """Self-attention of x [tokens, hidden] over the layer's cache, which it extends."""
    q, k, v = project_heads(config, weights, x, config.attention_bias)
    if config.with_rope[layer]:
        q, k = rotate(q, k, rotation)
    attended = attend(step, layer, q, k, v, window=config.windows[layer])
    output = weights.under("o_proj")
    return linear(attended, output, attended.shape[-1], config.hidden_size, config.attention_bias)
