"""What the weights of a model are quantised to: the options of `--quantize`, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from llmc.errors import LlmcError
from llmc.ir.dtypes import DType, dtype

WEIGHTS = ("int8", "int4")
FLOAT = "float"
KV_CACHES = ("int8", FLOAT)
GROUPS = (32, 64, 128)
HEADS = ("int8", "int4", "float")
ACTIVATIONS = ("int8", "float")
CALIBRATE = ("auto", "always", "never")
DEFAULT_GROUPS = {"int8": 128, "int4": 32}
_CODES = {("int8", True): "i8", ("int8", False): "u8", ("int4", True): "i4", ("int4", False): "u4"}


@dataclass(frozen=True)
class Quantization:
    """How the matrices that a model multiplies by are stored.

    weights      "int8", "int4" or "float" (they stay as the model has them)
    group        elements of a row (along the inner dimension) that share a scale: 32, 64 or 128
                 (default: 128 for int8, 32 for int4)
    symmetric    False: groups have zero points too
    head         the same for the matrix that makes logits: "int8" (the default), "int4" or "float"
    activations  "int8" (the default): where the target has instructions for it, what is multiplied
                 by quantised weights is rounded to 8 bits, block by block; "float": never
    calibrate    int4 only. "always": choose codes for the errors of products, on text that the
                 model makes; "auto" (the default): where that takes 30 s at most; "never": for
                 those of the weights
    kv_cache     "int8": keys and values are stored as 8-bit codes, with a scale for each token and
                 head; "float" (the default): in the compute dtype
    """

    weights: str
    group: int = 0
    symmetric: bool = True
    head: str = "int8"
    activations: str = "int8"
    calibrate: str = "auto"
    kv_cache: str = FLOAT

    def __post_init__(self) -> None:
        for name, allowed in (("weights", (*WEIGHTS, FLOAT)), ("kv_cache", KV_CACHES),
                              ("head", HEADS), ("calibrate", CALIBRATE),
                              ("activations", ACTIVATIONS), ("group", (0, *GROUPS)),
                              ("symmetric", (True, False))):
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
                wanted = ", ".join(str(each) for each in allowed if each != 0 or name != "group")
                raise LlmcError(f"quantize: {name} must be one of {wanted}, got {value!r}")
        if not self.group and self.weights != FLOAT:
            object.__setattr__(self, "group", DEFAULT_GROUPS[self.weights])
        if self.calibrate == "always" and not self.four_bits:
            raise LlmcError("quantize: calibrate always is for int4, and nothing here becomes "
                            "int4: leave calibrate out, or choose int4 weights")

    @property
    def four_bits(self) -> bool:
        """Whether any matrix becomes int4."""
        return self.weights != FLOAT and "int4" in (self.weights, self.head)

    @property
    def codes(self) -> DType:
        """The dtype of the codes."""
        return dtype(_CODES[self.weights, self.symmetric])

    def of_head(self) -> Quantization | None:
        """The same for the matrix that makes logits; None if it stays as it is. To calibrate is for
        the model to ask for, not for one matrix."""
        if self.head == "float":
            return None
        return self if self.head == self.weights else replace(
            self, weights=self.head, group=DEFAULT_GROUPS[self.head], calibrate="auto")

    def text(self) -> str:
        """Every option, for cache keys."""
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


def quantization(given: Any, kv_cache: str | None = None) -> Quantization | None:
    """The options `quantize` (None, "int8", "int4" or a Quantization) and `kv_cache` of Python's
    functions."""
    if given is None:
        return Quantization(FLOAT, kv_cache=kv_cache) if kv_cache is not None else None
    if not isinstance(given, Quantization):
        if given not in WEIGHTS:
            raise LlmcError(f"quantize must be one of {', '.join(WEIGHTS)} or a Quantization, got "
                            f"{given!r}")
        given = Quantization(given)
    return replace(given, kv_cache=kv_cache) if kv_cache is not None else given
