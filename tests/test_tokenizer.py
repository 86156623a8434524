"""Texts become the ids that transformers' CLIP tokenizer gives; a bad text or file gives one clear line."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.images.preprocessing import published
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
IDS = json.loads((GOLDEN / "ids.json").read_text(encoding="utf-8"))
BOS, EOS = 776, 777
TEXT = Aimv2TextConfig(vocab_size=778, eos_token_id=EOS)


def copied(folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copy(GOLDEN / name, folder / name)
    return folder


def pair(text: Aimv2TextConfig = TEXT) -> Aimv2Config:
    return Aimv2Config(vision_config=Aimv2VisionConfig(image_size=42), text_config=text)


def processor(folder: Path, text: Aimv2TextConfig = TEXT) -> Aimv2Processor:
    Aimv2Processor(published(42)).save_to(folder)
    return Aimv2Processor.from_folder(folder, config=pair(text))


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json and merges.txt"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.from_folder(copied(folder, *request.param.split(" and ")), config=TEXT)


@pytest.mark.parametrize("row", IDS, ids=[repr(row["text"][:20]) for row in IDS])
def test_ids_are_those_of_transformers(tokenizer, row):
    assert tokenizer(row["text"]).tolist() == [row["ids"]]


def test_a_batch_is_filled_with_eos_to_its_longest_text(tokenizer):
    ids = tokenizer([row["text"] for row in IDS])
    longest = max(len(row["ids"]) for row in IDS)
    assert ids.shape == (len(IDS), longest) and ids.dtype == np.int32
    for got, row in zip(ids.tolist(), IDS, strict=True):
        assert got == row["ids"] + [EOS] * (longest - len(row["ids"]))


def test_a_text_beyond_the_context_keeps_eos_last(tokenizer):
    ids = tokenizer("dog " * 2500)
    assert ids.shape == (1, 77) and ids[0, 0] == BOS and ids[0, -1] == EOS and EOS not in ids[0, :-1]
    words = tokenizer("dog " * 75)  # fills the context to the last place
    assert ids.tolist() == words.tolist()
    assert tokenizer("dog " * 74).shape == (1, 76)


def test_the_context_is_the_text_towers():
    short = Aimv2TextConfig(vocab_size=778, eos_token_id=EOS, max_position_embeddings=13)
    ids = Tokenizer.from_folder(GOLDEN, config=short)("dog " * 50)
    assert ids.shape == (1, 13) and ids[0, -1] == EOS


def test_cutting_and_filling_that_the_file_asks_for_are_undone(tmp_path):
    content = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    filling = {"direction": "Left", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0, "pad_token": "!"}
    content["padding"] = {"strategy": {"Fixed": 40}, **filling}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path)(IDS[4]["text"]).tolist() == [IDS[4]["ids"]]


def test_the_processor_gives_an_mlx_array(tmp_path):
    ids = processor(copied(tmp_path, "tokenizer.json")).tokenize(["a cat", "a dog on a bench"])
    assert isinstance(ids, mx.array) and ids.dtype == mx.int32 and ids.shape == (2, 7)


def test_special_tokens_with_other_names_are_those_of_tokenizer_config(tmp_path):
    copied(tmp_path, "vocab.json", "merges.txt", "tokenizer.json")
    content = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(content.replace("<|endoftext|>", "</s>"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no token '<\|endoftext\|>', which must be its eos_token"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert Tokenizer.from_folder(tmp_path).eos == EOS
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<\\udce9>"}')  # a byte that is no text
    with pytest.raises(ValueError, match=r"tokenizer\.json has no token '<\?>', which must be its eos_token"):
        Tokenizer.from_folder(tmp_path)


# Bad texts


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        *((texts, "must be a string") for texts in (None, 7, b"a cat", [b"a cat"], ["a cat", None], [["a cat"]])),
        ([], "no text"),
        (["a cat", "a \ud83d cat"], "text 1 is not valid Unicode"),
    ],
    ids=range(8),
)
def test_what_is_no_text_is_refused(tokenizer, texts, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(texts)


def test_a_tuple_of_texts_is_a_batch(tokenizer):
    assert tokenizer(("a cat", "a dog")).shape == (2, 4)


# Bad folders


def test_a_vision_only_processor_names_the_checkpoint_that_has_text():
    with pytest.raises(ValueError, match="apple/aimv2-large-patch14-224-lit"):
        Aimv2Processor(published(42)).tokenize("a cat")


def test_a_pair_without_tokenizer_files_prepares_images_and_names_what_is_missing_for_text(tmp_path):
    own_processor = processor(tmp_path)
    assert own_processor(np.zeros((50, 47, 3), np.uint8)).shape == (1, 42, 42, 3)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json \(nor vocab\.json and merges\.txt"):
        own_processor.tokenize("a cat")


@pytest.mark.parametrize(("there", "missing"), [("vocab.json", r"merges\.txt"), ("merges.txt", r"vocab\.json")])
def test_half_of_vocab_and_merges_names_the_other_half(tmp_path, there, missing):
    with pytest.raises(FileNotFoundError, match=missing):
        processor(copied(tmp_path, there)).tokenize("a cat")


LONG = json.dumps({"version": "x" * 9999}).encode()


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'{"a": 1}', b"one two three\n", LONG])
def test_a_broken_tokenizer_file_is_named(tmp_path, name, content):
    others = {"tokenizer.json": [], "tokenizer_config.json": ["tokenizer.json"]}.get(name, ["vocab.json", "merges.txt"])
    copied(tmp_path, *others)
    (tmp_path / name).write_bytes(content)
    if (name, content) in ALLOWED:
        processor(tmp_path)
        return
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        processor(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 999


ALLOWED = {("tokenizer_config.json", b'{"a": 1}'), ("tokenizer_config.json", LONG)}


def test_merges_that_end_too_early_are_refused(tmp_path):
    copied(tmp_path, "vocab.json", "merges.txt")
    lines = (GOLDEN / "merges.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(lines[:200]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges\.txt is incomplete: no line of it makes \d+ tokens"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("size", "eos", "message"),
    [
        (776, 775, "778 tokens, but the text encoder's embedding has 776 rows"),
        (778, 776, r"the id 777, but config\.json's eos_token_id is 776"),
    ],
)
def test_a_tokenizer_of_another_encoder_is_refused_with_both_numbers(size, eos, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(GOLDEN, config=Aimv2TextConfig(vocab_size=size, eos_token_id=eos))


def test_the_unknown_token_of_special_tokens_map_stands_for_letters_without_a_token(tmp_path):
    folder = copied(tmp_path, "vocab.json", "merges.txt")
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    without = {token: number for token, number in vocab.items() if "z" not in token}
    (folder / "vocab.json").write_text(json.dumps(without), encoding="utf-8")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    (folder / "merges.txt").write_text("\n".join(line for line in lines if "z" not in line), encoding="utf-8")
    assert Tokenizer.from_folder(folder, config=TEXT)("z").tolist() == [[BOS, EOS, EOS]]
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": {"content": "a"}}))
    assert Tokenizer.from_folder(folder, config=TEXT)("z").tolist() == [[BOS, vocab["a"], EOS]]
