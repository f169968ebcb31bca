# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes of all tensors that are alive, exactly and on any device, FakeTensors too.

It sees what PyTorch's operators return: not what a kernel has for itself while it runs.
"""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Within it, storages are counted from the operator that makes them until nothing holds them.

    Attributes:
        now: bytes alive.
        peak: the most that were.
    """

    def __init__(self, alive: Iterable[torch.Tensor]):
        """Args: alive: tensors that are there already."""
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        for tensor in alive:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if (known := self._alive.get(key)) is not None and known() is not None:
            return

        def freed(_: weakref.ref) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, torch.Tensor):
                self._add(each)
        return result
