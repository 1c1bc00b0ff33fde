"""Measures a loaded model beside this machine's ceilings, sampled in the same rounds.

Clocks and bandwidth of shared machines move from minute to minute, so a round is: ceiling, model,
ceiling. A share is the median over rounds of what the model did over the best of the samples around
it: other processes only ever lower a sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from llmc.ceilings import Ceilings
from llmc.codegen.target import Target
from llmc.errors import LlmcError, ShapeError
from llmc.ir.cost import Cost, Shape, program_cost
from llmc.ir.program import Program
from llmc.ir.program_text import parse_program
from llmc.runtime.pages import PAGE, Sequence
from llmc.runtime.session import CHUNK_TOKENS, Runtime
from llmc.runtime.step import Chunk

PROMPT_TOKENS = 512
GENERATE_TOKENS = 64
SAMPLES = 3  # of a ceiling, before and after what it judges


@dataclass(frozen=True)
class Settings:
    """prompt_tokens and generate_tokens: None is the default, less where the context is shorter.
    batch: sequences together. repeat: rounds."""

    prompt_tokens: int | None = None
    generate_tokens: int | None = None
    batch: int = 1
    repeat: int = 5


@dataclass(frozen=True)
class Sample:
    """One round of one thing: wall and native seconds, and the best ceiling measured around it."""

    wall: float
    native: float
    ceiling: float


def measure(runtime: Runtime, settings: Settings) -> dict[str, Any]:
    """The report of `llmc bench --json`; rates in decimal units (GB/s = 1e9 bytes a second)."""
    if runtime.manifest.target.startswith("nvptx"):
        raise LlmcError("bench measures this CPU's ceilings: give a model compiled for the host")
    ceilings = Ceilings(runtime.threads)
    report: dict[str, Any] = {
        "dtype": runtime.manifest.dtype, "threads": runtime.threads,
        "target": runtime.manifest.target, "batch": settings.batch, "repeat": settings.repeat}
    if runtime.manifest.kind == "causal_lm":
        return report | LanguageModelBench(runtime, settings, ceilings).report()
    if runtime.manifest.kind == "encoder":
        return report | EncoderBench(runtime, settings, ceilings).report()
    raise LlmcError(f"{runtime.manifest.name} is an ONNX graph: bench measures checkpoints of "
                    "language models and encoders")


class Bench:
    """What both kinds of model share: the clock and the ceilings."""

    def __init__(self, runtime: Runtime, settings: Settings, ceilings: Ceilings):
        self.runtime = runtime
        self.settings = settings
        self.ceilings = ceilings
        self.random = np.random.default_rng(0)
        self.vocabulary = runtime.config["vocab_size"]
        self._programs: dict[str, Program] = {}
        bf16 = runtime.manifest.dtype == "bf16"
        self.peak = ceilings.peak_bf16 if bf16 else ceilings.peak_f32
        self.peak_dtype = ("bf16" if bf16 and Target.host().capabilities().bf16_dot else "f32")

    def sample(self, ceiling: Callable[[], float], work: Callable[[], None]) -> Sample:
        samples = [ceiling() for _ in range(SAMPLES)]
        native = self._native_seconds()
        started = time.perf_counter()
        work()
        wall = time.perf_counter() - started
        native = self._native_seconds() - native
        samples += [ceiling() for _ in range(SAMPLES)]
        return Sample(wall, native, max(samples))

    def _native_seconds(self) -> float:
        return sum(variant.seconds for variant in self.runtime.executor.variants)

    def cost(self, symbols: dict[str, int], context: int = 0) -> Cost:
        """Of one step, for the variant that runs it."""
        executor = self.runtime.executor
        values = executor.known | symbols
        info = executor.choose(values).info
        if info.name not in self._programs:
            self._programs[info.name] = parse_program(self.runtime.artifact.program_text(info))
        return program_cost(self._programs[info.name], Shape(values, context))

    def ids(self, count: int) -> np.ndarray:
        return self.random.integers(0, self.vocabulary, count).astype(np.int32)

    def compute_report(self, samples: list[Sample], tokens: int, flops: float) -> dict[str, Any]:
        """Figures of work that arithmetic bounds; `tokens` and `flops` are those of one round."""
        return {
            "tokens_per_second": median(tokens / s.wall for s in samples),
            "tflops": median(flops / s.wall for s in samples) / 1e12,
            "peak_tflops": median(s.ceiling for s in samples) / 1e12,
            "peak_dtype": self.peak_dtype,
            "share": median(flops / s.wall / s.ceiling for s in samples),
            "outside_share": median(1 - s.native / s.wall for s in samples)}


class LanguageModelBench(Bench):
    """Prefill and decode of `batch` sequences."""

    def __init__(self, runtime: Runtime, settings: Settings, ceilings: Ceilings):
        super().__init__(runtime, settings, ceilings)
        context = runtime.max_context
        self.made = settings.generate_tokens or min(GENERATE_TOKENS, max(1, context // 4))
        self.prompt = settings.prompt_tokens or max(1, min(PROMPT_TOKENS, context - self.made))
        if self.prompt + self.made > context:
            raise ShapeError(f"{self.prompt} prompt tokens and {self.made} made exceed the context "
                             f"of {context}: lower --prompt-tokens or --generate-tokens")

    def report(self) -> dict[str, Any]:
        prefill: list[Sample] = []
        decode: list[Sample] = []
        self._round()  # touches weights, caches and arena
        for _ in range(self.settings.repeat):
            for samples, sample in zip((prefill, decode), self._round(), strict=True):
                samples.append(sample)
        tokens = self.prompt * self.settings.batch
        flops = self.settings.batch * sum(
            self._step_cost(1, count, end).products for count, end in self._chunks())
        return {
            "decode": self._decode_report(decode),
            "prefill": {"tokens": self.prompt, **self.compute_report(prefill, tokens, flops)},
            "first_token_seconds": median(s.wall for s in prefill) / self.settings.batch}

    def _round(self) -> tuple[Sample, Sample]:
        sequences = [Sequence() for _ in range(self.settings.batch)]
        try:
            prefill = self.sample(self.peak, lambda: self._prefill(sequences))
            decode = self.sample(self.ceilings.read_bandwidth, lambda: self._decode(sequences))
        finally:
            for sequence in sequences:
                self.runtime.release(sequence)
        return prefill, decode

    def _chunks(self) -> list[tuple[int, int]]:
        """(tokens, end) of each step of a prompt."""
        ends = [*range(CHUNK_TOKENS, self.prompt, CHUNK_TOKENS), self.prompt]
        return [(end - start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _prefill(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            for count, end in self._chunks():
                self.runtime.step([Chunk(sequence, self.ids(count), int(end == self.prompt))])

    def _decode(self, sequences: list[Sequence]) -> None:
        """Greedy steps, the choice of the next tokens included."""
        tokens = self.ids(len(sequences))
        for _ in range(self.made):
            logits = self.runtime.step([Chunk(sequence, [token], 1) for sequence, token
                                        in zip(sequences, tokens, strict=True)])
            tokens = logits.argmax(axis=1)

    def _step_cost(self, sequences: int, tokens: int, context: int) -> Cost:
        symbols = {"tokens": sequences * tokens, "sequences": sequences, "rows": sequences,
                   "table_width": -(-context // PAGE)}
        return self.cost(symbols, context)

    def _decode_report(self, samples: list[Sample]) -> dict[str, Any]:
        batch, steps = self.settings.batch, self.made
        cost = self._step_cost(batch, 1, self.prompt + (self.made + 1) // 2)
        step_bytes = cost.weight_bytes + cost.state_bytes
        return {
            "tokens": self.made,
            "tokens_per_second": median(batch * steps / s.wall for s in samples),
            "ms_per_token": median(s.wall / steps for s in samples) * 1e3,
            "bytes_per_token": step_bytes / batch,
            "gb_per_second": median(step_bytes * steps / s.wall for s in samples) / 1e9,
            "read_bandwidth_gb_per_second": median(s.ceiling for s in samples) / 1e9,
            "share": median(step_bytes * steps / s.wall / s.ceiling for s in samples),
            "outside_share": median(1 - s.native / s.wall for s in samples)}


class EncoderBench(Bench):
    """`batch` sentences of `prompt_tokens` tokens, packed in one call."""

    def report(self) -> dict[str, Any]:
        limit = self.runtime.max_context
        tokens = self.settings.prompt_tokens or min(128, limit)
        batch = self.settings.batch
        sentences = [self.ids(tokens) for _ in range(batch)]

        def work() -> None:
            self.runtime.run(sentences)

        work()
        samples = [self.sample(self.peak, work) for _ in range(self.settings.repeat)]
        cost = self.cost({"tokens": tokens * batch, "sequences": batch})
        return {"encode": {
            "tokens": tokens,
            "sentences_per_second": median(batch / s.wall for s in samples),
            "ms_per_batch": median(s.wall for s in samples) * 1e3,
            **self.compute_report(samples, tokens * batch, cost.products)}}
