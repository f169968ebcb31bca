# SPDX-License-Identifier: Apache-2.0
"""lm-eval's model of transformers, which encodes what the choices of a question have in common once."""

from lm_eval.models.huggingface import HFLM


class PrefixSharingLM(HFLM):
    """lm-eval's `HFLM`, faster where several continuations of one context are compared."""
