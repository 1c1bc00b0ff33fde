import pytest

from llmc.errors import GraphError
from llmc.ir.dims import symbol
from llmc.ir.dtypes import f32, i32
from llmc.ir.graph import Graph, Origin, TensorType, intern_node, set_origin
from llmc.ir.ops import constant, make
from llmc.ir.text import parse_graph
from llmc.ir.verify import verify

tokens = symbol("tokens", 1, 8192)
F = TensorType(f32, (tokens, 8))
X = make("input", name="x", type=F)

APPEND = """
graph step(values: f32[tokens, 2, 4], pages: i32[s, w], sequence: i32[tokens],
    positions: i32[tokens], offsets: i32[s + 1])
    where tokens in 1..8192, s in 1.., w in 1.., pool in 1.. {
  %0 = state[name="k"] : f32[pool, 32, 2, 4]
  %1 = cache_append(%0, values, pages, sequence, positions)
  BODY
}
"""


def appending(body):
    return parse_graph(APPEND.replace("BODY", body))


def chain(length, bad_at):
    """exp(exp(... x)), the node at `bad_at` of a wrong type."""
    node = X
    for index in range(length):
        if index == bad_at:
            wrong = TensorType(f32, (tokens, 9))
            node = set_origin(intern_node("neg", (), (node,), (), wrong), Origin(node="Neg_7"))
        else:
            node = make("exp", node)
    return Graph("g", (X,), (("y", node),))


def test_good_graphs_pass():
    verify(Graph("g", (X,), (("y", make("exp", X)),)))
    verify(Graph("g", (X,), ()))
    verify(appending("return v = values; update %0 = %1"))


def test_the_error_shows_the_neighbourhood():
    with pytest.raises(GraphError) as error:
        verify(chain(17, 8))
    message, *lines = str(error.value).split("\n")
    assert "neg node (Neg_7)" in message
    assert "f32[tokens, 9] should be f32[tokens, 8]" in message
    assert len(lines) == 11
    assert [line[0] for line in lines] == [" "] * 5 + [">"] + [" "] * 5
    assert lines[5] == ">   %8 = neg(%7) : f32[tokens, 9]"


@pytest.mark.parametrize("bad_at", [0, 2])
def test_the_neighbourhood_ends_where_the_text_does(bad_at):
    with pytest.raises(GraphError) as error:
        verify(chain(3, bad_at))
    lines = str(error.value).split("\n")[1:]
    assert len(lines) == 6
    assert [line for line in lines if line.startswith(">")] == [lines[1 + bad_at]]


def bad_graphs():
    y = make("input", name="y", type=F)
    twin = make("input", name="x", type=TensorType(i32, (3,)))
    good = make("exp", X)
    unknown = intern_node("expo", (), (X,), (), F)
    big = TensorType(f32, (16385,))
    data = {"dtype": f32, "shape": (16385,), "data": bytes(4 * 16385)}
    yield "foreign input", Graph("g", (X,), (("z", make("add", X, y)),)), "not among the inputs"
    yield "input is no input", Graph("g", (good,), ()), "exp node among its inputs"
    yield "inputs of one name", Graph("g", (X, twin), ()), "two inputs named 'x'"
    yield "outputs of one name", Graph("g", (X,), (("y", X), ("y", good))), "two outputs named 'y'"
    yield "unknown op", Graph("g", (X,), (("y", unknown),)), "there is no op 'expo'"
    for what, node, message in (
        ("big constant", intern_node("constant", data, (), (), big), "65540 bytes"),
        ("arity", intern_node("exp", (), (X, X), (), F), "takes 1 inputs, got 2"),
        ("no attribute", intern_node("softmax", (), (X,), (), F), "softmax"),
        ("unknown attribute", intern_node("exp", {"a": 1}, (X,), (), F), "no attribute 'a'"),
        ("not canonical", intern_node("softmax", {"axis": -1}, (X,), (), F), "should be"),
        ("odd attribute", intern_node("transpose", {"permutation": 3}, (X,), (), F), "transpose"),
        ("layer outside", make("layer", dtype=i32), "outside a repeat"),
        (
            "names outside",
            make("parameter", name="w", type=F, names=("a", "b")),
            "outside a repeat",
        ),
    ):
        yield what, Graph("g", (X,), (("y", node),)), message
    state = make("state", name="k", type=F)
    updated = ((state, make("exp", state)),)
    yield "two updates", Graph("g", (), (), (*updated, *updated)), "updated twice"
    yield "no state", Graph("g", (X,), (), ((X, good),)), "no state"
    scalar = ((state, constant(1.0)),)
    yield "other type", Graph("g", (), (), scalar), "state of type"
    weight = make("parameter", name="w", type=F)
    bad_maker = Graph("m", (), (("w", intern_node("expo", (), (weight,), (), F)),))
    yield "prelude", Graph("g", (X,), (), prelude=(("w", bad_maker),)), "there is no op 'expo'"


@pytest.mark.parametrize(
    "graph, message", [pytest.param(graph, m, id=what) for what, graph, m in bad_graphs()]
)
def test_bad_graphs_are_refused(graph, message):
    with pytest.raises(GraphError, match=message):
        verify(graph)


def test_bodies_are_closed():
    y = make("input", name="y", type=F)
    body = Graph("body", (X,), (("z", make("add", X, y)),))
    graph = Graph("g", (X, y), (("z", make("fusion", X, bodies=[body], anchor="map")),))
    with pytest.raises(
        GraphError, match="input 'y' is not among the inputs of graph body"
    ) as error:
        verify(graph)
    assert any(line.startswith(">") for line in str(error.value).split("\n"))


def test_the_culprit_in_a_body_is_marked():
    bad = intern_node("neg", (), (X,), (), TensorType(f32, (3,)))
    body = Graph("body", (X,), (("z", make("reduce_sum", bad, axes=(0,), keep=False)),))
    graph = Graph("g", (X,), (("z", make("fusion", X, bodies=[body], anchor="map")),))
    with pytest.raises(GraphError) as error:
        verify(graph)
    assert ">       %0 = neg(x) : f32[3]" in str(error.value)


@pytest.mark.parametrize("count, good", [(2, True), (3, False)])
def test_names_are_as_many_as_turns(count, good):
    weight = make("parameter", name="w.{}", type=TensorType(f32, (8,)), names=("w.0", "w.1"))
    body = Graph("body", (X,), (("x", make("mul", X, weight)),))
    graph = Graph("g", (X,), (("y", make("repeat", X, bodies=[body], count=count, carried=1)),))
    if good:
        verify(graph)
        return
    with pytest.raises(GraphError, match="2 names in a repeat of 3 turns"):
        verify(graph)


READ = "paged_attention[scale=1.0](values, {0}, {0}, pages, sequence, positions, offsets)"


@pytest.mark.parametrize(
    "body",
    [
        "return; update %0 = %1",
        f"%2 = {READ.format('%1')} return a = %2; update %0 = %1",
        "%2 = cache_append(%1, values, pages, sequence, positions) return; update %0 = %2",
    ],
)
def test_linear_states_pass(body):
    verify(appending(body))


@pytest.mark.parametrize(
    "body, message",
    [
        (f"%2 = {READ.format('%0')} return a = %2; update %0 = %1", "reads a state that a cache"),
        ("%2 = exp(%0) return a = %2; update %0 = %1", "exp node: reads a state"),
        (
            "%2 = cache_append(%0, values, pages, positions, sequence)"
            " return o = %2; update %0 = %1",
            "reads a state",
        ),
        ("return old = %0; update %0 = %1", "overwrites a value that the graph returns"),
        ("return new = %1", "not among the updates"),
        (
            "%2 = cache_append(%1, values, pages, sequence, positions)"
            " return new = %2; update %0 = %1",
            "overwrites a value",
        ),
        (
            "%2 = exp(%1) %3 = cache_append(%2, values, pages, sequence, positions)"
            " return a = %3; update %0 = %1",
            "result of a exp node, which is no state",
        ),
    ],
)
def test_states_are_linear(body, message):
    with pytest.raises(GraphError, match=message):
        verify(appending(body))


FUSED = """
  %9 = fusion[anchor="map"](%0, values, pages, sequence, positions) {{
    graph body(state: f32[pool, 32, 2, 4], v: f32[tokens, 2, 4], p: i32[s, w], q: i32[tokens],
               r: i32[tokens]) {{
      %0 = cache_append(state, v, p, q, r)
      {0}
    }}
  }}
"""


def fused(body, rest):
    text = APPEND.replace("%1 = cache_append(%0, values, pages, sequence, positions)", "")
    return parse_graph(text.replace("BODY", FUSED.format(body) + rest))


def test_updates_inside_fusions_are_seen():
    verify(fused("return k = %0", "return; update %0 = %9"))
    several = "%1 = exp(v) return e = %1, k = %0"
    get = "%10 = get[index=1](%9) "
    verify(fused(several, get + "return; update %0 = %10"))
    with pytest.raises(GraphError, match="exp node: reads a state that a fusion node overwrites"):
        verify(fused(several, get + "%11 = exp(%0) return a = %11; update %0 = %10"))
    with pytest.raises(GraphError, match="exp node: reads a state that a cache_append"):
        verify(fused("%1 = exp(state) return e = %1, k = %0", get + "return; update %0 = %10"))
    with pytest.raises(GraphError, match="get node: is the new value of a state"):
        verify(fused(several, get + "return k = %10"))
