"""llmc: a compiler for transformer models that needs nothing but `pip install`."""
