"""What the C ABI of one model is: names, codes, sizes. Code and header are made from this."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmc.codegen.host.frame import FIELDS
from llmc.errors import CompileError
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.program import Program

# The inputs of a language model's step, and the symbols in their shapes and in those of its states.
STEP_INPUTS = ("ids", "positions", "sequence", "offsets", "page_table", "rows")
STEP_SYMBOLS = ("tokens", "sequences", "rows", "table_width", "pool_pages")

# In C: an enum by these names, from 0 on; the text is what `error` gives.
CODES = {
    "OK": "no error",
    "BAD_ARGUMENT": "a pointer that must not be null is null",
    "BAD_WEIGHTS": "these are not the weights of this code, or they are not aligned to 64",
    "BAD_CPU": "this CPU, or its system, lacks instructions that the code uses",
    "BAD_OPTION": "an option is negative or beyond what the model allows",
    "NO_MEMORY": "out of memory",
    "BAD_SIZE": "a size is zero, negative, or beyond what options or model allow",
    "BAD_OFFSETS": "offsets must begin with 0, grow, and end with the number of tokens",
    "BAD_SEQUENCE": "a token's sequence is not the one that offsets put it in",
    "BAD_TOKEN": "a token id is outside the vocabulary",
    "BAD_POSITION": "positions of a sequence must count up and stay below the context",
    "BAD_PAGE": "a page is outside the pool, or the page table is too narrow",
    "BAD_ROW": "a wanted row is not the number of a token",
}
NUMBERS = {name: number for number, name in enumerate(CODES)}

# Structs, all of 8-byte fields. A batch's arrays take the place of the inputs of the same name.
OPTIONS = ("threads", "max_context", "max_sequences", "max_tokens")
BATCH_SIZES = ("tokens", "sequences", "rows", "table_width")
BATCH_ARRAYS = ("ids", "positions", "sequence", "offsets", "page_table", "wanted_rows")
BATCH = {name: 8 * index for index, name in enumerate((*BATCH_SIZES, *BATCH_ARRAYS))}
DEFAULT_TOKENS = 512  # of one step, where the options say nothing
MOST_THREADS = 1024
FINGERPRINT_START, FINGERPRINT_FACTOR = 0xCBF29CE484222325, 0x100000001B3  # FNV's
_SAMPLES = 256
MOST_SEQUENCES = 1 << 20

RESERVED = frozenset("""
    alignas alignof and asm auto bitand bitor bool break case catch char class compl concept const
    constexpr continue default delete do double else enum explicit export extern false float for
    friend goto if inline int long mutable namespace new not nullptr operator or private protected
    public register requires restrict return short signed sizeof static struct switch template this
    throw true try typedef typeof typename union unsigned using virtual void volatile while xor
""".split())


@dataclass(frozen=True)
class Interface:
    """A model as C sees it.

    programs: variant -> program; scratch: variant -> bytes of scratch for each worker.
    weight_offsets: where each copy of each weight lies in the packed file, in ABI order.
    fingerprint: of the packed weights (see `fingerprint`), which `create` compares.
    vocabulary, max_context: limits of a language model (of no meaning for other models).
    """

    name: str
    prefix: str
    programs: Mapping[str, Program]
    scratch: Mapping[str, Dim]
    weight_offsets: tuple[int, ...]
    weight_bytes: int
    vocabulary: int
    max_context: int
    fingerprint: int = 0

    def __post_init__(self) -> None:
        check_prefix(self.prefix)
        if self.has_steps:
            self._check_step()
        elif self.program.with_role("state"):
            raise CompileError(f"{self.name} has states but not the inputs of a language model's "
                               f"step ({', '.join(STEP_INPUTS)}): it has no C ABI yet")

    @property
    def program(self) -> Program:
        """Any variant: what is read from it is the same in all."""
        return next(iter(self.programs.values()))

    @property
    def has_steps(self) -> bool:
        """Whether this is a language model (create, step, feed) or any other (create, run)."""
        return {buffer.name for buffer in self.program.with_role("input")} == set(STEP_INPUTS)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the symbols, in ABI order."""
        return tuple(name for name, _, _ in self.program.symbols)

    @property
    def options(self) -> tuple[str, ...]:
        """Fields of the options, in order."""
        return OPTIONS if self.has_steps else OPTIONS[:1]

    @property
    def functions(self) -> tuple[str, ...]:
        """What the object exports, without the prefix."""
        middle = ("step", "feed") if self.has_steps else ("run",)
        return ("create", *middle, "destroy", "error")

    @property
    def handle(self) -> str:
        """Name of the C type that stands for a loaded model."""
        return handle_name(self.prefix)

    def variants(self) -> list[str]:
        """Names of the variants, the narrowest shape key first."""
        return sorted(self.programs, key=lambda name: sum(
            high - low for _, low, high in self.programs[name].symbols))

    def limit(self, symbol: str, beyond: int) -> int:
        """The highest value of a symbol that some variant covers, at most `beyond`."""
        return max(min(high, beyond) for program in self.programs.values()
                   for name, _, high in program.symbols if name == symbol)

    def multiples(self) -> dict[str, int]:
        """What each symbol must be a multiple of, where that is more than one."""
        found = {symbol.name: symbol.multiple for buffer in self.program.with_role("input")
                 for dim in buffer.type.shape for symbol in dims.symbols(dim)}
        return {name: multiple for name, multiple in found.items() if multiple > 1}

    def _check_step(self) -> None:
        (logits,) = self.program.with_role("output")
        if unknown := set(self.symbols) - set(STEP_SYMBOLS):
            raise CompileError(f"{self.name}: the C ABI cannot bind {', '.join(sorted(unknown))}; "
                               f"a language model's step has {', '.join(STEP_SYMBOLS)}")
        if logits.type.shape[-1] != self.vocabulary:
            raise CompileError(f"{self.name}: logits have {logits.type.shape[-1]} columns, the "
                               f"vocabulary has {self.vocabulary} tokens")


class Handle:
    """Memory behind a handle, as byte offsets: the step's arguments, what the ABI keeps besides,
    and the tables that the arguments point to."""

    def __init__(self, interface: Interface):
        program = interface.program
        kept = ("cancel_word", "arena_bytes", "scratch_bytes", "workers", "max_context",
                "max_sequences", "max_tokens", "pages", "width", "pool", "feed")
        self.fields = {name: 8 * index for index, name in enumerate((*FIELDS, *kept))}
        place = 8 * len(self.fields)
        sizes = {"symbols": len(interface.symbols), "weights": len(interface.weight_offsets)}
        for role in ("input", "output", "state"):
            sizes[role + "s"] = sum(buffer.count for buffer in program.with_role(role))
        self.tables: dict[str, int] = {}
        for name, size in sizes.items():
            self.tables[name] = place
            place += 8 * size
        self.bytes = place
        self.symbols = {name: self.tables["symbols"] + 8 * i
                        for i, name in enumerate(interface.symbols)}


def samples(size: int) -> tuple[int, int]:
    """(count, stride in bytes) of the 8-byte words of a packed file that its fingerprint takes."""
    words = size // 8
    return min(words, _SAMPLES), 8 * max(1, words // _SAMPLES)


def fingerprint(packed: np.ndarray) -> int:
    """What tells one model's packed bytes from another's of the same size, such as the same model
    packed for another CPU: a hash of a few words, cheap enough for every create."""
    count, stride = samples(packed.size)
    value = FINGERPRINT_START
    for place in range(0, count * stride, stride):
        word = int.from_bytes(packed[place:place + 8].tobytes(), "little")
        value = (value ^ word) * FINGERPRINT_FACTOR % (1 << 64)
    return value


def handle_name(prefix: str) -> str:
    return prefix.rstrip("_")


def check_prefix(prefix: str) -> None:
    """CompileError unless names in C can begin with the prefix, and the handle's type is one."""
    valid = re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", prefix)
    if not valid or handle_name(prefix) in RESERVED:
        raise CompileError(f"prefix {prefix!r} cannot begin names in C: it must be of letters, "
                           "digits and underscores, a letter first, such as llmc_")


def local_name(name: str, variant: str = "internal") -> str:
    """What an exported function of a variant is called inside: no C name, so none clashes."""
    return f"{name}.{variant}"
