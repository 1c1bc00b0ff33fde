"""Renders chat templates: a process that its parent kills when a template takes too long.

Run as `python -m llmc.server.template_worker DIRECTORY MEMORY_BYTES [TEMPLATE_FILE]`. A line in is
a JSON object (messages, variables), a line out {"text"}, {"error"} or {"broken"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llmc.errors import LlmcError, ShapeError
from llmc.frontend.tokenizer import Tokenizer


def main(directory: str, memory_bytes: str, template: str = "") -> None:
    tokenizer = Tokenizer(Path(directory), None)
    if template:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    _limit_memory(int(memory_bytes))
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(render(tokenizer, json.loads(line))) + "\n")
        sys.stdout.flush()


def render(tokenizer: Tokenizer, asked: dict[str, Any]) -> dict[str, str]:
    """{"text": the prompt}, {"error": why the messages were refused}, or {"broken": why no
    message can be rendered}."""
    try:
        return {"text": tokenizer.apply_chat_template(
            asked["messages"], asked["add_generation_prompt"], **asked["variables"])}
    except ShapeError as error:
        return {"error": str(error)}
    except LlmcError as error:
        return {"broken": str(error)}
    except (MemoryError, RecursionError) as error:
        return {"broken": f"the chat template needs too much memory ({type(error).__name__})"}
    except Exception as error:  # an untrusted template may raise whatever jinja2 does not catch
        return {"broken": f"the chat template failed: {type(error).__name__}: {error}"}


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the time limit has to do
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(*sys.argv[1:])
