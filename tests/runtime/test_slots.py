"""Slot states: who owns which slot, and models whose layers keep their past in one."""

import numpy as np
import pytest

import llmc
from llmc.errors import LlmcError, ShapeError
from llmc.runtime.pages import Sequence
from llmc.runtime.pools import LEAST_SLOTS, pool_sizes
from llmc.runtime.slots import SlotPool
from llmc.runtime.step import Chunk
from tests.models.packed import GOLDENS


@pytest.fixture(scope="module", params=["mamba2", "zamba2"])
def runtime(request):
    with llmc.Runtime(GOLDENS / request.param, dtype="f32", threads=2, specialize="none") as made:
        yield made


def test_a_pool_hands_out_each_slot_once():
    pool, sequences = SlotPool(3), [Sequence() for _ in range(4)]
    for sequence in sequences[:3]:
        pool.reserve(sequence)
        pool.reserve(sequence)  # it has one already
    assert {each.slot for each in sequences[:3]} == {0, 1, 2}
    with pytest.raises(ShapeError, match="all 3 slots"):
        pool.reserve(sequences[3])
    freed = sequences[1].slot
    pool.release(sequences[1])
    pool.reserve(sequences[3])
    assert sequences[3].slot == freed and sequences[1].slot is None


def test_a_lost_state_stays_lost_until_it_is_released():
    pool, old, new = SlotPool(2), Sequence(length=5), Sequence()
    for sequence in (old, new):
        pool.reserve(sequence)
        pool.lose(sequence)
    assert pool.free == 2
    pool.reserve(new)  # it had no past to lose
    with pytest.raises(ShapeError, match="start it again"):
        pool.reserve(old)
    pool.release(old)
    pool.reserve(old)
    assert pool.free == 0


def test_models_without_slots_take_none():
    pool, sequence = SlotPool(0), Sequence()
    pool.reserve(sequence)
    assert sequence.slot is None


def test_memory_is_shared_by_slots_and_pages(runtime):
    states, slots = runtime.executor.states, runtime.language_model.slots.size
    assert slots == LEAST_SLOTS
    assert pool_sizes(states, 128, 20, 1 << 30).slots == 20
    assert pool_sizes(states, 128, 20, 1).slots == pool_sizes(states, 128, 20, 1).pages == 1


def test_prefixes_cannot_be_reused(runtime):
    assert not runtime.language_model.reuses_prefixes


def test_mixed_steps_give_what_one_sequence_alone_gives(runtime):
    """Chunks of three sequences, prompts beside single tokens, in steps of all kinds."""
    prompts = [np.random.default_rng(n).integers(3, 250, size).astype(np.int32)
               for n, size in enumerate((33, 9, 17))]
    alone = [runtime.run(prompt) for prompt in prompts]
    sequences, starts = [Sequence() for _ in prompts], [0, 0, 0]
    parts = [[], [], []]
    for step in ((7, 1, 0), (1, 1, 0), (20, 0, 1), (1, 6, 15), (4, 1, 1)):
        chunks = []
        for n, count in enumerate(step):
            if count:
                tokens = prompts[n][starts[n]:starts[n] + count]
                chunks.append((n, Chunk(sequences[n], tokens, count)))
                starts[n] += count
        logits = runtime.step([chunk for _, chunk in chunks])
        counts = np.cumsum([len(chunk.tokens) for _, chunk in chunks])
        for (n, _), rows in zip(chunks, np.split(logits, counts[:-1]), strict=True):
            parts[n].append(rows)
    for whole, pieces in zip(alone, parts, strict=True):
        assert np.abs(np.concatenate(pieces) - whole).max() <= 2e-5 * np.abs(whole).max()
    for sequence in sequences:
        runtime.release(sequence)
    assert runtime.language_model.slots.free == LEAST_SLOTS


def test_a_step_that_fails_half_way_loses_the_state(runtime, monkeypatch):
    old, new = Sequence(), Sequence()
    tokens = np.arange(3, 8, dtype=np.int32)
    runtime.step([Chunk(old, tokens, 0)])

    def fail(*_, **__):
        raise LlmcError("the step was cancelled")

    with monkeypatch.context() as patch:
        patch.setattr(runtime.executor, "_call", fail)
        with pytest.raises(LlmcError, match="cancelled"):
            runtime.step([Chunk(old, tokens, 1), Chunk(new, tokens, 1)])
    runtime.step([Chunk(new, tokens, 1)])
    with pytest.raises(ShapeError, match="start it again"):
        runtime.step([Chunk(old, tokens, 1)])
    for sequence in (old, new):
        runtime.release(sequence)


def test_bad_input_loses_nothing(runtime):
    sequence, tokens = Sequence(), np.arange(3, 8, dtype=np.int32)
    runtime.step([Chunk(sequence, tokens, 0)])
    with pytest.raises(ShapeError):
        runtime.step([Chunk(sequence, np.array([1 << 20], np.int32), 1)])
    runtime.step([Chunk(sequence, tokens, 1)])
    runtime.release(sequence)


def test_turns_that_share_a_block_share_its_weights(runtime):
    for weight in runtime.manifest.weights:
        assert len(set(weight.offsets)) == len(set(weight.sources)), weight.name
