"""What every frontend returns: a graph, where its parameters are stored, and what to know about it.

`load_model` is the one way in; it looks at the path and calls the frontend for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmc.errors import ModelError
from llmc.ir.dtypes import DType, from_numpy

if TYPE_CHECKING:
    import numpy

    from llmc.frontend.onnx.signature import TokenInterface
    from llmc.ir.graph import Graph

ModelKind = Literal["causal_lm", "encoder", "onnx", "graph"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `bytes` bytes at `offset`, row-major, little-endian.

    `array` holds the values of a tensor that no file has as plain bytes (an initializer inside a
    protobuf); `offset` and `bytes` then describe nothing.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int
    array: numpy.ndarray[Any, Any] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_array(cls, name: str, array: numpy.ndarray[Any, Any], file: Path) -> StoredTensor:
        """A tensor whose values are already in memory; `file` is where they came from."""
        dtype = from_numpy(array.dtype)
        return cls(name, dtype, array.shape, file, 0, array.nbytes, array)

    def read(self) -> numpy.ndarray[Any, Any]:
        """The values: a read-only view of the mapped file, never a copy.

        Each call maps the tensor anew, so its pages can go when the array does. ModelError if
        the file has since been removed or cut.
        """
        import numpy

        if self.array is not None:
            return self.array
        if prod(self.shape) == 0:
            return numpy.empty(self.shape, self.dtype.numpy)
        try:
            mapped = numpy.memmap(
                self.file, numpy.uint8, "r", offset=self.offset, shape=(self.bytes,)
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.file}: cannot map tensor '{self.name}': {error}") from error
        return mapped.view(numpy.ndarray).view(self.dtype.numpy).reshape(self.shape)


@dataclass(frozen=True)
class Pooling:
    """How a sentence embedding is made of token vectors: `mode` is mean, cls or max."""

    mode: Literal["mean", "cls", "max"]
    normalize: bool


@dataclass(frozen=True)
class ModelInfo:
    """What the runtime and the command line ask about a model; 0 and None mean "not known".

    `max_context` is in tokens. `eos_token_ids` stop generation. `pooling` is set for sentence
    embedding models, and `max_embed_tokens` is where those cut a text. A sequence of up to
    `growth_limit` tokens must not grow past it in a later step.
    """

    architecture: str
    compute_dtype: DType
    vocab_size: int = 0
    max_context: int = 0
    hidden_size: int = 0
    layers: int = 0
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    pooling: Pooling | None = None
    max_embed_tokens: int | None = None
    growth_limit: int = 0


@dataclass(frozen=True)
class ImportedModel:
    """A model as a frontend delivers it.

    `parameters` maps each parameter leaf of `graph` to its stored tensor. `fingerprint` (hex)
    changes when the files do; it is cheap, made of sizes, times and headers. `companion_files`
    are the tokenizer and config files that belong into an artifact. `token_interface` says how to
    generate with an ONNX graph; None if it is no language model.
    """

    graph: Graph
    parameters: Mapping[str, StoredTensor]
    kind: ModelKind
    config: ModelInfo
    path: Path
    fingerprint: str
    companion_files: tuple[Path, ...] = ()
    token_interface: TokenInterface | None = None


def load_model(path: str | Path, dtype: str | None = None) -> ImportedModel:
    """Import an .onnx file, a directory with genai_config.json or a Hugging Face directory.

    `dtype` is the compute dtype ("f32", "bf16", ...), by default the checkpoint's own.
    ModelError says what is wrong with the files.
    """
    path = Path(path)
    if (path / "genai_config.json").is_file():
        from llmc.frontend.onnx import genai_model_file

        path = genai_model_file(path)
    if (path / "manifest.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(f"{path}: an artifact, which is compiled already; give the .onnx file or "
                         "the checkpoint directory that it was made from")
    if path.is_dir():
        from llmc.frontend.huggingface import load_huggingface

        return load_huggingface(path, dtype)
    if not path.exists():
        raise ModelError(f"{path}: no such file or directory; give an .onnx file or a directory "
                         "with config.json and model.safetensors")
    if path.suffix != ".onnx":
        raise ModelError(f"{path}: not a model; give an .onnx file or a directory with config.json")
    from llmc.frontend.onnx import import_onnx

    return import_onnx(path)
