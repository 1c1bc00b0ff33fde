"""The Llama of transformers on torch, at the shapes that gpu.py measures: the peers of its figures.

Weights are random; one sequence is decoded greedily at a context of so many tokens, its cache
static, its tokens fed back on the device; a prompt is run at once, without a cache (which is less
work than ours). Each measurement is of the wall clock, with the seconds that torch compiled for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

REPEATS = 3  # of a decode run, of which the median counts
PREFILLS = 10
WARM = 3  # runs, or tokens, before those that are timed
SPARE_CONTEXT = 128  # tokens of the cache behind the context

Step = Callable[[], None]


class Peer:
    """A model of a shape (a config.json's fields), bf16, on a device of torch's."""

    def __init__(self, shape: dict[str, Any], device: str = "cuda"):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        self.torch, self.device = torch, device
        self.config = LlamaConfig(**shape, attn_implementation="sdpa")
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            self.model = LlamaForCausalLM(self.config).eval()
        torch.set_default_dtype(dtype)

    def wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def compile(self, function: Any, mode: str | None) -> Any:
        self.torch._dynamo.reset()
        return self.torch.compile(function, mode=mode, fullgraph=True, dynamic=False)

    # ---- decoding -----------------------------------------------------------------------------

    def decode(self, mode: str, context: int, tokens: int) -> dict[str, float]:
        """Milliseconds a token, the middle one of which has `context` tokens before it."""
        started = time.perf_counter()
        state = DecodeState(self, context + SPARE_CONTEXT)
        step = getattr(self, "_" + mode.replace("-", "_"))(state)
        self._set_up(state, context)
        for _ in range(WARM):
            step()
        self.wait()
        ready = time.perf_counter() - started
        seconds = []
        for _ in range(REPEATS):
            state.move(context - tokens // 2)
            self.wait()
            began = time.perf_counter()
            for _ in range(tokens):
                step()
            self.wait()
            seconds.append((time.perf_counter() - began) / tokens)
        return {"milliseconds": round(statistics.median(seconds) * 1e3, 3),
                "ready_seconds": round(ready, 1)}

    def _eager(self, state: DecodeState) -> Step:
        return lambda: state.put(state.next(state.token))

    def _reduce_overhead(self, state: DecodeState) -> Step:
        """Compiled, and captured in CUDA graphs by torch itself."""
        compiled = self.compile(state.next, "reduce-overhead")

        def step() -> None:
            self.torch.compiler.cudagraph_mark_step_begin()
            state.put(compiled(state.token))

        return step

    def _max_autotune(self, state: DecodeState) -> Step:
        """Compiled with the matmuls that measure best, captured in one CUDA graph by hand."""
        compiled = self.compile(state.next, "max-autotune-no-cudagraphs")

        def step() -> None:
            state.put(compiled(state.token))

        if self.device != "cuda":
            return step
        stream = self.torch.cuda.Stream()
        with self.torch.cuda.stream(stream):
            for _ in range(WARM):
                step()
        stream.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, stream=stream):
            step()
        return graph.replay

    def _set_up(self, state: DecodeState, context: int) -> None:
        """Something in the cache, and the first token behind it."""
        state.move(context)
        for layer in state.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()

    # ---- prompts ------------------------------------------------------------------------------

    def prefill(self, mode: str, count: int) -> dict[str, float]:
        """Milliseconds until the token behind a prompt of so many is known."""
        torch, model = self.torch, self.model
        ids = torch.randint(3, self.config.vocab_size, (1, count), device=self.device)
        started = time.perf_counter()
        if mode == "compiled":  # layer by layer: all share one compiled function
            torch._dynamo.reset()
            for layer in model.model.layers:
                layer.compile(fullgraph=True, dynamic=False)
        seconds = []
        try:
            for turn in range(WARM + PREFILLS):
                began = time.perf_counter()
                model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.argmax(-1)
                self.wait()
                seconds.append(time.perf_counter() - began)
                if turn == WARM - 1:
                    ready = time.perf_counter() - started
        finally:
            for layer in model.model.layers:
                layer._compiled_call_impl = None
        middle = statistics.median(seconds[WARM:])
        return {"milliseconds": round(middle * 1e3, 2), "tokens_per_second": round(count / middle),
                "ready_seconds": round(ready, 1)}


class DecodeState:
    """What a decode step reads and writes, at fixed addresses: a token and a static cache."""

    def __init__(self, peer: Peer, length: int):
        from transformers import StaticCache

        torch, config = peer.torch, peer.config
        self.model = peer.model
        self.cache = StaticCache(config=config, max_cache_len=length)
        self.cache.early_initialization(1, config.num_key_value_heads, config.head_dim,
                                        torch.bfloat16, peer.device)
        self.token = torch.full((1, 1), 3, device=peer.device)

    def next(self, token: Any) -> Any:
        """The token behind a token, which the cache takes in."""
        return self.model(input_ids=token, past_key_values=self.cache,
                          use_cache=True).logits[:, -1:].argmax(-1)

    def put(self, token: Any) -> None:
        self.token.copy_(token)

    def move(self, length: int) -> None:
        """Let the cache hold so many tokens."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)


MEASUREMENTS = ("decode-max-autotune", "decode-reduce-overhead", "decode-eager",
                "prefill-compiled", "prefill-eager")


def measure(shape: dict[str, Any], wanted: Sequence[str], context: int, tokens: int, prompt: int,
            device: str = "cuda") -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, figures or {"failed": why}) of each wanted measurement."""
    peer = Peer(shape, device)
    for name in wanted:
        kind, _, mode = name.partition("-")
        try:
            result: dict[str, Any] = (peer.decode(mode, context, tokens) if kind == "decode"
                                      else peer.prefill(mode, prompt))
        except Exception as error:  # whatever a peer's compiler may raise
            text = str(error).strip().splitlines() or [""]
            result = {"failed": f"{type(error).__name__}: {text[0]}"[:300]}
        yield name, result
