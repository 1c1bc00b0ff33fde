"""Tokenizers of checkpoint directories: tokenizer.json through the `tokenizers` library.

The libraries load when a tokenizer does, so that `import llmc` stays light.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

from llmc.errors import ModelError, ShapeError
from llmc.frontend.json_file import read_json_object

_REPLACEMENT = "\ufffd"
_IDS = 1 << 32  # what the library takes for one
_LONGEST_CHARACTER = 8  # tokens that may stand for one character; UTF-8 needs 4, one a byte


class Tokenizer:
    """Text to token ids and back, with the special tokens that the checkpoint asks for."""

    def __init__(self, directory: Path, library_tokenizer: Any) -> None:
        self.directory = directory
        self._tokenizer = library_tokenizer

    @classmethod
    def load(cls, directory: str | Path, trusted: bool = False) -> Tokenizer:
        """The tokenizer of a checkpoint or artifact directory.

        `trusted` skips a check of the merges (0.5 s for 280,000), for files that passed it
        when an artifact was made. ModelError if tokenizer.json is missing or bad.
        """
        begun = _begun.pop(Path(directory), None) if trusted else None
        if begun is not None and (tokenizer := begun.result()) is not None:
            return tokenizer
        return cls._load(directory, trusted)

    @staticmethod
    def begin(directory: Path) -> None:
        """Start to load a trusted directory's tokenizer, which takes a tenth of a second, on a
        thread of its own: the next `load` of it waits for that."""
        begun = _begun[directory] = _Loading(directory)
        begun.start()

    @classmethod
    def _load(cls, directory: str | Path, trusted: bool) -> Tokenizer:
        import tokenizers

        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path}: no such file; without it only token ids can be given")
        if not trusted:
            check_merges(path)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # bare Exception, and panics that are no Exception
            raise ModelError(f"{path}: not a valid tokenizer: {error}") from error
        # Sentence models store a fixed padding and truncation; here nothing is padded, and what
        # is too long is for the caller to refuse or cut.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(Path(directory), tokenizer)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def _knows(self, token_id: int) -> bool:
        return 0 <= token_id < _IDS and self._tokenizer.id_to_token(token_id) is not None

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with the begin-of-text or [CLS], [SEP] tokens that tokenizer.json adds."""
        return self._tokenize(text, add_special_tokens).ids

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids and token types of two texts as one sequence ([CLS] a [SEP] b [SEP])."""
        encoding = self._tokenize((first, second), True)
        return encoding.ids, encoding.type_ids

    def _tokenize(self, text: str | tuple[str, str], add_special_tokens: bool) -> Any:
        arguments = (text,) if isinstance(text, str) else text
        try:
            return self._tokenizer.encode(*arguments, add_special_tokens=add_special_tokens)
        except Exception as error:  # unknown characters without an unknown token, lone surrogates
            raise ShapeError(f"cannot tokenize the text: {error}") from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary are a ShapeError."""
        ids = [int(each) for each in ids]
        for each in ids:
            if not self._knows(each):
                raise ShapeError(f"token id {each} is outside the tokenizer's vocabulary")
        if skip_special_tokens:
            # The library's own skipping misses special tokens that are marked as normalized.
            ids = [each for each in ids if each not in self._special_ids]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The id of a token such as "</s>", None if the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str:
        """How the vocabulary writes a token; empty for an id that it lacks."""
        return self._tokenizer.id_to_token(token_id) or ""

    def stream(self, prompt_ids: Iterable[int] = ()) -> StreamDecoder:
        """A decoder for ids that arrive one by one after `prompt_ids`."""
        return StreamDecoder(self, prompt_ids)

    # ---- chat ------------------------------------------------------------------------------

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """tokenizer_config.json over special_tokens_map.json; empty where neither is there."""
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            path = self.directory / name
            if path.is_file():
                settings |= read_json_object(path)
        return settings

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens ("bos_token" -> "<s>")."""
        named = {}
        for name, token in self._settings.items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                named[name] = text
        return named

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, None if the checkpoint has none."""
        path = self.directory / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ModelError(f"{path}: cannot read it: {error}") from error
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            entries = [each for each in template if isinstance(each, dict)]
            named = {each.get("name"): each.get("template") for each in entries}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text for a conversation; encode it with add_special_tokens=False.

        `variables` (tools, ...) reach the template. The template is untrusted code and runs in
        Jinja's immutable sandbox. ModelError if there is none or it is broken, ShapeError if it
        refuses the messages.
        """
        import jinja2

        try:
            return self._compiled_template.render(
                self.special_tokens
                | variables
                | {
                    "messages": [dict(message) for message in messages],
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.exceptions.SecurityError as error:
            raise ModelError(f"{self.directory}: unsafe chat template: {error}") from error
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            message = f"{self.directory}: the chat template refuses the messages: {error}"
            raise ShapeError(message) from error

    @cached_property
    def _compiled_template(self) -> Any:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise ModelError(f"{self.directory}: no chat template (neither chat_template.jinja nor"
                             " chat_template in tokenizer_config.json)")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise ModelError(f"{self.directory}: broken chat template: {error}") from error


class _Loading(Thread):
    """Loads the tokenizer of a trusted directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(name="llmc-tokenizer")
        self._directory = directory
        self._tokenizer: Tokenizer | None = None

    def run(self) -> None:
        with suppress(ModelError):
            self._tokenizer = Tokenizer._load(self._directory, trusted=True)

    def result(self) -> Tokenizer | None:
        """The tokenizer, as soon as it is there; None where that failed."""
        self.join()
        return self._tokenizer


_begun: dict[Path, _Loading] = {}


class StreamDecoder:
    """Text of ids as they arrive, cut only where characters end.

    A token may be part of a character (byte fallback, byte-level BPE) or lose its leading space
    when decoded alone, so each step decodes a short window and yields what it adds.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_ids)[-_LONGEST_CHARACTER:]
        self._shown = len(self._window)  # ids of the window whose text has been given out

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._window.append(token_id)
        text = self._new_text()
        pending = len(self._window) - self._shown
        if text.endswith(_REPLACEMENT) and pending < _LONGEST_CHARACTER:
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text

    def finish(self) -> str:
        """The text still held back: replacement characters for an unfinished character."""
        text = self._new_text()
        self._shown = len(self._window)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._window[: self._shown])
        return self._tokenizer.decode(self._window)[len(before) :]


def check_merges(path: Path) -> None:
    """ModelError unless every merge joins two tokens of the vocabulary into a third.

    The library panics, with a backtrace on stderr, where the third is missing.
    """
    model = read_json_object(path).get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        return
    vocabulary, merges = model.get("vocab"), model["merges"]
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise ModelError(f"{path}: 'vocab' must be an object and 'merges' a list")
    prefix = len(model.get("continuing_subword_prefix") or "")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(
            isinstance(token, str) for token in pair
        ):
            raise ModelError(f"{path}: the merge {merge!r} is not a pair of tokens")
        first, second = pair
        if not {first, second, first + second[prefix:]} <= vocabulary.keys():
            raise ModelError(f"{path}: the merge {merge!r} names tokens the vocabulary lacks")


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own tojson escapes HTML characters, which prompts must not."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
