"""Mistral: Llama with a sliding window, in its first versions. Read `llama` first."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.models.common import ACTIVATIONS, Step, rms_norm, rope_tables
from llmc.models.config import ConfigFile, read_window
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
class MistralConfig(DecoderConfig):
    window: int

    @classmethod
    def read(cls, config: ConfigFile) -> MistralConfig:
        """Checked values of a config.json. ModelError names file and key."""
        return cls(
            **read_sizes(config),
            epsilon=config.positive("rms_norm_eps", 1e-6),
            activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
            tied=config.flag("tie_word_embeddings", False),
            window=read_window(config, 4096),
        )


def mistral(config: MistralConfig, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    x = trace.gather(embedding_matrix(config, step.weights), step.ids, axis=0)  # [tokens, hidden]
    rotation = rope_tables(config.rope, step.positions, config.head_size)

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            normed = rms_norm(x, weights.under("input_layernorm"), config.epsilon)
            x = x + attention(config, step, layer, weights.under("self_attn"), normed, rotation,
                              window=config.window)
            normed = rms_norm(x, weights.under("post_attention_layernorm"), config.epsilon)
            x = x + gated_mlp(config, weights.under("mlp"), normed)

    normed = rms_norm(wanted_rows(step, x), step.weights.under("model.norm"), config.epsilon)
    return {"logits": head(config, step, normed)}
