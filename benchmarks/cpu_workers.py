"""One engine in a process of its own, for cpu_peers.py: measures when it is told to.

    python benchmarks/cpu_workers.py ENGINE '{"model": ..., "dtype": ..., "threads": 4}'

Prints {"ready": seconds} or {"error": text}, then for each line of JSON on stdin (a job) one line
{"seconds": ...}. Jobs: {"work": "decode", "context": 128, "tokens": 32}, {"work": "prefill",
"tokens": 512}, {"work": "encode", "batch": 8, "tokens": 128}, {"work": "matmul", "k": 2048, "n":
2048, "rows": 4}. Processes stand still between jobs, so that engines can take turns.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STREAMED_BYTES = 128 << 20  # of one matmul's weights
LLMC_DTYPES = {"f32": "f32", "bf16": "bf16"}


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Worker:
    """An engine with a model; every method returns seconds."""

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.threads = options["threads"]
        self.dtype = options["dtype"]
        self.random = np.random.default_rng(0)

    def config(self) -> dict[str, Any]:
        return json.loads((Path(self.options["model"]) / "config.json").read_text())

    def ids(self, *shape: int) -> np.ndarray:
        return self.random.integers(0, self.config()["vocab_size"], shape)


class Llmc(Worker):
    def __init__(self, options: dict[str, Any]):
        super().__init__(options)
        self.runtime: Any = None
        self.cases: dict[tuple, Any] = {}
        if options.get("model"):
            import llmc

            given: dict[str, Any] = {"threads": self.threads}
            if self.dtype in LLMC_DTYPES:
                given["dtype"] = LLMC_DTYPES[self.dtype]
            else:
                given["quantize"] = self.dtype
            self.runtime = llmc.Runtime(options["model"], **given)

    def prefill(self, tokens: int) -> float:
        from llmc.runtime.pages import Sequence
        from llmc.runtime.step import Chunk

        sequence = Sequence()
        ids = self.ids(tokens)
        try:
            return timed(lambda: self.runtime.step([Chunk(sequence, ids, 1)]))
        finally:
            self.runtime.release(sequence)

    def decode(self, context: int, tokens: int) -> float:
        from llmc.runtime.pages import Sequence
        from llmc.runtime.step import Chunk

        sequence = Sequence()
        logits = self.runtime.step([Chunk(sequence, self.ids(context), 1)])

        def steps() -> None:
            last = logits
            for _ in range(tokens):
                last = self.runtime.step([Chunk(sequence, last.argmax(1), 1)])

        try:
            return timed(steps)
        finally:
            self.runtime.release(sequence)

    def encode(self, batch: int, tokens: int) -> float:
        sentences = list(self.ids(batch, tokens))
        return timed(lambda: self.runtime.run(sentences))

    def matmul(self, k: int, n: int, rows: int) -> float:
        import bench_matmul

        case = (k, n, rows > 4)
        if case not in self.cases:
            bench_matmul.STREAMED_BYTES = STREAMED_BYTES
            self.cases[case] = bench_matmul.Runner(
                bench_matmul.Case("s", k, n, 1, self.dtype, rows > 4), self.threads)
        runner = self.cases[case]
        return runner.seconds(rows) / runner.copies


class Torch(Worker):
    """transformers on torch, eager; weights of matmuls packed by oneDNN."""

    def __init__(self, options: dict[str, Any]):
        super().__init__(options)
        import torch

        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.kind = {"f32": torch.float32, "bf16": torch.bfloat16}[self.dtype]
        self.packed: dict[tuple, list] = {}
        self.model: Any = None
        if options.get("model"):
            from transformers import AutoModel, AutoModelForCausalLM

            kind = AutoModel if self.config()["model_type"] == "bert" else AutoModelForCausalLM
            self.model = kind.from_pretrained(options["model"], dtype=self.kind).eval()

    def tensor(self, *shape: int) -> Any:
        return self.torch.from_numpy(self.ids(*shape))

    def prefill(self, tokens: int) -> float:
        ids = self.tensor(1, tokens)
        return timed(lambda: self.model(ids, use_cache=True, logits_to_keep=1))

    def decode(self, context: int, tokens: int) -> float:
        state = self.model(self.tensor(1, context), use_cache=True, logits_to_keep=1)

        def steps() -> None:
            last = state
            for _ in range(tokens):
                chosen = last.logits[:, -1:].argmax(-1)
                last = self.model(chosen, past_key_values=last.past_key_values, use_cache=True)

        return timed(steps)

    def encode(self, batch: int, tokens: int) -> float:
        ids = self.tensor(batch, tokens)
        return timed(lambda: self.model(ids))

    def matmul(self, k: int, n: int, rows: int) -> float:
        torch, mkldnn = self.torch, self.torch.ops.mkldnn
        if (k, n, rows) not in self.packed:
            self.packed.clear()
            copies = max(1, STREAMED_BYTES // (k * n * self.kind.itemsize))
            self.packed[k, n, rows] = [
                mkldnn._reorder_linear_weight(torch.randn(n, k).to(self.kind), rows)
                for _ in range(copies)]
        weights = self.packed[k, n, rows]
        x = torch.randn(rows, k).to(self.kind)

        def products() -> None:
            for weight in weights:
                mkldnn._linear_pointwise(x, weight, None, "none", [], "")

        return timed(products) / len(weights)


def exported_encoder(options: dict[str, Any]) -> Path:
    """The checkpoint's encoder as ONNX beside it, written once by torch."""
    path = Path(options["model"]) / "exported.onnx"
    if not path.exists():
        import torch
        from transformers import AutoModel

        model = AutoModel.from_pretrained(options["model"], dtype=torch.float32,
                                          attn_implementation="eager").eval()

        class Plain(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids: Any, mask: Any) -> Any:
                return self.model(input_ids=ids, attention_mask=mask, return_dict=False)[:2]

        ids = torch.zeros(2, 16, dtype=torch.int64)
        torch.onnx.export(Plain(), (ids, torch.ones_like(ids)), str(path), dynamo=False,
                          input_names=["ids", "mask"], output_names=["hidden", "pooled"],
                          dynamic_axes={name: {0: "batch", 1: "tokens"}
                                        for name in ("ids", "mask")}, opset_version=17)
    return path


class OnnxRuntime(Worker):
    """Encoders in f32 by onnxruntime; language models by onnxruntime_genai's builder."""

    def __init__(self, options: dict[str, Any]):
        super().__init__(options)
        if self.config()["model_type"] == "bert":
            import onnxruntime

            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = self.threads
            self.session = onnxruntime.InferenceSession(
                str(exported_encoder(options)), settings, ["CPUExecutionProvider"])
            return
        import onnxruntime_genai as genai

        self.genai = genai
        folder = built_language_model(options["model"], self.dtype)
        settings = genai.Config(str(folder))
        settings.overlay(json.dumps({"model": {"decoder": {"session_options": {
            "intra_op_num_threads": self.threads}}}}))
        self.model = genai.Model(settings)

    def generator(self, tokens: int) -> Any:
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=tokens, do_sample=False)
        return self.genai.Generator(self.model, parameters)

    def prefill(self, tokens: int) -> float:
        generator, ids = self.generator(tokens + 1), self.ids(1, tokens).astype(np.int32)
        return timed(lambda: generator.append_tokens(ids))

    def decode(self, context: int, tokens: int) -> float:
        generator = self.generator(context + tokens + 1)
        generator.append_tokens(self.ids(1, context).astype(np.int32))
        generator.generate_next_token()
        return timed(lambda: [generator.generate_next_token() for _ in range(tokens)])

    def encode(self, batch: int, tokens: int) -> float:
        ids = self.ids(batch, tokens).astype(np.int64)
        return timed(lambda: self.session.run(None, {"ids": ids, "mask": np.ones_like(ids)}))


def built_language_model(model: str, dtype: str) -> Path:
    """What onnxruntime_genai's builder makes of a checkpoint, once."""
    from onnxruntime_genai.models.builder import create_model

    folder = Path(model) / f"genai-{dtype}"
    if not (folder / "genai_config.json").exists():
        precision = {"f32": "fp32", "int4": "int4", "int8": "int8"}[dtype]
        create_model("", model, str(folder), precision, "cpu", str(folder / "cache"))
    return folder


class OpenVino(Worker):
    """Encoders, through ONNX, in the arithmetic that the dtype allows."""

    def __init__(self, options: dict[str, Any]):
        super().__init__(options)
        import openvino

        if self.config()["model_type"] != "bert":
            raise RuntimeError("language models need an export by optimum-intel")
        self.compiled = openvino.Core().compile_model(str(exported_encoder(options)), "CPU", {
            "INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.dtype})

    def encode(self, batch: int, tokens: int) -> float:
        ids = self.ids(batch, tokens).astype(np.int64)
        return timed(lambda: self.compiled([ids, np.ones_like(ids)]))


WORKERS = {"llmc": Llmc, "torch": Torch, "onnxruntime": OnnxRuntime, "openvino": OpenVino}


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    started = time.perf_counter()
    try:
        worker = WORKERS[sys.argv[1]](json.loads(sys.argv[2]))
    except Exception as error:  # an engine that is not there, or cannot: cpu_peers.py says so
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}), file=answers)
        return 0
    print(json.dumps({"ready": time.perf_counter() - started}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer: dict[str, Any] = {"seconds": getattr(worker, job.pop("work"))(**job)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
