"""How do I give a language model eyes?

python -m examples.connector [IMAGE ...] [--model MODEL] [--iters N]

A projector makes embeddings of a frozen encoder's features. They stand in front of a text's, and a language model, here
a tiny random one, learns to go on with the image's name. mlx-lm's have `embed_tokens` and take `input_embeddings=`.
"""

import argparse
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_aimv2 import bundled, load

parser = argparse.ArgumentParser(description="Connect an encoder with a language model.")
parser.add_argument("images", nargs="*", help="image files, whose names are the texts (default: 32 emoji)")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or folder of an image-text pair")
parser.add_argument("--iters", type=int, default=60, help="steps (default: %(default)s)")
DIMS = 96


class Connected(nn.Module):
    """A projector into a language model: `tokens (B, N, D), ids (B, L) -> logits (B, L, vocabulary)` of the next id."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(width, 2 * DIMS), nn.GELU(), nn.Linear(2 * DIMS, DIMS))
        self.embed_tokens = nn.Embedding(vocabulary, DIMS)
        self.language = nn.TransformerEncoder(num_layers=2, dims=DIMS, num_heads=4, mlp_dims=4 * DIMS)

    def __call__(self, tokens: mx.array, ids: mx.array) -> mx.array:
        x = mx.concatenate([self.projector(tokens), self.embed_tokens(ids)], axis=1)
        x = self.language(x, nn.MultiHeadAttention.create_additive_causal_mask(x.shape[1]))
        return self.embed_tokens.as_linear(x[:, tokens.shape[1] :])


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    named = {Path(image): Path(image).stem for image in args.images} or dict(list(bundled.emoji_images().items())[:32])
    model, processor = load(args.model, dtype="auto")
    tokens = model.vision(processor(list(named))).last_hidden_state.astype(mx.float32)  # once: the encoder is frozen
    ids = processor.tokenize(list(named.values()))
    connected = Connected(tokens.shape[2], processor.tokenizer.size)
    loss = lambda: nn.losses.cross_entropy(connected(tokens, ids[:, :-1]), ids[:, 1:]).mean()  # noqa: E731
    loss_and_grad = nn.value_and_grad(connected, loss)
    optimizer = optim.AdamW(learning_rate=2e-3)
    for step in range(args.iters):
        loss, grads = loss_and_grad()
        optimizer.update(connected, grads)
        mx.eval(connected.parameters(), optimizer.state)
        if step in (0, args.iters - 1):
            print(f"step {step + 1}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
