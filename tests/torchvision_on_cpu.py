"""Makes a CUDA build of torchvision importable beside a CPU build of torch; copied into the test environment only.

torchvision registers shapes for C++ ops that its library, linked against CUDA, could not define here, and its import
fails on the first. transformers needs nothing but its Python transforms. Declaring the ops' names before torchvision is
imported lets them import; calling one of the ops still fails. Loaded from a ``.pth`` file, so it must cost nothing:
torch is imported only when torchvision is looked for.
"""

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareOps(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and _DeclareOps.library is None:
            import torch

            if torch.version.cuda is None:
                _DeclareOps.library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in SCHEMAS:
                    _DeclareOps.library.define(schema)
            sys.meta_path.remove(self)
        return None


sys.meta_path.insert(0, _DeclareOps())
