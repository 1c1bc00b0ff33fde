"""Runtime: a model, loaded and ready to run. Public face of llmc.runtime."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from llmc import knobs
from llmc.errors import DeviceError, LlmcError, ModelError, ShapeError
from llmc.ir.graph import Graph
from llmc.ir.quantization import Quantization, quantization
from llmc.runtime.artifact import Artifact, check_quantization, is_artifact
from llmc.runtime.cpu import check_cpu
from llmc.runtime.decode import DecodeLoop, Start, decode_loop
from llmc.runtime.dispatch import DispatchTable
from llmc.runtime.encoder import Encoder, Sentence, pool
from llmc.runtime.events import Event
from llmc.runtime.executor import Executor
from llmc.runtime.jit import cached_artifact, cached_graph
from llmc.runtime.onnx_language_model import OnnxLanguageModel
from llmc.runtime.padding import pad, read_dense
from llmc.runtime.pages import PAGE
from llmc.runtime.pages import Sequence as CachedSequence
from llmc.runtime.pools import Pools, pool_sizes
from llmc.runtime.progress import Progress, silent
from llmc.runtime.rehearsal import can_rehearse, rehearse
from llmc.runtime.sampling import Sampling, sample
from llmc.runtime.specialize import MODES, Policy, Specializer, specialize
from llmc.runtime.step import GREEDY, Chunk, LanguageModel
from llmc.runtime.targets import check_target, resolve_target
from llmc.runtime.traffic import SeenShape

CHUNK_TOKENS = 512  # tokens of one step: enough to be bound by arithmetic, small in memory
LOGIT_BYTES = 64 << 20  # most memory for the logits of one step
logger = logging.getLogger("llmc.runtime")


@dataclass(frozen=True)
class Options:
    """What Runtime takes besides the model and the target.

    dtype        compute dtype (default: the checkpoint's)
    quantize     what weights are compiled to: "int8", "int4" or a `Quantization` (default: they
                 stay as the model has them)
    kv_cache     "int8": keys and values are compiled to be stored as 8-bit codes (default: in the
                 compute dtype)
    threads      host threads (default: LLMC_THREADS, else what the model's size pays for)
    max_context  tokens of a sequence, at most (default: the model's limit). Where the KV cache has
                 no room for so many in this machine's memory: an LlmcError if they were asked for,
                 else a warning in the log "llmc.runtime" says how many it holds
    max_batch    sequences that must fit the KV cache together at full length (default 1)
    kv_memory    bytes for the KV cache (default: what max_batch and max_context need, at most half
                 of this machine's memory; pages are committed as they are used)
    parameters   values of a traced graph's parameters: {name: array}
    device       number of the GPU (default 0)
    cache_dir    where compiled models are kept (default: LLMC_CACHE_DIR)
    profile_dir  where profiles and the code of hot shapes are kept (default: cache_dir)
    progress     called with (phase, share done) while compiling
    specialize   "lazy" (default): shapes that keep coming get code of their own, compiled in the
                 background and kept if it is measurably faster; "eager": also, before ready, the
                 `shapes` listed or recorded earlier; "none": what the artifact brings
    promote_after   calls of a shape after which its own code is used, whether or not it pays
    code_budget_mb  most such code in memory (default 64)
    max_variants    most such variants (default 32); beyond either budget the coldest go
    shapes       for "eager": [{"tokens": 8, "sequences": 8, "rows": 8}, ...]; 1 where left out
    """

    dtype: str | None = None
    quantize: str | Quantization | None = None
    kv_cache: str | None = None
    threads: int | None = None
    max_context: int | None = None
    max_batch: int = 1
    kv_memory: int | None = None
    device: int = 0
    parameters: Mapping[str, np.ndarray] | None = None
    cache_dir: str | os.PathLike[str] | None = None
    profile_dir: str | os.PathLike[str] | None = None
    progress: Progress = silent
    specialize: str | None = None
    promote_after: int | None = None
    code_budget_mb: int | None = None
    max_variants: int | None = None
    shapes: Sequence[Mapping[str, int]] = ()

    def quantization(self) -> Quantization | None:
        """What `quantize` and `kv_cache` say."""
        return quantization(self.quantize, self.kv_cache)

    def policy(self) -> Policy:
        """What the options say; where they do not, the LLMC_* variables."""
        return Policy(
            self.specialize or knobs.specialize(), self.promote_after or knobs.promote_after(),
            (self.code_budget_mb or knobs.code_budget_mb()) << 20,
            self.max_variants or knobs.max_variants(), self.shapes)


def _options(given: Mapping[str, Any]) -> Options:
    known = {field.name for field in fields(Options)}
    if unknown := set(given) - known:
        raise LlmcError(f"unknown option {', '.join(sorted(unknown))}; Runtime takes "
                        f"{', '.join(sorted(known))}")
    options = Options(**given)
    mode = options.specialize or knobs.specialize()
    if mode not in MODES:
        raise LlmcError(f"specialize must be one of {', '.join(MODES)}, got {mode!r}")
    for name in ("threads", "max_context", "max_batch", "kv_memory", "promote_after",
                 "code_budget_mb", "max_variants"):
        value = getattr(options, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise LlmcError(f"{name} must be a positive int, got {value!r}")
    if (options.threads or 1) > knobs.MOST_THREADS:
        raise LlmcError(f"threads must be at most {knobs.MOST_THREADS}, got {options.threads}")
    return options


class Runtime:
    """A model that runs. Steps are serialised, so several threads may call.

    model: an artifact directory, a `Compiled`, a checkpoint directory, an .onnx file or a traced
    Graph (the last three are compiled into the cache first). target: "host",
    "nvptx" (an NVIDIA GPU; DeviceError if there is none) or "auto", which says what it chose; an
    artifact runs where it was compiled for. Options: see `Options`.
    """

    def __init__(self, model: str | os.PathLike[str] | Any, target: str = "host", **options: Any):
        self.options = _options(options)
        self.artifact = self._open(model, target)
        self.manifest = self.artifact.manifest
        self.config = self.manifest.config
        self.threads = self.options.threads or default_threads(self.manifest.weight_bytes)
        self.executor = self._make_executor()
        self._lock = threading.RLock()
        self._tokenizer: Any = None
        self._generations = 0
        self._model = self._make_model()
        self._specializer = self._specialize()

    # ---- loading --------------------------------------------------------------------------

    def _open(self, model: Any, target: str) -> Artifact:
        cache = Path(self.options.cache_dir) if self.options.cache_dir else None
        if isinstance(model, Graph):
            target = resolve_target(target, self.options.device)
            return cached_graph(model, self.options.parameters or {}, target, cache, {},
                                self.options.progress, self.options.quantization())
        if self.options.parameters is not None:
            raise LlmcError("parameters are for a traced graph: other models bring their own")
        path = Path(getattr(model, "path", model))
        if is_artifact(path):
            artifact = Artifact(path)
            check_target(artifact.manifest.target, target)
            if self.options.dtype not in (None, artifact.manifest.dtype):
                raise LlmcError(f"{path} was compiled for {artifact.manifest.dtype}, not "
                                f"{self.options.dtype}: compile the model again with that dtype")
            check_quantization(artifact.manifest, self.options.quantization())
            return artifact
        if not path.exists():
            raise ModelError(f"{path}: no such file or directory")
        target = resolve_target(target, self.options.device)
        return cached_artifact(path, target, self.options.dtype, cache, {}, self.options.progress,
                               self.options.quantization())

    def _make_executor(self) -> Executor:
        """Memory and code on the machine that the artifact was compiled for."""
        if not self.manifest.target.startswith("nvptx"):
            check_cpu(self.manifest.target)
            return Executor(self.artifact, self.threads)
        from llmc.runtime.cuda_executor import CudaExecutor

        try:
            return CudaExecutor(self.artifact, self.options.device)
        except DeviceError as error:
            raise DeviceError(f"{self.artifact.directory.name} was compiled for "
                              f"{self.manifest.target}: {error}") from None

    def _specialize(self) -> Specializer | None:
        options = self.options
        place = Path(options.profile_dir or options.cache_dir or knobs.cache_directory())
        method = weakref.WeakMethod(self._rehearse)

        def run_step(values: Mapping[str, int]) -> bool:
            own = method()
            return own is not None and own(values)

        return specialize(self.executor, options.policy(), place, run_step)

    def _rehearse(self, values: Mapping[str, int]) -> bool:
        """Run a step of such values if nobody else runs one now; whether it ran."""
        if not isinstance(self._model, LanguageModel) or not can_rehearse(self.executor) \
                or not self._lock.acquire(blocking=False):
            return False
        try:
            self.executor.dispatch.rehearsing = True
            return rehearse(self.executor, values, self._model.max_context)
        finally:
            self.executor.dispatch.rehearsing = False
            self._lock.release()

    def _make_model(self) -> LanguageModel | Encoder | OnnxLanguageModel | None:
        limit = self.config.get("max_context") or 0
        context = min(self.options.max_context or limit, limit) if limit else (
            self.options.max_context or 0)
        if self.manifest.kind == "causal_lm":
            logit_rows = LOGIT_BYTES // (4 * max(1, self.config["vocab_size"]))
            return LanguageModel(
                self.executor, context, self._pools(context),
                min(CHUNK_TOKENS, self.executor.largest("tokens")),
                max(1, min(logit_rows, self.executor.largest("rows"))),
                self.config.get("growth_limit") or 0)
        if self.manifest.kind == "encoder":
            return Encoder(self.executor, context, CHUNK_TOKENS)
        if self.manifest.token_interface:
            return OnnxLanguageModel(self.executor, self.manifest.token_interface, context)
        return None

    def _pools(self, context: int) -> Pools:
        """Sizes of the states, by the options and this machine's memory."""
        memory = self.options.kv_memory or self.executor.state_memory()
        pools = pool_sizes(self.executor.states, context, self.options.max_batch, memory)
        room = pools.pages * PAGE
        if room < context:
            self._tell_of_little_room(context, room, memory)
        return pools

    def _tell_of_little_room(self, context: int, room: int, memory: int) -> None:
        if self.options.max_context is not None and self.options.kv_memory is None:
            raise LlmcError(f"max_context: the KV cache has no room for {context} tokens; the "
                            f"{memory / 2**30:.1f} GiB that it may take hold {room}. Ask for fewer,"
                            " or say with kv_memory what it may take")
        logger.warning("the KV cache holds %d tokens, of the %d that a sequence may have "
                       "(max_context): more take more kv_memory", room, context)

    # ---- running --------------------------------------------------------------------------

    def run(self, tokens: Any) -> Any:
        """Run the model.

        tokens: token ids -> logits [len(tokens), vocab] f32 (an encoder: hidden states
        [len(tokens), hidden]); a list of such -> a list of arrays. Or {"name": array}: every input
        of an ONNX graph by its name, or the dense, padded form of a checkpoint's family
        (`input_ids`, `attention_mask`, ...) -> {"name": array}. Raises ShapeError on bad input.
        """
        with self._lock:
            if isinstance(tokens, Mapping):
                return self._run_named(tokens)
            if self._model is None:
                raise ShapeError("this graph has no token input; pass {'name': array}")
            rows = tokens if _is_batch(tokens) else [tokens]
            results = self._run_rows([self.check_ids(row) for row in rows])
            return results if _is_batch(tokens) else results[0]

    def _run_rows(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        if isinstance(self._model, Encoder):
            name = self.executor.outputs[0].name
            return [outputs[name] for outputs in self._model.run([Sentence.of(r) for r in rows])]
        return [self._all_logits(row) for row in rows]

    def _all_logits(self, ids: np.ndarray) -> np.ndarray:
        model = self._model
        if isinstance(model, OnnxLanguageModel):
            return model.logits(ids)
        assert isinstance(model, LanguageModel)
        sequence = CachedSequence()
        try:
            return np.concatenate(list(model.feed(sequence, ids, every=True)))
        finally:
            model.release(sequence)

    def _run_named(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.manifest.kind in ("onnx", "graph"):
            return self.executor.run(arrays)
        batch = read_dense(arrays)
        self.check_ids(batch.ids.reshape(-1))
        if isinstance(self._model, Encoder):
            return self._model.run_dense(batch)
        batch.require_counted_positions()
        rows = [self._all_logits(row.astype(np.int32)) for row in batch.rows("ids")]
        return {"logits": pad(rows, batch.mask)}

    @property
    def language_model(self) -> LanguageModel:
        """What `step` steps: its pool of pages, its limits; ShapeError if there is none."""
        if not isinstance(self._model, LanguageModel):
            raise ShapeError("only a language model with a KV cache can be stepped")
        return self._model

    def step(self, batch: Sequence[Chunk], output: str = "logits") -> np.ndarray:
        """The engine's entry: run chunks of sequences; logits [wanted rows, vocab] f32 (with
        output GREEDY, where the model chooses, the likeliest tokens [wanted rows])."""
        model = self.language_model
        with self._lock:
            return model.step(batch, output)

    def release(self, sequence: CachedSequence) -> None:
        """Give back the pages of a sequence that was stepped."""
        if isinstance(self._model, LanguageModel):
            with self._lock:
                self._model.release(sequence)

    @property
    def max_context(self) -> int:
        """Tokens of a sequence, at most; 0 for a graph without a token input."""
        return self._model.max_context if self._model else 0

    def require_context(self, tokens: int | None) -> None:
        """LlmcError if sequences of so many tokens are beyond the model's own limit (None: they
        are not). The option max_context is cut to the limit without a word: it says "at most"."""
        limit = self.config.get("max_context") or 0
        if tokens is not None and limit and tokens > limit:
            raise LlmcError(f"max_context is {tokens}, this model's limit is {limit} tokens")

    # ---- generating -----------------------------------------------------------------------

    def generate(self, tokens: Sequence[int], max_new_tokens: int | None = None,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 stop_ids: Iterable[int] = (), seed: int = 0, ignore_eos: bool = False
                 ) -> Iterator[int]:
        """Continue a prompt; yields token ids as they are made, the end id not included.

        Ends after max_new_tokens, at an end-of-text id (unless ignore_eos) or stop id, or when the
        context is full. Input is checked at the call, not at the first token.
        """
        if max_new_tokens is not None and max_new_tokens < 0:
            raise ShapeError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
        sampling = Sampling(temperature, top_k, top_p, seed)
        ids = self.check_ids(tokens)
        if not isinstance(self._model, LanguageModel | OnnxLanguageModel):
            raise ShapeError(f"{self.manifest.name} is no language model: it cannot generate")
        self._model.check_prompt(len(ids))
        stops = set(stop_ids) | (set() if ignore_eos else set(self.config["eos_token_ids"]))
        self._generations += 1
        return self._generate(ids, max_new_tokens, sampling, stops, self._generations - 1)

    def _generate(self, ids: np.ndarray, limit: int | None, sampling: Sampling, stops: set[int],
                  number: int) -> Iterator[int]:
        model = self._model
        assert isinstance(model, LanguageModel | OnnxLanguageModel)
        sequence = CachedSequence()
        tokens = self._tokens(sequence, ids, limit, sampling, number)
        try:
            for token in tokens:
                if token in stops:
                    return
                yield token
        finally:
            tokens.close()
            with self._lock:
                model.release(sequence)

    def _tokens(self, sequence: CachedSequence, ids: np.ndarray, limit: int | None,
                sampling: Sampling, number: int) -> Generator[int, None, None]:
        """A sequence's tokens as they are chosen, until the context is full."""
        model = self._model
        assert isinstance(model, LanguageModel | OnnxLanguageModel)
        count = model.max_context - len(ids) + 1
        if limit is not None:
            count = min(limit, count)
        if count <= 0:
            return
        token = self._next_token(sequence, ids, sampling, number)
        yield token
        ahead = None
        if isinstance(model, LanguageModel) and count > 1:
            start = Start(token, sequence.length, sampling, number, sequence.slot or 0)
            ahead = self.decode_ahead([sequence], [start], count - 1)
        if ahead is not None:
            with closing(ahead):
                for tokens in ahead:
                    yield tokens.item()
            return
        for _ in range(count - 1):
            token = self._next_token(sequence, np.array([token], np.int32), sampling, number)
            yield token

    def decode_ahead(self, sequences: Sequence[CachedSequence], starts: Sequence[Start], steps: int
                     ) -> Generator[np.ndarray, None, None] | None:
        """Decode sequences together, so many tokens each, where the device can choose tokens and
        feed them to its next step by itself (else None): yields those of each step, i32
        [sequences]. Close it before anything else is done with the sequences."""
        with self._lock:
            loop = decode_loop(self.language_model, sequences, starts, steps)
        return None if loop is None else self._run_ahead(loop)

    def _run_ahead(self, loop: DecodeLoop) -> Generator[np.ndarray, None, None]:
        try:
            while True:
                with self._lock:
                    tokens = loop.next()
                if tokens is None:
                    return
                yield tokens
        finally:
            with self._lock:
                loop.finish()

    def _next_token(self, sequence: CachedSequence, pending: np.ndarray, sampling: Sampling,
                    number: int) -> int:
        """Run the pending tokens and choose the next one; on the device, if nothing is random."""
        model = self._model
        assert isinstance(model, LanguageModel | OnnxLanguageModel)
        with self._lock:
            if sampling.temperature == 0 and isinstance(model, LanguageModel) and model.chooses:
                (best,) = model.feed(sequence, pending, output=GREEDY)
                return int(best[-1])
            (logits,) = model.feed(sequence, pending)
        return sample(logits[-1], sampling, number, sequence.length)

    def check_ids(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids as an array; ShapeError if empty, no integers, or outside the vocabulary."""
        try:
            ids = np.asarray(tokens)
        except ValueError:  # lists of different lengths inside
            raise ShapeError("token ids must be one list of integers") from None
        if ids.ndim != 1 or ids.size == 0:
            raise ShapeError("the prompt is empty: at least one token id is needed" if not ids.size
                             else f"token ids have shape {ids.shape}, expected 1-D")
        if not np.issubdtype(ids.dtype, np.integer):
            raise ShapeError(f"token ids must be integers, got {ids.dtype}")
        vocabulary = self.config.get("vocab_size") or 1 << 31
        if ids.min() < 0 or ids.max() >= vocabulary:
            wrong = ids[(ids < 0) | (ids >= vocabulary)][0]
            raise ShapeError(f"token id {wrong} is outside the vocabulary of {vocabulary}")
        return ids.astype(np.int32)

    # ---- text -----------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; ModelError if it has none."""
        if self._tokenizer is None:
            from llmc.frontend.tokenizer import Tokenizer

            if not (self.artifact.files / "tokenizer.json").is_file():
                raise ModelError(f"{self.manifest.name} has no tokenizer.json beside its weights: "
                                 "give token ids, or put the file there and compile again")
            self._tokenizer = Tokenizer.load(self.artifact.files, trusted=True)
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the model's special tokens."""
        if not isinstance(text, str):
            raise ShapeError(f"a text must be a str, got {type(text).__name__}")
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    def embed(self, texts: str | Sequence[str], pooling: str | None = None) -> np.ndarray:
        """Sentence embeddings f32: [len(texts), dim], or [dim] of a single str; pooling: mean, cls
        or max (default: the checkpoint's, which also says whether they are normalised)."""
        if isinstance(texts, str):
            return self.embed([texts], pooling)[0]
        return self.embed_ids([self.embedding_ids(text) for text in
                               _items(texts, "texts must be a str or a list of them")], pooling)

    def embedding_ids(self, text: str) -> list[int]:
        """Token ids of a text that is to be embedded: what is too long for the model is cut."""
        if not isinstance(self._model, Encoder):
            raise ShapeError(f"{self.manifest.name} is no encoder: it cannot embed")
        limit = self.config.get("max_embed_tokens") or self._model.max_context
        return _cut(self.encode(text), min(limit, self._model.max_context))

    def embed_ids(self, rows: Sequence[Sequence[int]], pooling: str | None = None) -> np.ndarray:
        """The same as `embed` for token ids, of which ShapeError if they are too many."""
        if not isinstance(self._model, Encoder):
            raise ShapeError(f"{self.manifest.name} is no encoder: it cannot embed")
        settings = self.config.get("pooling") or {"mode": "mean", "normalize": False}
        mode = pooling or settings["mode"]
        if mode not in ("mean", "cls", "max"):
            raise ShapeError(f"unknown pooling {mode!r}; mean, cls or max")
        sentences = [Sentence.of(self.check_ids(row)) for row in
                     _items(rows, "rows must be a list of lists of token ids")]
        with self._lock:
            results = self._model.run(sentences)
        name = self.executor.outputs[0].name
        vectors = [pool(r[name], mode, settings["normalize"]) for r in results]
        if not vectors:
            return np.empty((0, self.config["hidden_size"]), np.float32)
        return np.stack(vectors)

    # ---- looking inside -------------------------------------------------------------------

    @property
    def dispatch_table(self) -> DispatchTable:
        """The live variants: its `rows` have a TableRow for each, its str() a line."""
        gains = self._specializer.gains() if self._specializer else {}
        return DispatchTable(self.executor.dispatch, gains)

    def events(self, after: int = 0) -> list[Event]:
        """What specialisation did, oldest first: events numbered above `after`."""
        return self._specializer.feed.since(after) if self._specializer else []

    def shapes(self) -> list[SeenShape]:
        """The histogram of shapes that arrive; empty with specialize="none", which counts none."""
        return self._specializer.traffic.seen() if self._specializer else []

    def stats(self) -> dict[str, Any]:
        """Counters: calls and seconds by variant, pages of the KV cache; what is specialised, and
        compiles (compiled, cached, failed, waiting, running, seconds)."""
        result: dict[str, Any] = {"variants": {
            v.info.name: {"calls": v.calls, "seconds": v.seconds, "stages": v.info.stages}
            for v in self.executor.variants}}
        if isinstance(self._model, LanguageModel):
            result["pages"] = {"free": self._model.pool.free, "size": self._model.pool.size}
        if self._specializer is not None:
            result["specialize"] = self._specializer.stats()
            result["compiles"] = self._specializer.compiler.stats()
        return result

    def close(self) -> None:
        """Stop the threads; running afterwards is an LlmcError."""
        if self._specializer is not None:
            self._specializer.close()
        with self._lock:
            self.executor.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def default_threads(weight_bytes: int) -> int:
    """LLMC_THREADS, else all cores, but at most one for each MiB of weights: a step of a smaller
    model is over before its threads have met at a barrier."""
    return knobs.threads() or min(knobs.cores(), 1 + (weight_bytes >> 20))


def _is_batch(tokens: Any) -> bool:
    """Whether tokens is a list of token lists."""
    if isinstance(tokens, np.ndarray):
        return tokens.ndim == 2
    return isinstance(tokens, Sequence) and len(tokens) > 0 and hasattr(tokens[0], "__len__")


def _items(given: Any, wanted: str) -> list[Any]:
    """What a list, or anything like one, holds; ShapeError if it is nothing of the kind."""
    if not isinstance(given, bytes | Mapping | Set):
        try:
            return list(given)
        except TypeError:  # of None, a number, an array without axes
            pass
    raise ShapeError(f"{wanted}, got {type(given).__name__}")


def _cut(ids: list[int], limit: int) -> list[int]:
    """At most `limit` ids; the last (the separator) stays last."""
    return ids if len(ids) <= limit else [*ids[:limit - 1], ids[-1]]
