"""Decoding on a GPU, where steps feed each other: another golden text, streams that stop early or
take turns, and sequences that decode together."""

from __future__ import annotations

import json

import numpy as np
import pytest

import llmc
from llmc.errors import DeviceError
from llmc.runtime.cuda_device import Device
from llmc.runtime.decode import Start, decode_loop
from llmc.runtime.pages import Sequence
from llmc.runtime.sampling import Sampling
from tests.conftest import EMBEDDED, GOLDENS

TINYSTORIES = GOLDENS / "models" / "tinystories656K"

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def runtime():
    try:
        Device()
    except DeviceError as error:
        pytest.skip(str(error))
    with llmc.Runtime(EMBEDDED, target="nvptx", dtype="f32", max_batch=16,
                      specialize="none") as made:
        yield made


def test_golden_texts_of_grouped_heads(runtime):
    goldens = json.loads((TINYSTORIES / "golden.json").read_text())["goldens"]
    with llmc.Runtime(TINYSTORIES, target="nvptx", dtype="f32", specialize="none") as own:
        for golden in goldens:
            made = list(own.generate(golden["prompt_ids"], len(golden["greedy_ids"]),
                                     ignore_eos=True))
            assert made == golden["greedy_ids"]


def test_whoever_stops_early_leaves_nothing_behind(runtime):
    prompt = runtime.encode("The")
    expected = list(runtime.generate(prompt, 90, ignore_eos=True))
    stop = expected[40]
    assert list(runtime.generate(prompt, 90, ignore_eos=True, stop_ids=[stop])) == \
        expected[:expected.index(stop)]
    streams = [runtime.generate(prompt, 90, ignore_eos=True) for _ in range(3)]
    turns = [[next(stream) for stream in streams] for _ in range(50)]  # one after the other
    assert np.array(turns).T.tolist() == [expected[:50]] * 3
    for stream in streams:
        stream.close()
    pool = runtime._model.pool
    assert pool.free == pool.size


@pytest.mark.parametrize("count", [1, 2, 7, 9, 16])
def test_sequences_decode_together(runtime, count):
    model = runtime._model
    prompts = [runtime.encode("Once upon a time there was a cat")[:2 + n % 9] for n in range(count)]
    alone = [list(runtime.generate(prompt, 71, ignore_eos=True)) for prompt in prompts]
    sequences = [Sequence() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        list(model.feed(sequence, prompt))
    loop = decode_loop(model, sequences, [
        Start(made[0], len(prompt), Sampling()) for made, prompt
        in zip(alone, prompts, strict=True)], 70)
    together = []
    while (tokens := loop.next()) is not None:
        together.append(tokens)
    loop.finish()
    for sequence in sequences:
        model.release(sequence)
    assert np.array(together).T.tolist() == [made[1:] for made in alone]
