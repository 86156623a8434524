"""Segmentation: a class for every pixel, from masks as index or palette PNGs."""

from mlx_aimv2.learn.dense import TUNED
from mlx_aimv2.learn.segment import data, head, results
from mlx_aimv2.learn.task_options import Task, Type

TASK = Task(
    name="segment",
    pipeline_tag="image-segmentation",
    types={
        "decoder": Type("tokens", (1e-3,), epochs=30, batch_size=16, warm_up_epochs=2),
        "linear": Type("tokens", (1e-3, 3e-3), epochs=30, batch_size=16, warm_up_epochs=2),
        **TUNED,
    },
    metrics=("miou", "pixel_accuracy"),
    dense=True,
    data=data,
    head=head,
    results=results,
)
