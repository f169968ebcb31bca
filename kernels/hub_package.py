# SPDX-License-Identifier: Apache-2.0
"""Writes these kernels as a Hub kernel: a folder that the `kernels` library loads, with nothing of JAI installed.

    python -m jai.kernels.hub_package OUT

    build/torch-universal/    plain Python, for any torch: these files, `__init__.py`, `metadata.json`

Whoever loads it gets the public functions and, with transformers, `experts_implementation="jai_fused"`.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

from jai.files import new_folder

HERE = Path(__file__).parent
NAME = "jai-kernels"
VERSION = 1
PARTS = ("experts", "head", "register.py")  # liger.py needs JAI
INIT = '''# SPDX-License-Identifier: Apache-2.0
"""JAI's kernels: `fused_experts`, `linear_cross_entropy`, and `experts_implementation="jai_fused"` for transformers."""

from importlib.util import find_spec

from .experts.fused import fused_experts
from .head.loss import linear_cross_entropy, linear_log_probs

__all__ = ["fused_experts", "linear_cross_entropy", "linear_log_probs"]

if find_spec("transformers"):
    from . import register
    from .head.causal_lm import use_linear_cross_entropy

    __all__ += ["use_linear_cross_entropy"]
'''
README = """---
library_name: kernels
license: apache-2.0
tags: [kernel]
---

# JAI's kernels

Fused mixture-of-experts and linear cross-entropy in Triton, for transformers models with concatenated SwiGLU experts
(JAI, Mixtral, Qwen3-MoE).

```python
from kernels import get_kernel
from transformers import AutoModelForCausalLM

get_kernel("REPO", version=VERSION, trust_remote_code=True)  # registers "jai_fused"
model = AutoModelForCausalLM.from_pretrained("...", experts_implementation="jai_fused")
```
"""


def package(out: Path) -> None:
    """Write the Hub kernel to the new folder `out`.

    Raises:
        UserError: where `out` exists.
    """
    with new_folder(out) as folder:
        build = folder / "build" / "torch-universal"
        build.mkdir(parents=True)
        for part in PARTS:
            if (HERE / part).is_dir():
                shutil.copytree(HERE / part, build / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(HERE / part, build / part)
        (build / "__init__.py").write_text(INIT)
        contents = b"".join(path.read_bytes() for path in sorted(build.rglob("*")) if path.is_file())
        metadata = {
            "id": f"jai_kernels_{hashlib.sha256(contents).hexdigest()[:12]}",
            "name": NAME,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": "cuda"},
        }
        (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        (folder / "README.md").write_text(README.replace("VERSION", str(VERSION)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    out = parser.parse_args().out
    package(out)
    print(f"The Hub kernel is in {out}. Push it with: hf upload REPO {out} --repo-type kernel")


if __name__ == "__main__":
    main()
