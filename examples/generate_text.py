"""Continue a prompt with the model inside the package, or with any checkpoint you name.

    python examples/generate_text.py [MODEL] [PROMPT]
"""

import sys
from pathlib import Path

import llmc

EMBEDDED = Path(llmc.__file__).parent / "data" / "stories260K"


def main(model: str = str(EMBEDDED), prompt: str = "Once upon a time") -> None:
    with llmc.Runtime(model) as runtime:
        ids = runtime.encode(prompt)
        stream = runtime.tokenizer.stream(ids)
        print(prompt, end="")
        for token in runtime.generate(ids, max_new_tokens=64):
            print(stream.push(token), end="", flush=True)
        print(stream.finish())
        print(runtime.dispatch_table)


if __name__ == "__main__":
    main(*sys.argv[1:])
