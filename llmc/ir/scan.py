"""A character scanner shared by the text forms (dims, graphs, programs)."""

import re
from typing import NoReturn

from llmc.errors import GraphError

_SPACE = re.compile(r"(?:\s|#[^\n]*)*")
_INTEGER = re.compile(r"\d+")
_WORD_GOES_ON = re.compile(r"[A-Za-z0-9_.]")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


class Scanner:
    """Reads `text` from left to right; blanks and `#` comments between tokens are skipped.

    Every failure is a GraphError that names line and column.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self._skip()

    def _skip(self) -> None:
        match = _SPACE.match(self.text, self.position)
        assert match is not None  # the pattern matches the empty string
        self.position = match.end()

    def at_end(self) -> bool:
        return self.position >= len(self.text)

    def looking_at(self, literal: str) -> bool:
        """Whether the next characters are `literal` (a word must also end there)."""
        if not self.text.startswith(literal, self.position):
            return False
        end = self.position + len(literal)
        is_word = literal[-1].isalnum() or literal[-1] == "_"
        return not (is_word and _WORD_GOES_ON.match(self.text, end))

    def accept(self, literal: str) -> bool:
        """Consumes `literal` if it comes next; says whether it did."""
        if not self.looking_at(literal):
            return False
        self.position += len(literal)
        self._skip()
        return True

    def expect(self, literal: str) -> None:
        if not self.accept(literal):
            self.fail(f"expected {literal!r}")

    def match(self, pattern: re.Pattern[str]) -> str | None:
        """Consumes and returns what `pattern` matches here, or None."""
        match = pattern.match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        self._skip()
        return match.group()

    def name(self, what: str = "a name") -> str:
        return self.match(NAME) or self.fail(f"expected {what}")

    def integer(self) -> int:
        digits = self.match(_INTEGER)
        return int(digits) if digits is not None else self.fail("expected an integer")

    def place(self, position: int | None = None) -> str:
        """`line 3, column 14` of a position (default: here)."""
        where = self.position if position is None else position
        line = self.text.count("\n", 0, where) + 1
        return f"line {line}, column {where - self.text.rfind(chr(10), 0, where)}"

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        """Raises GraphError for the text at `position` (default: here)."""
        where = self.position if position is None else position
        found = self.text[where : where + 20].split("\n")[0]
        found = f"found {found!r}" if found else "found the end of the line"
        raise GraphError(f"{self.place(where)}: {message}, {found}")
