"""Whether this CPU can run code that was compiled for a target."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import llvmlite.binding as llvm

from llmc.errors import DeviceError

_V2 = ("cx16", "popcnt", "sahf", "sse3", "ssse3", "sse4.1", "sse4.2")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
LEVELS = {"generic": (), "x86-64": (), "x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4}


def check_cpu(target: str) -> None:
    """DeviceError unless this CPU runs code for `target` ("x86_64:znver5:+avx512bf16,...").

    Code for this very CPU model, for a level such as x86-64-v3, or with its features written out
    runs where the features are; code for another model by name is refused: what that model has is
    not written in the name.
    """
    processor, _, rest = target.partition(":")
    cpu, _, listed = rest.partition(":")
    if processor != platform.machine():
        raise DeviceError(f"the artifact was compiled for {processor}, this machine is "
                          f"{platform.machine()}: compile the model on this machine")
    have = llvm.get_host_cpu_features()
    wanted = [name[1:] for name in listed.split(",") if name.startswith("+")]
    if cpu in LEVELS:
        wanted += LEVELS[cpu]
    elif cpu != llvm.get_host_cpu_name() and not _is_complete(listed, have):
        raise DeviceError(f"the artifact was compiled for {cpu}, this CPU is "
                          f"{llvm.get_host_cpu_name()}: compile the model on this machine, or for "
                          "a level such as x86_64:x86-64-v3")
    if missing := [name for name in wanted if not have.get(name)]:
        raise DeviceError(f"the artifact was compiled for {cpu}; this CPU lacks "
                          f"{', '.join(missing[:6])}: compile the model on this machine")


def _is_complete(listed: str, features: Mapping[str, bool]) -> bool:
    """Whether a target's text names every feature with + or -, as `Target.host()` does."""
    return {name[1:] for name in listed.split(",")} >= set(features)
