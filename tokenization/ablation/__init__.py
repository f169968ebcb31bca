# SPDX-License-Identifier: Apache-2.0
"""`jai tokenizer ablate`: which tokenizer makes the better language model, in bits per character."""
