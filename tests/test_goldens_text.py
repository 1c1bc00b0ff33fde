"""Every golden model's graph, and what every pass makes of it for any kind of target, is valid and
prints, parses and prints identically."""

from __future__ import annotations

import pytest

from llmc.codegen.target import Target
from llmc.frontend.model import load_model
from tests.checked import checked_optimize
from tests.conftest import EMBEDDED, GOLDENS

MODELS = [EMBEDDED, *sorted(GOLDENS.glob("hf/*")), *sorted(GOLDENS.glob("onnx/*/model.onnx"))]
TARGETS = ["x86_64:x86-64-v3", "nvptx:sm_90a"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.parent.name + "/" + path.name)
def test_every_pass_on_every_golden(path, target):
    checked_optimize(load_model(path).graph, Target.parse(target).capabilities())


@pytest.mark.parametrize("dtype", ["bf16"])
@pytest.mark.parametrize("path", sorted(GOLDENS.glob("hf/*")), ids=lambda path: path.name)
def test_every_pass_in_short_floats(path, dtype):
    checked_optimize(load_model(path, dtype).graph, Target.parse(TARGETS[0]).capabilities())
