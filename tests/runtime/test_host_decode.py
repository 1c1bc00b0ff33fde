"""Steps that feed each other on the host give the tokens of steps that are called one by one."""

from __future__ import annotations

import numpy as np
import pytest

import llmc
from llmc.errors import LlmcError, ShapeError
from llmc.runtime.decode import Start, decode_loop
from llmc.runtime.host_decode import COUNTED_TOGETHER
from llmc.runtime.pages import Sequence
from llmc.runtime.sampling import Sampling, sample
from llmc.runtime.step import Chunk

PROMPTS = ([1, 403, 407, 261, 378], [1, 9], [1, 50, 60, 70, 80, 90, 100, 110, 120])


@pytest.fixture
def runtime(embedded_artifact):
    with llmc.Runtime(embedded_artifact, threads=2, specialize="none", max_batch=4) as runtime:
        yield runtime


def one_by_one(runtime, prompts, samplings, steps):
    """Tokens [steps, sequences] by ordinary steps, and their sequences."""
    sequences = [Sequence() for _ in prompts]
    pending, made = [list(prompt) for prompt in prompts], []
    for _ in range(steps):
        logits = runtime.step([Chunk(s, p, 1) for s, p in zip(sequences, pending, strict=True)])
        made.append([sample(row, sampling, number, sequence.length) for number, (row, sampling,
                    sequence) in enumerate(zip(logits, samplings, sequences, strict=True))])
        pending = [[token] for token in made[-1]]
    for sequence in sequences:
        runtime.release(sequence)
    return made


def started(runtime, prompts, first, samplings, steps):
    """A loop behind the prompts, whose next tokens are `first`."""
    sequences = [Sequence() for _ in prompts]
    runtime.step([Chunk(s, p, 1) for s, p in zip(sequences, prompts, strict=True)])
    starts = [Start(token, s.length, sampling, number) for number, (token, s, sampling)
              in enumerate(zip(first, sequences, samplings, strict=True))]
    return decode_loop(runtime.language_model, sequences, starts, steps), sequences


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_are_those_of_single_steps(runtime, count, temperature):
    prompts = PROMPTS[:count]
    samplings = [Sampling(temperature if number != 1 else 0.0, top_k=20, seed=5)
                 for number in range(count)]
    expected = one_by_one(runtime, prompts, samplings, 70)
    loop, sequences = started(runtime, prompts, expected[0], samplings, 69)
    made = [loop.next().tolist() for _ in range(69)]
    assert loop.next() is None
    loop.finish()
    assert made == expected[1:]
    assert [s.length for s in sequences] == [len(prompt) + 69 for prompt in prompts]


def test_others_may_step_between(runtime):
    sampling = [Sampling()]
    long = list(range(1, 200))
    expected = [one_by_one(runtime, [prompt], sampling, 50) for prompt in PROMPTS[:2]]
    loops = [started(runtime, [prompt], made[0], sampling, 49)[0]
             for prompt, made in zip(PROMPTS, expected, strict=False)]
    for number in range(1, 50):
        if number % 10 == 0:  # needs a larger arena than a single token
            sequence = Sequence()
            runtime.step([Chunk(sequence, long[:4 * number], 1)])
            runtime.release(sequence)
        for loop, made in zip(loops, expected, strict=True):
            assert loop.next().tolist() == made[number]


def test_a_token_that_was_read_does_not_change(runtime):
    expected = one_by_one(runtime, PROMPTS[:1], [Sampling()], 4)
    loop, _ = started(runtime, PROMPTS[:1], expected[0], [Sampling()], 3)
    made = [loop.next() for _ in range(3)]
    assert [tokens.tolist() for tokens in made] == expected[1:]


def test_steps_are_counted(runtime):
    loop, _ = started(runtime, PROMPTS[:1], [7], [Sampling()], 40)
    (variant,) = [v for v in runtime.executor.variants if v.info.key["tokens"][1] <= 8]
    before, seconds = variant.calls, variant.seconds
    loop.next()
    assert variant.calls == before + 1  # the first at once
    for _ in range(COUNTED_TOGETHER + 2):
        loop.next()
    assert variant.calls == before + 1 + COUNTED_TOGETHER
    loop.finish()
    assert variant.calls == before + COUNTED_TOGETHER + 3 and variant.seconds > seconds


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_without_a_likeliest_token_is_told_of(runtime, temperature):
    loop, _ = started(runtime, PROMPTS[:1], [7], [Sampling(temperature)], 40)
    loop.next()
    for state in runtime.executor.states:
        for memory in runtime.executor.state_copies(state.name):
            memory.fill(np.nan)
    with pytest.raises(ShapeError, match="not finite"):
        loop.next()
    loop.finish()


def test_closed_while_decoding(embedded_artifact):
    runtime = llmc.Runtime(embedded_artifact, threads=1, specialize="none")
    tokens = runtime.generate(PROMPTS[0], 10, ignore_eos=True)
    next(tokens)
    next(tokens)
    runtime.close()
    with pytest.raises(LlmcError, match="closed"):
        next(tokens)
