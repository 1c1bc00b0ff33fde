import copy
import gc
import pickle
import struct
import sys
import threading

import numpy as np
import pytest

from llmc.errors import GraphError
from llmc.ir import graph as graph_module
from llmc.ir.dims import symbol
from llmc.ir.dtypes import bf16, f32, i32
from llmc.ir.graph import (
    Graph,
    Origin,
    TensorType,
    intern_node,
    map_graph,
    merge_origins,
    origin_of,
    rebuild,
    set_origin,
    substitute_symbols,
    walk,
)
from llmc.ir.ops import constant, make

tokens = symbol("tokens", 1, 8192)
F = TensorType(f32, (tokens, 8))


def leaf(name="x", type=F):
    return make("input", name=name, type=type)


def test_tensor_types():
    assert str(TensorType(bf16, (tokens, 2048))) == "bf16[tokens, 2048]"
    assert str(TensorType(f32, ())) == "f32[]"
    assert TensorType(f32, (np.int64(3), tokens * 2)) == TensorType(f32, (3, 2 * tokens))
    assert TensorType(f32, (3,)) != TensorType(i32, (3,))
    with pytest.raises(GraphError):
        TensorType(f32, (-1,))


def test_nodes_are_interned():
    x = leaf()
    assert make("exp", x) is make("exp", x)
    assert make("exp", x) is not make("log", x)
    assert leaf("x") is not leaf("y")
    assert (x.dtype, x.shape, x.rank) == (f32, (tokens, 8), 2)


def node_of(value):
    return intern_node("test", {"value": value}, (), (), F)


def test_attribute_keys_tell_types_and_bits_apart():
    values = [0, False, 0.0, -0.0, 1, True, 1.0, "1", b"1", (1,), (1.0,), (True,), ((1,),), tokens]
    nodes = [node_of(value) for value in values]
    assert len(set(nodes)) == len(values)
    for node, value in zip(nodes, values, strict=True):
        assert type(node["value"]) is type(value)
    assert struct.pack("<d", node_of(-0.0)["value"]) == struct.pack("<d", -0.0)


def test_nan_equals_itself_by_bits():
    other = struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000001))[0]
    assert node_of(float("nan")) is node_of(float("nan"))
    assert node_of(other) is not node_of(float("nan"))
    assert node_of((float("nan"), 1)) is node_of((float("nan"), 1))


def test_attributes_become_plain_values():
    node = node_of([np.int64(3), np.float64(0.5), "a", [1, 2]])
    assert node["value"] == (3, 0.5, "a", (1, 2))
    assert [type(each) for each in node["value"]] == [int, float, str, tuple]
    for bad in (None, {1: 2}, object(), (1, None)):
        with pytest.raises(GraphError, match="value"):
            node_of(bad)


def test_attribute_access():
    node = set_origin(make("softmax", leaf(), axis=1), Origin(node="/layers.0/Softmax"))
    assert node["axis"] == 1
    assert node.get_attribute("axis") == 1
    assert node.get_attribute("missing", 17) == 17
    with pytest.raises(GraphError, match=r"softmax.*/layers\.0/Softmax.*'missing'"):
        node["missing"]


def test_nodes_are_immutable_and_copied_by_reference():
    node = leaf()
    with pytest.raises(AttributeError):
        node.op = "other"
    with pytest.raises(AttributeError):
        node.extra = 1
    assert copy.deepcopy(node) is node and copy.copy(node) is node
    with pytest.raises(TypeError):
        pickle.dumps(node)


def test_a_tuple_has_no_shape():
    node = intern_node("test", {}, (), (), (F, F))
    assert repr(node) == "<test : (f32[tokens, 8], f32[tokens, 8])>"
    with pytest.raises(GraphError, match="tuple"):
        _ = node.shape


def test_graphs_are_equal_by_parts():
    x = leaf()
    first = Graph("g", (x,), (("y", make("exp", x)),))
    second = Graph("g", [x], [["y", make("exp", x)]])
    assert first == second and hash(first) == hash(second)
    assert first != Graph("h", (x,), (("y", make("exp", x)),))
    assert first != Graph("g", (x,), (("z", make("exp", x)),))
    fused = [make("fusion", x, bodies=[body], anchor="map") for body in (first, second)]
    assert fused[0] is fused[1]


def test_nodes_are_in_depth_first_post_order():
    x, y = leaf("x"), leaf("y")
    a = make("exp", x)
    b = make("add", y, a)
    c = make("mul", a, b)
    graph = Graph("g", (x, y), (("c", c), ("a", a)))
    assert graph.nodes() == (x, a, y, b, c)
    assert list(walk([b])) == [y, x, a, b]
    assert graph.users() == {x: [a], a: [b, c], y: [b], b: [c], c: []}


def test_a_user_is_listed_once():
    x = leaf()
    square = make("mul", x, x)
    assert Graph("g", (x,), (("y", square),)).users()[x] == [square]


def test_an_unread_input_has_no_users():
    x, y = leaf("x"), leaf("y")
    graph = Graph("g", (x, y), (("y", make("exp", x)),))
    assert graph.users()[y] == []
    assert y not in graph.nodes()


def layered():
    """A repeat whose body holds a parameter and a symbol of its own."""
    width = symbol("width", 1, 9)
    x = leaf()
    weight = make("parameter", name="w.{}", type=TensorType(f32, (8,)), names=("w.0", "w.1"))
    size = make("dim", value=width, dtype=f32)
    body = Graph("body", (x,), (("x", make("mul", make("mul", x, weight), size)),))
    turns = make("repeat", x, bodies=[body], count=2, carried=1)
    head = make("parameter", name="head", type=TensorType(f32, (8,)))
    return Graph("g", (x,), (("y", make("add", turns, head)),)), weight, head, width


def test_parameters_and_symbols_include_bodies():
    graph, weight, head, width = layered()
    assert graph.parameters() == (weight, head)
    assert graph.symbols() == (tokens, width)
    assert graph.states() == ()


def test_rebuild_infers_types_again_and_keeps_origins():
    x = leaf("x", TensorType(f32, (tokens, 8)))
    wide = leaf("x", TensorType(f32, (tokens, 17)))
    y = set_origin(make("exp", x), Origin(node="Exp_3"))
    graph = Graph("g", (x,), (("y", make("reduce_sum", y, axes=(1,), keep=True)),))
    new = rebuild(graph, {x: wide})
    assert new.inputs == (wide,)
    assert new.nodes()[1].shape == (tokens, 17)
    assert origin_of(new.nodes()[1]) == Origin(node="Exp_3")
    assert rebuild(graph, {}) == graph


def test_rebuild_takes_replacements_as_they_are():
    x = leaf()
    y = make("exp", x)
    graph = Graph("g", (x,), (("y", make("neg", y)),))
    new = rebuild(graph, {y: make("abs", y)})
    assert new.outputs[0][1] is make("neg", make("abs", y))
    assert new.inputs == (x,)


def test_rebuild_replaces_states_in_updates():
    narrow, wide = (make("state", name="k", type=TensorType(f32, (n,))) for n in (3, 5))
    graph = Graph("g", (), (), ((narrow, make("neg", narrow)),))
    assert rebuild(graph, {narrow: wide}).updates == ((wide, make("neg", wide)),)


def test_map_graph_is_bottom_up():
    x = leaf()
    graph = Graph("g", (x,), (("y", make("exp", make("exp", x))),))

    def exp_to_log(node):
        return make("log", node.inputs[0]) if node.op == "exp" else None

    assert map_graph(graph, exp_to_log).outputs[0][1] is make("log", make("log", x))


def test_rebuilding_keeps_the_prelude():
    graph, _, head, _ = layered()
    maker = Graph("maker", (), (("head", make("exp", head)),))
    with_prelude = Graph("g", graph.inputs, graph.outputs, prelude=(("head", maker),))
    assert with_prelude != graph
    assert map_graph(with_prelude, lambda node: None) == with_prelude


def test_substituted_symbols_reach_bodies_and_attributes():
    graph, _, _, width = layered()
    fixed = substitute_symbols(graph, {tokens: 17, "width": 3})
    assert fixed.symbols() == ()
    assert str(fixed.inputs[0].type) == "f32[17, 8]"
    assert fixed.outputs[0][1].shape == (17, 8)
    assert width in graph.symbols()


def test_origins_merge_and_are_weak():
    a, b = make("exp", leaf("a")), make("exp", leaf("b"))
    set_origin(a, Origin(file="m.onnx", node="A"))
    merge_origins(b, make("log", b), a)
    assert origin_of(b) == Origin(file="m.onnx", node="A")
    set_origin(b, Origin(node="B"))
    merge_origins(b, a)
    assert origin_of(b) == Origin(node="B")
    assert str(origin_of(a)) == "A, m.onnx"
    count = len(graph_module._origins)
    del a, b
    gc.collect()
    assert len(graph_module._origins) <= count - 2


def test_the_intern_table_is_weak():
    gc.collect()
    before = len(graph_module._table)
    held = [make("exp", leaf(f"only here {i}")) for i in range(33)]
    assert len(graph_module._table) >= before + 66
    del held
    gc.collect()
    assert len(graph_module._table) <= before


def test_threads_get_the_same_node():
    found = []
    start = threading.Barrier(4)

    def build():
        start.wait()
        node = leaf("shared by threads")
        for _ in range(300):
            node = make("neg", node)
        found.append(node)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1


def test_deep_graphs_do_not_recurse():
    from llmc.ir.text import format_graph

    depth = 100_000
    assert depth > sys.getrecursionlimit()
    x = node = leaf("deep")
    for _ in range(depth):
        node = intern_node("neg", (), (node,), (), F)
    graph = Graph("g", (x,), (("y", node),))
    assert len(graph.nodes()) == depth + 1
    assert len(graph.users()) == depth + 1
    assert format_graph(graph).count("\n") == depth + 3
    y = leaf("other")
    assert rebuild(graph, {x: y}).nodes()[0] is y
    assert repr(node) == "<neg : f32[tokens, 8]>"
    del graph, node, x
    gc.collect()
    assert leaf("deep").get_attribute("name") == "deep"


def test_wide_sharing_is_walked_once():
    node = constant(1.0)
    for _ in range(200):  # 2**200 paths
        node = make("add", node, node)
    assert len(Graph("g", (), (("y", node),)).nodes()) == 201
