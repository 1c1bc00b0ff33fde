"""quantize_cache: paged caches hold 8-bit codes, with a scale for each token and head.

    cache_append(k) -> cache_append(round(k / scale)), cache_append(scale), scale = max |k| / 127
"""

from __future__ import annotations

from dataclasses import replace

from llmc.ir.dtypes import DType, bf16, f32, i8
from llmc.ir.graph import Graph, Node, TensorType, map_graph, with_inputs
from llmc.ir.ops import cast, constant, make

SCALES = bf16  # f32's range; codes are rounded with the scale as it is stored
LARGEST = 127


def quantize_cache(graph: Graph) -> Graph:
    """The graph whose attention reads codes. Caches that anything else reads too, or that are
    written otherwise than by one append, stay as they are."""
    states = _caches(graph)
    if not states:
        return graph
    made: dict[Node, tuple[Node, Node]] = {}  # state -> its codes and scales after the step

    def coded(node: Node) -> Node | None:
        if node.op == "cache_append" and node.inputs[0] in states:
            made[node.inputs[0]] = _coded(node)
        if node.op != "paged_attention" or node.inputs[1].inputs[0] not in states:
            return None
        keys, values = (made[each.inputs[0]] for each in node.inputs[1:3])
        return with_inputs(node, (node.inputs[0], keys[0], values[0], *node.inputs[3:],
                                  keys[1], values[1]))

    changed = map_graph(graph, coded)
    updates: list[tuple[Node, Node]] = []
    for state, value in changed.updates:
        updates += [(each.inputs[0], each) for each in made[state]] if state in made else [
            (state, value)]
    return replace(changed, updates=tuple(updates))


def _caches(graph: Graph) -> set[Node]:
    """States that become codes: each written by one append, and read by attention alone."""
    users = graph.users()
    grown = {value: state for state, value in graph.updates
             if value.op == "cache_append" and value.inputs[0] is state
             and users[state] == [value] and value.inputs[1].dtype.is_float
             and all(each.op == "paged_attention" for each in users[value])}
    pairs = [node.inputs[1:3] for node in graph.nodes() if node.op == "paged_attention"]
    alone = {each for pair in pairs for each in pair if not all(other in grown for other in pair)}
    return {state for value, state in grown.items() if value not in alone and users[value]}


def _coded(append: Node) -> tuple[Node, Node]:
    """The states of codes and of scales, as they are after the append."""
    state, values, *places = append.inputs
    wide = cast(values, f32)
    largest = make("reduce_max", make("abs", wide), axes=(2,), keep=True)
    scale = cast(make("mul", largest, constant(1 / LARGEST, f32)), SCALES)
    divisor = cast(scale, f32)
    empty = make("equal", divisor, constant(0, f32))
    inverse = make("reciprocal", make("where", empty, constant(1, f32), divisor))
    codes = cast(make("round", make("mul", wide, inverse)), i8)
    return (make("cache_append", _state(state, i8, "", state.shape), codes, *places),
            make("cache_append", _state(state, SCALES, ".scales", (*state.shape[:3], 1)), scale,
                 *places))


def _state(like: Node, dtype: DType, suffix: str, shape: tuple) -> Node:
    return make("state", name=like["name"] + suffix, type=TensorType(dtype, shape),
                kind=like["kind"], group=like["group"])
