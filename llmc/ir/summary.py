"""A program as people read it: what each stage computes, and which ops were fused into it.

Names are shortened, and the buffer of a loop's carried value, which several stages write, is called
x; the text form (`format_program`) has everything under its own name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from llmc.ir.graph import Node
from llmc.ir.layouts import Rows
from llmc.ir.program import Buffer, Loop, Program, Stage

_VIEWS = {"cast", "reshape", "broadcast", "transpose"}
_SILENT = _VIEWS | {"input", "constant", "slice", "get", "dim", "iota", "table", "layer", "concat"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@"}
_SHOWN_INPUTS = {"cache_append": 2, "paged_attention": 3, "packed_attention": 3}
_LENGTH = 110
UNBOUNDED = 2**31 - 1


def summarize(program: Program) -> str:
    """One line per result of each stage, and what the stage fuses."""
    lines = [f"program {program.name}({', '.join(map(_range, program.symbols))})"]
    for step in program.steps:
        if isinstance(step, Loop):
            lines.append(f"  repeat layer in 0..{step.count}")
            for stage in step.stages:
                lines += _stage_lines(stage, program, "    ")
        else:
            lines += _stage_lines(step, program, "  ")
    return "\n".join(lines)


def _range(symbol: tuple[str, int, int]) -> str:
    name, low, high = symbol
    if low == high:
        return f"{name}: {low}"
    return f"{name}: {low}..{high if high < UNBOUNDED else ''}"


def _stage_lines(stage: Stage, program: Program, indent: str) -> list[str]:
    names = short_names(program)
    width = min(24, max(len(names[result]) for s in program.stages() for result in s.results)) + 4
    lines: list[str] = []
    for result, text in zip(stage.results, describe(stage, program), strict=True):
        head = "" if lines else f"= {stage.kind}"
        lines.append(f"{indent + names[result]:{width}} {head:12} {text:60} "
                     f"{program.buffers[result].type}")
    if fused := fused_ops(stage, program):
        lines.append(f"{'':{width}} {'':12} └ fuses {', '.join(fused)}")
    return lines


def short_names(program: Program) -> dict[str, str]:
    """Buffer -> a name without the path that all of its role share, unique within its role."""
    writers = Counter(name for stage in program.stages() for name in stage.results)
    carried = [name for name, count in writers.items()
               if count > 1 and program.buffers[name].role == "arena"]
    names: dict[str, str] = {}
    for role in {buffer.role for buffer in program.buffers.values()}:
        names |= _shortest([buffer.name for buffer in program.with_role(role)])
    taken = set(names.values())
    letters = (letter for letter in "xyzuvw" if letter not in taken)
    return names | dict(zip(carried, letters, strict=False))


def _shortest(full: list[str]) -> dict[str, str]:
    """The last words of dotted names, as many as tell them apart."""
    names, words = {}, {name: name.removesuffix(".weight").split(".") for name in full}
    for name in full:
        count = 1
        while any(other != name and words[other][-count:] == words[name][-count:]
                  for other in full) and count < len(words[name]):
            count += 1
        names[name] = ".".join(words[name][-count:])
    return names


def describe(stage: Stage, program: Program) -> list[str]:
    """Each result as one expression, such as `rms_norm(x, norm1[layer]) @ qkv[layer]`.

    A matmul whose parts are used apart is called t and told after `where`.
    """
    names = short_names(program)
    texts: dict[Node, str] = {}
    where = ""
    for node, operand in zip(stage.body.inputs, stage.operands, strict=True):
        per_turn = program.buffers[operand].count > 1
        texts[node] = f"{names[operand]}[layer]" if per_turn else names[operand]
    users = stage.body.users()
    for node in stage.body.nodes():
        if node in texts:
            continue
        texts[node] = _expression(node, [texts[source] for source in node.inputs])
        if node.op in ("matmul", "grouped_matmul") and len(users.get(node, ())) > 1:
            texts[node], where = "t", f" where t = {_bare(texts[node])}"
    return [_cut(_packed(node, program.buffers[result], texts[node]) + where)
            for result, (_, node) in zip(stage.results, stage.body.outputs, strict=True)]


def _packed(node: Node, buffer: Buffer, text: str) -> str:
    """A stage that only lays a value out anew for a matmul is called pack."""
    while node.op in _VIEWS:
        (node,) = node.inputs
    packs = node.op == "input" and not isinstance(buffer.layout, Rows)
    return f"pack({text})" if packs else _bare(text)


def _expression(node: Node, inputs: list[str]) -> str:
    if node.op in _VIEWS:
        return inputs[0]
    if node.op in _INFIX:
        return f"({inputs[0]} {_INFIX[node.op]} {inputs[1]})"
    if node.op == "gather" and node["axis"] == 0:
        return f"{inputs[0]}[{inputs[1]}]"
    if node.op == "slice":
        return _slice(node, inputs[0])
    if node.op == "constant":
        return "constant"
    shown = inputs[:_SHOWN_INPUTS.get(node.op, len(inputs))]
    return f"{node.op}({', '.join(map(_bare, shown))})" if inputs else node.op


def _slice(node: Node, source: str) -> str:
    """x[64:96] where only the last axis is cut, as the parts of a merged matmul are."""
    whole = node.inputs[0].shape
    *others, last = range(len(whole))
    if any(node["starts"][axis] != 0 or node["stops"][axis] is not whole[axis]
           for axis in others if not isinstance(whole[axis], int)) or node["steps"][last] != 1:
        return f"slice({_bare(source)})"
    start, stop = node["starts"][last], node["stops"][last]
    first = "" if start == 0 else str(start)
    return f"{source}[{first}:{'' if stop == whole[last] else stop}]"


def _bare(text: str) -> str:
    """Without the parentheses round the whole of it."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and position < len(text) - 1:
            return text
    return text[1:-1]


def _cut(text: str) -> str:
    return text if len(text) <= _LENGTH else text[:_LENGTH - 3] + "..."


def fused_ops(stage: Stage, program: Program) -> list[str]:
    """The model's ops that were fused into this stage, such as `["rms_norm", "3 matmuls (q_proj,
    k_proj, v_proj)"]`; none if it computes a single op."""
    counts = Counter(node.op for node in stage.body.nodes() if node.op not in _SILENT)
    merged = _merged_weights(stage, program) if counts["matmul"] else []
    texts = []
    for op, count in counts.items():
        if op == "matmul" and len(merged) > 1:
            texts.append(f"{len(merged)} matmuls ({', '.join(merged)})")
        else:
            texts.append(op if count == 1 else f"{count} {op}s")
    return texts if len(texts) > 1 or max(counts.values(), default=0) > 1 or merged else []


def _merged_weights(stage: Stage, program: Program) -> list[str]:
    """The model's own matrices that the stage's weight was put together from."""
    for name in stage.operands:
        weight = program.weights.get(name)
        if weight is None or program.buffers[name].type.rank < 2:
            continue
        matrices = {leaf["name"] for leaf in weight.expression.parameters() if leaf.rank > 1}
        sources = [source for leaf, source in weight.names[0] if leaf in matrices]
        if len(sources) > 1:
            return _distinct_words(sources)
    return []


def _distinct_words(names: Iterable[str]) -> list[str]:
    """The word of each dotted name in which they differ."""
    words = [name.removesuffix(".weight").split(".") for name in names]
    columns = list(zip(*words, strict=False))
    at = next((n for n, column in enumerate(columns) if len(set(column)) > 1), -1)
    return [each[at] for each in words]
