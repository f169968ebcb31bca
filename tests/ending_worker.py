# SPDX-License-Identifier: Apache-2.0
"""One of two processes of test_pretrain.py: pre-trains, and says how many wrappers of DDP are left at the end."""

import gc
import sys

from torch.nn.parallel import DistributedDataParallel

from jai.trainers import pretrain
from jai.trainers.pretrain_trainer import JaiPretrainTrainer

end = JaiPretrainTrainer.end
wrapped = []  # whether the model was, during the training


def counted_end(trainer: JaiPretrainTrainer) -> None:
    left = sum(type(each) is DistributedDataParallel for each in gc.get_objects())
    print(f"wrapped {wrapped[0]}, left {left}")
    end(trainer)


class Watched(pretrain.JaiPretrainTrainer):
    def training_step(self, model, *args, **kwargs):
        wrapped.append(type(model) is DistributedDataParallel)
        return super().training_step(model, *args, **kwargs)


if __name__ == "__main__":
    JaiPretrainTrainer.end = counted_end
    pretrain.JaiPretrainTrainer = Watched
    pretrain.main(sys.argv[1:])
