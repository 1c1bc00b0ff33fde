"""Trace a function of your own, look at what was fused, compile it, and compare it with NumPy.

    python examples/trace_function.py
"""

import numpy as np

import llmc
from llmc.codegen.target import Target
from llmc.frontend.trace import Tensor, parameter, rms_norm, silu
from llmc.ir.dims import symbol
from llmc.ir.summary import summarize
from llmc.ir.text import format_graph
from llmc.passes.lower import lower
from llmc.passes.pipeline import optimize

HIDDEN, INNER = 64, 172


def gated_block(x: Tensor) -> Tensor:
    """A normalised, gated feed-forward block with its residual, as in a Llama's layer."""
    normed = rms_norm(x, parameter("norm", "f32", (HIDDEN,)), epsilon=1e-5)
    gate = normed @ parameter("gate", "f32", (HIDDEN, INNER))
    up = normed @ parameter("up", "f32", (HIDDEN, INNER))
    return x + (silu(gate) * up) @ parameter("down", "f32", (INNER, HIDDEN))


def in_numpy(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    normed = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * p["norm"]
    gate = normed @ p["gate"]
    return x + (gate / (1 + np.exp(-gate)) * (normed @ p["up"])) @ p["down"]


def main() -> None:
    graph = llmc.trace(gated_block, llmc.Spec("x", "f32", (symbol("tokens"), HIDDEN)))
    print("As traced:\n")
    print(format_graph(graph))

    capabilities = Target.host().capabilities()
    few_tokens = {"tokens": (1, capabilities.few_rows)}
    print("As lowered for few tokens on this machine:\n")
    print(summarize(lower(optimize(graph, capabilities), capabilities, few_tokens)))

    random = np.random.default_rng(0)
    parameters = {leaf["name"]: random.standard_normal(leaf.shape, np.float32) / 8
                  for leaf in graph.parameters()}
    with llmc.Runtime(graph, parameters=parameters) as runtime:
        for tokens in (1, 5, 100):
            x = random.standard_normal((tokens, HIDDEN), np.float32)
            (got,) = runtime.run({"x": x}).values()
            error = np.abs(got - in_numpy(x, parameters)).max()
            print(f"\n{tokens:3} tokens: largest difference from NumPy {error:.1e}", end="")
            assert error < 1e-4
    print()


if __name__ == "__main__":
    main()
