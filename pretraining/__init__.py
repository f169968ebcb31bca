# SPDX-License-Identifier: Apache-2.0
"""Text as sequences of tokens: sources, `jai pack`, packed shards, and which sequence comes at which step.

corpus.yaml ─ config.py ─ pack.py ─▶ OUT/ (shards.py) ─ plan.py ─▶ dataset.py ─▶ a Trainer
                                        mixture.py, order.py, packing.py decide what a plan holds
"""
