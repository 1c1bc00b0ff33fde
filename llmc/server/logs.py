"""Logs for machines: one JSON object a line on stderr."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
logger = logging.getLogger("llmc.server")


class JsonFormatter(logging.Formatter):
    """time (seconds since 1970), level, event, the fields given as `extra={"fields": ...}`, and
    for an exception its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {"time": round(record.created, 3),
                                 "level": record.levelname.lower(), "event": record.getMessage()}
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def set_up_logs(level: str) -> None:
    """Send the server's logs, and those of uvicorn from warnings on, to stderr. What the runtime
    warns of, the server says itself."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, threshold in (("llmc.server", level), ("llmc.runtime", "error"),
                            ("uvicorn", "warning")):
        target = logging.getLogger(name)
        target.handlers = [handler]
        target.setLevel(threshold.upper())
        target.propagate = False


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """One line: what happened, and what belongs to it."""
    logger.log(level, event, extra={"fields": fields})


def log_failure(event: str, error: BaseException, **fields: Any) -> None:
    """The same for a fault, with its traceback."""
    logger.error(event, exc_info=error, extra={"fields": fields})
