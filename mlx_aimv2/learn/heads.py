"""Classification heads on tokens: their mean, or attention with one learned query, then a linear map."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2.layers import attention, merge_heads, split_heads

SPREAD = 0.02
"""Standard deviation of the learned query and of the classifier at the start, as in big_vision's probes."""


class MeanHead(nn.Module):
    """One linear layer on the mean token: `(B, N, D) -> {"logits": (B, classes)}`, zero at the start.

    The mean is standardised with `mean` and `std` (D,) of the training features, which are stored with the head.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.mean = mx.zeros((width,))
        self.std = mx.ones((width,))
        self.linear = nn.Linear(width, classes)
        self.linear.weight = mx.zeros((classes, width))
        self.linear.bias = mx.zeros((classes,))
        self.freeze(keys=["mean", "std"], recurse=False)

    def __call__(self, tokens: mx.array, grid: tuple[int, int] | None = None) -> dict[str, mx.array]:
        pooled = tokens.astype(mx.float32).mean(axis=1)
        return {"logits": self.linear((pooled - self.mean) / self.std)}


class AttentiveHead(nn.Module):
    """The attentive probe (AIMv2, section 4.1): `(B, N, D) -> {"logits": (B, classes)}`.

    Tokens are standardised with `mean` and `std` (D,) of the training tokens, where AIM's probe has a batch
    normalisation whose numbers depend on the batch; then attended with one learned query, and mapped to the classes.
    """

    def __init__(self, width: int, num_heads: int, classes: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mean = mx.zeros((width,))
        self.std = mx.ones((width,))
        self.query = SPREAD * mx.random.normal((1, 1, width))
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, classes)
        self.linear.weight = mx.zeros((classes, width))
        self.linear.bias = mx.zeros((classes,))
        self.freeze(keys=["mean", "std"], recurse=False)

    def start(self, mean: mx.array, std: mx.array, probe: MeanHead | None) -> None:
        """Takes the statistics of the training tokens, (D,) each, and begins as the linear probe if there is one.

        A query of zero attends to all tokens alike: with values as they are that is their mean.
        """
        self.mean, self.std = mean, std
        if probe is not None:
            self.query = mx.zeros_like(self.query)
            self.v.weight = mx.eye(mean.shape[0])
            self.linear.weight = probe.linear.weight * (std / probe.std)
            self.linear.bias = probe.linear.bias + probe.linear.weight @ ((mean - probe.mean) / probe.std)

    def __call__(self, tokens: mx.array, grid: tuple[int, int] | None = None) -> dict[str, mx.array]:
        x = (tokens.astype(mx.float32) - self.mean) / self.std
        query = mx.broadcast_to(self.query, (x.shape[0], 1, x.shape[2]))
        q, k, v = (split_heads(part, self.num_heads) for part in (query, self.k(x), self.v(x)))
        return {"logits": self.linear(merge_heads(attention(q, k, v))[:, 0])}
