"""What users get wrong ends in one clear line and exit status 1 (a wrong command line: 2)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llmc
from tests.conftest import EMBEDDED

PROMPT = ("--prompt", "Once")


def refused(result, *words: str) -> None:
    assert result.status == 1, result
    assert not result.out
    (line,) = result.err.splitlines()
    assert line.startswith("llmc: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize("command", [
    ("generate", *PROMPT), ("bench",), ("inspect",), ("run", "--output", "out"),
    ("compile", "-o", "out.llmc"),
], ids=lambda command: command[0])
def test_a_missing_model_is_named(llmc_command, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    name, *options = command
    refused(llmc_command(name, "no/such/model", *options), "no/such/model", "no such file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "words"), [
    (("--prompt", ""), ("prompt is empty",)),
    (("--prompt", "word " * 600), ("tokens, the context holds 512",)),
    ((*PROMPT, "--max-tokens", "-3"), ("must be 0 or more, got -3",)),
    ((*PROMPT, "--temperature", "-1"), ("temperature",)),
    ((*PROMPT, "--temperature", "nan"), ("temperature",)),
    ((*PROMPT, "--top-p", "1.5"), ("top_p",)),
    ((*PROMPT, "--top-k", "-1"), ("top_k",)),
    ((*PROMPT, "--dtype", "f7"), ("f7",)),
    ((*PROMPT, "--dtype", "i32"), ("i32",)),
    ((*PROMPT, "--threads", "0"), ("threads must be a positive int, got 0",)),
    ((*PROMPT, "--max-context", "0"), ("max_context",)),
    ((*PROMPT, "--max-context", "513"), ("max_context is 513", "limit is 512")),
    ((*PROMPT, "--target", "abacus"), ("abacus",)),
])
def test_generate(llmc_command, options, words):
    refused(llmc_command("generate", EMBEDDED, *options), *words)


def test_generate_needs_a_prompt_for_other_models(llmc_command, embedded_artifact):
    refused(llmc_command("generate", embedded_artifact), "--prompt TEXT")


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_what_is_no_model_is_refused_as_such(llmc_command, tmp_path, monkeypatch, command):
    monkeypatch.setattr("llmc.server.logs.set_up_logs", lambda _: None)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    for path in (text, tmp_path):
        refused(llmc_command(command, path), f"{path}: not a model")


def test_serve_refuses_a_graph_before_it_listens(llmc_command, tmp_path, monkeypatch):
    from onnx import TensorProto, helper, save

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph, artifact = tmp_path / "double.onnx", tmp_path / "double.llmc"
    save(helper.make_model(helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g",
                                             [x], [y]), ir_version=10), graph)
    monkeypatch.setattr("llmc.server.logs.set_up_logs", lambda _: None)
    monkeypatch.setattr("llmc.cli.serve.listen", lambda *_: pytest.fail("it listens"))
    assert llmc_command("compile", graph, "-o", artifact).status == 0
    for path in (graph, artifact):
        refused(llmc_command("serve", path), f"{path}: ", "no KV cache")


@pytest.mark.parametrize("compiled", [False, True])
def test_serve_refuses_a_context_before_it_listens(llmc_command, embedded_artifact, monkeypatch,
                                                   compiled):
    monkeypatch.setattr("llmc.server.logs.set_up_logs", lambda _: None)
    monkeypatch.setattr("llmc.cli.serve.listen", lambda *_: pytest.fail("it listens"))
    path = embedded_artifact if compiled else EMBEDDED
    refused(llmc_command("serve", path, "--max-context", 513),
            f"{path}: max_context is 513, this model's limit is 512 tokens")


def test_serve_refuses_a_gpu_that_is_not_there_before_it_listens(llmc_command, monkeypatch):
    def missing(_):
        raise llmc.DeviceError("there is no GPU 0")

    monkeypatch.setattr("llmc.server.logs.set_up_logs", lambda _: None)
    monkeypatch.setattr("llmc.cli.serve.listen", lambda *_: pytest.fail("it listens"))
    monkeypatch.setattr("llmc.runtime.cuda_device.Device", missing)
    refused(llmc_command("serve", EMBEDDED, "--target", "nvptx"), "there is no GPU 0")


def test_compare_with_onnxruntime_takes_onnx_files_only(llmc_command):
    refused(llmc_command("compare", EMBEDDED, "--onnxruntime"), str(EMBEDDED), "for .onnx files")


def test_an_encoder_does_not_generate(llmc_command):
    bert = Path(__file__).parent.parent / "goldens" / "hf" / "bert"
    assert llmc_command("generate", bert, *PROMPT).status == 1


@pytest.mark.parametrize(("options", "words"), [
    (("--prompt-tokens", "600"), ("600 prompt tokens", "exceed the context of 512")),
    (("--generate-tokens", "0"), ("--generate-tokens must be 1 or more",)),
    (("--batch", "0"), ("--batch",)),
    (("--batch", "100000000"), ("--batch 100000000 needs", "pages of 32 tokens", "lower --batch")),
    (("--batch", "1000000000000"), ("--batch 1000000000000: a step takes",)),
    (("--repeat", "-1"), ("--repeat",)),
])
def test_bench(llmc_command, options, words):
    refused(llmc_command("bench", EMBEDDED, *options), *words)


def test_bench_of_too_many_sentences(llmc_command):
    bert = Path(__file__).parent.parent / "goldens" / "hf" / "bert"
    refused(llmc_command("bench", bert, "--batch", 10**10), "--batch 10000000000 of", "GiB",
            "lower --batch or --prompt-tokens")


@pytest.mark.parametrize(("options", "words"), [
    (("--target", "bogus"), ("unknown target 'bogus'",)),
    (("--target", "x86_64:nocpu"), ("nocpu",)),
    (("--shape", "tokens"), ("NAME=LOW:HIGH",)),
    (("--shape", "tokens=a:b"), ("NAME=LOW:HIGH",)),
    (("--shape", "tokens=5:1"), ("5..1",)),
    (("--shape", "colour=1:5"), ("no symbol colour",)),
    (("--dtype", "f7"), ("f7",)),
])
def test_compile(llmc_command, tmp_path, options, words):
    output = tmp_path / "out.llmc"
    refused(llmc_command("compile", EMBEDDED, "-o", output, *options), *words)
    assert not list(tmp_path.iterdir()), "nothing half-written"


@pytest.mark.parametrize("output", ["/proc/out.llmc", "/dev/null/out.llmc"])
def test_compile_to_where_nothing_can_be_written(llmc_command, output):
    refused(llmc_command("compile", EMBEDDED, "-o", output), "cannot write", output)


@pytest.mark.parametrize("options", [(), ("--emit", "header")])
def test_compile_makes_no_parent_directory(llmc_command, tmp_path, options):
    output = tmp_path / "nowhere" / "out"
    refused(llmc_command("compile", EMBEDDED, "-o", output, *options), "cannot write", str(output),
            "is no directory")
    assert not output.parent.exists()


def test_compile_does_not_replace_what_is_no_artifact(llmc_command, tmp_path):
    (tmp_path / "precious").write_text("data")
    refused(llmc_command("compile", EMBEDDED, "-o", tmp_path), "is no artifact")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(("option", "words"), [
    ("ids", ("NAME=FILE.npy",)),
    ("ids=nothing.npy", ("nothing.npy", "No such file")),
    ("ids={text}", ("is no .npy file",)),
    ("ids={ids}", ("a checkpoint takes input_ids",)),
    ("input_ids={outside}", ("token id 512 is outside the vocabulary of 512",)),
    ("input_ids={empty}", ("empty",)),
    ("input_ids={floats}", ("input_ids must be integers",)),
])
def test_run(llmc_command, tmp_path, option, words):
    import numpy as np

    files = {"ids": np.ones((1, 3), np.int64), "outside": np.full((1, 2), 512),
             "empty": np.ones((0, 3), np.int64), "floats": np.ones((1, 3))}
    paths = {name: tmp_path / f"{name}.npy" for name in files}
    for name, array in files.items():
        np.save(paths[name], array)
    paths["text"] = tmp_path / "text.npy"
    paths["text"].write_text("not an array")
    output = tmp_path / "out"
    item = option.format(**paths)
    refused(llmc_command("run", EMBEDDED, "--input", item, "--output", output), *words)
    assert not output.exists()


@pytest.mark.parametrize("command", ["run", "capture"])
def test_an_input_is_given_once(llmc_command, tmp_path, command):
    import numpy as np

    np.save(tmp_path / "ids.npy", np.ones((1, 3), np.int64))
    item = ("--input", f"input_ids={tmp_path / 'ids.npy'}")
    options = {"run": (), "capture": ("--blocks", "*")}[command]
    refused(llmc_command(command, EMBEDDED, *item, *item, *options, "--output", tmp_path / "out"),
            "input_ids is given twice")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "words"), [
    (("--verify",), ("no artifact",)), (("--stage", "ptx"), ("--target nvptx",)),
    (("--stage", "imported", "--dtype", "f7"), ("f7",)),
    (("--html", "/proc/page.html"), ("/proc/page.html",)),
    (("--variant", "exact"), ("no variant 'exact'", "few")),
])
def test_inspect(llmc_command, options, words):
    refused(llmc_command("inspect", EMBEDDED, *options), *words)


@pytest.mark.parametrize("options", [("--stage", "quantization"), ("--verify",), ("--json",)])
def test_inspect_of_nothing_says_so(llmc_command, options):
    refused(llmc_command("inspect", "missing.llmc", *options), "missing.llmc: no such file")


def test_inspect_says_what_an_artifact_does_not_hold(llmc_command, embedded_artifact):
    refused(llmc_command("inspect", embedded_artifact, "--stage", "llvm"), "--stage llvm")
    for option in (("--target", "nvptx"), ("--dtype", "bf16")):
        refused(llmc_command("inspect", embedded_artifact, *option), "compiled for", *option[:1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_compile_leaves_nothing(tmp_path, number):
    """The signal goes to all processes of the group, as a terminal sends it. What a shell runs in
    the background ignores interrupts, and so would all that it starts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llmc", "compile", str(EMBEDDED), "-o", str(tmp_path / "a.llmc")],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for _ in range(3000):
        if list(tmp_path.iterdir()):
            break
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "llmc: interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    command = f"{sys.executable} -m llmc compile {EMBEDDED} -o {tmp_path / 'a.llmc'} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.llmc" / "manifest.json").is_file()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_an_output_that_cannot_be_replaced_is_refused_before_compiling(
        llmc_command, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("llmc.cli.compile._compile", lambda *_: pytest.fail("compiled"))
    output = tmp_path / "out"
    if kind == "directory":
        output.mkdir()
    (output / "mine" if kind == "directory" else output).write_text("of somebody else")
    refused(llmc_command("compile", EMBEDDED, "-o", output), "exists and is no artifact")
    refused(llmc_command("compile", EMBEDDED, "-o", ""), "must end in a name")


@pytest.mark.parametrize("architectures", ["", " ", ","])
def test_an_empty_list_of_gpus(llmc_command, tmp_path, architectures):
    refused(llmc_command("compile", EMBEDDED, "-o", tmp_path / "a.llmc", "--target", "nvptx",
                         "--arch", architectures), "--arch names no GPU")


def test_a_host_artifact_does_not_run_on_a_gpu(llmc_command, embedded_artifact):
    result = llmc_command("generate", embedded_artifact, *PROMPT, "--target", "nvptx")
    refused(result, "was compiled for", "compile the model with --target nvptx")
    assert len(result.err) < 250  # without the list of a CPU's features


@pytest.mark.parametrize("damage", ["weights", "manifest", "code"])
def test_a_damaged_artifact(llmc_command, embedded_artifact, tmp_path, damage):
    copy = Path(shutil.copytree(embedded_artifact, tmp_path / "copy.llmc"))
    path = copy / {"weights": "weights.bin", "manifest": "manifest.json",
                   "code": "variants/few.o"}[damage]
    contents = path.read_bytes()
    path.write_bytes(contents.replace(b'"vocab_size": 512', b'"vocab_size": 999')
                     if damage == "manifest" else contents[:-1])
    refused(llmc_command("generate", copy, *PROMPT), path.name, "compile the model again")


def test_an_artifact_of_another_cpu(llmc_command, tmp_path):
    other = tmp_path / "other.llmc"
    assert llmc_command("compile", EMBEDDED, "-o", other, "--target",
                        "aarch64:neoverse-v2").status == 0
    refused(llmc_command("generate", other, *PROMPT), "aarch64", "compile the model")


@pytest.mark.parametrize(("name", "value"), [
    ("LLMC_THREADS", "many"), ("LLMC_THREADS", "0"), ("LLMC_THREADS", "1025"),
    pytest.param("LLMC_THREADS", "9" * 5000, id="very-large"), ("LLMC_MAX_CONTEXT", "-1"),
    ("LLMC_CACHE_DIR", "/proc/cache"),
])
def test_bad_environment_variables_are_named(llmc_command, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    refused(llmc_command("generate", EMBEDDED, *PROMPT), name)


@pytest.mark.parametrize("arguments", [
    (), ("frobnicate",), ("generate", "--fast"), ("compile",), ("cache", "burn"),
    ("inspect", "--stage", "sass"), ("generate", "--max-tokens", "few"),
])
def test_wrong_command_lines_exit_with_2(llmc_command, arguments):
    result = llmc_command(*arguments)
    assert result.status == 2
    assert "usage: llmc" in result.err


def test_no_traceback_from_a_fresh_process(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(llmc.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "llmc", "generate", str(tmp_path), "--prompt", "x"],
        capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"llmc: {tmp_path}")
