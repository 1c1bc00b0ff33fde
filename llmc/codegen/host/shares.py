"""A stage's tiles, shared out among the workers of a team.

    void  llmc_team_begin(void *team, cursor *, i64 tiles, i64 worker, i64 workers)
    i64   llmc_team_next(void *team, cursor *, i64 tiles, i64 worker, i64 workers)

`begin` must be called once by every worker between two barriers; `next` gives a tile, -1 after the
last. A worker takes the tiles of its own share in order, which are neighbours in memory; who is
done early takes what is left of the shares of the workers behind it. So a worker that lost its CPU
keeps the others for one tile, not for a share. A null team has one worker.

In a worker's block of the team (see team.py):

    24   i64 turn        0 or 8: which of the next two counts the tiles of this stage
    32   i64 taken[2]    tiles of its share that were taken, by anybody; that of the next stage is
                         cleared during this one
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import llvmlite.ir as ir

from llmc.codegen.host.team_size import TAKEN, TURN, is_null, worker_block
from llmc.codegen.llvm import I64, POINTER, VOID, Emitter, define, i64

BEGIN, NEXT, _SHARE = "llmc_team_begin", "llmc_team_next", "llmc_team_share"
HELPED = 7  # shares that a worker looks at when its own is done: every look costs a cache miss

# A worker's place in a stage: whose share it takes from, as the distance to that worker (with a
# null team: tiles taken); the turn; the share's first tile, and how many it has.
_CURSOR_WORDS = 4
_DISTANCE, _CURSOR_TURN, _FIRST, _SIZE = 0, 8, 16, 24
_ARGUMENTS = [POINTER, POINTER, I64, I64, I64]
# No register of the caller is changed: tiles keep what LLVM holds in vectors for their inner loops.
_CONVENTION = "preserve_allcc"


@contextmanager
def tiles(e: Emitter, team: ir.Value, count: ir.Value, worker: ir.Value, workers: ir.Value,
          prepare: Callable[[], None]) -> Iterator[ir.Value]:
    """Emits a worker's part of a stage of `count` tiles: prepare() before its first tile, then the
    body for each; it is not entered where there is nothing left for the worker."""
    own = (team, e.stack(I64, _CURSOR_WORDS), count, worker, workers)
    _call(e, BEGIN, own)
    first = _call(e, NEXT, own)
    body, done = (e.b.append_basic_block(name) for name in ("tile.body", "tile.done"))
    start = e.b.append_basic_block("tile.start")
    e.b.cbranch(e.b.icmp_signed("<", first, i64(0)), done, start)
    e.b.position_at_end(start)
    prepare()
    before = e.b.block
    e.b.branch(body)
    e.b.position_at_end(body)
    tile = e.b.phi(I64, "tile")
    tile.add_incoming(first, before)
    yield tile
    following = _call(e, NEXT, own)
    tile.add_incoming(following, e.b.block)
    e.b.cbranch(e.b.icmp_signed("<", following, i64(0)), done, body)
    e.b.position_at_end(done)


def _call(e: Emitter, name: str, arguments: tuple[ir.Value, ...]) -> ir.Value:
    return e.b.call(e.module.globals[name], arguments, cconv=_CONVENTION)


class Shares:
    """Emits the functions into a module."""

    def __init__(self, module: ir.Module):
        self.module = module

    def emit(self) -> None:
        self._define_share()
        self._define_begin()
        self._define_next()

    def _define_share(self) -> None:
        """void share(cursor, tiles, worker, workers): the share at cursor's distance."""
        function, e = define(self.module, _SHARE, VOID, [POINTER, I64, I64, I64],
                             attributes=("alwaysinline",))
        cursor, count, worker, workers = function.args
        victim = self._victim(e, cursor, worker, workers)
        first = e.b.udiv(e.b.mul(count, victim), workers)
        last = e.b.udiv(e.b.mul(count, e.b.add(victim, i64(1))), workers)
        e.store(first, e.offset(cursor, _FIRST))
        e.store(e.b.sub(last, first), e.offset(cursor, _SIZE))
        e.b.ret_void()

    def _victim(self, e: Emitter, cursor: ir.Value, worker: ir.Value, workers: ir.Value
                ) -> ir.Value:
        after = e.b.add(worker, e.load(e.offset(cursor, _DISTANCE), I64))
        wraps = e.b.icmp_signed(">=", after, workers)
        return e.b.select(wraps, e.b.sub(after, workers), after)

    def _function(self, name: str, result: ir.Type) -> Emitter:
        function, e = define(self.module, name, result, _ARGUMENTS, attributes=("noinline",))
        function.calling_convention = _CONVENTION
        return e

    def _define_begin(self) -> None:
        e = self._function(BEGIN, VOID)
        team, cursor, count, worker, workers = e.b.function.args
        e.store(i64(0), e.offset(cursor, _DISTANCE))
        e.call(_SHARE, VOID, cursor, count, worker, workers)
        with e.b.if_then(is_null(e, team)):
            e.b.ret_void()
        own = worker_block(e, team, worker)
        old = e.load(e.offset(own, TURN), I64)
        turn = e.b.xor(old, i64(8))
        e.store(turn, e.offset(own, TURN))
        e.store(turn, e.offset(cursor, _CURSOR_TURN))
        # Nobody has used it since the last barrier, nor will before the next.
        e.store(i64(0), e.offset(e.offset(own, TAKEN), old))
        e.b.ret_void()

    def _define_next(self) -> None:
        """A null team takes the tiles in order, counted in the cursor."""
        e = self._function(NEXT, I64)
        team, cursor, count, worker, workers = e.b.function.args
        with e.b.if_then(is_null(e, team)):
            taken = e.load(e.offset(cursor, _DISTANCE), I64)
            e.store(e.b.add(taken, i64(1)), e.offset(cursor, _DISTANCE))
            e.b.ret(e.b.select(e.b.icmp_signed("<", taken, count), taken, i64(-1)))
        look, take, move, on, end = (e.b.append_basic_block(name) for name in (
            "look", "take", "move", "on", "end"))
        e.b.branch(look)
        e.b.position_at_end(look)
        victim = worker_block(e, team, self._victim(e, cursor, worker, workers))
        turn = e.load(e.offset(cursor, _CURSOR_TURN), I64)
        taken_word = e.offset(e.offset(victim, TAKEN), turn)
        size = e.load(e.offset(cursor, _SIZE), I64)
        left = e.b.icmp_signed("<", e.b.load_atomic(taken_word, "monotonic", 8, typ=I64), size)
        e.b.cbranch(left, take, move)
        e.b.position_at_end(take)
        taken = e.b.atomic_rmw("add", taken_word, i64(1), "monotonic")
        with e.b.if_then(e.b.icmp_signed("<", taken, size), likely=True):
            e.b.ret(e.b.add(e.load(e.offset(cursor, _FIRST), I64), taken))
        e.b.branch(move)
        e.b.position_at_end(move)
        distance = e.b.add(e.load(e.offset(cursor, _DISTANCE), I64), i64(1))
        e.b.cbranch(e.b.icmp_signed("<", distance, e.minimum(workers, i64(HELPED + 1))), on, end)
        e.b.position_at_end(on)
        e.store(distance, e.offset(cursor, _DISTANCE))
        e.call(_SHARE, VOID, cursor, count, worker, workers)
        e.b.branch(look)
        e.b.position_at_end(end)
        e.b.ret(i64(-1))
