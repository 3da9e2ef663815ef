"""Which hub a model is of, by `--source` and by its name, and whose token goes where."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep_runtime.config import Source, UsageError
from lockstep_runtime.sources.choice import choose, other_variables, parse_source
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.tokens import given_token, token_of, without_tokens

CORP = "name=corp,endpoint=https://hub.corp.example,token-variable=CORP_TOKEN,cache=/var/corp"
LAB = "name=lab,endpoint=http://lab:8080,default"


def test_without_sources_a_model_is_of_the_hub_that_the_library_knows() -> None:
    assert choose("Qwen/Qwen3-8B", (), is_folder=False) == ("Qwen/Qwen3-8B", Source())
    assert choose("huggingface:gpt2", (), is_folder=False) == ("gpt2", Source())


def test_a_bare_id_is_of_the_default_source_and_a_qualified_one_of_the_source_it_names() -> None:
    corp = Source(name="corp", endpoint="https://hub.corp.example", token_variable="CORP_TOKEN", cache="/var/corp")
    lab = Source(name="lab", endpoint="http://lab:8080", token_variable=None)
    assert parse_source(CORP) == (corp, False)
    assert choose("org/name", (CORP, LAB), is_folder=False) == ("org/name", lab)
    assert choose("corp:org/name", (CORP, LAB), is_folder=False) == ("org/name", corp)
    assert choose("huggingface:org/name", (CORP, LAB), is_folder=False) == ("org/name", Source())
    assert choose("corp:org/name", (CORP, LAB), is_folder=True)[0] == "corp:org/name"


def test_the_librarys_own_hub_may_be_given_another_token_or_cache() -> None:
    name, source = choose("org/name", ("name=huggingface,token-file=/etc/token",), is_folder=False)
    assert (name, source) == ("org/name", Source(token_file="/etc/token"))


@pytest.mark.parametrize(
    ("sources", "model", "words"),
    [
        (("corp",), "org/name", "'corp' is not understood: write it like name=corp"),
        (("name=corp,endpoint=https://a,colour=red",), "org/name", "'colour=red' is not understood"),
        (("name=corp,name=lab,endpoint=https://a",), "org/name", "'name=lab' is not understood"),
        (("name=corp,endpoint=",), "org/name", "'endpoint=' is not understood"),
        (("name=Corp,endpoint=https://a",), "org/name", "needs a name of lower-case letters"),
        (("endpoint=https://a",), "org/name", "needs a name"),
        (("name=corp,endpoint=hub.corp",), "org/name", "'hub.corp' is no address"),
        (("name=corp",), "org/name", "--source corp needs an endpoint"),
        (("name=corp,endpoint=https://a,token=hf_x",), "org/name", "a token on the command line is everybody's"),
        ((CORP, CORP), "org/name", "--source corp is given twice"),
        (("name=huggingface,cache=/a", "name=huggingface,cache=/b"), "org/name", "huggingface is given twice"),
        ((LAB, CORP + ",default=true"), "org/name", "lab and corp can't both be the default"),
        ((CORP,), "home:org/name", "there is no source home; there is huggingface, corp"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_source_is_said(sources: tuple[str, ...], model: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose(model, sources, is_folder=False)


def test_a_token_is_taken_out_of_the_environment_of_all_who_do_not_fetch() -> None:
    corp, _ = parse_source(CORP)
    environment = {
        "CORP_TOKEN": " hf_corp\n",
        "HF_TOKEN": "hf_mine",
        "HUGGING_FACE_HUB_TOKEN": "hf_old",
        "PATH": "/bin",
    }
    assert given_token(corp, environment) == "hf_corp"
    assert without_tokens(corp, environment) == {"PATH": "/bin"}
    assert other_variables(corp, (CORP, LAB, "name=huggingface,cache=/a")) == {"HF_TOKEN"}


def test_a_token_is_the_files_or_the_variables_and_never_another_hubs(tmp_path: Path) -> None:
    file = tmp_path / "token"
    corp = Source(name="corp", endpoint="https://hub.corp.example", token_variable=None, token_file=str(file))
    assert token_of(corp, "") is False
    assert token_of(Source(), "") is None  # that of the login
    assert token_of(corp, "hf_given") == "hf_given"
    file.write_text("hf_file\n")
    assert token_of(corp, "hf_given") == "hf_file"
    with pytest.raises(ModelError, match=f"token can't be read: {tmp_path} is a folder"):
        token_of(Source(token_file=str(tmp_path)), "")
