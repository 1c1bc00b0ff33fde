"""llmc devices: what this machine can run on."""

from __future__ import annotations

import json
import os

from llmc.cli import add_command


def add(subparsers) -> None:
    parser = add_command(subparsers, "devices", run, "Show what this machine can run on.",
                         "llmc devices --json")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments) -> int:
    import llvmlite.binding as llvm

    from llmc import knobs
    from llmc.runtime.memory import physical_memory

    features = llvm.get_host_cpu_features()
    of_interest = ("avx2", "fma", "avx512f", "avx512bf16", "avx512vnni", "avxvnni", "amx-tile",
                   "neon", "dotprod", "bf16", "sve")
    host = {"target": "host", "cpu": llvm.get_host_cpu_name(), "cores": os.cpu_count(),
            "threads": knobs.threads() or knobs.cores(), "memory_bytes": physical_memory(),
            "features": [name for name in of_interest if features.get(name)]}
    if arguments.json:
        print(json.dumps([host]))
    else:
        print(f"host   {host['cpu']}, {host['cores']} cores, "
              f"{host['memory_bytes'] / 2**30:.1f} GiB, {' '.join(host['features'])}")
    return 0
