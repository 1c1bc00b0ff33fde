"""Which target a Runtime compiles a model for."""

from __future__ import annotations

import sys

from llmc.errors import DeviceError


def resolve_target(target: str, device: int = 0) -> str:
    """The target to compile for: "host", or the architecture of GPU `device` for "nvptx".

    "auto" takes the GPU where there is one, and says in one line what it chose and why. DeviceError
    if the GPU that was asked for cannot be used.
    """
    if target == "host":
        return target
    if target not in ("nvptx", "auto"):
        raise DeviceError(f"target {target!r} is not available; a Runtime runs on 'host', 'nvptx' "
                          "or 'auto'")
    from llmc.runtime.cuda_device import Device

    try:
        found = Device(device)
    except DeviceError as error:
        if target == "nvptx":
            raise
        print(f"llmc: target auto: host, for {error}", file=sys.stderr)
        return "host"
    if target == "auto":
        print(f"llmc: target auto: GPU {device}, {found}", file=sys.stderr)
    return f"nvptx:{found.architecture}"


def short_target(target: str) -> str:
    """A target's text without the list of a CPU's features."""
    return ":".join(target.split(":")[:2])


def check_target(compiled: str, target: str) -> None:
    """DeviceError if an artifact for `compiled` cannot serve who asked for `target`: the default
    "host" and "auto" take an artifact as it is."""
    if target == "nvptx" and not compiled.startswith("nvptx"):
        raise DeviceError(f"target nvptx was asked for, the artifact was compiled for "
                          f"{short_target(compiled)}: compile the model with --target nvptx")
    if target not in ("host", "nvptx", "auto"):
        raise DeviceError(f"target {target!r} is not available; a Runtime runs on 'host', 'nvptx' "
                          "or 'auto'")
