"""The model families, by the architecture that config.json names. docs/add-a-model.md adds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmc.ir.dims import Dim
from llmc.models.bert import BertConfig, bert, bert_for_masked_lm
from llmc.models.common import (
    CAUSAL_INPUTS,
    ENCODER_INPUTS,
    SLOT_INPUTS,
    ModelConfig,
    Step,
)
from llmc.models.config import ConfigFile
from llmc.models.distilbert import DistilBertConfig, distilbert, distilbert_for_masked_lm
from llmc.models.gemma import GemmaConfig, gemma
from llmc.models.gemma2 import Gemma2Config, gemma2
from llmc.models.gemma3 import Gemma3Config, gemma3
from llmc.models.gpt2 import GPT2Config, gpt2
from llmc.models.gpt_neox import GPTNeoXConfig, gpt_neox
from llmc.models.llama import LlamaConfig, llama
from llmc.models.mamba2 import Mamba2Config, mamba2
from llmc.models.mistral import MistralConfig, mistral
from llmc.models.mixtral import MixtralConfig, mixtral
from llmc.models.olmo2 import Olmo2Config, olmo2
from llmc.models.phi import PhiConfig, phi
from llmc.models.phi3 import Phi3Config, phi3
from llmc.models.qwen import QwenConfig, qwen
from llmc.models.qwen2_moe import Qwen2MoeConfig, qwen2_moe
from llmc.models.qwen3_moe import Qwen3MoeConfig, qwen3_moe
from llmc.models.roberta import RobertaConfig, roberta, roberta_for_masked_lm
from llmc.models.smollm3 import SmolLM3Config, smollm3
from llmc.models.starcoder2 import Starcoder2Config, starcoder2
from llmc.models.zamba2 import Zamba2Config, zamba2


@dataclass(frozen=True)
class Family:
    """How a checkpoint of one architecture becomes a graph.

    `read_config` checks its config.json; `build(config, step)` is the model as a function to
    trace, over the step inputs of `kind` but those `unread`, and of the slots of states if
    `recurrent`. Tensor names may lack `prefix`.
    """

    kind: Literal["causal_lm", "encoder"]
    read_config: Callable[[ConfigFile], ModelConfig]
    build: Callable[[Any, Step], dict[str, Any]]
    prefix: str
    unread: tuple[str, ...] = ()
    recurrent: bool = False

    @property
    def inputs(self) -> Mapping[str, tuple[Dim, ...]]:
        """Name -> shape of the step's inputs, all i32."""
        inputs = CAUSAL_INPUTS if self.kind == "causal_lm" else ENCODER_INPUTS
        inputs = inputs | SLOT_INPUTS if self.recurrent else inputs
        return {name: shape for name, shape in inputs.items() if name not in self.unread}


ROBERTA = Family("encoder", RobertaConfig.read, roberta, "roberta.", ("positions",))
ROBERTA_FOR_MASKED_LM = replace(ROBERTA, build=roberta_for_masked_lm)

ARCHITECTURES = {
    "BertForMaskedLM": Family("encoder", BertConfig.read, bert_for_masked_lm, "bert."),
    "BertModel": Family("encoder", BertConfig.read, bert, "bert."),
    "DistilBertForMaskedLM": Family(
        "encoder", DistilBertConfig.read, distilbert_for_masked_lm, "distilbert."
    ),
    "DistilBertModel": Family("encoder", DistilBertConfig.read, distilbert, "distilbert."),
    "GPT2LMHeadModel": Family("causal_lm", GPT2Config.read, gpt2, "transformer."),
    "GPTNeoXForCausalLM": Family("causal_lm", GPTNeoXConfig.read, gpt_neox, "gpt_neox."),
    "Gemma2ForCausalLM": Family("causal_lm", Gemma2Config.read, gemma2, "model."),
    "Gemma3ForCausalLM": Family("causal_lm", Gemma3Config.read, gemma3, "model."),
    "GemmaForCausalLM": Family("causal_lm", GemmaConfig.read, gemma, "model."),
    "LlamaForCausalLM": Family("causal_lm", LlamaConfig.read, llama, "model."),
    "Mamba2ForCausalLM": Family(
        "causal_lm", Mamba2Config.read, mamba2, "backbone.", ("page_table",), recurrent=True
    ),
    "MistralForCausalLM": Family("causal_lm", MistralConfig.read, mistral, "model."),
    "MixtralForCausalLM": Family("causal_lm", MixtralConfig.read, mixtral, "model."),
    "Olmo2ForCausalLM": Family("causal_lm", Olmo2Config.read, olmo2, "model."),
    "Phi3ForCausalLM": Family("causal_lm", Phi3Config.read, phi3, "model."),
    "PhiForCausalLM": Family("causal_lm", PhiConfig.read, phi, "model."),
    "Qwen2ForCausalLM": Family("causal_lm", QwenConfig.read_qwen2, qwen, "model."),
    "Qwen2MoeForCausalLM": Family("causal_lm", Qwen2MoeConfig.read, qwen2_moe, "model."),
    "Qwen3ForCausalLM": Family("causal_lm", QwenConfig.read_qwen3, qwen, "model."),
    "Qwen3MoeForCausalLM": Family("causal_lm", Qwen3MoeConfig.read, qwen3_moe, "model."),
    "RobertaForMaskedLM": ROBERTA_FOR_MASKED_LM,
    "RobertaModel": ROBERTA,
    "SmolLM3ForCausalLM": Family("causal_lm", SmolLM3Config.read, smollm3, "model."),
    "Starcoder2ForCausalLM": Family("causal_lm", Starcoder2Config.read, starcoder2, "model."),
    "XLMRobertaForMaskedLM": ROBERTA_FOR_MASKED_LM,
    "XLMRobertaModel": ROBERTA,
    "Zamba2ForCausalLM": Family(
        "causal_lm", Zamba2Config.read, zamba2, "model.", recurrent=True
    ),
}
