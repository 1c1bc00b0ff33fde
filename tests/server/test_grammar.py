"""Grammars of a vocabulary that lacks characters they need."""

from __future__ import annotations

import pytest

from llmc.server.grammar import Grammars
from llmc.server.http_errors import ApiError

VOCABULARY = ["<unk>", "</s>", *"abc"]


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(VOCABULARY)}, [],
                                     unk_token="<unk>"))
    tokenizer.add_special_tokens(VOCABULARY[:2])
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("letters") / "tokenizer.json"
    tokenizer.save(str(path))
    return Grammars(path, len(VOCABULARY), [1])


def follow(grammars: Grammars, kind: str, source: object, steps: int = 4) -> list[int]:
    """The first allowed token of each step."""
    matcher, tokens = grammars.compile(kind, source)(), []
    for _ in range(steps):
        (bits,) = matcher.mask().tolist()
        tokens.append((bits & -bits).bit_length() - 1)
        matcher.accept(tokens[-1])
    return tokens


def test_what_the_vocabulary_has_is_followed(grammars):
    assert follow(grammars, "regex", "cab", 3) == [4, 2, 3]


@pytest.mark.parametrize(("kind", "source", "where"), [
    ("json", {"type": "object"}, ": no tokens spell what it needs, from '{' on"),
    ("regex", "z+", ": no tokens spell what it needs, from 'z' on"),
    ("regex", "\u00e9+", "")])
def test_what_it_lacks_is_told_as_such(grammars, kind, source, where):
    with pytest.raises(ApiError) as refused:
        follow(grammars, kind, source)
    assert refused.value.status == 400 and refused.value.code == "invalid_grammar"
    assert refused.value.message == f"the model's vocabulary cannot write this grammar{where}"
