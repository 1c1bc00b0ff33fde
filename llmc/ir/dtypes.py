"""Element types: one table. NumPy (and ml_dtypes) load when a NumPy type is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmc.errors import GraphError

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True, eq=False, repr=False)
class DType:
    """An element type; equality is identity.

    `bits` is the storage width (bool takes a byte; 2- and 4-bit types pack several to a byte in
    weights, though NumPy keeps each in a byte); `kind` is "float", "int", "uint" or "bool".
    """

    name: str
    bits: int
    kind: str
    numpy_name: str

    @cached_property
    def numpy(self) -> numpy.dtype[Any]:
        """The NumPy dtype; those NumPy lacks come from ml_dtypes."""
        import numpy

        if hasattr(numpy, self.numpy_name):
            return numpy.dtype(getattr(numpy, self.numpy_name))
        import ml_dtypes

        return numpy.dtype(getattr(ml_dtypes, self.numpy_name))

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        """Whether signed or unsigned integer (bool is neither)."""
        return self.kind in ("int", "uint")

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__

    def __reduce__(self) -> tuple[Any, ...]:
        return dtype, (self.name,)

    def __deepcopy__(self, memo: object) -> DType:
        return self


f64 = DType("f64", 64, "float", "float64")
f32 = DType("f32", 32, "float", "float32")
f16 = DType("f16", 16, "float", "float16")
bf16 = DType("bf16", 16, "float", "bfloat16")
f8e4m3fn = DType("f8e4m3fn", 8, "float", "float8_e4m3fn")
f8e5m2 = DType("f8e5m2", 8, "float", "float8_e5m2")
f8e4m3fnuz = DType("f8e4m3fnuz", 8, "float", "float8_e4m3fnuz")
f8e5m2fnuz = DType("f8e5m2fnuz", 8, "float", "float8_e5m2fnuz")
f8e8m0 = DType("f8e8m0", 8, "float", "float8_e8m0fnu")
f4e2m1 = DType("f4e2m1", 4, "float", "float4_e2m1fn")
i2 = DType("i2", 2, "int", "int2")
i4 = DType("i4", 4, "int", "int4")
i8 = DType("i8", 8, "int", "int8")
i16 = DType("i16", 16, "int", "int16")
i32 = DType("i32", 32, "int", "int32")
i64 = DType("i64", 64, "int", "int64")
u2 = DType("u2", 2, "uint", "uint2")
u4 = DType("u4", 4, "uint", "uint4")
u8 = DType("u8", 8, "uint", "uint8")
u16 = DType("u16", 16, "uint", "uint16")
u32 = DType("u32", 32, "uint", "uint32")
u64 = DType("u64", 64, "uint", "uint64")
bool_ = DType("bool", 8, "bool", "bool_")

DTYPES: dict[str, DType] = {
    each.name: each
    for each in (
        *(f64, f32, f16, bf16, f8e4m3fn, f8e5m2, f8e4m3fnuz, f8e5m2fnuz, f8e8m0, f4e2m1),
        *(i2, i4, i8, i16, i32, i64, u2, u4, u8, u16, u32, u64, bool_),
    )
}
_BY_NUMPY_NAME = {each.numpy_name.rstrip("_"): each for each in DTYPES.values()}


def dtype(name: str | DType) -> DType:
    """The dtype of this name ("bf16"); a DType is returned as it is. GraphError if unknown."""
    if isinstance(name, DType):
        return name
    if name not in DTYPES:
        raise GraphError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def from_numpy(numpy_dtype: numpy.dtype[Any]) -> DType:
    """The dtype of a NumPy dtype of native byte order; GraphError if llmc has none for it."""
    if numpy_dtype.name not in _BY_NUMPY_NAME or not numpy_dtype.isnative:
        raise GraphError(f"no dtype for NumPy's {numpy_dtype}")
    return _BY_NUMPY_NAME[numpy_dtype.name]
