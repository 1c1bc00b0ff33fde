"""Qwen 3 with a mixture of experts for the MLP of most layers. Read `qwen` first."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.models.common import ACTIVATIONS, Step, rms_norm, rope_tables
from llmc.models.config import ConfigFile, read_window
from llmc.models.decoder import embedding_matrix, gated_mlp, head, read_sizes, wanted_rows
from llmc.models.experts import EXPERT_ACTIVATIONS, Experts, count_chosen
from llmc.models.qwen import QwenConfig, attention


@dataclass(frozen=True)
class Qwen3MoeConfig(QwenConfig):
    experts: Experts
    dense: frozenset[int]  # layers whose MLP is an ordinary one

    @classmethod
    def read(cls, config: ConfigFile) -> Qwen3MoeConfig:
        """Checked values of a config.json. ModelError names file and key."""
        sizes = read_sizes(config)
        bias = config.flag("attention_bias", False)
        window = read_window(config, 4096) if config.flag("use_sliding_window", False) else 0
        return cls(
            **sizes,
            epsilon=config.positive("rms_norm_eps", 1e-6),
            activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
            tied=config.flag("tie_word_embeddings", False),
            qkv_bias=bias,
            output_bias=bias,
            head_norms=True,
            windows=(window,) * sizes["layers"],
            experts=read_experts(config, count=128, chosen=8, inner=768),
            dense=read_dense_layers(config, sizes["layers"]),
        )


def read_experts(config: ConfigFile, *, count: int, chosen: int, inner: int) -> Experts:
    """The mixture, and what is meant where keys are missing; transformers 5 writes the number of
    experts under another key."""
    key = "num_experts" if config.has("num_experts") else "num_local_experts"
    count = config.size(key, count)
    return Experts(
        count,
        count_chosen(config, count, chosen),
        config.size("moe_intermediate_size", inner),
        normalised=config.flag("norm_topk_prob", False),
        activation=config.choice("hidden_act", EXPERT_ACTIVATIONS, "silu"),
        names=("gate_proj", "up_proj", "down_proj"),
    )


def read_dense_layers(config: ConfigFile, layers: int) -> frozenset[int]:
    """`mlp_only_layers`, and those that `decoder_sparse_step` leaves out."""
    period = config.size("decoder_sparse_step", 1)
    listed = config.values.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(each) is int for each in listed):
        raise config.error("mlp_only_layers", f"is {listed!r}; expected numbers of layers")
    left_out = {layer for layer in range(layers) if (layer + 1) % period}
    return frozenset(left_out.union(listed))


def qwen3_moe(config: Qwen3MoeConfig, step: Step) -> dict[str, Tensor]:
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
                x = x + config.experts(weights.under("mlp"), normed)

    normed = rms_norm(wanted_rows(step, x), step.weights.under("model.norm"), config.epsilon)
    return {"logits": head(config, step, normed)}
