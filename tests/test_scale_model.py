"""The model of docs/scale.md against what can be worked out by hand."""

from __future__ import annotations

import pytest
import scale_model as model


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_busy_replicas_make_what_their_times_say(replicas: int) -> None:
    found = model.simulate(model.Setup(replicas, 4 * replicas, 8, image_s=0.1, batch_s=0.2))
    assert found["images_per_s"] == pytest.approx(replicas * 8 / (0.2 + 8 * 0.1), rel=0.01)
    assert found["replicas_busy"] == pytest.approx(1, abs=0.01)


def test_a_full_link_is_the_bound_however_many_replicas() -> None:
    found = model.simulate(model.Setup(64, 256, 8, image_s=0.1, link_s=0.01))
    assert found["images_per_s"] == pytest.approx(100, rel=0.05)
    assert found["link_busy"] > 0.95


def test_one_request_in_flight_waits_for_everything() -> None:
    found = model.simulate(model.Setup(2, 1, 1, image_s=0.1, store_s=0.05, link_s=0.05))
    assert found["images_per_s"] == pytest.approx(1 / 0.2, rel=0.01)


def test_counts_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        model.simulate(model.Setup(0, 1, 1, image_s=0.1))
