"""What `llmc inspect ARTIFACT --stage quantization` prints: each matrix, and what it lost."""

from __future__ import annotations

from typing import Any

from llmc.runtime.artifact import Manifest, QuantizationInfo, QuantizedInfo


def report(manifest: Manifest) -> str:
    """A table for people; the manifest has the same as JSON."""
    info = manifest.quantization
    if info is None:
        return f"{manifest.name}: its weights are not quantised"
    options = " ".join(f"{key}={value}" for key, value in info.options.items())
    return "\n".join([f"{manifest.name}: {options}", *summary(info),
                      "error: root mean square of the elements, relative", "", _HEADING,
                      *map(_line, info.quantized), *_kept(info)])


_HEADING = f"{'error':>8} {'bits':>6} {'n':>7} {'k':>6}  codes   matrix"


def summary(info: QuantizationInfo) -> list[str]:
    """What became of the model's matrices, in a line or two."""
    told = totals(info)
    lines = [f"{told['matrices']} matrices quantised, {told['source_bytes'] / 1e6:.1f} MB -> "
             f"{told['bytes'] / 1e6:.1f} MB, {told['bits_per_weight']:.3f} bits a weight; "
             f"{told['kept']} stay as they are"]
    if calibrated := told["calibrated"]:
        lines.append(f"{calibrated} calibrated in {info.calibration:.1f} s: codes marked * are "
                     "chosen for the errors of products, not of elements")
    if info.uncalibrated:
        lines.append(f"{'the others are ' if calibrated else ''}not calibrated: "
                     f"{info.uncalibrated}")
    return lines


def totals(info: QuantizationInfo) -> dict[str, Any]:
    """The same for JSON, with the options: how many matrices were quantised, stay as they are
    (kept) and were calibrated, and for how many seconds; why others were not ("" where nobody
    expects it)."""
    before, after, elements = (sum(getattr(each, key) for each in info.quantized)
                               for key in ("source_bytes", "bytes", "elements"))
    return {"options": info.options, "matrices": len(info.quantized), "kept": len(info.kept),
            "source_bytes": before, "bytes": after, "bits_per_weight": 8 * after / max(1, elements),
            "calibrated": sum(each.calibrated for each in info.quantized),
            "calibration_seconds": info.calibration, "uncalibrated": info.uncalibrated}


def _line(each: QuantizedInfo) -> str:
    n, k = each.shape
    codes = f"{each.dtype}/{each.group}{'*' if each.calibrated else ''}"
    bits = 8 * each.bytes / max(1, each.elements)
    return f"{each.error:8.4%} {bits:6.3f} {n:7} {k:6}  {codes:7} {each.name}"


def _kept(info: QuantizationInfo) -> list[str]:
    lines = [f"  {name}: {reason}" for name, reason in info.kept]
    return ["", "as the model has them:", *lines] if lines else []
