"""Processes of our own: Python that imports from where this process does, and from nowhere else."""

from __future__ import annotations

import sys


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """The command that calls `main(*arguments)` of a module.

    With -m, Python would import first from the directory where the user happens to be; what lies
    there may be named like anything.
    """
    code = (f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; "
            "main(*sys.argv[1:])")
    return sys.executable or "python3", "-P", "-c", code, *arguments
