"""Measures a loaded model beside this machine's ceilings, sampled in the same rounds.

Clocks and bandwidth of shared machines move from minute to minute, so a round is: ceiling, model,
ceiling. A share is the median over rounds of what the model did over the best of the samples around
it: other processes only ever lower a sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np

from llmc.ceilings import Ceilings
from llmc.codegen.target import Target
from llmc.errors import LlmcError, ShapeError
from llmc.ir.cost import Cost, Shape, program_cost
from llmc.ir.program import Program
from llmc.ir.program_text import parse_program
from llmc.runtime.decode import Start
from llmc.runtime.memory import physical_memory
from llmc.runtime.pages import PAGE, Sequence
from llmc.runtime.sampling import Sampling
from llmc.runtime.session import Runtime
from llmc.runtime.step import GREEDY, Chunk

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


class Peaks(Protocol):
    """Ceilings of the machine that a model runs on; each call is one fresh sample, a second."""

    def read_bandwidth(self) -> float: ...

    def peak_f32(self) -> float: ...

    def peak_bf16(self) -> float: ...


@dataclass(frozen=True)
class Sample:
    """One round of one thing: seconds by the clock, of them in the model's steps and waiting for a
    GPU, and the best ceiling measured around it."""

    wall: float
    native: float
    waited: float
    ceiling: float


def measure(runtime: Runtime, settings: Settings) -> dict[str, Any]:
    """The report of `llmc bench --json`; rates in decimal units (GB/s = 1e9 bytes a second)."""
    kinds: dict[str, type[Bench]] = {"causal_lm": LanguageModelBench, "encoder": EncoderBench}
    kind = kinds.get(runtime.manifest.kind)
    if kind is None:
        raise LlmcError(f"{runtime.manifest.name} is an ONNX graph: bench measures checkpoints of "
                        "language models and encoders")
    report: dict[str, Any] = {
        "dtype": runtime.manifest.dtype, "target": runtime.manifest.target,
        "batch": settings.batch, "repeat": settings.repeat}
    if not on_gpu(runtime):
        host = {"threads": runtime.threads}
        return report | host | kind(runtime, settings, Ceilings(runtime.threads)).report()
    from llmc.cuda_ceilings import CudaCeilings

    executor: Any = runtime.executor
    gpu = {"device": executor.device.name}
    with CudaCeilings(executor.device) as ceilings:
        return report | gpu | kind(runtime, settings, ceilings).report()


def on_gpu(runtime: Runtime) -> bool:
    """Whether the model's steps run there."""
    return runtime.manifest.target.startswith("nvptx")


class StepCosts:
    """What steps of a model must move and compute, by the artifact's programs: those of code that
    came later compute the same."""

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._programs: dict[str, Program] = {}

    def of(self, symbols: dict[str, int], context: int = 0) -> Cost:
        """Of one step; context: tokens of each sequence that attention sees."""
        artifact = self._runtime.artifact
        values = self._runtime.executor.known | symbols
        covering = (info for info in artifact.manifest.variants if all(
            low <= values[name] <= high for name, (low, high) in info.key.items()))
        info = min(covering, key=lambda info: sum(high - low for low, high in info.key.values()))
        if info.name not in self._programs:
            self._programs[info.name] = parse_program(artifact.program_text(info))
        return program_cost(self._programs[info.name], Shape(values, context))

    def of_tokens(self, sequences: int, tokens: int, context: int) -> Cost:
        """Of a language model's step of so many tokens of each sequence."""
        return self.of({"tokens": sequences * tokens, "sequences": sequences, "rows": sequences,
                        "table_width": -(-context // PAGE)}, context)


class Bench:
    """What both kinds of model share: the clock and the ceilings."""

    def __init__(self, runtime: Runtime, settings: Settings, ceilings: Peaks):
        self.runtime = runtime
        self.settings = settings
        self.ceilings = ceilings
        self.costs = StepCosts(runtime)
        self.random = np.random.default_rng(0)
        self.vocabulary = runtime.config["vocab_size"]
        halves = runtime.manifest.dtype in (("bf16", "f16") if on_gpu(runtime) else ("bf16",))
        self.peak = ceilings.peak_bf16 if halves else ceilings.peak_f32
        dots = on_gpu(runtime) or Target.host().capabilities().bf16_dot
        self.peak_dtype = "bf16" if halves and dots else "f32"

    def report(self) -> dict[str, Any]:
        """The figures."""
        raise NotImplementedError

    def sample(self, ceiling: Callable[[], float], work: Callable[[], None]) -> Sample:
        samples = [ceiling() for _ in range(SAMPLES)]
        native, waited = self._native_seconds(), self.runtime.executor.waited
        started = time.perf_counter()
        work()
        wall = time.perf_counter() - started
        native, waited = self._native_seconds() - native, self.runtime.executor.waited - waited
        samples += [ceiling() for _ in range(SAMPLES)]
        return Sample(wall, native, waited, max(samples))

    def _native_seconds(self) -> float:
        return sum(variant.seconds for variant in self.runtime.executor.variants)

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

    def __init__(self, runtime: Runtime, settings: Settings, ceilings: Peaks):
        super().__init__(runtime, settings, ceilings)
        context = runtime.max_context
        self.made = settings.generate_tokens or min(GENERATE_TOKENS, max(1, context // 4))
        self.prompt = settings.prompt_tokens or max(1, min(PROMPT_TOKENS, context - self.made))
        if self.prompt + self.made > context:
            raise ShapeError(f"{self.prompt} prompt tokens and {self.made} made exceed the context "
                             f"of {context}: lower --prompt-tokens or --generate-tokens")
        self.model = runtime.language_model
        self.output = GREEDY if self.model.chooses else "logits"
        self._require_cache()

    def _require_cache(self) -> None:
        """ShapeError if the batch does not fit a step or the cache."""
        batch, model = self.settings.batch, self.model
        most = min(model.most_sequences, model.most_tokens)
        if batch > most:
            raise ShapeError(f"--batch {batch}: a step takes {most} sequences at most")
        pages = batch * -(-(self.prompt + self.made) // PAGE)
        if pages > model.pool.size:
            raise ShapeError(f"--batch {batch} needs {pages} pages of {PAGE} tokens, there is "
                             f"memory for {model.pool.size}: lower --batch, --prompt-tokens or "
                             "--generate-tokens")

    def report(self) -> dict[str, Any]:
        prefill: list[Sample] = []
        decode: list[Sample] = []
        self._round()  # touches weights, caches and arena
        for _ in range(self.settings.repeat):
            for samples, sample in zip((prefill, decode), self._round(), strict=True):
                samples.append(sample)
        tokens = self.prompt * self.settings.batch
        flops = self.settings.batch * sum(
            self.costs.of_tokens(1, count, end).products for count, end in self._chunks())
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
        size = self.model.chunk_tokens
        ends = [*range(size, self.prompt, size), self.prompt]
        return [(end - start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _prefill(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            for count, end in self._chunks():
                self.runtime.step([Chunk(sequence, self.ids(count), int(end == self.prompt))],
                                  self.output)

    def _decode(self, sequences: list[Sequence]) -> None:
        """Greedy steps, the choice of the next tokens included."""
        tokens = self.ids(len(sequences))
        steps = self.runtime.decode_ahead(sequences, [
            Start(token, sequence.length, Sampling(), slot=sequence.slot or 0) for token, sequence
            in zip(tokens.tolist(), sequences, strict=True)], self.made)
        if steps is not None:
            with closing(steps):
                for _ in steps:
                    pass
            return
        for _ in range(self.made):
            logits = self.runtime.step([Chunk(sequence, [token], 1) for sequence, token
                                        in zip(sequences, tokens, strict=True)])
            tokens = logits.argmax(axis=1)

    def _decode_report(self, samples: list[Sample]) -> dict[str, Any]:
        batch, steps = self.settings.batch, self.made
        cost = self.costs.of_tokens(batch, 1, self.prompt + (self.made + 1) // 2)
        step_bytes = cost.weight_bytes + cost.state_bytes
        host = {"host_us_per_step": median((s.wall - s.waited) / steps for s in samples) * 1e6}
        return {
            **(host if on_gpu(self.runtime) else {}),
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
        wanted = 4 * batch * tokens * self.runtime.config["hidden_size"]
        if wanted > physical_memory() // 2:
            raise ShapeError(f"--batch {batch} of {tokens} tokens makes {wanted >> 30} GiB of "
                             "hidden states, which must fit half of this machine's memory: lower "
                             "--batch or --prompt-tokens")
        sentences = [self.ids(tokens) for _ in range(batch)]

        def work() -> None:
            self.runtime.run(sentences)

        work()
        samples = [self.sample(self.peak, work) for _ in range(self.settings.repeat)]
        cost = self.costs.of({"tokens": tokens * batch, "sequences": batch})
        return {"encode": {
            "tokens": tokens,
            "sentences_per_second": median(batch / s.wall for s in samples),
            "ms_per_batch": median(s.wall for s in samples) * 1e3,
            **self.compute_report(samples, tokens * batch, cost.products)}}
