"""A real checkpoint that answers as it is told: each token of a script makes the next one all but certain.

The model is a Markov chain. Embeddings are one-hot, attention and MLP add nothing, and the head has one row per token,
large where the token before it stands. So every token may have one place only: a text is cut into pieces of which no
two are equal. The chat template ends a prompt with a token that begins a script, chosen by the conversation's last
message. Calls are rendered in Hermes' format, as Qwen's templates do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from tests.support.models import ModelShape, random_tensors
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

START: Final = "<|im_start|>"
END: Final = "<|im_end|>"
PIECE: Final = 3  # characters at least
CERTAIN: Final = 4.0  # times the root of the hidden size is the next token's logit; the others have 0
HEADS: Final = 2

_TEMPLATE: Final = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- set last = messages[-1] %}
{%- if false %}CHOICE{%- endif %}
{%- endif %}"""


@dataclass(frozen=True, slots=True)
class Script:
    """What the model says where the last message is of this role and contains these words; the first that fits. An
    empty string fits everything."""

    role: str
    words: str
    text: str

    @property
    def token(self) -> str:
        return f"<|{self.role}:{self.words}|>"


def call(name: str, **arguments: object) -> str:
    """As the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def write_scripted_model(directory: Path, scripts: Sequence[Script]) -> Path:
    """A folder as a hub's."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, chains = _tokenizer(scripts)
    rows = -(-tokenizer.get_vocab_size(with_added_tokens=True) // 64) * 64
    shape = ModelShape(hidden=rows, intermediate=64, layers=1, heads=HEADS, kv_heads=HEADS, vocabulary=rows)
    end = _id(tokenizer, END)
    tokenizer.save(str(directory / "tokenizer.json"))
    save_file(dict(_tensors(shape, chains, end)), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(shape.config() | {"eos_token_id": end}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "do_sample": False}))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
    )
    (directory / "chat_template.jinja").write_text(_template(scripts))
    return directory


def _tokenizer(scripts: Sequence[Script]) -> tuple[Tokenizer, list[list[int]]]:
    """And each script's chain of ids, from the token that begins it to the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate(alphabet)}
    chains = []
    for script in scripts:
        pieces = [_spelled(piece) for piece in _pieces(script.text, set(vocabulary))]
        vocabulary |= {piece: len(vocabulary) + index for index, piece in enumerate(pieces)}
        chains.append([vocabulary[piece] for piece in pieces])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text) for text in (START, END, *(one.token for one in scripts))])
    begun = [_id(tokenizer, script.token) for script in scripts]
    return tokenizer, [[first, *chain, _id(tokenizer, END)] for first, chain in zip(begun, chains, strict=True)]


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def _pieces(text: str, taken: set[str]) -> list[str]:
    """Parts of a text, none of them equal to another or to what is taken."""
    pieces: list[str] = []
    at = 0
    while at < len(text):
        sizes = range(min(PIECE, len(text) - at), len(text) - at + 1)
        size = next((size for size in sizes if _spelled(text[at : at + size]) not in taken), None)
        if size is None:  # the rest stands somewhere else: it belongs to the piece before
            if not pieces:
                raise ValueError(f"Another script has this text: {text}")
            rest = pieces.pop() + text[at:]
            return [*pieces, rest]
        pieces.append(text[at : at + size])
        taken.add(_spelled(pieces[-1]))
        at += size
    return pieces


def _spelled(text: str) -> str:
    """As a byte-level vocabulary writes it."""
    [(spelled, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return str(spelled)


def _tensors(shape: ModelShape, chains: Sequence[Sequence[int]], end: int) -> Iterator[tuple[str, Tensor]]:
    one_hot = torch.eye(shape.hidden)
    following = torch.full((shape.hidden,), end)  # what is in no script ends the answer
    for chain in chains:
        following[chain[:-1]] = torch.tensor(chain[1:])
    for name, tensor in random_tensors(shape, seed=0):
        if name == "model.embed_tokens.weight":
            yield name, one_hot
        elif name == "lm_head.weight":
            yield name, (one_hot[following].T * CERTAIN).contiguous()
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            yield name, torch.zeros_like(tensor)
        elif "norm" in name:
            yield name, torch.ones_like(tensor)
        else:
            yield name, tensor


def _template(scripts: Sequence[Script]) -> str:
    choices = "".join(
        f"{{%- elif {script.role!r} in last.role and {script.words!r} in last.content %}}{{{{- {script.token!r} }}}}"
        for script in scripts
    )
    return _TEMPLATE.replace("CHOICE", choices)
