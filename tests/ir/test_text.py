import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import GraphError
from llmc.ir.dims import symbol
from llmc.ir.dtypes import DTYPES, bf16, f16, f32, i32
from llmc.ir.graph import Graph, TensorType, attribute_key, intern_node
from llmc.ir.ops import constant, make
from llmc.ir.scan import Scanner
from llmc.ir.text import format_graph, format_value, parse_graph, scan_value

tokens = symbol("tokens", 1, 8192)
wide = symbol("wide", 8, 1024, 8)
NAMED = {"tokens": tokens, "wide": wide}

STEP = """\
graph step(ids: i32[tokens], "x:0": f32[tokens, 8], pages: i32[s, w], sequence: i32[tokens], \
positions: i32[tokens], offsets: i32[s + 1]) where tokens in 1..8192, s in 1.., w in 8..1024 \
multiple 8, pool in 1.. {
  %0 = parameter[name="embed"] : bf16[32, 8]
  %1 = gather(%0, ids) : bf16[tokens, 8]
  %2 = cast[dtype=f32](%1) : f32[tokens, 8]
  %3 = constant[dtype=f32, shape=(), data=[1.5]] : f32[]
  %4 = fusion[anchor="map"](%2, "x:0", %3) : f32[tokens, 8] {
    graph body(a: f32[tokens, 8], b: f32[tokens, 8], c: f32[]) {
      %0 = add(a, b) : f32[tokens, 8]
      %1 = mul(%0, c) : f32[tokens, 8]
      return y = %1
    }
  }
  %5 = reshape[shape=(tokens, 2, 4)](%4) : f32[tokens, 2, 4]
  %6 = state[name="k"] : f32[pool, 32, 2, 4]
  %7 = cache_append(%6, %5, pages, sequence, positions) : f32[pool, 32, 2, 4]
  %8 = paged_attention[scale=0.5](%5, %7, %7, pages, sequence, positions, offsets) \
: f32[tokens, 2, 4]
  return out = %8; update %6 = %7
}
"""


def check_round_trip(graph):
    text = format_graph(graph)
    again = parse_graph(text)
    assert again == graph
    assert format_graph(again) == text
    return text


def test_text_is_read_and_printed_identically():
    graph = parse_graph(STEP)
    assert format_graph(graph) == STEP
    assert check_round_trip(graph) == STEP


def test_types_and_comments_are_optional():
    graph = parse_graph("graph g(x: f32[3]) { # a comment (\n %0 = exp(x) return y = %0 }")
    assert format_graph(graph).splitlines()[1] == "  %0 = exp(x) : f32[3]"


def test_numbers_do_not_depend_on_how_the_graph_was_built():
    x = make("input", name="x", type=TensorType(f32, (3,)))
    late, early = make("log", x), make("exp", x)
    graph = Graph("g", (x,), (("y", make("add", early, late)),))
    assert format_graph(graph).splitlines()[1:4] == [
        "  %0 = exp(x) : f32[3]",
        "  %1 = log(x) : f32[3]",
        "  %2 = add(%0, %1) : f32[3]",
    ]


def test_prelude_and_repeat():
    parameter_type = TensorType(f32, (8,))
    x = make("input", name="x", type=TensorType(f32, (tokens, 8)))
    weight = make("parameter", name="w.{}", type=parameter_type, names=("w.0", "w.1", "w.2"))
    maker = Graph("maker", (), (("w.{}", make("exp", weight)),))
    body = Graph("body", (x,), (("x", make("mul", x, weight)),), prelude=(("w.{}", maker),))
    turns = make("repeat", x, bodies=[body], count=3, carried=1)
    text = check_round_trip(Graph("g", (x,), (("y", turns),), prelude=(("w.{}", maker),)))
    assert 'prelude "w.{}" = graph maker() {' in text


def test_several_results():
    x = make("input", name="x", type=TensorType(f32, (tokens,)))
    body = Graph("two", (x,), (("a", make("exp", x)), ("b", make("log", x))))
    both = make("fusion", x, bodies=[body], anchor="map")
    text = check_round_trip(Graph("g", (x,), (("b", make("get", both, index=1)),)))
    assert ": (f32[tokens], f32[tokens]) {" in text


@pytest.mark.parametrize("name", ["x:0", "a b", 'quote"', "back\\slash", "näme", "7", "%1", ""])
def test_odd_names(name):
    x = make("input", name=name, type=TensorType(f32, (3,)))
    check_round_trip(Graph(name, (x,), ((name, make("exp", x)),)))


def test_empty_graphs():
    assert check_round_trip(Graph("g", (), ())) == "graph g() {\n  return\n}\n"
    state = make("state", name="k", type=TensorType(f32, (1,)))
    check_round_trip(Graph("g", (), (), ((state, make("neg", state)),)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_constants_keep_their_bits(dtype):
    size = dtype.numpy.itemsize
    for count in (0, 1, 3, 17, 33):
        data = np.random.default_rng(count).integers(0, 256, count * size, np.uint8)
        if dtype.bits < 8:
            data &= (1 << dtype.bits) - 1
        if dtype.kind == "bool":
            data &= 1
        node = make("constant", dtype=dtype, shape=(count,), data=data.tobytes())
        check_round_trip(Graph("g", (), (("c", node),)))


def test_small_constants_are_readable():
    cases = {
        "[1.0, 2.5, -0.0]": constant([1.0, 2.5, -0.0], f32),
        "[0.1, inf, nan]": constant([0.1, np.inf, np.nan], f32),
        "[true, false]": constant([True, False], "bool"),
        "[-3, 7]": constant([-3, 7], i32),
        "[0.1, 1e-05]": constant([0.1, 1e-5], f16),
    }
    for expected, node in cases.items():
        assert f"data={expected}]" in check_round_trip(Graph("g", (), (("c", node),)))


_BITS = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0])
_VALUES = st.recursive(
    st.one_of(
        st.integers(),
        st.booleans(),
        _BITS,
        st.floats(),
        st.text(),
        st.binary(max_size=99),
        st.sampled_from([tokens, tokens * 2 - 1, -tokens, wide // 3, tokens % 4 * wide]),
        st.sampled_from([f32, bf16, TensorType(bf16, (tokens, wide + 1, 3)), TensorType(f32, ())]),
    ),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(_VALUES)
def test_attribute_values_round_trip_by_type(value):
    text = format_value(value)
    scanner = Scanner(text)
    again = scan_value(scanner, NAMED)
    assert scanner.at_end()
    assert attribute_key(again) == attribute_key(value)
    assert type(again) is type(value)
    node, other = (intern_node("t", {"v": v}, (), (), TensorType(f32, ())) for v in (value, again))
    assert node is other


def test_symbols_of_one_name_are_refused():
    x = make("input", name="x", type=TensorType(f32, (tokens, symbol("tokens", 1, 3))))
    with pytest.raises(GraphError, match=r"two symbols 'tokens'.*1\.\.8192.*1\.\.3"):
        format_graph(Graph("g", (x,), ()))


def test_inputs_of_one_name_are_refused():
    inputs = [make("input", name="x", type=TensorType(f32, (n,))) for n in (1, 3)]
    with pytest.raises(GraphError, match="same name"):
        format_graph(Graph("g", tuple(inputs), ()))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1, column 1: expected 'graph'"),
        ("graph g(", "line 1, column 8: expected the inputs"),
        ("graph g(x: f33[3]) { return }", "line 1, column 12: expected a type"),
        ("graph g(x: f32[n]) { return }", "column 16: unknown symbol 'n'"),
        ("graph g(x: f32[3], x: f32[3]) { return }", "column 20: input 'x' is declared twice"),
        ("graph g() where n in 1..3, n in 1..4 { return }", "symbol 'n' is declared twice"),
        ("graph g() where n in 3..1 { return }", "no multiple of 1 in 3..1"),
        ("graph g() {\n  return y = %0\n}", "line 2, column 14: no node %0"),
        ("graph g(x: f32[3]) {\n  %0 = exp(y)\n}", "line 2, column 12: no node y"),
        ("graph g(x: f32[3]) {\n  %0 = exp(x)\n  %0 = exp(x)\n}", "line 3, column 3: %0"),
        ("graph g(x: f32[3]) {\n  %0 = expo(x)\n}", "line 2, column 3: unknown op 'expo'"),
        ("graph g(x: f32[3]) {\n  %0 = exp(x) : f32[4]\n}", r"column 15: .*should be f32\[3\]"),
        ("graph g(x: f32[3]) {\n  %0 = exp(x, x)\n}", "line 2, column 3: .*takes 1"),
        ("graph g(x: f32[3]) {\n  %0 = exp[a=1](x)\n}", "line 2, column 3: .*no attribute 'a'"),
        ("graph g() {\n  %0 = parameter : f32[2]\n}", "line 2, column 3: .*'name' is missing"),
        ('graph g() {\n  %0 = parameter[name="a"]\n}', "line 2, column 3: .*'type' is missing"),
        ("graph g(x: f32[3]) {\n  %0 = exp[a=1, a=2](x)\n}", "'a' is given twice"),
        ("graph g(x: f32[3]) {\n  %0 = exp[bodies=1](x)\n}", "line 2, column 3"),
        ('graph g() {\n  %0 = parameter[name="a\\q"]\n}', "line 2, column 23: .*escape"),
        (
            "graph g() {\n  %0 = constant[dtype=i32, shape=(1), data=[1.5]]\n}",
            "line 2, column 44: not all of these are of type i32",
        ),
        ("graph g() {\n  %0 = constant[data=[1], dtype=i32]\n}", "must follow the attribute dtype"),
        ("graph g() { return } more", "expected the end of the text"),
        ("graph g() { %0 = a[v=" + "(" * 100_000, "nested too deeply"),
        ("graph g(x: f32[" + "(" * 100_000 + ") { return }", "expected the inputs"),
        ("graph g(x: f32[" + "9" * 5000 + "]) { return }", "line 1"),
    ],
)
def test_bad_text_is_located(text, message):
    with pytest.raises(GraphError, match=message) as error:
        parse_graph(text)
    assert str(error.value).startswith("line ")


def test_every_truncation_is_a_graph_error():
    for end in range(0, len(STEP.rstrip()), 3):
        with pytest.raises(GraphError):
            parse_graph(STEP[:end])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(STEP) - 1), st.text('%()[]{}=:,;"x1.- \n', max_size=3))
def test_damaged_text_is_a_graph_error_or_a_graph(position, damage):
    text = STEP[:position] + damage + STEP[position + 1 :]
    try:
        graph = parse_graph(text)
    except GraphError:
        return
    check_round_trip(graph)
