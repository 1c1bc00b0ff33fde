"""How many of the onnx package's backend tests pass through llmc.onnx_backend.

    python tools/onnx_table.py [--jobs N] [--suite NAME ...] [--write]

Every test compiles its model and runs the code in a worker process (LLMC_NO_INTERPRET=1: NumPy may
not stand in for it), with the test's own tolerance; one that takes over a minute or ends its
process has failed. Prints what fails and why; --write (of all suites) puts the tables into
docs/onnx.md and the names of the tests that fail into tests/onnx_not_passing.txt.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import re
import sys
import threading
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.onnx_cases import NOT_PASSING, SUITES, Case, cases

SECONDS = 60
PAGE = Path(__file__).parents[1] / "docs" / "onnx.md"
PASS = "pass"

# Family -> operators; whatever is in none is "other".
FAMILIES = {
    "language models": """Attention RMSNormalization LayerNormalization LinearAttention
        CausalConvWithState FlexAttention RotaryEmbedding Softmax LogSoftmax LpNormalization Gelu
        SwiGLU TensorScatter Swish MeanVarianceNormalization""",
    "elementwise": """Abs Acos Acosh Add And Asin Asinh Atan Atanh Ceil Celu Clip Cos Cosh Div Elu
        Equal Erf Exp Floor Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN
        LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal
        Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Tan Tanh
        ThresholdedRelu Where Xor BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Dropout""",
    "casts and quantisation": """Cast CastLike BitCast QuantizeLinear DequantizeLinear
        DynamicQuantizeLinear QLinearMatMul QLinearConv MatMulInteger ConvInteger""",
    "products": "MatMul Gemm Einsum Det DFT STFT",
    "reductions and scans": """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
        ReduceMin ReduceProd ReduceSum ReduceSumSquare ArgMax ArgMin CumSum CumProd Hardmax TopK""",
    "movement": """Concat Split Slice Reshape Transpose Squeeze Unsqueeze Flatten Expand Tile Pad
        Gather GatherElements GatherND Scatter ScatterElements ScatterND DepthToSpace SpaceToDepth
        ReverseSequence Trilu OneHot EyeLike CenterCropPad""",
    "shapes and constants": """Shape Size Constant ConstantOfShape Range HannWindow HammingWindow
        BlackmanWindow MelWeightMatrix""",
    "convolutions and images": """Conv ConvTranspose DeformConv MaxPool AveragePool LpPool
        GlobalAveragePool GlobalMaxPool GlobalLpPool MaxUnpool Resize Upsample GridSample RoiAlign
        Col2Im AffineGrid LRN ImageDecoder""",
    "normalisations": "BatchNormalization InstanceNormalization GroupNormalization",
    "recurrent": "RNN GRU LSTM",
    "control flow": "If Loop Scan",
    "shapes that depend on data": "NonZero Unique Compress NonMaxSuppression",
    "sequences and optionals": """SequenceAt SequenceConstruct SequenceEmpty SequenceErase
        SequenceInsert SequenceLength SequenceMap SplitToSequence ConcatFromSequence Optional
        OptionalGetElement OptionalHasElement""",
    "strings": "StringConcat StringNormalizer StringSplit RegexFullMatch TfIdfVectorizer",
    "losses and optimisers": """NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss Momentum Adagrad
        Adam""",
    "random": """Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform
        RandomUniformLike""",
    "ai.onnx.ml": "ArrayFeatureExtractor Binarizer LabelEncoder TreeEnsemble",
}
FAMILY = {operator: family for family, names in FAMILIES.items() for operator in names.split()}


def worker(suite: str, pipe: Connection) -> None:
    """Numbers of tests in, "pass" or the error out; the first thing sent says that it is ready."""
    tests = cases(suite)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        try:
            tests[number].run()
            pipe.send(PASS)
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {str(error).strip()[:160]}")


class Worker:
    """A process that runs one test after another."""

    def __init__(self, suite: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(suite, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def run(self, number: int) -> str | None:
        """The outcome; None if the process ended or had to be ended."""
        try:
            self.pipe.send(number)
            if self.pipe.poll(SECONDS):
                return str(self.pipe.recv())
        except (EOFError, OSError):
            pass
        self.close()
        return None

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def drive(suite: str, todo: queue.Queue[int], outcomes: dict[int, str]) -> None:
    """Tests from the queue until it is empty, each new worker after one that failed."""
    one: Worker | None = None
    while True:
        try:
            number = todo.get_nowait()
        except queue.Empty:
            break
        one = one or Worker(suite)
        outcome = one.run(number)
        if outcome is None:
            one = None
        outcomes[number] = outcome or f"ended its process, or took over {SECONDS} s"
    if one is not None:
        one.close()


def score(suite: str, jobs: int) -> dict[Case, str]:
    """Test -> outcome."""
    tests, todo, outcomes = cases(suite), queue.Queue[int](), dict[int, str]()
    for number in range(len(tests)):
        todo.put(number)
    threads = [threading.Thread(target=drive, args=(suite, todo, outcomes)) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {tests[number]: outcomes[number] for number in sorted(outcomes)}


def family_of(case: Case) -> str:
    return next((FAMILY[operator] for operator in case.operator.split("+") if operator in FAMILY),
                "other")


def tables(scores: dict[str, dict[Case, str]]) -> str:
    """Markdown: the suites, and node tests by family."""
    lines = ["| suite | pass | of |", "|---|---:|---:|"]
    lines += [f"| {suite} | {count(results)} | {len(results)} |"
              for suite, results in scores.items()]
    if "node" not in scores:
        return "\n".join(lines)
    lines += ["", "| node tests of | pass | of | not all of |", "|---|---:|---:|---|"]
    groups: dict[str, dict[Case, str]] = {family: {} for family in [*FAMILIES, "other"]}
    for case, outcome in scores["node"].items():
        groups[family_of(case)][case] = outcome
    for family, results in groups.items():
        failed = Counter(case.operator for case, outcome in results.items() if outcome != PASS)
        named = ", ".join(f"{operator} ({number})" for operator, number in sorted(failed.items()))
        if results:
            lines.append(f"| {family} | {count(results)} | {len(results)} | {named} |")
    return "\n".join(lines)


def count(results: dict[Case, str]) -> int:
    return sum(outcome == PASS for outcome in results.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    os.environ["LLMC_NO_INTERPRET"] = "1"
    scores = {suite: score(suite, options.jobs) for suite in options.suite}
    for results in scores.values():
        for case, outcome in results.items():
            if outcome != PASS:
                print(f"{case.suite} {case.name}: {outcome}")
    print(tables(scores))
    if options.write and set(scores) == set(SUITES):
        page = PAGE.read_text()
        PAGE.write_text(re.sub(r"(?<=<!-- tables -->\n).*?(?=<!-- end -->)",
                               lambda _: tables(scores) + "\n", page, flags=re.DOTALL))
        failed = [case.name for results in scores.values() for case, outcome in results.items()
                  if outcome != PASS]
        NOT_PASSING.write_text("".join(f"{name}\n" for name in failed))


if __name__ == "__main__":
    main()
