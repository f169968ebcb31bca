# SPDX-License-Identifier: Apache-2.0
"""Pairs of answers of which the better one is known."""
