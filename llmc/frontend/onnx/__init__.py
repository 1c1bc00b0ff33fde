"""ONNX files: one table of operators, one small converter each."""

from llmc.frontend.onnx.genai import genai_model_file
from llmc.frontend.onnx.importer import import_onnx, import_onnx_bytes
from llmc.frontend.onnx.interface import (
    declared_interface,
    declared_metadata,
    declared_overridable,
)
from llmc.frontend.onnx.registry import CONVERTERS
from llmc.frontend.onnx.signature import TokenInterface

__all__ = [
    "CONVERTERS",
    "TokenInterface",
    "declared_interface",
    "declared_metadata",
    "declared_overridable",
    "genai_model_file",
    "import_onnx",
    "import_onnx_bytes",
]
