# SPDX-License-Identifier: Apache-2.0
"""The loopback Hub, for datasets."""

from loopback_hub import LoopbackHub


class DatasetHub(LoopbackHub):
    """The loopback Hub has model repositories only: its calls serve datasets under the paths that those have."""

    def answer(self, request):
        request.path = request.path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets")
        return super().answer(request)
