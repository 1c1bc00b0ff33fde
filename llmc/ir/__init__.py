"""The graph and program levels: dims, dtypes, ops, nodes, text forms, verifier and interpreter."""
