"""Counts on any machine what MLX would launch on a Mac's GPU, from the graph of a computation and the strides in it.

By the source of ml-explore/mlx at 846d1762 (August 2026). The three operations that MLX takes apart for a CPU are
replaced by one node each that nothing else here uses.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import numpy as np

from mlx_aimv2 import layers

STAND_INS = {"ErfInv": "RMSNorm", "Erf": "Attention", "LogAddExp": "SwiGLU"}
"""The node that stands for an operation -> the name of its kernel."""

Layout = np.ndarray
"""An array of bytes that nobody reads: its strides are those of MLX's array, in numbers."""

VIEWS: dict[str, Callable[[Layout, list, tuple[int, ...]], Layout | list[Layout]]] = {
    "Transpose": lambda x, arguments, shape: x.transpose(arguments[0]),  # backend/common/common.cpp:233
    "Broadcast": lambda x, arguments, shape: np.broadcast_to(x, shape),  # :48
    "ExpandDims": lambda x, arguments, shape: np.expand_dims(x, tuple(arguments[0])),  # :80
    "Squeeze": lambda x, arguments, shape: np.squeeze(x, tuple(arguments[0])),  # :214
    "Split": lambda x, arguments, shape: np.split(x, arguments[0], arguments[1]),  # :162
    "Depends": lambda x, arguments, shape: x,  # :71
    # backend/gpu/slicing.cpp:9
    "Slice": lambda x, arguments, shape: x[tuple(map(slice, *arguments))],
}
"""Nodes that launch nothing: they give the same memory other strides."""

RESHAPES = ("Reshape", "Flatten", "Unflatten")
"""These copy what no strides can describe (backend/common/common.cpp:109), else they launch nothing."""

VECTOR_QUERIES = 8
"""Up to so many queries take the vector kernel (backend/metal/scaled_dot_product_attention.cpp:812)."""


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the block the package takes the way that it takes on a GPU, and the three operations are one node each."""

    def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None) -> mx.array:
        return mx.erf(mx.depends(q, [k, v, mask] if isinstance(mask, mx.array) else [k, v]))

    gpu = SimpleNamespace(type=mx.DeviceType.gpu)
    with (
        mock.patch.object(mx, "default_device", lambda: gpu),
        mock.patch.object(mx.fast, "rms_norm", lambda x, weight, eps: mx.erfinv(mx.depends(x, [weight]))),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", attention),
        mock.patch.object(layers, "_fused_swiglu", mx.logaddexp),
    ):
        yield


def launches(function: Callable[..., mx.array], *inputs: mx.array) -> list[str]:
    """The kernels that `function(*inputs)` launches, in order; what MLX copies before a kernel is `Copy`.

    What the function closes over must have been evaluated.
    """
    graph: list[dict] = []
    with as_on_a_gpu():
        mx.export_function(graph.append, function, *inputs)
    kernels: list[str] = []
    layouts: dict[str, Layout] = {}
    together: dict[str, list[Layout]] = {}
    for node in graph:
        if node["type"] == "inputs":
            layouts |= {name: np.empty(shape, np.uint8) for name, shape, _ in node["inputs"]}
        elif node["type"] == "constants":
            layouts |= {name: layout_of(array) for name, array in node["constants"]}
        elif node["type"] == "primitive":
            given = [layouts[name] for name, *_ in node["inputs"]]
            operands = together.get(node["inputs"][0][0], given) if given else given
            found = _outputs(node, given, operands, kernels)
            layouts |= {name: layout for (name, *_), layout in zip(node["outputs"], found, strict=True)}
            if node["name"] == "Depends":
                together[node["outputs"][0][0]] = given
    return kernels


def layout_of(array: mx.array) -> Layout:
    """The layout of an evaluated array."""
    same = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(same)
    strides = [step // array.itemsize for step in memoryview(same).strides]
    size = 1 + sum((length - 1) * step for length, step in zip(array.shape, strides, strict=True))
    return np.lib.stride_tricks.as_strided(np.empty(size, np.uint8), array.shape, strides)


def _outputs(node: dict, given: list[Layout], operands: list[Layout], kernels: list[str]) -> list[Layout]:
    """The layouts that a node gives; `kernels` gets what it launches."""
    name, arguments = node["name"], node["arguments"]
    shapes = [shape for _, shape, _ in node["outputs"]]
    if name in VIEWS:
        found = VIEWS[name](given[0], arguments, shapes[0])
        return found if isinstance(found, list) else [found]
    if name in RESHAPES:
        reshaped = given[0].reshape(shapes[0])
        if not np.may_share_memory(reshaped, given[0]):
            kernels.append("Copy")
        return [reshaped]
    kernel = STAND_INS.get(name, name)
    copied = {"Matmul": _not_a_matrix, "AddMM": _not_a_matrix, "RMSNorm": _not_rows, "Attention": _not_heads}
    kernels += ["Copy"] * copied.get(kernel, lambda operands: 0)(operands)
    kernels.append(kernel)
    outputs = [np.empty(shape, np.uint8) for shape in shapes]
    if kernel == "Attention" and shapes[0][2] > VECTOR_QUERIES:  # tokens before heads: …:890-906
        batch, heads, tokens, dims = shapes[0]
        return [np.empty((batch, tokens, heads, dims), np.uint8).transpose(0, 2, 1, 3)]
    return outputs


def _not_a_matrix(operands: list[Layout]) -> int:
    """How many of a product's two matrices are copied: neither rows nor columns are whole (matmul.cpp:27-43)."""
    return sum(1 not in x.strides[-2:] for x in operands[:2])


def _not_rows(operands: list[Layout]) -> int:
    """Whether a norm's input is copied (normalization.cpp:26-30)."""
    x = operands[0]
    return int(x.strides[-1] != 1 or (x.ndim > 1 and x.strides[-2] not in (0, x.shape[-1]) and x.shape[-2] != 1))


def _not_heads(operands: list[Layout]) -> int:
    """How many of queries, keys, values and mask are copied before attention."""
    queries, keys, values, *mask = operands
    if queries.shape[2] > VECTOR_QUERIES:  # scaled_dot_product_attention.cpp:801-803, 885-908
        return sum(x.strides[-1] != 1 for x in operands)
    one_stride = [x.shape[0] == 1 or x.strides[0] == x.strides[1] * x.shape[1] for x in (keys, values, *mask)]  # :829
    return [queries.flags.c_contiguous, *one_stride].count(False)
