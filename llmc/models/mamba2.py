"""Mamba 2: nothing but recurrent layers, without attention and without a limit to the context."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dtypes import f32
from llmc.models.common import ModelConfig, Step
from llmc.models.config import MAX_SIZE, ConfigFile
from llmc.models.decoder import wanted_rows
from llmc.models.state_space import Mixer, mix, wide_norm

MOST_CONTEXT = 1 << 20  # tokens: the model has no limit, accounts want one
EMBEDDING = "backbone.embeddings.weight"


@dataclass(frozen=True)
class Mamba2Config(ModelConfig):
    """`wide_residual`: what layers add up stays in f32."""

    mixer: Mixer
    epsilon: float
    tied: bool
    wide_residual: bool

    @classmethod
    def read(cls, config: ConfigFile) -> Mamba2Config:
        """Checked values of a config.json. ModelError names file and key."""
        hidden = config.size("hidden_size", 4096)
        epsilon = config.positive("layer_norm_epsilon", 1e-5)
        return cls(
            vocab_size=config.size("vocab_size", 32768),
            hidden_size=hidden,
            layers=config.size("num_hidden_layers", 64),
            max_context=MOST_CONTEXT,
            mixer=read_mixer(config, hidden, epsilon),
            epsilon=epsilon,
            tied=config.flag("tie_word_embeddings", False),
            wide_residual=config.flag("residual_in_fp32", True),
        )


def read_mixer(config: ConfigFile, hidden: int, epsilon: float) -> Mixer:
    """The mixer of a Mamba-2 config."""
    config.choice("hidden_act", {"silu": None, "swish": None}, "silu")
    heads, groups = config.size("num_heads", 128), config.size("n_groups", 8)
    inner = config.multiple("expand", hidden, 2)
    if inner != heads * config.size("head_dim", 64):
        raise config.error("num_heads", f"is {heads}; times head_dim it must be {inner}")
    if heads % groups:
        raise config.error("num_heads", f"is {heads}, no multiple of n_groups {groups}")
    least, most = read_step_limits(config)
    return Mixer(
        inner=inner,
        heads=heads,
        groups=groups,
        state_size=config.size("state_size", 128),
        taps=config.integer("conv_kernel", 4, low=2),
        conv_bias=config.flag("use_conv_bias", True),
        bias=config.flag("use_bias", False),
        epsilon=epsilon,
        least_step=least,
        most_step=most,
    )


def read_step_limits(config: ConfigFile) -> tuple[float, float]:
    """`time_step_limit`: least and most; infinity is `Infinity` or {"__float__": "Infinity"}."""
    given = config.values.get("time_step_limit") or [0.0, math.inf]
    if isinstance(given, list) and len(given) == 2:
        least, most = (_number(each) for each in given)
        if least is not None and most is not None and 0 <= least <= most:
            return least, most
    raise config.error("time_step_limit", f"is {given!r}; expected two numbers, least and most")


def _number(value: Any) -> float | None:
    if isinstance(value, dict):
        value = value.get("__float__")
    if value in ("Infinity", "inf"):
        return math.inf
    held = type(value) is float or (type(value) is int and abs(value) < MAX_SIZE)
    return float(value) if held else None


def mamba2(config: Mamba2Config, step: Step) -> dict[str, Tensor]:
    """`logits` f32[rows, vocab_size] of the tokens that the step's `rows` name."""
    matrix = step.weights(EMBEDDING, config.vocab_size, config.hidden_size)
    x = trace.gather(matrix, step.ids, axis=0)  # [tokens, hidden]
    if config.wide_residual:
        x = trace.cast(x, f32)

    for layer in range(config.layers):
        with trace.scope(f"backbone.layers.{layer}"):
            weights = step.weights.under(f"backbone.layers.{layer}")
            normed = wide_norm(x, weights.under("norm"), config.epsilon, step)
            mixed = mix(config.mixer, step, layer, weights.under("mixer"), normed)
            x = x + trace.cast(mixed, x.dtype)

    normed = wide_norm(wanted_rows(step, x), step.weights.under("backbone.norm_f"), config.epsilon,
                       step)
    head = matrix if config.tied else step.weights("lm_head.weight", config.vocab_size,
                                                   config.hidden_size)
    return {"logits": trace.matmul(normed, trace.transpose(head, (1, 0)), dtype=f32)}
