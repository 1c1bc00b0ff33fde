"""Qwen 1.5 and 2 with a mixture of experts, beside which one expert works for every token.

Read `qwen` and `qwen3_moe` first.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.models.common import ACTIVATIONS, Step, Weights, linear, module, rms_norm, rope_tables
from llmc.models.config import ConfigFile, read_layer_windows, read_window
from llmc.models.decoder import embedding_matrix, gated_mlp, head, read_sizes, wanted_rows
from llmc.models.experts import Experts
from llmc.models.qwen import QwenConfig, attention
from llmc.models.qwen3_moe import read_dense_layers, read_experts


@dataclass(frozen=True)
class Qwen2MoeConfig(QwenConfig):
    experts: Experts
    shared_inner: int  # of the expert that every token uses
    dense: frozenset[int]  # layers whose MLP is an ordinary one

    @classmethod
    def read(cls, config: ConfigFile) -> Qwen2MoeConfig:
        """Checked values of a config.json. ModelError names file and key."""
        sizes = read_sizes(config)
        layers = sizes["layers"]
        window = read_window(config, 4096) if config.flag("use_sliding_window", False) else 0
        first_full = config.integer("max_window_layers", 28)
        windowed = [layer % 2 == 0 and layer < first_full for layer in range(layers)]
        return cls(
            **sizes,
            epsilon=config.positive("rms_norm_eps", 1e-6),
            activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
            tied=config.flag("tie_word_embeddings", False),
            qkv_bias=config.flag("qkv_bias", True),
            output_bias=False,
            head_norms=False,
            windows=read_layer_windows(config, layers, window, windowed),
            experts=read_experts(config, count=60, chosen=4, inner=1408),
            shared_inner=config.size("shared_expert_intermediate_size", 5632),
            dense=read_dense_layers(config, layers),
        )


def qwen2_moe(config: Qwen2MoeConfig, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    x = trace.gather(embedding_matrix(config, step.weights), step.ids, axis=0)  # [tokens, hidden]
    rotation = rope_tables(config.rope, step.positions, config.head_size)

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            normed = rms_norm(x, weights.under("input_layernorm"), config.epsilon)
            x = x + attention(config, step, layer, weights.under("self_attn"), normed, rotation)
            normed = rms_norm(x, weights.under("post_attention_layernorm"), config.epsilon)
            if layer in config.dense:
                x = x + gated_mlp(config, weights.under("mlp"), normed)
            else:
                x = x + (config.experts(weights.under("mlp"), normed)
                         + shared_expert(config, weights.under("mlp"), normed))

    normed = rms_norm(wanted_rows(step, x), step.weights.under("model.norm"), config.epsilon)
    return {"logits": head(config, step, normed)}


@module
def shared_expert(config: Qwen2MoeConfig, weights: Weights, x: Tensor) -> Tensor:
    """What every token uses, times a gate of its own: [tokens, hidden] of x [tokens, hidden]."""
    gate = linear(x, weights.under("shared_expert_gate"), config.hidden_size, 1)
    y = gated_mlp(config, weights.under("shared_expert"), x, inner=config.shared_inner)
    return trace.sigmoid(gate) * y
