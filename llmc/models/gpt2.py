"""GPT-2: learned positions, LayerNorm, one projection for q, k and v, weights stored [in, out]."""

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
    module,
    split_heads,
)
from llmc.models.config import ConfigFile
from llmc.models.decoder import attend, wanted_rows


@dataclass(frozen=True)
class GPT2Config(ModelConfig):
    intermediate_size: int
    heads: int
    epsilon: float
    activation: Callable[[Any], Any]
    tied: bool
    scaled: bool  # scores by 1 / sqrt(head size)
    scaled_by_layer: bool  # and by 1 / (layer + 1)

    @classmethod
    def read(cls, config: ConfigFile) -> GPT2Config:
        """Checked values of a config.json. ModelError names file and key."""
        if config.flag("add_cross_attention", False):
            raise config.error("add_cross_attention", "is true, which is not supported")
        hidden, heads = config.size("n_embd"), config.size("n_head")
        if hidden % heads:
            raise config.error("n_head", f"is {heads}, no divisor of n_embd {hidden}")
        return cls(
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden,
            layers=config.size("n_layer"),
            max_context=config.size("n_positions"),
            intermediate_size=config.size("n_inner", 4 * hidden),
            heads=heads,
            epsilon=config.positive("layer_norm_epsilon", 1e-5),
            activation=config.choice("activation_function", ACTIVATIONS, "gelu_new"),
            tied=config.flag("tie_word_embeddings", True),
            scaled=config.flag("scale_attn_weights", True),
            scaled_by_layer=config.flag("scale_attn_by_inverse_layer_idx", False),
        )

    def scale(self, layer: int) -> float:
        """What the layer's scores are multiplied by."""
        scale = (self.hidden_size // self.heads) ** -0.5 if self.scaled else 1.0
        return scale / (layer + 1) if self.scaled_by_layer else scale


def gpt2(config: GPT2Config, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    weights, hidden = step.weights.under("transformer"), config.hidden_size
    embedding = weights("wte.weight", config.vocab_size, hidden)
    positions = weights("wpe.weight", config.max_context, hidden)
    x = trace.gather(embedding, step.ids, axis=0) + trace.gather(positions, step.positions, axis=0)

    for layer in range(config.layers):
        with trace.scope(f"transformer.h.{layer}"):
            block = weights.under(f"h.{layer}")
            normed = layer_norm(x, block.under("ln_1"), config.epsilon)
            x = x + attention(config, step, layer, block.under("attn"), normed)
            normed = layer_norm(x, block.under("ln_2"), config.epsilon)
            inner = conv1d(normed, block.under("mlp.c_fc"), config.intermediate_size)
            x = x + conv1d(config.activation(inner), block.under("mlp.c_proj"), hidden)

    normed = layer_norm(wanted_rows(step, x), weights.under("ln_f"), config.epsilon)
    matrix = (
        embedding if config.tied else step.weights("lm_head.weight", config.vocab_size, hidden)
    )
    return {"logits": trace.matmul(normed, trace.transpose(matrix, (1, 0)), dtype=f32)}


@module
def attention(config: GPT2Config, step: Step, layer: int, weights: Weights, x: Tensor) -> Tensor:
    """Self-attention of x [tokens, hidden] over the layer's cache, which it extends."""
    hidden, heads = config.hidden_size, config.heads
    fused = conv1d(x, weights.under("c_attn"), 3 * hidden)
    q, k, v = (
        split_heads(fused[:, part * hidden : (part + 1) * hidden], heads, hidden // heads)
        for part in range(3)
    )
    attended = attend(step, layer, q, k, v, scale=config.scale(layer))
    return conv1d(attended, weights.under("c_proj"), hidden)


@module
def conv1d(x: Tensor, weights: Weights, width: int) -> Tensor:
    """x [.., inner] times `weight` [inner, width], as it is stored, plus `bias`."""
    return x @ weights("weight", x.shape[-1], width) + weights("bias", width)
