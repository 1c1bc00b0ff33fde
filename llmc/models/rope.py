"""Rotary position embeddings: what the config says about them, and their frequencies.

Both layouts are read: `rope_parameters` (transformers 5), and `rope_theta` with `rope_scaling`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmc.models.config import ConfigFile

if TYPE_CHECKING:
    import numpy

ROPE_TYPES = {name: name for name in ("default", "linear", "llama3", "yarn")}


@dataclass(frozen=True)
class Rope:
    """Base and scaling of the rotation.

    `part` of each head is turned, the rest carries no position. `amplitude` multiplies cos and
    sin. Of a scaling by frequency (llama3, yarn), waves that turn less than `low` times within
    `original_context` tokens are slowed by `factor`, those that turn more than `high` times are
    kept, and those between are interpolated. `divisors`, if any, slow each frequency by its own.
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_context: int = 0
    part: float = 1.0
    amplitude: float = 1.0
    divisors: tuple[float, ...] = ()

    def rotated(self, head_size: int) -> int:
        """How many elements of a head are turned, the first ones."""
        return int(head_size * self.part)

    def inverse_frequencies(self, size: int) -> numpy.ndarray[Any, Any]:
        """f32[size / 2]: the angle that each pair of `size` elements turns by a position.

        In float32 throughout, as transformers computes them.
        """
        import numpy

        exponents = numpy.arange(0, size, 2, dtype=numpy.float32) / numpy.float32(size)
        powers = numpy.float32(self.theta) ** exponents
        if self.divisors:
            return numpy.float32(1) / (numpy.array(self.divisors, numpy.float32) * powers)
        frequencies = numpy.float32(1) / powers
        if self.type == "linear":
            return frequencies / numpy.float32(self.factor)
        if self.type == "llama3":
            return self._llama3(frequencies)
        if self.type == "yarn":
            return self._yarn(frequencies, size)
        return frequencies

    def _llama3(self, frequencies: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
        """Interpolates by the number of turns within the original context."""
        import numpy

        low, high = self.low, self.high
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

    def _yarn(self, frequencies: numpy.ndarray[Any, Any], size: int) -> numpy.ndarray[Any, Any]:
        """Interpolates by the number of the pair, between those that turn `high` and `low` times
        within the original context."""
        import numpy

        def pair_that_turns(times: float) -> float:
            ratio = self.original_context / (times * 2 * math.pi)
            return size * math.log(ratio) / (2 * math.log(self.theta))

        first = max(math.floor(pair_that_turns(self.high)), 0)
        last = min(math.ceil(pair_that_turns(self.low)), size - 1)
        width = numpy.float32(max(last - first, 0.001))
        pairs = numpy.arange(len(frequencies), dtype=numpy.float32)
        slow = numpy.clip((pairs - numpy.float32(first)) / width, 0, 1)
        slowed = frequencies / numpy.float32(self.factor)
        return (slowed * slow + frequencies * (1 - slow)).astype(numpy.float32)


def read_rope(
    config: ConfigFile,
    max_context: int,
    theta_key: str = "rope_theta",
    part_key: str = "partial_rotary_factor",
    default_part: float = 1.0,
) -> Rope:
    """The rope settings of a config. ModelError for values and types that are not supported.

    The keys are those of the older layout, where `rope_scaling` stands beside them.
    """
    parameters = config.section("rope_parameters")
    if parameters is not None and parameters.has("rope_theta"):
        theta = parameters.positive("rope_theta")
    else:
        theta = config.positive(theta_key, 10000.0)
    if parameters is not None and parameters.has("partial_rotary_factor"):
        part = read_part(parameters, "partial_rotary_factor")
    else:
        part = read_part(config, part_key, default_part)
    return read_scaling(parameters or config.section("rope_scaling"), theta, max_context, part)


def read_part(config: ConfigFile, key: str, default: float | None = None) -> float:
    """A number above 0, at most 1."""
    part = config.positive(key, default)
    if part > 1:
        raise config.error(key, f"is {part}; expected at most 1")
    return part


def read_scaling(
    scaling: ConfigFile | None, theta: float, max_context: int, part: float = 1.0
) -> Rope:
    """The rope with the base `theta` that a section such as `rope_scaling` describes."""
    if scaling is None:
        return Rope(theta, part=part)
    type_key = "rope_type" if scaling.has("rope_type") else "type"
    type = scaling.choice(type_key, ROPE_TYPES, "default")
    if type == "default":
        return Rope(theta, part=part)
    factor = scaling.positive("factor")
    if type == "linear":
        return Rope(theta, type, factor, part=part)
    original = scaling.size("original_max_position_embeddings", max_context)
    if type == "yarn":
        if theta <= 1:
            raise scaling.error("rope_theta", f"is {theta}; yarn needs more than 1")
        low, high = read_turns(scaling, "beta_slow", "beta_fast", 1.0, 32.0)
        amplitude = read_yarn_amplitude(scaling, factor)
        return Rope(theta, type, factor, low, high, original, part, amplitude)
    low, high = read_turns(scaling, "low_freq_factor", "high_freq_factor")
    return Rope(theta, type, factor, low, high, original, part)


def read_turns(
    scaling: ConfigFile,
    low_key: str,
    high_key: str,
    default_low: float | None = None,
    default_high: float | None = None,
) -> tuple[float, float]:
    """Two numbers above 0, the first the smaller one."""
    low, high = scaling.positive(low_key, default_low), scaling.positive(high_key, default_high)
    if low >= high:
        raise scaling.error(high_key, f"is {high}, not above {low_key} {low}")
    return low, high


def read_yarn_amplitude(scaling: ConfigFile, factor: float) -> float:
    """`attention_factor`, or what the paper makes of `factor`."""
    if not scaling.flag("truncate", True):
        raise scaling.error("truncate", "is false, which is not supported")

    def grown(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1 if factor > 1 else 1.0

    if scaling.has("attention_factor"):
        return scaling.positive("attention_factor")
    if scaling.has("mscale") and scaling.has("mscale_all_dim"):
        return grown(scaling.positive("mscale")) / grown(scaling.positive("mscale_all_dim"))
    return grown(1)
