"""Rules of raise_patterns for masks: what exporters compute from index ramps is proved instead.

A ramp is a tensor whose elements are their own index along one axis.
"""

from __future__ import annotations

from functools import reduce

from llmc.ir.dims import Dim, bounds, known_at_least, known_equal
from llmc.ir.dtypes import bool_
from llmc.ir.graph import Node
from llmc.ir.ops import constant, make
from llmc.passes.match import scalar_of, uniform_value
from llmc.passes.rewrite import Rule, rule, with_inputs

LOW = -1e4  # what is added to hide a key is at most that

# ---- ramps -------------------------------------------------------------------------------------


def ramp_axis(node: Node) -> int | None:
    """The axis whose index every element is; None if the node is no ramp."""
    if node.op == "iota":
        return int(node["axis"]) % node.rank
    if node.op == "broadcast":
        axis = ramp_axis(node.inputs[0])
        if axis is None or not known_equal(
            node.inputs[0].shape[axis], node.shape[axis + node.rank - node.inputs[0].rank]
        ):
            return None
        return axis + node.rank - node.inputs[0].rank
    return _reshaped_axis(node) if node.op == "reshape" else None


def _reshaped_axis(node: Node) -> int | None:
    """Where a ramp's axis goes in a reshape that only adds or drops axes of 1."""
    source = node.inputs[0]
    axis = ramp_axis(source)
    if axis is None:
        return None
    old = [i for i, size in enumerate(source.shape) if size != 1]
    new = [i for i, size in enumerate(node.shape) if size != 1]
    same = len(old) == len(new) and all(
        known_equal(source.shape[i], node.shape[j]) for i, j in zip(old, new, strict=True)
    )
    return new[old.index(axis)] if same and axis in old else None


def shifted_ramp(node: Node) -> tuple[int, Dim] | None:
    """(axis, offset) of a ramp plus a number, or of a view of that."""
    axis = ramp_axis(node)
    if axis is not None:
        return axis, 0
    if node.op == "reshape":
        return _shifted_view(node)
    if node.op not in ("add", "sub"):
        return None
    found, offset = shifted_ramp(node.inputs[0]), _number(node.inputs[1])
    if found is None or offset is None or node.inputs[0].shape != node.shape:
        return None
    return found[0], found[1] + offset if node.op == "add" else found[1] - offset


def _shifted_view(node: Node) -> tuple[int, Dim] | None:
    """A reshape of ramp + offset: the offset, and the axis of the reshaped ramp."""
    source = node.inputs[0]
    found = shifted_ramp(source)
    if found is None:
        return None
    ramp = make("iota", dtype=source.dtype, shape=source.shape, axis=found[0])
    axis = ramp_axis(make("reshape", ramp, shape=node.shape))
    return None if axis is None else (axis, found[1])


def _number(node: Node) -> Dim | None:
    """The integer that all elements equal."""
    while node.op in ("reshape", "broadcast"):
        node = node.inputs[0]
    return scalar_of(node)


@rule("gather_nd")
def grid_of_ramps(node: Node) -> Node | None:
    """gather_nd(x, every index of x in order) -> x, broadcast"""
    x, index = node.inputs
    if index.op != "concat" or node["batch_dims"] or index["axis"] != index.rank - 1:
        return None
    if len(index.inputs) != x.rank or any(part.shape[-1] != 1 for part in index.inputs):
        return None
    return _in_order(x, [ramp_axis(part) for part in index.inputs], node.shape)


@rule("gather")
def flat_grid_of_ramps(node: Node) -> Node | None:
    """gather(reshape(x[b, t], [b * t, 1]), ramp(t) + ramp(b) * t) -> x, broadcast"""
    flat, index = node.inputs
    if flat.op != "reshape" or index.op != "add" or node["axis"] or flat.rank != 2:
        return None
    x = flat.inputs[0]
    if x.rank != 2 or flat.shape[1] != 1:
        return None
    for column, scaled in (index.inputs, index.inputs[::-1]):
        if scaled.op != "mul" or not _is_number(scaled.inputs[1], x.shape[1]):
            continue
        axes = [_axis_in(index, each) for each in (scaled.inputs[0], column)]
        found = _in_order(x, axes, index.shape)
        return None if found is None else make("reshape", found, shape=node.shape)
    return None


def _is_number(node: Node, size: Dim) -> bool:
    number = _number(node)
    return number is not None and known_equal(number, size)


def _axis_in(whole: Node, part: Node) -> int | None:
    """A ramp's axis, in a result that it is broadcast to."""
    axis = ramp_axis(part)
    return None if axis is None else axis + whole.rank - part.rank


def _in_order(x: Node, axes: list[int | None], shape: tuple[Dim, ...]) -> Node | None:
    """x with its axes at these places of the shape, broadcast along the others."""
    places = [axis for axis in axes if axis is not None]
    if len(places) != x.rank or places != sorted(set(places)):
        return None
    if not all(known_equal(size, shape[axis]) for size, axis in zip(x.shape, places, strict=True)):
        return None
    lifted = [x.shape[places.index(axis)] if axis in places else 1 for axis in range(len(shape))]
    return make("broadcast", make("reshape", x, shape=tuple(lifted)), shape=shape)


# ---- comparisons -------------------------------------------------------------------------------


@rule("greater_equal")
def ramp_is_not_negative(node: Node) -> Node | None:
    """ramp + n >= c -> true, for n >= c"""
    found, least = shifted_ramp(node.inputs[0]), uniform_value(node.inputs[1])
    if found is None or least is None or bounds(found[1])[0] < least:
        return None
    return make("broadcast", constant(True, bool_), shape=node.shape)


@rule("and")
def true_and(node: Node) -> Node | None:
    """x & true -> x"""
    for known, other in (node.inputs, node.inputs[::-1]):
        if uniform_value(known) == 1:
            missing = node.rank - other.rank
            wide = [1] * missing + list(other.shape)
            return make("broadcast", make("reshape", other, shape=tuple(wide)), shape=node.shape)
    return None


@rule("where")
def where_of_broadcast(node: Node) -> Node | None:
    """where(broadcast(c), a, b) -> broadcast(where(c, a, b)), for numbers a and b"""
    condition, *values = node.inputs
    if condition.op != "broadcast" or any(each.rank for each in values):
        return None
    narrow = make("where", condition.inputs[0], *values)
    return make("broadcast", narrow, shape=node.shape)


# ---- attention ---------------------------------------------------------------------------------


@rule("attention")
def mask_without_broadcast(node: Node) -> Node | None:
    """attention(mask = broadcast(m)) -> attention(mask = m), which broadcasts as it is read"""
    if len(node.inputs) != 4 or node.inputs[3].op != "broadcast":
        return None
    return with_inputs(node, [*node.inputs[:3], node.inputs[3].inputs[0]])


@rule("attention")
def raise_causal_mask(node: Node) -> Node | None:
    """attention(mask = key <= query + t - s, and others) -> attention(causal, mask = others)

    The others may only be split off a bool mask: a query that sees nothing then gives zeros either
    way, whereas numbers that are added would make it see every key alike.
    """
    if len(node.inputs) != 4 or node["causal"] or node["window"]:
        return None
    queries, keys = node.inputs[0].shape[2], node.inputs[1].shape[2]
    mask, added = _condition(node.inputs[3])
    conditions = _conjunction(mask)
    ahead = keys - queries
    causal = [each for each in conditions if _reach(each) is not None
              and known_equal(_reach(each) or 0, ahead)]
    if not causal or (added and not known_at_least(keys, queries)):
        return None
    windows = {each: size for each in conditions
               if (size := _window(each, ahead)) is not None}
    others = [each for each in conditions if each not in causal and each not in windows]
    if len(windows) > 1 or (added and others):
        return None
    operands = [*node.inputs[:3]]
    if others:
        operands.append(reduce(lambda a, b: make("and", a, b), others))
    return make("attention", *operands, scale=node["scale"], softcap=node["softcap"], causal=True,
                window=next(iter(windows.values()), 0))


def _condition(mask: Node) -> tuple[Node, bool]:
    """(condition, whether numbers are added) of a bool mask, or of where(condition, 0, low)."""
    if mask.op == "where":
        shown, hidden = (uniform_value(each) for each in mask.inputs[1:])
        if shown == 0 and hidden is not None and hidden <= LOW:
            return mask.inputs[0], True
    return mask, mask.dtype is not bool_


def _conjunction(mask: Node) -> list[Node]:
    """The conditions of which the mask is the conjunction."""
    while mask.op in ("broadcast", "reshape") and _is_leading_only(mask):
        mask = mask.inputs[0]
    if mask.op == "and":
        return [each for part in mask.inputs for each in _conjunction(part)]
    return [mask]


def _is_leading_only(view: Node) -> bool:
    """Whether a view only repeats whole [queries, keys] matrices, or lifts a single one."""
    source = view.inputs[0]
    if source.rank < 2 or source.shape[-2:] != view.shape[-2:]:
        return False
    return view.op == "broadcast" or all(size == 1 for size in source.shape[:-2])


COMPARISONS = ("less_equal", "less", "greater_equal", "greater")


def _sides(node: Node) -> tuple[bool, Dim] | None:
    """(is `<=`, n) for comparisons that say key <= query + n or key >= query + n."""
    if node.op not in COMPARISONS or node.rank < 2:
        return None
    left, right = (_ramp_in(node, each) for each in node.inputs)
    if left is None or right is None or {left[0], right[0]} != {node.rank - 1, node.rank - 2}:
        return None
    at_most = node.op.startswith("less")  # left <= right
    strict = 0 if node.op.endswith("equal") else 1
    if left[0] == node.rank - 1:  # the key stands on the left
        return at_most, right[1] - left[1] + (-strict if at_most else strict)
    return not at_most, left[1] - right[1] + (strict if at_most else -strict)


def _ramp_in(whole: Node, part: Node) -> tuple[int, Dim] | None:
    found = shifted_ramp(part)
    return None if found is None else (found[0] + whole.rank - part.rank, found[1])


def _reach(node: Node) -> Dim | None:
    """n of key <= query + n."""
    sides = _sides(node)
    return sides[1] if sides is not None and sides[0] else None


def _window(node: Node, ahead: Dim) -> int | None:
    """w of key > query + ahead - w."""
    sides = _sides(node)
    if sides is None or sides[0]:
        return None
    size = ahead - sides[1] + 1
    return size if isinstance(size, int) and size > 0 else None


MASK_RULES: list[Rule] = [
    grid_of_ramps, flat_grid_of_ramps, ramp_is_not_negative, true_and, where_of_broadcast,
    mask_without_broadcast, raise_causal_mask,
]
