"""Structured output: which tokens may come next, so that text fits a JSON schema, a regular
expression or a Lark grammar. By llguidance, which is loaded when first asked for."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc.server.http_errors import ApiError
from llmc.server.request import Matcher

# One space, or a new line and its indentation: a model left to itself may write spaces for ever.
JSON_OPTIONS: Any = {"whitespace_pattern": r"( |\n[ \t]{0,32})?"}


FIELDS = {"json": "response_format", "regex": "regex", "lark": "grammar"}  # where they come from
MOST_WORDS = 500  # characters of what llguidance says, which repeats its input
REASONS = {"NoExtensionBias": "no token of this model may come next"}
# Only what the mask allows is accepted. Where no token fits, llguidance's mask has its first one.
_NO_TOKEN = re.compile(r"token .* doesn't satisfy the grammar(?:; forced bytes: got ('[ -~]+');)?",
                       re.DOTALL)


class GrammarMatcher:
    """One choice's place in a grammar (see `llmc.server.request.Matcher`)."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def mask(self) -> np.ndarray:
        if self._matcher.is_stopped():
            self._check()
            return np.zeros(1, np.uint32)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return mask

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ApiError(400, _failure(self._matcher.get_error()), code="invalid_grammar")


class Grammars:
    """Compiles grammars for one tokenizer. vocabulary: width of the logits."""

    def __init__(self, tokenizer_file: Path, vocabulary: int, end_ids: Sequence[int]):
        self._file, self._vocabulary = tokenizer_file, vocabulary
        self._end_ids = list(end_ids)
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def compile(self, kind: str, source: Any) -> Callable[[], Matcher]:
        """kind: json (a schema), regex or lark. What Request.grammar takes. ApiError 400 if it is
        not valid. May take a second: not for the event loop."""
        from llguidance import LLMatcher

        make = {"json": _from_schema, "regex": LLMatcher.grammar_from_regex,
                "lark": LLMatcher.grammar_from_lark}[kind]
        try:
            first = LLMatcher(self._load(), make(source), log_level=0)
        except (ValueError, TypeError) as error:
            raise _invalid(kind, str(error)) from error
        if first.is_error():
            raise _invalid(kind, first.get_error())
        return lambda: GrammarMatcher(first.deep_copy())

    def _load(self) -> Any:
        with self._lock:
            if self._tokenizer is None:
                from llguidance import LLTokenizer

                self._tokenizer = LLTokenizer(str(self._file), n_vocab=self._vocabulary,
                                              eos_token=self._end_ids or None)
            return self._tokenizer


def _invalid(kind: str, why: str) -> ApiError:
    return ApiError(400, f"invalid grammar: {_short(why)}", FIELDS[kind], "invalid_grammar")


def _failure(why: str) -> str:
    """Why a grammar came to an end in the middle."""
    if found := _NO_TOKEN.search(why):
        where = f": no tokens spell what it needs, from {found[1]} on" if found[1] else ""
        return f"the model's vocabulary cannot write this grammar{where}"
    return f"the grammar cannot be followed: {_short(why)}"


def _short(why: str) -> str:
    """What llguidance says, without the state of its parser."""
    why = why.partition("\n<state>")[0]
    return REASONS.get(why, why)[:MOST_WORDS].rstrip()


def _from_schema(schema: Any) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(json.dumps(schema), JSON_OPTIONS)
