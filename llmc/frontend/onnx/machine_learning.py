"""Operators of ai.onnx.ml: features, labels, trees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.protobuf import small_array
from llmc.frontend.onnx.registry import Result, converter
from llmc.ir import dims
from llmc.ir.dtypes import i64
from llmc.ir.graph import Node

DOMAIN = "ai.onnx.ml"


@converter("ArrayFeatureExtractor", inputs=2, domain=DOMAIN)
def array_feature_extractor(call: Call) -> Result:
    """Items of the last axis; a vector is one row."""
    x, index = call.input(0), call.input(1)
    index = call.reshape(index, (dims.product(index.shape),))
    found = call.take(x, index, axis=x.rank - 1)
    return call.unsqueeze(found, [0]) if x.rank == 1 else found


@converter("Binarizer", inputs=1, domain=DOMAIN)
def binarizer(call: Call) -> Result:
    x = call.input(0)
    threshold = call.scalar(call.attribute("threshold", 0.0), x.dtype)
    return call.cast(call.binary("greater", x, threshold), x.dtype)


@converter("LabelEncoder", inputs=1, domain=DOMAIN)
def label_encoder(call: Call) -> Result:
    """The value of the key that an item equals (NaN equals NaN), or the default."""
    x = call.input(0)
    keys, values, default = labels(call)
    known = call.constant(keys.astype(x.dtype.numpy), x.dtype)
    item = call.unsqueeze(x, [x.rank])
    equal = call.binary("equal", item, known)
    if x.dtype.is_float:
        both = call.binary("and", call.unary("is_nan", item), call.unary("is_nan", known))
        equal = call.binary("or", equal, both)
    place = call.make("argmax", equal, axis=x.rank, keep=False, last=False)
    found = call.make("gather", call.constant(values), call.cast(place, i64), axis=0)
    hits = call.reduce("reduce_max", equal, [x.rank], keep=False)
    return call.where(hits, found, call.constant(default.astype(values.dtype)))


def labels(call: Call) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Keys, values, and the value of what is no key; numbers only."""
    keys = _table(call, "keys", {"int64s": np.int64, "floats": np.float32})
    values = _table(call, "values", {"int64s": np.int64, "floats": np.float32})
    if "default_tensor" in call.attributes:
        default = small_array(call.attributes["default_tensor"], call.location)[0].reshape(())
    elif values.dtype == np.int64:
        default = np.asarray(call.attribute("default_int64", -1))
    else:
        default = np.asarray(call.attribute("default_float", -0.0))
    if keys.size != values.size or not keys.size:
        raise call.error(f"{keys.size} keys for {values.size} values")
    return keys, values, default


def _table(call: Call, name: str, kinds: dict[str, Any]) -> np.ndarray[Any, Any]:
    if f"{name}_tensor" in call.attributes:
        return small_array(call.attributes[f"{name}_tensor"], call.location)[0].reshape(-1)
    for suffix, dtype in kinds.items():
        if f"{name}_{suffix}" in call.attributes:
            return np.asarray(call.attributes[f"{name}_{suffix}"], dtype)
    raise call.error(f"its {name} must be numbers")


# ---- trees ---------------------------------------------------------------------------------------

LESS_EQUAL, LESS, GREATER_EQUAL, GREATER, EQUAL, NOT_EQUAL, MEMBER = range(7)
COMPARISONS = {
    LESS_EQUAL: "less_equal", LESS: "less", GREATER_EQUAL: "greater_equal", GREATER: "greater",
    EQUAL: "equal", NOT_EQUAL: "not_equal",
}
AVERAGE, SUM, MINIMUM, MAXIMUM = range(4)
NO_TRANSFORM, SOFTMAX, LOGISTIC = range(3)
REDUCTIONS = {SUM: "reduce_sum", AVERAGE: "reduce_mean", MINIMUM: "reduce_min",
              MAXIMUM: "reduce_max"}


@dataclass(frozen=True)
class Branch:
    """A node of a tree. yes and no: numbers of nodes, or -1 - number of a leaf."""

    feature: int
    mode: int
    split: float
    missing: bool
    yes: int
    no: int


@converter("TreeEnsemble", inputs=1, domain=DOMAIN)
def tree_ensemble(call: Call) -> Result:
    """[rows, features] -> [rows, targets]: all rows descend all trees, one level a step."""
    x = call.input(0)
    if x.rank != 2:
        raise call.error(f"its input has rank {x.rank}, not 2")
    branches, roots = forest(call)
    weights = small_array(call.required("leaf_weights"), call.location)[0].reshape(-1)
    target = np.asarray(call.required("leaf_targetids"), np.int64)
    place = call.broadcast(call.constant(np.asarray(roots, np.int64)), (x.shape[0], len(roots)))
    for _ in range(depth(call, branches, roots)):
        place = descended(call, x, branches, place)
    leaf = call.shifted(call.unary("neg", place), -1)
    value = call.make("gather", call.constant(weights.astype(x.dtype.numpy)), leaf, axis=0)
    owner = call.make("gather", call.constant(target), leaf, axis=0)
    return aggregated(call, value, owner)


def forest(call: Call) -> tuple[list[Branch], list[int]]:
    """All nodes (one that tests membership becomes a chain of tests for equality), and roots."""
    modes = small_array(call.required("nodes_modes"), call.location)[0].reshape(-1).tolist()
    splits = small_array(call.required("nodes_splits"), call.location)[0].reshape(-1).tolist()
    tracks = call.attribute("nodes_missing_value_tracks_true") or [0] * len(modes)
    ends = {side: [-1 - each if leaf else each for each, leaf in zip(
        call.required(f"nodes_{side}nodeids"), call.required(f"nodes_{side}leafs"), strict=True)]
        for side in ("true", "false")}
    branches = [Branch(*fields) for fields in zip(
        call.required("nodes_featureids"), modes, splits, map(bool, tracks), ends["true"],
        ends["false"], strict=True)]
    sets = member_sets(call)
    for number, branch in enumerate(list(branches)):
        if branch.mode == MEMBER:
            expand_members(call, branches, number, next(sets, []))
    return branches, list(call.required("tree_roots"))


def member_sets(call: Call) -> Any:
    """The values of each membership test in turn; NaN ends one."""
    if "membership_values" not in call.attributes:
        return iter(())
    values = small_array(call.attributes["membership_values"], call.location)[0].reshape(-1)
    ends = np.flatnonzero(np.isnan(values)).tolist()
    return (values[start:end].tolist()
            for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False))


def expand_members(call: Call, branches: list[Branch], number: int, members: list[float]) -> None:
    if not members:
        raise call.error(f"node {number} tests membership of an empty set")
    *others, last = members
    branch, no = branches[number], branches[number].no
    for member in others:
        branches.append(replace(branch, mode=EQUAL, split=member, no=no))
        no = len(branches) - 1
    branches[number] = replace(branch, mode=EQUAL, split=last, no=no)


def depth(call: Call, branches: list[Branch], roots: list[int]) -> int:
    """The most steps from a root to a leaf."""
    level, deepest = set(roots), 0
    while level:
        deepest += 1
        if deepest > len(branches) or not level <= set(range(len(branches))):
            raise call.error("its nodes are no trees")
        level = {end for each in level for end in (branches[each].yes, branches[each].no)
                 if end >= 0}
    return deepest


def descended(call: Call, x: Node, branches: list[Branch], place: Node) -> Node:
    """The node (or leaf) below each place [rows, trees]; a leaf stays."""
    at_leaf = call.binary("less", place, call.scalar(0, i64))
    at = call.where(at_leaf, call.scalar(0, i64), place)

    def pick(values: list[Any], dtype: Any) -> Node:
        return call.make("gather", call.constant(np.asarray(values, dtype)), at, axis=0)

    feature = pick([each.feature for each in branches], np.int64)
    value = call.make("gather_elements", x, feature, axis=1)
    split = pick([each.split for each in branches], x.dtype.numpy)
    mode = pick([each.mode for each in branches], np.int64)
    passed = call.binary("and", call.unary("is_nan", value),
                         pick([each.missing for each in branches], np.bool_))
    for kind in sorted({each.mode for each in branches}):
        if kind not in COMPARISONS:
            raise call.error(f"node mode {kind} is not known")
        holds = call.binary(COMPARISONS[kind], value, split)
        of_kind = call.binary("equal", mode, call.scalar(kind, i64))
        passed = call.binary("or", passed, call.binary("and", of_kind, holds))
    yes, no = (pick([getattr(each, side) for each in branches], np.int64) for side in ("yes", "no"))
    return call.where(at_leaf, place, call.where(passed, yes, no))


def aggregated(call: Call, value: Node, owner: Node) -> Node:
    """[rows, trees] of values and the targets that they count for -> [rows, targets]."""
    kind = call.attribute("aggregate_function", SUM)
    transform = call.attribute("post_transform", NO_TRANSFORM)
    if kind not in REDUCTIONS or transform not in (NO_TRANSFORM, SOFTMAX, LOGISTIC):
        raise call.error(f"aggregate {kind} with transform {transform} is not supported")
    targets = call.reshape(call.iota(call.required("n_targets")), (call.required("n_targets"), 1))
    own = call.binary("equal", call.unsqueeze(owner, [1]), targets)
    neutral = {MINIMUM: np.inf, MAXIMUM: -np.inf}.get(kind, 0)
    values = call.where(own, call.unsqueeze(value, [1]), call.scalar(neutral, value.dtype))
    total = call.reduce(REDUCTIONS[kind], values, [2], keep=False)
    if transform == SOFTMAX:
        return call.make("softmax", total, axis=1)
    return call.unary("sigmoid", total) if transform == LOGISTIC else total
