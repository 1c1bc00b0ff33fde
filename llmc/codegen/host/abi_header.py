"""The C header of a model's interface."""

from __future__ import annotations

import re

from llmc.codegen.host.abi_interface import (
    BATCH_ARRAYS,
    BATCH_SIZES,
    CODES,
    DEFAULT_TOKENS,
    MOST_THREADS,
    RESERVED,
    Interface,
)
from llmc.ir.dims import format_dim
from llmc.ir.ops import PAGE

_OPTION_NOTES = {
    "threads": f"1 .. {MOST_THREADS}; 0: the CPUs this process may use",
    "max_context": "tokens of a sequence; 0: {P}MAX_CONTEXT, also the most",
    "max_sequences": "sequences of a step, all of which may be full; 0: 1",
    "max_tokens": f"tokens of a step; 0: {DEFAULT_TOKENS}",
}
_SIZE_NOTES = {
    "tokens": "new tokens of all sequences together, 1 .. max_tokens",
    "sequences": "1 .. max_sequences",
    "rows": "rows of logits wanted, 0 .. tokens",
    "table_width": "columns of page_table, 1 .. pages of max_context tokens",
}
_ARRAY_NOTES = {
    "ids": "[tokens] sequence after sequence",
    "positions": "[tokens] in their sequence, from 0, counting up",
    "sequence": "[tokens] number of the token's sequence",
    "offsets": "[sequences + 1] first token of each, then tokens",
    "page_table": "[sequences][table_width] pages, see below",
    "wanted_rows": "[rows] numbers of tokens whose logits to give",
}
# Inputs of a checkpoint that is no language model, all int32.
_INPUT_NOTES = {
    "ids": "sequence after sequence",
    "positions": "of each token in its sequence, from 0",
    "sequence": "number of each token's sequence",
    "offsets": "first token of each sequence, then tokens",
    "token_types": "0, or 1 in the second text of a pair",
    "lengths": "tokens of each sequence",
    "pooled": "the token of each sequence that is pooled: its first",
}


def header(interface: Interface) -> str:
    """Text of the header: sizes, types, functions, and an example."""
    text = _TOP + _MIDDLE + (_STEP if interface.has_steps else _RUN) + _BOTTOM
    upper = interface.prefix.upper()
    values = {
        "name": _comment(interface.name), "p": interface.prefix, "P": upper, "t": interface.handle,
        "guard": f"{upper}H", "bytes": str(interface.weight_bytes), "page": str(PAGE),
        "vocabulary": str(interface.vocabulary), "context": str(interface.max_context),
        "codes": _codes(interface), "options": _options(interface),
        "sizes": _fields("int64_t ", _SIZE_NOTES, BATCH_SIZES),
        "arrays": _fields("const int32_t *", _ARRAY_NOTES, BATCH_ARRAYS),
        "symbols": _symbols(interface), "inputs": _tensors(interface, "input"),
        "outputs": _tensors(interface, "output"), "shape": _shape(interface),
    }
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], text)


def _codes(interface: Interface) -> str:
    names = [f"{interface.prefix.upper()}{name}," for name in CODES]
    width = max(map(len, names))
    return "\n".join(f"    {name:{width}} /* {_comment(text)} */"
                     for name, text in zip(names, CODES.values(), strict=True))


def _options(interface: Interface) -> str:
    notes = {name: note.replace("{P}", interface.prefix.upper())
             for name, note in _OPTION_NOTES.items()}
    return _fields("int64_t ", notes, interface.options)


def _fields(type_: str, notes: dict[str, str], names: tuple[str, ...]) -> str:
    width = max(len(type_ + name) for name in names) + 1
    return "\n".join(f"    {type_ + name + ';':{width}} /* {notes[name]} */" for name in names)


def _symbols(interface: Interface) -> str:
    multiples = interface.multiples()
    lines = []
    for name in interface.symbols:
        ranges = [(low, high) for program in interface.programs.values()
                  for symbol, low, high in program.symbols if symbol == name]
        note = f"{min(low for low, _ in ranges)} .. {max(high for _, high in ranges)}"
        if name in multiples:
            note += f", a multiple of {multiples[name]}"
        lines.append(f"    int64_t {identifier(name)}; /* {note} */")
    return "\n".join(lines) or "    int64_t unused; /* the model has no symbolic sizes */"


def _tensors(interface: Interface, role: str) -> str:
    buffers = interface.program.with_role(role)
    packed = role == "input" and {buffer.name for buffer in buffers} <= _INPUT_NOTES.keys()
    lines = []
    for index, buffer in enumerate(buffers):
        shape = ", ".join(map(format_dim, buffer.type.shape))
        note = f" ({_INPUT_NOTES[buffer.name]})" if packed else ""
        lines.append(f" *   {index} {_comment(buffer.name)}: {buffer.type.dtype}[{shape}]{note}")
    return "\n".join(lines)


def _shape(interface: Interface) -> str:
    return ", ".join(f".{identifier(name)} = ..." for name in interface.symbols) or "0"


def identifier(name: str) -> str:
    """A symbol's name as a field of a C struct."""
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)
    if plain in RESERVED:
        return f"{plain}_"
    return plain if plain[:1].isalpha() else f"n{plain}"


def _comment(text: str) -> str:
    """Text that cannot end the comment it stands in, in one line."""
    return " ".join(text.replace("*/", "* /").replace("/*", "/ *").split())


_TOP = """\
/* @name@, compiled by llmc. Link with -lpthread -lm.
 *
 * Functions give @P@OK or a code; @p@error tells what a code means. One call at a time on
 * a model; models are independent of each other. The child of a fork must create its own.
 */
#ifndef @guard@
#define @guard@

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define @P@PACKED_BYTES @bytes@ /* size of the file of weights */
"""

_MIDDLE = """
enum @p@code {
@codes@
};

typedef struct @t@ @t@;

typedef struct @p@options {
@options@
} @p@options;

/* packed: the file of weights, read or mapped to an address that is a multiple of 64; it must stay
 * there until destroy. options: null for the defaults. *model is null unless @P@OK is returned. */
int @p@create(const void *packed, size_t bytes, const @p@options *options, @t@ **model);
void @p@destroy(@t@ *model); /* null does nothing */
const char *@p@error(int code);
"""

_STEP = """
#define @P@VOCABULARY @vocabulary@ /* token ids are below; floats in a row of logits */
#define @P@MAX_CONTEXT @context@
#define @P@PAGE @page@ /* tokens in a page of the cache */

/* New tokens of one sequence: position says how many of its tokens went before. logits: those of
 * the last token, float[@P@VOCABULARY]. The sequence lies in the pages 0, 1, 2 ...; to begin
 * another one, feed from position 0 again. More than max_tokens tokens take several steps. */
int @p@feed(@t@ *model, const int32_t *ids, int64_t count, int64_t position, float *logits);

/* New tokens of several sequences, packed. */
typedef struct @p@batch {
@sizes@
@arrays@
} @p@batch;

/* logits: float[rows][@P@VOCABULARY], may be null where rows is 0. Keys and values of the token
 * at position p of sequence s are kept in page page_table[s][p / @P@PAGE]: the caller decides
 * which sequence owns which of the pages
 * 0 .. max_sequences * ceil(max_context / @P@PAGE) - 1. A step that is refused changes nothing. */
int @p@step(@t@ *model, const @p@batch *batch, float *logits);

/*  @t@ *model;
 *  int code = @p@create(weights, @P@PACKED_BYTES, NULL, &model);
 *  float logits[@P@VOCABULARY];
 *  if (!code) code = @p@feed(model, prompt, prompt_tokens, 0, logits);
 *  if (!code) code = @p@feed(model, &next, 1, prompt_tokens, logits);
 *  if (code) fprintf(stderr, "%s\\n", @p@error(code));
 *  @p@destroy(model);
 */
"""

_RUN = """
/* Sizes that the shapes of inputs and outputs are made of. */
typedef struct @p@shape {
@symbols@
} @p@shape;

/* inputs and outputs: arrays of pointers to dense row-major tensors, in this order:
@inputs@
 * and out of it
@outputs@
 * Indices in the inputs (token ids, positions ...) are not checked: they must be valid. */
int @p@run(@t@ *model, const @p@shape *shape, const void *const *inputs, void *const *outputs);

/*  @t@ *model;
 *  int code = @p@create(weights, @P@PACKED_BYTES, NULL, &model);
 *  @p@shape shape = {@shape@};
 *  if (!code) code = @p@run(model, &shape, inputs, outputs);
 *  if (code) fprintf(stderr, "%s\\n", @p@error(code));
 *  @p@destroy(model);
 */
"""

_BOTTOM = """
#ifdef __cplusplus
}
#endif
#endif
"""
