import pytest

from llmc.frontend.onnx.symbols import SymbolSolved, SymbolTable, solve
from llmc.ir import dims

SEQ = dims.symbol("seq")
PAST = dims.symbol("past", 0)
TOTAL = dims.symbol("total")
SIZE = dims.symbol("size", 0)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (TOTAL, PAST + SEQ, ("total", PAST + SEQ)),
        (PAST + SEQ, TOTAL, ("total", PAST + SEQ)),
        (4 * SIZE, 48, ("size", 12)),
        (SIZE, 16, ("size", 16)),
        (PAST, SEQ, ("past", SEQ)),
        (4 * SIZE, 50, None),
        (SEQ, 0, None),
        (SEQ, SEQ + 1, None),
        (PAST + SEQ, SIZE + SEQ, ("past", SIZE)),
    ],
)
def test_solve(a, b, expected):
    assert solve(a, b) == expected


def test_required_equality_is_solved_or_refused():
    table = SymbolTable({})
    assert table.require_equal(SEQ + 1, 1 + SEQ)
    assert not table.require_equal(SEQ * PAST, 3)
    with pytest.raises(SymbolSolved) as solved:
        table.require_equal(TOTAL, PAST + SEQ)
    assert (solved.value.name, solved.value.value) == ("total", PAST + SEQ)


def test_a_clamped_length_bounds_its_symbol():
    """A slice table[:seq] of 128 rows, added to [seq, ...], says that seq <= 128."""
    with pytest.raises(SymbolSolved) as solved:
        SymbolTable({}).require_equal(dims.minimum(SEQ, 128), SEQ)
    assert solved.value.name == "seq"
    assert dims.bounds(solved.value.value) == (1, 128)


def test_solutions_apply_transitively():
    bounded = dims.symbol("seq", 1, 128)
    table = SymbolTable({"total": PAST + SEQ, "seq": bounded})
    assert table.resolve(2 * TOTAL) == 2 * PAST + 2 * bounded


def test_names_become_identifiers():
    table = SymbolTable({})
    assert table.declare("input.1::axis").name == "input.1__axis"
    assert table.declare("0").name == "dim_0"
    assert table.declare("min").name == "dim_min"


def test_axis_text_of_exporters():
    table = SymbolTable({})
    past, seq = table.declare("s15", cached=True), table.declare("seq")
    assert table.parse("s15 + seq") == past + seq
    assert table.parse("unknown + 1") is None
    assert table.parse("not a dim (") is None
