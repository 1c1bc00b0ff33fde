"""The text form of graphs: `format_graph` and `parse_graph` are inverses.

    graph step(ids: i32[tokens]) where tokens in 1..8192 {
      %0 = parameter[name="embed"] : bf16[128256, 2048]
      %1 = gather[axis=0](%0, ids) : bf16[tokens, 2048]
      return hidden = %1
    }

Values: `1`, `1.0`, `true`, `"text"`, `x"00ff"` or `b64"..."` (bytes), `tokens*2 + 1`, `bf16`,
`f32[2, tokens]`, `(1, 2)`. A parameter's, state's or input's attribute `type` is the type after the
colon. Attributes at their default are not printed. The outermost graph declares all symbols.
When reading, types are inferred and compared with those written; they may be left out.
"""

import base64
import json
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from llmc.errors import GraphError
from llmc.ir.dims import MAX, Dim, Expression, Symbol, format_dim, scan_dim, symbol
from llmc.ir.dtypes import DTYPES, DType, dtype
from llmc.ir.graph import Graph, Node, TensorType, Type, attribute_key, format_type, intern_node
from llmc.ir.ops import OPS, make
from llmc.ir.scan import NAME, Scanner

LEAVES_WITH_TYPE = ("input", "parameter", "state")  # their attribute `type` is the node's type
_READABLE_ELEMENTS = 32  # constants up to so many elements are printed as lists
_HEX_BYTES = 64  # bytes up to so many are printed as hex, longer ones as base64

_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_FLOAT = re.compile(r"-?(?:\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+|(?:inf|nan)(?![\w.]))")
_FLOAT_BITS = re.compile(r"nan\(0x[0-9a-f]{16}\)")
_BYTES = re.compile(r'x"[0-9a-f]*"|b64"[A-Za-z0-9+/=]*"')
_DTYPE = re.compile(rf"(?:{'|'.join(DTYPES)})(?![\w.])")
_ELEMENT = re.compile(r"-?[A-Za-z0-9_.+-]+")
_IN_PARENTHESES = re.compile(r'"(?:[^"\\\n]|\\.)*"|#[^\n]*|[^"#()]+')
_REFERENCE = re.compile(r"%\d+")


# ---- printing ----------------------------------------------------------------------------------


def format_graph(graph: Graph) -> str:
    """The graph's text; equal graphs have equal texts. GraphError if two symbols share a name or
    two inputs do."""
    return "\n".join(format_lines(graph)[0]) + "\n"


def format_lines(graph: Graph) -> tuple[list[str], dict[Node | Graph, int]]:
    """The text by lines, and the line at which each node (of a body too) or each graph's `return`
    first stands."""
    printer = _Printer()
    printer.graph(graph, "", _where(graph))
    return printer.lines, printer.line_of


def _where(graph: Graph) -> str:
    by_name: dict[str, Symbol] = {}
    for each in _all_symbols(graph):
        if by_name.setdefault(each.name, each) is not each:
            raise GraphError(
                f"graph {graph.name} has two symbols '{each.name}': "
                f"{_declaration(by_name[each.name])} and {_declaration(each)}"
            )
    return f" where {', '.join(map(_declaration, by_name.values()))}" if by_name else ""


def _all_symbols(graph: Graph) -> list[Symbol]:
    found = list(graph.symbols())
    for _, maker in graph.prelude:
        found += _all_symbols(maker)
    for node in graph.all_nodes():
        for body in node.bodies:
            for _, maker in body.prelude:
                found += _all_symbols(maker)
    return found


def _declaration(each: Symbol) -> str:
    high = "" if each.high == MAX - MAX % each.multiple else str(each.high)
    multiple = f" multiple {each.multiple}" if each.multiple != 1 else ""
    return f"{each.name} in {each.low}..{high}{multiple}"


def format_name(name: str) -> str:
    """A name of a graph, input or output: bare if it is a plain word, else quoted."""
    return name if NAME.fullmatch(name) else json.dumps(name)


class _Printer:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.line_of: dict[Node | Graph, int] = {}

    def graph(self, graph: Graph, indent: str, where: str = "", before: str = "") -> None:
        names = _name_inputs(graph)
        inputs = ", ".join(f"{names[node]}: {format_type(node.type)}" for node in graph.inputs)
        start = f"{before}graph {format_name(graph.name)}({inputs}){where}"
        for node in graph.inputs:
            self.line_of.setdefault(node, len(self.lines))
        self.lines.append(f"{indent}{start} {{")
        for node in graph.nodes():
            if node not in names:
                names[node] = f"%{len(names) - len(graph.inputs)}"
                self.node(node, names, indent + "  ")
        self.line_of.setdefault(graph, len(self.lines))
        self.lines.append(f"{indent}  {_format_return(graph, names)}")
        self.lines.append(f"{indent}}}")
        for name, maker in graph.prelude:
            self.graph(maker, indent, before=f"prelude {format_name(name)} = ")

    def node(self, node: Node, names: Mapping[Node, str], indent: str) -> None:
        self.line_of.setdefault(node, len(self.lines))
        inputs = f"({', '.join(names[each] for each in node.inputs)})" if node.inputs else ""
        text = f"{names[node]} = {node.op}{_format_attributes(node)}{inputs}"
        opening = " {" if node.bodies else ""
        self.lines.append(f"{indent}{text} : {format_type(node.type)}{opening}")
        for body in node.bodies:
            self.graph(body, indent + "  ")
        if node.bodies:
            self.lines.append(f"{indent}}}")


def _name_inputs(graph: Graph) -> dict[Node, str]:
    names: dict[Node, str] = {}
    for node in graph.inputs:
        names[node] = format_name(node["name"])
    if len(set(names.values())) != len(graph.inputs):
        raise GraphError(f"graph {graph.name} has two inputs of the same name")
    return names


def _format_return(graph: Graph, names: Mapping[Node, str]) -> str:
    outputs = ", ".join(f"{format_name(name)} = {names[node]}" for name, node in graph.outputs)
    updates = ", ".join(f"{names[state]} = {names[value]}" for state, value in graph.updates)
    return " ".join(["return", outputs]).strip() + (f"; update {updates}" if updates else "")


def _format_attributes(node: Node) -> str:
    parts = []
    for name, value in sorted(node.attributes, key=lambda item: (item[0] == "data", item[0])):
        if name == "type" and node.op in LEAVES_WITH_TYPE and value == node.type:
            continue
        if _is_default(node.op, name, value):
            continue
        readable = _readable_data(node) if node.op == "constant" and name == "data" else None
        parts.append(f"{name}={readable or format_value(value)}")
    return f"[{', '.join(parts)}]" if parts else ""


def _is_default(op: str, name: str, value: Any) -> bool:
    attribute = OPS[op].attributes.get(name) if op in OPS else None
    if attribute is None or callable(attribute.default):
        return False
    return bool(attribute_key(value) == attribute_key(attribute.default))


def _readable_data(node: Node) -> str | None:
    """A small constant's elements as a list, if reading the list gives the same bytes."""
    data, element_type = node.get_attribute("data"), node.get_attribute("dtype")
    if not isinstance(data, bytes) or not isinstance(element_type, DType):
        return None
    size = element_type.numpy.itemsize
    if not data or len(data) % size or len(data) > _READABLE_ELEMENTS * size:
        return None
    import numpy

    words = [str(each).lower() for each in numpy.frombuffer(data, element_type.numpy)]
    return f"[{', '.join(words)}]" if _data_of_words(words, element_type) == data else None


def _data_of_words(words: list[str], element_type: DType) -> bytes:
    """The bytes of elements given as words; ValueError or OverflowError for what is no element."""
    import numpy

    if element_type.is_integer:
        return numpy.array([int(word) for word in words], element_type.numpy).tobytes()
    if element_type.is_float:
        return numpy.array([float(word) for word in words], element_type.numpy).tobytes()
    return numpy.array([_BOOLEANS[word] for word in words], element_type.numpy).tobytes()


_BOOLEANS = {"true": True, "false": False}


def format_value(value: Any) -> str:
    """The text of an attribute value; `scan_value` reads it back with its type."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _format_float(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, bytes):
        if len(value) <= _HEX_BYTES:
            return f'x"{value.hex()}"'
        return f'b64"{base64.b64encode(value).decode()}"'
    if isinstance(value, tuple):
        return f"({', '.join(map(format_value, value))})"
    if isinstance(value, (DType, TensorType)):
        return str(value)
    if isinstance(value, (int, Expression)):
        return format_dim(value)
    raise GraphError(f"no text form for an attribute value {value!r}")


def _format_float(value: float) -> str:
    bits = struct.pack(">d", value)
    if value != value and bits != struct.pack(">d", float("nan")):
        return f"nan(0x{bits.hex()})"
    return repr(value)


# ---- parsing -----------------------------------------------------------------------------------


def parse_graph(text: str) -> Graph:
    """The graph of a text; GraphError with line and column if it is not one."""
    scanner = Scanner(text)
    try:
        graph = scan_graph(scanner, {})
        if not scanner.at_end():
            scanner.fail("expected the end of the text")
    except RecursionError:
        raise GraphError(f"{scanner.place()}: nested too deeply") from None
    except (ValueError, OverflowError) as error:
        raise GraphError(f"{scanner.place()}: {error}") from None
    except GraphError as error:
        if str(error).startswith("line "):
            raise
        raise GraphError(f"{scanner.place()}: {error}") from None
    return graph


def scan_graph(scanner: Scanner, symbols: Mapping[str, Dim], in_prelude: bool = False) -> Graph:
    """Reads a graph and its preludes (which have none of their own); `symbols` are those that an
    enclosing text declared."""
    scanner.expect("graph")
    name = _scan_name(scanner)
    header = scanner.position
    _skip_parentheses(scanner)
    symbols = {**symbols, **_scan_where(scanner)}
    body = scanner.position
    scanner.position = header  # the symbols of the inputs' types are declared after them
    named = _scan_inputs(scanner, symbols)
    inputs = tuple(named.values())
    scanner.position = body
    scanner.expect("{")
    while not scanner.accept("return"):
        _scan_node(scanner, named, symbols)
    outputs = []
    if not scanner.looking_at("}") and not scanner.looking_at(";"):
        outputs = _scan_list(scanner, lambda: _scan_output(scanner, named))
    updates = []
    if scanner.accept(";"):
        scanner.expect("update")
        updates = _scan_list(scanner, lambda: _scan_update(scanner, named))
    scanner.expect("}")
    prelude = []
    while not in_prelude and scanner.accept("prelude"):
        made = _scan_name(scanner)
        scanner.expect("=")
        prelude.append((made, scan_graph(scanner, symbols, in_prelude=True)))
    return Graph(name, inputs, tuple(outputs), tuple(updates), tuple(prelude))


def _scan_list(scanner: Scanner, scan: Any) -> list[Any]:
    """One or more of what `scan` reads, separated by commas."""
    found = [scan()]
    while scanner.accept(","):
        found.append(scan())
    return found


def _scan_string(scanner: Scanner) -> str | None:
    start = scanner.position
    quoted = scanner.match(_STRING)
    if quoted is None:
        return None
    try:
        return str(json.loads(quoted))
    except ValueError:
        scanner.fail("a string with an escape that JSON does not have", start)


def _scan_name(scanner: Scanner) -> str:
    quoted = _scan_string(scanner)
    return scanner.name() if quoted is None else quoted


def _skip_parentheses(scanner: Scanner) -> None:
    """Moves behind a balanced (...); strings and comments inside may hold anything."""
    start, depth = scanner.position, 0
    while True:
        if scanner.accept("("):
            depth += 1
        elif depth and scanner.accept(")"):
            depth -= 1
        elif not depth or scanner.match(_IN_PARENTHESES) is None:
            scanner.fail("expected the inputs in parentheses", start)
        if not depth:
            return


def _scan_where(scanner: Scanner) -> dict[str, Dim]:
    declared: dict[str, Dim] = {}
    if not scanner.accept("where"):
        return declared
    for each in _scan_list(scanner, lambda: _scan_declaration(scanner)):
        if each.name in declared:
            scanner.fail(f"symbol '{each.name}' is declared twice")
        declared[each.name] = each
    return declared


def _scan_declaration(scanner: Scanner) -> Symbol:
    name = scanner.name("a symbol")
    scanner.expect("in")
    low = _scan_signed(scanner)
    scanner.expect("..")
    has_high = scanner.match(re.compile(r"(?=-?\d)")) is not None
    high = _scan_signed(scanner) if has_high else MAX
    return symbol(name, low, high, scanner.integer() if scanner.accept("multiple") else 1)


def _scan_signed(scanner: Scanner) -> int:
    return -scanner.integer() if scanner.accept("-") else scanner.integer()


def _scan_inputs(scanner: Scanner, symbols: Mapping[str, Dim]) -> dict[str, Node]:
    """The header's inputs by the text that refers to them."""
    named: dict[str, Node] = {}
    scanner.expect("(")
    while not scanner.accept(")"):
        if named:
            scanner.expect(",")
        start = scanner.position
        name = _scan_name(scanner)
        scanner.expect(":")
        type = scan_type(scanner, symbols)
        reference = format_name(name)
        if reference in named:
            scanner.fail(f"input '{name}' is declared twice", start)
        named[reference] = intern_node("input", {"name": name, "type": type}, (), (), type)
    return named


def _scan_reference(scanner: Scanner, named: Mapping[str, Node]) -> Node:
    start = scanner.position
    reference = scanner.match(_REFERENCE) or format_name(_scan_name(scanner))
    if reference not in named:
        scanner.fail(f"no node {reference} before this line", start)
    return named[reference]


def _scan_output(scanner: Scanner, named: Mapping[str, Node]) -> tuple[str, Node]:
    name = _scan_name(scanner)
    scanner.expect("=")
    return name, _scan_reference(scanner, named)


def _scan_update(scanner: Scanner, named: Mapping[str, Node]) -> tuple[Node, Node]:
    state = _scan_reference(scanner, named)
    scanner.expect("=")
    return state, _scan_reference(scanner, named)


def _scan_node(scanner: Scanner, named: dict[str, Node], symbols: Mapping[str, Dim]) -> None:
    """Reads one node and files it under its number."""
    start = scanner.position
    number = scanner.match(_REFERENCE) or scanner.fail("expected a node or 'return'")
    if number in named:
        scanner.fail(f"{number} is defined twice", start)
    scanner.expect("=")
    op = scanner.name("an op")
    attributes = _scan_attributes(scanner, symbols)
    inputs: list[Node] = []
    if scanner.accept("("):
        inputs = _scan_list(scanner, lambda: _scan_reference(scanner, named))
        scanner.expect(")")
    type_start = scanner.position
    type = scan_type(scanner, symbols) if scanner.accept(":") else None
    bodies = []
    if scanner.accept("{"):
        while not scanner.accept("}"):
            bodies.append(scan_graph(scanner, symbols))
    if op in LEAVES_WITH_TYPE and type is not None:
        attributes.setdefault("type", type)
    try:
        node = make(op, *inputs, bodies=bodies, **attributes)
    except (GraphError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise GraphError(f"{scanner.place(start)}: {error}") from error
    if type is not None and type != node.type:
        scanner.fail(f"the type should be {format_type(node.type)}", type_start)
    named[number] = node


def _scan_attributes(scanner: Scanner, symbols: Mapping[str, Dim]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    if not scanner.accept("["):
        return attributes

    def scan_one() -> None:
        start = scanner.position
        name = scanner.name("an attribute")
        if name in attributes:
            scanner.fail(f"attribute '{name}' is given twice", start)
        scanner.expect("=")
        if scanner.looking_at("["):
            attributes[name] = _scan_data(scanner, attributes.get("dtype"))
        else:
            attributes[name] = scan_value(scanner, symbols)

    _scan_list(scanner, scan_one)
    scanner.expect("]")
    return attributes


def _scan_data(scanner: Scanner, element_type: Any) -> bytes:
    """A list of elements as the bytes of a constant of this dtype."""
    start = scanner.position
    if not isinstance(element_type, DType):
        scanner.fail("a list of elements must follow the attribute dtype")
    scanner.expect("[")
    words = _scan_list(
        scanner, lambda: scanner.match(_ELEMENT) or scanner.fail("expected an element")
    )
    scanner.expect("]")
    try:
        return _data_of_words(words, element_type)
    except (ValueError, OverflowError, KeyError):
        scanner.fail(f"not all of these are of type {element_type}", start)


def scan_value(scanner: Scanner, symbols: Mapping[str, Dim]) -> Any:
    """Reads what `format_value` prints."""
    if scanner.accept("("):
        values: Iterable[Any] = ()
        if not scanner.looking_at(")"):
            values = _scan_list(scanner, lambda: scan_value(scanner, symbols))
        scanner.expect(")")
        return tuple(values)
    quoted = _scan_string(scanner)
    if quoted is not None:
        return quoted
    if (blob := scanner.match(_BYTES)) is not None:
        encoded = blob.split('"')[1]
        return bytes.fromhex(encoded) if blob[0] == "x" else base64.b64decode(encoded)
    for word, value in _BOOLEANS.items():
        if scanner.accept(word):
            return value
    if (bits := scanner.match(_FLOAT_BITS)) is not None:
        return struct.unpack(">d", bytes.fromhex(bits[6:-1]))[0]
    if (number := scanner.match(_FLOAT)) is not None:
        return float(number)
    if (name := scanner.match(_DTYPE)) is not None:
        return scan_shape(scanner, dtype(name), symbols) if scanner.looking_at("[") else dtype(name)
    return scan_dim(scanner, symbols)


def scan_type(scanner: Scanner, symbols: Mapping[str, Dim]) -> Type:
    """Reads what `format_type` prints: `bf16[tokens, 2]`, or a tuple `(f32[2], i64[2])`."""
    if not scanner.accept("("):
        name = scanner.match(_DTYPE) or scanner.fail("expected a type")
        return scan_shape(scanner, dtype(name), symbols)
    types: list[Type] = []
    while not scanner.accept(")"):
        types.append(scan_type(scanner, symbols))
        if not scanner.accept(",") and not scanner.looking_at(")"):
            scanner.fail("expected ',' or ')'")
    return tuple(types)


def scan_shape(scanner: Scanner, element_type: DType, symbols: Mapping[str, Dim]) -> TensorType:
    """Reads a shape in brackets and returns the tensor type."""
    scanner.expect("[")
    shape = []
    if not scanner.looking_at("]"):
        shape = _scan_list(scanner, lambda: scan_dim(scanner, symbols))
    scanner.expect("]")
    return TensorType(element_type, tuple(shape))
