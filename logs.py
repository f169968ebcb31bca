# SPDX-License-Identifier: Apache-2.0
"""What libraries log that tells a user nothing."""

import logging


def ignore_unused_kernel() -> None:
    """Drop warnings of a kernel for bitsandbytes that no JAI uses.

    On processors with AVX512-BF16, bitsandbytes asks the Hub for it when it is imported, as PEFT does.
    """
    for name in ("bitsandbytes.backends.cpu.ops", "kernels.hf_hub"):
        logging.getLogger(name).addFilter(_is_of_another)


def _is_of_another(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "quantization-bitsandbytes" not in message and "gemm_4bit_forward" not in message
