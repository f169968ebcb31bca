# SPDX-License-Identifier: Apache-2.0
"""Training through TRL's trainers, in the seven steps of `stage.py`; one short file a trainer: `sft`, `dpo`."""
