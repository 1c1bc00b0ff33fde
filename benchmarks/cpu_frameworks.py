"""The peers of cpu_workers.py that are frameworks, and what is exported for them.

An export is made once, beside the checkpoint. Language models of openvino are those of
optimum-intel (stateful, weights compressed by nncf: asymmetric int8 by rows; symmetric int4 in
groups of 128 with an int8 head), those of onnxruntime its own builder's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cpu_workers import DRIFT, FEW_ROWS, STREAMED_BYTES, Worker, repeated

CALIBRATION = 8  # sentences of random tokens


class Torch(Worker):
    """transformers on torch, eager; weights of matmuls packed by oneDNN."""

    def __init__(self, options: dict[str, Any]):
        super().__init__(options)
        import torch

        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        if self.dtype not in ("f32", "bf16"):
            raise RuntimeError("runs f32 and bf16 only")
        self.kind = {"f32": torch.float32, "bf16": torch.bfloat16}[self.dtype]
        self.packed: dict[tuple, list] = {}
        if not options.get("model"):
            return
        from transformers import AutoModel, AutoModelForCausalLM

        self.bert = self.config()["model_type"] == "bert"
        kind = AutoModel if self.bert else AutoModelForCausalLM
        self.model = kind.from_pretrained(options["model"], dtype=self.kind).eval()

    def begin(self, ids: np.ndarray) -> None:
        self.last = self.model(self.torch.from_numpy(ids[None]), use_cache=True, logits_to_keep=1)

    def more(self, tokens: int) -> None:
        for _ in range(tokens):
            chosen = self.last.logits[:, -1:].argmax(-1)
            self.last = self.model(chosen, past_key_values=self.last.past_key_values,
                                   use_cache=True)

    def encode(self, lengths: list[int]) -> float:
        ids, mask = (self.torch.from_numpy(each) for each in self.dense(lengths))
        given = {} if len(set(lengths)) == 1 else {"attention_mask": mask}
        return repeated(lambda: self.model(ids, **given))

    def matmul(self, k: int, n: int, rows: int) -> float:
        torch, mkldnn = self.torch, self.torch.ops.mkldnn
        if (k, n, rows) not in self.packed:
            self.packed.clear()
            few = rows <= FEW_ROWS
            copies = max(1, STREAMED_BYTES // (k * n * self.kind.itemsize)) if few else 1
            self.packed[k, n, rows] = [
                mkldnn._reorder_linear_weight(torch.randn(n, k).to(self.kind), rows)
                for _ in range(copies)]
        weights = self.packed[k, n, rows]
        x = torch.randn(rows, k).to(self.kind)

        def products() -> None:
            for weight in weights:
                mkldnn._linear_pointwise(x, weight, None, "none", [], "")

        return repeated(products) / len(weights)


class CompiledTorch(Torch):
    """The same by torch.compile, weights frozen: inductor packs them for oneDNN."""

    def __init__(self, options: dict[str, Any]):
        super().__init__(options)
        import torch._inductor.config as inductor

        inductor.freezing = True
        if not options.get("model"):
            raise RuntimeError("packed weights are measured by torch")
        self.torch._dynamo.config.cache_size_limit = 64
        self.model.forward = self.torch.compile(self.model.forward, dynamic=False)

    def more(self, tokens: int) -> None:
        raise RuntimeError("compiles anew for every length")


def exported_encoder(path: Path) -> Path:
    """The checkpoint's encoder as ONNX beside it, written once by torch."""
    onnx = path / "exported.onnx"
    if not onnx.exists():
        import torch
        from transformers import AutoModel

        model = AutoModel.from_pretrained(path, dtype=torch.float32,
                                          attn_implementation="eager").eval()

        class Plain(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids: Any, mask: Any) -> Any:
                hidden = (1.0 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
                return self.model(input_ids=ids, attention_mask=hidden, return_dict=False)[:2]

        ids = torch.zeros(2, 16, dtype=torch.int64)
        torch.onnx.export(Plain(), (ids, torch.ones_like(ids)), str(onnx), dynamo=False,
                          input_names=["ids", "mask"], output_names=["hidden", "pooled"],
                          dynamic_axes={name: {0: "batch", 1: "tokens"}
                                        for name in ("ids", "mask")}, opset_version=17)
    return onnx


class OnnxRuntime(Worker):
    """Encoders by onnxruntime, in f32 or dynamically quantised; language models by
    onnxruntime_genai."""

    def __init__(self, options: dict[str, Any]):
        super().__init__(options)
        if not options.get("model"):
            raise RuntimeError("runs models only")
        self.bert = self.config()["model_type"] == "bert"
        if self.bert:
            self.open_encoder()
        else:
            self.open_language_model()

    def open_encoder(self) -> None:
        import onnxruntime

        if self.dtype not in ("f32", "int8"):
            raise RuntimeError("runs encoders in f32 and int8 only")
        path = exported_encoder(self.model_path)
        if self.dtype == "int8":
            from onnxruntime.quantization import quantize_dynamic

            path, source = self.model_path / "quantized.onnx", path
            if not path.exists():
                quantize_dynamic(source, path)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self.threads
        self.session = onnxruntime.InferenceSession(str(path), settings,
                                                    ["CPUExecutionProvider"])

    def open_language_model(self) -> None:
        import onnxruntime_genai as genai

        self.genai = genai
        settings = genai.Config(str(self.built()))
        settings.overlay(json.dumps({"model": {"decoder": {"session_options": {
            "intra_op_num_threads": self.threads}}}}))
        self.model = genai.Model(settings)

    def built(self) -> Path:
        """What onnxruntime_genai's builder makes of the checkpoint."""
        folder = self.model_path / f"genai-{self.dtype}"
        if not (folder / "genai_config.json").exists():
            if self.dtype != "int4":
                raise RuntimeError("the builder quantises to int4 only")
            subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder",
                            "-i", str(self.model_path), "-o", str(folder), "-p", "int4",
                            "-e", "cpu", "-c", str(folder / "cache"),
                            "--extra_options", "int4_accuracy_level=4"],
                           check=True, stdout=sys.stderr)
        return folder

    def begin(self, ids: np.ndarray) -> None:
        parameters = self.genai.GeneratorParams(self.model)
        most = len(ids) + 2 * DRIFT
        parameters.set_search_options(max_length=most, min_length=most, do_sample=False)
        self.sequence = self.genai.Generator(self.model, parameters)
        self.sequence.append_tokens(ids[None].astype(np.int32))
        self.sequence.generate_next_token()

    def more(self, tokens: int) -> None:
        for _ in range(tokens):
            self.sequence.generate_next_token()

    def encode(self, lengths: list[int]) -> float:
        ids, mask = self.dense(lengths)
        return repeated(lambda: self.session.run(None, {"ids": ids, "mask": mask}))


class OpenVino(Worker):
    """In the arithmetic that the dtype allows, other settings as the plugin chooses."""

    def __init__(self, options: dict[str, Any]):
        super().__init__(options)
        if not options.get("model"):
            raise RuntimeError("runs models only")
        import openvino

        self.core = openvino.Core()
        self.bert = self.config()["model_type"] == "bert"
        self.model = self.encoder() if self.bert else self.language_model()
        settings = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}
        if self.dtype in ("f32", "bf16"):
            settings["INFERENCE_PRECISION_HINT"] = self.dtype
        settings |= options.get("settings", {})
        self.request = self.core.compile_model(self.model, "CPU", settings).create_infer_request()

    def encoder(self) -> Any:
        """The encoder in f32; int8: weights and activations, quantised by nncf."""
        quantised = self.dtype == "int8"
        folder = self.model_path / ("openvino-int8" if quantised else "openvino-f32")
        path = folder / "openvino_model.xml"
        if not path.exists() and quantised:
            import nncf
            import openvino

            rows = [self.named([128]) for _ in range(CALIBRATION)]
            model = OpenVino(self.options | {"dtype": "f32"}).model
            openvino.save_model(nncf.quantize(model, nncf.Dataset(rows),
                                              model_type=nncf.ModelType.TRANSFORMER), path)
        elif not path.exists():
            from optimum.intel import OVModelForFeatureExtraction

            OVModelForFeatureExtraction.from_pretrained(
                str(self.model_path), export=True, compile=False, load_in_8bit=False,
            ).save_pretrained(str(folder))
        return self.core.read_model(path)

    def named(self, lengths: list[int]) -> dict[str, np.ndarray]:
        ids, mask = self.dense(lengths)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}

    def language_model(self) -> Any:
        folder = self.model_path / f"openvino-{self.dtype}"
        if not (folder / "openvino_model.xml").exists():
            from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

            given: dict[str, Any] = {"load_in_8bit": False}
            if self.dtype in ("int8", "int4"):
                bits = {"bits": 8, "sym": False} if self.dtype == "int8" else \
                    {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0}
                given = {"quantization_config": OVWeightQuantizationConfig(**bits)}
            OVModelForCausalLM.from_pretrained(str(self.model_path), export=True, compile=False,
                                               **given).save_pretrained(str(folder))
        return with_last_logits(self.core.read_model(folder / "openvino_model.xml"))

    def feed(self, ids: np.ndarray) -> None:
        count = ids.shape[1]
        self.past += count
        self.request.infer({
            "input_ids": ids, "beam_idx": np.zeros(1, np.int32),
            "attention_mask": np.ones((1, self.past), np.int64),
            "position_ids": np.arange(self.past - count, self.past)[None]})

    def begin(self, ids: np.ndarray) -> None:
        self.request.reset_state()
        self.past = 0
        self.feed(ids[None])

    def more(self, tokens: int) -> None:
        for _ in range(tokens):
            self.feed(self.request.get_output_tensor(0).data[:, -1:].argmax(-1))

    def encode(self, lengths: list[int]) -> float:
        inputs = self.named(lengths)
        return repeated(lambda: self.request.infer(inputs))


class OpenVinoF32(OpenVino):
    """The same model in f32 arithmetic: faster where dot products of bf16 are slow."""

    def __init__(self, options: dict[str, Any]):
        if options["dtype"] == "f32":
            raise RuntimeError("the same as openvino")
        super().__init__(options | {"settings": {"INFERENCE_PRECISION_HINT": "f32"}})


def with_last_logits(model: Any) -> Any:
    """The model with logits of the last token only, as openvino_genai makes it."""
    from openvino import opset13 as ops

    head = model.outputs[0].get_node().input_value(0).get_node()
    last = ops.slice(head.input_value(0), *(np.array([each]) for each in (-1, np.iinfo(
        np.int64).max, 1, 1)))
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return model


FRAMEWORKS: dict[str, type[Worker]] = {
    "torch": Torch, "torch compiled": CompiledTorch, "onnxruntime": OnnxRuntime,
    "openvino": OpenVino, "openvino f32": OpenVinoF32}
