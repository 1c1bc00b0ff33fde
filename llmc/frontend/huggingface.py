"""Hugging Face checkpoint directories: config.json, safetensors and what lies beside them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmc.errors import CompileError, ModelError
from llmc.frontend.json_file import read_json, read_json_object
from llmc.frontend.model import ImportedModel, ModelInfo, Pooling
from llmc.frontend.safetensors import Checkpoint, open_checkpoint
from llmc.frontend.tokenizer import check_merges
from llmc.frontend.trace import Spec, Tensor, trace
from llmc.ir.dtypes import DType, bf16, f16, f32, f64
from llmc.models import ARCHITECTURES, Family
from llmc.models.common import ModelConfig, Step, Weights
from llmc.models.config import ConfigFile

COMPANION_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
COMPUTE_DTYPES = {each.name: each for each in (f32, bf16, f16, f64)}
POOLING_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}
TOKENIZER = "tokenizer.json"
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers")
_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d{1,9})\.")


def load_huggingface(directory: Path, dtype: str | None = None) -> ImportedModel:
    """Import a checkpoint directory; symlinks in it are followed.

    `dtype` is the compute dtype, by default that of most of the weights. ModelError.
    """
    config_file = _read_config(directory)
    architecture = _architecture(config_file)
    family = ARCHITECTURES[architecture]
    if (directory / TOKENIZER).is_file():  # an artifact's tokenizer is trusted
        check_merges(directory / TOKENIZER)
    checkpoint = open_checkpoint(directory)
    _check_layers(config_file, checkpoint.tensors)
    config = family.read_config(config_file)
    weights = Weights(
        str(directory), checkpoint.tensors, _compute_dtype(dtype, checkpoint), family.prefix
    )
    graph = _trace_family(family, config, weights)
    companions = tuple(p for name in COMPANION_NAMES if (p := directory / name).is_file())
    return ImportedModel(
        graph=graph,
        parameters={name: checkpoint.tensors[name] for name in sorted(weights.used)},
        kind=family.kind,
        config=_model_info(directory, architecture, config_file, config, weights.dtype),
        path=directory,
        fingerprint=_fingerprint(checkpoint, companions),
        companion_files=companions,
    )


def checkpoint_context(directory: Path) -> int:
    """The tokens that a sequence of a checkpoint directory's model may have, as its config.json
    says; 0: any number. ModelError if no model can be made of that file."""
    config = _read_config(directory)
    return ARCHITECTURES[_architecture(config)].read_config(config).max_context


def _read_config(directory: Path) -> ConfigFile:
    path = directory / "config.json"
    if not path.is_file():
        found = sorted(each.name for each in directory.glob("*.onnx"))
        hint = f"; or give {found[0]} in it" if found else ""
        raise ModelError(f"{path}: no such file; a checkpoint directory needs one, and an artifact "
                         f"has manifest.json{hint}")
    config = ConfigFile(path, read_json_object(path))
    if config.has("quantization_config"):
        raise config.error("quantization_config", "is set; quantised checkpoints are not read yet")
    return config


def _architecture(config: ConfigFile) -> str:
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise config.error("architectures", "does not name the model's class")
    if names[0] not in ARCHITECTURES:
        raise config.error("architectures", f"is {names[0]}, which llmc does not know; known:"
                           f" {', '.join(sorted(ARCHITECTURES))} (docs/add-a-model.md adds one)")
    return names[0]


def _check_layers(config: ConfigFile, tensors: Iterable[str]) -> None:
    """Refuse a config with more layers than the file has before anything is built of them."""
    stored = len({match[1] for name in tensors if (match := _LAYER_NUMBER.search(name))})
    for key in LAYER_KEYS:
        value = config.values.get(key)
        if isinstance(value, int) and value > stored:
            raise config.error(key, f"is {value}, but the weights have {stored} layers")


def _compute_dtype(name: str | None, checkpoint: Checkpoint) -> DType:
    if name is not None:
        if name not in COMPUTE_DTYPES:
            raise CompileError(f"dtype {name!r} cannot be computed in; choose one of"
                               f" {', '.join(COMPUTE_DTYPES)}")
        return COMPUTE_DTYPES[name]
    stored: Counter[DType] = Counter()
    for tensor in checkpoint.tensors.values():
        if tensor.dtype.name in COMPUTE_DTYPES:
            stored[tensor.dtype] += tensor.bytes
    return stored.most_common(1)[0][0] if stored else f32


def _trace_family(family: Family, config: ModelConfig, weights: Weights) -> Any:
    names = tuple(family.inputs)

    def step(*tensors: Tensor) -> Mapping[str, Tensor]:
        return family.build(config, Step(dict(zip(names, tensors, strict=True)), weights))

    step.__name__ = family.build.__name__
    return trace(step, *(Spec(name, "i32", family.inputs[name]) for name in names))


def _model_info(
    directory: Path, architecture: str, file: ConfigFile, config: ModelConfig, dtype: DType
) -> ModelInfo:
    special = _special_token_ids(directory, file)
    pooling, max_embed_tokens = _read_pooling(directory)
    return ModelInfo(
        architecture=architecture,
        compute_dtype=dtype,
        vocab_size=config.vocab_size,
        max_context=config.max_context,
        hidden_size=config.hidden_size,
        layers=config.layers,
        eos_token_ids=special["eos_token_id"],
        bos_token_id=next(iter(special["bos_token_id"]), None),
        pad_token_id=next(iter(special["pad_token_id"]), None),
        pooling=pooling,
        max_embed_tokens=max_embed_tokens,
        growth_limit=config.growth_limit,
    )


def _special_token_ids(directory: Path, config: ConfigFile) -> dict[str, tuple[int, ...]]:
    """Ids of the end, begin and padding tokens; generation_config.json goes before config.json."""
    path = directory / "generation_config.json"
    generation = ConfigFile(path, read_json_object(path) if path.is_file() else {})
    return {
        key: (generation if generation.has(key) else config).token_ids(key)
        for key in ("eos_token_id", "bos_token_id", "pad_token_id")
    }


def _read_pooling(directory: Path) -> tuple[Pooling | None, int | None]:
    """What sentence-transformers' modules.json says about pooling, and the longest text."""
    path = directory / "modules.json"
    if not path.is_file():
        return None, None
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise ModelError(f"{path}: not a list of modules")
    kinds = {str(each.get("type")).rpartition(".")[2]: each.get("path") for each in modules}
    unknown = kinds.keys() - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ModelError(f"{path}: the module {min(unknown)} is not supported")
    mode = _pooling_mode(directory, path, kinds["Pooling"]) if "Pooling" in kinds else None
    limits = directory / "sentence_bert_config.json"
    longest = None
    if limits.is_file():
        values = ConfigFile(limits, read_json_object(limits))
        longest = values.size("max_seq_length") if values.has("max_seq_length") else None
    return (Pooling(mode, "Normalize" in kinds) if mode else None), longest


def _pooling_mode(directory: Path, modules: Path, folder: Any) -> Any:
    if not isinstance(folder, str) or folder in ("", ".", "..") or re.search(r"[/\\\0]", folder):
        raise ModelError(f"{modules}: {folder!r} is not a plain folder name")
    path = directory / folder / "config.json"
    values = ConfigFile(path, read_json_object(path))
    chosen = [key for key in values.values if key.startswith("pooling_mode_")
              and values.flag(key, False)]
    if len(chosen) != 1 or chosen[0] not in POOLING_MODES:
        raise ModelError(f"{path}: pooling {chosen} is not supported; expected one of"
                         f" {', '.join(POOLING_MODES)}")
    return POOLING_MODES[chosen[0]]


def _fingerprint(checkpoint: Checkpoint, companions: Iterable[Path]) -> str:
    """Identity of the weights by size, time and header, of the small files by content."""
    digest = hashlib.sha256()
    for identity in checkpoint.identities:
        digest.update(f"{identity}\n".encode())
    for path in companions:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()
