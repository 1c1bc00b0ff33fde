"""Chat templates, which are code of whoever made the model: run in Jinja's sandbox, in a process of
their own that has little memory and little time."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmc.processes import python
from llmc.server.http_errors import ApiError
from llmc.server.logs import log

SECONDS = 2.0  # of one rendering
START_SECONDS = 20.0  # of the first, which starts the process
MEMORY = 1 << 30
LONGEST = 64 << 20  # bytes of a rendered prompt


class ChatTemplate:
    """The template of a checkpoint or artifact directory, or of a file that replaces it."""

    def __init__(self, directory: Path, file: Path | None = None, seconds: float = SECONDS):
        self._arguments = [str(directory), str(MEMORY), *([str(file)] if file else [])]
        self._seconds = seconds
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool,
                     variables: Mapping[str, Any]) -> str:
        """The prompt of a conversation. ApiError 400 if the template refuses the messages, is
        broken, or does not come to an end."""
        asked = json.dumps({"messages": messages, "variables": variables,
                            "add_generation_prompt": add_generation_prompt}).encode() + b"\n"
        async with self._turn:
            answer = await self._ask(asked)
        if "text" in answer:
            return answer["text"]
        log("template", logging.WARNING, error=answer["error"], detail=answer["detail"])
        raise ApiError(400, answer["error"], "messages", "chat_template_error")

    async def _ask(self, line: bytes) -> dict[str, str]:
        seconds = self._seconds
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *python("llmc.server.template_worker", *self._arguments),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL, limit=LONGEST)
            seconds = START_SECONDS
        try:
            async with asyncio.timeout(seconds):
                return json.loads(await self._exchange(self._process, line))
        except TimeoutError:
            await self.close()
            return {"error": "The chat template takes too long on these messages.",
                    "detail": f"it did not end within {seconds:.0f} s"}
        except (ValueError, OSError):  # it died, or wrote a line without end
            await self.close()
            return {"error": "The chat template needs too much memory for these messages.",
                    "detail": "it used up its memory, or wrote too long a prompt"}
        except asyncio.CancelledError:  # its answer would be taken for the next one's
            await self.close()
            raise

    async def _exchange(self, process: asyncio.subprocess.Process, line: bytes) -> bytes:
        assert process.stdin and process.stdout
        process.stdin.write(line)
        await process.stdin.drain()
        return await process.stdout.readline()

    async def close(self) -> None:
        """End the process; the next rendering starts another."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
