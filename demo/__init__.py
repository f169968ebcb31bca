# SPDX-License-Identifier: Apache-2.0
"""The whole way from a phi-3 checkpoint to a published JAI, in minutes, on text that the project ships."""
