# SPDX-License-Identifier: Apache-2.0
"""Training through TRL's trainers, in the seven steps of `stage.py`; one short file a trainer: `sft`, `dpo`."""

from jai.logs import ignore_unused_kernel

ignore_unused_kernel()  # here, before PEFT is imported: `accelerate launch -m jai.trainers.sft` passes no other place
