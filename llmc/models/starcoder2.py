"""StarCoder 2: LayerNorm, biases everywhere, an MLP without gate, a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.models.common import ACTIVATIONS, Step, Weights, layer_norm, linear, module, rope_tables
from llmc.models.config import ConfigFile, read_window
from llmc.models.decoder import (
    DecoderConfig,
    attention,
    embedding_matrix,
    head,
    read_sizes,
    wanted_rows,
)


@dataclass(frozen=True)
class Starcoder2Config(DecoderConfig):
    bias: bool
    window: int  # 0 sees everything

    @classmethod
    def read(cls, config: ConfigFile) -> Starcoder2Config:
        """Checked values of a config.json. ModelError names file and key."""
        return cls(
            **read_sizes(config),
            epsilon=config.positive("norm_epsilon", 1e-5),
            activation=config.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
            tied=config.flag("tie_word_embeddings", True),
            bias=config.flag("use_bias", True),
            window=read_window(config),
        )


def starcoder2(config: Starcoder2Config, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    x = trace.gather(embedding_matrix(config, step.weights), step.ids, axis=0)  # [tokens, hidden]
    rotation = rope_tables(config.rope, step.positions, config.head_size)

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            normed = layer_norm(x, weights.under("input_layernorm"), config.epsilon)
            x = x + attention(config, step, layer, weights.under("self_attn"), normed, rotation,
                              bias=config.bias, window=config.window)
            normed = layer_norm(x, weights.under("post_attention_layernorm"), config.epsilon)
            x = x + mlp(config, weights.under("mlp"), normed)

    normed = layer_norm(wanted_rows(step, x), step.weights.under("model.norm"), config.epsilon)
    return {"logits": head(config, step, normed)}


@module
def mlp(config: Starcoder2Config, weights: Weights, x: Tensor) -> Tensor:
    """Two layers with an activation between them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    wide = linear(x, weights.under("c_fc"), hidden, inner, config.bias)
    return linear(config.activation(wide), weights.under("c_proj"), inner, hidden, config.bias)
