"""Kernels that measure what a GPU can do at best: reading memory, and multiplying.

Benchmarks put their figures next to these. Each takes an address and a number of turns:

    read       READ_BYTES bytes a thread and turn, all threads side by side
    peak_f32   f32 fused multiply-adds in registers
    peak_bf16  products of bf16 on the tensor cores: on sm_90a by wgmma of what lies in shared
               memory, else by mma of registers

What they compute is joined and, so that it must be computed, might be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

READS = 8  # loads of 16 bytes, of a thread and turn
READ_BYTES = 16 * READS
THREADS = 256  # of a block
CHAINS = 16  # sums of a thread that do not wait for each other; 8 tiles of mma
UNROLL = 8
TILE_BYTES = 16 << 10  # of shared memory: 64 x 16 and 256 x 16 elements, and as much again

_HEAD = """.version 8.0
.target {architecture}
.address_size 64
"""
_ENTRY = """.visible .entry {name}(.param .u64 base, .param .u64 turns)
{{
{declarations}
  .reg .pred %again, %never;
  .reg .b32 %block, %size, %thread, %blocks, %index, %stride, %joined;
  .reg .b64 %at, %turns, %step;
  ld.param.u64 %at, [base];
  ld.param.u64 %turns, [turns];
  cvta.to.global.u64 %at, %at;
  mov.u32 %block, %ctaid.x;
  mov.u32 %size, %ntid.x;
  mov.u32 %thread, %tid.x;
  mov.u32 %blocks, %nctaid.x;
  mad.lo.u32 %index, %block, %size, %thread;
  mul.lo.u32 %stride, %blocks, %size;
  mov.u32 %joined, 0;
{before}
TURN:
{turn}
  sub.u64 %turns, %turns, 1;
  setp.ne.u64 %again, %turns, 0;
  @%again bra TURN;
{after}
  setp.eq.u32 %never, %joined, 0x12345678;
  @%never st.global.u32 [%at], %joined;
  ret;
}}
"""


@dataclass(frozen=True)
class CeilingCode:
    """ptx: the kernels above. *_flops: floating-point operations of a block and turn."""

    ptx: str
    f32_flops: int
    bf16_flops: int


def generate_ceilings(architecture: str) -> CeilingCode:
    """Code for a GPU that is sm_80 or newer; architecture: its own, such as sm_90a."""
    hopper = architecture == "sm_90a"
    bf16, bf16_flops = _wgmma() if hopper else _mma()
    head = _HEAD.format(architecture=architecture if hopper else "sm_80")
    text = head + _read() + _f32() + bf16
    return CeilingCode(text, 2 * CHAINS * UNROLL * THREADS, bf16_flops)


def _entry(name: str, declarations: Sequence[str], before: Sequence[str], turn: Sequence[str],
           after: Sequence[str] = ()) -> str:
    parts = {"declarations": declarations, "before": before, "turn": turn, "after": after}
    return _ENTRY.format(name=name, **{part: "\n".join(f"  {line}" for line in lines)
                                       for part, lines in parts.items()})


def _join(registers: Sequence[str]) -> list[str]:
    return [f"xor.b32 %joined, %joined, {register};" for register in registers]


def _read() -> str:
    turn, joins = [], []
    for number in range(READS):
        values = [f"%v{4 * number + i}" for i in range(4)]
        turn += [f"ld.global.nc.L1::no_allocate.v4.u32 {{{', '.join(values)}}}, [%at];",
                 "add.u64 %at, %at, %step;"]
        joins += _join(values)
    before = ["mul.wide.u32 %step, %index, 16;", "add.u64 %at, %at, %step;",
              "mul.wide.u32 %step, %stride, 16;"]
    return _entry("read", [f".reg .b32 %v<{4 * READS}>;"], before, turn + joins)


def _f32() -> str:
    sums = [f"%sum{number}" for number in range(CHAINS)]
    before = ["cvt.rn.f32.u32 %a, %index;", "mov.f32 %b, 0f3F7FFFFF;",  # just below 1
              *(f"cvt.rn.f32.u32 {each}, %thread;" for each in sums)]
    turn = [f"fma.rn.f32 {each}, {each}, %b, %a;" for each in sums] * UNROLL
    return _entry("peak_f32", [f".reg .f32 %a, %b, %sum<{CHAINS}>;"], before, turn, _join(sums))


def _mma() -> tuple[str, int]:
    """Tiles of 16 x 8 x 16 of each warp."""
    tiles = CHAINS // 2
    sums = [f"%sum{number}" for number in range(4 * tiles)]
    before = [*_elements([f"%a{number}" for number in range(4)]),
              *_elements([f"%b{number}" for number in range(2)]),
              *(f"mov.f32 {each}, 0f00000000;" for each in sums)]
    turn = []
    for tile in range(tiles):
        own = f"{{{', '.join(sums[4 * tile:4 * tile + 4])}}}"
        turn.append(f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {own}, "
                    f"{{%a0, %a1, %a2, %a3}}, {{%b0, %b1}}, {own};")
    text = _entry("peak_bf16", [".reg .b32 %a<4>, %b<2>;", f".reg .f32 %sum<{4 * tiles}>;"],
                  before, turn * UNROLL, _join(sums))
    return text, 2 * 16 * 8 * 16 * tiles * UNROLL * (THREADS // 32)


def _elements(registers: Sequence[str]) -> list[str]:
    """Pairs of bf16 of any sign and fraction, in [0.5, 1): what is all zeros takes less power."""
    lines = []
    for number, register in enumerate(registers):
        offset = 0x85EBCA6B * (number + 1) % 2**32
        lines += [f"mad.lo.u32 {register}, %index, 0x9E3779B1, {offset};",
                  f"and.b32 {register}, {register}, 0x807F807F;",
                  f"or.b32 {register}, {register}, 0x3F003F00;"]
    return lines


def _wgmma() -> tuple[str, int]:
    """Products of 64 x 16 and 16 x 256 elements of each warp group."""
    sums = [f"%sum{number}" for number in range(128)]
    groups = THREADS // 128
    declarations = [f".shared .align 1024 .b8 tiles[{TILE_BYTES}];", ".reg .pred %more;",
                    ".reg .b32 %pair, %offset, %place;", ".reg .b64 %a, %b;",
                    f".reg .f32 %sum<{len(sums)}>;"]
    before = ["mov.u32 %place, tiles;", "shl.b32 %offset, %thread, 2;"]
    for start in range(0, TILE_BYTES, 4 * THREADS):
        before += [*_elements(["%pair"]), f"add.u32 %block, %place, {start};",
                   "add.u32 %block, %block, %offset;", "st.shared.u32 [%block], %pair;",
                   "add.u32 %index, %index, 7919;"]
    before += ["fence.proxy.async;", "bar.sync 0;",
               *_descriptor("%a", 0), *_descriptor("%b", 64 * 16 * 2),
               *(f"mov.f32 {each}, 0f00000000;" for each in sums), "setp.eq.u32 %more, 0, 0;"]
    product = (f"wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {{{', '.join(sums)}}}, "
               "%a, %b, %more, 1, 1, 0, 0;")
    turn = ["wgmma.fence.sync.aligned;", *[product] * UNROLL, "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 0;"]
    text = _entry("peak_bf16", declarations, before, turn, _join(sums))
    return text, 2 * 64 * 256 * 16 * UNROLL * groups


def _descriptor(register: str, start: int) -> list[str]:
    """Of a matrix in shared memory, in pieces of 8 rows by 16 bytes, two side by side."""
    strides = (128 >> 4) << 16 | (256 >> 4) << 32
    return [f"add.u32 %offset, %place, {start};", "shr.u32 %offset, %offset, 4;",
            "and.b32 %offset, %offset, 0x3FFF;", f"cvt.u64.u32 {register}, %offset;",
            f"or.b64 {register}, {register}, {strides};"]
