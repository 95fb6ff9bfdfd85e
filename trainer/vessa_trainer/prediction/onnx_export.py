"""Export the teacher that a run delivered as one ONNX file that describes the preparation of images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vessa import atomic_write
from vessa.errors import InvalidConfig, InvalidWeights
from vessa_trainer.config import load_config
from vessa_trainer.prediction.delivery import member_folders, read_geometry
from vessa_trainer.students.inference import load_best

TOLERANCE = 1e-3  # of logits: ONNX Runtime adds float32 values in another order
_BATCHES = (1, 3)  # that the exported file is compared on


def export(run: Path, out: Path) -> dict[str, Any]:
    """Write `out` and compare it with the run's network; returns its path, size and largest difference.

    input `image` (B, C, S, S) float32 in [0, 1], any B; output `logits` (B, classes, S, S) float32. The
    file's metadata holds `preprocessing` and `classes`. Raises InvalidConfig without the extra
    `vessa-trainer[export]`; InvalidWeights, without a file, when the outputs differ.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise InvalidConfig("export needs more packages: pip install 'vessa-trainer[export]'") from error
    if member_folders(run) != [run]:
        raise InvalidConfig(
            f"{run} is a cross-validation; an ONNX file holds one student. Give one of its folds"
        )
    config = load_config(run / "config.yaml", ["device=cpu"])
    if config.student.window:
        raise InvalidConfig(
            f"{run} has a region of interest (student.window {config.student.window}), which an ONNX file of "
            "the network cannot hold. Use vessa-trainer predict, or train with window 0"
        )
    model, channels, classes = load_best(run, config)
    size = config.student.size + -config.student.size % config.student.multiple
    example = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    geometry = read_geometry(run)
    stored_ids = range(max(classes) + 1) if geometry is None else geometry.stored_ids
    proto = program.model_proto
    student = config.student
    metadata = _metadata(student.size, size, channels, student.neighbors, classes, stored_ids)
    for key, value in metadata.items():
        proto.metadata_props.append(onnx.StringStringEntryProto(key=key, value=json.dumps(value)))
    onnx.checker.check_model(proto)
    data = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    difference = max(_difference(session, model, channels, size, batch) for batch in _BATCHES)
    if difference > TOLERANCE:
        raise InvalidWeights(
            f"the exported network differs by {difference:.2e}, more than {TOLERANCE}: not written"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write.write_bytes(out, data)
    return {"out": str(out), "bytes": len(data), "difference": difference}


def _metadata(
    size: int, padded: int, channels: int, neighbors: int, classes: dict[int, str], stored_ids: Sequence[int]
) -> dict[str, Any]:
    """Describe what `predict_slices` does before and after the network."""
    return {
        "classes": {str(i): name for i, name in classes.items()},
        "stored_ids": list(stored_ids),  # of each output in the masks that the run learned from
        "preprocessing": {
            "channels": channels,
            "neighbors": neighbors,  # slices on each side of the image that fill the channels
            "range": [0, 1],
            "intensities": "uint8 / 255; more bits by the window, else by the 0.5 and 99.5 percentiles",
            "resize": f"longer side to {size} px, bilinear, antialiased when it shrinks",
            "place": f"centered on a square of {size} px, the rest 0",
            "pad": f"right and bottom with 0, to {padded} px",
        },
        "postprocessing": "softmax; cut padding and border; resize to the image's size, bilinear; argmax",
    }


@torch.no_grad()
def _difference(session: Any, model: torch.nn.Module, channels: int, size: int, batch: int) -> float:
    images = torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(batch))
    (found,) = session.run(["logits"], {"image": images.numpy()})
    return float(np.abs(found - model(images).numpy()).max())
