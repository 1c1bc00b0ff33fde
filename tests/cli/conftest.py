"""Commands run in this process: fast, and their output is captured."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from llmc import cli


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def llmc_command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """llmc_command("generate", "--json") -> Result."""
    monkeypatch.setenv("LLMC_THREADS", "2")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse: wrong command lines, --help
            status = int(exit.code or 0)
        return Result(status, *capsys.readouterr())

    return run
