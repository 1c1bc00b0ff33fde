"""The error tree. Whatever a user's input can cause ends here, never in a bare traceback.

    LlmcError
    ├── ModelError      a model, artifact or tokenizer file is bad or unsupported
    │   └── ValueNeeded a model's shapes depend on the value of a tensor
    ├── ShapeError      values or shapes that do not fit the model
    ├── GraphError      a graph that breaks the rules of the IR, or text that does not parse
    ├── TraceError      Python code that cannot be traced
    ├── CompileError    lowering or code generation cannot do what was asked
    ├── DeviceError     the machine lacks what the code needs
    └── CacheError      the cache directory cannot be used
"""

from __future__ import annotations

from typing import Any


class LlmcError(Exception):
    """Root of all errors that llmc raises on purpose: one line that names the way out."""


class ModelError(LlmcError):
    """A file is bad or unsupported: names the file, the tensor or node, and what was expected.

    What a file says may stand in the text: line ends and other control characters are escaped.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


class ValueNeeded(ModelError):
    """Shapes depend on the value of a tensor, so that a model can only be compiled for a value.

    key: what that value is called where it is given to another import; node: what computes it (a
    graph node); model: the imported model with that value as its only output, once there is one.
    """

    def __init__(self, text: str, key: str, node: Any) -> None:
        super().__init__(text)
        self.key, self.node = key, node
        self.model: Any = None


class ShapeError(LlmcError):
    """Input values or shapes that do not fit the model."""


class GraphError(LlmcError):
    """A graph breaks a rule of the IR, or text does not parse as one."""


class TraceError(LlmcError):
    """Python code that cannot become a static graph; names the user's line."""


class CompileError(LlmcError):
    """Lowering or code generation cannot do what was asked."""


class DeviceError(LlmcError):
    """The machine lacks what the code needs."""


class CacheError(LlmcError):
    """The cache directory cannot be used."""
