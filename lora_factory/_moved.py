"""Modules of version 0.1, when the package was one flat folder: their import paths work, with a warning, until 0.3."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    "adapters": "adapters.attach adapters.folder",
    "base_models": "models.loading models.embedded",
    "baselines": "evaluation.baselines collection.multitask",
    "boxes": "tasks.boxes",
    "collect": "collection.collect",
    "comparison": "evaluation.comparison",
    "cond_p_diff": "evaluation.cond_p_diff",
    "configuration": "generator.configuration",
    "corpus": "demo.corpus",
    "data_source": "tasks.text tasks.examples",
    "demo": "demo.run",
    "detection": "evaluation.detection tasks.coco_tasks",
    "encoders": "models.text_encoders models.hidden_states",
    "evaluation": "evaluation.perplexity reporting.summary models.inputs models.losses",
    "factory": "collection.trainer",
    "files": "utils.files utils.paths utils.safe_files",
    "fold": "evaluation.fold",
    "folders": "utils.folders",
    "generation": "generator.generation adapters.folder",
    "hub": "hub.client",
    "image_classification": "models.classifiers",
    "image_data": "tasks.examples",
    "image_encoders": "models.image_encoders",
    "image_sources": "tasks.image_sources",
    "image_tasks": "tasks.images",
    "images": "tasks.image_files",
    "importing": "zoo.importing hub.card_reading",
    "layout": "adapters.layout",
    "metrics": "evaluation.accuracy",
    "model_card": "hub.cards generator.hub",
    "model_inputs": "models.inputs",
    "modeling": "generator.modeling",
    "networks": "generator.networks",
    "pushing": "generator.hub zoo.hub",
    "refine": "generator.refine",
    "report": "reporting.report",
    "run_record": "zoo.run_record",
    "safe_files": "utils.safe_files",
    "sequences": "models.inputs",
    "snapshots": "zoo.checkpoints",
    "summaries": "reporting.summary",
    "tables": "reporting.tables",
    "tasks": "tasks.task tasks.task_file",
    "training": "training.train",
    "zoo": "zoo.store",
    "zoo_tools": "zoo.tools zoo.hub",
}


def find(module: str, name: str) -> object:
    """Load a name of an old module, or of a package that was one, from where it is now.

    Raises:
        AttributeError: When no module of today has it.
    """
    homes = () if name.startswith("__") else MOVED.get(module.removeprefix(f"{PACKAGE}."), "").split()
    for home in homes:
        found = vars(import_module(f"{PACKAGE}.{home}"))
        if name in found:
            warnings.warn(
                f"{module}.{name} is now {PACKAGE}.{home}.{name}; the old path goes with version 0.3",
                DeprecationWarning,
                stacklevel=3,
            )
            return found[name]
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Makes an old module of the names that it had."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == PACKAGE and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = lambda name: find(module.__name__, name)


def install() -> None:
    """Let Python find the old modules, after all others."""
    sys.meta_path.append(_Finder())
