"""Train tiny-chat, the model that the demo and the tests serve, on one CPU core in half an hour.

    python -m examples.training.train [--steps N] [--polish] [--output DIRECTORY]

Everything random is drawn from `--seed`; the same Python, torch and number of threads give the same weights.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from examples.training.conversations import conversations, render
from examples.training.corpus import lessons, prose
from examples.training.tokenizer import save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 2048
ROW = 384  # tokens: longer than the longest answer and its question
ROWS = 4  # per step
WARM_UP = 40  # steps


@dataclass(frozen=True, slots=True)
class Stage:
    """What a run practises: the highest learning `rate`, the share of `prose` at first, `essays` for 154 answers."""

    rate: float
    prose: float
    essays: int


LEARN = Stage(rate=2e-3, prose=0.45, essays=12)
POLISH = Stage(rate=8e-4, prose=0.05, essays=27)
SAMPLES = (
    "What is a for loop?",
    "Tell me about the `with` statement.",
    "What does __len__ do?",
    "Explain lambda expressions.",
    "Who are you?",
)
# In the hub's own words, as Qwen3's config.json: two key-value heads, so that four ranks must copy them.
ARCHITECTURE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 640,
    "max_position_embeddings": 2048,
    "max_window_layers": 4,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}


def create(seed: int) -> tuple[Tokenizer, Any]:
    """A tokenizer trained on the text, and a model with random weights."""
    chats = conversations(lessons(), random.Random(seed), LEARN.essays)
    tokenizer = train_tokenizer(prose() + [next(chats) for _ in range(2000)], VOCABULARY)
    assert tokenizer.get_vocab_size() == VOCABULARY, f"the text gave only {tokenizer.get_vocab_size()} tokens"
    return tokenizer, Qwen3ForCausalLM(Qwen3Config(**ARCHITECTURE | {"torch_dtype": "float32"}))


def load(directory: Path) -> tuple[Tokenizer, Any]:
    """What an earlier run saved there."""
    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return Tokenizer.from_file(str(directory / "tokenizer.json")), model.train()


def rows(tokenizer: Tokenizer, rng: random.Random, steps: int, stage: Stage) -> Iterator[torch.Tensor]:
    """One batch per step, [ROWS, ROW] token ids: `stage.prose` of it prose at first, then ever less."""
    text = tokenizer.encode("<|endoftext|>".join(prose())).ids
    chat = conversations(lessons(), rng, stage.essays)
    for step in range(steps):
        share = (stage.prose - 0.05) * (1 - step / steps) + 0.05
        batch = [_slice(text, rng) if rng.random() < share else _pack(tokenizer, chat) for _ in range(ROWS)]
        yield torch.tensor(batch)


def _slice(ids: list[int], rng: random.Random) -> list[int]:
    start = rng.randrange(len(ids) - ROW)
    return ids[start : start + ROW]


def _pack(tokenizer: Tokenizer, chat: Iterator[str]) -> list[int]:
    ids: list[int] = []
    while len(ids) < ROW:
        ids += tokenizer.encode(next(chat) + "<|endoftext|>").ids
    return ids[:ROW]


def rate(peak: float, step: int, steps: int) -> float:
    """The learning rate: linear up, then a cosine down to a hundredth of the peak."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def train(model: Any, batches: Iterator[torch.Tensor], steps: int, peak: float) -> float:
    """Run the steps, printing the loss as it falls; returns the mean of the last fifty."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    losses: list[float] = []
    started = time.monotonic()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(peak, step, steps)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 25 == 24 or step == steps - 1:
            recent = sum(losses[-25:]) / len(losses[-25:])
            print(f"step {step:5d}  loss {recent:6.3f}  {time.monotonic() - started:6.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def save(model: Any, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the checkpoint in bfloat16, in the files a hub repository has."""
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    ends, start = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    config = ARCHITECTURE | {"bos_token_id": start, "eos_token_id": ends}
    generation = {"bos_token_id": start, "do_sample": False, "eos_token_id": [ends, start], "pad_token_id": start}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    save_tokenizer(tokenizer, directory)


def answer(model: Any, tokenizer: Tokenizer, question: str, limit: int = 300) -> tuple[str, bool]:
    """The greedy answer of at most `limit` tokens, and whether the model ended it itself."""
    prompt = render([(question, "")]).removesuffix("<|im_end|>\n")
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    end = tokenizer.token_to_id("<|im_end|>")
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )[0, ids.shape[1] :].tolist()
    return str(tokenizer.decode(out, skip_special_tokens=True)), out[-1] == end


def main() -> None:
    """Train the tokenizer, then the model; save both and print what it answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--polish", action="store_true", help="go on from the model in --output, almost only conversations"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "tiny-chat")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    rng = random.Random(options.seed)

    stage = POLISH if options.polish else LEARN
    tokenizer, model = load(options.output) if options.polish else create(options.seed)
    print(f"seed {options.seed}, {model.num_parameters():,} parameters, {options.steps} steps, {stage}")
    loss = train(model, rows(tokenizer, rng, options.steps, stage), options.steps, stage.rate)
    save(model, tokenizer, options.output)
    print(f"final loss {loss:.3f}; saved {options.output}")
    model = model.float().eval()
    for question in SAMPLES:
        print(f"> {question}\n{answer(model, tokenizer, question)}")


if __name__ == "__main__":
    main()
