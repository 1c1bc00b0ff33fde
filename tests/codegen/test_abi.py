"""The C ABI, called through ctypes: what it computes, and everything that it refuses."""

import ctypes
import json
import resource
import struct
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
import pytest

from llmc.codegen.host.abi_cpu import BITS, emit_check, required
from llmc.codegen.host.abi_interface import (
    BATCH,
    BATCH_ARRAYS,
    BATCH_SIZES,
    CODES,
    NUMBERS,
    OPTIONS,
)
from llmc.codegen.llvm import I32, define, emit_object
from llmc.codegen.target import Target
from llmc.driver import compile_model
from llmc.emit import emit
from llmc.errors import CompileError
from llmc.runtime.host_device import load_object
from llmc.runtime.memory import aligned_empty
from tests.conftest import EMBEDDED, GOLDENS

POINTER, SIZE, CODE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
SIGNATURES = {
    "create": (CODE, POINTER, SIZE, POINTER, POINTER), "destroy": (None, POINTER),
    "step": (CODE, POINTER, POINTER, POINTER), "error": (ctypes.c_char_p, CODE),
    "feed": (CODE, POINTER, POINTER, SIZE, SIZE, POINTER), "run": (CODE, *[POINTER] * 4)}
LIBC = {"calloc", "clock_gettime", "free", "malloc", "memcpy", "memmove", "memset",
        "nanosleep", "posix_memalign", "pthread_create", "pthread_join", "sched_getaffinity",
        "syscall", "usleep"}


@dataclass
class Emitted:
    """An emitted model: its code loaded, its weights in memory."""

    object: bytes
    functions: dict
    weights: np.ndarray

    def create(self, bytes=None, packed=None, **options):
        """(code, handle)"""
        values = (SIZE * 4)(*(options.get(name, 0) for name in OPTIONS))
        handle = POINTER(1)
        packed = self.weights.ctypes.data if packed is None else packed
        code = self.functions["create"](packed, self.weights.size if bytes is None else bytes,
                                        values if options else None, ctypes.byref(handle))
        return code, handle


def load(path, prefix, names):
    code = path.read_bytes()
    library = load_object(code, tuple(prefix + name for name in names))
    packed = np.fromfile(path.with_suffix(".weights"), np.uint8)
    weights = aligned_empty(packed.size)
    weights[:] = packed
    return Emitted(code, {name: library.function(prefix + name, *SIGNATURES[name])
                          for name in names}, weights)


@pytest.fixture(scope="module")
def compiled():
    return compile_model(EMBEDDED, Target.host(), "f32")


@pytest.fixture(scope="module")
def story(compiled, tmp_path_factory):
    path = tmp_path_factory.mktemp("abi") / "story.o"
    emit(compiled, ["obj"], path, "story_")
    return load(path, "story_", ("create", "destroy", "step", "feed", "error"))


class Model:
    """A created language model."""

    def __init__(self, emitted, **options):
        self.functions = emitted.functions
        code, self.handle = emitted.create(**options)
        assert code == 0

    def feed(self, ids, position, logits=None):
        ids = np.asarray(ids, np.int32)
        logits = np.full(512, np.nan, np.float32) if logits is None else logits
        code = self.functions["feed"](self.handle, ids.ctypes.data, ids.size, position,
                                      logits.ctypes.data)
        assert code == 0, self.functions["error"](code)
        return logits

    def step(self, **changes):
        """(code, logits) of a batch; changes replace fields of a good one of 3 + 1 tokens."""
        fields = {**good_batch(), **changes}
        arrays = [np.ascontiguousarray(fields[name], np.int32) if fields[name] is not None else None
                  for name in BATCH_ARRAYS]
        batch = (SIZE * len(BATCH))(*(fields[name] for name in BATCH_SIZES),
                                    *(0 if a is None else a.ctypes.data for a in arrays))
        logits = np.full((max(0, fields["rows"]), 512), np.nan, np.float32)
        code = self.functions["step"](self.handle, batch, logits.ctypes.data)
        return code, logits

    def close(self):
        self.functions["destroy"](self.handle)


def good_batch():
    """Tokens 1 403 407 of one sequence in pages 2 and 0, and the first token of another in 1."""
    return {"tokens": 4, "sequences": 2, "rows": 2, "table_width": 2, "ids": [1, 403, 407, 1],
            "positions": [0, 1, 2, 0], "sequence": [0, 0, 0, 1], "offsets": [0, 3, 4],
            "page_table": [[2, 0], [1, 99]], "wanted_rows": [2, 3]}


@pytest.fixture
def model(story):
    made = Model(story, threads=2, max_context=64, max_sequences=2, max_tokens=5)
    yield made
    made.close()


# ---- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"threads": 1}, {"threads": 3, "max_tokens": 3},
                                     {"max_context": 70, "max_sequences": 3}])
def test_feed_gives_the_golden_tokens(story, embedded_goldens, options):
    golden = embedded_goldens[0]
    model = Model(story, **options)
    count = min(64, len(golden["greedy_ids"]))
    logits, length, made = model.feed(golden["prompt_ids"], 0), len(golden["prompt_ids"]), []
    for _ in range(count):
        made.append(int(logits.argmax()))
        logits, length = model.feed(made[-1:], length), length + 1
    model.close()
    assert made == golden["greedy_ids"][:count]


def test_packed_sequences_in_scattered_pages_equal_each_alone(story, model):
    alone = Model(story, threads=1)
    expected = [alone.feed([1, 403, 407], 0), alone.feed([1], 0)]
    code, logits = model.step()
    alone.close()
    assert code == 0
    for got, wanted in zip(logits, expected, strict=True):
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_step_that_is_refused_changes_nothing(story, model):
    model.step()
    continued = {"tokens": 1, "sequences": 1, "rows": 1, "ids": [261], "positions": [3],
                 "sequence": [0], "offsets": [0, 1], "page_table": [[2, 0]], "wanted_rows": [0]}
    _, expected = model.step(**continued)
    code, logits = model.step(**{**continued, "wanted_rows": [1], "ids": [5]})
    assert code == NUMBERS["BAD_ROW"] and np.isnan(logits).all()
    _, again = model.step(**continued)
    np.testing.assert_array_equal(again, expected)


def test_rows_may_be_none(model):
    code, _ = model.step(rows=0, wanted_rows=None)
    assert code == 0


BERT = GOLDENS / "onnx" / "bert_dynamo_opset18"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """(Emitted, program) of a small BERT from ONNX."""
    compiled = compile_model(BERT / "model.onnx", Target.host())
    path = tmp_path_factory.mktemp("bert") / "bert.o"
    emit(compiled, ["obj"], path, "bert_")
    return load(path, "bert_", ("create", "destroy", "run", "error")), compiled.programs["generic"]


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("threads", [1, 3])
def test_run_of_a_graph(encoder, case, threads):
    emitted, program = encoder
    arrays = {**np.load(BERT / f"inputs_{case}.npz")}
    expected = np.load(BERT / f"outputs_{case}.npz")
    results = {name: np.full(expected[name].shape, np.nan, np.float32) for name in expected}
    values = dict(zip(("batch", "seq"), arrays["input_ids"].shape, strict=True))
    code, handle = emitted.create(threads=threads)
    assert code == 0
    inputs = (POINTER * 8)(*(arrays[b.name].ctypes.data for b in program.with_role("input")))
    outputs = (POINTER * 8)(*(results[b.name].ctypes.data for b in program.with_role("output")))
    shape = (SIZE * 8)(*(values[name] for name, _, _ in program.symbols))
    run = emitted.functions["run"]
    assert run(handle, (SIZE * 8)(), inputs, outputs) == NUMBERS["BAD_SIZE"]
    assert run(handle, None, inputs, outputs) == NUMBERS["BAD_ARGUMENT"]
    assert run(handle, shape, inputs, outputs) == 0
    emitted.functions["destroy"](handle)
    limit = json.loads((BERT / "expected.json").read_text())["rtol_of_max_abs"]
    for name, result in results.items():
        assert np.abs(result - expected[name]).max() <= limit * np.abs(expected[name]).max()


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("changes, code", [
    ({"tokens": 0}, "BAD_SIZE"), ({"tokens": 6}, "BAD_SIZE"), ({"tokens": -1}, "BAD_SIZE"),
    ({"tokens": 1 << 62}, "BAD_SIZE"),
    ({"sequences": 0}, "BAD_SIZE"), ({"sequences": 3}, "BAD_SIZE"),
    ({"rows": -1}, "BAD_SIZE"), ({"rows": 5}, "BAD_SIZE"),
    ({"table_width": 0}, "BAD_SIZE"), ({"table_width": 3}, "BAD_SIZE"),
    ({"ids": None}, "BAD_ARGUMENT"), ({"wanted_rows": None}, "BAD_ARGUMENT"),
    ({"page_table": None}, "BAD_ARGUMENT"),
    ({"offsets": [1, 3, 4]}, "BAD_OFFSETS"), ({"offsets": [0, 3, 5]}, "BAD_OFFSETS"),
    ({"offsets": [0, 0, 4]}, "BAD_OFFSETS"), ({"offsets": [0, -1, 4]}, "BAD_OFFSETS"),
    ({"offsets": [0, 1 << 30, 4]}, "BAD_OFFSETS"),
    ({"sequence": [0, 0, 1, 1]}, "BAD_SEQUENCE"), ({"sequence": [0, 0, 0, -1]}, "BAD_SEQUENCE"),
    ({"ids": [1, 512, 3, 4]}, "BAD_TOKEN"), ({"ids": [1, 2, 3, -1]}, "BAD_TOKEN"),
    ({"positions": [0, 1, 3, 0]}, "BAD_POSITION"), ({"positions": [-1, 0, 1, 0]}, "BAD_POSITION"),
    ({"positions": [62, 63, 64, 0]}, "BAD_POSITION"),
    ({"positions": [0, 1, 2, 64]}, "BAD_POSITION"),
    ({"page_table": [[4, 0], [1, 0]]}, "BAD_PAGE"), ({"page_table": [[2, 0], [-1, 0]]}, "BAD_PAGE"),
    ({"table_width": 1, "page_table": [[2], [1]], "positions": [31, 32, 33, 0]}, "BAD_PAGE"),
    ({"wanted_rows": [0, 4]}, "BAD_ROW"), ({"wanted_rows": [-1, 0]}, "BAD_ROW"),
])
def test_bad_batches(model, changes, code):
    got, logits = model.step(**changes)
    assert list(CODES)[got] == code
    assert np.isnan(logits).all()


@pytest.mark.parametrize("count, position, code", [
    (0, 0, "BAD_SIZE"), (-1, 0, "BAD_SIZE"), (65, 0, "BAD_SIZE"), (1 << 62, 0, "BAD_SIZE"),
    (1, 64, "BAD_POSITION"), (1, -1, "BAD_POSITION"), (4, 61, "BAD_POSITION"),
    (1, (1 << 63) - 1, "BAD_POSITION")])
def test_bad_feeds(story, model, count, position, code):
    ids, logits = np.ones(64, np.int32), np.zeros(512, np.float32)
    got = story.functions["feed"](model.handle, ids.ctypes.data, count, position,
                                  logits.ctypes.data)
    assert list(CODES)[got] == code


@pytest.mark.parametrize("arguments, code", [
    ({"bytes": 1}, "BAD_WEIGHTS"),
    ({"threads": -1}, "BAD_OPTION"), ({"threads": 2000}, "BAD_OPTION"),
    ({"max_context": 513}, "BAD_OPTION"), ({"max_context": -5}, "BAD_OPTION"),
    ({"max_sequences": 1 << 40}, "BAD_OPTION"), ({"max_tokens": 1 << 40}, "BAD_OPTION"),
])
def test_bad_creates(story, arguments, code):
    got, handle = story.create(**arguments)
    assert list(CODES)[got] == code
    assert handle.value is None


def test_memory_that_there_is_not(story):
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_held() + (1 << 30), unlimited[1]))
    try:
        got, handle = story.create(max_tokens=1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    assert list(CODES)[got] == "NO_MEMORY"
    assert handle.value is None


def memory_held() -> int:
    """Bytes of this process's address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def test_weights_of_another_model(story):
    foreign = aligned_empty(story.weights.size)
    foreign[:] = story.weights
    foreign[4096 * 20:4096 * 40] ^= 1
    assert story.create(packed=foreign.ctypes.data)[0] == NUMBERS["BAD_WEIGHTS"]


def test_weights_must_be_aligned_and_there(story):
    assert story.create(packed=story.weights.ctypes.data + 8)[0] == NUMBERS["BAD_WEIGHTS"]
    assert story.create(packed=0)[0] == NUMBERS["BAD_ARGUMENT"]
    create = story.functions["create"]
    assert create(story.weights.ctypes.data, story.weights.size, None, None) == (
        NUMBERS["BAD_ARGUMENT"])
    story.functions["destroy"](None)


def test_every_code_has_a_text(story):
    texts = [story.functions["error"](number).decode() for number in range(len(CODES))]
    assert texts == list(CODES.values())
    assert story.functions["error"](-7) == story.functions["error"](len(CODES)) == b"unknown code"


# ---- the object ----------------------------------------------------------------------------------


def elf_symbols(code):
    """(defined global names, undefined names) of an ELF64 object."""
    offset, = struct.unpack_from("<Q", code, 40)
    entry, count = struct.unpack_from("<HH", code, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, offset + entry * i) for i in range(count)]
    table = next(section for section in sections if section[1] == 2)
    strings = sections[table[6]][4]
    defined, undefined = set(), set()
    for place in range(table[4] + 24, table[4] + table[5], 24):
        name, info, _, section = struct.unpack_from("<IBBH", code, place)
        text = code[strings + name:code.index(b"\0", strings + name)].decode()
        if info >> 4:
            (defined if section else undefined).add(text)
    return defined, undefined


def test_symbols(story):
    defined, undefined = elf_symbols(story.object)
    assert defined == {f"story_{name}" for name in ("create", "destroy", "step", "feed", "error")}
    assert undefined - {"_GLOBAL_OFFSET_TABLE_"} <= LIBC


def test_code_for_another_processor(tmp_path):
    compiled = compile_model(BERT / "model.onnx", Target.parse("aarch64:neoverse-v1"))
    emit(compiled, ["obj"], tmp_path / "bert.o", "bert_")
    code = (tmp_path / "bert.o").read_bytes()
    assert struct.unpack_from("<H", code, 18) == (183,)
    assert elf_symbols(code)[1] <= LIBC


@pytest.mark.parametrize("prefix", ["", "1_", "a-b", "int_", "_", "class_", "é"])
def test_bad_prefixes(compiled, tmp_path, prefix):
    with pytest.raises(CompileError, match="prefix"):
        emit(compiled, ["obj"], tmp_path / "x.o", prefix)
    assert list(tmp_path.iterdir()) == []


def test_prefix_of_a_library_function(compiled, tmp_path):
    with pytest.raises(CompileError, match="pthread_create"):
        emit(compiled, ["obj"], tmp_path / "x.o", "pthread_")
    assert list(tmp_path.iterdir()) == []


# ---- the CPU -------------------------------------------------------------------------------------


@pytest.mark.skipif(Target.host().processor != "x86_64", reason="asks cpuid")
def test_cpuid_agrees_with_llvm():
    """Each feature alone, and this CPU's own list."""
    have = llvm.get_host_cpu_features()
    host = Target.host()
    names = sorted(name for name in BITS if name in have)
    targets = [Target("host", host.triple, "x86-64", (f"+{name}",)) for name in names]
    module = ir.Module("features")
    module.triple = host.triple
    for number, target in enumerate([*targets, host]):
        _, e = define(module, f"has_{number}", I32, [], internal=False)
        e.b.ret(e.b.zext(emit_check(e, target), I32))
    exports = tuple(f"has_{number}" for number in range(len(targets) + 1))
    library = load_object(emit_object(str(module), host.machine())[0], exports)
    for name, target, export in zip(names, targets, exports[:-1], strict=True):
        expected = all(have[other] for other in required(target) - {"osxsave"})
        assert library.function(export, CODE)() == expected, name
    assert library.function(exports[-1], CODE)() == 1
