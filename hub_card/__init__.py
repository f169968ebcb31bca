# SPDX-License-Identifier: Apache-2.0
"""Publishing: what a checkpoint folder holds, whether it loads, its model card, and the way to the Hub."""
