"""examples/classifier.py: preprocessing is torchvision's to the bit, bad images say why, weights are those of the options."""

from __future__ import annotations

import argparse
import io

import numpy as np
import pytest
import torch
import torchvision
from classifier import BadImage, Preprocessing, TooManyPixels, add_arguments, load, probabilities
from PIL import Image
from support.pictures import bomb, damaged, encoded, photograph, pictures

PRESET = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
PREPROCESSING = Preprocessing(PRESET)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "inception_v3", "efficientnet_b0"])
def test_preprocessing_is_that_of_the_weights(name: str):
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    preprocessing = Preprocessing(preset)
    files = pictures()
    want = torch.stack([preset(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    got = preprocessing.batch([preprocessing.decode(file) for file in files], torch.float32, torch.device("cpu"))
    assert torch.equal(got, want)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "no bytes"),
        (b"hello", "neither a JPEG nor a PNG"),
        (encoded(photograph("china").convert("P"), "GIF"), "neither a JPEG nor a PNG"),
        (encoded(photograph("china"), "JPEG")[:9000], "can't be decoded.*truncated"),
        (encoded(photograph("china"), "PNG")[:9000], "can't be decoded.*truncated"),
        (encoded(Image.fromarray(np.full((9, 9), 300, np.uint16)), "PNG"), "16 bits"),
    ],
    ids=["empty", "text", "gif", "jpeg_cut_off", "png_cut_off", "png_of_16_bits"],
)
def test_a_bad_image_says_why(data: bytes, why: str):
    with pytest.raises(BadImage, match=why):
        PREPROCESSING.decode(data)


@pytest.mark.parametrize(
    "data, why",
    [
        (bomb(), "decompression bomb"),
        (encoded(photograph("china"), "JPEG"), "640 × 427 pixels; at most 250000"),
        (encoded(Image.new("RGB", (1, 2000)), "PNG"), "2000 times as long as it is wide"),
    ],
    ids=["bomb", "large", "strip"],
)
def test_too_many_pixels_are_refused_before_they_are_decoded(data: bytes, why: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(TooManyPixels, match=why):
        Preprocessing(PRESET, max_pixels=250_000).decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_damaged_file_is_an_image_or_a_bad_image(kind: str):
    """Nothing else may come out of the decoder, whatever is sent."""
    file = encoded(photograph("flower").resize((160, 107)), kind)
    refused = 0
    for seed in range(150):
        try:
            assert PREPROCESSING.decode(damaged(file, seed)).shape == (224, 224, 3)
        except BadImage:
            refused += 1
    assert refused > 10


def test_weights_come_from_the_checkpoint(tmp_path, trained):
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\nbird\n")
    model = trained(torchvision.models.resnet18(num_classes=3))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    given = ["--model", "resnet18", "--labels", str(labels), "--checkpoint", str(tmp_path / "weights.pth")]
    images = [PREPROCESSING.decode(file) for file in pictures()[:3]]
    want = model(PREPROCESSING.batch(images, torch.float32, torch.device("cpu"))).detach()
    for more, text in (([], "20 of 20 convolutions fused"), (["--stock"], "stock PyTorch")):
        classifier = load(options(*given, *more))
        assert classifier.labels == ["cat", "dog", "bird"]
        torch.testing.assert_close(torch.from_numpy(classifier(images)), want, rtol=1e-4, atol=1e-4)
        assert text in classifier.describe()
    with pytest.raises(ValueError, match=r"(?s)doesn't fit resnet18 with 1000 classes.*--labels"):
        load(options("--model", "resnet18", "--checkpoint", str(tmp_path / "weights.pth")))


def test_a_checkpoint_can_run_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (pytest.fail, ("its code was run",))

    torch.save({"weight": Harmful()}, tmp_path / "weights.pth")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        load(options("--model", "resnet18", "--checkpoint", str(tmp_path / "weights.pth")))


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="resnet18 has IMAGENET1K_V1"):
        load(options("--model", "resnet18", "--weights", "IMAGENET22K"))
    with pytest.raises(ValueError, match="no classifier"):
        load(options("--model", "fcn_resnet50"))


def test_preprocessing_is_that_of_the_weights_named(tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "weights.pth")
    given = options(
        "--model", "resnet50", "--stock", "--weights", "IMAGENET1K_V1", "--checkpoint", str(tmp_path / "weights.pth")
    )
    assert load(given).preprocessing.preset.resize_size == [256]


def test_probabilities_are_softmax():
    scores = torch.randn(4, 7) * 50
    assert torch.allclose(torch.from_numpy(probabilities(scores.numpy())), scores.softmax(1), atol=1e-6)
