"""Gradients of every parameter are those of torch's autograd, with and without hidden patches and checkpointing.

The loss is the cross-entropy of a linear layer on the mean token, and of the attentive probe; transformers' model is
given the visible patches by its own embedding, then its own encoder.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten

from mlx_aimv2.checkpoint import detect
from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.learn.classify.head import AttentiveHead, MeanHead
from mlx_aimv2.learn.learner import Learner
from mlx_aimv2.model import Aimv2VisionModel, visible_patches
from mlx_aimv2.train.optimizer import Optimizer, groups_of

MOST = 1e-4
"""Largest difference of a parameter's gradient, relative to its largest entry."""

CLASSES = 7
SIZES = {"fixed": (36, 47, 3, 3, 70), "native": (52, 61, 2, 1, None)}
"""hidden, intermediate, blocks, heads, pixels; None is a native model, which sees 42 x 70 pixels."""


def models(size: str):
    hidden, intermediate, blocks, heads, side = SIZES[size]
    torch.manual_seed(2)
    config = transformers.Aimv2VisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        image_size=side or 224,
        is_native=side is None,
        use_head=False,
    )
    original = transformers.Aimv2VisionModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.1
            parameter.copy_(spread * torch.randn_like(parameter) + (1.0 if "norm" in name else 0.0))
    mine = Aimv2VisionModel(
        Aimv2VisionConfig(hidden, intermediate, blocks, heads, image_size=side, is_native=side is None)
    )
    mine.load_weights(list(translated(original.state_dict(), mine).items()))
    return mine, original


def translated(tensors, mine) -> dict[str, mx.array]:
    """Tensors or gradients under transformers' names under this package's."""
    arrays = {name: mx.array(tensor.detach().numpy()) for name, tensor in tensors.items()}
    match = detect.recognise({name: tuple(array.shape) for name, array in arrays.items()})
    assert match.layout.name == "transformers"
    shapes = {name: tuple(array.shape) for name, array in tree_flatten(mine.parameters())}
    return dict(match.to_target(arrays, shapes))


def inputs(size: str, hidden: int):
    side = SIZES[size][4]
    height, width = (side, side) if side else (42, 70)
    chance = np.random.default_rng(4)
    pixels = chance.normal(size=(3, height, width, 3)).astype(np.float32)
    count = (height // 14) * (width // 14)
    masks = np.stack([np.isin(np.arange(count), chance.permutation(count)[:hidden]) for _ in range(3)])
    return pixels, masks, chance.integers(0, CLASSES, 3)


def torch_tokens(model, pixels: np.ndarray, masks: np.ndarray):
    x = model.embeddings(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    x = torch.stack([image[torch.from_numpy(~mask)] for image, mask in zip(x, masks, strict=True)])
    return model.rms_norm(model.encoder(inputs_embeds=x).last_hidden_state)


def torch_head(kind: str, head, tokens, weights):
    mean, std = (torch.from_numpy(np.array(array)) for array in (head.mean, head.std))
    if kind == "mean":
        return ((tokens.mean(dim=1) - mean) / std) @ weights["linear.weight"].T + weights["linear.bias"]
    x = (tokens - mean) / std
    batch, _, width = x.shape

    def heads(y):
        return y.reshape(batch, -1, head.num_heads, width // head.num_heads).transpose(1, 2)

    query = weights["query"].expand(batch, 1, width)
    pooled = torch.nn.functional.scaled_dot_product_attention(
        heads(query), heads(x @ weights["k.weight"].T), heads(x @ weights["v.weight"].T)
    )
    return pooled.transpose(1, 2).reshape(batch, width) @ weights["linear.weight"].T + weights["linear.bias"]


@pytest.mark.parametrize("kind", ["mean", "attentive"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["stored", "checkpoint"])
@pytest.mark.parametrize("hidden", [0, 7])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_torch(size, hidden, checkpoint, kind):
    mine, original = models(size)
    width, heads = mine.config.hidden_size, mine.config.num_attention_heads
    mx.random.seed(1)
    head = MeanHead(width, CLASSES) if kind == "mean" else AttentiveHead(width, heads, CLASSES)
    head.linear.weight = mx.random.normal(head.linear.weight.shape)
    head.mean, head.std = mx.random.normal((width,)), mx.random.uniform(0.5, 2, (width,))
    pixels, masks, labels = inputs(size, hidden)
    learner = Learner(mine, head)

    def loss(pixels):
        visible = visible_patches(mx.array(masks), masks.shape) if hidden else None
        outputs = learner(pixels, visible=visible, checkpoint=checkpoint)
        return nn.losses.cross_entropy(outputs["logits"], mx.array(labels), reduction="mean")

    value, gradients = nn.value_and_grad(learner, loss)(mx.array(pixels))
    found = dict(tree_flatten(gradients))

    weights = {
        name: torch.from_numpy(np.array(array)).requires_grad_()
        for name, array in tree_flatten(head.trainable_parameters())
    }
    logits = torch_head(kind, head, torch_tokens(original, pixels, masks), weights)
    wanted = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted = {
        f"encoder.{name}": array
        for name, array in translated({name: p.grad for name, p in original.named_parameters()}, mine).items()
    }
    wanted |= {f"head.{name}": mx.array(tensor.grad.numpy()) for name, tensor in weights.items()}
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        largest = np.abs(np.array(array)).max()
        assert largest > 0
        assert np.abs(np.array(found[name]) - np.array(array)).max() <= MOST * largest, name


def test_adamw_is_torchs():
    chance = np.random.default_rng(7)
    start, gradients = chance.normal(size=(5, 3)), chance.normal(size=(9, 5, 3))
    parameter = torch.nn.Parameter(torch.from_numpy(start.astype(np.float32)))
    wanted = torch.optim.AdamW([parameter], lr=0.03, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.2)
    model = nn.Linear(3, 5, bias=False)
    model.weight = mx.array(start.astype(np.float32))
    groups = groups_of(model, [])
    optimizer = Optimizer(
        model, groups, schedule=lambda step, factor: mx.array(0.03 * factor), weight_decay=0.2, betas=(0.9, 0.999)
    )
    for gradient in gradients.astype(np.float32):
        parameter.grad = torch.from_numpy(gradient)
        wanted.step()
        optimizer.update(model, {"weight": mx.array(gradient)})
    np.testing.assert_allclose(np.array(model.weight), parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
