"""One server of the demo model for all tests that only ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.serving import TEMPLATE, Serving, serving


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def demo(embedded_artifact: Path, template: Path) -> Iterator[Serving]:
    with serving(embedded_artifact, chat_template=template, max_batch=16) as running:
        yield running
