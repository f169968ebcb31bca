# SPDX-License-Identifier: Apache-2.0
"""The language-model head and its loss, without logits; `causal_lm.py` gives it to a model of transformers."""
