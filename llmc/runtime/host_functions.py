"""What the host computes itself: text, which no program takes.

A function takes the arrays of a node's inputs (None where one is left out) and its attributes, and
gives the arrays of its outputs. Text is an array of dtype object that holds str.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.errors import ModelError, ShapeError

Array = np.ndarray[Any, Any]
Attributes = Mapping[str, Any]
HostFunction = Callable[[Sequence[Any], Attributes], list[Array]]


def text(items: Any, shape: tuple[int, ...]) -> Array:
    """An array of text of that shape."""
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def mapped(function: Callable[[str], Any], x: Array) -> Array:
    return text([function(each) for each in x.reshape(-1)], x.shape)


# ---- text ---------------------------------------------------------------------------------------


def string_concat(inputs: Sequence[Any], attributes: Attributes) -> list[Array]:
    """Both texts, joined, for each pair of broadcast items."""
    a, b = np.broadcast_arrays(inputs[0].astype(object), inputs[1].astype(object))
    return [text([x + y for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True)], a.shape)]


def string_split(inputs: Sequence[Any], attributes: Attributes) -> list[Array]:
    """(the parts on a new last axis, "" behind them; how many there are)."""
    x = inputs[0]
    limit = int(attributes.get("maxsplit", -1))
    parts = [str(each).split(attributes.get("delimiter") or None, limit) for each in x.reshape(-1)]
    counts = np.array([len(each) for each in parts], np.int64)
    width = int(counts.max(initial=0))
    padded = [item for each in parts for item in [*each, *[""] * (width - len(each))]]
    return [text(padded, (*x.shape, width)), counts.reshape(x.shape)]


def regex_full_match(inputs: Sequence[Any], attributes: Attributes) -> list[Array]:
    """Whether a pattern matches a whole text, by Python's `re`."""
    pattern = attributes.get("pattern", "")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ModelError(f"RegexFullMatch: pattern {pattern!r}: {error}") from error
    return [mapped(lambda each: compiled.fullmatch(each) is not None, inputs[0]).astype(np.bool_)]


def without_accents(word: str) -> str:
    """The word without marks that combine with letters."""
    if word.isascii():
        return word
    return "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))


CASES: dict[str, Callable[[str], str]] = {"LOWER": str.lower, "UPPER": str.upper, "NONE": str}


def string_normalizer(inputs: Sequence[Any], attributes: Attributes) -> list[Array]:
    """Without stop words and empty items, in upper or lower case; "" if nothing is left."""
    x = inputs[0]
    change = attributes.get("case_change_action", "NONE")
    if change not in CASES or x.ndim not in (1, 2) or (x.ndim == 2 and x.shape[0] != 1):
        raise ShapeError(f"StringNormalizer: case_change_action={change!r}, shape {x.shape}")
    exact = bool(attributes.get("is_case_sensitive", 0))
    stops = set(attributes.get("stopwords", ()))
    stops = stops if exact else {CASES[change](word) for word in stops}

    def normalized(item: str) -> str:
        item = without_accents(item)
        item = item if exact else CASES[change](item)
        if stops:
            item = " ".join(word for word in item.split(" ") if word not in stops)
        return CASES[change](item) if exact else item

    found = [each for each in map(normalized, x.reshape(-1)) if each] or [""]
    return [text(found, (1,) * (x.ndim - 1) + (len(found),))]


# ---- n-grams ------------------------------------------------------------------------------------


def tf_idf_vectorizer(inputs: Sequence[Any], attributes: Attributes) -> list[Array]:
    """How often each n-gram of the pool occurs in each row, with up to max_skip_count items left
    out between two; weighted, or only whether it does."""
    x = inputs[0]
    columns = list(attributes["ngram_indexes"])
    pool = _pool(attributes)
    result = np.zeros((x.shape[0] if x.ndim == 2 else 1, max(columns) + 1), np.float32)
    for number, row in enumerate(x.reshape(result.shape[0], -1).tolist()):
        for gram, count in _grams(row, attributes).items():
            if gram in pool:
                result[number, columns[pool[gram]]] += count
    mode = attributes["mode"]
    weights = np.ones(result.shape[1], np.float32)
    if "weights" in attributes and mode != "TF":
        weights[columns] = np.asarray(attributes["weights"], np.float32)
    if mode == "IDF":
        result = (result > 0).astype(np.float32)
    return [(result * weights).reshape(result.shape if x.ndim == 2 else -1)]


def _pool(attributes: Attributes) -> dict[tuple[Any, ...], int]:
    """n-gram -> its number: first all of one item, then all of two ..."""
    items = list(attributes.get("pool_int64s") or attributes.get("pool_strings") or ())
    starts = [*attributes["ngram_counts"], len(items)]
    pool: dict[tuple[Any, ...], int] = {}
    number = 0
    for size, (start, stop) in enumerate(itertools.pairwise(starts), 1):
        for place in range(start, stop - size + 1, size):
            pool[tuple(items[place : place + size])] = number
            number += 1
    return pool


def _grams(row: list[Any], attributes: Attributes) -> Counter[tuple[Any, ...]]:
    counts: Counter[tuple[Any, ...]] = Counter()
    low, high = int(attributes["min_gram_length"]), int(attributes["max_gram_length"])
    for size in range(low, high + 1):
        skips = range(1, int(attributes["max_skip_count"]) + 2) if size > 1 else (1,)
        for step in skips:
            for start in range(len(row) - (size - 1) * step):
                counts[tuple(row[start : start + size * step : step])] += 1
    return counts


# ---- what takes text as it is -------------------------------------------------------------------


def cast_text(inputs: Sequence[Any], attributes: Attributes) -> list[Array]:
    """Text to numbers (`to`: ONNX's number of the dtype), or numbers to text."""
    x = inputs[0]
    if x.dtype.kind not in "OUS":
        return [mapped(str, x)]
    wanted = NUMBERS.get(int(attributes.get("to", 0)))
    if wanted is None:
        return [x]
    if wanted.kind == "b":
        return [mapped(lambda each: bool(float(each)), x).astype(wanted)]
    return [mapped(int if wanted.kind in "iu" else float, x).astype(wanted)]


NUMBERS = {code: np.dtype(name) for code, name in {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64"}.items()}


def cast_like(inputs: Sequence[Any], attributes: Attributes) -> list[Array]:
    codes = {dtype: code for code, dtype in NUMBERS.items()}
    return cast_text(inputs[:1], {"to": codes.get(inputs[1].dtype, 0)})


def constant(inputs: Sequence[Any], attributes: Attributes) -> list[Array]:
    (value,) = attributes.values()
    items = value if isinstance(value, list) else [value]
    return [value if isinstance(value, np.ndarray) else text(
        items, (len(items),) if isinstance(value, list) else ())]


def label_encoder(inputs: Sequence[Any], attributes: Attributes) -> list[Array]:
    """The value of the key that an item is, or the default."""
    keys, values = (_labels(attributes, name) for name in ("keys", "values"))
    is_text = values.dtype == object
    usual: Any = attributes.get("default_tensor")
    if usual is None:
        usual = attributes.get("default_string", "_Unused") if is_text else attributes.get(
            "default_int64", -1) if values.dtype == np.int64 else attributes.get(
            "default_float", -0.0)
    table = dict(zip(keys.tolist(), values.tolist(), strict=True))
    default = np.asarray(usual).reshape(-1).tolist()[0]
    found = text([table.get(each, default) for each in inputs[0].reshape(-1).tolist()],
                 inputs[0].shape)
    return [found if is_text else found.astype(values.dtype)]


def _labels(attributes: Attributes, name: str) -> Array:
    for kind, dtype in (("tensor", None), ("strings", object), ("int64s", np.int64),
                        ("floats", np.float32)):
        if f"{name}_{kind}" in attributes:
            return np.asarray(attributes[f"{name}_{kind}"], dtype)
    raise ModelError(f"LabelEncoder: it has no {name}")


def _axes(inputs: Sequence[Any], attributes: Attributes) -> Any:
    given = inputs[1] if len(inputs) > 1 and inputs[1] is not None else attributes.get("axes")
    return None if given is None else tuple(int(axis) for axis in np.asarray(given).reshape(-1))


def reshape(inputs: Sequence[Any], attributes: Attributes) -> list[Array]:
    x, wanted = inputs[0], [int(each) for each in inputs[1]]
    if not attributes.get("allowzero", 0):
        wanted = [x.shape[axis] if dim == 0 else dim for axis, dim in enumerate(wanted)]
    return [x.reshape(wanted)]


HOST_FUNCTIONS: dict[str, HostFunction] = {
    "Cast": cast_text,
    "CastLike": cast_like,
    "Concat": lambda inputs, attributes: [np.concatenate(inputs, int(attributes["axis"]))],
    "Constant": constant,
    "Equal": lambda inputs, attributes: [np.asarray(inputs[0] == inputs[1], np.bool_)],
    "Gather": lambda inputs, attributes: [
        np.take(inputs[0], inputs[1], axis=int(attributes.get("axis", 0)))],
    "Identity": lambda inputs, attributes: [inputs[0]],
    "LabelEncoder": label_encoder,
    "RegexFullMatch": regex_full_match,
    "Reshape": reshape,
    "Squeeze": lambda inputs, attributes: [np.squeeze(inputs[0], _axes(inputs, attributes))],
    "StringConcat": string_concat,
    "StringNormalizer": string_normalizer,
    "StringSplit": string_split,
    "TfIdfVectorizer": tf_idf_vectorizer,
    "Unsqueeze": lambda inputs, attributes: [
        np.expand_dims(inputs[0], _axes(inputs, attributes))],
}
