"""Machine code made in a process of its own: LLVM does one thing at a time in each.

Also the program that the process runs: a line with the target's text, then the module's, on stdin;
8 bytes of length, the object and the optimised module's text on stdout.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

from llmc.codegen.llvm import emit_object
from llmc.codegen.target import Target

LEAST = 1 << 20  # characters of a module: a smaller one is compiled before a process has started
ROOT = Path(__file__).parents[3]


def object_beside(text: str, target: Target) -> tuple[bytes, str]:
    """`emit_object` of a module's text, by another process; by this one should that die."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            (sys.executable, "-m", "llmc.codegen.host.beside"), check=True, capture_output=True,
            input=f"{target.text()}\n{text}".encode(), env=os.environ | {"PYTHONPATH": path})
    except (OSError, subprocess.CalledProcessError):
        return emit_object(text, target.machine())
    (size,) = struct.unpack_from("<q", done.stdout)
    return done.stdout[8:8 + size], done.stdout[8 + size:].decode()


def main() -> None:
    """Entry of the process."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get into the reply
    target, _, text = sys.stdin.buffer.read().decode().partition("\n")
    code, optimised = emit_object(text, Target.parse(target).machine())
    with replies:
        replies.write(struct.pack("<q", len(code)) + code + optimised.encode())


if __name__ == "__main__":
    main()
