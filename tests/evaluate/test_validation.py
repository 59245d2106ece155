"""How much a validation part can decide."""

import pytest

from lgp.evaluate.validation import small_validation


@pytest.mark.parametrize("images", [1, 9, 50, 90])
def test_validation_part_of_fewer_than_93_images_is_too_small(images: int) -> None:
    assert small_validation(images).startswith(f"val has {images} images, so an accuracy of 50 % on it has the 95 %")


def test_warning_says_how_wide_a_choice_is() -> None:
    # Wilson's interval of 5 of 10
    assert "[24, 76]" in small_validation(10)
    assert "raise data.val_share" in small_validation(10)


@pytest.mark.parametrize("images", [93, 94, 143, 50_000])
def test_larger_validation_part_is_not_warned_of(images: int) -> None:
    assert small_validation(images) == ""


def test_validation_part_without_an_image_is_told() -> None:
    assert small_validation(0).startswith("val has no image, so nothing can be chosen on it")
