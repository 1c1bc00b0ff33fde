"""What can be told of a model's path before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from llmc.errors import LlmcError

MODEL_FILES = ("config.json", "genai_config.json", "manifest.json")  # one is in every directory


def require_model(path: str | Path) -> None:
    """LlmcError if there is nothing at the path, or what is there can be no model."""
    path = Path(path)
    if not path.exists():
        raise LlmcError(f"{path}: no such file or directory")
    # Of a directory with .onnx files alone the loader says which one to give.
    if path.suffix != ".onnx" and not any((path / name).is_file() for name in MODEL_FILES) \
            and not any(path.glob("*.onnx")):
        raise LlmcError(f"{path}: not a model; give an .onnx file, a directory with config.json, "
                        "or an artifact made by `llmc compile`")


def require_context(path: str | Path, tokens: int | None) -> None:
    """LlmcError if sequences of so many tokens are beyond the limit of the model at the path, which
    can be served (None: they are not)."""
    from llmc.runtime.artifact import is_artifact, read_manifest

    if tokens is None:
        return
    path = Path(path)
    if is_artifact(path):
        limit = read_manifest(path).config.get("max_context") or 0
    else:
        from llmc.frontend.huggingface import checkpoint_context

        limit = checkpoint_context(path)
    if limit and tokens > limit:
        raise LlmcError(f"{path}: max_context is {tokens}, this model's limit is {limit} tokens")


def require_served(path: str | Path) -> None:
    """LlmcError if there is no model at the path, or one that a server has nothing to do with."""
    from llmc.runtime.artifact import is_artifact, read_manifest

    require_model(path)
    path = Path(path)
    if is_artifact(path):
        is_served = read_manifest(path).kind in ("causal_lm", "encoder")
    else:
        is_served = path.suffix != ".onnx" and not (path / "genai_config.json").is_file()
    if not is_served:
        raise LlmcError(f"{path}: an ONNX or traced graph, which has no KV cache that a server can "
                        "step; serve a Hugging Face directory, or an artifact made of one")
