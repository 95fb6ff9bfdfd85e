"""Serve the annotator by LitServe, with LitServe's own batching: the peer of `benchmarks/service.py`.

python benchmarks/litserve_peer.py PORT STORE_FOLDER WEIGHTS MAX_BATCH WAIT_S
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np

from vessa.codec import image_digest


class AnnotatorApi(litserve.LitAPI):
    """One image a request, as base64 of its pixels; LitServe makes the batches."""

    def __init__(self, store: str, weights: str, max_batch: int, wait_s: float) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=wait_s)
        self._store, self._weights = store, weights

    def setup(self, device: str) -> None:
        """Load the same weights and bank as the service, in the worker process."""
        from vessa_server.inference.annotator import load_annotator
        from vessa_server.template_bank.bank import TemplateBanks
        from vessa_server.template_bank.folder_store import FolderStore

        banks = TemplateBanks(FolderStore(Path(self._store)))
        self._annotator = load_annotator(self._weights, "cpu", banks, 1 << 29)

    def decode_request(self, request: dict[str, Any], **kwargs: Any) -> Any:
        """Read one request to the annotator's item."""
        from vessa_server.types import SegmentItem

        image = np.frombuffer(base64.b64decode(request["image"]), np.uint8).reshape(request["shape"])
        return SegmentItem(image_digest(image), image, request["bank"])

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Leave a batch a list."""
        return inputs

    def predict(self, items: list[Any], **kwargs: Any) -> list[Any]:
        """Segment a batch; should LitServe bring a single item, it is a batch of one."""
        return list(self._annotator.segment(items if isinstance(items, list) else [items]))

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Hand out the results."""
        return output

    def encode_response(self, output: Any, **kwargs: Any) -> dict[str, Any]:
        """Answer labels and confidence, as the service does."""
        result = output[0] if isinstance(output, list) else output
        if isinstance(result, Exception):
            raise result
        return {
            "labels": base64.b64encode(result.labels.tobytes()).decode(),
            "confidence": base64.b64encode(result.confidence.tobytes()).decode(),
            "shape": result.labels.shape,
            "scores": json.dumps(result.scores),
        }


if __name__ == "__main__":
    port, store, weights, max_batch, wait_s = sys.argv[1:]
    api = AnnotatorApi(store, weights, int(max_batch), float(wait_s))
    server = litserve.LitServer(api, accelerator="cpu", timeout=600)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, num_api_servers=1)
