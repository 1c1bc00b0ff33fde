"""What `llmc inspect ARTIFACT --stage quantization` prints: each matrix, and what it lost."""

from __future__ import annotations

from llmc.runtime.artifact import Manifest, QuantizationInfo, QuantizedInfo


def report(manifest: Manifest) -> str:
    """A table for people; the manifest has the same as JSON."""
    info = manifest.quantization
    if info is None:
        return f"{manifest.name}: its weights are not quantised"
    return "\n".join([*_summary(manifest.name, info), "", _HEADING, *map(_line, info.quantized),
                      *_kept(info)])


_HEADING = f"{'error':>8} {'bits':>6} {'n':>7} {'k':>6}  codes   matrix"


def _summary(name: str, info: QuantizationInfo) -> list[str]:
    options = " ".join(f"{key}={value}" for key, value in info.options.items())
    before, after = (sum(getattr(each, key) for each in info.quantized)
                     for key in ("source_bytes", "bytes"))
    lines = [f"{name}: {options}",
             f"{len(info.quantized)} matrices, {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB; "
             "error is that of the elements, root mean square, relative"]
    if info.calibration:
        lines.append(f"calibrated in {info.calibration:.1f} s: codes marked * are chosen for the "
                     "errors of products instead")
    return lines


def _line(each: QuantizedInfo) -> str:
    n, k = each.shape
    codes = f"{each.dtype}/{each.group}{'*' if each.calibrated else ''}"
    return (f"{each.error:8.4%} {bits_per_weight(each):6.3f} {n:7} {k:6}  {codes:7} {each.name}")


def bits_per_weight(each: QuantizedInfo) -> float:
    """Of codes, scales and zeros together."""
    return 8 * each.bytes / max(1, each.shape[0] * each.shape[1])


def _kept(info: QuantizationInfo) -> list[str]:
    lines = [f"  {name}: {reason}" for name, reason in info.kept]
    return ["", "as the model has them:", *lines] if lines else []
