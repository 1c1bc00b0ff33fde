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
    split_heads,
)
from llmc.models.config import ConfigFile


@dataclass(frozen=True)
class BertConfig(ModelConfig):
    intermediate_size: int
    heads: int
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
        config.choice("position_embedding_type", {"absolute": True}, "absolute")
        if config.flag("is_decoder", False):
            raise config.error("is_decoder", "is true; only encoders are supported")
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        if hidden % heads:
            raise config.error("num_attention_heads", f"is {heads}, no divisor of {hidden=}")
        return cls(
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden,
            layers=config.size("num_hidden_layers"),
            max_context=config.size("max_position_embeddings"),
            intermediate_size=config.size("intermediate_size"),
            heads=heads,
            token_types=config.size("type_vocab_size", 2),
            epsilon=config.positive("layer_norm_eps", 1e-12),
            activation=config.choice("hidden_act", ACTIVATIONS, "gelu"),
            tied=config.flag("tie_word_embeddings", True),
        )


def bert(config: BertConfig, step: Step) -> dict[str, Tensor]:
    """`last_hidden_state` f32[tokens, hidden]; where the checkpoint has a pooler also
    `pooler_output` f32[sequences, hidden], made of the tokens that `pooled` names."""
    x = encode(config, step)
    outputs = {"last_hidden_state": trace.cast(x, f32)}
    pooler = step.weights.under("bert.pooler.dense")
    if pooler.has("weight"):
        first = trace.gather(x, step.pooled, axis=0)  # [sequences, hidden]
        pooled = trace.tanh(linear(first, pooler, config.hidden_size, config.hidden_size, True))
        outputs["pooler_output"] = trace.cast(pooled, f32)
    return outputs


def bert_for_masked_lm(config: BertConfig, step: Step) -> dict[str, Tensor]:
    """`logits` f32[tokens, vocab_size] of every token."""
    hidden, head = config.hidden_size, step.weights.under("cls.predictions")
    x = encode(config, step)
    x = config.activation(linear(x, head.under("transform.dense"), hidden, hidden, True))
    x = layer_norm(x, head.under("transform.LayerNorm"), config.epsilon)
    decoder = (
        word_embeddings(config, step.weights)
        if config.tied
        else head("decoder.weight", config.vocab_size, hidden)
    )
    bias = head("bias" if head.has("bias") else "decoder.bias", config.vocab_size)
    logits = trace.matmul(x, trace.transpose(decoder, (1, 0)), dtype=f32)
    return {"logits": logits + trace.cast(bias, f32)}


def encode(config: BertConfig, step: Step) -> Tensor:
    """[tokens, hidden] after the embeddings and all layers."""
    x = embed(config, step, step.weights.under("bert.embeddings"))
    for number in range(config.layers):
        with trace.scope(f"layer.{number}"):
            weights = step.weights.under(f"bert.encoder.layer.{number}")
            attended = attention(config, step, weights.under("attention.self"), x)
            x = add_and_norm(config, weights.under("attention.output"), x, attended)
            widen = weights.under("intermediate.dense")
            inner = linear(x, widen, config.hidden_size, config.intermediate_size, True)
            x = add_and_norm(config, weights.under("output"), x, config.activation(inner))
    return x


def embed(config: BertConfig, step: Step, weights: Weights) -> Tensor:
    """Word, position and token type vectors added up and normed."""
    hidden = config.hidden_size
    positions = weights("position_embeddings.weight", config.max_context, hidden)
    types = weights("token_type_embeddings.weight", config.token_types, hidden)
    x = trace.gather(word_embeddings(config, step.weights), step.ids, axis=0)
    x = x + trace.gather(types, step.token_types, axis=0)
    x = x + trace.gather(positions, step.positions, axis=0)
    return layer_norm(x, weights.under("LayerNorm"), config.epsilon)


def word_embeddings(config: BertConfig, weights: Weights) -> Tensor:
    return weights("bert.embeddings.word_embeddings.weight", config.vocab_size, config.hidden_size)


def attention(config: BertConfig, step: Step, weights: Weights, x: Tensor) -> Tensor:
    """Each token of x [tokens, hidden] attends to all tokens of its sequence."""
    hidden, heads, size = config.hidden_size, config.heads, config.head_size
    q, k, v = (
        split_heads(linear(x, weights.under(name), hidden, hidden, True), heads, size)
        for name in ("query", "key", "value")
    )
    attended = trace.packed_attention(q, k, v, step.offsets, step.lengths, scale=size**-0.5)
    return merge_heads(attended)


def add_and_norm(config: BertConfig, weights: Weights, residual: Tensor, x: Tensor) -> Tensor:
    """LayerNorm(dense(x) + residual)"""
    projected = linear(x, weights.under("dense"), x.shape[-1], config.hidden_size, True)
    return layer_norm(projected + residual, weights.under("LayerNorm"), config.epsilon)
