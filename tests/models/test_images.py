"""Models of images: patches, sizes, refusals; the image processor and the pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from zoo import IMAGE, SETTINGS, ConfigRefused, build, config, every_variant

import efficient_transformers
from efficient_transformers import VARIANTS, EtImageProcessor

LOCAL, HEAD = VARIANTS["local"], "ImageClassification"


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("patch_size", "channels"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_patches_are_a_convolution_with_their_stride(patch_size, channels):
    size = [4 * patch_size, 5 * patch_size]
    model = build(LOCAL, {}, HEAD, image_size=size, patch_size=patch_size, num_channels=channels)
    pixels, linear = torch.randn(2, channels, *size, dtype=torch.float64), model.get_input_embeddings().projection
    weight = linear.weight.view(32, channels, patch_size, patch_size)
    expected = F.conv2d(pixels, weight, linear.bias, stride=patch_size).flatten(2).transpose(1, 2)
    embedded = model.get_input_embeddings()(pixels)
    torch.testing.assert_close(embedded, expected)
    assert embedded.shape == (2, 20, 32)


@every_variant
def test_an_image_is_the_sequence_of_its_patches(variant):
    """The same body as one of text, behind other embeddings."""
    model = build(variant, SETTINGS[variant.slug][0], HEAD)
    text = build(variant, SETTINGS[variant.slug][0], max_position_embeddings=35, type_vocab_size=0)
    missing = text.load_state_dict(model.model.state_dict(), strict=False)
    assert missing.missing_keys == ["embeddings.word_embeddings.weight"]
    pixels = torch.randn(2, 3, 14, 10, dtype=torch.float64)
    body = text(inputs_embeds=model.get_input_embeddings()(pixels))
    expected = model.classifier(body.pooler_output)
    torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.model(pixel_values=pixels).last_hidden_state, body.last_hidden_state)


def test_every_patch_tells_where_it_stands():
    model = build(LOCAL, {"window_size": 3}, HEAD)
    pixels = torch.randn(1, 3, 14, 10, dtype=torch.float64)
    turned = pixels.unflatten(2, (7, 2)).flip(2).flatten(2, 3)  # rows of patches in the opposite order
    assert not torch.allclose(model(turned).logits, model(pixels).logits, atol=1e-3)


def test_the_sizes_of_an_image_are_the_sizes_of_the_model():
    model = build(LOCAL, {"image_size": 28, "patch_size": 4, "num_channels": 1}, max_position_embeddings=9)
    assert model.config.max_position_embeddings == 49
    assert model.config.type_vocab_size == 0
    assert model.main_input_name == "pixel_values"
    names = {name for name, _ in model.named_parameters()}
    assert not any("word_embeddings" in name or "token_type" in name for name in names)
    assert build(LOCAL, {}).main_input_name == "input_ids"


@pytest.mark.parametrize(
    ("head", "fields", "message"),
    [
        (HEAD, {"image_size": None}, r"image_size \(None\) must be set for a model of images, e.g. image_size=224"),
        (HEAD, {"image_size": 15}, r"image_size \(15\) must be a multiple of patch_size \(2\): change either"),
        (HEAD, {"image_size": [14, 0]}, r"image_size \(0\) must be at least 1"),
        (HEAD, {"image_size": [14, 10, 3]}, r"image_size has 3 entries .* give \[height, width\]"),
        (HEAD, {"patch_size": 0}, r"patch_size \(0\) must be at least 1: 1 makes a token of every pixel"),
        (HEAD, {"num_channels": 0}, r"num_channels \(0\) must be at least 1"),
        ("MaskedLM", {}, r"EtLocalForMaskedLM takes text and got image_size=\[14, 10\]: leave image_size out"),
    ],
)
def test_bad_sizes_are_refused(head, fields, message):
    with pytest.raises(ConfigRefused, match=message):
        LOCAL.model_class(head)(config(LOCAL, {**IMAGE, **fields}))


def test_bad_images_are_refused():
    model = build(LOCAL, {}, HEAD)
    with pytest.raises(
        ValueError, match=r"pixel_values must have shape \(batch, channels, height, width\) = \(2, 3, 14"
    ):
        model(torch.randn(2, 3, 10, 14))
    with pytest.raises(ValueError, match="give either pixel_values or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"new_length \(70\) cannot be set for a model of images"):
        model.resize_positions(70)


# the image processor -------------------------------------------------------------------------------------------------


def test_brightness_is_that_of_pillow():
    processor = EtImageProcessor(size={"height": 9, "width": 7}, do_grayscale=True, do_normalize=False)
    image = picture(9, 7)
    expected = torch.tensor(np.array(image.convert("L"))) / 255
    (found,) = processor(image, return_tensors="pt").pixel_values
    assert (found - expected).abs().max() < 1.01 / 255  # Pillow rounds its weights to 16 bits
    grey = image.convert("L")
    (of_grey,), (of_three,) = (processor(x, return_tensors="pt").pixel_values for x in (grey, grey.convert("RGB")))
    torch.testing.assert_close(of_grey[0] * 255, torch.tensor(np.array(grey)).float())
    assert of_three.equal(of_grey)


def test_images_are_resized_and_normalised():
    processor = EtImageProcessor.for_model(config(LOCAL, IMAGE), image_mean=0.25, image_std=[0.5, 1.0, 2.0])
    white = Image.new("RGB", (50, 30), "white")
    pixels = processor([white, picture(14, 10)], return_tensors="pt").pixel_values
    assert pixels.shape == (2, 3, 14, 10)
    for channel, std in enumerate((0.5, 1.0, 2.0)):
        torch.testing.assert_close(pixels[0, channel], torch.full((14, 10), 0.75 / std))


def test_a_model_of_text_has_no_images():
    with pytest.raises(ValueError, match=r"image_size \(None\) must be set"):
        EtImageProcessor.for_model(config(LOCAL, {}))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_processor_of_a_checkpoint_is_found(channels, tmp_path):
    cfg = config(LOCAL, {**IMAGE, "num_channels": channels})
    processor = EtImageProcessor.for_model(cfg)
    processor.save_pretrained(tmp_path)
    LOCAL.model_class()(cfg).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is EtImageProcessor
    assert loaded.to_dict() == processor.to_dict()
    image = picture(33, 41)
    pixels = loaded(image, return_tensors="pt").pixel_values
    assert pixels.equal(processor(image, return_tensors="pt").pixel_values)
    assert AutoModel.from_pretrained(tmp_path)(pixel_values=pixels).last_hidden_state.shape == (1, 35, 32)


@every_variant
def test_the_pipeline_classifies_pictures(variant, tmp_path):
    model = build(variant, SETTINGS[variant.slug][0], HEAD, dtype=torch.float32, num_labels=5)
    processor = EtImageProcessor.for_model(model.config)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    images = [picture(20, 30), picture(14, 10, seed=1)]
    answers = pipeline("image-classification", str(tmp_path), device="cpu")(images, top_k=1)
    with torch.no_grad():
        expected = model(processor(images, return_tensors="pt").pixel_values).logits.softmax(-1)
    for (answer,), row in zip(answers, expected, strict=True):
        assert answer["label"] == model.config.id2label[int(row.argmax())]
        assert answer["score"] == pytest.approx(row.max().item(), rel=1e-4)


def test_a_pipeline_opens_without_the_package(tmp_path):
    """Model and image processor by the code beside them."""
    import os
    import subprocess
    import sys

    model = build(LOCAL, {}, HEAD, dtype=torch.float32)
    for part in (model, EtImageProcessor.for_model(model.config)):
        part.save_pretrained(tmp_path / "model")
    picture(20, 30).save(tmp_path / "picture.png")
    code = (
        "import sys; sys.modules['efficient_transformers'] = None\n"
        "from transformers import pipeline\n"
        "classify = pipeline('image-classification', 'model', device='cpu', trust_remote_code=True)\n"
        "print(type(classify.image_processor).__module__, classify('picture.png')[0]['score'])"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("transformers_modules"), done.stderr[-2000:]
    expected = pipeline("image-classification", str(tmp_path / "model"), device="cpu")(str(tmp_path / "picture.png"))
    assert float(done.stdout.split()[1]) == pytest.approx(expected[0]["score"], rel=1e-5)


def test_regression_and_several_labels_have_their_loss():
    model = build(LOCAL, {}, HEAD, num_labels=4, problem_type="multi_label_classification")
    pixels, labels = torch.randn(2, 3, 14, 10, dtype=torch.float64), torch.randint(0, 2, (2, 4)).double()
    outputs = model(pixels, labels=labels)
    torch.testing.assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, labels))


def test_the_package_names_its_processor():
    assert "EtImageProcessor" in efficient_transformers.__all__
    model = AutoModelForImageClassification.from_config(config(LOCAL, IMAGE))
    assert type(model) is LOCAL.model_class(HEAD)
