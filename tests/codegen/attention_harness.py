"""Runs one attention stage without a driver: bodies made by hand, workers one after the other."""

from __future__ import annotations

import ctypes

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np

from llmc.codegen.host.attention import AttentionKernel
from llmc.codegen.host.kernel import Worker
from llmc.codegen.llvm import I64, POINTER, VOID, define, emit_object, i64
from llmc.ir.dims import ceildiv, evaluate
from llmc.ir.dtypes import dtype
from llmc.ir.graph import Graph, TensorType
from llmc.ir.layouts import KeyPages, Rows, ValuePages, pack
from llmc.ir.ops import OPS, PAGE, Context, make
from llmc.ir.program import Buffer, Capabilities, Program, Stage

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

LANES = 8
WORKERS = 3


def machine():
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3,
        reloc="pic", codemodel="small")


def leaf(name, dtype_name, *shape):
    return make("input", name=name, type=TensorType(dtype(dtype_name), shape))


def evaluate_exactly(node, arrays, dims):
    """The reference value of a node, in f64."""
    if node.op == "input":
        return arrays[node["name"]]
    operands = [evaluate_exactly(source, arrays, dims) for source in node.inputs]
    return OPS[node.op].reference(node, operands, Context(exact=True, dims=dims))


class Frame:
    """Dims are constants of one shape; buffers come from a table of pointers."""

    layer = None
    alignment = 1

    def __init__(self, program, e, table, dims):
        self.program, self.e, self.table, self.dims = program, e, table, dims
        self.slots = {name: slot for slot, name in enumerate(program.buffers)}

    def dim(self, dim):
        return i64(evaluate(dim, self.dims))

    def pointer(self, buffer):
        return self.e.load(self.e.offset(self.table, self.slots[buffer.name], POINTER), POINTER)


class Harness:
    """Compiles body (inputs, result node) for the shape `dims`; call() runs it on arrays."""

    def __init__(self, inputs, result, dims=None, layouts=None, lanes=LANES, bf16_dot=False):
        self.dims = dims or {}
        layouts = layouts or {}
        self.result = result
        buffers = {x["name"]: Buffer(x["name"], x.type, "input", layouts.get(x["name"], Rows()))
                   for x in inputs}
        buffers["result"] = Buffer("result", result.type, "output")
        body = Graph("body", tuple(inputs), (("result", result),))
        stage = Stage("attention", "attention", body, tuple(x["name"] for x in inputs),
                      ("result",))
        capabilities = Capabilities("test", lanes, 6, 16, 8, bf16_dot, frozenset())
        symbols = tuple((name, 1, 100) for name in self.dims)
        self.program = Program("test", capabilities, symbols, buffers, {}, (stage,), 0)
        self.kernel = AttentionKernel(stage, self.program, None)
        scratch = self.kernel.scratch_bytes
        self.scratch_bytes = evaluate(ceildiv(scratch, 64) * 64, self.dims)
        target = machine()
        self.code, self.text = emit_object(self._module(target), target)
        self.assembly = target.emit_assembly(llvm.parse_assembly(self.text))
        jit = llvm.create_lljit_compiler(target)
        builder = llvm.JITLibraryBuilder().add_object_img(self.code).add_current_process()
        self.library = builder.export_symbol("run").link(jit, "attention")
        signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2)
        self.function = signature(self.library["run"])

    def _module(self, target):
        """void run(table, scratch, worker, workers): one worker's share."""
        module = ir.Module("attention")
        module.triple = target.triple
        _, e = define(module, "run", VOID, [POINTER, POINTER, I64, I64], internal=False)
        table, scratch, index, count = e.b.function.args
        frame = Frame(self.program, e, table, self.dims)
        worker = Worker(index, count, scratch)
        tiles = self.kernel.tiles(e, frame)
        self.kernel.setup(e, frame, worker)
        first = e.b.udiv(e.b.mul(tiles, index), count)
        last = e.b.udiv(e.b.mul(tiles, e.b.add(index, i64(1))), count)
        with e.loop(first, last) as tile:
            self.kernel.tile(e, frame, worker, tile)
        e.b.ret_void()
        return str(module)

    def __call__(self, **arrays):
        shape = tuple(evaluate(dim, self.dims) for dim in self.result.shape)
        out = np.full(shape, np.nan, np.float32).astype(self.result.dtype.numpy)
        run = self.prepare(out, **arrays)
        for worker in range(WORKERS):
            run(worker, WORKERS)
        return out

    def prepare(self, out, **arrays):
        """run(worker, workers) for these arrays (kept alive), with scratch full of NaN."""
        held = {**arrays, "result": out}
        table = (ctypes.c_void_p * len(self.program.buffers))(
            *[held[name].ctypes.data for name in self.program.buffers])
        raw = np.full(self.scratch_bytes + 64, 0xFF, np.uint8)
        scratch = raw.ctypes.data + -raw.ctypes.data % 64

        def run(worker, workers, _held=(held, raw, table)):
            self.function(ctypes.addressof(table), scratch, worker, workers)

        return run


def random(shape, dtype_name, seed):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values.astype(dtype(dtype_name).numpy)


def paged_case(sequences, heads, kv_heads, size, dtype_name="f32", seed=0, **attributes):
    """(harness inputs, result node, layouts, arrays, cache arrays) of paged_attention.

    sequences: (new tokens, past tokens) of each. Pool slots that no token fills are NaN.
    """
    lengths = [new + past for new, past in sequences]
    tokens = sum(new for new, _ in sequences)
    width = max(-(-length // PAGE) for length in lengths)
    pool = sum(-(-length // PAGE) for length in lengths) + 2
    offsets = np.cumsum([0] + [new for new, _ in sequences]).astype(np.int32)
    arrays = {
        "q": random((tokens, heads, size), dtype_name, seed),
        "page_table": np.full((len(sequences), width), -1, np.int32),
        "sequence": np.repeat(np.arange(len(sequences)), np.diff(offsets)).astype(np.int32),
        "positions": np.concatenate([np.arange(past, past + new) for new, past in sequences]
                                    ).astype(np.int32),
        "offsets": offsets,
    }
    free = np.random.default_rng(seed).permutation(pool).astype(np.int32)
    keys = np.full((pool, PAGE, kv_heads, size), np.nan, np.float32)
    values = keys.copy()
    dense = []
    used = 0
    for index, length in enumerate(lengths):
        pages = -(-length // PAGE)
        arrays["page_table"][index, :pages] = free[used:used + pages]
        used += pages
        pair = [random((length, kv_heads, size), dtype_name, seed + 10 * index + j)
                for j in (1, 2)]
        dense.append(pair)
        for token in range(length):
            page = arrays["page_table"][index, token // PAGE]
            keys[page, token % PAGE] = pair[0][token]
            values[page, token % PAGE] = pair[1][token]
    element = dtype(dtype_name).numpy
    arrays["k"] = pack(keys.astype(element), KeyPages())
    arrays["v"] = pack(values.astype(element), ValuePages())
    inputs = [leaf("q", dtype_name, tokens, heads, size),
              leaf("k", dtype_name, pool, PAGE, kv_heads, size),
              leaf("v", dtype_name, pool, PAGE, kv_heads, size),
              leaf("page_table", "i32", len(sequences), width), leaf("sequence", "i32", tokens),
              leaf("positions", "i32", tokens), leaf("offsets", "i32", len(sequences) + 1)]
    result = make("paged_attention", *inputs, **attributes)
    return inputs, result, {"k": KeyPages(), "v": ValuePages()}, arrays, dense


def oracle(q, k, v, scale, window=0, softcap=0.0, causal=True, mask=None):
    """f64 attention of q [s, h, d] to k, v [t, g, d]; the last query sees the last key."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.einsum("shd,thd->hst", q, k) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    position = np.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    key = np.arange(k.shape[0])[None, :]
    hidden = np.zeros(scores.shape[1:], bool)
    if causal:
        hidden |= key > position
    if window:
        hidden |= key <= position - window
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hst,thd->shd", weights, v)
