"""What an ONNX graph is for: recognises token language models by their inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from llmc.frontend.model import ModelInfo
from llmc.frontend.onnx.config import read_config
from llmc.frontend.onnx.genai import FILE, TokenNames, read_genai_config
from llmc.ir import dims
from llmc.ir.dims import Dim, Symbol, symbols
from llmc.ir.dtypes import DType, f32
from llmc.ir.graph import Graph, Node

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    FILE,
)


@dataclass(frozen=True)
class TokenInterface:
    """The inputs and outputs of a language model over padded batches, by name.

    `ids`, `position_ids`: integers [batch, seq]; `attention_mask`: [batch, past + seq], 1 for
    tokens; `cache` pairs (input, output): [batch, heads, past, size] and what it grows into;
    `logits`: floats [batch, seq, vocab]. None or empty: the graph has no such input.
    """

    ids: str
    logits: str
    attention_mask: str | None = None
    position_ids: str | None = None
    cache: tuple[tuple[str, str], ...] = ()


def token_names(directory: Path) -> TokenNames:
    """The names in genai_config.json beside the model, else the usual ones."""
    config = read_genai_config(directory)
    return TokenNames() if config is None else config.names


def token_interface(graph: Graph, names: TokenNames) -> TokenInterface | None:
    """How to generate with the graph, or None if it is no language model over tokens."""
    inputs: dict[str, Node] = {node["name"]: node for node in graph.inputs}
    outputs = dict(graph.outputs)
    ids, logits = inputs.pop(names.ids, None), outputs.pop(names.logits, None)
    if ids is None or logits is None or not ids.dtype.is_integer:
        return None
    if ids.rank != 2 or logits.rank != 3 or logits.shape[:2] != ids.shape:
        return None
    mask = inputs.pop(names.attention_mask, None)
    positions = inputs.pop(names.position_ids, None)
    cache = _paired_caches(inputs, outputs, names.caches)
    if cache is None:
        return None
    return TokenInterface(
        ids=names.ids,
        logits=names.logits,
        attention_mask=None if mask is None else names.attention_mask,
        position_ids=None if positions is None else names.position_ids,
        cache=cache,
    )


def mask_equation(graph: Graph, names: TokenNames) -> tuple[str, Dim] | None:
    """(symbol, past + seq) for a mask whose length is a name of its own; None if it is not.

    Nothing in the graph may prove that: an exported mask is indexed by key, so a longer one
    would do. As part of a language model's interface it has one item per key.
    """
    interface = token_interface(graph, names)
    if interface is None or interface.attention_mask is None or not interface.cache:
        return None
    inputs = {node["name"]: node for node in graph.inputs}
    mask = inputs.pop(interface.attention_mask)
    length = mask.shape[-1]
    others = {symbol for node in inputs.values() for dim in node.shape for symbol in symbols(dim)}
    if mask.rank != 2 or not isinstance(length, Symbol) or length in others:
        return None
    return length.name, inputs[interface.cache[0][0]].shape[2] + inputs[interface.ids].shape[1]


def _paired_caches(
    inputs: dict[str, Node], outputs: dict[str, Node], named: Mapping[str, str] | None
) -> tuple[tuple[str, str], ...] | None:
    """(past input, present output) for every input; None if one is no cache or has no output."""
    pairs = []
    for name, node in inputs.items():
        present = (named or {}).get(name)
        if node.rank == 4 and present in outputs:
            pairs.append((name, present))
            continue
        if not name.startswith("past") or node.rank != 4:
            return None
        suffix = name.removeprefix("past_key_values").removeprefix("past")
        present = next(
            (n for n in (f"present{suffix}", f"present_key_values{suffix}") if n in outputs), None
        )
        if present is None:
            return None
        pairs.append((name, present))
    return tuple(pairs)


def model_info(model: ModelProto, path: Path, graph: Graph) -> ModelInfo:
    """What the graph and the config files beside it tell."""
    names = ("config.json", "generation_config.json")
    config = {k: v for name in names for k, v in read_config(path.parent / name).items()}
    genai = read_genai_config(path.parent)
    config = {**config, **(genai.facts if genai is not None else {})}
    interface = token_interface(graph, token_names(path.parent))
    logits = dict(graph.outputs)[interface.logits] if interface else None
    vocabulary = logits.shape[-1] if logits is not None else 0
    return ModelInfo(
        architecture=str(model.graph.name or model.producer_name or "onnx"),
        compute_dtype=_float_dtype(graph),
        vocab_size=vocabulary if isinstance(vocabulary, int) else 0,
        max_context=_max_context(graph, interface, config),
        layers=len(interface.cache) // 2 if interface else 0,
        eos_token_ids=_ids(config.get("eos_token_id")),
        bos_token_id=next(iter(_ids(config.get("bos_token_id"))), None),
        pad_token_id=next(iter(_ids(config.get("pad_token_id"))), None),
    )


def _float_dtype(graph: Graph) -> DType:
    """The dtype of the first float output."""
    return next((node.dtype for _, node in graph.outputs if node.dtype.is_float), f32)


def _max_context(graph: Graph, interface: TokenInterface | None, config: dict[str, Any]) -> int:
    """The longest sequence: what the graph can take, or what the config says; 0 if unknown."""
    limits = [config.get("max_position_embeddings"), config.get("n_positions")]
    if interface is not None:
        ids = next(node for node in graph.inputs if node["name"] == interface.ids)
        limits.append(dims.bounds(ids.shape[1])[1])
    known = [n for n in limits if isinstance(n, int) and 0 < n < dims.MAX]
    return min(known, default=0)


def companion_files(path: Path) -> tuple[Path, ...]:
    """Tokenizer and config files in the model's directory."""
    return tuple(file for name in COMPANIONS if (file := path.parent / name).is_file())


def _ids(value: Any) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(item for item in listed if type(item) is int)
