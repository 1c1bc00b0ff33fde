"""DistilBERT: BERT without token types and pooler, under other names."""

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

EPSILON = 1e-12  # of every norm


@dataclass(frozen=True)
class DistilBertConfig(ModelConfig):
    intermediate_size: int
    heads: int
    activation: Callable[[Any], Any]
    tied: bool

    @classmethod
    def read(cls, config: ConfigFile) -> DistilBertConfig:
        """Checked values of a config.json. ModelError names file and key."""
        hidden, heads = config.size("dim"), config.size("n_heads")
        if hidden % heads:
            raise config.error("n_heads", f"is {heads}, no divisor of dim {hidden}")
        return cls(
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden,
            layers=config.size("n_layers"),
            max_context=config.size("max_position_embeddings"),
            intermediate_size=config.size("hidden_dim"),
            heads=heads,
            activation=config.choice("activation", ACTIVATIONS, "gelu"),
            tied=config.flag("tie_word_embeddings", True),
        )


def distilbert(config: DistilBertConfig, step: Step) -> dict[str, Tensor]:
    """`last_hidden_state` f32[tokens, hidden]."""
    return {"last_hidden_state": trace.cast(encode(config, step), f32)}


def distilbert_for_masked_lm(config: DistilBertConfig, step: Step) -> dict[str, Tensor]:
    """`logits` f32[tokens, vocab_size] of every token."""
    hidden, weights = config.hidden_size, step.weights
    x = linear(encode(config, step), weights.under("vocab_transform"), hidden, hidden, True)
    x = layer_norm(config.activation(x), weights.under("vocab_layer_norm"), EPSILON)
    decoder = (
        word_embeddings(config, weights)
        if config.tied
        else weights("vocab_projector.weight", config.vocab_size, hidden)
    )
    logits = trace.matmul(x, trace.transpose(decoder, (1, 0)), dtype=f32)
    return {"logits": logits + trace.cast(weights("vocab_projector.bias", config.vocab_size), f32)}


def encode(config: DistilBertConfig, step: Step) -> Tensor:
    """[tokens, hidden] after the embeddings and all layers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    tables = step.weights.under("distilbert.embeddings")
    positions = tables("position_embeddings.weight", config.max_context, hidden)
    x = trace.gather(word_embeddings(config, step.weights), step.ids, axis=0)
    x = x + trace.gather(positions, step.positions, axis=0)
    x = layer_norm(x, tables.under("LayerNorm"), EPSILON)

    for number in range(config.layers):
        with trace.scope(f"distilbert.transformer.layer.{number}"):
            weights = step.weights.under(f"distilbert.transformer.layer.{number}")
            attended = attention(config, step, weights.under("attention"), x)
            x = layer_norm(attended + x, weights.under("sa_layer_norm"), EPSILON)
            wide = config.activation(linear(x, weights.under("ffn.lin1"), hidden, inner, True))
            narrow = linear(wide, weights.under("ffn.lin2"), inner, hidden, True)
            x = layer_norm(narrow + x, weights.under("output_layer_norm"), EPSILON)
    return x


def word_embeddings(config: DistilBertConfig, weights: Weights) -> Tensor:
    name = "distilbert.embeddings.word_embeddings.weight"
    return weights(name, config.vocab_size, config.hidden_size)


@module
def attention(config: DistilBertConfig, step: Step, weights: Weights, x: Tensor) -> Tensor:
    """Each token of x [tokens, hidden] attends to all tokens of its sequence."""
    hidden, heads = config.hidden_size, config.heads
    q, k, v = (
        split_heads(linear(x, weights.under(name), hidden, hidden, True), heads, hidden // heads)
        for name in ("q_lin", "k_lin", "v_lin")
    )
    attended = trace.packed_attention(q, k, v, step.offsets, step.lengths)
    return linear(merge_heads(attended), weights.under("out_lin"), hidden, hidden, True)
