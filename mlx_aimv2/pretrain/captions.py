"""Trains a tokenizer on captions: CLIP's byte-pair encoding with a vocabulary of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_aimv2.files import write_json
from mlx_aimv2.tokenizer import BOS, EOS, Tokenizer, clip_backend

if TYPE_CHECKING:
    import tokenizers

VOCAB_SIZE = 49408
"""CLIP's size, the default limit; short captions make fewer tokens."""

MIN_FREQUENCY = 2


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE) -> tokenizers.Tokenizer:
    """Captions -> a tokenizer of at most `vocab_size` tokens; bytes are tokens, so any text can be written in it.

    Raises ValueError where there is no room for the bytes.
    """
    from tokenizers import pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Tokens that are not named here get their ids in the order of a hash table, another one in each process.
    fixed = [*alphabet, *(f"{byte}</w>" for byte in alphabet), BOS, EOS]
    least = len(fixed)
    if vocab_size < least:
        raise ValueError(f"a vocabulary has at least {least} tokens (each byte twice, BOS, EOS), got {vocab_size}")
    backend = clip_backend({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=fixed,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Made anew, because training has marked all that was named as special.
    model = json.loads(backend.to_str())["model"]
    return clip_backend(model["vocab"], [(left, right) for left, right in model["merges"]])


def as_tokenizer(backend: tokenizers.Tokenizer, *, context: int) -> Tokenizer:
    """The package's tokenizer around it."""
    bos, eos = (backend.token_to_id(token) for token in (BOS, EOS))
    if bos is None or eos is None:
        raise ValueError(f"a tokenizer needs the tokens {BOS} and {EOS}")
    return Tokenizer(backend, bos=bos, eos=eos, context=context)


def save_tokenizer(backend: tokenizers.Tokenizer, folder: Path, *, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as transformers reads CLIP's."""
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    about: dict[str, Any] = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": EOS,
        "model_max_length": context,
    }
    write_json(folder / "tokenizer_config.json", about)
