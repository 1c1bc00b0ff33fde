"""The C example: built with cc, run, and compared with the goldens."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.codegen.target import Target
from llmc.driver import compile_model
from llmc.emit import emit
from tests.conftest import EMBEDDED

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler `cc` on PATH")

TWO_MODELS = """
#include <stdio.h>
#include "one.h"
#include "two_.h"

int main(void) {
    one *first = 0;
    two *second = 0;
    printf("%s\\n%s\\n", one_error(one_create(0, 0, 0, &first)),
           two_error(two_create(&first, 64, 0, &second)));
    one_destroy(first);
    two_destroy(second);
    return first || second;
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Directory that examples/aot_into_c.py filled, and what it printed."""
    directory = tmp_path_factory.mktemp("aot")
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([sys.executable, EXAMPLES / "aot_into_c.py", directory], timeout=300,
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def story(directory, *arguments):
    done = subprocess.run([directory / "story", directory / "story.weights", *map(str, arguments)],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [int(token) for token in done.stdout.split()]


def test_example_prints_the_golden_story(built, embedded_goldens):
    golden = embedded_goldens[0]
    lines = built[1].splitlines()
    ids = next(line for line in lines if line.startswith("token ids:"))
    assert [int(token) for token in ids.split()[2:]] == golden["greedy_ids"]
    assert golden["prompt"] in built[1]


@pytest.mark.parametrize("number", range(3))
def test_other_prompts(built, embedded_goldens, number):
    golden = embedded_goldens[number]
    ids = story(built[0], len(golden["greedy_ids"]), *golden["prompt_ids"])
    assert ids == golden["greedy_ids"]


def test_bad_token_is_one_line(built):
    done = subprocess.run([built[0] / "story", built[0] / "story.weights", "4", "512"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "outside the vocabulary" in done.stderr
    assert done.stdout == ""


def test_story_is_short():
    assert len((EXAMPLES / "aot_c" / "story.c").read_text().splitlines()) <= 60
    assert len((EXAMPLES / "aot_into_c.py").read_text().splitlines()) < 100


def test_two_prefixes_in_one_program_and_a_shared_library(tmp_path):
    compiled = compile_model(EMBEDDED, Target.host())
    emit(compiled, ["obj", "header"], tmp_path / "one.o", "one_")
    emit(compiled, ["so", "header"], tmp_path / "two_.so", "two_")
    emit(compiled, ["obj"], tmp_path / "two_.o", "two_")
    (tmp_path / "main.c").write_text(TWO_MODELS)
    for second in ("two_.o", "two_.so"):
        command = ["cc", "-Wall", "-Wextra", "-Werror", "-pedantic", "-std=c99", "main.c", "one.o",
                   f"./{second}", "-lpthread", "-lm", "-o", "both"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
        done = subprocess.run(["./both"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert done.stdout.splitlines()[0].startswith("a pointer that must not be null")
        assert done.stdout.splitlines()[1].startswith("these are not the weights")
