"""The runtime on GPUs: choosing code and refusing without a GPU, goldens and graphs with one."""

import ctypes
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import llmc
from llmc import cli
from llmc.errors import DeviceError
from llmc.runtime import cuda_device
from llmc.runtime.cuda_device import Device, choose_architecture
from llmc.runtime.pages import Sequence
from llmc.runtime.step import Chunk
from llmc.runtime.targets import resolve_target
from tests.conftest import EMBEDDED

GOLDENS = Path(__file__).parents[1] / "goldens"


@dataclass(frozen=True)
class Gpu:
    """What choosing code asks of a device."""

    capability: tuple[int, int]
    ordinal: int = 0
    name: str = "test"
    architecture: str = "sm_00"


def why_no_gpu() -> str:
    try:
        Device()
    except DeviceError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def gpu() -> None:
    """Skips where there is no GPU."""
    if reason := why_no_gpu():
        pytest.skip(reason)


@pytest.mark.parametrize(("capability", "chosen"), [
    ((8, 0), ("sm_80", "cubin")), ((8, 9), ("sm_80", "cubin")), ((9, 0), ("sm_90a", "cubin")),
    ((10, 0), ("sm_80", "ptx")), ((12, 0), ("sm_80", "ptx")),
])
def test_the_best_code_for_a_gpu_is_chosen(capability, chosen):
    available = [(name, form) for name in ("sm_80", "sm_90a") for form in ("cubin", "ptx")]
    assert choose_architecture(Gpu(capability), available) == chosen


def test_no_code_for_an_older_gpu():
    with pytest.raises(DeviceError, match=r"compiled for sm_80, .* --arch sm_00"):
        choose_architecture(Gpu((7, 5)), [("sm_80", "cubin"), ("sm_80", "ptx")])


def test_without_a_gpu_the_error_says_what_is_missing(tmp_path, capsys, embedded_artifact):
    if not why_no_gpu():
        pytest.skip("there is a GPU")
    output = tmp_path / "gpu.llmc"
    embedded = Path(llmc.__file__).parent / "data" / "stories260K"
    assert cli.main(["compile", str(embedded), "-o", str(output), "--target", "nvptx",
                     "--arch", "sm_80,sm_90a"]) == 0
    np.save(tmp_path / "ids.npy", np.array([[1, 403]]))
    told = capsys.readouterr().out
    for architecture in ("sm_80", "sm_90a"):
        assert re.search(rf"{architecture}: \d+ kernels of at most \d+ registers, 0 bytes", told)
    assert cli.main(["run", str(output), "--input", f"input_ids={tmp_path / 'ids.npy'}",
                     "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llmc: ") and error.count("\n") == 1
    assert why_no_gpu() in error
    assert cli.main(["inspect", str(output), "--stage", "ptx"]) == 0
    listed = capsys.readouterr().out
    assert "// sm_80\n" in listed and "// sm_90a\n" in listed and ".target sm_90a" in listed
    assert listed.count(" 0 spilled") == listed.count(" spilled") > 20
    with pytest.raises(DeviceError):
        llmc.Runtime(embedded, target="nvptx")
    with pytest.raises(DeviceError, match="compiled for"):
        llmc.Runtime(embedded_artifact, target="nvptx")
    assert cli.main(["inspect", str(embedded_artifact), "--stage", "ptx"]) == 1
    assert "holds no GPU code" in capsys.readouterr().err


@pytest.mark.parametrize("loads", [False, True])
def test_missing_bindings_are_named_with_the_driver_if_that_is_missing(monkeypatch, loads):
    def load(name: str) -> None:
        if not loads:
            raise OSError(name)

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(DeviceError, match="CUDA bindings") as raised:
        cuda_device._driver.__wrapped__()
    assert ("no NVIDIA driver" in str(raised.value)) != loads


def test_auto_says_what_it_chose(capsys):
    chosen = resolve_target("auto")
    assert chosen == "host" if why_no_gpu() else chosen.startswith("nvptx:sm_")
    assert capsys.readouterr().err.startswith("llmc: target auto: ")


class CopyingDriver:
    """The driver's calls of an upload, between parts of host memory."""

    def __init__(self):
        self.memory: dict[int, Any] = {}

    def __call__(self, name: str, *arguments: Any) -> Any:
        if name == "cuMemHostAlloc":
            buffer = ctypes.create_string_buffer(arguments[0])
            self.memory[ctypes.addressof(buffer)] = buffer
            return ctypes.addressof(buffer)
        if name == "cuMemFreeHost":
            del self.memory[arguments[0]]
        if name == "cuMemcpyHtoDAsync":
            ctypes.memmove(*arguments[:3])
        return None


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 8001, 12345])
def test_uploads_arrive_whole(monkeypatch, size):
    driver = CopyingDriver()
    monkeypatch.setattr(cuda_device, "call", driver)
    monkeypatch.setattr(cuda_device, "event", lambda: 0)
    monkeypatch.setattr(cuda_device, "STAGING_BYTES", 1000)
    device = SimpleNamespace(use=lambda: None, wait=lambda: None, stream=0)
    source = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    there = np.zeros(size + 1, np.uint8)
    cuda_device.upload(device, source, there.ctypes.data)
    assert np.array_equal(there[:-1], source) and there[-1] == 0
    assert not driver.memory

    def broken(start: int, target: np.ndarray) -> None:
        raise OSError("no more")

    if size:
        with pytest.raises(OSError, match="no more"):
            cuda_device.Upload(device, size, broken, there.ctypes.data).wait()
        assert not driver.memory


# ---- with a GPU -----------------------------------------------------------------------------


def run_goldens(model: str, dtype: str) -> float:
    """Largest error of all forward cases, relative to the largest value of each."""
    directory = GOLDENS / "hf" / model
    expected = json.loads((directory / "expected.json").read_text())
    data = load_file(directory / "expected.safetensors")
    worst = 0.0
    with llmc.Runtime(directory, target="nvptx", dtype=dtype) as runtime:
        for case in (case for case in expected["cases"] if case["type"] == "forward"):
            name = case["name"]
            got = runtime.run({key: data[f"{name}.{key}"] for key in case["inputs"]})
            mask = data.get(f"{name}.attention_mask")
            for output in case["outputs"]:
                wanted = data[f"{name}.{output}"]
                error = np.abs(got[output].astype(np.float64) - wanted)
                if mask is not None and wanted.ndim == 3:
                    error = error[mask.astype(bool)]
                worst = max(worst, float(error.max() / np.abs(wanted).max()))
    return worst


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["llama_gqa4_tied", "llama_gqa3_sharded", "bert"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_goldens(gpu, model, dtype):
    expected = json.loads((GOLDENS / "hf" / model / "expected.json").read_text())
    tolerance = 1.5 * expected["bf16_max_rel"] if dtype == "bf16" else 1e-4
    assert run_goldens(model, dtype) <= tolerance


@pytest.fixture(scope="module")
def embedded(gpu):
    """The embedded model on the GPU, in f32."""
    with llmc.Runtime(EMBEDDED, target="nvptx", specialize="none", max_batch=2) as runtime:
        yield runtime


@pytest.mark.gpu
def test_a_decode_step_is_one_graph_launch_and_repeats(embedded, embedded_goldens):
    for golden in embedded_goldens * 2:
        count = len(golden["greedy_ids"])
        before = embedded.executor.graph_launches
        tokens = list(embedded.generate(golden["prompt_ids"], count, ignore_eos=True))
        assert tokens == golden["greedy_ids"]
        assert embedded.executor.graph_launches - before >= count - 1


@pytest.mark.gpu
@pytest.mark.parametrize("options", [
    {}, {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 2**63 + 5}])
def test_the_device_chooses_what_the_host_would(embedded, embedded_goldens, monkeypatch, options):
    prompt = embedded_goldens[1]["prompt_ids"]

    def generate() -> Iterator[int]:
        monkeypatch.setattr(embedded, "_generations", 3)
        return embedded.generate(prompt, 150, ignore_eos=True, **options)

    tokens = list(generate())
    pairs = list(zip(generate(), generate(), strict=True))  # two at a time
    assert pairs == [(token, token) for token in tokens]
    monkeypatch.setattr(embedded.executor, "borrow_decoder", lambda *_: None)
    assert tokens == list(generate())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_thousand_steps_repeat_bit_for_bit(gpu, embedded_goldens, dtype):
    def digest(runtime: llmc.Runtime) -> str:
        result = hashlib.sha256()
        for golden in embedded_goldens:
            sequence = Sequence()
            tokens = golden["prompt_ids"]
            for _ in range(334):
                logits = runtime.step([Chunk(sequence, tokens, 1)])
                result.update(logits.tobytes())
                tokens = [int(logits[0].argmax())]
            runtime.release(sequence)
        return result.hexdigest()

    with llmc.Runtime(EMBEDDED, target="nvptx", dtype=dtype, specialize="none") as runtime:
        assert digest(runtime) == digest(runtime)
