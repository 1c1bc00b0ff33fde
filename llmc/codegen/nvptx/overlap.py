"""Kernels that begin before the one ahead of them has ended (programmatic dependent launch).

Every kernel first lets the next one start, and waits for the one ahead before it reads or writes
what other kernels write. Before it waits it may read weights and the step's arguments: that hides
the time to launch it and to fill its pipeline. A kernel that has ended has waited, so whoever waits
for it may rely on everything before it.
"""

from __future__ import annotations

from llmc.codegen.llvm import VOID, Emitter, ir

ARCHITECTURES = ("sm_90", "sm_90a", "sm_100", "sm_120")


def may_overlap(architecture: str) -> bool:
    """Whether kernels for this architecture overlap, and so may be launched to."""
    return architecture in ARCHITECTURES


def release_next(e: Emitter) -> None:
    """The next kernel may start once every block of this one has come here."""
    _instruction(e, "griddepcontrol.launch_dependents;")


def await_earlier(e: Emitter) -> None:
    """Until the kernel ahead has ended and its writes are visible; all threads call it."""
    _instruction(e, "griddepcontrol.wait;")


def _instruction(e: Emitter, text: str) -> None:
    code = ir.InlineAsm(ir.FunctionType(VOID, []), text, "~{memory}", True)
    e.b.call(code, [])
