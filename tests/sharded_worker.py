# SPDX-License-Identifier: Apache-2.0
"""A stage under Accelerate's FSDP2 on processors: `accelerate launch --config_file … sharded_worker.py VERB options`.

Accelerate takes several processes on processors for plain data parallel, whatever its configuration says, although
PyTorch shards over gloo as it does over NCCL. Told that the processes are devices' (its one question to the machine),
Accelerate shards by its own code, and so does all that follows.
"""

import importlib
import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    from jai.trainers.stage import run_as_script

    run_as_script(importlib.import_module(f"jai.trainers.{sys.argv.pop(1)}").main)
