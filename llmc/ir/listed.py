"""Lists of tensors, as a frontend and the runtime tell each other about them.

A graph knows tensors only. A list NAME is the tensors NAME.0, NAME.1 and so on, and what it holds
is the value NAME#items: [count, rank, extents.., rank, extents.. ...], count -1 for None. An output
that is a list comes with NAME#items too, where the count alone matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ITEMS = "#items"
NOTHING = -1


def described(arrays: Sequence[Array] | None) -> Array:
    """What NAME#items says of a list, i64."""
    if arrays is None:
        return np.array([NOTHING], np.int64)
    parts = [len(arrays)]
    for array in arrays:
        parts += [array.ndim, *array.shape]
    return np.array(parts, np.int64)


def described_shapes(value: Array) -> list[tuple[int, ...]] | None:
    """The shapes that `described` told; None for None."""
    count, *rest = (int(item) for item in np.asarray(value).reshape(-1))
    if count == NOTHING:
        return None
    shapes = []
    for _ in range(count):
        rank, *rest = rest
        shapes.append(tuple(rest[:rank]))
        rest = rest[rank:]
    return shapes


def spread(name: str, arrays: Sequence[Array] | None) -> dict[str, Array]:
    """A list as tensors by name, with its description."""
    items = {f"{name}.{number}": array for number, array in enumerate(arrays or ())}
    return {name + ITEMS: described(arrays), **items}


def collected(name: str, results: Mapping[str, Array]) -> Any:
    """An output by name: an array, or the list that its tensors make (None if there is none)."""
    if name + ITEMS not in results:
        return results[name]
    count = int(results[name + ITEMS].reshape(-1)[0])
    return None if count == NOTHING else [results[f"{name}.{n}"] for n in range(count)]
