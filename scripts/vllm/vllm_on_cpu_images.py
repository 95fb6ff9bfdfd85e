"""Define two operators before torchvision is imported beside a torch without CUDA (see env.sh).

Python reads this module at each start, so it only waits for torchvision: importing torch would take seconds.
"""

import sys
from importlib.machinery import ModuleSpec
from typing import Any

OPERATORS = ("nms", "qnms")  # the import of torchvision registers facts about these


class _BeforeTorchvision:
    kept: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                self.kept = torch.library.Library("torchvision", "DEF")
                for operator in OPERATORS:
                    self.kept.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


_FINDER = _BeforeTorchvision()
sys.meta_path.insert(0, _FINDER)
