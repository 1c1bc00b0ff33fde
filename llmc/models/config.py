"""config.json: reading it key by key, each value checked where it is read."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.errors import ModelError

MAX_SIZE = 1 << 31  # of anything in a config; what is larger is a mistake


@dataclass(frozen=True)
class ConfigFile:
    """The values of a config.json. Every reader raises ModelError, naming file and key."""

    path: Path
    values: Mapping[str, Any]

    def error(self, key: str, problem: str) -> ModelError:
        """The error to raise about `key`."""
        return ModelError(f"{self.path}: '{key}' {problem}")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def size(self, key: str, default: int | None = None) -> int:
        """An integer from 1."""
        return self.integer(key, default, low=1)

    def integer(self, key: str, default: int | None = None, low: int = 0) -> int:
        """An integer from `low` to MAX_SIZE; `default` where the key is missing or null."""
        value = self._get(key, default)
        if type(value) is not int or not low <= value < MAX_SIZE:
            raise self.error(key, f"is {value!r}; expected an integer from {low}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._get(key, default)
        if not _is_positive(value):
            raise self.error(key, f"is {value!r}; expected a number above 0")
        return float(value)

    def multiple(self, key: str, of: int, default: float | None = None) -> int:
        """So many times `of`, a finite number above 0; below MAX_SIZE, rounded down."""
        product = self.positive(key, default) * of
        if product >= MAX_SIZE:
            raise self.error(key, f"is {self._get(key, default)!r}, too large for {of}")
        return int(product)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, f"is {value!r}; expected true or false")
        return value

    def choice(self, key: str, known: Mapping[str, Any], default: str | None = None) -> Any:
        """What `known` maps the string to."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in known:
            raise self.error(key, f"is {value!r}; supported: {', '.join(sorted(known))}")
        return known[value]

    def strings(self, key: str, known: Iterable[str], count: int) -> tuple[str, ...] | None:
        """A list of `count` strings of `known`; None where missing or null."""
        value, known = self.values.get(key), sorted(known)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(
                isinstance(each, str) and each in known for each in value):
            raise self.error(key, f"is {value!r}; expected {count} of {', '.join(known)}")
        return tuple(value)

    def positives(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above 0, at least one."""
        value = self._get(key, None)
        if not isinstance(value, list) or not value or not all(map(_is_positive, value)):
            raise self.error(key, f"is {value!r}; expected numbers above 0")
        return tuple(map(float, value))

    def section(self, key: str) -> ConfigFile | None:
        """The object under `key` as a config of its own; None where missing or null."""
        if not self.has(key):
            return None
        value = self.values[key]
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}; expected an object")
        return ConfigFile(self.path, value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them; () where missing or null."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(each) is int and 0 <= each < MAX_SIZE for each in ids):
            raise self.error(key, f"is {value!r}; expected token ids")
        return tuple(ids)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.error(key, "is missing")
        return default


def _is_positive(value: Any) -> bool:
    """A number above 0 that a float can hold."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def head_size(config: ConfigFile, hidden_size: int, heads: int) -> int:
    """`head_dim` where the config has it, else hidden_size / num_attention_heads."""
    if config.has("head_dim"):
        return config.size("head_dim")
    if hidden_size % heads:
        raise config.error("num_attention_heads", f"is {heads}, no divisor of {hidden_size=}")
    return hidden_size // heads


def read_window(config: ConfigFile, default: int = 0) -> int:
    """`sliding_window`: how many tokens attention sees; 0 for all, which null means."""
    if "sliding_window" in config.values and not config.has("sliding_window"):
        return 0
    return config.integer("sliding_window", default)


def read_layer_windows(
    config: ConfigFile, layers: int, window: int, windowed: Sequence[bool]
) -> tuple[int, ...]:
    """Of each layer the window, or 0 for all tokens: by `layer_types`, else as `windowed` says."""
    types = config.strings("layer_types", ("sliding_attention", "full_attention"), layers)
    if types is not None:
        windowed = [each == "sliding_attention" for each in types]
    return tuple(window if each else 0 for each in windowed)
