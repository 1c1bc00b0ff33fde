"""BERT encoders: learned positions, LayerNorm after each sublayer, attention both ways.

`bert` is `BertModel` (sentence embeddings, features), `bert_for_masked_lm` adds the masked-LM head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dtypes import f32
from llmc.models.common import (
    ACTIVATIONS,
    ModelConfig,
    Step,
    Weights,
    layer_norm,
    linear,
    merge_heads,
    module,
    split_heads,
)
from llmc.models.config import ConfigFile


@dataclass(frozen=True)
class BertConfig(ModelConfig):
    intermediate_size: int
    heads: int
    position_rows: int  # of the table of learned positions
    token_types: int
    epsilon: float
    activation: Callable[[Any], Any]
    tied: bool

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.heads

    @classmethod
    def read(cls, config: ConfigFile) -> BertConfig:
        """Checked values of a config.json. ModelError names file and key."""
        return cls(**read_values(config))


def read_values(config: ConfigFile) -> dict[str, Any]:
    """The fields of a BertConfig by name."""
    config.choice("position_embedding_type", {"absolute": True}, "absolute")
    if config.flag("is_decoder", False):
        raise config.error("is_decoder", "is true; only encoders are supported")
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if hidden % heads:
        raise config.error("num_attention_heads", f"is {heads}, no divisor of {hidden=}")
    positions = config.size("max_position_embeddings")
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden,
        "layers": config.size("num_hidden_layers"),
        "max_context": positions,
        "intermediate_size": config.size("intermediate_size"),
        "heads": heads,
        "position_rows": positions,
        "token_types": config.size("type_vocab_size", 2),
        "epsilon": config.positive("layer_norm_eps", 1e-12),
        "activation": config.choice("hidden_act", ACTIVATIONS, "gelu"),
        "tied": config.flag("tie_word_embeddings", True),
    }


def bert(config: BertConfig, step: Step) -> dict[str, Tensor]:
    """`last_hidden_state` f32[tokens, hidden]; where the checkpoint has a pooler also
    `pooler_output` f32[sequences, hidden], made of the tokens that `pooled` names."""
    weights = step.weights.under("bert")
    x = encode(config, step, weights, step.positions)
    return features(config, step, weights, x)


@module
def features(config: BertConfig, step: Step, weights: Weights, x: Tensor) -> dict[str, Tensor]:
    """The outputs of an encoder without a head; x [tokens, hidden] is its last hidden state."""
    outputs = {"last_hidden_state": trace.cast(x, f32)}
    pooler = weights.under("pooler.dense")
    if pooler.has("weight"):
        first = trace.gather(x, step.pooled, axis=0)  # [sequences, hidden]
        pooled = trace.tanh(linear(first, pooler, config.hidden_size, config.hidden_size, True))
        outputs["pooler_output"] = trace.cast(pooled, f32)
    return outputs


def bert_for_masked_lm(config: BertConfig, step: Step) -> dict[str, Tensor]:
    """`logits` f32[tokens, vocab_size] of every token."""
    hidden, head = config.hidden_size, step.weights.under("cls.predictions")
    weights = step.weights.under("bert")
    x = encode(config, step, weights, step.positions)
    x = config.activation(linear(x, head.under("transform.dense"), hidden, hidden, True))
    x = layer_norm(x, head.under("transform.LayerNorm"), config.epsilon)
    decoder = (
        word_embeddings(config, weights)
        if config.tied
        else head("decoder.weight", config.vocab_size, hidden)
    )
    bias = head("bias" if head.has("bias") else "decoder.bias", config.vocab_size)
    logits = trace.matmul(x, trace.transpose(decoder, (1, 0)), dtype=f32)
    return {"logits": logits + trace.cast(bias, f32)}


def encode(config: BertConfig, step: Step, weights: Weights, positions: Tensor) -> Tensor:
    """[tokens, hidden] after the embeddings and all layers; `positions` [tokens] are rows of the
    table of learned positions."""
    x = embed(config, step, weights, positions)
    for number in range(config.layers):
        with trace.scope(f"{weights.scope}encoder.layer.{number}"):
            layer = weights.under(f"encoder.layer.{number}")
            attended = attention(config, step, layer.under("attention.self"), x)
            x = add_and_norm(config, layer.under("attention.output"), x, attended)
            widen = layer.under("intermediate.dense")
            inner = linear(x, widen, config.hidden_size, config.intermediate_size, True)
            x = add_and_norm(config, layer.under("output"), x, config.activation(inner))
    return x


@module
def embed(config: BertConfig, step: Step, weights: Weights, positions: Tensor) -> Tensor:
    """Word, position and token type vectors added up and normed."""
    hidden, tables = config.hidden_size, weights.under("embeddings")
    rows = tables("position_embeddings.weight", config.position_rows, hidden)
    types = tables("token_type_embeddings.weight", config.token_types, hidden)
    x = trace.gather(word_embeddings(config, weights), step.ids, axis=0)
    x = x + trace.gather(types, step.token_types, axis=0)
    x = x + trace.gather(rows, positions, axis=0)
    return layer_norm(x, tables.under("LayerNorm"), config.epsilon)


def word_embeddings(config: BertConfig, weights: Weights) -> Tensor:
    return weights("embeddings.word_embeddings.weight", config.vocab_size, config.hidden_size)


@module
def attention(config: BertConfig, step: Step, weights: Weights, x: Tensor) -> Tensor:
    """Each token of x [tokens, hidden] attends to all tokens of its sequence."""
    hidden, heads, size = config.hidden_size, config.heads, config.head_size
    q, k, v = (
        split_heads(linear(x, weights.under(name), hidden, hidden, True), heads, size)
        for name in ("query", "key", "value")
    )
    attended = trace.packed_attention(q, k, v, step.offsets, step.lengths, scale=size**-0.5)
    return merge_heads(attended)


@module
def add_and_norm(config: BertConfig, weights: Weights, residual: Tensor, x: Tensor) -> Tensor:
    """LayerNorm(dense(x) + residual)"""
    projected = linear(x, weights.under("dense"), x.shape[-1], config.hidden_size, True)
    return layer_norm(projected + residual, weights.under("LayerNorm"), config.epsilon)
