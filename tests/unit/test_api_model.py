"""What the model's files say of its text."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.api_server import TINY_CHAT

from lockstep_runtime.api.chat_template import Chat
from lockstep_runtime.api.model import ModelUnavailableError, SamplingDefaults, ServedModel, load, sampling_defaults
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol.step import SamplingParams


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(TINY_CHAT / "tokenizer.json", tmp_path)
    return tmp_path


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def read(folder: Path) -> ServedModel:
    return load(ServeConfig(model=str(folder), served_name="m"))


def rendered(model: ServedModel) -> str:
    assert model.template is not None
    return model.template.render(Chat(messages=[]), seconds=5, limit=1000)


def test_every_file_has_its_say_on_what_ends_an_answer(folder: Path) -> None:
    write(folder, "config.json", {"eos_token_id": 5, "text_config": {"eos_token_id": 6}})
    write(folder, "generation_config.json", {"eos_token_id": [7, 8]})
    write(folder, "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}})
    model = read(folder)
    assert model.stop_ids == {5, 6, 7, 8, model.tokenizer.id_of("<|im_end|>")}


def test_a_tokenizer_alone_is_a_model_for_completions(folder: Path) -> None:
    model = read(folder)
    assert model.template is None
    assert model.stop_ids == frozenset()
    assert model.defaults == SamplingDefaults()


@pytest.mark.parametrize("listed", [True, False])
def test_the_template_may_stand_in_the_settings(folder: Path, listed: bool) -> None:
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a{{ bos_token }}{{ unk_token }}"}]
    template = named if listed else named[1]["template"]
    write(folder, "tokenizer_config.json", {"chat_template": template, "bos_token": "<s>", "unk_token": None})
    assert rendered(read(folder)) == "a<s>"


def test_the_templates_own_file_goes_first(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": "settings"})
    write(folder, "chat_template.json", {"chat_template": "json"})
    assert rendered(read(folder)) == "json"
    write(folder, "chat_template.jinja", "file")
    assert rendered(read(folder)) == "file"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{", "tokenizer.json can't be used"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("generation_config.json", "[]", "generation_config.json should hold a JSON object"),
        (
            "chat_template.jinja",
            "{% if %}",
            "chat_template.jinja: the chat template is malformed in line 1",
        ),
    ],
)
def test_what_is_wrong_is_named(folder: Path, name: str, content: str, words: str) -> None:
    write(folder, name, content)
    with pytest.raises(ModelUnavailableError, match=words):
        read(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "chat_template.jinja",
            b"{{ messages }}\ncaf\xe9",
            "line 2 has the byte 0xE9 .Latin-1, perhaps.",
        ),
        ("chat_template.jinja", b"\xef\xbb\xbf{{ messages }}", "begins with a byte order mark"),
        ("additional_chat_templates/rag.jinja", b"caf\xe9", "rag.jinja is not UTF-8"),
        ("tokenizer_config.json", b"\xff\xfe{\x00}\x00", "begins with a byte order mark"),
        ("generation_config.json", b"", "generation_config.json is empty"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
    ],
)
def test_files_in_another_encoding_are_named(folder: Path, name: str, content: bytes, words: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ModelUnavailableError, match=words):
        read(folder)


@pytest.mark.parametrize(
    ("template", "line", "words"),
    [
        ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", 2, "unexpected '}'"),
        ("a\n\n{% generation %}b", 3, "endgeneration"),
        ("{{ messages | nosuchfilter }}", 1, "No filter named 'nosuchfilter'"),
        ("a\n{% unheard %}", 2, "unknown tag 'unheard'"),
    ],
)
def test_a_malformed_template_is_named_with_its_line(folder: Path, template: str, line: int, words: str) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(ModelUnavailableError, match=f"malformed in line {line}: .*{words}") as caught:
        read(folder)
    assert f"chat_template in {folder}/tokenizer_config.json" in str(caught.value)


def test_named_templates_have_a_default_or_the_model_says_which_there_are(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    write(folder, "additional_chat_templates/tool_use.jinja", "t")
    write(folder, "additional_chat_templates/rag.jinja", "r")
    model = read(folder)
    assert model.template is None
    assert "(rag, tool_use) have no default" in model.why_no_template
    write(folder, "chat_template.jinja", "file")
    assert rendered(read(folder)) == "file"


def test_a_model_with_another_kind_of_tokenizer_file_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ModelUnavailableError, match=r"make one of tokenizer\.model with transformers"):
        read(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailableError, match=r"no tokenizer\.json"):
        read(tmp_path)
    with pytest.raises(ModelUnavailableError, match=r"the model directory can't be found: .*nowhere does not exist"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"do_sample": False, "temperature": 0.6}, SamplingDefaults(temperature=0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1},
            SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1),
        ),
        ({"temperature": None, "top_p": 7, "top_k": -1, "min_p": "a"}, SamplingDefaults()),
        (
            {"repetition_penalty": 1.05, "max_new_tokens": 2048},
            SamplingDefaults(repetition_penalty=1.05, max_tokens=2048),
        ),
        (
            {"do_sample": False, "repetition_penalty": 1.1},
            SamplingDefaults(temperature=0, repetition_penalty=1.1),
        ),
        ({"repetition_penalty": 0, "max_new_tokens": 0}, SamplingDefaults()),
    ],
)
def test_sampling_that_the_models_authors_advise(generation: dict[str, object], expected: SamplingDefaults) -> None:
    assert sampling_defaults(generation) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["content", "name", "template", "default"]), inner, max_size=3)
    ),
    max_leaves=5,
)
SETTINGS = st.dictionaries(
    st.sampled_from(
        [
            "eos_token_id",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "do_sample",
            "eos_token",
            "chat_template",
            "vocab_size",
        ]
    ),
    JSON,
    max_size=4,
)


@given(SETTINGS, SETTINGS, SETTINGS)
@settings(max_examples=100)
@example({"top_k": 10**30, "eos_token_id": True}, {"eos_token": {"content": ["x"]}}, {"text_config": 3})
def test_whatever_the_settings_hold_a_request_can_be_made_with_them(
    generation: dict[str, object], tokenizer: dict[str, object], model: dict[str, object]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(TINY_CHAT / "tokenizer.json", folder)
        write(folder, "generation_config.json", generation)
        write(folder, "tokenizer_config.json", tokenizer)
        write(folder, "config.json", model)
        served = read(folder)
    defaults = served.defaults
    params = SamplingParams(
        temperature=defaults.temperature, top_p=defaults.top_p, top_k=defaults.top_k, min_p=defaults.min_p
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert 0 <= defaults.temperature <= 2
    assert 0 < defaults.top_p <= 1
    assert all(type(id) is int and id >= 0 for id in served.stop_ids)
