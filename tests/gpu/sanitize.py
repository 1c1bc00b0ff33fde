"""Steps of the embedded model, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck|racecheck|synccheck --error-exitcode 9 \
        python tests/gpu/sanitize.py [f32|bf16]

A prefill, four decode steps, and a batch that mixes both; pages that nothing wrote are NaN. Says
"ok" if no logit is NaN and, in f32, the tokens are those of the golden text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import llmc  # noqa: E402
from llmc.runtime.pages import Sequence  # noqa: E402
from llmc.runtime.step import GREEDY, Chunk  # noqa: E402

EMBEDDED = ROOT / "llmc" / "data" / "stories260K"
GOLDEN = ROOT / "tests" / "goldens" / "models" / "stories260K" / "golden.json"
DECODE_STEPS = 4
NAN = 0xFF  # as every byte


def main(dtype: str = "f32") -> int:
    golden = json.loads(GOLDEN.read_text())["goldens"][0]
    prompt, expected = golden["prompt_ids"], golden["greedy_ids"][:DECODE_STEPS + 2]
    with llmc.Runtime(EMBEDDED, target="nvptx", dtype=dtype, specialize="none",
                      max_batch=4) as runtime:
        executor = runtime.executor
        executor._state_memory.clear(executor.device, NAN)
        first = Sequence()
        tokens = runtime.step([Chunk(first, prompt, 1)], GREEDY).tolist()
        for _ in range(DECODE_STEPS):
            tokens += runtime.step([Chunk(first, tokens[-1:], 1)], GREEDY).tolist()
        batch = [Chunk(first, tokens[-1:], 1), Chunk(Sequence(), prompt, 1),
                 Chunk(Sequence(), (prompt * 40)[:33], 1)]
        logits = runtime.step(batch)
        last = logits.argmax(-1).tolist()
        for chunk in batch:
            runtime.release(chunk.sequence)
    right = bool(np.isfinite(logits).all()) and (
        dtype != "f32" or ([*tokens, last[0]] == expected and last[1] == expected[0]))
    print("ok" if right else f"tokens {tokens} and {last}, expected {expected}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
