# SPDX-License-Identifier: Apache-2.0
"""Commented configurations to copy, one for each stage."""
