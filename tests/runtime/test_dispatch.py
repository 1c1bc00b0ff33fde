"""Dispatch: the most specific variant, trials on real calls, tables that change between steps."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from llmc.errors import ShapeError
from llmc.ir.dims import evaluate
from llmc.runtime.artifact import VariantInfo
from llmc.runtime.dispatch import MEMO_SHAPES, Dispatch, DispatchTable
from llmc.runtime.profile import Profile
from llmc.runtime.trials import WARM_PAIRS


class FakeCode:
    """A variant without code."""

    def __init__(self, name: str, **key: tuple[int, int]):
        self.info = VariantInfo(name, key, "0", "0", 1)
        self.calls = 0
        self.seconds = 0.0

    def covers(self, values: Mapping[str, int]) -> bool:
        return all(low <= values[name] <= high for name, (low, high) in self.info.key.items())

    def width(self) -> int:
        return sum(high - low for low, high in self.info.key.values())


GENERIC = FakeCode("generic", tokens=(1, 512), pages=(1, 64))
FEW = FakeCode("few", tokens=(1, 4), pages=(1, 64))
TWO = FakeCode("two", tokens=(2, 2), pages=(1, 64))


def make(*variants: FakeCode) -> Dispatch:
    dispatch = Dispatch(variants, ("tokens",))
    dispatch.profile = Profile(("tokens",))
    return dispatch


def values(tokens: int, pages: int = 1) -> dict[str, int]:
    return {"tokens": tokens, "pages": pages}


def test_the_most_specific_variant_runs():
    dispatch = make(GENERIC, TWO, FEW)
    chosen = [dispatch.choose(values(tokens)) for tokens in (1, 2, 3, 5, 512)]
    assert chosen == [FEW, TWO, FEW, GENERIC, GENERIC]


def test_a_shape_that_nothing_covers_is_an_error():
    dispatch = make(GENERIC, FEW)
    with pytest.raises(ShapeError, match="no compiled variant covers"):
        dispatch.choose(values(513))


def test_what_is_remembered_is_checked_against_all_symbols():
    narrow = FakeCode("narrow", tokens=(2, 2), pages=(1, 2))
    dispatch = make(GENERIC, narrow)
    assert dispatch.choose(values(2, pages=1)) is narrow
    assert dispatch.choose(values(2, pages=3)) is GENERIC
    with pytest.raises(ShapeError):
        dispatch.choose(values(2, pages=65))


def test_the_memory_of_shapes_is_bounded():
    dispatch = make(FakeCode("generic", tokens=(1, 1 << 30)))
    for tokens in range(1, 3 * MEMO_SHAPES):
        dispatch.choose({"tokens": tokens})
    assert len(dispatch.table.memo) <= MEMO_SHAPES


def test_replacing_the_table_forgets_old_choices():
    dispatch = make(GENERIC, FEW)
    assert dispatch.choose(values(2)) is FEW
    dispatch.replace(add=[TWO])
    assert dispatch.choose(values(2)) is TWO
    dispatch.replace(remove=[TWO])
    assert dispatch.choose(values(2)) is FEW


def test_a_range_is_tried_on_all_of_its_shapes_but_those_with_code_of_their_own():
    wide = FakeCode("wide", tokens=(2, 9), pages=(1, 64))
    dispatch = make(GENERIC, TWO)
    trial = dispatch.start_range_trial(wide, pairs=6)
    ran: dict[int, list[FakeCode]] = {}
    for call in range(60):
        tokens = (2, 5, 7, 11)[call % 4]
        variant = dispatch.choose(values(tokens))
        dispatch.observe(values(tokens), variant, tokens * (0.5 if variant is wide else 1.0))
        ran.setdefault(tokens, []).append(variant)
    assert trial.done and trial.gain().middle == pytest.approx(0.5)
    assert set(ran[2]) == {TWO} and set(ran[11]) == {GENERIC}
    assert ran[5][:6] == [GENERIC, wide, wide, GENERIC, GENERIC, wide]
    assert set(ran[5][6:]) == {GENERIC}, "all is known"
    dispatch.end_trial(trial)
    assert dispatch.table.wide is None


def test_steps_on_nobodys_behalf_count_for_trials_only():
    dispatch = make(GENERIC, FEW)
    trial = dispatch.start_trial((2,), values(2), TWO, pairs=3)
    dispatch.rehearsing = True
    while not trial.done:
        dispatch.observe(values(2), dispatch.choose(values(2)), 1.0)
    assert dispatch.profile is not None and not dispatch.profile.cells


def test_only_the_range_of_some_symbols_counts():
    generic = FakeCode("generic", tokens=(1, 512), pages=(1, 64))
    dispatch = Dispatch([generic], ("tokens",), {"pages": (8, 200)})
    shapes = [dispatch.shape(values(3, pages)) for pages in (1, 8, 9, 64)]
    assert shapes == [(3, 8), (3, 8), (3, 64), (3, 64)]
    assert dispatch.key((3, 8)) == {"tokens": (3, 3), "pages": (1, 8)}
    assert dispatch.key((3, 64)) == {"tokens": (3, 3), "pages": (9, 64)}
    low = FakeCode("low", **dispatch.key((3, 8)))
    dispatch.replace(add=[low])
    assert [dispatch.choose(values(3, pages)) for pages in (8, 9)] == [low, generic]
    assert str(DispatchTable(dispatch)).splitlines()[0].startswith("exact")


def test_a_trial_gets_every_other_call_of_its_shape_only():
    dispatch = make(GENERIC, FEW)
    trial = dispatch.start_trial((2,), values(2), TWO, pairs=3)
    ran = []
    while not trial.done:
        variant = dispatch.choose(values(2))
        dispatch.observe(values(2), variant, 1.0)
        ran.append(variant)
        assert dispatch.choose(values(3)) is FEW
    assert ran.count(TWO) == ran.count(FEW) == 3 + WARM_PAIRS
    dispatch.end_trial(trial)
    assert dispatch.choose(values(2)) is FEW


def test_only_narrow_code_is_tried_where_it_fits():
    narrow = FakeCode("narrow", tokens=(2, 2), pages=(1, 2))
    dispatch = make(GENERIC, FEW)
    dispatch.start_trial((2,), values(2), narrow, pairs=3)
    assert {dispatch.choose(values(2, pages=9)) for _ in range(8)} == {FEW}


def test_calls_are_counted_by_shape_and_variant():
    dispatch = make(GENERIC, FEW)
    for tokens in (1, 1, 9):
        dispatch.observe(values(tokens), dispatch.choose(values(tokens)), 0.25)
    assert dispatch.profile is not None
    cells = {key: cell.calls for key, cell in dispatch.profile.cells.items()}
    assert cells == {((1,), "few"): 2, ((9,), "generic"): 1}


def test_the_table_prints_its_tiers():
    lines = str(DispatchTable(make(GENERIC, FEW, TWO))).splitlines()
    assert [line.split()[0] for line in lines] == ["exact", "ranged", "generic"]


def test_memory_of_a_step_is_as_its_sizes_say(embedded_runtime):
    """Remembered or not: arena and scratch, for shapes in any order."""
    symbols = embedded_runtime.executor.symbols
    for variant in embedded_runtime.executor.variants:
        for number in (1, 3, 1, 2, 3):
            sizes = dict.fromkeys(symbols, number)
            for _ in range(2):
                assert variant.sizes(sizes) == (evaluate(variant.arena, sizes),
                                                evaluate(variant.scratch, sizes))
