# SPDX-License-Identifier: Apache-2.0
"""From phi-3 weights to a JAI checkpoint: vocabulary, depth, experts; and the proof that nothing was lost."""
