"""RoBERTa and XLM-RoBERTa: BERT with positions that count tokens from `pad_token_id` + 1."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.frontend import trace
from llmc.frontend.trace import Tensor
from llmc.ir.dtypes import f32, i32
from llmc.models.bert import BertConfig, encode, features, read_values, word_embeddings
from llmc.models.common import Step, gelu_erf, layer_norm, linear
from llmc.models.config import ConfigFile


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    pad_token: int

    @classmethod
    def read(cls, config: ConfigFile) -> RobertaConfig:
        """Checked values of a config.json. ModelError names file and key."""
        values = read_values(config)
        pad_token = config.integer("pad_token_id", 1)
        values["max_context"] = values["position_rows"] - pad_token - 1
        if values["max_context"] < 1:
            raise config.error("max_position_embeddings",
                               f"is {values['position_rows']}, too few for {pad_token=}")
        return cls(**values, pad_token=pad_token)


def roberta(config: RobertaConfig, step: Step) -> dict[str, Tensor]:
    """`last_hidden_state` f32[tokens, hidden] and, where the checkpoint has a pooler,
    `pooler_output` f32[sequences, hidden]."""
    weights = step.weights.under("roberta")
    x = encode(config, step, weights, position_rows(config, step))
    return features(config, step, weights, x)


def roberta_for_masked_lm(config: RobertaConfig, step: Step) -> dict[str, Tensor]:
    """`logits` f32[tokens, vocab_size] of every token."""
    hidden, top = config.hidden_size, step.weights.under("lm_head")
    weights = step.weights.under("roberta")
    x = encode(config, step, weights, position_rows(config, step))
    x = gelu_erf(linear(x, top.under("dense"), hidden, hidden, True))
    x = layer_norm(x, top.under("layer_norm"), config.epsilon)
    decoder = (
        word_embeddings(config, weights)
        if config.tied
        else top("decoder.weight", config.vocab_size, hidden)
    )
    bias = top("bias" if top.has("bias") else "decoder.bias", config.vocab_size)
    logits = trace.matmul(x, trace.transpose(decoder, (1, 0)), dtype=f32)
    return {"logits": logits + trace.cast(bias, f32)}


def position_rows(config: RobertaConfig, step: Step) -> Tensor:
    """i32[tokens]: pad_token + 1, + 2 ... over each sequence's tokens; pad_token at padding."""
    counts = trace.cast(step.ids != config.pad_token, i32)
    total = trace.cumsum(counts, axis=0)
    earlier = trace.gather(total - counts, step.offsets[:-1], axis=0)  # [sequences]
    here = total - trace.gather(earlier, step.sequence, axis=0)
    return here * counts + config.pad_token
