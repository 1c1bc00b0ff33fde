"""Lets tests of GPU kernels use the host's harnesses, which lie a folder up."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
