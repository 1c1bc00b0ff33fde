"""Tokenizers: golden ids, decoding in pieces, chat templates, and files that are no tokenizers."""

import json
from pathlib import Path

import pytest

import llmc
from llmc.errors import ModelError, ShapeError
from llmc.frontend.tokenizer import Tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens" / "models"
STORIES = Path(llmc.__file__).parent / "data" / "stories260K"
DIRECTORIES = {"stories260K": STORIES, "tinystories656K": GOLDENS / "tinystories656K"}


@pytest.fixture(params=DIRECTORIES)
def golden(request):
    content = json.loads((GOLDENS / request.param / "golden.json").read_text())
    return Tokenizer.load(DIRECTORIES[request.param]), content["goldens"]


def test_golden_ids_and_text(golden):
    tokenizer, cases = golden
    for case in cases:
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        text = tokenizer.decode(case["prompt_ids"] + case["greedy_ids"])
        assert text.strip() == case["text"].strip()


def test_streaming_gives_the_same_text(golden):
    tokenizer, cases = golden
    for case in cases:
        stream = tokenizer.stream(case["prompt_ids"])
        pieces = [stream.push(token) for token in case["greedy_ids"]]
        assert case["text"].endswith("".join(pieces) + stream.finish())
        assert pieces[0] and pieces[-1]  # nothing is held back without need


@pytest.mark.parametrize(
    "text", ["😀😀 wörld — 日本語", "  two  spaces\n\n", "", " a", "a \ufffd b"]
)
def test_streaming_cuts_where_characters_end(text):
    tokenizer = Tokenizer.load(STORIES)
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert all(piece in text for piece in pieces)


def test_an_unfinished_character_is_shown_at_the_end():
    tokenizer = Tokenizer.load(STORIES)
    ids = tokenizer.encode("😀", add_special_tokens=False)[:-1]
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == [""] * len(ids)
    assert stream.finish() == tokenizer.decode(ids)
    assert stream.finish() == ""


def test_bytes_that_are_no_characters_do_not_pile_up():
    tokenizer = Tokenizer.load(STORIES)
    byte = tokenizer.token_id("<0xFF>")
    stream = tokenizer.stream()
    pieces = [stream.push(byte) for _ in range(40)]
    assert "".join(pieces) + stream.finish() == "\ufffd" * 40
    assert any(pieces)


def test_special_tokens():
    tokenizer = Tokenizer.load(STORIES)
    assert tokenizer.special_tokens == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.token_id("</s>") == 2 and tokenizer.token_id("no such token") is None
    assert tokenizer.vocab_size == 512
    assert tokenizer.encode("", add_special_tokens=True) == [1]
    assert tokenizer.decode([1, 403], skip_special_tokens=False).startswith("<s>")


def test_loading_that_was_begun_is_taken_once():
    Tokenizer.begin(STORIES)
    first = Tokenizer.load(STORIES, trusted=True)
    assert first.encode("Once") == Tokenizer.load(STORIES).encode("Once")
    assert Tokenizer.load(STORIES, trusted=True) is not first


def test_loading_that_was_begun_and_failed_says_why(tmp_path):
    Tokenizer.begin(tmp_path)
    with pytest.raises(ModelError, match="no such file"):
        Tokenizer.load(tmp_path, trusted=True)


@pytest.mark.parametrize("token", [-1, 512, 2**32, 2**40])
def test_ids_outside_the_vocabulary(token):
    with pytest.raises(ShapeError, match=str(token)):
        Tokenizer.load(STORIES).decode([1, token])


def test_text_that_is_no_unicode():
    with pytest.raises(ShapeError, match="tokenize"):
        Tokenizer.load(STORIES).encode("\ud800")


def with_model(tmp_path, **model):
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", **model}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path


BAD_MERGES = {
    "no such token": ["a b", "x y"],
    "no such result": ["b a"],
    "three": ["a b ab"],
    "numbers": [[1, 2]],
    "not a list": {"a": "b"},
}


@pytest.mark.parametrize("case", BAD_MERGES)
def test_bad_merges_are_refused_in_one_line(tmp_path, capfd, case):
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    with pytest.raises(ModelError, match=r"tokenizer\.json.*merge"):
        Tokenizer.load(with_model(tmp_path, vocab=vocabulary, merges=BAD_MERGES[case]))
    assert capfd.readouterr().err == ""


def test_good_merges(tmp_path):
    directory = with_model(tmp_path, vocab={"a": 0, "b": 1, "ab": 2}, merges=["a b"])
    assert Tokenizer.load(directory).encode("ab") == [2]
    assert Tokenizer.load(directory, trusted=True).encode("ba") == [1, 0]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b"{}", b"\xff", b'{"model": 3}'])
def test_files_that_are_no_tokenizers(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    for trusted in (False, True):
        with pytest.raises(ModelError, match="tokenizer"):
            Tokenizer.load(tmp_path, trusted)


def test_no_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        Tokenizer.load(tmp_path)


# ---- chat templates ----------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n"
    "{% if m.role == 'system' and not loop.first %}\n"
    "{{ raise_exception('late system') }}{% endif %}\n"
    "<{{ m.role }}>{{ m.content | trim }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": " hi <b> "}]


def chat(tmp_path, template, as_file=False):
    content = (STORIES / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content)
    settings = {"bos_token": {"content": "<s>"}}
    if as_file:
        (tmp_path / "chat_template.jinja").write_text(template)
    else:
        settings["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("as_file", [False, True])
def test_chat_template(tmp_path, as_file):
    tokenizer = chat(tmp_path, TEMPLATE, as_file)
    assert tokenizer.apply_chat_template(MESSAGES) == "<s>\n<user>hi <b>\n<assistant>".replace(
        "<s>\n", "<s>")
    assert "assistant" not in tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)


def test_the_default_of_several_templates(tmp_path):
    several = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    assert chat(tmp_path, several).apply_chat_template(MESSAGES) == "yes"


def test_tojson_does_not_escape_html(tmp_path):
    text = chat(tmp_path, "{{ tools | tojson }}").apply_chat_template(MESSAGES, tools=["<é>"])
    assert text == '["<é>"]'


def test_a_template_may_refuse_messages(tmp_path):
    late = [*MESSAGES, {"role": "system", "content": "x"}]
    with pytest.raises(ShapeError, match="late system"):
        chat(tmp_path, TEMPLATE).apply_chat_template(late)


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages.append(1) }}",
                                      "{{ ''.__class__.__mro__[1].__subclasses__() }}"])
def test_broken_and_unsafe_templates(tmp_path, template):
    with pytest.raises(ModelError, match="template"):
        chat(tmp_path, template).apply_chat_template(MESSAGES)


def test_no_template():
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer.load(STORIES).apply_chat_template(MESSAGES)
