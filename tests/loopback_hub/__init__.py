# SPDX-License-Identifier: Apache-2.0
"""The demo's local Hub with the rest of what a Hub has, and with faults on request."""

from loopback_hub.faults import Fault, Faults
from loopback_hub.hub import LoopbackHub

__all__ = ["Fault", "Faults", "LoopbackHub"]
