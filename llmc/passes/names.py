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
    pieces = [word.split("_") for word in dict.fromkeys(words)]
    head = _common(pieces)
    tail = _common([each[head:][::-1] for each in pieces])
    different = ["_".join(each[head : len(each) - tail]) for each in pieces]
    glue = "" if all(len(each) == 1 and each.isalpha() for each in different) else "_"
    first = pieces[0]
    return "_".join([*first[:head], glue.join(different), *first[len(first) - tail :]])


def _common(pieces: Sequence[Sequence[str]]) -> int:
    """How many leading pieces all have in common, leaving each at least one of its own."""
    count = 0
    while all(len(each) > count + 1 for each in pieces) and len(
            {each[count] for each in pieces}) == 1:
        count += 1
    return count
