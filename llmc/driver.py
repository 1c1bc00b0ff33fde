"""compile: frontend -> passes -> lowering -> codegen -> artifact. The one place that knows all."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from llmc.codegen import generate, generate_all
from llmc.codegen.beside import pool
from llmc.codegen.host import Code
from llmc.codegen.target import Target
from llmc.errors import CompileError, LlmcError, ValueNeeded
from llmc.frontend.model import ImportedModel, StoredTensor, load_model
from llmc.ir.dims import format_dim
from llmc.ir.dtypes import DType
from llmc.ir.graph import Graph, walk
from llmc.ir.index_ranges import index_ranges
from llmc.ir.program import Capabilities, Program
from llmc.ir.program_text import format_program
from llmc.ir.quantization import FLOAT, Quantization
from llmc.ir.text import format_graph
from llmc.passes.activation_codes import code_activations
from llmc.passes.greedy import with_greedy
from llmc.passes.lower import ShapeKey, lower
from llmc.passes.pipeline import Pass, optimize
from llmc.passes.quantize import candidates, quantize
from llmc.passes.quantize_cache import quantize_cache
from llmc.runtime.artifact import (
    GRAPH,
    WEIGHTS,
    Manifest,
    QuantizationInfo,
    SymbolInfo,
    TensorInfo,
    VariantInfo,
    WeightInfo,
    hash_file,
    hash_files,
    write_manifest,
)
from llmc.runtime.progress import Progress, silent
from llmc.weights import WeightFile, WeightMaker, write_weights


@dataclass(frozen=True)
class Calibration:
    """Second moments of what quantised matrices are multiplied by: arrays f32 by name, as the op
    `quantize` takes them, and name of a weight -> name of its array. seconds: what it took to find
    them; limit: what that and their use may take in all. skipped: why there are none."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    limit: float = math.inf
    skipped: str = ""


@dataclass
class Compiled:
    """A model lowered and compiled for a target, before it is written.

    codes: machine code of each program; where there is none yet, `write` makes it beside the
    weights. timings: seconds per phase. kept: (name, reason) of the matrices that `quantization`
    leaves as they are. `write` makes the artifact, and tells in `report` what was quantised.
    """

    model: ImportedModel
    graph: Graph
    target: Target
    programs: dict[str, Program]
    codes: dict
    timings: dict[str, float] = field(default_factory=dict)
    quantization: Quantization | None = None
    kept: tuple[tuple[str, str], ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    report: QuantizationInfo | None = None

    def generate(self, progress: Progress = silent) -> None:
        """Make the machine code."""
        ready = count(1)
        progress("compile", 0.0)
        with timed(self.timings, "codegen"):
            self.codes = dict(generate_all(
                self.programs, self.target,
                lambda: progress("compile", next(ready) / (len(self.programs) + 1))))

    def write(self, path: str | os.PathLike[str], progress: Progress = silent) -> Path:
        """Write the artifact directory, whole or not at all; an old one there is replaced."""
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                self._write_into(temporary, progress)
                _replace_directory(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise CompileError(f"cannot write {target}: {error.strerror or error}") from None
        return target

    def _write_into(self, directory: Path, progress: Progress) -> None:
        os.chmod(directory, 0o755)
        (directory / "variants").mkdir()
        (directory / GRAPH).write_text(format_graph(self.graph))
        (directory / "files").mkdir()
        for source in self.model.companion_files:
            shutil.copyfile(source, directory / "files" / source.name)
        program = next(iter(self.programs.values()))
        maker = WeightMaker(self.model, self.calibration.limit - self.calibration.seconds)
        maker.prepare(program)
        with pool(1) as beside:
            code = beside.submit(self._write_code, directory / "variants")
            with timed(self.timings, "weights"), open(directory / WEIGHTS, "wb") as stream:
                file = WeightFile(stream)
                weights = tuple(write_weights(program, maker, file, progress))
                hashes = {WEIGHTS: file.close(), GRAPH: hash_file(directory / GRAPH),
                          **hash_files(directory / "files")}
            code.result()
        hashes |= hash_files(directory / "variants")
        self.report = self._quantized(maker)
        write_manifest(directory, self._manifest(program, weights, file.size, hashes))

    def _write_code(self, directory: Path) -> None:
        if not self.codes:
            self.generate()
        for name, code in self.codes.items():
            for extension, contents in code.files().items():
                (directory / f"{name}.{extension}").write_bytes(contents)
            (directory / f"{name}.txt").write_text(format_program(self.programs[name]))

    def _quantized(self, maker: WeightMaker) -> QuantizationInfo | None:
        if self.quantization is None:
            return None
        seconds = self.calibration.seconds + maker.moments_seconds
        return QuantizationInfo(asdict(self.quantization), tuple(maker.quantized), self.kept,
                                seconds, self.calibration.skipped or maker.skipped)

    def _manifest(self, program: Program, weights: tuple[WeightInfo, ...], size: int,
                  hashes: dict[str, str]) -> Manifest:
        variants = tuple(
            variant_info(name, program, self.codes[name])
            for name, program in self.programs.items())
        symbols = tuple(SymbolInfo(s.name, s.low, s.high, s.multiple)
                        for s in self.graph.symbols())
        interface = getattr(self.model, "token_interface", None)
        return Manifest(
            self.model.kind, self.graph.name, self.target.text(), compute_dtype(self.graph),
            self.model.fingerprint, _plain(self.model.config), symbols,
            _tensors(program, "input", self.model),
            _tensors(program, "output"), _tensors(program, "state"),
            weights, variants, size, _plain(interface) if interface else None, self.report,
            self.timings, hashes)


def compile_model(path: str | Path, target: Target, dtype: str | None = None,
                  progress: Progress = silent, limits: ShapeKey | None = None,
                  quantization: Quantization | None = None, later: bool = False) -> Compiled:
    """Read, optimise, lower and compile a model.

    path: an .onnx file or a checkpoint directory. dtype: compute dtype (default: the
    checkpoint's). limits: symbol -> (low, high), narrower than the model's own. quantization: what
    the weights become, uncalibrated (`calibrate.compile_quantized` calibrates). later: machine code
    is made when the artifact is written, beside its weights.
    """
    timings: dict[str, float] = {}
    with timed(timings, "import"):
        model = load_model(path, dtype=dtype)
    return compile_imported(model, target, progress, limits, timings, quantization, later=later)


def compile_onnx(source: Path | bytes, target: Target, values: Mapping[str, np.ndarray],
                 fed: Collection[str] = ()) -> tuple[Compiled | None, str | None]:
    """Compile an .onnx file, or such a file's content, for these values of tensors. fed: names of
    overridable initializers that are inputs.

    (the model, None); or, where it needs one more value: what computes it as its output "value",
    and its key in `values`. The first is None if the key is the name of the input that has it.
    """
    from llmc.frontend.onnx import import_onnx, import_onnx_bytes

    try:
        model = (import_onnx_bytes(source, values=values, fed=fed) if isinstance(source, bytes)
                 else import_onnx(source, values, fed))
        return compile_imported(model, target), None
    except ValueNeeded as needed:
        given = needed.node.op == "input"
        return None if given else compile_imported(needed.model, target), needed.key


def graph_for(model: ImportedModel, capabilities: Capabilities) -> Graph:
    """The model's graph as a target takes it: a GPU chooses a language model's likeliest token."""
    if model.kind == "causal_lm" and capabilities.weight_layout == "columns":
        return with_greedy(model.graph)
    return model.graph


def optimized(model: ImportedModel, capabilities: Capabilities,
              quantization: Quantization | None = None, calibration: Calibration | None = None
              ) -> tuple[Graph, tuple[tuple[str, str], ...]]:
    """The graph that programs are lowered from, and `Compiled.kept`."""
    kept: list[tuple[str, str]] = []
    quantizing = None if quantization is None else (
        "quantize", _quantizing(model, quantization, calibration, kept))
    graph = optimize(graph_for(model, capabilities), capabilities, before_outline=quantizing)
    return graph, tuple(kept)


def compile_imported(model: ImportedModel, target: Target, progress: Progress = silent,
                     limits: ShapeKey | None = None,
                     timings: dict[str, float] | None = None,
                     quantization: Quantization | None = None,
                     calibration: Calibration | None = None, later: bool = False) -> Compiled:
    """The part of compile_model after the frontend."""
    timings = {} if timings is None else timings
    capabilities = target.capabilities()
    if calibration is not None:
        timings["calibration"] = calibration.seconds
        model = _with_moments(model, calibration)
    with timed(timings, "passes"):
        graph, kept = optimized(model, capabilities, quantization, calibration)
    with timed(timings, "lower"):
        programs = {name: lower(graph, capabilities, key) for name, key in variant_keys(
            graph, capabilities, dict(limits or {})).items()}
    compiled = Compiled(model, graph, target, programs, {}, timings, quantization, kept,
                        calibration or Calibration())
    if not later:
        compiled.generate(progress)
    progress("compile", 1.0)
    return compiled


def _with_moments(model: ImportedModel, calibration: Calibration) -> ImportedModel:
    """The model with the moments among its tensors."""
    tensors = {name: StoredTensor.from_array(name, array, model.path)
               for name, array in calibration.arrays.items()}
    return replace(model, parameters=dict(model.parameters) | tensors)


def makes_logits(model: ImportedModel) -> bool:
    """Whether the model's last product is a language model's head."""
    return model.kind == "causal_lm" or model.token_interface is not None


def _quantizing(model: ImportedModel, quantization: Quantization, calibration: Calibration | None,
                kept: list[tuple[str, str]]) -> Pass:
    """The pass `quantize` for a model, which also fills `kept`."""
    moments = calibration.names if calibration is not None else {}

    def apply(graph: Graph, capabilities: Capabilities) -> Graph:
        if quantization.kv_cache == "int8":
            graph = _with_coded_cache(graph, model, capabilities)
        if quantization.weights == FLOAT:
            return graph
        found = candidates(graph, quantization, makes_logits(model))
        kept.extend((each.name, each.reason) for each in found if each.options is None)
        graph = quantize(graph, found, capabilities, moments)
        if quantization.activations == "int8" and capabilities.byte_dot:
            return code_activations(graph)
        return graph

    return apply


def _with_coded_cache(graph: Graph, model: ImportedModel, capabilities: Capabilities) -> Graph:
    """The graph with 8-bit caches; CompileError where there are none or the target has no kernel
    for them."""
    if capabilities.weight_layout == "columns":
        raise CompileError("the attention of GPUs reads no 8-bit cache: compile for the host, or "
                           "with kv_cache float")
    changed = quantize_cache(graph)
    if changed is graph:
        raise CompileError(f"{model.path} has no KV cache of pages, so that kv_cache int8 means "
                           "nothing: that is for checkpoints of language models")
    return changed


FEW = ("tokens", "sequences", "rows")


def variant_keys(graph: Graph, capabilities: Capabilities, limits: dict) -> dict[str, dict]:
    """The variants that every artifact carries: generic, and one for the few tokens of decoding;
    for GPUs also one for a single token: what is constant there costs no instructions."""
    names = {s.name: s for s in graph.symbols()}
    keys = {"generic": limits}
    if "tokens" in names and "rows" in names:
        ranges = {name: limits.get(name, (names[name].low, names[name].high)) for name in FEW}
        few = {name: (low, min(high, capabilities.few_rows))
               for name, (low, high) in ranges.items()}
        if all(low <= high for low, high in few.values()):
            keys["few"] = {**limits, **few}
            if capabilities.weight_layout == "columns" and all(
                    low <= 1 <= high for low, high in ranges.values()):
                keys["one"] = {**limits, "tokens": (1, 1), "sequences": (1, 1),
                               "rows": (ranges["rows"][0], 1)}
    return keys


def compile_variant(graph: Graph, reference: Program, target: Target, key: ShapeKey,
                    schedule: Mapping[str, Any]) -> tuple[Program, Any]:
    """Code (`generate`'s) of an artifact's graph for one more shape key.

    reference: the artifact's generic program, with which it shares weights, states and the ABI.
    schedule: capabilities to lower with instead of the target's own, such as matmul_rows.
    CompileError if this llmc lays any of them out differently than the one that wrote the artifact.
    """
    program = lower(graph, replace(reference.capabilities, **schedule), key)
    if _shared(program) != _shared(reference):
        raise CompileError(f"{graph.name} was compiled by another version of llmc, whose weights "
                           "or states lie differently: compile the model again")
    return program, generate(program, target)


def _shared(program: Program) -> list[tuple]:
    """What all variants of an artifact must have in common."""
    symbols: list[tuple] = [(name,) for name, _, _ in program.symbols]
    return symbols + [(b.name, b.role, str(b.type.dtype), b.layout, b.count)
                      for role in ("input", "output", "weight", "state")
                      for b in program.with_role(role)]


def variant_info(name: str, program: Program, code: Code) -> VariantInfo:
    """What the runtime must know of a variant."""
    return VariantInfo(name, {s: (low, high) for s, low, high in program.symbols},
                       format_dim(program.arena_bytes), format_dim(code.scratch_bytes),
                       len(list(program.stages())))


def compute_dtype(graph: Graph) -> str:
    """The floating dtype that most of a graph's values have."""
    counts: dict[str, int] = {}
    for node in graph.nodes():
        if not isinstance(node.type, tuple) and node.dtype.is_float:
            counts[node.dtype.name] = counts.get(node.dtype.name, 0) + 1
    return max(counts, key=lambda name: counts[name], default="f32")


def _plain(facts) -> dict:
    """A dataclass as JSON values; dtypes by name."""
    return {key: str(value) if isinstance(value, DType) else value
            for key, value in asdict(facts).items()}


def table_sizes(graph: Graph) -> dict[str, int]:
    """Input -> rows of the smallest table of parameters that its integers pick from."""
    sizes: dict[str, int] = {}
    for node in graph.nodes():
        if node.op != "gather" or not all(leaf.op in ("parameter", "constant")
                                          for leaf in walk([node.inputs[0]]) if not leaf.inputs):
            continue
        index, rows = node.inputs[1], node.inputs[0].shape[node["axis"]]
        while index.op in ("cast", "reshape", "broadcast"):
            index = index.inputs[0]
        if index.op == "input" and isinstance(rows, int):
            name = index["name"]
            sizes[name] = min(rows, sizes.get(name, rows))
    return sizes


def _tensors(program: Program, role: str, model: ImportedModel | None = None
             ) -> tuple[TensorInfo, ...]:
    """The buffers of a role; of a model's inputs, what is known of their values too."""
    limits = table_sizes(model.graph) if model else {}
    indexes = index_ranges(model.graph) if model and model.kind == "onnx" else {}
    ranges = {name: tuple(tuple(map(format_dim, use)) for use in uses)
              for name, uses in indexes.items() if name not in limits}
    return tuple(TensorInfo(b.name, str(b.type.dtype), tuple(format_dim(d) for d in b.type.shape),
                            b.count, limits.get(b.name, 0), ranges.get(b.name, ()))
                 for b in program.with_role(role))


class timed:
    """Adds the seconds of a with-block to timings[name]."""

    def __init__(self, timings: dict[str, float], name: str):
        self.timings, self.name = timings, name

    def __enter__(self):
        self.started = time.perf_counter()

    def __exit__(self, *_):
        spent = time.perf_counter() - self.started
        self.timings[self.name] = self.timings.get(self.name, 0.0) + spent


def check_replaceable(target: Path) -> None:
    """LlmcError unless an artifact may be written there: nothing, an artifact, or an empty
    directory is there now."""
    if target.is_dir() and ((target / "manifest.json").is_file() or not any(target.iterdir())):
        return
    if target.exists():
        raise LlmcError(f"{target} exists and is no artifact: choose another output")


def _replace_directory(source: Path, target: Path) -> None:
    """Move a finished directory into place; the old one goes only when the new one is there."""
    check_replaceable(target)
    if not target.exists():
        source.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / "previous")
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)
