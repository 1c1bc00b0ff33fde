"""Sentence embeddings and their similarities, from a BERT-family checkpoint.

    python examples/similarity.py MODEL_DIRECTORY
"""

import sys

import llmc

SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "The kitten naps in the sun.",
    "Interest rates rose again this quarter.",
)


def main(model: str) -> None:
    with llmc.Runtime(model, dtype="f32") as runtime:
        vectors = runtime.embed(SENTENCES)
    similarities = vectors @ vectors.T
    for row, sentence in zip(similarities, SENTENCES, strict=True):
        print("  ".join(f"{value:6.3f}" for value in row), "", sentence)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/similarity.py MODEL_DIRECTORY")
    main(sys.argv[1])
