"""The record of one run of a zoo: how it was made, and what its files must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypedDict, get_type_hints

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.paths import safe_name
from lora_factory.utils.printable import few
from lora_factory.utils.versions import check_format

FORMAT_VERSION = 1


class _RunValues(TypedDict):
    """The types of `run.json`."""

    task: str
    run: str
    descriptions: list[str] | tuple[str, ...]
    seed: int
    base_model: str
    base_revision: str | None
    steps: int
    snapshot_steps: list[int] | tuple[int, ...]
    validation_losses: list[int | float] | tuple[int | float, ...]
    train_tokens: int
    data_fingerprint: str
    versions: dict[str, str]
    arguments: dict[str, Any]
    sha256: dict[str, str]
    license: str | None
    dataset: str | None


# Annotations are postponed, and `validate_typed_dict` passes over those that are not resolved.
_RunValues.__annotations__.update(get_type_hints(_RunValues))


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of how one run was made; `run.json`.

    Attributes:
        task: the task's name.
        run: the run's name, for example "seed-0".
        descriptions: texts that describe the task, at least one.
        seed: seed of the run.
        base_model: Hub id (or folder) of the base model.
        base_revision: commit of the base model, or None.
        steps: optimizer steps in all.
        snapshot_steps: the step of every checkpoint, K of them, rising.
        validation_losses: loss of every checkpoint in nats per token; empty when none was measured.
        train_tokens: tokens that training saw.
        data_fingerprint: fingerprint of the task's data.
        versions: versions of the packages that made the run.
        arguments: the settings that the run was made with.
        sha256: SHA-256 (hex) of every other file in the run folder; `AdapterZoo.add_run` fills it in.
        license: licence of the data.
        dataset: id on the Hub of the data set, if it came from there.

    Raises:
        LoraFactoryError: if a name is no file name, or descriptions or checkpoints are missing or do not match.
    """

    task: str
    run: str
    descriptions: tuple[str, ...]
    seed: int
    base_model: str
    base_revision: str | None
    steps: int
    snapshot_steps: tuple[int, ...]
    validation_losses: tuple[float, ...]
    train_tokens: int
    data_fingerprint: str
    versions: Mapping[str, str] = field(hash=False)
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sha256: Mapping[str, str] = field(default_factory=dict, hash=False)
    license: str | None = None
    dataset: str | None = None

    def __post_init__(self) -> None:
        """Check the record at birth."""
        for name in (self.task, self.run, *self.sha256):
            safe_name(name)
        where = f"{self.task}/{self.run}"
        if (
            isinstance(self.descriptions, str)
            or not self.descriptions
            or not all(text.strip() for text in self.descriptions)
        ):
            raise LoraFactoryError(f"{where} needs at least one description and none empty; got {self.descriptions}")
        if not self.snapshot_steps or list(self.snapshot_steps) != sorted(set(self.snapshot_steps)):
            raise LoraFactoryError(
                f"{where}: snapshot_steps must be at least one and rising; got {self.snapshot_steps}"
            )
        if len(self.validation_losses) not in (0, len(self.snapshot_steps)):
            raise LoraFactoryError(
                f"{where}: {len(self.validation_losses)} validation losses for {len(self.snapshot_steps)} snapshots; "
                "give one per snapshot, or none"
            )
        if not all(math.isfinite(loss) for loss in self.validation_losses):
            raise LoraFactoryError(
                f"{where}: validation losses {self.validation_losses} must be finite; lower the learning rate"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunRecord:
        """Rebuild a record from `to_dict`'s JSON.

        Raises:
            LoraFactoryError: for an unknown format version, missing, unknown or wrong entries.
        """
        check_format(values.get("format_version"), FORMAT_VERSION, "the run's record")
        values = {"dataset": None, **values}  # older records lack it
        del values["format_version"]
        different = sorted({entry.name for entry in fields(cls)} ^ set(values))
        if different:
            names = few([name[:100] for name in different])
            raise LoraFactoryError(f"entries of the run's record are missing or unknown: {names}")
        try:
            validate_typed_dict(_RunValues, values)  # type: ignore[type-var]  # it wants a dict, which a TypedDict is
            lists = {name: tuple(values[name]) for name in ("descriptions", "snapshot_steps", "validation_losses")}
            return cls(**(values | lists))
        except (StrictDataclassError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise LoraFactoryError(f"the run's record holds a value of the wrong type: {reason}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values, for `from_dict`; without a data set it is what older versions wrote."""
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        if self.dataset is None:
            del values["dataset"]
        return values
