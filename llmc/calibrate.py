"""Calibration: what quantised matrices are multiplied by, found on text that the model makes.

No data is needed. The model, as floats, continues many sequences at once by sampling, and keeps the
left operands x of the products in question as it keeps keys and values: in paged caches, one for
each. In the end their second moments x x' are taken. The op `quantize` then minimises the error of
products instead of that of matrices.

Sequences begin as the model's texts do: with the token that is to begin them, where there is one.
From other first tokens the second moments are of another kind of text, and the divergence on real
text is a third larger (the 656K model: the first token draws attention and is an outlier). Mixed
temperatures are a little worse; twice the tokens and more damping change next to nothing.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmc import knobs
from llmc.codegen.target import Target
from llmc.driver import Calibration, Compiled, compile_imported, makes_logits, timed
from llmc.errors import LlmcError
from llmc.frontend.model import ImportedModel, load_model
from llmc.ir.dims import evaluate, symbol
from llmc.ir.graph import Node, TensorType
from llmc.ir.ops import make
from llmc.ir.product_rounding import operations, operations_before, parts
from llmc.ir.quantization import Quantization
from llmc.passes.lower import ShapeKey
from llmc.passes.quantize import Candidate, candidates
from llmc.passes.raise_patterns import raise_patterns
from llmc.passes.simplify import simplify
from llmc.quantizer import SecondMoments
from llmc.runtime.artifact import Artifact
from llmc.runtime.executor import Executor
from llmc.runtime.pages import PAGE
from llmc.runtime.pools import Pools
from llmc.runtime.progress import Progress, silent
from llmc.runtime.session import default_threads

SEQUENCES = 32
LENGTH = 256  # of each sequence, in tokens: 8192 in all
SHORTEST = 64  # where that is too much: half of 256 raise KL by 2 %
TEXT = 1 << 40  # floating-point operations of making it: the sequences are shorter where it is more
SEED = 0  # of the draw: the benchmark tries others
LIMIT = 30.0  # seconds that `auto` may add, from the first token to the last matrix rounded
TRIAL = 8  # steps after which it is known how long they take
SPEED_SIZE = 1024  # tokens and columns whose moments are taken to see how fast this machine is
MEMORY = 1 << 30  # bytes of what products are given: the sequences are shorter where it is more


def compile_quantized(path: str | Path, target: Target, quantization: Quantization,
                      dtype: str | None = None, progress: Progress = silent,
                      limits: ShapeKey | None = None, later: bool = False) -> Compiled:
    """As `driver.compile_model`, calibrated first if that is asked for, or pays."""
    timings: dict[str, float] = {}
    with timed(timings, "import"):
        model = load_model(path, dtype=dtype)
    return compile_imported(model, target, progress, limits, timings, quantization,
                            calibrate(model, quantization, progress), later)


def calibrate(model: ImportedModel, quantization: Quantization, progress: Progress = silent
              ) -> Calibration | None:
    """The second moments for a model's four-bit matrices, or why `auto` does without; None where
    nobody expects any. LlmcError if they are asked for and cannot be had."""
    if quantization.calibrate == "never" or not quantization.four_bits:
        return None
    always = quantization.calibrate == "always"
    model = replace(model, graph=raise_patterns(simplify(model.graph)))
    found, wanted, reason = _candidates(model, quantization)
    if reason and always:
        raise LlmcError(f"calibrate always: {model.path}: {reason} (leave calibrate out)")
    if not wanted:
        return Calibration(skipped=reason)
    names: dict[Node, str] = {}
    for each in wanted:
        names.setdefault(each.product.inputs[0], f"{each.name}.input")
    points = {names[point]: point for point in names}
    work = _Work.of(model, found, wanted, points)
    clock = _Clock(math.inf if always else LIMIT, progress)
    try:
        moments = _moments(model, points, work, clock)
    except _TooLong as error:
        return Calibration(skipped=f"it would take about {error.seconds:.0f} s here, and auto "
                           f"takes {LIMIT:.0f} s at most (--calibrate always: all that it takes)",
                           seconds=clock.seconds())
    return Calibration(moments, {each.name: names[each.product.inputs[0]] for each in wanted},
                       clock.seconds(), clock.limit)


def _candidates(model: ImportedModel, quantization: Quantization
                ) -> tuple[list[Candidate], list[Candidate], str]:
    """All products of a model, those to calibrate, and why there are none of these."""
    if model.kind != "causal_lm" or all(
            node["name"] != "page_table" for node in model.graph.inputs):
        return [], [], ("it makes no text to calibrate with, as it is no checkpoint of a language "
                        "model with a KV cache")
    counts = {node.shape[0] for node in model.graph.inputs if node["name"] in ("sequence", "rows")}
    found = candidates(model.graph, quantization, makes_logits(model))
    wanted = [each for each in found
              if each.options is not None and each.options.weights == "int4"
              and each.product.inputs[0].rank == 2 and each.product.inputs[0].shape[0] in counts]
    return found, wanted, "" if wanted else "none of its matrices becomes int4"


class _TooLong(Exception):
    """Calibration would take so many seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds


class _Clock:
    """Seconds since calibration began. limit: that it may take in all."""

    def __init__(self, limit: float, progress: Progress):
        self.limit = limit
        self.progress = progress
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self._started

    def expect(self, rest: float) -> None:
        """_TooLong if so many seconds more would be too many."""
        if self.seconds() + rest > self.limit:
            raise _TooLong(self.seconds() + rest)


@dataclass(frozen=True)
class _Work:
    """Of a calibration: steps of text, and floating-point operations of making it, of taking second
    moments, and of choosing codes by them."""

    steps: int
    text: float
    moments: float
    codes: float

    @classmethod
    def of(cls, model: ImportedModel, products: Sequence[Candidate], wanted: Sequence[Candidate],
           points: Mapping[str, Node]) -> _Work:
        """products: all of the model; wanted: those to calibrate, by what comes in at `points`."""
        inner = [evaluate(point.shape[-1], {}) for point in points.values()]
        each_token = sum(k * point.dtype.bits // 8
                         for k, point in zip(inner, points.values(), strict=True))
        elements = sum(math.prod(_sizes(each)) for each in products)
        steps = min(LENGTH, model.config.max_context or LENGTH,
                    max(PAGE, MEMORY // (each_token * SEQUENCES)),
                    max(SHORTEST, TEXT // (2 * elements * SEQUENCES)))
        tokens = steps * SEQUENCES
        codes = sum(operations(n, k) for n, k in map(_sizes, wanted))
        squares = sum(count * width**2 for count, width in map(parts, inner))
        return cls(steps, 2.0 * tokens * elements, float(tokens * squares),
                   float(codes + sum(map(operations_before, inner))))

    def seconds(self, speed: float) -> float:
        """What all of it takes at so many operations a second."""
        return (self.text + self.moments + self.codes) / speed

    def seconds_behind_text(self, speed: float) -> float:
        """The same for what follows the text."""
        return (self.moments + self.codes) / speed


def _sizes(candidate: Candidate) -> list[int]:
    return [evaluate(size, {}) for size in candidate.matrix.shape]


def _speed(second_moments: SecondMoments) -> float:
    """Floating-point operations a second of this machine, as busy as it is now."""
    x = np.full((SPEED_SIZE, SPEED_SIZE), 0.5, np.float32)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        second_moments(x)
        seconds.append(time.perf_counter() - started)
    return SPEED_SIZE**3 / sorted(seconds)[1]  # half of the squares, as they are symmetric


def _moments(model: ImportedModel, points: Mapping[str, Node], work: _Work, clock: _Clock
             ) -> dict[str, np.ndarray]:
    """x x' of each point [tokens, k], the mean over the tokens that the model makes: f32 [parts,
    width, width], see `ir.product_rounding.parts`."""
    second_moments = SecondMoments(knobs.cores())
    speed = _speed(second_moments)
    clock.expect(work.seconds(speed))
    inputs = {node["name"]: node for node in model.graph.inputs}
    caches = {name: _kept(name, point, inputs) for name, point in points.items()}
    updates = (*model.graph.updates, *((grown.inputs[0], grown) for grown in caches.values()))
    tapped = replace(model, graph=replace(model.graph, updates=updates))
    limits = dict.fromkeys(("tokens", "sequences", "rows"), (SEQUENCES, SEQUENCES))
    with tempfile.TemporaryDirectory(prefix="llmc-calibrate-") as directory:
        compiled = compile_imported(tapped, Target.host(), limits=limits)
        artifact = Artifact(compiled.write(Path(directory) / "model"))
        executor = Executor(artifact, default_threads(artifact.manifest.weight_bytes))
        try:
            _generate(model, executor, work, speed, clock)
            found = {}
            for state in compiled.graph.states():
                for name, memory in _copies(state, executor, caches):
                    clock.expect(0.0)
                    found[name] = _mean_square(memory, work.steps, second_moments)
                    clock.progress("calibrate: moments", len(found) / len(caches))
        finally:
            executor.close()
    return found


def _kept(name: str, point: Node, inputs: Mapping[str, Node]) -> Node:
    """A cache like those of attention that keeps every token's x [tokens, k], after a step."""
    count, k = point.shape
    state = make("state", name=name, type=TensorType(point.dtype, (symbol("pool_pages"), PAGE, 1,
                                                                   k)))
    places = [inputs["sequence"], inputs["positions"]]
    if count != places[0].shape[0]:  # of the rows whose logits are wanted
        places = [make("gather", each, inputs["rows"], axis=0) for each in places]
    return make("cache_append", state, make("reshape", point, shape=(count, 1, k)),
                inputs["page_table"], *places)


def _copies(state: Node, executor: Executor, caches: Mapping[str, Node]
            ) -> Iterator[tuple[str, np.ndarray]]:
    """(name, memory) of a state, or of each turn's, if it is one of the caches."""
    names = state["names"] or (state["name"],)
    if names[0] in caches:
        yield from zip(names, executor.state_copies(state["name"]), strict=True)


def _mean_square(memory: np.ndarray, length: int, moments: SecondMoments) -> np.ndarray:
    """The mean of x x' over the first `length` tokens of every sequence, part by part; zeros where
    the last part is narrower."""
    k = memory.shape[-1]
    pages = memory[:len(memory) // SEQUENCES * SEQUENCES].reshape(SEQUENCES, -1, k)
    count, width = parts(k)
    squares = np.zeros((count, width, width), np.float32)
    for part in range(count):
        x = pages[:, :length, part * width:(part + 1) * width].astype(np.float32)
        squares[part, :x.shape[2], :x.shape[2]] = moments(x.reshape(SEQUENCES * length, -1))
    return squares


def _generate(model: ImportedModel, executor: Executor, work: _Work, speed: float, clock: _Clock
              ) -> None:
    """Run sequences of so many tokens, sampled at temperature 1; speed: of what follows."""
    width = -(-work.steps // PAGE)
    random = np.random.default_rng(SEED)
    count = np.arange(SEQUENCES, dtype=np.int32)
    vocabulary, begin = model.config.vocab_size, model.config.bos_token_id
    ids = random.integers(0, vocabulary, SEQUENCES).astype(np.int32)
    if begin is not None and begin < vocabulary:  # cut vocabularies keep the id of the whole one
        ids[:] = begin
    inputs = {"sequence": count, "offsets": np.arange(SEQUENCES + 1, dtype=np.int32),
              "rows": count, "slots": count,
              "page_table": np.arange(SEQUENCES * width, dtype=np.int32).reshape(-1, width)}
    wanted = {tensor.name for tensor in executor.inputs}
    executor.allocate_states(Pools(SEQUENCES * width, SEQUENCES).symbols())
    started = clock.seconds()
    for position in range(work.steps):
        inputs |= {"ids": ids, "positions": np.full(SEQUENCES, position, np.int32)}
        logits = executor.run({name: inputs[name] for name in wanted})["logits"]
        ids = _sampled(logits, random)
        clock.progress("calibrate: text", (position + 1) / work.steps)
        if position + 1 == TRIAL:
            each = (clock.seconds() - started) / TRIAL
            clock.expect(each * (work.steps - TRIAL) + work.seconds_behind_text(speed))
        clock.expect(0.0)


def _sampled(logits: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A token of each row, i32, at temperature 1."""
    noise = random.gumbel(size=logits.shape).astype(np.float32)
    return (logits + noise).argmax(axis=1).astype(np.int32)
