# SPDX-License-Identifier: Apache-2.0
"""A mixture's experts in Triton; `fused.py` has the function."""
