"""What is said of images that came, went or changed since the last preparation."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lgp.data.changes import changes, kept_images, read_kept


def kept(**images: str) -> np.ndarray:
    content = [pixels.encode().ljust(32) for pixels in images.values()]
    return kept_images(pd.DataFrame({"path": list(images), "content": content}))


def test_images_that_came_went_and_changed_are_counted() -> None:
    before, now = kept(a="1", b="2", c="3", d="4"), kept(d="4", e="1", b="other", a="1", f="5")
    assert changes(before, now) == "since the last time, 2 images came, 1 went, 1 changed"


def test_the_same_images_in_another_order_are_the_same() -> None:
    assert changes(kept(a="1", b="2"), kept(b="2", a="1")) == "the same images as before"


@pytest.mark.parametrize("content", [None, b"", b"no array", "floats", "row"])
def test_a_file_of_no_use_is_as_none(tmp_path: Path, content: bytes | str | None) -> None:
    file = tmp_path / "kept.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, np.zeros((3, 2)) if content == "floats" else np.zeros(3, dtype=np.uint64))
    assert read_kept(file) is None


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    images = kept(a="1", b="2")
    np.save(tmp_path / "kept.npy", images)
    again = read_kept(tmp_path / "kept.npy")
    assert again is not None
    assert np.array_equal(again, images)
