"""The server: an engine that batches requests onto a Runtime, and what speaks HTTP in front."""
