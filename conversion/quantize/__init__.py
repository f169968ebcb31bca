# SPDX-License-Identifier: Apache-2.0
"""A JAI in four bits."""
