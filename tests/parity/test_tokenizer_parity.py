"""The ids are those of transformers' CLIP tokenizer, with the real vocabulary of 49,408 tokens."""

import gzip
import importlib.util
import json
import random
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tokenizers import pre_tokenizers  # noqa: E402

from mlx_aimv2.config import Aimv2TextConfig  # noqa: E402
from mlx_aimv2.tokenizer import Tokenizer  # noqa: E402
from tests.parity.make_golden_tokenizer import GOLDEN, HARD  # noqa: E402

ENGLISH = (
    "a photo of a {}. a blurry photo of the {}! the {}'s owner isn't here, they've left; we'll see, I'd say: it's {}."
)


MERGES = "bpe_simple_vocab_16e6.txt.gz"


def bundled(name: str) -> Path:
    """A file of open_clip_torch's wheel, without importing it."""
    try:
        files = metadata.files("open_clip_torch") or []
    except metadata.PackageNotFoundError:
        pytest.skip("open_clip_torch, whose wheel carries CLIP's merges, is not installed")
    return Path(next(file for file in files if file.name == name and file.parent.name == "open_clip").locate())


def real_merges() -> list[tuple[str, str]]:
    """CLIP's 48,894 merges, from the file that open_clip_torch carries."""
    lines = gzip.decompress(bundled(MERGES).read_bytes()).decode().split("\n")
    return [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folders with the real vocabulary, as vocab.json and merges.txt and as tokenizer.json; transformers' tokenizer."""
    merges = real_merges()
    # OpenAI's order of the 256 bytes: the printable ones first.
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in letters] + [chr(256 + n) for n in range(256 - len(letters))]
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    assert len(vocab) == 49408

    split = tmp_path_factory.mktemp("split")
    (split / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (split / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    reference = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    joined = tmp_path_factory.mktemp("joined")
    reference.save_pretrained(joined)
    return split, joined, reference


def texts() -> list[str]:
    """The hard strings, English with odd words, and random characters from all of Unicode."""
    dice = random.Random(7)
    anything = [chr(n) for n in range(sys.maxunicode + 1) if not 0xD800 <= n < 0xE000]
    likely = [chr(n) for n in range(0x2FF)]
    words = ["cat", "Zürich", "naïve café", "3 dogs", "x-ray", "O'Brien", "1984", "e=mc²", "🦊", "猫"]
    return [
        *HARD,
        *(ENGLISH.format(*dice.choices(words, k=4)) for _ in range(200)),
        *("".join(dice.choices(anything, k=dice.randint(1, 60))) for _ in range(500)),
        *("".join(dice.choices(likely, k=dice.randint(1, 60))) for _ in range(1500)),
        *("".join(dice.choices(" \t\n'st<|>endoftxA1é\u0301", k=40)) for _ in range(500)),
        *anything[:0x3000],
    ]


@pytest.mark.parametrize("files", ["vocab.json and merges.txt", "tokenizer.json"])
def test_ids_of_the_real_vocabulary(clip, files):
    split, joined, reference = clip
    tokenizer = Tokenizer.from_folder(joined if files == "tokenizer.json" else split, config=Aimv2TextConfig())
    assert (tokenizer.bos, tokenizer.eos, tokenizer.context) == (49406, 49407, 77)
    every = texts()
    wanted = reference(every, truncation=True, max_length=77, padding=True)["input_ids"]
    got = tokenizer(every).tolist()
    assert [text for text, mine, other in zip(every, got, wanted, strict=True) if mine != other] == []


def test_known_ids_of_openais_clip(clip):
    tokenizer = Tokenizer.from_folder(clip[0], config=Aimv2TextConfig())
    assert tokenizer("a photo of a cat").tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407]]


def test_open_clips_own_tokenizer_agrees_on_plain_text(clip):
    """open_clip repairs broken Unicode first and knows no NFC, so plain text is where the two must agree."""
    for needed in ("ftfy", "regex"):
        pytest.importorskip(needed)
    # The file alone: the package around it asks for torchvision.
    file = bundled("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reference = module.SimpleTokenizer(bpe_path=str(bundled(MERGES)))
    tokenizer = Tokenizer.from_folder(clip[0], config=Aimv2TextConfig())
    dice = random.Random(11)
    plain = [ENGLISH.format(*dice.choices(["cat", "3 dogs", "x-ray", "O'Brien"], k=4)) for _ in range(50)]
    for text in plain:
        assert tokenizer(text)[0].tolist() == [49406, *reference.encode(text), 49407], text


def test_the_golden_ids_are_still_transformers_own():
    reference = transformers.CLIPTokenizer.from_pretrained(GOLDEN)
    golden = json.loads((GOLDEN / "ids.json").read_text(encoding="utf-8"))
    assert [row["text"] for row in golden] == HARD
    for row in golden:
        assert reference(row["text"], truncation=True, max_length=77)["input_ids"] == row["ids"], row["text"]
