# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are read: phi-3's and JAI's, in folders and on the Hub."""
