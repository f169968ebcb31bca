# SPDX-License-Identifier: Apache-2.0
"""A Hub on 127.0.0.1 for the demo, which pushes to it and pulls from it through the real client."""
