"""Images on their way into an adaptation: evenly chosen, gray, square, of one size."""

import numpy as np
import pytest

from vessa.bulk.adapt_bank import gray_squares, wait_for_adaptation
from vessa.errors import ServiceError
from vessa.schemas import ADAPTATION_IMAGES, ADAPTATION_SIDE, AdaptationInfo


def test_images_of_any_size_become_gray_squares_with_black_borders() -> None:
    wide = np.full((60, 120), 200, np.uint8)
    color = np.zeros((300, 300, 3), np.uint8)
    color[..., 1] = 255
    squares = gray_squares([wide, color])
    assert squares.shape == (2, ADAPTATION_SIDE, ADAPTATION_SIDE)
    assert squares.dtype == np.uint8
    assert not squares[0, : ADAPTATION_SIDE // 4 - 1].any()
    assert (squares[0, ADAPTATION_SIDE // 4 + 1 : ADAPTATION_SIDE // 2] == 200).all()
    assert 100 < squares[1].min() == squares[1].max() < 200  # the luminance of green


def test_more_images_than_allowed_are_evenly_spaced() -> None:
    many = [np.full((8, 8), i % 256, np.uint8) for i in range(2 * ADAPTATION_IMAGES)]
    squares = gray_squares(many)
    assert len(squares) == ADAPTATION_IMAGES
    assert (squares[0] == 0).all()
    assert (squares[-1] == many[-1][0, 0]).all()
    assert gray_squares([]).shape == (0, ADAPTATION_SIDE, ADAPTATION_SIDE)


def test_a_failed_adaptation_is_an_error_with_its_reason() -> None:
    class Client:
        states = [
            AdaptationInfo(bank="b", state="running", progress=0.5),
            AdaptationInfo(bank="b", state="failed", error="the bank holds 3 templates"),
        ]

        def adaptation(self, bank: str) -> AdaptationInfo:
            return self.states.pop(0)

    seen: list[float] = []
    with pytest.raises(ServiceError, match="bank b failed: the bank holds 3 templates"):
        wait_for_adaptation(Client(), AdaptationInfo(bank="b", state="running"), seen.append)  # type: ignore[arg-type]
    assert seen == [0.5, 0.0]
