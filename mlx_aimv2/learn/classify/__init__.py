"""A label for each image, from folders named after labels or from a table; or several labels, or a number."""

from dataclasses import replace

from mlx_aimv2.learn.classify import data, head, multilabel, regression, results
from mlx_aimv2.learn.task_options import Task, Type

TASK = Task(
    name="classify",
    pipeline_tag="image-classification",
    types={
        "linear": Type("mean"),
        "attentive": Type("tokens", (1e-3, 3e-3, 1e-2), epochs=30, batch_size=64, warm_up_epochs=2),
        "knn": Type("mean"),
        "lora": Type(None, (3e-4,), epochs=10, batch_size=16),
        "dora": Type(None, (3e-4,), epochs=10, batch_size=16),
        "full": Type(None, (1e-4,), epochs=10, batch_size=16, layer_decay=0.75, drop_path=0.1),
    },
    metrics=("top1", "mean_class"),
    dense=False,
    data=data,
    head=head,
    results=results,
)

TASKS = {
    "classify": TASK,
    "multilabel": replace(
        TASK, name="multilabel", metrics=("map", "f1"), data=multilabel, head=multilabel, results=multilabel
    ),
    "regression": replace(
        TASK,
        name="regression",
        pipeline_tag="image-regression",
        metrics=("r2", "rmse", "mae"),
        data=regression,
        head=regression,
        results=regression,
    ),
}
"""The tasks that give an image as a whole something, by name."""
