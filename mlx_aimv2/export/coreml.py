"""Writes Core ML packages, .mlpackage, for iOS 18 and macOS 15 with coremltools' own builder: without torch.

The same network again in Core ML's operations: takes one image (1, 3, H, W) of levels, or ids (1, L), at a time.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.export.encoder import Exported
from mlx_aimv2.layers import sincos_positions
from mlx_aimv2.learn.classify.head import AttentiveHead, MeanHead
from mlx_aimv2.model import Aimv2Model


def write(exported: Exported, path: Path, batches: Sequence[int]) -> dict[str, Any]:
    """Writes a package, dense or with the model's bits: `-> its description`.

    Raises ValueError without coremltools, for several images at once and for a head that is not a probe's.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # it misses macOS libraries and a known scikit-learn
    try:
        import coremltools as ct
        from coremltools.converters.mil import Builder as mb
        from coremltools.converters.mil.mil import types
    except ImportError:
        raise ValueError(".mlpackage needs coremltools: pip install 'mlx-aimv2[coreml]'") from None
    if tuple(batches) != (1,):
        raise ValueError("a .mlpackage takes one image or text at a time, Core ML makes batches: leave --batch out")
    if exported.head is not None and not isinstance(exported.head, MeanHead | AttentiveHead):
        raise ValueError("a .mlpackage can hold the heads linear and attentive, and those of lora, dora and full")
    if exported.task not in ("", "classify"):
        raise ValueError(f"a .mlpackage cannot hold a head to {exported.task}: a .mlxfn can")
    is_text = exported.text is not None
    shape = (1, *exported.shape) if is_text else (1, 3, *exported.shape[:2])
    spec = mb.TensorSpec(shape=shape, dtype=types.int32 if is_text else types.fp32)

    @mb.program(input_specs=[spec], opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def program(input: Any) -> Any:
        return Network(mb, types, exported).outputs(input)

    given = ct.TensorType("input", shape, np.int32) if is_text else ct.ImageType("input", shape)
    names = ("label_probs",) if exported.labels else exported.outputs  # coremltools' name for a classifier's
    made = program.functions["main"].outputs
    outputs = {name: mx.zeros(one.shape) for name, one in zip(names, made, strict=True)}
    labels = ct.ClassifierConfig(list(exported.labels), "label", "probabilities") if exported.labels else None
    with redirect_stderr(io.StringIO()):  # coremltools' own progress bars
        model = ct.convert(
            program,
            inputs=[given],
            classifier_config=labels,
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,  # that is: as it was built
            skip_model_load=True,
        )
    found = exported.describe(batches, outputs, device="any")
    source = exported.loaded.source.origin
    licences = [file.read_text("utf-8", "replace") for file in sorted(source.folder.glob("LICENSE*"))]
    model.license = "\n".join(licences) or " ".join(found["license"].values())
    model.short_description = f"AIMv2 encoder {found['checkpoint']}, {', '.join(exported.outputs)}"
    model.author, model.version = found["exported_by"], str(found["commit"])
    model.save(str(path))
    return found


class Network:
    """The encoder in Core ML's operations, in its weights' dtype; variables have the same axes as `model`'s arrays."""

    def __init__(self, mb: Any, types: Any, exported: Exported) -> None:
        """Takes coremltools' builder and its dtypes."""
        self.mb, self.types, self.exported = mb, types, exported

    def outputs(self, x: Any) -> tuple[Any, ...]:
        """Levels `(1, 3, H, W)`, or ids `(1, L)`, to the variables of `exported.outputs`, in float32."""
        made = self.images(x) if self.exported.text is None else self.text(x)
        return tuple(self.mb.cast(x=made[name], dtype="fp32", name=name) for name in self.exported.outputs)

    def images(self, x: Any) -> dict[str, Any]:
        """Levels `(1, 3, H, W)` to tokens and the image's vector, or to probabilities."""
        mb, vision, steps = self.mb, self.exported.vision, self.exported.processor.preprocessing
        x = mb.mul(x=x, y=np.float32(steps.rescale_factor or 1))
        if steps.image_mean is not None and steps.image_std is not None:
            x = mb.sub(x=x, y=np.array(steps.image_mean, np.float32).reshape(1, 3, 1, 1))
            x = mb.real_div(x=x, y=np.array(steps.image_std, np.float32).reshape(1, 3, 1, 1))
        x = mb.cast(x=x, dtype="fp32" if vision.dtype == mx.float32 else "fp16")
        proj, strides = vision.patch_embed.proj, [vision.config.patch_size] * 2
        kernel, bias = self.array(proj.weight.transpose(0, 3, 1, 2), x), self.array(proj.bias, x)
        x = mb.conv(x=x, weight=kernel, bias=bias, strides=strides, pad_type="valid")
        _, dims, rows, columns = x.shape
        x = mb.transpose(x=mb.reshape(x=x, shape=(1, dims, rows * columns)), perm=(0, 2, 1))
        is_fixed = vision.config.num_patches is not None
        positions = vision.pos_embed if is_fixed else mx.array(sincos_positions(rows, columns, dims))
        x = mb.add(x=self.norm(x, vision.patch_embed.norm), y=self.array(positions, x))
        tokens = self.norm(self.blocks(x, vision.blocks), vision.norm)
        if (head := self.exported.head) is not None:
            return {"probabilities": self.probabilities(mb.cast(x=tokens, dtype="fp32"), head)}
        if isinstance(model := self.exported.loaded.model, Aimv2Model):
            pooled = self.linear(self.pooled(tokens, vision.head.cls_token, vision.head), vision.head.linear)
            return {"tokens": tokens, "image": self.linear(pooled, model.visual_projection)}
        return {"tokens": tokens, "image": mb.reduce_mean(x=mb.cast(x=tokens, dtype="fp32"), axes=[1])}

    def text(self, ids: Any) -> dict[str, Any]:
        """Ids `(1, L)` to the vector of the text `(1, E)`."""
        mb, text, length = self.mb, self.exported.text, ids.shape[1]
        model: Any = self.exported.loaded.model
        positions = mb.const(val=np.array(text.pos_embed[:length]))
        x = mb.add(x=mb.gather(x=self.weight(text.token_embed, positions), indices=ids, axis=0), y=positions)
        x = self.norm(self.blocks(x, text.blocks, np.tril(np.ones((1, 1, length, length), bool))), text.norm)
        is_eos = mb.cast(x=mb.equal(x=ids, y=np.int32(text.config.eos_token_id)), dtype="fp32")
        pooled = mb.gather(x=x, indices=mb.reduce_argmax(x=is_eos, axis=1), axis=1)  # (1, 1, D): of the first EOS
        return {"text": self.linear(mb.squeeze(x=pooled, axes=[1]), model.text_projection)}

    def blocks(self, x: Any, blocks: Sequence[Any], mask: NDArray[Any] | None = None) -> Any:
        """`(1, N, D) -> (1, N, D)`; `mask` is true where a token attends."""
        mb = self.mb
        for block in blocks:
            parts = mb.split(x=self.linear(self.norm(x, block.norm1), block.attn.qkv), num_splits=3, axis=-1)
            attended = self.attention(parts, block.attn.num_heads, mask)
            x = mb.add(x=x, y=self.linear(attended, block.attn.proj))
            h = self.norm(x, block.norm2)
            gated = mb.mul(x=mb.silu(x=self.linear(h, block.mlp.gate)), y=self.linear(h, block.mlp.up))
            x = mb.add(x=x, y=self.linear(gated, block.mlp.down))
        return x

    def attention(self, parts: Sequence[Any], heads: int, mask: NDArray[Any] | None = None) -> Any:
        """Queries `(1, M, D)`, keys and values `(1, N, D)` to `(1, M, D)`, with iOS 18's single operation for it."""
        mb, (_, count, dims) = self.mb, parts[0].shape
        split = [mb.reshape(x=x, shape=(1, x.shape[1], heads, dims // heads)) for x in parts]
        q, k, v = (mb.transpose(x=x, perm=(0, 2, 1, 3)) for x in split)
        allowed = {} if mask is None else {"attn_mask": mask}
        out = mb.scaled_dot_product_attention(query=q, key=k, value=v, **allowed)
        return mb.reshape(x=mb.transpose(x=out, perm=(0, 2, 1, 3)), shape=(1, count, dims))

    def pooled(self, x: Any, query: mx.array, head: Any) -> Any:
        """Attention with one learned query: `(1, N, D) -> (1, D)`."""
        parts = [self.mb.const(val=self.array(query, x)), self.linear(x, head.k), self.linear(x, head.v)]
        return self.mb.squeeze(x=self.attention(parts, head.num_heads), axes=[1])

    def probabilities(self, tokens: Any, head: Any) -> Any:
        """A probe's outputs, in float32 as in MLX: `(1, N, D) -> (1, classes)`."""
        mb, is_mean = self.mb, isinstance(head, MeanHead)
        x = mb.reduce_mean(x=tokens, axes=[1]) if is_mean else tokens
        x = mb.real_div(x=mb.sub(x=x, y=self.array(head.mean, x)), y=self.array(head.std, x))
        logits = self.linear(x if is_mean else self.pooled(x, head.query, head), head.linear)
        return mb.softmax(x=mb.mul(x=logits, y=np.float32(head.scale)), axis=-1)

    def norm(self, x: Any, layer: Any) -> Any:
        """RMSNorm: `(1, N, D) -> (1, N, D)`."""
        mb, weight = self.mb, self.array(layer.weight, x)
        squares = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[-1], keep_dims=True)
        return mb.mul(x=mb.mul(x=x, y=mb.rsqrt(x=squares, epsilon=weight.dtype.type(layer.eps))), y=weight)

    def linear(self, x: Any, layer: Any) -> Any:
        """`(…, D) -> (…, E)`."""
        bias = {"bias": self.array(layer.bias, x)} if "bias" in layer else {}
        return self.mb.linear(x=x, weight=self.weight(layer, x), **bias)

    def weight(self, layer: Any, like: Any) -> Any:
        """The matrix of a layer `(E, D)`: packed if affine with 4 or 8 bits, else dense."""
        if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            return self.array(layer.weight, like)
        packing = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        if layer.mode != "affine" or layer.bits not in (4, 8):  # unlike Core ML's whole numbers
            biases = layer.biases if layer.mode == "affine" else None
            return self.array(mx.dequantize(layer.weight, layer.scales, biases, **packing), like)
        ones = mx.ones_like(layer.scales)
        levels = np.array(mx.dequantize(layer.weight, ones, mx.zeros_like(ones), **packing).astype(mx.uint8))
        return self.mb.constexpr_blockwise_shift_scale(
            data=levels.astype(self.types.np_uint4_dtype) if layer.bits == 4 else levels,
            scale=self.array(layer.scales, like),
            # MLX adds a bias where Core ML subtracts an offset before scaling; a group of equal weights has scale 0.
            offset=self.array(-layer.biases / mx.where(layer.scales == 0, 1, layer.scales), like),
        )

    def array(self, values: mx.array, like: Any) -> NDArray[Any]:
        """Weights for NumPy, in the dtype of the variable they meet: a view if it is theirs (3B has 5.4 GB)."""
        dtype = np.dtype(self.types.nptype_from_builtin(like.dtype)).name
        return np.asarray(values.astype(getattr(mx, dtype)))
