"""llmc devices: what this machine can run on."""

from __future__ import annotations

import json
import os
import sys

from llmc.cli import add_command


def add(subparsers) -> None:
    parser = add_command(subparsers, "devices", run, "Show what this machine can run on.",
                         "llmc devices --json")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _gpus() -> tuple[list[dict], str]:
    """Every NVIDIA GPU, and why there is none."""
    from llmc.errors import DeviceError
    from llmc.runtime.cuda_device import Device, device_count

    try:
        devices = [Device(ordinal) for ordinal in range(device_count())]
    except DeviceError as error:
        return [], str(error)
    return [{"target": "nvptx", "device": device.ordinal, "name": device.name,
             "arch": device.architecture, "memory_bytes": device.memory, "cuda": device.cuda,
             "ptx": device.ptx} for device in devices], ""


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
    gpus, reason = _gpus()
    if arguments.json:
        print(json.dumps([host, *gpus]))
        if reason:
            print(f"nvptx  none: {reason}", file=sys.stderr)
    else:
        print(f"host   {host['cpu']}, {host['cores']} cores, "
              f"{host['memory_bytes'] / 2**30:.1f} GiB, {' '.join(host['features'])}")
        for gpu in gpus:
            print(f"nvptx  GPU {gpu['device']}: {gpu['name']}, {gpu['arch']}, "
                  f"{gpu['memory_bytes'] / 2**30:.1f} GiB, driver for CUDA {gpu['cuda']}, "
                  f"PTX {gpu['ptx']}")
        if reason:
            print(f"nvptx  none: {reason}")
    return 0
