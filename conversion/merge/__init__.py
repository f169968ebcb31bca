# SPDX-License-Identifier: Apache-2.0
"""`jai merge`: several checkpoints of one model become one."""
