"""Tokenizes texts for the text encoder: CLIP's byte-pair encoding, from the checkpoint's files or newly trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.files import check_size, read_json, read_text, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import tokenizers

    from mlx_aimv2.config import Aimv2TextConfig

CONTEXT = 77
BOS = "<|startoftext|>"
EOS = "<|endoftext|>"

VOCAB_SIZE = 49408
"""CLIP's size, the default limit where a vocabulary is trained; short captions make fewer tokens."""

# CLIP's words: the two special tokens, English contractions, runs of letters, single digits, runs of anything else.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Texts -> (B, L) int32: BOS, the text's tokens, EOS; padded with EOS to the longest; at most `context`."""

    def __init__(self, backend: tokenizers.Tokenizer, *, bos: int, eos: int, context: int = CONTEXT) -> None:
        # The file may configure truncation and padding; __call__ does both so that EOS is the last token.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos = bos
        self.eos = eos
        self.context = context

    @property
    def size(self) -> int:
        """The number of tokens."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_folder(cls, folder: Path, *, config: Aimv2TextConfig | None = None) -> Tokenizer:
        """From tokenizer.json, else vocab.json and merges.txt; `config` gives the context and the expected sizes."""
        backend, file = _read(folder)
        names = _special_tokens(folder)
        special: list[int] = []
        for role in ("bos_token", "eos_token"):
            if (number := backend.token_to_id(names[role])) is None:
                raise ValueError(f"{file} has no token {names[role]!r:.80}, which must be its {role}")
            special.append(number)
        bos, eos = special
        if config is None:
            return cls(backend, bos=bos, eos=eos)
        size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        if size > config.vocab_size:
            raise ValueError(f"{file} has {size} tokens, but the text encoder's embedding has {config.vocab_size} rows")
        if eos != config.eos_token_id:
            raise ValueError(
                f"{file} gives {names['eos_token']!r} the id {eos}, but config.json's eos_token_id is "
                f"{config.eos_token_id}"
            )
        return cls(backend, bos=bos, eos=eos, context=config.max_position_embeddings)

    def save_to(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as transformers reads CLIP's."""
        bos, eos = map(self.backend.id_to_token, (self.bos, self.eos))
        (folder / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
        about: dict[str, Any] = {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": eos,
            "unk_token": eos,
            "model_max_length": self.context,
        }
        write_json(folder / "tokenizer_config.json", about)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> their text, in lower case, with a space after each word."""
        return self.backend.decode(list(ids)).replace("</w>", " ").strip()

    def __call__(self, texts: str | Sequence[str]) -> NDArray[np.int32]:
        """One text or several -> ids (B, L) int32."""
        batch = list(texts) if isinstance(texts, (list, tuple)) else [texts]
        if not batch:
            raise ValueError("no text to tokenize: give a text or a list of them")
        for number, text in enumerate(batch):
            if not isinstance(text, str):
                raise ValueError(f"text {number} must be a string, got {type(text).__name__}: {text!r:.60}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text {number} is not valid Unicode: {error.reason} at {error.start}") from None
        rows = []
        for encoding in self.backend.encode_batch(batch, add_special_tokens=False):
            rows.append([self.bos, *encoding.ids[: self.context - 2], self.eos])
        ids = np.full((len(rows), max(map(len, rows))), self.eos, np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return ids


def _read(folder: Path) -> tuple[tokenizers.Tokenizer, Path]:
    """The tokenizer in a folder's files, and the file that has its tokens."""
    import tokenizers

    file, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    read = [file] if file.is_file() else [vocab, merges]
    if not all(one.is_file() for one in read):
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json (nor vocab.json and merges.txt together), so no text can be read"
        )
    try:
        if read == [file]:
            return tokenizers.Tokenizer.from_str(read_text(file)), file
        check_size(vocab)
        check_size(merges)
        tokens, pairs = tokenizers.models.BPE.read_file(str(vocab), str(merges))
        unknown = _special_tokens(folder)["unk_token"]
        backend = clip_backend(tokens, pairs, unknown=unknown if unknown in tokens else EOS)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and panics with a BaseException
        reason = " ".join(str(error).split())
        raise ValueError(f"no tokenizer can be built from {' and '.join(map(str, read))}: {reason:.200}") from None
    made = {left + right for left, right in pairs}
    lost = [token for token in tokens if token.endswith("</w>") and len(token) > len("x</w>") and token not in made]
    if lost:  # a truncated file would otherwise silently split words into letters
        raise ValueError(f"{merges} is incomplete: no line of it makes {len(lost):,} tokens of {vocab}")
    return backend, vocab


def clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]], *, unknown: str = EOS) -> tokenizers.Tokenizer:
    """CLIP's byte-pair encoding with this vocabulary; `unknown` stands for a byte without a token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=unknown,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # CLIP also joins runs of spaces; the split below drops them all.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (BOS, EOS)])
    return backend


def _special_tokens(folder: Path) -> dict[str, str]:
    """This checkpoint's tokens for start of text, end of text and unknown: CLIP's, unless a file names others."""
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        fields = read_json(file) if file.exists() else {}
        for role in names:
            name = fields.get(role)
            name = name.get("content") if isinstance(name, dict) else name
            if isinstance(name, str):
                names[role] = name.encode(errors="replace").decode()  # bytes that are not text are in no vocabulary
    return names


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE, context: int = CONTEXT) -> Tokenizer:
    """Captions -> a tokenizer of at most `vocab_size` tokens; bytes are tokens, so it can encode any text.

    Raises ValueError if there is no room for the bytes.
    """
    from tokenizers import pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Tokens not named here get their ids in hash order, which differs between processes.
    fixed = [*alphabet, *(f"{byte}</w>" for byte in alphabet), BOS, EOS]
    if vocab_size < len(fixed):
        raise ValueError(
            f"a vocabulary has at least {len(fixed):,} tokens (each byte twice, BOS, EOS), got {vocab_size:,}"
        )
    backend = clip_backend({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=fixed,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Rebuilt, because training marks all named tokens as special.
    model = json.loads(backend.to_str())["model"]
    vocab = model["vocab"]
    backend = clip_backend(vocab, [(left, right) for left, right in model["merges"]])
    return Tokenizer(backend, bos=vocab[BOS], eos=vocab[EOS], context=context)
