"""What each token stands for, as bytes: for log probabilities, which name single tokens."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from llmc.frontend.json_file import read_json_object
from llmc.frontend.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SPACE = "\u2581"  # how sentence-piece tokenizers write a space


class Vocabulary:
    """Tokens of a checkpoint or artifact directory."""

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        self._directory, self._tokenizer = directory, tokenizer
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; none for a number that is no token."""
        if token not in self._known:
            self._known[token] = self._make(token)
        return self._known[token]

    def text_of(self, token: int) -> str:
        """The text of a token; replacement characters for part of a character."""
        return self.bytes_of(token).decode("utf-8", "replace")

    def _make(self, token: int) -> bytes:
        name = self._tokenizer.token(token)
        if token in self._added:
            return name.encode()
        if byte := _BYTE.match(name):
            return bytes([int(byte.group(1), 16)])
        if self._byte_level:
            return bytes(_BYTE_OF[character] for character in name if character in _BYTE_OF)
        return name.replace(_SPACE, " ").encode("utf-8", "replace")

    @cached_property
    def _file(self) -> dict[str, Any]:
        return read_json_object(self._directory / "tokenizer.json")

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(each["id"] for each in self._file.get("added_tokens") or ())

    @cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps([self._file.get("decoder"),
                                            self._file.get("pre_tokenizer")])


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet for bytes: printable Latin-1 stands for itself, the rest follows 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTE_OF = _byte_characters()
