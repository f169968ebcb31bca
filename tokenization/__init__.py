# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of phi-3's form: a small one from nothing, one with another script added, and the chat template."""
