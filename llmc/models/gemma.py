"""Gemma: norms that scale by 1 + weight, embeddings times sqrt(hidden), tanh-gelu.

`gemma2.py` and `gemma3.py` share the norm and the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dtypes import f32
from llmc.models.common import ACTIVATIONS, Step, Weights, gelu_tanh, module, rope_tables
from llmc.models.config import ConfigFile
from llmc.models.decoder import (
    DecoderConfig,
    attention,
    embedding_matrix,
    gated_mlp,
    head,
    read_sizes,
    wanted_rows,
)


@dataclass(frozen=True)
class GemmaConfig(DecoderConfig):
    attention_bias: bool

    @classmethod
    def read(cls, config: ConfigFile) -> GemmaConfig:
        """Checked values of a config.json. ModelError names file and key."""
        refuse_bidirectional(config)
        return cls(
            **read_sizes(config),
            epsilon=config.positive("rms_norm_eps", 1e-6),
            # The first checkpoints say "gelu" and mean this approximation.
            activation=config.choice("hidden_act", ACTIVATIONS | {"gelu": gelu_tanh}, "gelu"),
            tied=config.flag("tie_word_embeddings", True),
            attention_bias=config.flag("attention_bias", False),
        )


def refuse_bidirectional(config: ConfigFile) -> None:
    if config.flag("use_bidirectional_attention", False):
        raise config.error("use_bidirectional_attention", "is true, which is not supported")


def gemma(config: GemmaConfig, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    x = embed(config, step)
    rotation = rope_tables(config.rope, step.positions, config.head_size)

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            normed = norm(x, weights.under("input_layernorm"), config.epsilon)
            x = x + attention(config, step, layer, weights.under("self_attn"), normed, rotation,
                              bias=config.attention_bias)
            normed = norm(x, weights.under("post_attention_layernorm"), config.epsilon)
            x = x + gated_mlp(config, weights.under("mlp"), normed)

    normed = norm(wanted_rows(step, x), step.weights.under("model.norm"), config.epsilon)
    return {"logits": head(config, step, normed)}


def embed(config: DecoderConfig, step: Step) -> Tensor:
    """[tokens, hidden]: each token's vector times sqrt(hidden), rounded to the compute dtype."""
    x = trace.gather(embedding_matrix(config, step.weights), step.ids, axis=0)
    return x * config.hidden_size**0.5


@module
def norm(x: Tensor, weights: Weights, epsilon: float) -> Tensor:
    """RMSNorm of the last axis with the scale 1 + weight, which is added in f32."""
    scale = trace.cast(weights("weight", x.shape[-1]), f32) + 1.0
    return trace.rms_norm(x, scale, epsilon=epsilon)
