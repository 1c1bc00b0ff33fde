"""Renders chat templates: a process that its parent kills when a template takes too long.

Run as `python -m llmc.server.template_worker DIRECTORY MEMORY_BYTES [TEMPLATE_FILE]`. A line in is
a JSON object (messages, variables), a line out {"text"}, or {"error", "detail"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jinja2

from llmc.frontend.tokenizer import Tokenizer

MOST_WORDS = 500  # characters of a template's own message


def main(directory: str, memory_bytes: str, template: str = "") -> None:
    tokenizer = Tokenizer(Path(directory), None)
    if template:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    _limit_memory(int(memory_bytes))
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(render(tokenizer, json.loads(line))) + "\n")
        sys.stdout.flush()


def render(tokenizer: Tokenizer, asked: dict[str, Any]) -> dict[str, str]:
    """{"text": the prompt}, or {"error": for the client, "detail": for the log}."""
    if tokenizer.chat_template is None:
        return {"error": "The model has no chat template.",
                "detail": "--chat-template FILE gives it one"}
    try:
        return {"text": tokenizer.apply_chat_template(
            asked["messages"], asked["add_generation_prompt"], **asked["variables"])}
    except (MemoryError, RecursionError) as error:
        return {"error": "The chat template needs too much memory for these messages.",
                "detail": repr(error)}
    except Exception as error:  # an untrusted template may raise whatever jinja2 does not catch
        return {"error": _told(error), "detail": str(error)}


def _told(error: Exception) -> str:
    """What a template itself said with raise_exception; nothing of other errors, whose text tells
    of files and of Python."""
    if type(error.__cause__) is jinja2.TemplateError:
        return f"The chat template refuses these messages: {str(error.__cause__)[:MOST_WORDS]}"
    return "The chat template fails on these messages; the server's log tells why."


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the time limit has to do
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
