# SPDX-License-Identifier: Apache-2.0
"""Verifiable instructions (IFEval, arXiv:2311.07911): whether a reply follows them, in English and in Thai."""
