"""Calibration: what quantised matrices are multiplied by, found on text that the model makes.

No data is needed. The model, as floats, continues many sequences at once by sampling, and keeps the
left operands x of the products in question as it keeps keys and values: in paged caches, one for
each. In the end their second moments x x' are taken. The op `quantize` then minimises the error of
products instead of that of matrices.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmc.codegen.target import Target
from llmc.driver import Calibration, Compiled, compile_imported, makes_logits, timed
from llmc.errors import LlmcError
from llmc.frontend.model import ImportedModel, load_model
from llmc.ir.dims import evaluate, symbol
from llmc.ir.graph import Node, TensorType
from llmc.ir.ops import make
from llmc.ir.quantization import FLOAT, Quantization
from llmc.passes.lower import ShapeKey
from llmc.passes.quantize import Candidate, candidates
from llmc.passes.raise_patterns import raise_patterns
from llmc.passes.simplify import simplify
from llmc.runtime.artifact import Artifact
from llmc.runtime.executor import Executor
from llmc.runtime.pages import PAGE
from llmc.runtime.pools import Pools
from llmc.runtime.progress import Progress, silent
from llmc.runtime.session import default_threads

SEQUENCES = 32
LENGTH = 256  # of each sequence, in tokens: 8192 in all
CHEAP = 2e10  # multiplications of all error feedback, n * k * k: a second or so
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
    """The second moments for a model's four-bit matrices; None if there are none, or where `auto`
    finds it too dear. LlmcError if it is asked for and the model makes no text."""
    if quantization.calibrate == "never" or quantization.weights == FLOAT:
        return None
    if model.kind != "causal_lm" or all(
            node["name"] != "page_table" for node in model.graph.inputs):
        if quantization.calibrate == "always":
            raise LlmcError(f"{model.path} is no checkpoint of a language model with a KV "
                            "cache: it makes no text to calibrate with")
        return None
    graph = raise_patterns(simplify(model.graph))
    counts = {node.shape[0] for node in graph.inputs if node["name"] in ("sequence", "rows")}
    wanted = [each for each in candidates(graph, quantization, makes_logits(model))
              if each.options is not None and each.options.weights == "int4"
              and each.product.inputs[0].rank == 2 and each.product.inputs[0].shape[0] in counts]
    if not wanted or (quantization.calibrate == "auto" and _cost(wanted) > CHEAP):
        return None
    started = time.perf_counter()
    names: dict[Node, str] = {}
    for each in wanted:
        names.setdefault(each.product.inputs[0], f"{each.name}.input")
    moments = _moments(replace(model, graph=graph), {names[point]: point for point in names},
                       progress)
    return Calibration(moments, {each.name: names[each.product.inputs[0]] for each in wanted},
                       time.perf_counter() - started)


def _cost(wanted: Sequence[Candidate]) -> float:
    """Multiplications of the error feedback."""
    shapes = [[evaluate(size, {}) for size in each.matrix.shape] for each in wanted]
    return float(sum(n * k * k for n, k in shapes))


def _moments(model: ImportedModel, points: Mapping[str, Node], progress: Progress
             ) -> dict[str, np.ndarray]:
    """x x' of each point [tokens, k], the mean over the tokens that the model makes; f32 [k, k]."""
    inputs = {node["name"]: node for node in model.graph.inputs}
    caches = {name: _kept(name, point, inputs) for name, point in points.items()}
    updates = (*model.graph.updates, *((grown.inputs[0], grown) for grown in caches.values()))
    tapped = replace(model, graph=replace(model.graph, updates=updates))
    limits = dict.fromkeys(("tokens", "sequences", "rows"), (SEQUENCES, SEQUENCES))
    each_token = sum(evaluate(point.shape[-1], {}) * point.dtype.bits // 8
                     for point in points.values())
    length = min(LENGTH, model.config.max_context or LENGTH,
                 max(PAGE, MEMORY // (each_token * SEQUENCES)))
    with tempfile.TemporaryDirectory(prefix="llmc-calibrate-") as directory:
        compiled = compile_imported(tapped, Target.host(), limits=limits)
        artifact = Artifact(compiled.write(Path(directory) / "model"))
        executor = Executor(artifact, default_threads(artifact.manifest.weight_bytes))
        try:
            _generate(model, executor, length, progress)
            found = {name: _mean_square(memory, length)
                     for state in compiled.graph.states()
                     for name, memory in _copies(state, executor, caches)}
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


def _mean_square(memory: np.ndarray, length: int) -> np.ndarray:
    """x x' over the first `length` tokens of every sequence."""
    k = memory.shape[-1]
    pages = memory[:len(memory) // SEQUENCES * SEQUENCES].reshape(SEQUENCES, -1, k)
    x = pages[:, :length].reshape(-1, k).astype(np.float32)
    return x.T @ x / np.float32(len(x))


def _generate(model: ImportedModel, executor: Executor, length: int, progress: Progress) -> None:
    """Run sequences of so many tokens, sampled at temperature 1."""
    width = -(-length // PAGE)
    random = np.random.default_rng(0)
    count = np.arange(SEQUENCES, dtype=np.int32)
    ids = random.integers(0, model.config.vocab_size, SEQUENCES).astype(np.int32)
    if model.config.bos_token_id is not None:
        ids[:] = model.config.bos_token_id
    inputs = {"sequence": count, "offsets": np.arange(SEQUENCES + 1, dtype=np.int32),
              "rows": count, "slots": count,
              "page_table": np.arange(SEQUENCES * width, dtype=np.int32).reshape(-1, width)}
    wanted = {tensor.name for tensor in executor.inputs}
    executor.allocate_states(Pools(SEQUENCES * width, SEQUENCES).symbols())
    for position in range(length):
        inputs |= {"ids": ids, "positions": np.full(SEQUENCES, position, np.int32)}
        logits = executor.run({name: inputs[name] for name in wanted})["logits"]
        noise = random.gumbel(size=logits.shape).astype(np.float32)
        ids = (logits + noise).argmax(axis=1).astype(np.int32)
        progress("calibrate", (position + 1) / length)
