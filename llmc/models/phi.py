"""Phi 1 to 2: one LayerNorm, attention and MLP side by side, rope on part of each head, biases."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dtypes import f32
from llmc.models.common import ACTIVATIONS, Step, Weights, layer_norm, linear, module, rope_tables
from llmc.models.config import ConfigFile
from llmc.models.decoder import (
    DecoderConfig,
    attention,
    embedding_matrix,
    head,
    read_sizes,
    wanted_rows,
)
from llmc.models.rope import read_rope


@dataclass(frozen=True)
class PhiConfig(DecoderConfig):
    @classmethod
    def read(cls, config: ConfigFile) -> PhiConfig:
        """Checked values of a config.json. ModelError names file and key."""
        if config.flag("qk_layernorm", False):
            raise config.error("qk_layernorm", "is true, which is not supported")
        rope = read_rope(config, config.size("max_position_embeddings"), default_part=0.5)
        return cls(
            **read_sizes(config, rope),
            epsilon=config.positive("layer_norm_eps", 1e-5),
            activation=config.choice("hidden_act", ACTIVATIONS, "gelu_new"),
            tied=config.flag("tie_word_embeddings", False),
        )


def phi(config: PhiConfig, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    x = trace.gather(embedding_matrix(config, step.weights), step.ids, axis=0)  # [tokens, hidden]
    rotation = rope_tables(config.rope, step.positions, config.head_size)

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            normed = layer_norm(x, weights.under("input_layernorm"), config.epsilon)
            attended = attention(config, step, layer, weights.under("self_attn"), normed, rotation,
                                 bias=True, output="dense")
            x = attended + mlp(config, weights.under("mlp"), normed) + x

    last = step.weights.under("model.final_layernorm")
    normed = layer_norm(wanted_rows(step, x), last, config.epsilon)
    bias = step.weights("lm_head.bias", config.vocab_size)
    return {"logits": head(config, step, normed) + trace.cast(bias, f32)}


@module
def mlp(config: PhiConfig, weights: Weights, x: Tensor) -> Tensor:
    """Two layers with an activation between them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    wide = linear(x, weights.under("fc1"), hidden, inner, bias=True)
    return linear(config.activation(wide), weights.under("fc2"), inner, hidden, bias=True)
