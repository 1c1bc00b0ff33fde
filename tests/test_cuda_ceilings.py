"""A GPU's ceilings: their code is what it says; with a GPU, what they and `llmc bench` measure."""

import json

import pytest

from llmc import cli
from llmc.codegen.nvptx.assemble import assemble
from llmc.codegen.nvptx.ceilings import CHAINS, READS, UNROLL, generate_ceilings
from llmc.cuda_ceilings import CudaCeilings
from llmc.errors import DeviceError
from llmc.runtime.cuda_device import Device
from tests.conftest import EMBEDDED


@pytest.mark.parametrize(("architecture", "instruction", "count"), [
    ("sm_80", "mma.sync", UNROLL * CHAINS // 2), ("sm_90a", "wgmma.mma_async", UNROLL),
    ("sm_120", "mma.sync", UNROLL * CHAINS // 2)])
def test_ceilings_are_many_instructions_that_do_not_wait(architecture, instruction, count):
    ptx = generate_ceilings(architecture).ptx
    assert ptx.count(instruction) == count
    assert ptx.count("fma.rn.f32") == UNROLL * CHAINS
    assert ptx.count("ld.global.nc") == READS
    made = assemble(ptx, architecture if architecture == "sm_90a" else "sm_80")
    assert not made.warnings
    assert all(kernel.spill_bytes == 0 for kernel in made.report)
    assert {kernel.name for kernel in made.report} in ({"read", "peak_f32", "peak_bf16"}, set())


@pytest.fixture(scope="module")
def device():
    try:
        return Device()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
def test_ceilings_are_plausible(device):
    with CudaCeilings(device) as ceilings:
        read, f32, bf16 = (median_of(sample) for sample in (
            ceilings.read_bandwidth, ceilings.peak_f32, ceilings.peak_bf16))
    assert 1e11 < read < 1e14
    assert 1e12 < f32 < bf16 < 1e16


def median_of(sample):
    return sorted(sample() for _ in range(5))[2]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_bench_reports_a_gpu_beside_its_ceilings(device, capsys, tmp_path, batch):
    artifact = str(tmp_path / "model.llmc")
    assert cli.main(["compile", str(EMBEDDED), "-o", artifact, "--target", "nvptx", "--arch",
                     device.architecture]) == 0
    capsys.readouterr()
    options = ["--repeat", "2", "--batch", str(batch)]
    assert cli.main(["bench", artifact, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == device.name
    assert 0 < report["decode"]["share"] < 1 and 0 < report["prefill"]["share"] < 1
    assert 0 < report["decode"]["host_us_per_step"] < 1e3 * batch * report["decode"]["ms_per_token"]
    assert cli.main(["bench", str(EMBEDDED), "--target", "nvptx", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert device.name in lines[0] and "us a step" in lines[1] and "TFLOP/s of" in lines[2]
