"""Image vectors against naive computations, and open_clip's towers against those of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from helpers.images import picture, save_classifier
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessor,
    SiglipModel,
    ViTImageProcessor,
)

from lora_factory.errors import LoraFactoryError
from lora_factory.models.hidden_states import task_vector
from lora_factory.models.image_encoders import ImageEncoder, image_vectors
from lora_factory.models.text_encoders import TextEncoder

TEXTS = ["a photo of a cat", "dog", "a dog of a cat of a dog"]
IMAGES = [picture(number, size=16) for number in range(3)]
SIZES = {"width": 32, "layers": 2}


@pytest.fixture(scope="module")
def clip_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same random CLIP as open_clip and as transformers keep it."""
    ours, theirs = tmp_path_factory.mktemp("open_clip"), tmp_path_factory.mktemp("transformers")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "head_width": 16, **SIZES},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "heads": 2, **SIZES},
    }
    (ours / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = open_clip.CLIP(**config)
    save_file(source.state_dict(), ours / "open_clip_model.safetensors")
    common = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"hidden_act": "gelu", "projection_dim": 24}
    model = CLIPModel(
        CLIPConfig(
            text_config={**common, "bos_token_id": 49406, "eos_token_id": 49407},
            vision_config={**common, "image_size": 16, "patch_size": 8},
            projection_dim=24,
        )
    )
    model.load_state_dict(converted(source.state_dict()))
    model.save_pretrained(theirs)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(theirs)
    simple = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in simple.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=list(simple.bpe_ranks)).save_pretrained(theirs)
    return ours, theirs


def converted(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under the names of transformers."""
    found = {
        "logit_scale": source["logit_scale"],
        "text_model.embeddings.token_embedding.weight": source["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": source["positional_embedding"],
        "text_projection.weight": source["text_projection"].T,
        "visual_projection.weight": source["visual.proj"].T,
        "vision_model.embeddings.class_embedding": source["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": source["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": source["visual.positional_embedding"],
    }
    norms = {"text_model.final_layer_norm": "ln_final", "vision_model.post_layernorm": "visual.ln_post"}
    norms |= {"vision_model.pre_layrnorm": "visual.ln_pre"}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for layer in range(SIZES["layers"]):
            there, here = f"{tower}.encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
            names = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
            names |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}
            norms |= {f"{there}.{name}": f"{here}.{old}" for name, old in names.items()}
            for kind in ("weight", "bias"):
                parts = source[f"{here}.attn.in_proj_{kind}"].chunk(3)
                for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                    found[f"{there}.self_attn.{name}.{kind}"] = part
    found |= {f"{name}.{kind}": source[f"{old}.{kind}"] for name, old in norms.items() for kind in ("weight", "bias")}
    return {name: tensor.clone() for name, tensor in found.items()}


def test_open_clip_and_transformers_give_the_same_vectors(clip_folders: tuple[Path, Path]) -> None:
    ours, theirs = clip_folders
    towers = ImageEncoder(f"open_clip:local-dir:{ours}"), ImageEncoder(theirs)
    assert towers[0].width == towers[1].width == 24
    torch.testing.assert_close(towers[0].encode(IMAGES), towers[1].encode(IMAGES), atol=1e-5, rtol=1e-4)
    texts = TextEncoder(f"open_clip:local-dir:{ours}"), TextEncoder(theirs)
    assert texts[0].width == texts[1].width == 24
    torch.testing.assert_close(texts[0].encode(TEXTS), texts[1].encode(TEXTS), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(texts[0].encode(TEXTS)[0], texts[0].encode(TEXTS)[1], atol=1e-2)


@torch.no_grad()
def test_one_task_vector_of_images_and_texts(clip_folders: tuple[Path, Path]) -> None:
    folder = clip_folders[1]
    images, texts = ImageEncoder(folder).encode(IMAGES), TextEncoder(folder).encode(TEXTS)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessor.from_pretrained(folder)
    rows = [model.get_image_features(**processor(image, return_tensors="pt")).pooler_output[0] for image in IMAGES]
    tokens = AutoTokenizer.from_pretrained(folder)
    rows += [model.get_text_features(**tokens(text, return_tensors="pt")).pooler_output[0] for text in TEXTS]
    expected = functional.normalize(torch.stack(rows), dim=-1).mean(0)
    torch.testing.assert_close(task_vector(torch.cat([images, texts])), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_siglip_image_tower(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**sizes, "vocab_size": 10}, vision_config={**sizes, "image_size": 16, "patch_size": 8}
    )
    model = SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    processor = SiglipImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    expected = model.get_image_features(**processor(IMAGES, return_tensors="pt")).pooler_output
    torch.testing.assert_close(ImageEncoder(tmp_path).encode(IMAGES), functional.normalize(expected, dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
def test_hidden_states_of_a_classifier(tmp_path: Path, channels: int) -> None:
    folder = save_classifier(tmp_path, channels=channels)
    vectors = ImageEncoder(folder).encode(IMAGES, batch_size=2)
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        ViTImageProcessor.from_pretrained(folder),
    )
    assert vectors.shape == (3, 32)
    for image, vector in zip(IMAGES, vectors, strict=True):
        pixels = processor(image.convert("L" if channels == 1 else "RGB"), return_tensors="pt")["pixel_values"]
        hidden = model.vit(pixels).last_hidden_state[0]
        expected = torch.cat([hidden[0], hidden.mean(0)])
        torch.testing.assert_close(vector, expected / expected.norm(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", [CLIPForImageClassification, SiglipForImageClassification])
def test_hidden_states_of_a_classifier_that_was_a_tower(tmp_path: Path, kind: type[PreTrainedModel]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = {**sizes, "vocab_size": 10}, {**sizes, "image_size": 16, "patch_size": 8}
    model = kind(kind.config_class(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    hidden = model.vision_model(**processor(IMAGES, return_tensors="pt")).last_hidden_state
    expected = functional.normalize(torch.cat([hidden[:, 0], hidden.mean(1)], dim=-1), dim=-1)
    torch.testing.assert_close(ImageEncoder(tmp_path).encode(IMAGES), expected)


def test_convolutional_networks_have_no_first_token(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert ImageEncoder(tmp_path).encode(IMAGES).shape == (3, 12)


def test_every_mode_and_none(tmp_path: Path) -> None:
    encoder = ImageEncoder(save_classifier(tmp_path / "vit"))
    colour = picture(3).convert("L").convert("RGB")
    same = [colour, colour.convert("L"), colour.convert("RGBA")]
    vectors = encoder.encode(same)
    torch.testing.assert_close(vectors[1:], vectors[:1].expand(2, -1))
    assert encoder.encode([]).shape == (0, encoder.width)
    with pytest.raises(LoraFactoryError, match="cannot read the image"):
        encoder.encode([tmp_path / "absent.png"])


def test_vectors_of_tasks_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FACTORY_CACHE", str(tmp_path / "cache"))
    encoder, asked = ImageEncoder(save_classifier(tmp_path / "vit")), []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda images: asked.append(len(images)) or encode(images))
    given = {"a": IMAGES, "b": [IMAGES[1], IMAGES[1]]}
    vectors = image_vectors(encoder, given)
    assert torch.equal(vectors["b"], vectors["a"][[1, 1]])
    torch.testing.assert_close(vectors["a"], encode(IMAGES))
    image_vectors(encoder, given)
    assert asked == [3]
    with pytest.raises(LoraFactoryError, match="task 'c' has no image"):
        image_vectors(encoder, {"c": []})


@pytest.mark.parametrize("name", ["no/such-encoder", "/no/such/folder"])
def test_unknown_image_encoder(name: str) -> None:
    with pytest.raises(LoraFactoryError, match=f"cannot load the image encoder '{name}'"):
        ImageEncoder(name)
    with pytest.raises(LoraFactoryError, match="names no weights"):
        ImageEncoder("open_clip:ViT-B-32")


def test_incomplete_image_encoder(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path)
    weights = load_file(folder / "model.safetensors")
    key = "vit.embeddings.patch_embeddings.projection.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != key}, folder / "model.safetensors")
    with pytest.raises(LoraFactoryError, match="lacks 1 weights"):
        ImageEncoder(folder)
