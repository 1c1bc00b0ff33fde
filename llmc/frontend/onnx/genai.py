"""genai_config.json: what onnxruntime-genai's exporter notes beside a model, names and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from llmc.errors import ModelError
from llmc.frontend.onnx.config import read_config

FILE = "genai_config.json"
MOST_LAYERS = 4096


@dataclass(frozen=True)
class TokenNames:
    """Names of a language model's inputs and outputs; `caches` maps past inputs to the outputs that
    they grow into (None: by their names, `past...` and `present...`)."""

    ids: str = "input_ids"
    attention_mask: str = "attention_mask"
    position_ids: str = "position_ids"
    logits: str = "logits"
    caches: Mapping[str, str] | None = None


@dataclass(frozen=True)
class GenaiConfig:
    """`facts` has the keys of a config.json, as far as the file tells them."""

    model_file: str = "model.onnx"
    names: TokenNames = field(default_factory=TokenNames)
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_genai_config(directory: Path) -> GenaiConfig | None:
    """The file in the model's directory; None if there is none, or none that can be read."""
    model = _section(read_config(directory / FILE), "model")
    if not model:
        return None
    decoder = _section(model, "decoder")
    facts: dict[str, Any] = {
        "max_position_embeddings": model.get("context_length"),
        **{key: model[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id")
           if key in model},
    }
    file = decoder.get("filename")
    return GenaiConfig(file if isinstance(file, str) else "model.onnx", _names(decoder), facts)


def genai_model_file(directory: Path) -> Path:
    """The .onnx file of a directory that onnxruntime-genai's exporter made."""
    config = read_genai_config(directory)
    if config is None:
        raise ModelError(f"{directory / FILE}: it cannot be read, or has no section 'model'")
    name = config.model_file
    if PurePosixPath(name).name != name or not name.endswith(".onnx") or "\\" in name:
        raise ModelError(f"{directory / FILE}: 'filename' {name!r} names no .onnx file beside it")
    return directory / name


def _names(decoder: Mapping[str, Any]) -> TokenNames:
    usual = TokenNames()
    inputs, outputs = _section(decoder, "inputs"), _section(decoder, "outputs")

    def name(section: Mapping[str, Any], key: str, default: str) -> str:
        found = section.get(key)
        return found if isinstance(found, str) else default

    return TokenNames(
        ids=name(inputs, "input_ids", usual.ids),
        attention_mask=name(inputs, "attention_mask", usual.attention_mask),
        position_ids=name(inputs, "position_ids", usual.position_ids),
        logits=name(outputs, "logits", usual.logits),
        caches=_caches(inputs, outputs, decoder.get("num_hidden_layers")),
    )


def _caches(
    inputs: Mapping[str, Any], outputs: Mapping[str, Any], layers: Any
) -> dict[str, str] | None:
    """Past input -> present output of every layer, from patterns with %d for its number."""
    patterns = [
        (str(inputs.get(f"past_{kind}_names")), str(outputs.get(f"present_{kind}_names")))
        for kind in ("key", "value")
    ]
    if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
        return None
    if not all("%d" in text for pair in patterns for text in pair):
        return None
    return {
        past.replace("%d", str(layer)): present.replace("%d", str(layer))
        for layer in range(layers)
        for past, present in patterns
    }


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}
