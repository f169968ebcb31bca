# SPDX-License-Identifier: Apache-2.0
"""The plan of training: predicted memory against the bytes that are counted in a step, and operations, twice."""

import dataclasses
import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import BitsAndBytesConfig
from trl import ScriptArguments
from trl.trainer.utils import add_fused_lm_head

from jai.configuration_jai import JaiConfig
from jai.conversion.inspect_options import InspectOptions
from jai.errors import UserError
from jai.modeling_jai import JaiForCausalLM
from jai.planning.advice import fits, what_would_fit
from jai.planning.flops import model_flops
from jai.planning.memory import Setup, moments, peak_memory, trained_parameters
from jai.planning.options import PlanOptions
from jai.planning.report import gigabytes, setup_of, training_table
from jai.planning.time import DEVICES, communication, peak_flops, planned_flops, speed
from jai.small_model import build_model, flops_per_token
from jai.small_model_options import ModelShape
from jai.trainers.arguments import StageArguments, parse_arguments
from jai.trainers.base_model import BaseModel
from jai.trainers.dpo import DPO
from jai.trainers.expert_lora import adapting_four_bits
from jai.trainers.parameters import KindCount, TrainedParameters
from jai.trainers.predicted_memory import setup_of_stage
from jai.trainers.pretrain import OPTIONS as PRETRAIN_OPTIONS
from jai.trainers.reward import REWARD
from jai.trainers.sft import SFT

SFT_OPTIONS, DPO_OPTIONS, REWARD_OPTIONS = SFT.option_classes, DPO.option_classes, REWARD.option_classes

FULL = Setup(compute=4, rank=8, routers=False, length=512, accumulates=False, loss="logits", on_cpu=True)
BF16 = replace(FULL, weights="bfloat16", compute=2)
LORA = replace(FULL, learns="lora", routers=True, accumulates=False)
QLORA = replace(LORA, weights="nf4")


@dataclass(frozen=True)
class Case:
    setup: Setup
    shape: dict[str, Any] = field(default_factory=dict)


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
WIDE = {"hidden_size": 128, "intermediate_size": 256, "block_repeats": [1] * 6, "vocab_size": 1000}
DENSE = {"hidden_size": 128, "intermediate_size": 512, "num_local_experts": 1}
QUICK = [Case(FULL), Case(QLORA), Case(replace(QLORA, checkpointing=False), WIDE)]
SLOW = [
    Case(replace(setup, checkpointing=checkpointing, **changes), shape)
    for setup in (FULL, BF16, LORA, QLORA)
    for checkpointing in (True, False)
    for shape in ({}, WIDE, DENSE)
    for changes in ({}, {"length": 128, "batch": 2}, {"length": 1024, "loss": "chunked"}, {"experts": "eager"})
    if not (shape is DENSE and changes.get("experts"))
]
SLOW += [
    Case(replace(setup, experts="batched_mm", length=64, checkpointing=checkpointing), shape)
    for setup in (FULL, BF16, LORA, QLORA)
    for checkpointing in (True, False)
    for shape in ({}, WIDE)
]
SLOW += [
    Case(replace(LORA, new_rows=200)),
    Case(replace(QLORA, new_rows=400), WIDE),
    Case(replace(FULL, accumulates=True)),
]


def configuration(**changes: Any) -> JaiConfig:
    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "block_size": 1,
        "block_repeats": [1] * 4,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return JaiConfig(**(sizes | changes))


def trained_model(config: JaiConfig, setup: Setup, folder) -> torch.nn.Module:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setup.compute == 2 else torch.float32
    model = JaiForCausalLM(config).to(dtype)
    if setup.weights == "nf4":
        model.save_pretrained(folder)
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        model = JaiForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=how)
    model.set_experts_implementation(setup.experts)
    whole = model
    if setup.learns == "lora":
        dense = config.num_local_experts == 1
        lora = LoraConfig(
            r=setup.rank,
            target_modules=[
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                *(["gate_proj", "up_proj", "down_proj"] if dense else []),
            ],
            target_parameters=None if dense else ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            modules_to_save=None if dense else ["mlp.gate"],
            trainable_token_indices=None
            if not setup.new_rows
            else {name: list(range(setup.new_rows)) for name in ("embed_tokens", "lm_head")},
        )
        model = get_peft_model(model, adapting_four_bits(lora))
    if setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if setup.loss == "chunked":
        add_fused_lm_head(whole)
    return model.train()


def counted_peak(config: JaiConfig, setup: Setup, folder) -> int:
    """Bytes at the peak of a step, once the optimiser has its states."""
    model = trained_model(config, setup, folder)
    learning = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, fused=True)
    ids = torch.randint(0, config.vocab_size, (setup.batch, setup.length))

    def step() -> None:
        for _ in range(2 if setup.accumulates else 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=setup.autocast and setup.compute == 2):
                if setup.loss == "chunked":
                    loss = -model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs.mean()
                else:
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [each for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
    with LiveBytes([*model.parameters(), *model.buffers(), *states]) as live:
        step()
    return live.peak


def check(case: Case, folder) -> None:
    config = configuration(**case.shape)
    predicted, counted = peak_memory(config, case.setup), counted_peak(config, case.setup, folder)
    assert predicted.total == pytest.approx(counted, rel=0.1), predicted


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_predicted_peak_is_the_counted_one(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_predicted_peaks_are_the_counted_ones(case, tmp_path):
    check(case, tmp_path)


PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
SHAPES = {"narrow": {}, "wide": WIDE, "dense": DENSE}
SETUPS = {"full": FULL, "LoRA": LORA, "QLoRA": QLORA}


def planned_cells(options: str) -> list[str]:
    """Cells of the page's table: peak, whether it fits, tokens a second, utilisation, and what limits it."""
    given: dict[str, Any] = {}
    for part in options.removeprefix("--").split(" --"):
        name, _, value = part.partition(" ")
        given[name.replace("-", "_")] = int(value) if value.isdigit() else value
    config, inspected = JaiConfig(), InspectOptions(model="jai-1", **given)
    setup, device = setup_of(inspected, config), DEVICES[inspected.gpu]
    moved = speed(config, setup, device, inspected.utilization)
    found = None if fits(config, setup, device.memory) else what_would_fit(config, setup, device.memory)
    return [
        f"{peak_memory(config, setup).total / 1e9:.1f}",
        "yes" if found is None else f"no; {found[0]}: {found[1] / 1e9:.1f}",
        f"{moved.tokens:,.0f}",
        f"{moved.utilisation(device, inspected.gpus):.1%}",
        moved.limit,
    ]


def rows_of_page(start: str) -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(start)]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_table_of_the_page_is_what_the_commands_say():
    rows = rows_of_page("| `--train")
    assert len(rows) > 10
    for options, *cells in rows:
        assert cells == planned_cells(options), options


def test_parts_on_one_card_are_what_the_command_says():
    config = JaiConfig()
    memory = peak_memory(config, setup_of(InspectOptions(model="jai-1", train="qlora", new_rows=31_936), config))
    parts = memory.parts | {f"peak, in the {memory.moment}": memory.total}
    for name, size in parts.items():
        assert not size or f"| {name} | {gigabytes(size)} |" in PAGE.read_text()


def counted_cells(shape: str, learns: str, checkpointing: str, folder) -> list[str]:
    config = configuration(**SHAPES[shape])
    setup = replace(SETUPS[learns], checkpointing=checkpointing == "yes")
    predicted, counted = peak_memory(config, setup).total, counted_peak(config, setup, folder)
    return [f"{predicted / 1e6:.1f}", f"{counted / 1e6:.1f}", f"{predicted / counted - 1:+.1%}"]


@pytest.mark.slow
def test_table_of_counted_peaks_is_of_today(tmp_path):
    rows = [row for shape in SHAPES for row in rows_of_page(f"| {shape} |")]
    assert len(rows) == 18
    for number, (shape, learns, checkpointing, predicted, counted, _) in enumerate(rows):
        now = counted_cells(shape, learns, checkpointing, tmp_path / str(number))
        assert [float(predicted), float(counted)] == pytest.approx([float(each) for each in now[:2]], rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"num_local_experts": 1}, {"tie_word_embeddings": True}])
def test_operations_of_a_configuration_are_those_of_its_model(changes):
    config = configuration(**changes)
    with torch.device("meta"):
        model = JaiForCausalLM(config)
    assert planned_flops(config, replace(FULL, length=100)) == model_flops(model, config, 100)
    model.requires_grad_(False)
    full = model_flops(model.requires_grad_(True), config, 100)
    assert model_flops(model.requires_grad_(False), config, 100) < full


def test_operations_of_lora_are_those_of_its_model(tmp_path):
    config, setup = configuration(), replace(LORA, routers=False, length=100)
    model = trained_model(config, replace(LORA, length=100), tmp_path)
    for name, parameter in model.named_parameters():
        if "mlp.gate" in name:
            parameter.requires_grad_(False)
    routers = 4 * sum(p.numel() for name, p in model.named_parameters() if "modules_to_save" in name)  # PEFT's copies
    assert planned_flops(config, setup) == pytest.approx(model_flops(model, config, 100) - routers)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(trained_parameters(config, setup).values()) == learning


def test_operations_of_a_small_model_are_those_of_a_jai_like_it():
    shape = ModelShape(64, 176, 6, 4)
    like = configuration(
        num_local_experts=1,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=176,
        block_repeats=[1] * 6,
        num_key_value_heads=4,
    )
    assert build_model(shape, 300, 50, 0).num_parameters() == JaiForCausalLM(like).num_parameters()
    assert sum(flops_per_token(shape, 300, 50)) == planned_flops(like, replace(FULL, length=50))


def test_jai_1_fits_one_card_in_four_bits_and_not_otherwise():
    config = JaiConfig()
    options = InspectOptions(model="jai-1", train="qlora", new_rows=31_936)
    assert fits(config, setup_of(options, config), 80e9)
    options.train, options.new_rows = "lora", 0
    assert not fits(config, setup_of(options, config), 80e9)
    found = what_would_fit(config, setup_of(options, config), 80e9)
    assert found is not None
    assert "GPUs" in found[0]


def test_each_change_that_is_named_fits():
    config = JaiConfig()
    setup = Setup(gpus=64, sharding="fsdp", batch=8, checkpointing=False, loss="logits")
    assert not fits(config, setup, 80e9)
    words, peak = what_would_fit(config, setup, 80e9)
    assert words.startswith("gradient checkpointing")
    assert peak < 80e9


def test_what_is_cut_is_cut_and_what_is_sent_is_counted():
    config = configuration()
    alone = Setup()
    halves = replace(alone, gpus=2, sharding="fsdp")
    state = lambda setup: next(moments(config, setup)).parts  # noqa: E731
    for part in ("weights", "optimiser", "gradients"):
        assert state(halves)[part] == state(alone)[part] / 2
    assert communication(config, alone) == 0
    weights = state(replace(alone, weights="bfloat16"))["weights"]
    assert communication(config, halves) == 3 * weights / 2
    assert communication(config, replace(alone, gpus=2)) == weights  # DDP: the gradients' mean
    both = replace(alone, gpus=4, sharding="hsdp", group=2)
    assert communication(config, both) == 3 * weights / 2 + 2 * weights / 2 / 2


def test_communication_limits_small_micro_batches():
    config, device = JaiConfig(), DEVICES["H100"]
    few = speed(config, Setup(gpus=64, sharding="fsdp"), device, 0.425)
    many = speed(config, Setup(gpus=64, sharding="fsdp", batch=8), device, 0.425)
    assert (few.limit, many.limit) == ("communication", "computing")
    assert few.utilisation(device, 64) < 0.425 == pytest.approx(many.utilisation(device, 64))


CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "train": ("lora", {}),
    "gpus": (128, {}),
    "gpu": ("H200", {}),
    "sharding": ("hsdp", {}),
    "group": (4, {"sharding": "hsdp"}),
    "batch_size": (2, {}),
    "max_length": (8192, {}),
    "gradient_checkpointing": (False, {}),
    "experts_implementation": ("eager", {}),
    "loss": ("logits", {"batch_size": 64}),
    "optimizer": ("adamw-8bit", {}),
    "lora_r": (8, {"train": "lora"}),
    "new_rows": (1000, {"train": "lora"}),
    "double_quant": (False, {"train": "qlora"}),
    "utilization": (0.3, {}),
}


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(PlanOptions)])
def test_every_option_of_a_plan_changes_its_table(name):
    def shown(**options: Any) -> str:
        console = Console(width=150, record=True, file=io.StringIO())
        given = {"train": "full", "gpus": 64} | options
        console.print(training_table(InspectOptions(model="jai-1", **given), JaiConfig()))
        return console.export_text()

    value, beside = CHANGES[name]
    text = shown(**beside, **{name: value})
    assert text != shown(**beside)
    assert name != "gpu" or "on 64 x H200" in text


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"train": "full"}, 4),
        ({"train": "full", "gpus": 2, "sharding": "none"}, 4),
        ({"train": "full", "gpus": 2}, 2),
        ({"train": "lora"}, 2),
    ],
)
def test_experts_are_computed_in_fp32_where_fsdp_does_not_cast_them(options, size):
    assert setup_of(PlanOptions(**options), JaiConfig()).compute == size


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_of_a_device(name, flops):
    assert peak_flops(name) == flops


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"new_rows": 100_000, "train": "lora"}, "vocabulary has 64,000"),
        ({"new_rows": 1, "train": "full"}, "new_rows is 1, but all weights learn"),
        ({"lora_r": 8, "train": "full"}, "lora_r is 8, but all weights learn"),
        ({"double_quant": False, "train": "lora"}, "double_quant is False, but only --train qlora"),
        ({"gpus": 12, "sharding": "hsdp", "train": "full"}, "multiple of the group"),
        ({"gpus": 8, "group": 4, "train": "full"}, "group is 4, but only --sharding hsdp"),
        ({"sharding": "hsdp", "train": "full"}, "sharding is hsdp, but one GPU has everything"),
        ({"gpus": 8}, "gpus is 8, but there is no plan without --train"),
        ({"batch_size": 8}, "batch_size is 8, but there is no plan without --train"),
    ],
)
def test_options_that_do_not_fit(options, error):
    with pytest.raises(UserError, match=error):
        setup_of(InspectOptions(model="jai-1", **options), JaiConfig())


def stage_setup(options: tuple[type, ...], given: dict[str, Any], *, lora: LoraConfig | None = None) -> Setup | str:
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    parsed = parse_arguments(options, ["--output_dir", "out", "--use_cpu", "true", *words], "jai sft")
    if options is PRETRAIN_OPTIONS:
        parsed = (ScriptArguments(dataset_name="packed"), *parsed)
    config = configuration()
    base = BaseModel("jai", Path("jai"), {}, config, None, None)  # type: ignore[arg-type]
    kinds = (KindCount("router", 1, 1, False, False), KindCount("new_rows", 99, 2 * 64 * 7, False, False))
    return setup_of_stage(StageArguments(*parsed), base, lora, TrainedParameters(1000, 10, 0, "", kinds))


def test_setup_of_a_stage_is_what_its_options_say():
    given = {"per_device_train_batch_size": 3, "max_length": 100, "gradient_accumulation_steps": 1, "dtype": "bfloat16"}
    setup = stage_setup(SFT_OPTIONS, given)
    assert isinstance(setup, Setup)
    assert (setup.batch, setup.length, setup.accumulates) == (3, 100, False)
    assert (setup.weights, setup.compute, setup.learns, setup.trained, setup.new_rows) == ("bfloat16", 2, "full", 10, 0)
    assert (setup.loss, setup.checkpointing, setup.reference, setup.state) == ("chunked", True, False, 8.0)
    others = {"optim": "paged_adamw_8bit", "gradient_checkpointing": "false", "experts_implementation": "eager"}
    changed = stage_setup(SFT_OPTIONS, given | others | {"loss_type": "dft"}, lora=LoraConfig(r=5))
    assert isinstance(changed, Setup)
    assert (changed.state, changed.checkpointing, changed.experts, changed.loss) == (2.0, False, "eager", "logits")
    assert (changed.learns, changed.rank, changed.new_rows) == ("lora", 5, 7)
    four = {"load_in_4bit": "true", "use_bnb_nested_quant": "true"}
    quantised = stage_setup(SFT_OPTIONS, given | four, lora=LoraConfig(r=5))
    assert isinstance(quantised, Setup)
    assert (quantised.weights, quantised.compute) == ("nf4-double", 2)
    exact = stage_setup(SFT_OPTIONS, given | four | {"dtype": "float32", "bf16": "false"}, lora=LoraConfig(r=5))
    assert isinstance(exact, Setup)
    assert exact.compute == 4
    # Those in four bits are dequantised once for all rows, and not copied for each.
    model, batched = configuration(), replace(exact, experts="batched_mm")
    assert peak_memory(model, batched) == peak_memory(model, replace(exact, experts="grouped_mm"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DPO_OPTIONS, (2, "chunked", True)),
        (REWARD_OPTIONS, (2, "none", False)),
    ],
)
def test_pairs_are_two_sequences(options, expected):
    setup = stage_setup(options, {"per_device_train_batch_size": 1, "max_length": 100})
    assert isinstance(setup, Setup)
    assert (setup.batch, setup.loss, setup.reference) == expected
    model = configuration()
    alone = peak_memory(model, replace(setup, reference=False)).total
    assert (peak_memory(model, setup).total > alone) == setup.reference


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"optim": "sgd"}, "AdamW alone"),
        ({"experts_implementation": "deepgemm"}, "deepgemm"),
        ({"max_length": "null"}, "max_length"),
        ({"load_in_4bit": "true"}, "with LoRA alone"),
    ],
)
def test_what_the_formulae_do_not_know_is_said(given, why):
    setup = stage_setup(SFT_OPTIONS, given)
    assert isinstance(setup, str)
    assert why in setup


def test_the_second_next_token_is_not_in_the_formulae():
    setup = stage_setup(PRETRAIN_OPTIONS, {"packed": "p", "max_length": 100, "mtp_weight": 0.1})
    assert setup == "the formulae do not know multi-token prediction"
    assert isinstance(stage_setup(PRETRAIN_OPTIONS, {"packed": "p", "max_length": 100}), Setup)


def test_what_the_launcher_cuts_is_predicted(monkeypatch):
    given = {"max_length": 100, "per_device_train_batch_size": 1}
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 64)
    assert stage_setup(SFT_OPTIONS, given).sharding == "none"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "1")
    assert stage_setup(SFT_OPTIONS, given).sharding == "fsdp"
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "32")
    setup = stage_setup(SFT_OPTIONS, given)
    assert (setup.sharding, setup.shards, setup.gpus) == ("hsdp", 32, 64)
    monkeypatch.setattr("jai.trainers.predicted_memory.uses_deepspeed", lambda training: True)  # it is not installed
    assert "DeepSpeed" in stage_setup(SFT_OPTIONS, given)
