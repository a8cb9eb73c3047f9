"""A generator's files, in a folder or on the Hub: found, bounded and checked before anything of them is used."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from torch import nn

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.modules import check_types
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.configuration import CVAELoRAConfig
from lora_factory.hub.errors import explain
from lora_factory.utils.paths import local_path
from lora_factory.utils.printable import few
from lora_factory.utils.safe_files import (
    MAX_CONFIG_BYTES,
    check_size,
    checked_file,
    is_hub_id,
    read_json_object,
    readable,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TRAINING_FILE = "training.json"
# What else may be given as a generator, by a file of it: its type of repository on the Hub, and what takes it.
_OTHERS = {
    "zoo.json": (
        "dataset",
        "a zoo, not a generator; train a generator on it with lora-factory train --zoo, or train_generator",
    ),
    "adapter_config.json": (
        "model",
        "an adapter, not a generator; load it with peft, or score it with lora-factory evaluate --adapter",
    ),
}
MAX_MODALITIES, MAX_TASKS = 16, 1 << 16
MAX_SLICES = 2_000_000  # of one adapter, in all modules; Llama-3 70B with rank 64 on every linear layer has 36,000
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
SET_BY_AUTO_MODEL = (
    *("config", "_from_auto", "_commit_hash", "adapter_kwargs", "code_revision", "trust_remote_code", "subfolder"),
)
_AGAIN = "download it, or train it with lora-factory train or train_generator, again"
_HEADER_BYTES = 1 << 20  # what a safetensors file may hold besides its tensors
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    "I64": torch.int64,
}
_REQUEST_SECONDS = 10.0


@dataclass
class GeneratorSource:
    """The folder or repository of a generator; gives its files, each inside of the folder and no larger than expected.

    Attributes:
        name: A folder or a Hub id.
        revision: Branch, tag or commit on the Hub; the commit, once the first file was asked for.
        token: Access token, as everywhere in huggingface_hub.
        cache_dir: Folder of the Hub's cache.
        local_files_only: Take what is in the cache and ask nobody.
        force_download: Download even what is in the cache.
    """

    name: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    commit: str | None = dataclasses.field(default=None, init=False)

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any]) -> tuple[GeneratorSource, dict[str, Any]]:
        """A source from the options of ``from_pretrained``, and those of them that are left to transformers.

        Raises:
            LoraFactoryError: When they lead to something else than the whole of this folder or repository.
        """
        if options.get("subfolder"):
            raise LoraFactoryError(
                f"subfolder={options['subfolder']!r}: a generator has a folder or repository of its own; name that"
            )
        detour = (options.get("adapter_kwargs") or {}).get("_adapter_model_path")
        if detour not in (None, name):
            raise LoraFactoryError(
                f"{detour!r} holds an adapter_config.json, by which AutoModel loads {name!r} in its place; "
                "load what you want with CVAELoRAGenerator.from_pretrained"
            )
        local_path(name)  # refuses what is no path, and so no Hub id
        hub = {key: options[key] for key in HUB_OPTIONS if key in options}
        dropped = {*HUB_OPTIONS, *SET_BY_AUTO_MODEL}
        return cls(os.path.expanduser(name), **hub), {
            key: value for key, value in options.items() if key not in dropped
        }

    @property
    def is_folder(self) -> bool:
        """Whether the name is that of a local folder."""
        with readable(self.name):
            return Path(self.name).is_dir()

    @property
    def is_downloaded(self) -> bool:
        """Whether the files were written by somebody else: they are on the Hub, or in a folder that came from it."""
        folder = Path(self.name).resolve()
        return not self.is_folder or folder.parent.name == "snapshots" or (folder / ".cache/huggingface").is_dir()

    def file(self, name: str, limit: int) -> Path:
        """The path of a file, downloaded if need be.

        Args:
            name: Its name, one of ours.
            limit: The most bytes that it may have.

        Raises:
            LoraFactoryError: When it is no ordinary file of the folder, or larger.
            OSError: When it cannot be found.
            httpx2.HTTPError: When the Hub does not send it.
        """
        if self.is_folder:
            return checked_file(Path(self.name), name, limit)
        path = self._download(name, limit)
        self.commit = path.parent.name  # snapshots/<commit>/<name>: all files are of one commit
        return checked_file(path.parent, name, limit)

    def _download(self, name: str, limit: int) -> Path:
        revision = self.commit or self.revision
        if not is_hub_id(self.name):
            raise LoraFactoryError(f"{self.name!r} is neither a folder nor a Hub id; write user/name")
        options: dict[str, Any] = {"revision": revision, "cache_dir": self.cache_dir, "token": self.token}
        if not (self.local_files_only or is_offline_mode()):
            # One short question first: hf_hub_download repeats its own for half a minute when nobody answers.
            try:
                url = hf_hub_url(self.name, name, revision=revision)
                size = get_hf_file_metadata(url, token=self.token, timeout=_REQUEST_SECONDS).size or 0
            except (httpx2.TransportError, HfHubHTTPError) as error:
                if self.force_download:
                    raise
                try:
                    return Path(hf_hub_download(self.name, name, local_files_only=True, **options))
                except OSError:
                    raise error from None
            check_size(f"{self.name}/{name}", size, limit)
        options |= {"local_files_only": self.local_files_only, "force_download": self.force_download}
        return Path(hf_hub_download(self.name, name, **options))


@contextlib.contextmanager
def loading_errors(source: GeneratorSource) -> Iterator[None]:
    """Turn whatever fails while a generator's files are read into one error with the generator's name.

    Raises:
        LoraFactoryError: When the block raises anything: these are somebody else's files.
    """
    try:
        yield
    except Exception as error:
        told = isinstance(error, LoraFactoryError | OSError | httpx2.HTTPError)  # these say what to do
        remedy = "" if told else f"; {_AGAIN}"
        missing = "" if source.is_folder else "there is no folder of that name here, and "
        raise LoraFactoryError(
            f"cannot load a generator from {source.name!r}: {missing}{explain(error, source.name)}{remedy}"
        ) from error


def read_generator(
    source: GeneratorSource, build: Callable[[CVAELoRAConfig], nn.Module]
) -> tuple[CVAELoRAConfig, dict[str, torch.Tensor]]:
    """Read a generator's configuration and weights, each bounded and checked before it is used.

    Args:
        source: Where the files are.
        build: Makes the module of a configuration, here on the meta device.

    Returns:
        The configuration, and the weights.
    """
    config = read_config(_config_file(source))
    if source.is_downloaded:
        check_public_names(config, source.name)
    with torch.device("meta"):
        expected = build(config).state_dict()
    limit = _HEADER_BYTES + sum(8 * tensor.numel() + 1000 for tensor in expected.values())
    return config, read_weights(source.file(WEIGHTS_FILE, limit), expected)


def _config_file(source: GeneratorSource) -> Path:
    """The path of a generator's configuration.

    Raises:
        LoraFactoryError: When the name is that of a file, a zoo or an adapter; says what it is, and what takes it.
    """
    path = Path(source.name)
    if path.is_file():
        raise LoraFactoryError(f"{source.name!r} is a file; name the generator's folder")
    if source.is_folder and not (path / CONFIG_FILE).exists():
        for name, (_, what) in _OTHERS.items():
            if (path / name).exists():
                raise LoraFactoryError(f"{source.name!r} is {what}")
    try:
        return source.file(CONFIG_FILE, MAX_CONFIG_BYTES)
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):
        where: Any = {"repo_id": source.name, "revision": source.revision}
        for name, (kind, what) in _OTHERS.items():
            if HfApi(token=source.token).file_exists(**where, filename=name, repo_type=kind):
                raise LoraFactoryError(f"{source.name!r} is {what}") from None
        raise


def read_training_record(source: GeneratorSource) -> dict[str, Any] | None:
    """Read a generator's ``training.json``; None, with a warning when it exists and cannot be read."""
    if source.is_folder and not os.path.lexists(Path(source.name, TRAINING_FILE)):
        return None
    try:
        return read_json_object(source.file(TRAINING_FILE, MAX_CONFIG_BYTES))
    except EntryNotFoundError:  # also when it is not in the cache and nobody can be asked
        return None
    except (LoraFactoryError, OSError, httpx2.HTTPError) as error:
        warnings.warn(f"{TRAINING_FILE} is left out, a push goes without it: {error}", stacklevel=3)
        return None


def read_config(path: Path) -> CVAELoRAConfig:
    """A generator's configuration from its ``config.json``: our own fields and the precision, and nothing else.

    Whatever else transformers would act on (another model's code, an attention kernel, a quantisation, an adapter to
    load first) is not passed on.

    Raises:
        LoraFactoryError: When it is not a generator's, of a newer format, or larger than any real one.
    """
    values = read_json_object(path, limit=MAX_CONFIG_BYTES)
    if values.get("model_type") != CVAELoRAConfig.model_type:
        raise LoraFactoryError(
            f"{path} has model_type {values.get('model_type')!r}, expected {CVAELoRAConfig.model_type!r}; "
            "name the folder or Hub id of a generator, as lora-factory train or train_generator writes one"
        )
    known = {"dtype", *CVAELoRAConfig.own_fields()}
    config = CVAELoRAConfig.from_dict({name: value for name, value in values.items() if name in known})
    if values.get("dtype", "float32") not in ("float64", "float32", "float16", "bfloat16"):
        raise LoraFactoryError(f"dtype={values['dtype']!r}: expected float64, float32, float16 or bfloat16; {_AGAIN}")
    if config.layout is None or not config.modalities:
        raise LoraFactoryError(
            f"{path}: a generator's config needs layout and modalities; lora-factory train and train_generator write "
            "both"
        )
    layout = AdapterLayout.from_dict(config.layout)
    for noun, count, most in (
        ("rank slices", sum(module.rank for module in layout.modules), MAX_SLICES),
        ("modalities", len(config.modalities), MAX_MODALITIES),
        ("tasks", len(config.tasks or ()), MAX_TASKS),
    ):
        if count > most:
            raise LoraFactoryError(f"{path} has {count:,} {noun}, at most {most:,} are read; {_AGAIN}")
    check_types(layout.lora_config)
    return config


def check_public_names(config: CVAELoRAConfig, source: str) -> None:
    """Check that a downloaded configuration names models of the Hub, so that it chooses no file here to be read.

    Raises:
        LoraFactoryError: When the base model or an encoder is, or may be, a local file or folder.
    """
    names = {
        "base model": config.layout["base_model"] if config.layout else None,
        "text encoder": config.text_encoder,
        "image encoder": config.image_encoder,
    }
    for noun, name in names.items():
        if name is not None and not is_public_name(name):
            raise LoraFactoryError(
                f"the downloaded generator {source!r} names {name!r} as its {noun}, which is no model of the Hub; "
                "its author has to push it again with a Hub id"
            )
        if name is not None and Path(name).exists():
            raise LoraFactoryError(
                f"the {noun} {name!r} of the downloaded generator {source!r} is also the name of a file or folder "
                "here, which you did not ask for; change to another directory"
            )


def is_public_name(name: str) -> bool:
    """Return whether a model's name is a Hub id or one of open_clip's names, which mean the same on every machine."""
    if name.startswith("open_clip:"):
        name = name.removeprefix("open_clip:")
        if not name.startswith("hf-hub:"):
            import open_clip

            model, _, tag = name.partition(":")
            return bool(tag) and tag in open_clip.list_pretrained_tags_by_model(model)
        name = name.removeprefix("hf-hub:")
    return is_hub_id(name)


def read_weights(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read a safetensors file that holds just these tensors; nothing is allocated before its header fits.

    Args:
        path: The file.
        expected: Tensors of the same names and shapes, for example on the meta device.

    Returns:
        Copies, not views of the file: their alignment, and with it the order of sums, is that of fresh tensors.

    Raises:
        LoraFactoryError: For another name, shape or type, NaN or infinity; names the first ones.
        safetensors.SafetensorError: When the file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if different := sorted(names ^ set(expected)):
            raise LoraFactoryError(
                f"{path}: {len(different)} weights are missing or unknown: {few(different)}; {_AGAIN}"
            )
        headers = {name: file.get_slice(name) for name in expected}
        bad = [
            f"{name} is {header.get_dtype()} {tuple(header.get_shape())}, expected {expected[name].dtype} "
            f"{tuple(expected[name].shape)}"
            for name, header in headers.items()
            if tuple(header.get_shape()) != tuple(expected[name].shape)
            or (dtype := _DTYPES.get(header.get_dtype())) is None
            or dtype.is_floating_point != expected[name].dtype.is_floating_point
        ]
        if bad:
            raise LoraFactoryError(f"{path}: {len(bad)} weights have another shape or type: {few(bad)}; {_AGAIN}")
        tensors = {name: file.get_tensor(name).clone() for name in expected}
    if infinite := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise LoraFactoryError(f"{few(infinite)} in {path}: NaN or infinite values; {_AGAIN}")
    return tensors
