"""llmc generate: continue a prompt."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from llmc.cli import add_command, add_runtime_options, begin_start, open_runtime
from llmc.cli.model_path import require_model
from llmc.errors import LlmcError

EMBEDDED = Path(__file__).parent.parent / "data" / "stories260K"
EMBEDDED_PROMPT = "Once upon a time"


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "generate", run, "Continue a prompt, printing text as it is made.",
        'llmc generate path/to/Llama-3.2-1B --prompt "The sky is" --max-tokens 64')
    parser.add_argument("model", nargs="?", default=str(EMBEDDED), metavar="MODEL",
                        help="default: a 260K-parameter story teller inside this package")
    parser.add_argument("--prompt", default=None, help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N",
                        help="most tokens to make (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="0 is greedy (the default); higher is wilder")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the K best (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0,
                        help="sample among the best that make up this probability")
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end of text")
    parser.add_argument("--json", action="store_true",
                        help="print prompt_ids, token_ids, text, finish_reason"
                             " and timings as JSON instead")
    add_runtime_options(parser)


def run(arguments) -> int:
    started = time.perf_counter()
    prompt = arguments.prompt
    if prompt is None and arguments.model == str(EMBEDDED):
        prompt = EMBEDDED_PROMPT
    require_model(arguments.model)
    if not prompt:
        raise LlmcError("the prompt is empty: give a text to continue, --prompt TEXT")
    begin_start(arguments.model, arguments)
    with open_runtime(arguments.model, arguments) as runtime:
        runtime.require_context(arguments.max_context)
        prompt_ids = runtime.encode(prompt)
        loaded = time.perf_counter()
        tokens = runtime.generate(
            prompt_ids, arguments.max_tokens, temperature=arguments.temperature,
            top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed,
            ignore_eos=arguments.ignore_eos)
        show = None if arguments.json else runtime.tokenizer.stream(prompt_ids)
        if show:
            print(prompt, end="", flush=True)
        token_ids, times = [], []
        for token in tokens:
            token_ids.append(token)
            times.append(time.perf_counter())
            if show:
                print(show.push(token), end="", flush=True)
        if show:
            print(show.finish(), flush=True)  # before the summary, which goes to stderr
        timings = _timings(started, loaded, times)
        reason = _finish_reason(len(prompt_ids) + len(token_ids), runtime.max_context,
                                len(token_ids) >= arguments.max_tokens)
        if arguments.json:
            print(json.dumps({"prompt_ids": prompt_ids, "token_ids": token_ids,
                              "text": runtime.decode([*prompt_ids, *token_ids]),
                              "finish_reason": reason, "timings": timings}))
        else:
            _print_summary(len(prompt_ids), len(token_ids), timings)
            if reason == "context":
                print(f"[stopped: the context of {runtime.max_context} tokens is full]",
                      file=sys.stderr)
    return 0


def _finish_reason(length: int, context: int, all_made: bool) -> str:
    """length: as many tokens as were asked for; context: no room for more; stop: end of text."""
    if all_made:
        return "length"
    return "context" if context and length >= context else "stop"


def _timings(started: float, loaded: float, times: list[float]) -> dict[str, float]:
    """Seconds: load, prefill (to the first token), decode (the others); tokens a second."""
    first = times[0] if times else loaded
    decode = times[-1] - first if times else 0.0
    return {"load": loaded - started, "prefill": first - loaded, "decode": decode,
            "tokens_per_second": (len(times) - 1) / decode if decode else 0.0}


def _print_summary(prompt: int, made: int, timings: dict[str, float]) -> None:
    print(f"[{prompt} + {made} tokens; load {timings['load']:.2f} s, first token "
          f"{timings['prefill'] * 1e3:.1f} ms, {timings['tokens_per_second']:.1f} tokens/s]",
          file=sys.stderr)
