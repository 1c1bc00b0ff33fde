"""Compile a model into a C program: object code, header and weights, then `cc`, then no Python.

    python examples/aot_into_c.py [DIRECTORY]       where to leave the files (default: nowhere)
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import llmc
from llmc.frontend.tokenizer import Tokenizer

EMBEDDED = Path(llmc.__file__).parent / "data" / "stories260K"
SOURCE = Path(__file__).parent / "aot_c" / "story.c"


def build(directory: Path) -> Path:
    """story.o, story.h and story.weights by llmc; the program by cc."""
    subprocess.run([sys.executable, "-m", "llmc", "compile", EMBEDDED, "--emit", "obj,header",
                    "--prefix", "story_", "-o", directory / "story.o"], check=True)
    program = directory / "story"
    subprocess.run(["cc", "-O2", "-Wall", "-I", directory, SOURCE, directory / "story.o",
                    "-lpthread", "-lm", "-o", program], check=True)
    return program


def main(directory: Path) -> None:
    program = build(directory)
    tokens = subprocess.run([program, directory / "story.weights", "64"], check=True,
                            capture_output=True, text=True).stdout
    print("token ids:", tokens.strip())
    tokenizer = Tokenizer.load(EMBEDDED)
    print(tokenizer.decode([*tokenizer.encode("Once upon a time"), *map(int, tokens.split())]))


if __name__ == "__main__":
    if shutil.which("cc") is None:
        sys.exit("this example needs a C compiler named cc")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
