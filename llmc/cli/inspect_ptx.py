"""`llmc inspect ARTIFACT --stage ptx`: what the assembler said of each kernel, and the code."""

from __future__ import annotations

import json
from pathlib import Path

from llmc.errors import LlmcError


def artifact_ptx(artifact: Path, variant: str) -> str:
    """PTX of a variant for its last architecture, under a table of the registers, shared memory and
    spills of its kernels for each; LlmcError if the artifact holds no GPU code."""
    places = sorted((artifact / "variants").glob(f"{variant}.*.ptx"))
    if not places:
        raise LlmcError(f"{artifact} holds no GPU code: it was compiled for a CPU")
    lines = []
    for place in places:
        architecture = place.suffixes[-2][1:]
        report = json.loads(place.with_suffix(".json").read_text())["report"]
        width = max((len(each["name"]) for each in report), default=0)
        lines.append(f"// {architecture}" + ("" if report else ", which the driver assembles"))
        lines += [f"//   {each['name']:<{width}}  {each['registers']:>3} registers  "
                  f"{each['shared_bytes']:>6} bytes shared  {each['stack_bytes']:>4} stack  "
                  f"{each['spill_bytes']:>4} spilled" for each in reversed(report)]
    return "\n".join(lines) + "\n" + places[-1].read_text()
