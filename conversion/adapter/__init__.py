# SPDX-License-Identifier: Apache-2.0
"""A JAI and the LoRA adapter that was trained on it, as one checkpoint."""
