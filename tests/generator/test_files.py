"""A generator's files: links, sizes and names that a downloaded folder may and may not have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from lora_factory.errors import LoraFactoryError
from lora_factory.generator.configuration import CVAELoRAConfig
from lora_factory.generator.files import GeneratorSource, check_public_names, is_public_name, read_config
from lora_factory.utils.safe_files import checked_file, is_hub_id


def config(
    base_model: str = "alice/base", text_encoder: str | None = "alice/encoder", image_encoder: str | None = None
) -> CVAELoRAConfig:
    encoders = {"text_encoder": text_encoder, "image_encoder": image_encoder}
    return CVAELoRAConfig(layout={"base_model": base_model}, modalities={"text": 3}, **encoders)


@pytest.mark.parametrize(
    "name", ["/etc", "./encoder", "../encoder", "a/b/c", "open_clip:local-dir:/etc", "open_clip:ViT-B-32:/x.pt"]
)
def test_a_downloaded_config_names_no_local_file(name: str) -> None:
    assert not is_public_name(name)
    named = {
        "text encoder": config(text_encoder=name),
        "base model": config(base_model=name),
        "image encoder": config(image_encoder=name),
    }
    for noun, values in named.items():
        with pytest.raises(LoraFactoryError, match=rf"names '{name}' as its {noun}, which is no model of the Hub"):
            check_public_names(values, "alice/generator")


def test_a_hub_id_that_is_a_folder_here_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_public_names(config(), "alice/generator")
    check_public_names(config(text_encoder="open_clip:ViT-B-32:laion2b_s34b_b79k"), "alice/generator")
    check_public_names(config(text_encoder="open_clip:hf-hub:alice/clip"), "alice/generator")
    Path("alice/encoder").mkdir(parents=True)
    with pytest.raises(LoraFactoryError, match="also the name of a file or folder here, which you did not ask for"):
        check_public_names(config(), "alice/generator")


def test_folders_that_came_from_the_hub_are_known(tmp_path: Path) -> None:
    for name, downloaded in (("mine", False), ("snapshots/0123", True), ("copy", True)):
        (tmp_path / name).mkdir(parents=True)
        if name == "copy":  # as snapshot_download(local_dir=) leaves it
            (tmp_path / name / ".cache/huggingface").mkdir(parents=True)
        assert GeneratorSource(str(tmp_path / name)).is_downloaded is downloaded
    assert GeneratorSource("alice/generator").is_downloaded


def test_links_stay_inside(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots/0123", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "own").symlink_to("config.json")
    (snapshot / "out").symlink_to("../../secret")
    assert checked_file(snapshot, "config.json", 10).read_text() == "{}"
    assert checked_file(snapshot, "own", 10).read_text() == "{}"
    with pytest.raises(LoraFactoryError, match="outside of its folder; it is not followed"):
        checked_file(snapshot, "out", 10)
    with pytest.raises(LoraFactoryError, match="has 2 bytes, at most 1 are expected"):
        checked_file(snapshot, "config.json", 1)
    with pytest.raises(LoraFactoryError, match="is missing"):
        checked_file(snapshot, "none", 1)
    with pytest.raises(LoraFactoryError, match="no ordinary file"):
        checked_file(tmp_path, "blobs", 1 << 20)


def test_hub_ids() -> None:
    assert is_hub_id("alice/base") and is_hub_id("gpt2")
    assert not any(map(is_hub_id, ["", "/a", "a/", "../a", "a--b", "a b", "a\nb", "a/b/c"]))


def test_options_are_parted_from_those_of_transformers() -> None:
    options = {"revision": "v1", "token": "t", "dtype": "float32", "config": "theirs", "subfolder": ""}
    source, rest = GeneratorSource.from_options("alice/generator", options)
    assert (source.name, source.revision, source.token) == ("alice/generator", "v1", "t")
    assert rest == {"dtype": "float32"}
    with pytest.raises(LoraFactoryError, match="subfolder='deep'"):
        GeneratorSource.from_options("alice/generator", {"subfolder": "deep"})
    GeneratorSource.from_options("alice/generator", {"adapter_kwargs": {"_adapter_model_path": "alice/generator"}})
    with pytest.raises(LoraFactoryError, match=r"'evil/generator' holds an adapter_config\.json"):
        GeneratorSource.from_options("generator", {"adapter_kwargs": {"_adapter_model_path": "evil/generator"}})


def test_older_and_newer_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "cvae_lora", "format_version": 9, "width": {"of": "a later version"}}))
    with pytest.raises(LoraFactoryError, match="format_version=9: this lora-factory reads versions up to 4"):
        read_config(path)
    for values in ({}, {"format_version": 1, "width": {"of": "an earlier version"}}):
        path.write_text(json.dumps({"model_type": "cvae_lora"} | values))
        with pytest.raises(LoraFactoryError, match="has format 1, that of networks which lora-factory no longer has"):
            read_config(path)
    path.write_text(json.dumps({"model_type": "cvae_lora", "format_version": 2, "width": 0}))
    with pytest.raises(StrictDataclassError) as caught:
        read_config(path)
    assert "width, depth, latent_size and channels must be at least 1" in str(caught.value)
