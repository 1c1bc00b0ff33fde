"""llmc bench: how fast a model runs here, beside what this machine could do at best."""

from __future__ import annotations

import json
from typing import Any

from llmc.cli import add_command, add_runtime_options, open_runtime
from llmc.cli.generate import EMBEDDED
from llmc.errors import LlmcError


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "bench", run,
        "Measure decode and prefill beside this machine's read bandwidth and peak.",
        "llmc bench path/to/Llama-3.2-1B --prompt-tokens 512 --generate-tokens 64 --json")
    parser.add_argument("model", nargs="?", default=str(EMBEDDED), metavar="MODEL",
                        help="default: the embedded model")
    parser.add_argument("--prompt-tokens", type=int, default=None, metavar="P",
                        help="tokens of each prompt (default 512, or what the context allows)")
    parser.add_argument("--generate-tokens", type=int, default=None, metavar="G",
                        help="tokens to make after each prompt (default 64)")
    parser.add_argument("--batch", type=int, default=1, metavar="B",
                        help="sequences that run together (default 1)")
    parser.add_argument("--repeat", type=int, default=5, metavar="R",
                        help="rounds; figures are medians (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_runtime_options(parser)


def run(arguments) -> int:
    from llmc.bench import Settings, measure

    for name in ("prompt_tokens", "generate_tokens", "batch", "repeat"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise LlmcError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    settings = Settings(arguments.prompt_tokens, arguments.generate_tokens, arguments.batch,
                        arguments.repeat)
    with open_runtime(arguments.model, arguments, max_batch=arguments.batch) as runtime:
        report = measure(runtime, settings)
    report["model"] = arguments.model
    print(json.dumps(report) if arguments.json else describe(report))
    return 0


def describe_host(decode: dict[str, Any]) -> str:
    """What Python takes of the steps."""
    if "host_us_per_step" in decode:
        return f"the host takes {decode['host_us_per_step']:.1f} us a step, and waits for the rest"
    return f"outside the native call {decode['outside_share']:.1%}"


def describe(report: dict[str, Any]) -> str:
    """The report in a few lines for people."""
    where = report.get("device") or f"{report['threads']} threads"
    lines = [f"{report['model']}: {report['dtype']}, {where}, "
             f"batch {report['batch']}, medians of {report['repeat']} rounds"]
    if decode := report.get("decode"):
        lines.append(
            f"decode   {decode['tokens_per_second']:10.1f} tokens/s   "
            f"{decode['gb_per_second']:8.2f} GB/s of {decode['read_bandwidth_gb_per_second']:.2f} "
            f"({decode['share']:.0%}); {describe_host(decode)}")
    if prefill := report.get("prefill"):
        lines.append(
            f"prefill  {prefill['tokens_per_second']:10.1f} tokens/s   "
            f"{prefill['tflops']:8.3f} TFLOP/s of {prefill['peak_tflops']:.3f} "
            f"{prefill['peak_dtype']} ({prefill['share']:.0%}); {prefill['tokens']} tokens")
        lines.append(f"first token after {report['first_token_seconds'] * 1e3:.1f} ms")
    if encode := report.get("encode"):
        lines.append(
            f"encode   {encode['sentences_per_second']:10.1f} sentences/s of "
            f"{encode['tokens']} tokens   {encode['tflops']:8.3f} TFLOP/s of "
            f"{encode['peak_tflops']:.3f} {encode['peak_dtype']} ({encode['share']:.0%})")
    return "\n".join(lines)
