"""JSON out of files that nobody has vouched for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from llmc.errors import ModelError


def read_json(path: Path) -> Any:
    """Parse a JSON file; ModelError if it cannot be read or repeats a key."""
    try:
        return parse_json(path, path.read_bytes(), "the file")
    except OSError as error:
        raise ModelError(f"{path}: cannot read it: {error.strerror}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file whose top must be an object. ModelError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object")
    return content


def parse_json(path: Path, text: bytes, what: str) -> Any:
    """`text` as JSON; the ModelError calls it `what`, of `path`."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {what} is not valid JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key '{counts.most_common(1)[0][0]}' stands there more than once")
    return result
