# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders that are written: planned tensors, shards, and what lies beside them."""
