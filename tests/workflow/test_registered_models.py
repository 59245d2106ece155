"""What the code of a registered model takes, and what it says of other things."""

import base64
import io
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from made_models import CLASSES, by_timm, make_classifier, make_encoder
from PIL import Image

from lgp.data.conversion import FORMATS, MOST_PIXELS
from lgp.data.stored import LONGEST_STRIP
from lgp.workflow.mlflow_store import ENCODERS, store_uri
from lgp.workflow.tracking import Description, tracked

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
ABOUT = Description("mim", "pretrain", {"arm": "mim"}, {}, None, "lgp", "mim")


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("mim") / "encoder", 1).parent


@pytest.fixture(scope="module")
def encoder(arm: Path) -> Any:
    """The encoder as the registry gives it. Its files were links, as DVC makes with `cache.type symlink`."""
    root = arm / "project"
    linked = root / "encoder"
    linked.mkdir(parents=True)
    for file in (arm / "encoder").iterdir():
        (linked / file.name).symlink_to(file)
    with tracked(ABOUT, root, root / "run") as tracker:
        tracker.set_champion(linked, "mim", "0", "by hand")
    mlflow.set_tracking_uri(store_uri(None, root))
    return mlflow.pyfunc.load_model(f"models:/{ENCODERS.registry}@champion")


@pytest.fixture(scope="module")
def classifier(arm: Path) -> Any:
    from lgp.workflow.registered_classifier import ImageClassifier

    model = ImageClassifier()
    folder = make_classifier(arm / "classifiers" / "linear", arm / "encoder")
    model.load_context(SimpleNamespace(artifacts={"classifier": str(folder)}))
    return lambda given: model.predict(None, given)


@pytest.fixture(scope="module")
def codes(encoder: Any) -> list[Any]:
    """The modules that the registered models carry. They may only be imported once MLflow is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lgp.workflow import registered_classifier, registered_encoder

    return [registered_encoder, registered_classifier]


def test_encoder_takes_pixels_and_encoded_images(arm: Path, encoder: Any) -> None:
    images = (torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255 - 0.3) / 0.2
    expected = by_timm(arm / "encoder", images).numpy()
    files = [encoded(image) for image in IMAGES]
    texts = [base64.b64encode(file).decode() for file in files]
    whole = (
        IMAGES,
        IMAGES[..., 0],
        IMAGES.astype(float),
        files,
        texts,
        np.array(texts),
        pd.DataFrame({"image": texts}),
    )
    for given in whole:
        np.testing.assert_allclose(encoder.predict(given), expected, atol=1e-5)
    assert encoder.predict(IMAGES[:0]).shape == (0, expected.shape[1])


def test_encoder_says_what_it_expects_without_printing_arrays(encoder: Any) -> None:
    for given in (np.zeros((400, 9, 9, 1), np.uint8), IMAGES / 255, IMAGES[0, 0, 0], [b"no image"], IMAGES - 1.0):
        with pytest.raises(ValueError, match=r"expected|cannot be read") as error:
            encoder.predict(given)
        assert len(str(error.value)) < 200


def test_pixels_between_0_and_1_are_not_taken_for_black(classifier: Any) -> None:
    assert list(classifier(IMAGES.astype(float))["class"]) == list(classifier(IMAGES)["class"])
    with pytest.raises(ValueError, match="whole numbers 0 … 255"):
        classifier(IMAGES / 255)


def test_image_of_16_bits_is_refused(encoder: Any, classifier: Any) -> None:
    deep = encoded(IMAGES[0].astype(np.uint16) * 257)
    for predict in (encoder.predict, classifier):
        with pytest.raises(ValueError, match="image 0 has more than 8 bits a channel"):
            predict([deep])


def test_classifier_takes_bytes_as_it_takes_texts(classifier: Any) -> None:
    files = [encoded(image) for image in IMAGES]
    of_bytes, of_texts = classifier(files), classifier([base64.b64encode(file).decode() for file in files])
    assert of_bytes.equals(of_texts)
    assert set(of_bytes["probabilities"][0]) == set(CLASSES)


def test_served_images_are_opened_by_the_decoders_of_a_data_set(classifier: Any, codes: list[Any]) -> None:
    for code in codes:
        assert (code.FORMATS, code.MOST_PIXELS, code.LONGEST_STRIP) == (FORMATS, MOST_PIXELS, LONGEST_STRIP)
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4\n"):
        with pytest.raises(ValueError, match="image 0 cannot be read: UnidentifiedImageError"):
            classifier([data])


def test_served_bomb_is_refused_by_its_size(codes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for code in codes:
        monkeypatch.setattr(code, "MOST_PIXELS", 63)
        with pytest.raises(ValueError, match="more than 63 pixels"):
            code._opened(encoded(IMAGES[0]))
        monkeypatch.setattr(code, "MOST_PIXELS", 64)
        assert code._opened(encoded(IMAGES[0])).size == (8, 8)


def test_served_strip_is_cut_to_its_middle(classifier: Any, codes: list[Any]) -> None:
    strip = np.arange(8000)[None].astype(np.uint8)
    for code in codes:
        for pixels in (strip, strip.T):
            middle = code._opened(encoded(pixels))
            assert max(middle.size) == LONGEST_STRIP
            assert np.array_equal(np.asarray(middle).ravel(), strip[0, 3992:4008])
    assert len(classifier([encoded(strip)])) == 1
