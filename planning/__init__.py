# SPDX-License-Identifier: Apache-2.0
"""What training takes in memory and time, computed from a configuration alone."""
