"""Steps on nobody's behalf: a language model's step of a given shape, to measure code with.

They read and write one page of the cache that no sequence gets (executors allocate it), so they
may run beside any use of the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmc.runtime.executor import Executor
from llmc.runtime.pages import PAGE

CONTEXT_PAGES = 4  # that a sequence has behind it where all have one token each
INPUTS = frozenset(("ids", "positions", "sequence", "offsets", "page_table", "rows"))


def can_rehearse(executor: Executor) -> bool:
    """Whether these are all inputs of a step, so that one can be made up."""
    return {tensor.name for tensor in executor.inputs} == INPUTS


def rehearse(executor: Executor, values: Mapping[str, int], max_context: int) -> bool:
    """Run one step of these tokens, sequences and rows (and at least the table_width given); False
    where there is no such step. Whoever calls it serialises it with other steps."""
    arrays = make_step(values, executor.known["pool_pages"] - 1, max_context)
    if arrays is None:
        return False
    executor.run(arrays, want=(executor.outputs[-1].name,))
    return True


def make_step(values: Mapping[str, int], page: int, max_context: int
              ) -> dict[str, np.ndarray] | None:
    """Inputs of a step, all i32; every page of every sequence is `page`."""
    tokens, count, rows = values["tokens"], values["sequences"], values["rows"]
    if not 0 < count <= tokens or rows > tokens:
        return None
    sizes = np.full(count, tokens // count)
    sizes[:tokens % count] += 1
    width = max(values.get("table_width", 1), 1 + CONTEXT_PAGES * (tokens == count))
    length = min((width - 1) * PAGE, max_context - int(sizes[0]))
    if length < 0:
        return None
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    places = np.arange(tokens) - np.repeat(offsets[:-1], sizes)  # of each token in its sequence
    from_end = np.repeat(sizes, sizes) - 1 - places
    wanted = np.sort(np.argsort(from_end, kind="stable")[:rows])  # the last ones of each
    pages = -(-(length + int(sizes[0])) // PAGE)
    arrays = {"ids": np.zeros(tokens), "positions": length + places,
              "sequence": np.repeat(np.arange(count), sizes), "offsets": offsets,
              "page_table": np.full((count, pages), page), "rows": wanted}
    return {name: array.astype(np.int32) for name, array in arrays.items()}
