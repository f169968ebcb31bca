# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction: one more layer that learns to predict the second next token (Trillion-7B, section 3.4).

The layer is transformers' (`MtpLayer`, whose training loss does not exist there): the last hidden state at t and the
embedding of token t+1 go through a layer of the model's own kind, and its head predicts token t+2. The layer is in
checkpoints, where transformers' `generate(use_mtp=True)` finds it; of the final model it is dropped or kept.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from trl.trainer.utils import FusedCausalLMOutput

from jai.errors import UserError
from jai.modeling_jai import CACHE

IGNORED = -100
MODULE = "mtp"  # of the model; its names in a checkpoint, `mtp.layers.0.…`, are such as transformers reads


@dataclass
class SecondTokenOutput(FusedCausalLMOutput):
    """TRL's output, and the losses of the second next token.

    Attributes:
        second_loss: their sum.
        second_tokens: how many there are.
    """

    second_loss: torch.Tensor | None = None
    second_tokens: torch.Tensor | None = None


def second_labels(labels: torch.Tensor, input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """For each token t+1, the label t+2, where t, t+1 and t+2 are of one document; else -100.

    Args:
        labels: `(batch, tokens)`, not shifted, -100 on the first token of each document that is apart from others.
        input_ids: `(batch, tokens)`.
        eos_token_id: ends each document.

    Returns:
        `(batch, tokens − 1)`.
    """
    ends = input_ids == eos_token_id
    after_end = nn.functional.pad(ends[:, :-1], (1, 0), value=True)  # nothing is before a sequence
    crosses = ends | after_end | (labels == IGNORED)
    return labels[:, 1:].masked_fill(crosses[:, :-1], IGNORED)


def add_second_token_layer(model: PreTrainedModel, seed: int, eos_token_id: int) -> nn.Module:
    """Give a model the layer, and `model(..., fused_lm_head=True)` the losses of the second next token.

    Call it after TRL's `add_fused_lm_head`. Where the model's checkpoint has such a layer, it is that one; else its
    weights are drawn as the model's are, from the seed alone.

    Raises:
        UserError: for a checkpoint with several such layers, or whose layer is not whole.
    """
    layer = _stored_layer(model) if getattr(model.config, "num_mtp_layers", None) else _drawn_layer(model, seed)
    layer.to(cast(torch.Tensor, model.get_input_embeddings().weight).device)
    setattr(model, MODULE, nn.ModuleDict({"layers": nn.ModuleList([layer])}))
    decoder = cast(Any, model.get_decoder())
    caught: list[torch.Tensor] = []
    decoder.register_forward_hook(lambda module, args, output: caught.append(output.last_hidden_state))
    before = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        caught.clear()
        output = before(*args, **kwargs)
        if not kwargs.get("fused_lm_head"):
            caught.clear()
            return output
        labels = second_labels(kwargs["labels"], kwargs["input_ids"], eos_token_id)
        hidden = _second_hidden(self, caught.pop(), kwargs["input_ids"], kwargs["position_ids"])
        logits = self.get_output_embeddings()(hidden).float()
        targets = labels.to(logits.device)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        tokens = (targets != IGNORED).sum()
        return SecondTokenOutput(**output, second_loss=loss, second_tokens=tokens)

    model.forward = types.MethodType(forward, model)
    return layer


def _stored_layer(model: PreTrainedModel) -> nn.Module:
    from transformers.modeling_layers import MtpModel

    name, layers = model.config.name_or_path, model.config.num_mtp_layers
    if layers != 1:
        raise UserError(
            f"{name} has {layers} layers for tokens after the next, and pre-training goes on with one alone. Leave "
            "`mtp_weight` out."
        )
    try:
        return MtpModel.from_pretrained(model).layers[0]
    except RuntimeError as error:  # weights of it are missing
        raise UserError(
            f"The layer for the second next token of {name} cannot be read: {error} Fetch the checkpoint again, or "
            "remove `num_mtp_layers` from its config.json, and a new layer is drawn."
        ) from error


def _drawn_layer(model: PreTrainedModel, seed: int) -> nn.Module:
    from transformers.modeling_layers import MtpLayer  # not in the oldest transformers that this package takes

    model.config.num_mtp_layers = 1
    reference = cast(Any, model.get_decoder()).layers[0]
    norm = next(type(module) for name, module in reference.named_modules() if "norm" in name)
    weight = cast(torch.Tensor, model.get_input_embeddings().weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = MtpLayer(model.config.get_mtp_config(), type(reference), norm, 0).to(weight.dtype)
        for module in layer.modules():
            model._init_weights(module)  # no public function draws a part; tested in test_pretrain.py
    return layer


def _second_hidden(
    model: Any, last_hidden: torch.Tensor, input_ids: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """What the layer makes of hidden states at t and tokens at t+1, `(batch, tokens − 1, hidden)`."""
    decoder, layer = model.get_decoder(), getattr(model, MODULE)["layers"][0]
    positions = position_ids[:, :-1]
    embeddings = model.get_input_embeddings()(input_ids[:, :-1])
    previous = nn.functional.pad(last_hidden[:, :-2], (0, 0, 1, 0))  # nothing is before a sequence
    # A document's first token stands alone, as if it were a document: the state before it is another document's, if
    # any, and `generate` has it not, but begins with the first state and the second token. It has no label either.
    of_documents = (positions - 1).clamp(min=0)
    mask = create_causal_mask(model.config, embeddings, None, None, position_ids=of_documents)
    return layer(
        embeddings,
        previous,
        position_embeddings=decoder.rotary_emb(embeddings, position_ids=positions),
        attention_mask=mask,
        position_ids=of_documents,
        **{CACHE: None},
    )


def drop_second_token_layer(model: PreTrainedModel) -> None:
    """Take the layer out of a trained model, as the report does."""
    delattr(model, MODULE)
    model.config.num_mtp_layers = None
