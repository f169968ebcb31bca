# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning through TRL's trainers: `sft` (also continued pre-training on plain text) and `dpo`.

Importing this package tells PEFT the default LoRA targets of the model type `jai`.
"""

from jai.trainers import lora as lora
