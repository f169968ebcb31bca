# SPDX-License-Identifier: Apache-2.0
"""Suites whose answers a model judges: MT-Bench, JAI-Hall-Bench, and two models' answers side by side."""
