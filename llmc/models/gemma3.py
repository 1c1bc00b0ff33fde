"""Gemma 3 text models: windowed layers and full ones in turn, each kind with its own rope base."""

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
from llmc.models.gemma2 import read_cap, soft_cap
from llmc.models.rope import Rope, read_scaling


@dataclass(frozen=True)
class Gemma3Config(DecoderConfig):
    """`rope` is that of the full layers, `local_rope` that of the windowed ones."""

    local_rope: Rope
    attention_bias: bool
    scale: float  # of the scores
    final_cap: float  # 0: none
    windows: tuple[int, ...]  # of each layer; 0 sees everything

    @classmethod
    def read(cls, config: ConfigFile) -> Gemma3Config:
        """Checked values of a config.json. ModelError names file and key."""
        refuse_bidirectional(config)
        if config.has("attn_logit_softcapping"):
            raise config.error("attn_logit_softcapping", "is set, which is not supported")
        sizes = read_sizes(config, read_layer_rope(config, "full_attention"))
        period = config.size("sliding_window_pattern", 6)
        windowed = [(layer + 1) % period != 0 for layer in range(sizes["layers"])]
        return cls(
            **sizes,
            epsilon=config.positive("rms_norm_eps", 1e-6),
            activation=config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
            tied=config.flag("tie_word_embeddings", True),
            local_rope=read_layer_rope(config, "sliding_attention"),
            attention_bias=config.flag("attention_bias", False),
            scale=config.positive("query_pre_attn_scalar", 256) ** -0.5,
            final_cap=read_cap(config, "final_logit_softcapping", 0.0),
            windows=read_layer_windows(
                config, sizes["layers"], read_window(config, 4096), windowed
            ),
        )


def read_layer_rope(config: ConfigFile, kind: str) -> Rope:
    """The rope of the layers of one kind; in the older layout only full ones are scaled."""
    full = kind == "full_attention"
    parameters, scaling = config.section("rope_parameters"), None
    if parameters is not None:
        scaling = parameters.section(kind)
    elif full:
        scaling = config.section("rope_scaling")
    if scaling is not None and scaling.has("rope_theta"):
        theta = scaling.positive("rope_theta")
    elif full:
        theta = config.positive("rope_theta", 1e6)
    else:
        theta = config.positive("rope_local_base_freq", 1e4)
    return read_scaling(scaling, theta, config.size("max_position_embeddings"))


def gemma3(config: Gemma3Config, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    x = embed(config, step)
    full = rope_tables(config.rope, step.positions, config.head_size)
    local = rope_tables(config.local_rope, step.positions, config.head_size)

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            rotation = local if config.windows[layer] else full
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
    config: Gemma3Config, step: Step, layer: int, weights: Weights, x: Tensor, rotation: Rotation
) -> Tensor:
    """Self-attention of x [tokens, hidden] over the layer's cache, which it extends."""
    q, k, v = project_heads(config, weights, x, config.attention_bias)
    q = norm(q, weights.under("q_norm"), config.epsilon)
    k = norm(k, weights.under("k_norm"), config.epsilon)
    q, k = rotate(q, k, rotation)
    attended = attend(step, layer, q, k, v, scale=config.scale, window=config.windows[layer])
    output = weights.under("o_proj")
    return linear(attended, output, attended.shape[-1], config.hidden_size, config.attention_bias)
