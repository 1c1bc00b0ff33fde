"""`python -m llmc` is `llmc`."""

import sys

from llmc.cli import main

if __name__ == "__main__":
    sys.exit(main())
