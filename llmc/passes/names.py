"""Names for what passes make of several named things."""

from __future__ import annotations

import re
from collections.abc import Sequence


def is_regular(names: Sequence[str]) -> bool:
    """Whether the names differ in their numbers only."""
    pieces = [re.split(r"(\d+)", name) for name in names]
    return len({len(each) for each in pieces}) == 1 and all(
        len(set(column)) == 1 for column in list(zip(*pieces, strict=True))[::2])


def template_name(names: Sequence[str]) -> str:
    """`model.layers.{}.weight` for names that differ in their numbers only; else the first's.

    >>> template_name(["h.0.w", "h.1.w"])
    'h.{}.w'
    """
    if not is_regular(names):
        return names[0]
    columns = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(column[0] if len(set(column)) == 1 else "{}" for column in columns)


def result_name(sources: Sequence[str]) -> str:
    """A name for what is made of these parameters.

    >>> result_name(["layers.0.q_proj.weight", "layers.0.k_proj.weight", "layers.0.v_proj.weight"])
    'layers.0.qkv_proj'
    """
    stripped = list(dict.fromkeys(name.removesuffix(".weight") for name in sources))
    if len(stripped) == 1:
        return stripped[0]
    pieces = [name.split(".") for name in stripped]
    if len({len(each) for each in pieces}) != 1:
        return stripped[0]
    columns = list(zip(*pieces, strict=True))
    return ".".join(column[0] if len(set(column)) == 1 else _joined(column) for column in columns)


def _joined(words: Sequence[str]) -> str:
    """`q_proj, k_proj, v_proj` -> `qkv_proj`; `gate_proj, up_proj` -> `gate_up_proj`."""
    words = list(dict.fromkeys(words))
    heads = [word.split("_") for word in words]
    tail = 0
    while tail < min(map(len, heads)) - 1 and len({head[len(head) - 1 - tail] for head in heads}) == 1:
        tail += 1
    fronts = ["_".join(head[: len(head) - tail]) for head in heads]
    glue = "" if all(len(front) == 1 for front in fronts) else "_"
    return "_".join([glue.join(fronts), *heads[0][len(heads[0]) - tail:]])
