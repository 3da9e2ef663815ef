"""Small tokenizers of every kind that models bring, made with the library that reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPACE: Final = "\u2581"
WORDS: Final = ("hello", "world", "don", "'", "t", "é", "日", "本", ".", ",")
LETTERS: Final = tuple(map(chr, range(33, 127)))
SPECIAL: Final = ("<unk>", "<s>", "</s>")
BYTES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))


def _ids(*tokens: str) -> dict[str, int]:
    return {token: id for id, token in enumerate(dict.fromkeys(tokens))}


def _with_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("two words", normalized=False)])
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2's kind, Qwen's, Llama 3's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=_ids(*alphabet, "Ġh", "ell"), merges=[("Ġ", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer)


def _sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    vocabulary = _ids(*SPECIAL, *BYTES, SPACE, *LETTERS, *WORDS, *(SPACE + word for word in WORDS))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoder
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _with_special(tokenizer)


def llama() -> Tokenizer:
    """Llama 2's and Mistral's: spaces as a letter, bytes where there is no token."""
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _sentencepiece(decoders.Sequence(parts))


def gemma() -> Tokenizer:
    return _sentencepiece(decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]))


def metaspace() -> Tokenizer:
    vocabulary = _ids(*SPECIAL, SPACE, *LETTERS, *WORDS, *(SPACE + word for word in WORDS))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _with_special(tokenizer)


def word_piece() -> Tokenizer:
    vocabulary = _ids(*SPECIAL, *WORDS, *("##" + word for word in WORDS), *LETTERS, *("##" + one for one in LETTERS))
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return _with_special(tokenizer)


def suffixed() -> Tokenizer:
    """The first BPE: a word's last token carries its end."""
    vocabulary = _ids(*SPECIAL, *LETTERS, *WORDS, *(word + "</w>" for word in (*WORDS, *LETTERS)))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    return _with_special(tokenizer)


def without_decoder() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocab=_ids(*SPECIAL, *WORDS), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _with_special(tokenizer)


KINDS: Final[dict[str, Callable[[], Tokenizer]]] = {
    make.__name__: make for make in (byte_level, llama, gemma, metaspace, word_piece, suffixed, without_decoder)
}
