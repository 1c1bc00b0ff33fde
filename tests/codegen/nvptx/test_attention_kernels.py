"""Attention kernels for GPUs: assembled without one, compared with f64 where there is one."""

import attention_harness as reference
import numpy as np
import pytest
from attention_cases import LAYOUTS, TOLERANCE, cases, device_arrays
from attention_on_device import Device, DeviceStage, run_once

from llmc.codegen.nvptx.attention import AttentionKernel, attention
from llmc.codegen.nvptx.attention_cluster import ClusterDecodeKernel
from llmc.codegen.nvptx.attention_decode import DecodeKernel
from llmc.codegen.nvptx.attention_flash import FlashAttention
from llmc.codegen.nvptx.attention_general import GeneralKernel
from llmc.codegen.nvptx.attention_prefill import PrefillKernel
from llmc.ir.dims import symbol
from llmc.ir.ops import PAGE, make

pytest.importorskip("cuda.bindings.nvjitlink")

ARCHITECTURES = ["sm_80", "sm_90a"]
PREFILL, GENERAL = [PrefillKernel, DecodeKernel], [GeneralKernel]
BOTH_HEIGHTS = [PrefillKernel, *PREFILL]
SYMBOLS = {"tokens": (1, 8192), "sequences": (1, 256), "table_width": (1, 4096),
           "pool_pages": (1, 1 << 20)}


def paged_stage(architecture, dtype, heads, kv_heads, size, most=8192, make_kernel=FlashAttention,
                **attributes):
    """paged_attention of up to `most` tokens; all other dims are symbols."""
    tokens, sequences = symbol("tokens", 1, most), symbol("sequences", 1, 256)
    width, pool = symbol("table_width", 1), symbol("pool_pages", 1)
    leaf = reference.leaf
    inputs = [leaf("q", dtype, tokens, heads, size), leaf("k", dtype, pool, PAGE, kv_heads, size),
              leaf("v", dtype, pool, PAGE, kv_heads, size),
              leaf("page_table", "i32", sequences, width), leaf("sequence", "i32", tokens),
              leaf("positions", "i32", tokens), leaf("offsets", "i32", sequences + 1)]
    return DeviceStage(inputs, make("paged_attention", *inputs, **attributes),
                       {**SYMBOLS, "tokens": (1, most)}, LAYOUTS, architecture, make_kernel)


def kinds(stage):
    return [type(launch) for launch in stage.kernel.launches]


def assert_no_spills(stage):
    assert len(stage.reports) == len(stage.kernel.launches)
    for report in stage.reports.values():
        assert report.spills == 0, report.text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size, attributes", [
    (16, {}), (64, {}), (64, {"window": 100, "softcap": 30.0}), (80, {}), (96, {}), (112, {}),
    (128, {}), (128, {"window": 100, "softcap": 30.0}), (160, {}), (192, {}), (256, {}),
    (256, {"window": 100, "softcap": 30.0})])
def test_tensor_kernels_do_not_spill(architecture, size, attributes):
    stage = paged_stage(architecture, "bf16", 32, 8, size, **attributes)
    assert_no_spills(stage)
    if architecture == "sm_80" and size > 128:  # the sums do not fit there
        assert kinds(stage) == GENERAL
    else:
        low = architecture == "sm_90a" and size <= 128
        assert kinds(stage) == (BOTH_HEIGHTS if low else PREFILL)
        assert "mma.sync.aligned.m16n8k16" in stage.ptx and "cp.async.cg" in stage.ptx


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype, size", [("f32", 64), ("f32", 7), ("f32", 256), ("bf16", 20)])
def test_other_types_and_sizes_do_not_spill(architecture, dtype, size):
    stage = paged_stage(architecture, dtype, 14, 2, size)
    assert kinds(stage) == GENERAL
    assert_no_spills(stage)


@pytest.mark.parametrize("architecture, kernels, counts", [
    ("sm_80", [DecodeKernel], [[8], [8 * 27], [8 * 8 * 3]]),
    ("sm_90a", [ClusterDecodeKernel, DecodeKernel],
     [[8 * 8, 0], [0, 8 * 32], [0, 8 * 8 * 4]])])
def test_few_tokens_are_split_over_blocks(architecture, kernels, counts):
    """Short contexts of a few tokens over clusters, where there are any."""
    stage = paged_stage(architecture, "bf16", 32, 8, 128, most=8)
    assert kinds(stage) == kernels
    assert_no_spills(stage)
    assert (".reqnctapercluster 8" in stage.ptx) == (architecture == "sm_90a")

    def blocks(tokens, pages):
        dims = {"tokens": tokens, "sequences": tokens, "table_width": pages, "pool_pages": 1}
        return [launch[0] for launch in stage.launches(dims)]

    assert [blocks(1, 1), blocks(1, 4096), blocks(8, 4096)] == counts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [80, 96])
@pytest.mark.parametrize("heads, groups", [(32, 32), (6, 2)])
@pytest.mark.parametrize("attributes", [{}, {"window": 100, "softcap": 30.0}])
def test_decoding_of_any_division_of_heads_does_not_spill(architecture, size, heads, groups,
                                                          attributes):
    stage = paged_stage(architecture, "bf16", heads, groups, size, most=8, **attributes)
    assert DecodeKernel in kinds(stage)
    assert_no_spills(stage)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype, size", [
    *(("f32", size) for size in (7, 64, 80, 96, 100, 112, 128, 192, 256)), ("bf16", 256),
    ("bf16", 100)])
def test_few_queries_of_any_size_do_not_spill(architecture, dtype, size):
    stage = paged_stage(architecture, dtype, 4, 2, size, most=8, make_kernel=attention)
    tensor = (architecture, dtype, size) == ("sm_90a", "bf16", 256)
    assert kinds(stage) == ([ClusterDecodeKernel, DecodeKernel] if tensor else [AttentionKernel])
    assert_no_spills(stage)


def test_launches_that_a_shape_has_no_use_for_are_empty():
    stage = paged_stage("sm_90a", "bf16", 32, 8, 128)

    def blocks(tokens, sequences):
        dims = {"tokens": tokens, "sequences": sequences, "table_width": 64, "pool_pages": 1}
        return [launch[0] for launch in stage.launches(dims)]

    assert blocks(512, 1) == [8 * (512 * 4 // 64 + 1), 0, 0]
    assert blocks(2048, 1) == [0, 8 * (2048 * 4 // 128 + 1), 0]
    low, high, decode = blocks(32, 32)
    assert decode and not low and not high
    low, high, decode = blocks(40, 32)
    assert bool(low) != bool(high) and decode
    assert blocks(1, 1)[-1]


@pytest.mark.parametrize("tokens, rows", [(512, 64), (1024, 64), (1100, 128)])
def test_a_height_that_a_shape_has_no_use_for_is_left_out(tokens, rows):
    inputs, result, *_ = reference.paged_case([(tokens, 0)], 32, 8, 128, "bf16")
    stage = DeviceStage(inputs, result, layouts=LAYOUTS, architecture="sm_90a")
    assert [launch.shape.rows for launch in stage.kernel.launches
            if isinstance(launch, PrefillKernel)] == [rows]


@pytest.fixture(scope="module")
def device():
    """The first GPU; skips where there is none."""
    try:
        return Device()
    except Exception as problem:  # no library, no driver, no device: each has its own error
        pytest.skip(f"no GPU: {problem}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, run", [pytest.param(dtype, run, id=name)
                                        for name, dtype, run in cases()])
def test_against_f64(device, dtype, run):
    assert run(device) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_splits_repeat_bit_for_bit(device):
    inputs, result, _, arrays, _ = reference.paged_case([(1, 5000)], 8, 2, 64, "bf16")
    stage = DeviceStage(inputs, result, layouts=LAYOUTS)
    arrays = device_arrays(arrays, inputs)
    first = run_once(device, stage, arrays)
    for _ in range(5):
        assert np.array_equal(first, run_once(device, stage, arrays))
