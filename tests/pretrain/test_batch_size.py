"""A batch is never larger than the training part."""

import pytest

from lgp.params.file import Params, restricted
from lgp.pretrain.batch_size import with_fitting_batches


def test_batch_of_every_arm_is_at_most_the_number_of_images(params: Params) -> None:
    fitting, warnings = with_fitting_batches(params, 50)
    assert {arm: getattr(fitting, arm).batch_size for arm in warnings} == dict.fromkeys(
        ("mim", "cl", "graft", "joint", "reverse"), 50
    )
    assert warnings["cl"].startswith("cl.batch_size 64 is more than the 50 images of the training part: it is 50 here")
    assert params.cl.batch_size == 64


def test_batch_that_fits_stays(params: Params) -> None:
    fitting, warnings = with_fitting_batches(params, 64)
    assert warnings == {}
    assert fitting == params


def test_lowered_batch_can_be_cut_into_equal_parts(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lgp.pretrain.batch_size.world_size", lambda: 4)
    assert with_fitting_batches(params, 50)[0].mim.batch_size == 48


def test_sections_that_a_stage_does_not_read_stay_away(params: Params) -> None:
    fitting, warnings = with_fitting_batches(restricted(params, ("seed", "model", "cl")), 50)
    assert list(warnings) == ["cl"]
    with pytest.raises(AttributeError):
        _ = fitting.mim
