"""Show the progress of a collection: a bar with the remaining time, and Accelerate's trackers, in the main process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import is_torch_xla_available

from lora_factory.arguments import CollectArguments
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.progress import progress_bar
from lora_factory.zoo.run_record import RunRecord

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}]"
_LOG_EVERY = 10  # steps between two losses in the trackers


def make_accelerator(arguments: CollectArguments, folder: Path) -> Accelerator:
    """Accelerate with the trackers that ``report_to`` names, which write into ``folder`` where they need one.

    Raises:
        LoraFactoryError: When a tracker's package is not installed.
    """
    installed = {str(tracker) for tracker in get_available_trackers()}
    if missing := sorted(set(arguments.report_to) - installed):
        raise LoraFactoryError(f"report_to={missing} needs a package; run: pip install {' '.join(missing)}")
    # Told nothing, Accelerate takes several processes on a machine without accelerators for as many single ones.
    cpu = not torch.accelerator.is_available() and not is_torch_xla_available()
    return Accelerator(cpu=cpu, log_with=list(arguments.report_to) or None, project_dir=folder)


class Progress:
    """The bar and the trackers of a collection.

    Args:
        accelerator: From ``make_accelerator``.
        arguments: Settings, which the trackers note.
        total: Runs in all.
        done: Runs that are in the zoo already.
    """

    def __init__(self, accelerator: Accelerator, arguments: CollectArguments, total: int, done: int) -> None:
        """Show the bar and start the trackers."""
        self.accelerator, self._done, self._steps = accelerator, done, 0
        hidden = not accelerator.is_main_process
        self._bar = progress_bar(total=total, initial=done, desc="collect", bar_format=_BAR, disable=hidden)
        if arguments.report_to:
            settings = asdict(arguments)
            settings |= {name: str(value) for name, value in settings.items() if isinstance(value, tuple)}
            accelerator.init_trackers("lora-factory-collect", config=settings)

    def step(self, step: int, steps: int, loss: float) -> None:
        """Take note of a step of the run that this process trains."""
        self._steps += 1
        self._bar.n = self._done + step / steps
        self._bar.update(0)
        if self._steps % _LOG_EVERY == 0 or step == steps:
            self.accelerator.log({"loss": loss, "step": step}, step=self._steps)

    def landed(self, record: RunRecord) -> None:
        """Take note of a run that is in the zoo now, whichever process made it."""
        self._count()
        name = f"{record.task}/{record.run}"
        self.accelerator.log(
            {"runs": self._done, f"validation_loss/{name}": record.validation_losses[-1]}, step=self._steps
        )

    def failed(self) -> None:
        """Take note of a run that is given up."""
        self._count()

    def close(self) -> None:
        """End the bar and the trackers."""
        self._bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _count(self) -> None:
        self._done += 1
        self._bar.n = self._done
        self._bar.refresh()
