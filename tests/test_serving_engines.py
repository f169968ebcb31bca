# SPDX-License-Identifier: Apache-2.0
"""What vLLM and SGLang ask of a model that their transformers back ends run, done here as they do it (docs/serving.md).

They build the model from its configuration and code alone, put layers of their own in the places of linear layers,
norms and experts, serve attention themselves from a paged cache, and feed the tokens of all requests as one row.
"""

import ast
import importlib
import inspect
import json
import re
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jai import JaiConfig
from jai.configuration_jai import AUTO_MAP

GREEDY = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPTS = [[5, 17, 44, 8], [71, 3, 9, 20, 33, 56, 2], [12]]
# Styles that both engines' linear layers know, SGLang 0.5.23 refusing every other.
KNOWN_STYLES = {"colwise", "rowwise", "packed_colwise", "packed_rowwise", "moe_tp_experts", "embedding_rowwise"}
CODE = ("package", "remote")


@pytest.fixture
def engine_model(tiny_model, tmp_path):
    """`engine_model(code, **config_overrides)`: the plain model, its folder, and the class that an engine finds."""

    def build(code: str, **overrides) -> tuple[PreTrainedModel, Path, type[PreTrainedModel]]:
        plain = tiny_model(**overrides)
        plain.save_pretrained(tmp_path / "jai")
        if code == "package":
            return plain, tmp_path / "jai", type(plain.model)
        found = get_class_from_dynamic_module(AUTO_MAP["AutoModel"], str(tmp_path / "jai"))
        assert found is not type(plain.model)
        return plain, tmp_path / "jai", found

    return build


class PagedAttention:
    """An engine's attention: the keys and values of each layer and request, kept outside the model."""

    def __init__(self, requests: int):
        self.cache: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.lengths = [0] * requests
        self.layers: list[int] = []

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        """Of one row, in which the new tokens of each request lie behind those of the request before."""
        assert attention_mask is None, "an engine masks by itself"
        batch = kwargs["forward_batch"]  # SGLang hands its state through the model, in the keyword arguments
        self.layers.append(module.layer_idx)
        outputs, start = [], 0
        for request, count in enumerate(batch):
            part = slice(start, start + count)
            start += count
            new = key[:, :, part], value[:, :, part]
            old = self.cache.get((module.layer_idx, request))
            k, v = new if old is None else (torch.cat(pair, dim=2) for pair in zip(old, new))
            self.cache[module.layer_idx, request] = k, v
            mask = torch.ones(count, k.shape[2], dtype=torch.bool).tril(k.shape[2] - count)
            attended = F.scaled_dot_product_attention(
                query[:, :, part], k, v, attn_mask=mask, scale=scaling, enable_gqa=True
            )
            outputs.append(attended.transpose(1, 2))
        return torch.cat(outputs, dim=1), None


class EngineLinear(nn.Module):
    """A linear layer of an engine: no nn.Linear, and its weight is loaded by name."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        assert linear.bias is None
        self.weight = nn.Parameter(torch.empty(linear.weight.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class EngineNorm(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(norm.weight.shape))
        self.eps = norm.variance_epsilon  # where both engines look for it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class EngineExperts(nn.Module):
    """A fused layer of experts, called as transformers' own are; it knows the sizes from the configuration only."""

    def __init__(self, config):
        super().__init__()
        experts, inner, hidden = config.num_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        assert hidden_states.ndim == 2
        gate, up = torch.einsum("th,eih->tei", hidden_states, self.gate_up_proj).chunk(2, dim=-1)
        every = torch.einsum("tei,ehi->teh", F.silu(gate) * up, self.down_proj)
        chosen = every.gather(1, topk_ids[..., None].expand(-1, -1, every.shape[-1]))
        return (chosen * topk_weights[..., None]).sum(1)


def replace_layers(module: nn.Module, config) -> None:
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if name == "experts" and parameters and all(parameter.ndim == 3 for parameter in parameters):
            setattr(module, name, EngineExperts(config))
        elif isinstance(child, nn.Linear):
            setattr(module, name, EngineLinear(child))
        elif type(child).__name__.endswith("RMSNorm"):
            setattr(module, name, EngineNorm(child))
        else:
            replace_layers(child, config)


def build_in_engine(folder: Path, code: str) -> tuple[PreTrainedModel, nn.Parameter]:
    """The base model as an engine builds it: from the configuration, with its layers, weights by name."""
    # Where the package is installed AutoConfig prefers it, so the class is named.
    config_class = get_class_from_dynamic_module(AUTO_MAP["AutoConfig"], str(folder)) if code == "remote" else JaiConfig
    config = config_class.from_pretrained(folder, name_or_path=str(folder))
    config._attn_implementation = "engine"
    model = AutoModel.from_config(config, trust_remote_code=code == "remote")
    replace_layers(model, config)
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    places = {f"model.{name}": tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, tensor in tensors.items():  # every name of the checkpoint has its place in the base model
        places[name].data.copy_(tensor)
    assert {name for name in places if "inv_freq" not in name} == set(tensors)
    return model.eval(), head


def step(model: PreTrainedModel, head: torch.Tensor, attention: PagedAttention, new: list[list[int]]) -> torch.Tensor:
    """One forward of an engine over the new tokens of all requests; the logits at each request's last token."""
    counts = [len(tokens) for tokens in new]
    positions = [i for length, count in zip(attention.lengths, counts) for i in range(length, length + count)]
    row = torch.tensor([[token for tokens in new for token in tokens]])
    attention.layers.clear()
    hidden = model(
        input_ids=row,
        inputs_embeds=None,
        use_cache=False,
        position_ids=torch.tensor([positions]),
        return_dict=False,
        forward_batch=counts,
    )[0][0]
    attention.lengths = [length + count for length, count in zip(attention.lengths, counts)]
    return hidden[torch.tensor(counts).cumsum(0) - 1] @ head.T


@pytest.fixture
def attention(monkeypatch) -> PagedAttention:
    paged = PagedAttention(len(PROMPTS))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "engine", paged)
    return paged


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"skip_alpha_trainable": False, "skip_alpha_normalize": True},
        {"num_experts": 1},
        {"num_hidden_layers": 4, "num_experts_per_tok": 3},
    ],
    ids=["experts", "frozen-normalised", "dense", "first-layers"],
)
@torch.no_grad()
def test_an_engine_computes_what_the_model_computes(engine_model, attention, code, overrides):
    plain, folder, expected_class = engine_model(code, **overrides)
    model, head = build_in_engine(folder, code)
    assert type(model).__qualname__ == expected_class.__qualname__
    assert type(model).__module__.startswith("transformers_modules." if code == "remote" else "jai.")

    new, answers = PROMPTS, [[] for _ in PROMPTS]
    for _ in range(GREEDY["max_new_tokens"]):
        logits = step(model, head, attention, new)
        # vLLM and SGLang keep one cache for each layer, by `layer_idx`: each layer attends once, in order.
        assert attention.layers == list(range(plain.config.num_hidden_layers))
        for prompt, answer, row in zip(PROMPTS, answers, logits):
            expected = plain(torch.tensor([prompt + answer]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
            answer.append(row.argmax().item())
        new = [answer[-1:] for answer in answers]
    generated = [plain.generate(torch.tensor([p]), **GREEDY)[0, len(p) :].tolist() for p in PROMPTS]
    assert answers == generated


@pytest.mark.parametrize("code", CODE)
def test_an_engine_finds_what_it_looks_for(engine_model, code):
    plain, _, found = engine_model(code)
    assert found._supports_attention_backend
    assert found.is_backend_compatible()
    config = plain.config
    assert (config.num_experts, config.num_experts_per_tok, config.get_text_config()) == (4, 2, config)
    # Not an encoder, no window, no scaled logits.
    assert all(getattr(module, "is_causal", True) for module in plain.modules())
    assert not any(hasattr(config, name) for name in ("sliding_window", "layer_types", "logit_scale"))
    assert config.norm_topk_prob is True  # and no key of config.json: it cannot be otherwise
    assert "norm_topk_prob" not in config.to_dict()
    # A flat list of all layers, numbered, and one table of the vocabulary.
    (layers,) = (module for module in plain.model.modules() if isinstance(module, nn.ModuleList))
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(config.num_hidden_layers))
    assert [m for m in plain.modules() if isinstance(m, nn.Embedding)] == [plain.get_input_embeddings()]


def calls_of_the_attention_interface(forward) -> list[ast.Call]:
    """Calls of what was read from ALL_ATTENTION_FUNCTIONS: vLLM finds attention by the text of `forward`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and "ALL_ATTENTION_FUNCTIONS." in ast.unparse(node.value):
            names |= {ast.unparse(target) for target in getattr(node, "targets", None) or [node.target]}
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]


@pytest.mark.parametrize("code", CODE)
def test_attention_is_dispatched_once_with_its_scale(engine_model, code):
    plain, _, found = engine_model(code)
    attention_class = inspect.getmodule(found).JaiAttention
    (call,) = calls_of_the_attention_interface(attention_class.forward)
    (scale,) = (keyword.value for keyword in call.keywords if keyword.arg == "scaling")
    assert ast.unparse(scale) == "self.scaling"
    assert plain.model.layers[0].self_attn.scaling == plain.config.head_dim**-0.5
    assert [keyword.arg for keyword in call.keywords][-1] is None  # **kwargs: SGLang's state travels in them


@pytest.mark.parametrize("top_k", [1, 2, 4])
@torch.no_grad()
def test_routing_is_one_that_engines_compute_by_themselves(tiny_model, top_k):
    """vLLM replaces the gate by softmax over all experts, the best of them, renormalised, from the weight alone."""
    block = tiny_model(num_experts_per_tok=top_k).model.layers[0].mlp
    assert [name for name, _ in block.gate.named_parameters()] == ["weight"]
    assert not list(block.gate.buffers())
    x_TH = torch.randn(11, 32)
    logits, weights, ids = block.gate(x_TH)
    scores, expected_ids = (x_TH @ block.gate.weight.T).softmax(-1).topk(top_k)
    torch.testing.assert_close(logits, x_TH @ block.gate.weight.T)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))
    assert list(inspect.signature(block.experts.forward).parameters)[-3:] == [
        "hidden_states",
        "top_k_index",
        "top_k_weights",
    ]
    assert [parameter.ndim for parameter in block.experts.parameters()] == [3, 3]
    output = block(x_TH[None])
    assert isinstance(output, torch.Tensor)
    torch.testing.assert_close(output[0], block.experts(x_TH, ids, weights))


@pytest.mark.parametrize("experts", [1, 4])
def test_the_tensor_parallel_plan_has_styles_that_engines_know(tiny_model, experts):
    model = tiny_model(num_experts=experts).model
    plan = model.tp_plan
    assert set(plan.values()) <= KNOWN_STYLES
    styles = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            (styles[name.split(".", 2)[2]],) = (style for entry, style in plan.items() if re.match(entry, name))
    mlp = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
    assert styles == {
        "self_attn.q_proj": "colwise",
        "self_attn.k_proj": "colwise",
        "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise",
        **(mlp if experts == 1 else {}),
    }


class MissingLayer(nn.Identity):
    """What stands in a pipeline stage for a layer of another one: returns the first thing that it is given."""

    def forward(self, *args, **kwargs):
        return args[0]


def cut(model: PreTrainedModel, first: int, last: int) -> None:
    for i in [*range(first), *range(last, len(model.layers))]:
        missing = MissingLayer()
        # SGLang's keeps the plain attributes of the layer, vLLM's has none.
        missing.takes_anchor = model.layers[i].takes_anchor
        model.layers[i] = missing


@torch.no_grad()
def test_a_pipeline_is_cut_where_no_skip_is_live_or_not_at_all(tiny_model):
    plain = tiny_model(block_repeats=[1, 1, 2, 1])
    assert plain.config.base_model_pp_plan is None
    assert not plain.model.supports_pp_plan
    ids = torch.tensor([PROMPTS[1]])
    expected = plain.model(ids).last_hidden_state

    # vLLM cuts models without a plan in the middle of their layers, and warns only.
    through = tiny_model(block_repeats=[1, 1, 2, 1]).model
    cut(through, 0, 3)
    with pytest.raises(ValueError, match=r"Cut it only before one of the layers \[0, 1, 2, 4\]"):
        through(ids)

    stages = [tiny_model(block_repeats=[1, 1, 2, 1]).model for _ in range(2)]
    cut(stages[0], 0, 2)
    cut(stages[1], 2, 5)
    stages[0].norm = nn.Identity()
    hidden = stages[0](ids).last_hidden_state
    positions = torch.arange(ids.shape[1])[None]
    torch.testing.assert_close(
        stages[1](inputs_embeds=hidden, position_ids=positions).last_hidden_state, expected, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_an_engine_can_compile_the_whole_forward(tiny_model, monkeypatch):
    """vLLM compiles the base model as one graph, with its own attention in it."""

    def by_document(module, query, key, value, attention_mask, scaling, **kwargs):
        k = key.repeat_interleave(module.num_key_value_groups, dim=1)
        v = value.repeat_interleave(module.num_key_value_groups, dim=1)
        scores = (query @ k.transpose(2, 3) * scaling).masked_fill(~kwargs["documents"], float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "engine", by_document)
    model = tiny_model(experts_implementation="grouped_mm")
    expected = torch.cat([model.model(torch.tensor([prompt])).last_hidden_state for prompt in PROMPTS], dim=1)
    model.config._attn_implementation = "engine"
    document = torch.tensor([i for i, prompt in enumerate(PROMPTS) for _ in prompt])
    documents = (document[:, None] == document).tril()
    arguments = {
        "input_ids": torch.tensor([[token for prompt in PROMPTS for token in prompt]]),
        "position_ids": torch.tensor([[i for prompt in PROMPTS for i in range(len(prompt))]]),
        "use_cache": False,
        "return_dict": False,
        "documents": documents,
    }
    torch._dynamo.reset()
    compiled = torch.compile(model.model.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """`benchmarks/serving_engines.py`, which compares a real engine with transformers."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("serving_engines")


def test_split_experts_are_the_same_weights_under_the_names_that_sglang_loads(script, tiny_model, tmp_path):
    plain = tiny_model(num_hidden_layers=2)
    plain.save_pretrained(tmp_path / "jai", max_shard_size="60KB")
    (tmp_path / "split").mkdir()
    assert script.split_experts(tmp_path / "jai", tmp_path / "split") == tmp_path / "split"
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    split = {}
    for file in set(index["weight_map"].values()):
        split |= load_file(tmp_path / "split" / file)
    assert len(set(index["weight_map"].values())) > 1
    assert split.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in split.values())
    for name, tensor in plain.state_dict().items():
        layer, _, matrix = name.partition(".mlp.experts.")
        if not matrix:
            assert torch.equal(split.pop(name), tensor)
            continue
        for number in range(4):
            named = f"{layer}.mlp.experts.{number}." + "{}.weight"
            parts = ["down_proj"] if matrix == "down_proj" else ["gate_proj", "up_proj"]
            assert torch.equal(torch.cat([split.pop(named.format(part)) for part in parts]), tensor[number])
    assert not split
    for name in ("config.json", "modeling_jai.py", "configuration_jai.py", "quantization_jai.py"):
        assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "jai" / name).read_bytes()


def test_a_dense_checkpoint_need_not_be_split(script, tiny_model, tmp_path):
    tiny_model(num_experts=1).save_pretrained(tmp_path / "jai")
    (tmp_path / "split").mkdir()
    assert script.split_experts(tmp_path / "jai", tmp_path / "split") == tmp_path / "jai"


@torch.no_grad()
def test_answers_are_judged_by_transformers(script, tiny_model, tmp_path):
    plain = tiny_model()
    plain.save_pretrained(tmp_path / "jai")
    task = script.Task(str(tmp_path / "jai"), PROMPTS, 5, "float32", 1)
    answers = []
    for prompt in PROMPTS:
        tokens = plain.generate(torch.tensor([prompt]), **{**GREEDY, "max_new_tokens": 5})[0, len(prompt) :]
        steps = plain(torch.tensor([prompt + tokens.tolist()])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        answers.append(script.Answer(tokens.tolist(), steps.gather(-1, tokens[:, None])[:, 0].tolist()))
    for result in script.judge(task, answers):
        assert result["equal"] == 5
        assert result["margin"] == 0
        assert result["difference"] < 1e-5

    wrong = answers[0].tokens[2] % 90 + 1
    answers[0].tokens[2] = wrong
    answers[1].log_probabilities[4] -= 0.5
    first, second, third = script.judge(task, answers)
    assert first["equal"] < 5
    assert first["margin"] > 1e-3
    assert second["difference"] == pytest.approx(0.5, abs=1e-3)
    assert third["difference"] < 1e-5
