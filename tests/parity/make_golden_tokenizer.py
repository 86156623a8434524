"""Trains the small vocabulary that the quick tests read, in the order of CLIP's, and writes tests/golden/tokenizer.

python -m tests.parity.make_golden_tokenizer, with transformers installed: the ids beside it are transformers' own.
"""

from __future__ import annotations

import json
from pathlib import Path

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenizer"

CORPUS = """a photo of a cat, a photo of a dog. two dogs on a bench; the dog's bench isn't free.
the red fox jumped over a lazy dog while 12 cats were sleeping in the sun of 1984.
a rocket standing on its launch pad at night, lit by floodlights, and a cup of coffee on a wooden table.
an astronaut in an orange suit, smiling in front of a flag and a model of the shuttle. she's happy, they're happy.
a handwritten digit: zero, one, two, three, four, five, six, seven, eight, nine. a picture of the number 5.
naïve café façade, übergrößen, 猫と犬, кошка и собака, 😀😀 👍🏽.
a painting of a lighthouse at the sea; a drawing of a bird; a close-up photo of the moon, a blurry photo of a train.
"""

HARD = [
    "",
    " ",
    "a cat",
    "A  CAT\t\non   a bench",
    "the dog's isn't they're we've I'm you'll he'd DON'T",
    "naïve café façade ÜBERGRÖSSEN",
    "cafe\u0301 vs caf\u00e9",
    "İstanbul ǅ ﬁ ß ẞ Σίσυφος",
    "猫と犬がベンチに座っている",
    "кошка и собака",
    "😀 👍🏽 👨‍👩‍👧‍👦 🇨🇭",
    "12345 3.14 ½ ² Ⅷ ١٢٣",
    "zero\u200bwidth\u200djoin\ufeffed",
    "bell\x07 null\x00 escape\x1b delete\x7f",
    "nbsp\u00a0ideographic\u3000space\u2028line",
    "<|startoftext|> a cat <|endoftext|> a dog",
    "<|ENDOFTEXT|> <|endoftext|",
    "!!!??? ... --- (a) [b] {c} a_b a-b a/b \\ \"quoted\" 'single'",
    "https://example.org/?q=1&r=2#x user@example.org",
    "עברית العربية हिन्दी ไทย",
    "a\u0323\u0307 \u1e69 \u0e40\u0e01",
    "\U000e0001 \ue000 \ufffd",
    "x" * 300,
    "a cat " * 60,
    "dog " * 2500,
]


def main() -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator((word for line in CORPUS.splitlines() for word in line.split()), trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}

    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    clip.save_pretrained(GOLDEN)
    (GOLDEN / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (GOLDEN / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ids = clip(HARD, truncation=True, max_length=77)["input_ids"]
    golden = [{"text": text, "ids": numbers} for text, numbers in zip(HARD, ids, strict=True)]
    (GOLDEN / "ids.json").write_text(json.dumps(golden, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
