"""Detection: boxes around objects with their class, from COCO JSON and four other formats."""

from mlx_aimv2.learn.dense import TUNED
from mlx_aimv2.learn.detect import data, head, results
from mlx_aimv2.learn.task_options import Task, Type

TASK = Task(
    name="detect",
    pipeline_tag="object-detection",
    types={
        "decoder": Type("tokens", (1e-3,), epochs=30, batch_size=16, warm_up_epochs=2),
        **TUNED,
    },
    metrics=("ap", "ap50", "ap75"),
    dense=True,
    data=data,
    head=head,
    results=results,
)
