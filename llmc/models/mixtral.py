"""Mixtral: Mistral with a mixture of experts for its MLP. Read `mistral` first."""

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
    head,
    read_sizes,
    wanted_rows,
)
from llmc.models.experts import EXPERT_ACTIVATIONS, Experts, count_chosen


@dataclass(frozen=True)
class MixtralConfig(DecoderConfig):
    experts: Experts
    window: int  # 0 sees everything

    @classmethod
    def read(cls, config: ConfigFile) -> MixtralConfig:
        """Checked values of a config.json. ModelError names file and key."""
        sizes, count = read_sizes(config), config.size("num_local_experts", 8)
        return cls(
            **sizes,
            epsilon=config.positive("rms_norm_eps", 1e-5),
            activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
            tied=config.flag("tie_word_embeddings", False),
            experts=Experts(
                count,
                count_chosen(config, count, 2),
                sizes["intermediate_size"],
                normalised=True,
                activation=config.choice("hidden_act", EXPERT_ACTIVATIONS, "silu"),
                names=("w1", "w3", "w2"),
            ),
            window=read_window(config),
        )


def mixtral(config: MixtralConfig, step: Step) -> dict[str, Tensor]:
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
            x = x + config.experts(weights.under("block_sparse_moe"), normed)

    normed = rms_norm(wanted_rows(step, x), step.weights.under("model.norm"), config.epsilon)
    return {"logits": head(config, step, normed)}
