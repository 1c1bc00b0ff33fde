import copy
import gc
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import GraphError, ShapeError
from llmc.ir import dims
from llmc.ir.dims import (
    affine,
    bounds,
    ceildiv,
    evaluate,
    floordiv,
    format_dim,
    known_at_least,
    known_equal,
    known_multiple,
    maximum,
    minimum,
    mod,
    parse_dim,
    product,
    substitute,
    symbol,
    symbols,
)

tokens = symbol("tokens", 1, 8192)
batch = symbol("batch", 1, 64)
seq = symbol("seq", 0, 512)
wide = symbol("wide", 8, 1024, 8)
NAMED = {each.name: each for each in (tokens, batch, seq, wide)}


def test_symbols_are_interned_by_name_range_and_multiple():
    assert symbol("tokens", 1, 8192) is tokens
    assert symbol("tokens", 1, 8191) is not tokens
    assert symbol("tokens", 1, 8192, 2) is not tokens
    assert (symbol("m", 3, 30, 8).low, symbol("m", 3, 30, 8).high) == (8, 24)


@pytest.mark.parametrize(
    "arguments", [("",), ("a b",), ("min",), ("f32",), ("true",), ("a", 3, 2), ("a", 1, 7, 8)]
)
def test_bad_symbols_are_refused(arguments):
    with pytest.raises(GraphError):
        symbol(*arguments)


@pytest.mark.parametrize(
    "a, b",
    [
        (tokens + tokens, 2 * tokens),
        (tokens * (batch + 1), tokens * batch + tokens),
        ((tokens + 1) - tokens, 1),
        (tokens - tokens, 0),
        (tokens * 1, tokens),
        (3 - tokens + tokens, 3),
        ((4 * tokens + 3) // 4, tokens),
        ((4 * tokens + batch) // 4, tokens + batch // 4),
        ((6 * tokens + 4) // 4, tokens + (tokens + 2) // 2 - 0 * tokens),
        ((tokens + 31) // 32, ceildiv(tokens, 32)),
        (ceildiv(tokens + 32, 32), ceildiv(tokens, 32) + 1),
        (ceildiv(2 * tokens, 4), ceildiv(tokens, 2)),
        (tokens // 4 // 8, tokens // 32),
        (tokens // -4, -tokens // 4),
        (tokens // 8193, 0),
        (tokens % 8193, tokens),
        (8 * tokens % 8, 0),
        ((8 * tokens + 3) % 8, 3),
        (6 * tokens % 4, 2 * (tokens % 2)),
        (wide % 4, 0),
        ((wide + 3) // 4, wide // 4),
        (ceildiv(wide, 8), wide // 8),
        (wide // 8 * 8, wide),
        (wide // 8 * 2, wide // 4),
        (ceildiv(wide, 8) * batch * 8, wide * batch),
        (batch * seq * 768 // (batch * 48), seq * 16),
        ((batch * seq + batch * tokens) // (seq + tokens), batch),
        (batch * tokens % tokens, 0),
        (minimum(tokens, 8192), tokens),
        (minimum(tokens, 0), 0),
        (maximum(tokens, tokens + 1), tokens + 1),
        (minimum(minimum(tokens, batch), seq), minimum(seq, tokens, batch)),
        (maximum(seq, 0), seq),
        (floordiv(7, 2), 3),
        (ceildiv(7, 2), 4),
        (mod(-7, 4), 1),
        (product([]), 1),
        (product([batch, 2, seq]), 2 * seq * batch),
    ],
)
def test_canonical_forms(a, b):
    assert a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
    assert type(a) is type(b)


def test_no_truth_of_order():
    with pytest.raises(TypeError, match="known_at_least"):
        _ = tokens < 3
    with pytest.raises(TypeError, match="known_at_least"):
        max(tokens, 3)
    assert tokens != 3
    assert len({tokens + 1, 1 + tokens}) == 1


def test_division_by_zero_is_refused():
    for divide in (floordiv, mod, ceildiv):
        with pytest.raises(GraphError):
            divide(tokens, 0)
    with pytest.raises(ShapeError):
        evaluate(tokens // seq, {"tokens": 3, "seq": 0})


def test_exact_division_needs_a_divisor_that_cannot_be_zero():
    assert (batch * tokens) // batch is tokens
    assert (seq * tokens) // seq is not tokens


@pytest.mark.parametrize(
    "dim, expected",
    [
        (7, (7, 7)),
        (tokens, (1, 8192)),
        (-tokens, (-8192, -1)),
        (tokens - batch, (1 - 64, 8191)),
        (tokens * seq + 3, (3, 8192 * 512 + 3)),
        (tokens // 3, (0, 8192 // 3)),
        (tokens % 10, (0, 9)),
        (ceildiv(tokens, batch), (0, 8192 + 63)),
        (minimum(tokens, batch), (1, 64)),
        (symbol("free"), (1, dims.MAX)),
    ],
)
def test_bounds(dim, expected):
    assert bounds(dim) == expected


def test_questions():
    assert known_equal(tokens + 1, 1 + tokens)
    assert known_equal(symbol("one", 1, 1), 1)
    assert not known_equal(tokens, batch)
    assert known_at_least(tokens + seq, tokens)
    assert not known_at_least(tokens, batch)
    assert known_multiple(wide * 3, 24)
    assert not known_multiple(tokens, 2)
    assert known_multiple(batch * seq, batch)
    assert affine(tokens * 2 - seq + 5) == (5, {tokens: 2, seq: -1})
    assert affine(3) == (3, {})
    assert affine(tokens * seq) is None
    assert affine(tokens // 3) is None
    assert symbols(ceildiv(tokens * batch, 3) + seq) == {tokens, batch, seq}
    assert symbols(tokens) == {tokens}
    assert symbols(4) == frozenset()


def test_substitution_is_simultaneous():
    swapped = substitute(tokens + 2 * batch, {tokens: batch, "batch": tokens})
    assert swapped is batch + 2 * tokens
    assert substitute(ceildiv(tokens, 4), {"tokens": 17}) == 5
    assert substitute(tokens, {seq: 1}) is tokens


def test_missing_symbol_is_named():
    with pytest.raises(ShapeError, match="batch"):
        evaluate(tokens + batch, {"tokens": 3})


@pytest.mark.parametrize(
    "dim, text",
    [
        (12, "12"),
        (tokens * 2 + 1, "tokens*2 + 1"),
        (1 - tokens, "-tokens + 1"),
        (batch * seq, "batch*seq"),
        (batch * batch - 3 * seq, "batch*batch - seq*3"),
        (ceildiv(tokens, 4), "ceildiv(tokens, 4)"),
        (tokens // 4 * 3, "floordiv(tokens, 4)*3"),
        (tokens % 4, "mod(tokens, 4)"),
        (minimum(tokens, batch * 2), "min(batch*2, tokens)"),
    ],
)
def test_text(dim, text):
    assert format_dim(dim) == text
    assert parse_dim(text, NAMED) is dim or isinstance(dim, int)


def test_infix_division_is_read():
    assert parse_dim("(tokens + 31) // 32 * 32 + batch % 3", NAMED) is (
        (tokens + 31) // 32 * 32 + batch % 3
    )


@pytest.mark.parametrize(
    "text",
    ["", "tokens +", "unknown", "2 tokens", "ceildiv(tokens)", "(tokens", "mod(tokens, 0)", "1.5"],
)
def test_bad_text(text):
    with pytest.raises(GraphError):
        parse_dim(text, NAMED)


def test_copies_are_the_same_object():
    for dim in (tokens, tokens * 2 + 1, ceildiv(tokens, 4), minimum(tokens, seq)):
        assert copy.deepcopy(dim) is dim
        assert pickle.loads(pickle.dumps(dim)) is dim


def test_the_table_is_weak():
    import llmc.ir.polynomial as polynomial

    gc.collect()
    before = len(polynomial._table)
    held = [symbol(f"temporary{i}") * 3 + 1 for i in range(17)]
    assert len(polynomial._table) >= before + 34
    del held
    gc.collect()
    assert len(polynomial._table) <= before


# Trees of operations, computed once as dims and once as plain integers.
_TREES = st.recursive(
    st.one_of(st.integers(-9, 33), st.sampled_from(sorted(NAMED))),
    lambda inner: st.tuples(
        st.sampled_from(["+", "-", "*", "floordiv", "mod", "ceildiv", "min", "max"]), inner, inner
    ),
    max_leaves=7,
)


def _build(tree, leaves, functions):
    if not isinstance(tree, tuple):
        return leaves.get(tree, tree)
    name, a, b = tree[0], _build(tree[1], leaves, functions), _build(tree[2], leaves, functions)
    if name in ("+", "-", "*"):
        return a + b if name == "+" else a - b if name == "-" else a * b
    return functions[name](a, b)


_INTEGER = {
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "ceildiv": lambda a, b: (a + b - 1) // b,
    "min": min,
    "max": max,
}
_SYMBOLIC = {"floordiv": floordiv, "mod": mod, "ceildiv": ceildiv, "min": minimum, "max": maximum}


@settings(max_examples=400, deadline=None)
@given(
    _TREES,
    st.integers(1, 8192),
    st.integers(1, 64),
    st.integers(0, 512),
    st.integers(1, 128),
)
def test_dims_agree_with_integers(tree, tokens_value, batch_value, seq_value, wide_eighths):
    values = {
        "tokens": tokens_value,
        "batch": batch_value,
        "seq": seq_value,
        "wide": 8 * wide_eighths,
    }
    try:
        dim = _build(tree, NAMED, _SYMBOLIC)
        expected = _build(tree, values, _INTEGER)
    except (GraphError, ZeroDivisionError):
        return
    # ceildiv by something negative is not defined: it is the floor of (a + n - 1) / n
    assert evaluate(dim, values) == expected
    low, high = bounds(dim)
    assert low <= expected and (high is None or expected <= high)
    assert substitute(dim, values) == expected
    text = format_dim(dim)
    again = parse_dim(text, NAMED)
    assert again is dim or (isinstance(dim, int) and again == dim)
    for n in (2, 3, 8):
        if known_multiple(dim, n):
            assert expected % n == 0
    assert not isinstance(dim, int) or dim == expected


def test_dims_that_share_parts_are_evaluated_together():
    tokens = symbol("tokens", 1)
    tiles = ceildiv(tokens, 64)
    known = {}
    assert evaluate(tiles * minimum(1, tokens - 1), {"tokens": 65}, known) == 2
    assert known[tiles] == 2
    assert evaluate(tiles + 1, {"tokens": 65}, known) == 3 and evaluate(7, {}, known) == 7
