# SPDX-License-Identifier: Apache-2.0
"""The README.md of an adapter's repository."""

from huggingface_hub import ModelCard, ModelCardData

from jai.hub_card.adapter import Adapter
from jai.hub_card.contents import Contents
from jai.hub_card.readme import mark_generated
from jai.provenance import redact
from jai.reports import ReportTable

_CARD = """\
# {name}

A {kind} adapter for [{base}](https://huggingface.co/{base}). It holds {parameters:,} parameters; the model itself and \
its code come from there.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}", trust_remote_code=True)
```

`trust_remote_code=True` runs the model code of {base} on your machine. It is pinned: `adapter_config.json` names the \
commit `{revision}`, on which the adapter was checked.
{serving}
{settings}
"""
_EXPERTS_ARE_ADAPTED = """
**Merge it before you serve it** with vLLM or SGLang (`model.merge_and_unload().save_pretrained(OUT)`): it adapts \
experts, which are 3-D parameters, and these engines drop such factors or read them in another order.
"""
_SHOWN = ("r", "lora_alpha", "target_modules", "target_parameters", "modules_to_save")


def adapter_card(contents: Contents, adapter: Adapter, repo_id: str) -> str:
    """The README.md of an adapter's repository."""
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        language=["th", "en"],
        license="mit",
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=adapter.base,
        base_model_relation="adapter",
        tags=["jai", adapter.kind.lower(), "custom_code"],
    )
    shown = {key: adapter.config[key] for key in _SHOWN if adapter.config.get(key)}
    rows = [[key, ", ".join(map(str, v)) if isinstance(v, list) else str(v)] for key, v in shown.items()]
    tokens = adapter.config.get("trainable_token_indices")
    if isinstance(tokens, dict):
        counts = (f"{len(ids):,} of {name}" for name, ids in tokens.items() if isinstance(ids, list))
        rows.append(["trainable_token_indices", ", ".join(counts)])
    text = _CARD.format(
        name=name,
        kind=adapter.kind,
        base=adapter.base,
        parameters=adapter.parameters,
        repo_id=repo_id,
        tokenizer=repo_id if "tokenizer_config.json" in contents.kept else adapter.base,
        revision=adapter.revision,
        serving=_EXPERTS_ARE_ADAPTED if adapter.config.get("target_parameters") else "",
        settings=ReportTable(["key", "value"], rows).markdown(),
    )
    return mark_generated(redact(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))))
