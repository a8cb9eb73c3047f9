"""Tasks, task files, and the data behind them.

In: YAML or JSON task files, texts, tables, images, COCO annotations, Hub data sets.
Out: `Task` with examples in three splits.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "coco_tasks": "detection_tasks",
        "examples": "Example ImageExample",
        "image_sources": "CocoSource ImageRows",
        "images": "ImageTask",
        "task": "Task",
        "task_file": "check_tasks load_tasks save_tasks",
        "text": "DataSource",
    },
)
