"""What a generator and a zoo push to the Hub: their files, the card written last."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from huggingface_hub import CommitInfo
from torch import Tensor

from lora_factory import __version__
from lora_factory.errors import LoraFactoryError
from lora_factory.files import local_path, safe_name, share_file, write_json, write_text
from lora_factory.folders import check_saving, storage_errors
from lora_factory.generation import Generation, Order, write_adapter
from lora_factory.generator_files import TRAINING_FILE, WEIGHTS_FILE, is_public_name
from lora_factory.hub import CARD_FILE, PushOptions, Writer, about_model, collect_repositories, push
from lora_factory.model_card import AdapterCard, Origins, ZooCard, generator_card, origins_of
from lora_factory.run_record import FORMAT_VERSION
from lora_factory.safe_files import MAX_CONFIG_BYTES, checked_file, is_hub_id, read_json_object
from lora_factory.zoo_tools import run_files

if TYPE_CHECKING:
    from lora_factory.layout import AdapterLayout
    from lora_factory.modeling import CVAELoRAGenerator
    from lora_factory.zoo import AdapterZoo

COMPARISON_FILE = "comparison.json"
PLOT_FILE = "headroom.svg"


class HubMixin:
    """What a generator does on the Hub: push itself, or adapters that it writes.

    Every push writes a folder first and uploads it in one commit, so that it arrives whole or not at all; what people
    added to the card that is there stays in it. When a push fails, the folder is kept and the error names it.
    """

    def push_to_hub(  # type: ignore[misc]  # the mixin's host is always a generator
        self: CVAELoRAGenerator,
        repo_id: str,
        *,
        comparison: Mapping[str, Any] | str | Path | None = None,
        tags: Sequence[str] = (),
        **options: Unpack[PushOptions],
    ) -> CommitInfo:
        """Push the generator: config, weights and card, with the comparison's results if there is one.

        Args:
            repo_id: Hub id, ``user/name``.
            comparison: What ``comparison.compare`` returned for this generator, or its ``comparison.json``.
            tags: More tags for the card.
            **options: ``private``, ``revision``, ``commit_message``, ``create_pr``, ``token``; see `PushOptions`.

        Returns:
            The commit, with ``commit_url`` and ``pr_url``.

        Raises:
            LoraFactoryError: When the generator names a base model or an encoder that others cannot load, or the Hub
                refuses or cannot be reached.
        """
        write = generator_writer(self, comparison=comparison, tags=tags, token=options.get("token"))
        commit = push(write, repo_id, default_message="Push generator", **options)
        if not options.get("create_pr"):
            self.config.name_or_path, self.config._commit_hash = commit.repo_url.repo_id, commit.oid
        return commit

    def save_pretrained(  # type: ignore[misc]
        self: CVAELoRAGenerator,
        save_directory: str | Path,
        *args: Any,  # noqa: ANN401
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Save the generator, as in transformers, and its ``training.json``; with ``push_to_hub`` push it then.

        Args:
            save_directory: The folder.
            *args: As in transformers.
            push_to_hub: Push as well, with a card, as `push_to_hub` does it.
            repo_id: Where to; default: the folder's name in the user's own namespace.
            **kwargs: As in transformers, and with ``push_to_hub`` its options.
        """
        options = {name: kwargs.pop(name) for name in PushOptions.__annotations__ if name in kwargs}
        save_directory = check_saving(save_directory)
        with storage_errors(save_directory):
            super().save_pretrained(save_directory, *args, **kwargs)
        if (weights := Path(save_directory, WEIGHTS_FILE)).is_file():
            share_file(weights)
        if self.training_record is not None:
            write_json(Path(save_directory, TRAINING_FILE), self.training_record)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **options)

    def push_adapter(  # type: ignore[misc]
        self: CVAELoRAGenerator,
        text: str | None,
        repo_id: str,
        *,
        conditions: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        temperature: float = 0.0,
        tags: Sequence[str] = (),
        **options: Unpack[PushOptions],
    ) -> CommitInfo:
        """Generate an adapter and push it as a PEFT repository, which loads without this package.

        Args:
            text: What the adapter is for.
            repo_id: Hub id, ``user/name``.
            conditions: Task vectors by modality, instead of or beside ``text``.
            seed: Seed of the sample; of no effect at temperature 0.
            temperature: 0 writes the most likely adapter; 1 samples with the spread of real checkpoints.
            tags: More tags for the card.
            **options: ``private``, ``revision``, ``commit_message``, ``create_pr``, ``token``; see `PushOptions`.

        Returns:
            The commit, with ``commit_url`` and ``pr_url``.

        Raises:
            LoraFactoryError: As for ``save_adapter``, and when the Hub refuses or cannot be reached.
        """
        write = adapter_writer(
            self, text, conditions, seed=seed, temperature=temperature, tags=tags, token=options.get("token")
        )
        return push(write, repo_id, default_message="Push generated adapter", **options)

    def push_adapters(  # type: ignore[misc]
        self: CVAELoRAGenerator,
        texts: Mapping[str, str],
        repo_id: str,
        *,
        collection: str | None = None,
        seed: int = 0,
        temperature: float = 0.0,
        tags: Sequence[str] = (),
        **options: Unpack[PushOptions],
    ) -> list[CommitInfo]:
        """Generate several adapters and push them: into one repository, or into one each and a collection of these.

        Args:
            texts: What each adapter is for, by its name.
            repo_id: Hub id. One repository gets a folder an adapter, in one commit; with ``collection`` each adapter
                goes to the repository ``<repo_id>-<name>``.
            collection: Title of the collection, made in the namespace of ``repo_id`` if it is not there.
            seed: Seed of the samples; of no effect at temperature 0.
            temperature: As in `push_adapter`.
            tags: More tags for the cards.
            **options: As in `push_adapter`.

        Returns:
            The commits.

        Raises:
            LoraFactoryError: As for `push_adapter`; adapters pushed before the failing one stay.
        """
        check_base_model(self.layout)
        names = [safe_name(name) for name in texts]
        if not names:
            raise LoraFactoryError('texts is empty; name at least one adapter: {"legal": "Legal notices"}')
        if collection is not None:
            how: dict[str, Any] = {"seed": seed, "temperature": temperature, "tags": tags, **options}
            commits = [self.push_adapter(text, f"{repo_id}-{name}", **how) for name, text in texts.items()]
            collect_repositories(collection, [commit.repo_url.repo_id for commit in commits], **options)
            return commits
        write = adapters_writer(self, texts, seed=seed, temperature=temperature, tags=tags, token=options.get("token"))
        return [push(write, repo_id, default_message=f"Push {len(names)} generated adapters", **options)]


def generator_writer(
    generator: CVAELoRAGenerator,
    *,
    comparison: Mapping[str, Any] | str | Path | None = None,
    tags: Sequence[str] = (),
    token: str | bool | None = None,
) -> Writer:
    """What writes all files of a generator's repository, the card last; see `HubMixin.push_to_hub`.

    Raises:
        LoraFactoryError: When the comparison cannot be read, or is one of another base model.
    """
    check_base_model(generator.layout)
    for field in ("text_encoder", "image_encoder"):
        encoder = getattr(generator.config, field)
        if encoder is not None and not is_public_name(encoder):
            raise LoraFactoryError(
                f"the generator's {field.replace('_', ' ')} {encoder!r} is no model of the Hub, so others cannot load "
                f"it; push the encoder and set generator.config.{field} to its Hub id"
            )
    results: Any = comparison
    if isinstance(comparison, str | Path):
        path = local_path(comparison).absolute()
        results = read_json_object(checked_file(path.parent, path.name, MAX_CONFIG_BYTES))
    if results is not None:
        known = isinstance(results, Mapping) and {"cells", "methods"} <= results.keys()
        if not known or results.get("base_model") != generator.layout.base_model:
            raise LoraFactoryError(
                f"the comparison is not one of adapters for {generator.layout.base_model}; "
                "pass the comparison.json that lora-factory evaluate --generator wrote"
            )
    origins = origins_of(generator, *about_model(generator.layout.base_model, token))

    def write(folder: Path, title: str) -> None:
        generator.save_pretrained(folder)
        plot = None
        if results is not None:
            write_json(folder / COMPARISON_FILE, results)
            plot = _write_plot(results, folder / PLOT_FILE)
        card = generator_card(generator, title, origins=origins, comparison=results, plot=plot, tags=tags)
        write_text(folder / CARD_FILE, card)

    return write


def adapter_writer(
    generator: CVAELoRAGenerator,
    text: str | None,
    conditions: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    temperature: float = 0.0,
    tags: Sequence[str] = (),
    token: str | bool | None = None,
) -> Writer:
    """What writes all files of a generated adapter's repository; see `HubMixin.push_adapter`."""
    check_base_model(generator.layout)
    origins = origins_of(generator, *about_model(generator.layout.base_model, token))

    order = Order(text, conditions=conditions, seed=seed, temperature=temperature)

    def write(folder: Path, title: str) -> None:
        made = write_adapter(generator, folder, order)
        card = AdapterCard(title=title, origins=origins, generations={"": made}, tags=tags)
        write_text(folder / CARD_FILE, card.text)

    return write


def adapters_writer(
    generator: CVAELoRAGenerator,
    texts: Mapping[str, str],
    *,
    seed: int = 0,
    temperature: float = 0.0,
    tags: Sequence[str] = (),
    token: str | bool | None = None,
) -> Writer:
    """What writes a repository with a folder for each of several adapters; see `HubMixin.push_adapters`."""
    check_base_model(generator.layout)
    origins = origins_of(generator, *about_model(generator.layout.base_model, token))

    orders = {name: Order(text, seed=seed, temperature=temperature) for name, text in texts.items()}

    def write(folder: Path, title: str) -> None:
        made: dict[str, Generation] = {}
        for name, order in orders.items():
            (folder / name).mkdir()
            made[name] = write_adapter(generator, folder / name, order)
            one = AdapterCard(title=title, subfolder=name, origins=origins, generations={"": made[name]}, tags=tags)
            write_text(folder / name / CARD_FILE, one.text)
        card = AdapterCard(title=title, origins=origins, generations=made, tags=tags)
        write_text(folder / CARD_FILE, card.text)

    return write


def zoo_writer(zoo: AdapterZoo, *, tags: Sequence[str] = (), token: str | bool | None = None) -> Writer:
    """What writes a zoo's data set repository; see ``AdapterZoo.push_to_hub``.

    Raises:
        LoraFactoryError: When a file of the zoo is damaged.
    """
    check_base_model(zoo.layout)
    if problems := zoo.verify():
        raise LoraFactoryError(f"{len(problems)} files of the zoo are damaged, nothing is pushed: {problems[0]}")
    layout = zoo.layout
    records = {task: [zoo.record(task, run) for run in zoo.runs(task)] for task in zoo.tasks}
    known = ("descriptions", "license", "dataset")
    tasks = [
        {"name": name, "runs": len(runs), **{key: getattr(runs[0], key) for key in known}}
        for name, runs in records.items()
    ]
    origins = Origins(
        base_model=layout.base_model,
        base_revision=layout.base_revision,
        base_license=about_model(layout.base_model, token)[0],
        tasks=tasks,
    )
    facts = {
        "weights of an adapter": f"{layout.size:,}",
        "runs": str(sum(map(len, records.values()))),
        "snapshots": str(sum(len(run.snapshot_steps) for runs in records.values() for run in runs)),
        "fingerprint": zoo.fingerprint(),
        "written with": f"lora-factory {__version__}",
    }

    limits = {name: limit for runs in records.values() for run in runs for name, limit in run_files(zoo, run).items()}
    for name, limit in limits.items():
        checked_file(zoo.folder, name, limit)

    def write(folder: Path, title: str) -> set[str]:
        for name, limit in limits.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # A link, since a zoo may be larger than the disk's free space; what it leads to is a file of the zoo.
            (folder / name).symlink_to(checked_file(zoo.folder, name, limit).resolve())
        write_json(folder / "zoo.json", {"format_version": FORMAT_VERSION, "layout": layout.to_dict()})
        write_text(folder / CARD_FILE, ZooCard(title=title, origins=origins, facts=facts, tags=tags).text)
        return set(limits)

    return write


def push_zoo(zoo: AdapterZoo, repo_id: str, *, tags: Sequence[str] = (), **options: Unpack[PushOptions]) -> CommitInfo:
    """Push a zoo as a data set repository; see ``AdapterZoo.push_to_hub``."""
    write = zoo_writer(zoo, tags=tags, token=options.get("token"))
    return push(write, repo_id, default_message="Push zoo", repo_type="dataset", **options)


def check_base_model(layout: AdapterLayout) -> None:
    """Check that others can load the base model that adapters of a layout name.

    Raises:
        LoraFactoryError: When its name is no Hub id.
    """
    name = layout.base_model
    if not is_hub_id(name):
        raise LoraFactoryError(
            f"the adapters name {name!r} as their base model, which others cannot load; collect them with "
            "base_model_name= (--base-model-name) and the public Hub id of the base model"
        )


def _write_plot(comparison: Mapping[str, Any], path: Path) -> str | None:
    """Draw the headroom plot of a comparison; None without the extra ``report``."""
    from lora_factory.plots import draw_plots
    from lora_factory.summaries import summarise

    try:
        plots = draw_plots({}, summarise(comparison))
    except LoraFactoryError:
        return None
    if plots:
        write_text(path, base64.b64decode(plots[0].light.partition(",")[2]).decode())
    return path.name if plots else None
