"""Movement: ops that place elements without computing with them. Indices must lie in 0..size-1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.errors import ShapeError
from llmc.ir.dims import Dim, bounds, ceildiv, format_dim, known_at_least, known_equal, product
from llmc.ir.graph import Node, TensorType, Type
from llmc.ir.ops_core import (
    Array,
    Attribute,
    Attributes,
    Bodies,
    Context,
    Inputs,
    Op,
    axis,
    choice,
    dims,
    integer,
    reject,
    require_broadcast,
    require_integer,
    require_rank,
    require_same_dim,
    require_same_dtype,
    round_to,
    same_shape,
    widen,
)


def _shape_text(shape: Sequence[Dim]) -> str:
    return f"[{', '.join(map(format_dim, shape))}]"


def check_index(op: str, index: Array, size: int) -> Array:
    """The index array; ShapeError if a value lies outside 0..size-1."""
    if index.size and not (index.min() >= 0 and index.max() < size):
        raise ShapeError(f"{op}: index {index.min()}..{index.max()} is outside 0..{size - 1}")
    return index


# ---- shape only --------------------------------------------------------------------------------


def _infer_broadcast(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    require_broadcast("broadcast", inputs, inputs[0].shape, attributes["shape"])
    return TensorType(inputs[0].dtype, attributes["shape"])


def _broadcast(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    return np.broadcast_to(arrays[0], context.shape(node["shape"]))


def _infer_reshape(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    old, new = inputs[0].shape, attributes["shape"]
    if not known_equal(product(old), product(new)):
        reject("reshape", f"{_shape_text(old)} and {_shape_text(new)} may differ in size", inputs)
    return TensorType(inputs[0].dtype, new)


def _reshape(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    return np.asarray(arrays[0]).reshape(context.shape(node["shape"]))


def _infer_transpose(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    permutation, shape = attributes["permutation"], inputs[0].shape
    if tuple(sorted(permutation)) != tuple(range(len(shape))):
        reject("transpose", f"{permutation} is no permutation of {len(shape)} axes", inputs)
    return TensorType(inputs[0].dtype, tuple(shape[i] for i in permutation))


def _transpose(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    return np.transpose(arrays[0], node["permutation"])


def _infer_slice(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """Per axis the interval start <= i < stop, every step-th; step -1 reads it backwards.

    Bounds must satisfy 0 <= start <= stop <= size; what symbols leave open is the user's promise.
    """
    starts, stops, steps = (attributes[name] for name in ("starts", "stops", "steps"))
    old, new = inputs[0].shape, []
    if not len(starts) == len(stops) == len(steps) == len(old):
        reject("slice", f"needs {len(old)} starts, stops and steps", inputs)
    for size, start, stop, step in zip(old, starts, stops, steps, strict=True):
        if not isinstance(step, int) or step == 0 or step < -1:
            reject("slice", f"step {format_dim(step)} is neither positive nor -1", inputs)
        for low, high in ((0, start), (start, stop), (stop, size)):
            if known_at_least(low - 1, high):
                reject("slice", f"{format_dim(start)}:{format_dim(stop)} does not lie in "
                                f"0:{format_dim(size)}", inputs)
        new.append(ceildiv(stop - start, abs(step)))
    return TensorType(inputs[0].dtype, tuple(new))


def _slice(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    starts, stops = context.shape(node["starts"]), context.shape(node["stops"])
    for size, start, stop in zip(arrays[0].shape, starts, stops, strict=True):
        if not 0 <= start <= stop <= size:
            raise ShapeError(f"slice: {start}:{stop} does not lie in 0:{size}")
    forward = tuple(
        slice(start, stop, abs(step))
        for start, stop, step in zip(starts, stops, node["steps"], strict=True)
    )
    backward = tuple(slice(None, None, -1 if step < 0 else 1) for step in node["steps"])
    return arrays[0][forward][backward]


def _infer_concat(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    dtype, along = require_same_dtype("concat", inputs), attributes["axis"]
    shape = list(inputs[0].shape)
    for index, other in enumerate(inputs[1:], 1):
        require_rank("concat", inputs, index, len(shape))
        for position, (a, b) in enumerate(zip(shape, other.shape, strict=True)):
            if position == along:
                shape[along] = a + b
            else:
                require_same_dim("concat", inputs, f"axis {position}", a, b)
    return TensorType(dtype, tuple(shape))


def _concat(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    return np.concatenate(arrays, axis=node["axis"])


def _infer_pad(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    dtype, (low, high) = require_same_dtype("pad", inputs), (attributes["low"], attributes["high"])
    require_rank("pad", inputs, 1, 0)
    if not len(low) == len(high) == inputs[0].rank:
        reject("pad", f"needs {inputs[0].rank} values in low and high", inputs)
    for amount in (*low, *high):
        if bounds(amount)[0] < 0:
            reject("pad", f"{format_dim(amount)} may be negative", inputs)
    sizes = zip(inputs[0].shape, low, high, strict=True)
    return TensorType(dtype, tuple(size + before + after for size, before, after in sizes))


def _pad(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    x, value = arrays
    low, high = context.shape(node["low"]), context.shape(node["high"])
    result = np.full([sum(part) for part in zip(x.shape, low, high, strict=True)], value, x.dtype)
    result[tuple(slice(a, a + size) for a, size in zip(low, x.shape, strict=True))] = x
    return result


# ---- gathers -----------------------------------------------------------------------------------


def _infer_gather(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    require_integer("gather", inputs, 1)
    along, (x, index) = attributes["axis"], inputs
    return TensorType(x.dtype, x.shape[:along] + index.shape + x.shape[along + 1 :])


def _gather(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    x, index = arrays
    index = check_index("gather", np.asarray(index), x.shape[node["axis"]])
    return np.take(x, index.astype(np.int64), axis=node["axis"])


def _infer_gather_elements(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    require_integer("gather_elements", inputs, 1)
    require_rank("gather_elements", inputs, 1, inputs[0].rank)
    return TensorType(inputs[0].dtype, inputs[1].shape)


def elements_index(index: Array, along: int) -> tuple[Array, ...]:
    """The index tuple that addresses element (i0, .., index[i0, .., in], .., in) along the axis."""
    grid = list(np.indices(index.shape, sparse=True))
    grid[along] = index.astype(np.int64)
    return tuple(grid)


def _gather_elements(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    x, index = arrays
    check_index("gather_elements", index, x.shape[node["axis"]])
    return x[elements_index(index, node["axis"])]


def _index_depth(op: str, inputs: Inputs, batch_dims: int) -> int:
    """How many axes of x (after the batch axes) the last axis of the index addresses."""
    require_integer(op, inputs, 1)
    if inputs[1].rank <= batch_dims:
        reject(op, f"the index must have more than {batch_dims} axes", inputs)
    depth = inputs[1].shape[-1]
    if not isinstance(depth, int) or not 0 < depth <= inputs[0].rank - batch_dims:
        reject(op, f"the index's last axis must be in 1..{inputs[0].rank - batch_dims}", inputs)
    return depth


def _infer_gather_nd(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    (x, index), batch = inputs, attributes["batch_dims"]
    depth = _index_depth("gather_nd", inputs, batch)
    for a, b in zip(x.shape[:batch], index.shape[:batch], strict=True):
        require_same_dim("gather_nd", inputs, "batch axes", a, b)
    return TensorType(x.dtype, index.shape[:-1] + x.shape[batch + depth :])


def _nd_index(op: str, index: Array, sizes: Sequence[int], batch: int) -> tuple[Array, ...]:
    leading = np.indices(index.shape[:-1], sparse=True)[:batch] if batch else ()
    parts = [index[..., i].astype(np.int64) for i in range(index.shape[-1])]
    for part, size in zip(parts, sizes[batch:], strict=False):
        check_index(op, part, size)
    return (*leading, *parts)


def _gather_nd(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    x, index = arrays
    return x[_nd_index("gather_nd", index, x.shape, node["batch_dims"])]


# ---- scatters ----------------------------------------------------------------------------------

_SCATTER = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _scatter(node: Node, arrays: Sequence[Array], index: tuple[Array, ...],
             context: Context) -> Array:
    """With reduction "none", the last of several updates of one element stays."""
    x, updates = arrays[0], arrays[2]
    if node["reduction"] == "none":
        result = np.array(x)
        result[index] = updates
        return result
    result = np.array(widen(x, node.dtype, context.exact))
    _SCATTER[node["reduction"]].at(result, index, widen(updates, node.dtype, context.exact))
    return round_to(result, node.dtype, context.exact)


def _infer_scatter_nd(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    x, index, updates = inputs
    depth = _index_depth("scatter_nd", inputs, 0)
    wanted = index.shape[:-1] + x.shape[depth:]
    if updates.dtype is not x.dtype or not same_shape(updates.shape, wanted):
        reject("scatter_nd", f"updates must be {x.dtype}{_shape_text(wanted)}", inputs)
    return x.type


def _scatter_nd(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    index = _nd_index("scatter_nd", arrays[1], arrays[0].shape, 0)
    return _scatter(node, arrays, index, context)


def _infer_scatter_elements(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    x, index, updates = inputs
    require_integer("scatter_elements", inputs, 1)
    require_rank("scatter_elements", inputs, 1, x.rank)
    if updates.dtype is not x.dtype or not same_shape(updates.shape, index.shape):
        wanted = f"{x.dtype}{_shape_text(index.shape)}"
        reject("scatter_elements", f"updates must be {wanted}", inputs)
    return x.type


def _scatter_elements(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    index, along = arrays[1], node["axis"]
    check_index("scatter_elements", index, arrays[0].shape[along])
    return _scatter(node, arrays, elements_index(index, along), context)


def _permutation(op: str, name: str, value: object, inputs: Inputs) -> tuple[int, ...]:
    return tuple(integer(op, name, each, inputs) for each in dims(op, name, value, inputs))


def _batch_dims(op: str, name: str, value: object, inputs: Inputs) -> int:
    batch = integer(op, name, value, inputs)
    if not 0 <= batch < inputs[0].rank:
        reject(op, f"batch_dims {batch} is outside 0..{inputs[0].rank - 1}", inputs)
    return batch


_AXIS = Attribute(axis)
_DIMS = Attribute(dims)
_REDUCTION = Attribute(choice("none", *_SCATTER), "none")

TABLE = [
    Op("broadcast", _infer_broadcast, _broadcast, arity=(1, 1), attributes={"shape": _DIMS}),
    Op("reshape", _infer_reshape, _reshape, arity=(1, 1), attributes={"shape": _DIMS}),
    Op("transpose", _infer_transpose, _transpose, arity=(1, 1),
       attributes={"permutation": Attribute(_permutation)}),
    Op("slice", _infer_slice, _slice, arity=(1, 1),
       attributes={"starts": _DIMS, "stops": _DIMS,
                   "steps": Attribute(dims, lambda inputs: (1,) * inputs[0].rank)}),
    Op("concat", _infer_concat, _concat, arity=(1, None), attributes={"axis": _AXIS}),
    Op("pad", _infer_pad, _pad, arity=(2, 2), attributes={"low": _DIMS, "high": _DIMS}),
    Op("gather", _infer_gather, _gather, arity=(2, 2), attributes={"axis": Attribute(axis, 0)}),
    Op("gather_elements", _infer_gather_elements, _gather_elements, arity=(2, 2),
       attributes={"axis": _AXIS}),
    Op("gather_nd", _infer_gather_nd, _gather_nd, arity=(2, 2),
       attributes={"batch_dims": Attribute(_batch_dims, 0)}),
    Op("scatter_nd", _infer_scatter_nd, _scatter_nd, arity=(3, 3),
       attributes={"reduction": _REDUCTION}),
    Op("scatter_elements", _infer_scatter_elements, _scatter_elements, arity=(3, 3),
       attributes={"axis": _AXIS, "reduction": _REDUCTION}),
]
