"""Between the dense, padded form that checkpoints' users know and packed tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.errors import ShapeError

NAMES = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class DenseBatch:
    """A dense batch: integers [batch, length]; mask: bool, True for tokens."""

    ids: np.ndarray
    mask: np.ndarray
    types: np.ndarray
    positions: np.ndarray | None

    def rows(self, name: str) -> list[np.ndarray]:
        """The values of one array that belong to tokens, row by row."""
        array = getattr(self, name)
        return [array[row, kept] for row, kept in enumerate(self.mask)]

    def require_counted_positions(self) -> None:
        """ShapeError unless positions count 0, 1, 2 ... over the tokens that are not padding."""
        expected = np.cumsum(self.mask, axis=1) - 1
        if self.positions is not None and (self.positions != expected)[self.mask].any():
            raise ShapeError("position_ids must count 0, 1, 2 ... over the tokens that are not "
                             "padding")


def read_dense(arrays: Mapping[str, np.ndarray]) -> DenseBatch:
    """The checked arrays of a dense batch; ShapeError names what does not fit."""
    unknown = set(arrays) - set(NAMES)
    if unknown or "input_ids" not in arrays:
        raise ShapeError(f"a checkpoint takes {', '.join(NAMES)} (input_ids at least), got "
                         f"{', '.join(sorted(arrays))}")
    ids = np.asarray(arrays["input_ids"])
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ShapeError(f"input_ids must be integers [batch, length], got {ids.dtype}"
                         f"{list(ids.shape)}")
    for name in NAMES[1:]:
        if name in arrays and np.shape(arrays[name]) != ids.shape:
            raise ShapeError(f"{name} has shape {np.shape(arrays[name])}, input_ids {ids.shape}")
    mask = np.asarray(arrays.get("attention_mask", np.ones_like(ids))).astype(bool)
    if (gaps := np.flatnonzero((np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1) == 1
                                ).sum(axis=1) != 1)).size:
        raise ShapeError(f"attention_mask row {gaps[0]} is not one run of ones")
    types = np.asarray(arrays.get("token_type_ids", np.zeros_like(ids)))
    positions = arrays.get("position_ids")
    return DenseBatch(ids, mask, types, None if positions is None else np.asarray(positions))


def pad(rows: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Rows of packed results [tokens, width] back to [batch, length, width]; zeros at padding."""
    dense = np.zeros((*mask.shape, rows[0].shape[-1]), rows[0].dtype)
    for result, values, kept in zip(dense, rows, mask, strict=True):
        result[kept] = values
    return dense
