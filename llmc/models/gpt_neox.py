"""GPT-NeoX and Pythia: parallel residual, rope on part of each head, q, k and v fused by head."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dtypes import f32
from llmc.models.common import ACTIVATIONS, Step, Weights, layer_norm, linear, module, rope_tables
from llmc.models.config import ConfigFile
from llmc.models.decoder import (
    DecoderConfig,
    Rotation,
    attend,
    read_sizes,
    rotate,
    wanted_rows,
)
from llmc.models.rope import read_rope


@dataclass(frozen=True)
class GPTNeoXConfig(DecoderConfig):
    attention_bias: bool
    parallel: bool  # attention and MLP both see x, else the MLP sees x + attention

    @classmethod
    def read(cls, config: ConfigFile) -> GPTNeoXConfig:
        """Checked values of a config.json. ModelError names file and key."""
        max_context = config.size("max_position_embeddings")
        rope = read_rope(config, max_context, "rotary_emb_base", "rotary_pct", 0.25)
        return cls(
            **read_sizes(config, rope),
            epsilon=config.positive("layer_norm_eps", 1e-5),
            activation=config.choice("hidden_act", ACTIVATIONS, "gelu"),
            tied=config.flag("tie_word_embeddings", False),
            attention_bias=config.flag("attention_bias", True),
            parallel=config.flag("use_parallel_residual", True),
        )


def gpt_neox(config: GPTNeoXConfig, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    weights, shape = step.weights.under("gpt_neox"), (config.vocab_size, config.hidden_size)
    embedding = weights("embed_in.weight", *shape)
    x = trace.gather(embedding, step.ids, axis=0)
    rotation = rope_tables(config.rope, step.positions, config.head_size)

    for layer in range(config.layers):
        with trace.scope(f"gpt_neox.layers.{layer}"):
            block = weights.under(f"layers.{layer}")
            normed = layer_norm(x, block.under("input_layernorm"), config.epsilon)
            attended = attention(config, step, layer, block.under("attention"), normed, rotation)
            seen = x if config.parallel else attended + x
            normed = layer_norm(seen, block.under("post_attention_layernorm"), config.epsilon)
            inner = mlp(config, block.under("mlp"), normed)
            x = inner + attended + x if config.parallel else inner + seen

    last = weights.under("final_layer_norm")
    normed = layer_norm(wanted_rows(step, x), last, config.epsilon)
    matrix = embedding if config.tied else step.weights("embed_out.weight", *shape)
    return {"logits": trace.matmul(normed, trace.transpose(matrix, (1, 0)), dtype=f32)}


@module
def attention(
    config: GPTNeoXConfig, step: Step, layer: int, weights: Weights, x: Tensor, rotation: Rotation
) -> Tensor:
    """Self-attention of x [tokens, hidden] over the layer's cache, which it extends."""
    hidden, bias = config.hidden_size, config.attention_bias
    fused = linear(x, weights.under("query_key_value"), hidden, 3 * hidden, bias)
    by_head = trace.reshape(fused, (x.shape[0], config.heads, 3 * config.head_size))
    size = config.head_size
    q, k, v = (by_head[:, :, part * size : (part + 1) * size] for part in range(3))
    q, k = rotate(q, k, rotation)
    attended = attend(step, layer, q, k, v)
    return linear(attended, weights.under("dense"), hidden, hidden, bias)


@module
def mlp(config: GPTNeoXConfig, weights: Weights, x: Tensor) -> Tensor:
    """Two layers with biases and an activation between them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    wide = linear(x, weights.under("dense_h_to_4h"), hidden, inner, bias=True)
    return linear(config.activation(wide), weights.under("dense_4h_to_h"), inner, hidden, bias=True)
