"""Targets: which machine code is generated for, and what lowering may ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import llvmlite.binding as llvm

from llmc.errors import CompileError
from llmc.ir.program import GROUPED_MATMUL, INTEGER_MATMUL, QUANTIZED_MATMUL, Capabilities

# Ops beyond the plain elementwise and movement ones that host kernels compute themselves.
HOST_KERNELS = frozenset("""
    sigmoid silu softplus gelu rope softmax rms_norm layer_norm matmul packed_attention attention
    paged_attention cache_append dequantize cumsum cumprod argmax argmin top_k scatter_nd
    scatter_elements
""".split())

# Graphics processors by LLVM's names. sm_90a: Hopper with its own tensor-core instructions.
ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90a")
_PTX_FEATURES = {"sm_100": "+ptx86", "sm_120": "+ptx87"}  # others: of CUDA 12.0
DEVICE_TRIPLE = "nvptx64-nvidia-cuda"

_TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}

# Functions whose instructions tell what a CPU has, without a table of CPUs. (An intrinsic that the
# CPU lacks would abort the process; plain operations are always legal.)
_PROBE = """
define void @f(ptr %a, ptr %b) {
  %x = load <16 x float>, ptr %a, align 4
  %y = call <16 x float> @llvm.fma.v16f32(<16 x float> %x, <16 x float> %x, <16 x float> %x)
  store <16 x float> %y, ptr %b, align 4
  ret void
}
define void @g(ptr %a, ptr %b) {
  %x = load <8 x i32>, ptr %a, align 4
  %y = mul <8 x i32> %x, %x
  store <8 x i32> %y, ptr %b, align 4
  ret void
}
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
"""
# CPUs on which one core starts a bf16 dot product of 512 bits every other cycle, and two fused
# multiply-adds of f32 in each: widened, bf16 is multiplied twice as fast (measured on Emerald
# Rapids; the others have the same vector units).
_SLOW_BF16_DOT = frozenset({"sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d"})
# CPUs whose cores stream memory fastest if they ask for more than their own prefetchers do.
_FAR_MEMORY = _SLOW_BF16_DOT

_PROBE_BF16 = """
define void @f(ptr %a, ptr %b) {
  %x = load <16 x float>, ptr %a, align 4
  %y = fptrunc <16 x float> %x to <16 x bfloat>
  store <16 x bfloat> %y, ptr %b, align 2
  ret void
}
"""
# Sums of products of four bytes: x86 has an instruction for unsigned x signed, NEON for signed; 16
# bits in vectors of 512 are what products of pairs of bytes need there.
_PROBE_BYTES = """
define i32 @f(ptr %a, ptr %b) {
  %x = load <64 x i8>, ptr %a
  %y = load <64 x i8>, ptr %b
  %u = zext <64 x i8> %x to <64 x i32>
  %v = sext <64 x i8> %y to <64 x i32>
  %p = mul <64 x i32> %u, %v
  %r = call i32 @llvm.vector.reduce.add.v64i32(<64 x i32> %p)
  ret i32 %r
}
define <4 x i32> @g(<4 x i32> %t, <16 x i8> %x, <16 x i8> %y) {
  %u = sext <16 x i8> %x to <16 x i32>
  %v = sext <16 x i8> %y to <16 x i32>
  %p = mul <16 x i32> %u, %v
  %r = call <4 x i32> @llvm.vector.partial.reduce.add.v4i32.v16i32(<4 x i32> %t, <16 x i32> %p)
  ret <4 x i32> %r
}
declare i32 @llvm.vector.reduce.add.v64i32(<64 x i32>)
declare <4 x i32> @llvm.vector.partial.reduce.add.v4i32.v16i32(<4 x i32>, <16 x i32>)
"""
_PROBE_WORDS = """
define void @f(ptr %a) {
  %x = load <32 x i16>, ptr %a
  %y = mul <32 x i16> %x, %x
  store <32 x i16> %y, ptr %a
  ret void
}
"""


@dataclass(frozen=True)
class Target:
    """kind: "host" or "nvptx". features: LLVM's, each with + or -, on top of what the cpu has.

    Text form: `x86_64:znver5` or `x86_64:znver5:+avx512bf16,-avx512f`; `nvptx` or
    `nvptx:sm_80,sm_90a`, whose cpu is a list of architectures (`machine` takes a target of one: see
    `architectures`).
    """

    kind: str
    triple: str
    cpu: str
    features: tuple[str, ...] = ()

    @staticmethod
    def host() -> Target:
        """The CPU that runs this."""
        _initialise()
        features = llvm.get_host_cpu_features()
        named = tuple(("+" if has else "-") + name for name, has in sorted(features.items()))
        return Target("host", llvm.get_process_triple(), llvm.get_host_cpu_name(), named)

    @staticmethod
    def parse(text: str) -> Target:
        """The inverse of `text()`; "host" is this CPU. CompileError names what is unknown."""
        if text == "host":
            return Target.host()
        processor, _, rest = text.partition(":")
        if processor == "nvptx":
            return _parse_device(text, rest)
        if processor not in _TRIPLES:
            raise CompileError(f"unknown target {text!r}: it must be 'host', 'nvptx:ARCH' as in "
                               f"nvptx:sm_90a, or PROCESSOR:CPU with a processor of "
                               f"{', '.join(_TRIPLES)}, as in x86_64:znver5")
        cpu, _, features = rest.partition(":")
        names = tuple(name for name in features.split(",") if name)
        if any(name[0] not in "+-" for name in names):
            raise CompileError(f"target {text!r}: features are written +name or -name")
        target = Target("host", _TRIPLES[processor], cpu or "generic", names)
        if not _is_known_cpu(processor, target.cpu):
            raise CompileError(f"target {text!r}: unknown {processor} cpu {target.cpu!r}")
        return target

    @property
    def processor(self) -> str:
        """x86_64, aarch64 or nvptx."""
        return "nvptx" if self.kind == "nvptx" else self.triple.split("-")[0]

    def architectures(self) -> tuple[Target, ...]:
        """One target for each architecture of an nvptx target; a host target is its own."""
        if self.kind != "nvptx":
            return (self,)
        return tuple(Target("nvptx", self.triple, name) for name in self.cpu.split(","))

    def text(self) -> str:
        """One word; `parse` is its inverse."""
        suffix = ":" + ",".join(self.features) if self.features else ""
        return f"{self.processor}:{self.cpu}{suffix}"

    def machine(self) -> llvm.TargetMachine:
        """A new LLVM target machine: position-independent, -O3."""
        _initialise()
        if self.kind == "nvptx":
            features = _PTX_FEATURES.get(self.cpu, "+ptx80")
            return llvm.Target.from_triple(self.triple).create_target_machine(
                cpu=self.cpu, features=features, opt=3)
        try:
            target = llvm.Target.from_triple(self.triple)
        except RuntimeError as error:
            raise CompileError(f"LLVM has no target for {self.triple}: {error}") from None
        return target.create_target_machine(cpu=self.cpu, features=",".join(self.features), opt=3,
                                            reloc="pic", codemodel="default")

    # ---- what it has ------------------------------------------------------------------------

    @cached_property
    def vector_lanes(self) -> int:
        """f32 lanes of a vector register."""
        probe = _assembly(self, _PROBE)
        if "zmm" in probe:
            return 16
        return 8 if "ymm" in probe and "vpmulld" in probe else 4

    @cached_property
    def has_bf16(self) -> bool:
        """Whether the CPU has vectors of bf16, and with them dot products of pairs."""
        return "vcvtneps2bf16" in _assembly(self, _PROBE_BF16) and self.vector_lanes == 16

    @property
    def bf16_dot(self) -> bool:
        """Whether dot products of pairs of bf16 are the fastest way to multiply them."""
        return self.has_bf16 and self.cpu not in _SLOW_BF16_DOT

    @property
    def far_memory(self) -> bool:
        """Whether memory takes so long to answer that reads of more places at once, or lines asked
        for both far ahead and near, are faster."""
        return self.cpu in _FAR_MEMORY

    @cached_property
    def byte_dot(self) -> str:
        """`Capabilities.byte_dot`. Kernels need fused multiply-adds too."""
        if self.processor == "x86_64" and "vfmadd" not in _assembly(self, _PROBE):
            return ""
        probe = _assembly(self, _PROBE_BYTES)
        if self.processor == "aarch64":
            return "sdot" if "sdot" in probe else ""
        if "vpdpbusd" in probe and ("zmm" in probe or self.vector_lanes == 8):
            return "vnni"
        wide = self.vector_lanes == 8 or "zmm" in _assembly(self, _PROBE_WORDS)
        return "maddubs" if wide and self.vector_lanes >= 8 else ""

    def capabilities(self) -> Capabilities:
        """What lowering asks; the matmul tile fills the registers: 6x2, 12x2 with 32 of them."""
        if self.kind == "nvptx":
            return Capabilities(
                name="nvptx", vector_lanes=4, matmul_rows=16, panel_columns=1, few_rows=8,
                bf16_dot=True, kernels=HOST_KERNELS | {GROUPED_MATMUL},
                weight_layout="columns")
        lanes = self.vector_lanes
        many = lanes == 16 or self.processor == "aarch64"
        name = f"{self.processor}-{32 * lanes}" + ("-bf16" if self.bf16_dot else "")
        return Capabilities(
            name=name, vector_lanes=lanes, matmul_rows=12 if many else 6, panel_columns=2 * lanes,
            few_rows=8 if lanes == 16 else 4, bf16_dot=self.bf16_dot, byte_dot=self.byte_dot,
            kernels=HOST_KERNELS | {QUANTIZED_MATMUL, INTEGER_MATMUL, GROUPED_MATMUL})


def _parse_device(text: str, architectures: str) -> Target:
    names = tuple(dict.fromkeys(filter(None, architectures.split(",")))) or DEFAULT_ARCHITECTURES
    if any(name not in ARCHITECTURES for name in names):
        raise CompileError(f"target {text!r}: name architectures, as in nvptx:sm_80,sm_90a; "
                           f"known are {', '.join(ARCHITECTURES)}")
    return Target("nvptx", DEVICE_TRIPLE, ",".join(names))


@cache
def _initialise() -> None:
    """LLVM's targets, once a process."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


@cache
def _assembly(target: Target, text: str) -> str:
    return target.machine().emit_assembly(llvm.parse_assembly(text))


@cache
def _is_known_cpu(processor: str, cpu: str) -> bool:
    """LLVM only warns about unknown names, and compiles for the least CPU: so look them up."""
    return cpu == "generic" or cpu in CPUS[processor]


CPUS = {
    "x86_64": frozenset("""
        x86-64 x86-64-v2 x86-64-v3 x86-64-v4 nehalem westmere sandybridge ivybridge haswell
        broadwell skylake skylake-avx512 cascadelake cooperlake cannonlake icelake-client
        icelake-server tigerlake rocketlake alderlake raptorlake meteorlake arrowlake lunarlake
        sapphirerapids emeraldrapids graniterapids graniterapids-d sierraforest grandridge
        clearwaterforest diamondrapids pantherlake novalake wildcatlake gracemont knl knm
        bdver1 bdver2 bdver3 bdver4 znver1 znver2 znver3 znver4 znver5 btver2
    """.split()),
    "aarch64": frozenset("""
        cortex-a53 cortex-a55 cortex-a57 cortex-a72 cortex-a73 cortex-a75 cortex-a76 cortex-a77
        cortex-a78 cortex-a510 cortex-a520 cortex-a710 cortex-a715 cortex-a720 cortex-a725
        cortex-x1 cortex-x2 cortex-x3 cortex-x4 cortex-x925 neoverse-e1 neoverse-n1 neoverse-n2
        neoverse-n3 neoverse-v1 neoverse-v2 neoverse-v3 neoverse-512tvb ampere1 ampere1a ampere1b
        apple-a12 apple-a13 apple-a14 apple-a15 apple-a16 apple-a17 apple-m1 apple-m2 apple-m3
        apple-m4 a64fx thunderx2t99 tsv110 grace oryon-1 kryo carmel
    """.split()),
}
