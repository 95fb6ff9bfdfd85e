"""Real clients of other programs against a real annotator with the shipped weights."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

PROTOCOLS = "nninteractive,monailabel,labelstudio"


def module_of(variable: str, whose: str) -> Any:
    """Return the module of the file that `make test-viewers` names in a variable; skip without it."""
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"no {whose}: `make test-viewers` fetches it")
    spec = importlib.util.spec_from_file_location(variable.lower(), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about `cgi`, which MONAI Label's client imports
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_module() -> Callable[[str, str], Any]:
    """Return `module_of`."""
    return module_of


@dataclass(frozen=True)
class Phantom:
    """A synthetic heart: gray voxels uint8 (slices, H, W) and its class ids of the same shape."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    classes: dict[int, str]


@pytest.fixture(scope="session")
def viewers(start_annotator: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An annotator with the shipped weights that serves all protocols of viewers."""
    folder = tmp_path_factory.mktemp("viewers")
    return start_annotator(folder, VESSA_WEIGHTS="nano", VESSA_SERVE_VIEWERS=PROTOCOLS)


@pytest.fixture(scope="session")
def phantoms() -> list[Phantom]:
    """Five synthetic hearts of one protocol."""
    from vessa_server.pretraining.data.synthetic import CLASSES, PROTOCOLS, phantom_study

    protocol = PROTOCOLS["heart"][0]
    found = []
    for number in range(5):
        rng = np.random.default_rng([0, number])
        study = phantom_study("heart", rng, protocol=protocol, patients=1, slices=6, size=128)
        found.append(Phantom(np.stack(study.images), np.stack(study.masks), dict(CLASSES["heart"])))
    return found


@pytest.fixture(scope="session")
def heart(viewers: Any, phantoms: list[Phantom]) -> str:
    """A bank of the middle slices of all phantoms but the last."""
    from vessa.client import AnnotatorClient

    with AnnotatorClient(viewers.url, viewers.api_key) as client:
        for number, phantom in enumerate(phantoms[:-1]):
            places = [1, 3]
            client.add_templates(
                "heart",
                [phantom.image[k] for k in places],
                [phantom.labels[k] for k in places],
                phantom.classes,
                [f"p{number}"] * len(places),
            )
    return "heart"
