"""The example model is what its README says: small, well-formed, loadable by others, and able to chat."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dev.demo import EXAMPLE, LONG_QUESTION, PATCH
from dev.demo_faults import FAULTS, MAX_TOKENS
from examples.training.conversations import render
from examples.training.train import SAMPLES
from safetensors import safe_open
from tests.support.chart import CRD_SOURCE
from tests.support.command_line import configuration
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lockstep_operator.decisions.strategic_merge import merge

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "tiny-chat"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MODEL / "config.json").read_text())
    return loaded


def greedy(model: Any, tokenizer: Any, question: str, limit: int) -> list[int]:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=limit, do_sample=False)
    answer: list[int] = out[0, prompt["input_ids"].shape[1] :].tolist()
    return answer


def test_weights_are_small_and_in_bfloat16() -> None:
    path = MODEL / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with safe_open(str(path), framework="pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert dtypes == {"BF16"}


def test_shape_divides_over_four_ranks_and_makes_them_share_kv_heads(config: dict[str, Any]) -> None:
    assert config["num_attention_heads"] % 4 == 0
    assert config["num_key_value_heads"] == 2
    assert config["intermediate_size"] % 4 == 0
    assert config["vocab_size"] % 4 == 0


def test_every_weight_is_used_and_none_is_missing() -> None:
    _, report = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_vocabulary_matches_the_embedding(tokenizer: Any, config: dict[str, Any]) -> None:
    assert len(tokenizer) == config["vocab_size"]


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x ** 2\n", "Grüße, 世界! \U0001f600", "  two  spaces\t\n\n", "1234.5e6", ""]
)
def test_tokenizer_gives_back_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_json_alone_gives_the_same_ids(tokenizer: Any) -> None:
    text = render([("What is 1234?", "It's a number:\n\n  `1_234` \u2026")])
    assert Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text).ids == tokenizer.encode(text)


def test_chat_template_writes_what_the_model_was_trained_on(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
    ]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    assert written == render([("Hi", "Hello!")], "Answer briefly.")
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_special_tokens_are_single_ids(tokenizer: Any, config: dict[str, Any]) -> None:
    (end,) = tokenizer.encode("<|im_end|>")
    assert end == tokenizer.eos_token_id == config["eos_token_id"]


@pytest.mark.parametrize("question", SAMPLES[:2])
def test_a_greedy_answer_is_words_and_ends_by_itself(model: Any, tokenizer: Any, question: str) -> None:
    answer = greedy(model, tokenizer, question, limit=150)
    assert answer[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(answer[:-1])
    assert text.isprintable()
    assert len(text.split()) >= 8
    assert text.endswith(".")


def test_readme_shows_the_answer_the_model_gives(model: Any, tokenizer: Any) -> None:
    readme = " ".join((EXAMPLES / "README.md").read_text().split())
    for question in SAMPLES:
        answer = tokenizer.decode(greedy(model, tokenizer, question, limit=150), skip_special_tokens=True)
        assert question in readme
        assert answer in readme


def test_the_demos_faults_meet_its_answer(model: Any, tokenizer: Any) -> None:
    tokens = len(greedy(model, tokenizer, LONG_QUESTION, limit=MAX_TOKENS))
    assert max(drawn for _, _, drawn in FAULTS) + 50 < tokens < MAX_TOKENS


def test_the_demos_patch_allows_faults_and_nothing_else() -> None:
    plain, patch = (yaml.safe_load((EXAMPLES.parent / path).read_text()) for path in (EXAMPLE, PATCH))
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    assert "template" not in plain["spec"]  # which a merge patch would replace
    assert container["name"] == "lockstep"
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert list(given) == ["LOCKSTEP_ALLOW_FAULTS"]
    assert configuration(["serve", "m"], given).allow_faults
    assert not configuration(["serve", "m"]).allow_faults
    patched = merge(plain, patch)
    assert {**patched["spec"], "template": None} == {**plain["spec"], "template": None}
    assert "template" in schema()["properties"]["spec"]["properties"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_custom_resources_name_one_source_and_whole_pods(path: Path) -> None:
    resource = yaml.safe_load(path.read_text())
    assert (resource["apiVersion"], resource["kind"]) == ("lockstep.dev/v1beta1", "TensorParallelModel")
    spec = resource["spec"]
    assert len({"huggingFace", "persistentVolumeClaim", "hostPath"} & spec["model"].keys()) == 1
    assert spec["tensorParallelSize"] % spec["ranksPerPod"] == 0
    assert list(unknown(resource, schema())) == []


def schema() -> dict[str, Any]:
    crd = yaml.safe_load(CRD_SOURCE.read_text())
    found: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def unknown(value: dict[str, Any], schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """What the API server would refuse or silently drop: fields without a schema, values outside an enum."""
    for key, child in value.items():
        here = schema.get("properties", {}).get(key)
        if here is None and schema.get("x-kubernetes-preserve-unknown-fields"):
            continue
        if here is None:
            yield f"{at}.{key} is not in the schema"
        elif "enum" in here and child not in here["enum"]:
            yield f"{at}.{key} must be one of {here['enum']}"
        elif isinstance(child, dict) and at + key != "metadata":
            yield from unknown(child, here, f"{at}.{key}")


def test_a_misspelt_field_is_found() -> None:
    resource = {"spec": {"model": {"hostPth": {}}, "backend": "mpi"}}
    assert len(list(unknown(resource, schema()))) == 2
