"""Rotary position embeddings: what the config says about them, and their tables.

Both layouts are read: `rope_parameters` (transformers 5), and `rope_theta` with `rope_scaling`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmc.models.config import ConfigFile

if TYPE_CHECKING:
    import numpy

ROPE_TYPES = {name: name for name in ("default", "linear", "llama3")}


@dataclass(frozen=True)
class Rope:
    """Base and scaling; the last three only where `type` is llama3.

    `part` of each head is turned, the rest carries no position.
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 0
    part: float = 1.0

    def rotated(self, head_size: int) -> int:
        """How many elements of a head are turned, the first ones."""
        return int(head_size * self.part)

    def inverse_frequencies(self, size: int) -> numpy.ndarray[Any, Any]:
        """f32[size / 2]: the angle that each pair of `size` elements turns by a position.

        In float32 throughout, as transformers computes them.
        """
        import numpy

        exponents = numpy.arange(0, size, 2, dtype=numpy.float32) / numpy.float32(size)
        frequencies = numpy.float32(1) / numpy.float32(self.theta) ** exponents
        if self.type == "linear":
            return frequencies / numpy.float32(self.factor)
        if self.type == "llama3":
            return self._llama3(frequencies)
        return frequencies

    def _llama3(self, frequencies: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
        """Long waves are slowed by `factor`, short ones kept, those between interpolated."""
        import numpy

        low, high = self.low_frequency_factor, self.high_frequency_factor
        waves = numpy.float32(2 * math.pi) / frequencies
        slowed = frequencies / numpy.float32(self.factor)
        keep = (numpy.float32(self.original_context) / waves - numpy.float32(low)) / numpy.float32(
            high - low
        )
        between = (1 - keep) * slowed + keep * frequencies
        long_waves = waves > self.original_context / low
        short_waves = waves < self.original_context / high
        scaled = numpy.where(long_waves, slowed, numpy.where(short_waves, frequencies, between))
        return scaled.astype(numpy.float32)


def read_rope(config: ConfigFile, max_context: int) -> Rope:
    """The rope settings of a config. ModelError for values and types that are not supported."""
    parameters = config.section("rope_parameters")
    theta_owner = parameters if parameters is not None and parameters.has("rope_theta") else config
    theta = theta_owner.positive("rope_theta", 10000.0)
    scaling = parameters or config.section("rope_scaling")
    part = read_part(config, parameters)
    if scaling is None:
        return Rope(theta, part=part)
    type_key = "rope_type" if scaling.has("rope_type") else "type"
    type = scaling.choice(type_key, ROPE_TYPES, "default")
    if type == "default":
        return Rope(theta, part=part)
    factor = scaling.positive("factor")
    if type == "linear":
        return Rope(theta, type, factor, part=part)
    low, high = scaling.positive("low_freq_factor"), scaling.positive("high_freq_factor")
    if low >= high:
        raise scaling.error("high_freq_factor", f"is {high}, not above low_freq_factor {low}")
    original = scaling.size("original_max_position_embeddings", max_context)
    return Rope(theta, type, factor, low, high, original, part)


def read_part(config: ConfigFile, parameters: ConfigFile | None) -> float:
    """`partial_rotary_factor`, from 0 to 1, where one of the two has it, else 1."""
    owner = parameters or config
    owner = owner if owner.has("partial_rotary_factor") else config
    part = owner.positive("partial_rotary_factor", 1.0)
    if part > 1:
        raise owner.error("partial_rotary_factor", f"is {part}; expected at most 1")
    return part
