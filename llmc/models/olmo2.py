"""OLMo 2: norms after the sublayers instead of before, RMSNorm over all of q and all of k."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.models.common import (
    ACTIVATIONS,
    Step,
    Weights,
    linear,
    module,
    rms_norm,
    rope_tables,
    split_heads,
)
from llmc.models.config import ConfigFile
from llmc.models.decoder import (
    DecoderConfig,
    Rotation,
    attend,
    embedding_matrix,
    gated_mlp,
    head,
    read_sizes,
    rotate,
    wanted_rows,
)


@dataclass(frozen=True)
class Olmo2Config(DecoderConfig):
    attention_bias: bool

    @classmethod
    def read(cls, config: ConfigFile) -> Olmo2Config:
        """Checked values of a config.json. ModelError names file and key."""
        return cls(
            **read_sizes(config),
            epsilon=config.positive("rms_norm_eps", 1e-5),
            activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
            tied=config.flag("tie_word_embeddings", False),
            attention_bias=config.flag("attention_bias", False),
        )


def olmo2(config: Olmo2Config, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    x = trace.gather(embedding_matrix(config, step.weights), step.ids, axis=0)  # [tokens, hidden]
    rotation = rope_tables(config.rope, step.positions, config.head_size)

    for layer in range(config.layers):
        with trace.scope(f"model.layers.{layer}"):
            weights = step.weights.under(f"model.layers.{layer}")
            attended = attention(config, step, layer, weights.under("self_attn"), x, rotation)
            x = x + rms_norm(attended, weights.under("post_attention_layernorm"), config.epsilon)
            inner = gated_mlp(config, weights.under("mlp"), x)
            x = x + rms_norm(inner, weights.under("post_feedforward_layernorm"), config.epsilon)

    normed = rms_norm(wanted_rows(step, x), step.weights.under("model.norm"), config.epsilon)
    return {"logits": head(config, step, normed)}


@module
def attention(
    config: Olmo2Config, step: Step, layer: int, weights: Weights, x: Tensor, rotation: Rotation
) -> Tensor:
    """Self-attention of x [tokens, hidden] over the layer's cache, which it extends."""
    hidden, size, bias = config.hidden_size, config.head_size, config.attention_bias
    q = linear(x, weights.under("q_proj"), hidden, config.heads * size, bias)
    k = linear(x, weights.under("k_proj"), hidden, config.kv_heads * size, bias)
    v = linear(x, weights.under("v_proj"), hidden, config.kv_heads * size, bias)
    q = split_heads(rms_norm(q, weights.under("q_norm"), config.epsilon), config.heads, size)
    k = split_heads(rms_norm(k, weights.under("k_norm"), config.epsilon), config.kv_heads, size)
    q, k = rotate(q, k, rotation)
    attended = attend(step, layer, q, k, split_heads(v, config.kv_heads, size))
    return linear(attended, weights.under("o_proj"), config.heads * size, hidden, bias)
