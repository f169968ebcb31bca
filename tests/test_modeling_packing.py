# SPDX-License-Identifier: Apache-2.0
"""Packed documents = separate documents, whatever else is in the call (elsewhere several of these leak in silence)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def documents(lengths=(5, 3, 7, 1, 4), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 99, (1, length), generator=generator) for length in lengths]


def pack(parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One row of documents `(1, sum of lengths)`; labels do not cross from one to the next."""
    labels = [torch.nn.functional.pad(part[:, 1:], (1, 0), value=-100) for part in parts]
    positions = [torch.arange(part.shape[1])[None] for part in parts]
    return {
        "input_ids": torch.cat(parts, dim=1),
        "position_ids": torch.cat(positions, dim=1),
        "labels": torch.cat(labels, dim=1),
    }


def summed_loss(model, **inputs) -> torch.Tensor:
    return model(**inputs, num_items_in_batch=1).loss


def separate_loss(model, parts) -> torch.Tensor:
    return sum(summed_loss(model, input_ids=part, labels=part) for part in parts if part.shape[1] > 1)


@pytest.fixture(params=["eager", "sdpa"])
def model(request, tiny_model):
    return tiny_model(attn_implementation=request.param)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_packed_documents_are_separate_documents(model, use_cache, mask, training):
    model.train(training)
    packed = pack(documents())
    if mask:
        packed["attention_mask"] = torch.ones_like(packed["input_ids"])
    leaking = summed_loss(model, input_ids=packed["input_ids"], labels=packed["labels"])
    expected = separate_loss(model, documents())
    assert (leaking - expected).abs() > 1  # what a leak would cost
    torch.testing.assert_close(summed_loss(model, **packed, use_cache=use_cache), expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    pad_position=st.sampled_from([0, 1]),
    attention=st.sampled_from(["eager", "sdpa"]),
)
def test_rows_of_packed_documents_with_padding(tiny_model, rows, side, pad_position, attention):
    """Each row holds documents of its own and is padded, on either side, to the longest."""
    model = tiny_model(attn_implementation=attention)
    width = max(map(sum, rows)) + 2
    filled = {"input_ids": [], "position_ids": [], "attention_mask": []}
    expected = []
    for index, lengths in enumerate(rows):
        parts = documents(lengths, seed=index)
        packed = pack(parts)
        packed["attention_mask"] = torch.ones_like(packed["input_ids"])
        missing = width - packed["input_ids"].shape[1]
        where = (missing, 0) if side == "left" else (0, missing)
        for key, fill in (("input_ids", 0), ("position_ids", pad_position), ("attention_mask", 0)):
            filled[key].append(torch.nn.functional.pad(packed[key], where, value=fill))
        expected.append(torch.cat([model(part).logits[0] for part in parts]))
    batch = {key: torch.cat(value) for key, value in filled.items()}
    logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[batch["attention_mask"].bool()], torch.cat(expected), **CLOSE)


def test_gradients_of_packed_documents_with_right_padding(model):
    packed = pack(documents())
    padded = {key: torch.nn.functional.pad(value, (0, 6)) for key, value in packed.items()}
    padded["attention_mask"] = (padded["input_ids"] != 0).long()
    padded["labels"] = padded["labels"].masked_fill(padded["attention_mask"] == 0, -100)
    summed_loss(model, **padded).backward()
    actual = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    separate_loss(model, documents()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            actual[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_under_plain_trainer(tiny_model, tmp_path, checkpointing):
    """One step of SGD, in two halves, from flattened batches = one step from the summed loss of each document."""
    parts = documents((5, 3, 7, 4))
    expected = tiny_model().train()
    count = sum(part.shape[1] - 1 for part in parts)
    loss = separate_loss(expected, parts) / count
    loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.5 * parameter.grad

    model = tiny_model()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        ),
        data_collator=DataCollatorWithFlattening(),
        train_dataset=[{"input_ids": part[0].tolist()} for part in parts],
    )
    result = trainer.train()
    assert result.training_loss == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [False, True])
def test_packed_documents_with_a_cache_of_the_callers_are_refused(tiny_model, mask):
    """A cache holds one document a row: the next token could not know which of them it continues."""
    packed = pack(documents())
    packed["attention_mask"] = torch.ones_like(packed["input_ids"]) if mask else None
    with pytest.raises(ValueError, match="Leave `past_key_values` out, or give one document a row"):
        tiny_model()(**packed, past_key_values=DynamicCache())


def test_packed_documents_beside_padding_are_refused_under_flash_attention(tiny_model):
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    packed = pack(documents())
    packed["attention_mask"] = torch.ones_like(packed["input_ids"])
    packed["attention_mask"][0, -2:] = 0
    with pytest.raises(ValueError, match="Pack without padding and leave `attention_mask` out"):
        model(**packed)


def test_a_mask_of_ones_is_no_mask_under_flash_attention(tiny_model):
    """There the documents are found by their positions, and only where no mask is given."""
    model = tiny_model().model
    model.config._attn_implementation = "flash_attention_2"
    packed = pack(documents())
    embeddings, ones = model.embed_tokens(packed["input_ids"]), torch.ones_like(packed["input_ids"])
    assert model._causal_mask(embeddings, ones, packed["position_ids"], None) is None


@torch.no_grad()
def test_positions_that_jump_ahead_are_other_documents_too(model):
    """transformers' rule: any step other than 1. Slices of long documents may keep their positions."""
    first, second = documents((6, 5))
    positions = torch.cat([torch.arange(6), torch.arange(20, 25)])[None]
    logits = model(torch.cat((first, second), dim=1), position_ids=positions).logits
    torch.testing.assert_close(logits[:, :6], model(first).logits, **CLOSE)
    torch.testing.assert_close(logits[:, 6:], model(second).logits, **CLOSE)


@torch.no_grad()
def test_a_4d_mask_is_taken_as_it_is(model):
    parts = documents((4, 6))
    packed = pack(parts)
    block = torch.block_diag(*[torch.ones(part.shape[1], part.shape[1]).tril() for part in parts]).bool()
    mask = torch.zeros(1, 1, 10, 10).masked_fill(~block, torch.finfo(torch.float32).min)
    logits = model(packed["input_ids"], attention_mask=mask, position_ids=packed["position_ids"]).logits
    torch.testing.assert_close(logits, torch.cat([model(part).logits for part in parts], dim=1), **CLOSE)
