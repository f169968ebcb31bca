# SPDX-License-Identifier: Apache-2.0
"""The linear cross-entropy: numbers against fp64 and peers, memory, work, torch.compile, models, TRL's trainers.

Without a GPU the kernels run in Triton's interpreter (`conftest.py` asks for it), which cannot do bf16.
"""

import copy
import importlib
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from jai.kernels.head import loss as module
from jai.kernels.head.causal_lm import use_linear_cross_entropy
from jai.kernels.head.loss import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_probs,
    linear_log_probs_reference,
    linear_token_figures,
)

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Paths and their dtypes; the kernels do not do fp64, nor the interpreter bf16.
PATHS = [("triton", torch.float32), ("triton", torch.float16)]
PATHS += [("triton", torch.bfloat16)] * (DEVICE == "cuda")
PATHS += [("plain", dtype) for dtype in TOLERANCE]
TOKENS, HIDDEN, VOCAB = 41, 31, 97


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written is NaN, and a chunk is a third of the tokens."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    monkeypatch.setattr(module, "LOGITS_BYTES", 16 * VOCAB * 4)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["triton", "plain"])
def path(request, monkeypatch) -> str:
    if request.param == "plain":
        use_plain(monkeypatch)
    else:
        assert module.why_not_triton(torch.device(DEVICE), torch.float32) is None
    return request.param


def use_plain(monkeypatch) -> None:
    monkeypatch.setattr(module, "why_not_triton", lambda device, dtype: "a test asks for it")
    monkeypatch.setattr(module, "warn_once", lambda reason: None)


class Head:
    """A head and its input in one dtype, and the same numbers in fp64."""

    def __init__(self, dtype=torch.float32, tokens=TOKENS, hidden=HIDDEN, vocab=VOCAB, ignored=3, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.tensors = [draw(tokens, hidden), draw(vocab, hidden) * 0.5]
        self.labels = torch.randint(vocab, (tokens,), generator=generator).to(DEVICE)
        if ignored:
            self.labels[::ignored] = -100

    def leaves(self, dtype=None, frozen=()):
        return [
            t.to(dtype or t.dtype).detach().clone().requires_grad_(i not in frozen) for i, t in enumerate(self.tensors)
        ]

    def compare(self, ours, reference, dtype, upstream=3.0, tolerance=None, **options) -> None:
        """Result and every gradient of ours against the reference in fp64."""
        tolerance = tolerance or TOLERANCE[dtype]
        leaves, exact = self.leaves(), self.leaves(torch.float64)
        results = []
        for function, tensors in ((ours, leaves), (reference, exact)):
            result = function(*tensors, self.labels, **options)
            (result * upstream).sum().backward()
            results.append(result.detach())
        assert results[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error(*results) < tolerance
        for ours_, exact_ in zip(leaves, exact):
            assert ours_.grad.dtype == dtype
            assert ours_.grad.shape == exact_.shape
            assert error(ours_.grad, exact_.grad) < tolerance


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """‖result − exact‖ / ‖exact‖."""
    result, exact = result.double(), exact.double()
    return float((result - exact).norm() / exact.norm().clamp(min=1e-300))


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 7, torch.tensor(11)], ids=str)
@pytest.mark.parametrize(("path", "dtype"), PATHS, indirect=["path"], ids=str)
def test_loss_equals_the_reference(path, dtype, items):
    upstream = torch.tensor(3.0, device=DEVICE)
    Head(dtype).compare(linear_cross_entropy, linear_cross_entropy_reference, dtype, upstream, num_items_in_batch=items)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3}], ids=str)
@pytest.mark.parametrize(("path", "dtype"), PATHS, indirect=["path"], ids=str)
def test_log_probs_equal_the_reference(path, dtype, options):
    upstream = torch.linspace(-1, 2, TOKENS, device=DEVICE)
    head = Head(dtype)
    head.compare(linear_log_probs, linear_log_probs_reference, dtype, upstream, **options)
    ignored = linear_log_probs(*head.tensors[:2], head.labels)[head.labels == -100]
    assert ignored.numel()
    assert (ignored == 0).all()


@pytest.mark.parametrize("upstream", ["equal", "unequal"])
@pytest.mark.parametrize("early", [True, False])
def test_token_figures_have_the_gradient_of_log_probs(path, early, upstream):
    weights = torch.full((TOKENS,), -0.25) if upstream == "equal" else torch.linspace(-1, 2, TOKENS)

    def ours(*args, **options):
        return linear_token_figures(*args, expect_equal_weights=early, **options).log_probs

    Head().compare(ours, linear_log_probs_reference, torch.float32, weights.to(DEVICE), temperature=0.9)


def test_token_figures_equal_plain_formulas(path):
    head = Head()
    hidden, weight = head.tensors
    weight[5] = weight[3]  # two equal logits: only the first can be the prediction
    logits = (hidden.double() @ weight.double().T) / 0.8
    head.labels[1::3] = logits[1::3].argmax(-1)
    head.labels[1], hidden[1] = 5, weight[5]
    logits = (hidden.double() @ weight.double().T) / 0.8
    assert logits[1, 3] == logits[1].max()
    figures = linear_token_figures(hidden, weight, head.labels, temperature=0.8)
    log_p, kept = logits.log_softmax(-1), head.labels != -100
    expected = {
        "log_probs": log_p.gather(-1, head.labels.clamp(min=0)[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logits": logits.mean(-1),
        "log_sum_sq_probs": log_p.exp().square().sum(-1).log(),
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(figures, name).double(), values * kept, rtol=1e-5, atol=1e-5)
    is_top1 = (logits.argmax(-1) == head.labels) & kept
    assert is_top1.any()
    assert not is_top1[kept].all()
    is_top1[1] = False
    assert torch.equal(figures.is_top1, is_top1)


@pytest.mark.parametrize(
    ("tokens", "ignored"), [(1, 0), (1, 1), (0, 0), (37, 1), (37, 0), (48, 7)], ids=lambda value: str(value)
)
def test_odd_numbers_of_tokens(path, tokens, ignored):
    head = Head(tokens=tokens, ignored=ignored)
    head.compare(linear_cross_entropy, linear_cross_entropy_reference, torch.float32)
    head.compare(linear_log_probs, linear_log_probs_reference, torch.float32)
    figures = linear_token_figures(*head.leaves(), head.labels, expect_equal_weights=True)
    figures.log_probs.sum().backward()


@pytest.mark.parametrize("vocab", [1, 2, 5000])
def test_odd_vocabularies(path, vocab):
    Head(tokens=5, vocab=vocab, ignored=4).compare(linear_cross_entropy, linear_cross_entropy_reference, torch.float32)


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 20),
    hidden=st.integers(1, 9),
    vocab=st.integers(1, 40),
    chunk=st.integers(1, 9),
    ignored=st.integers(0, 4),
    plain=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_small_shape(tokens, hidden, vocab, chunk, ignored, plain, seed):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "LOGITS_BYTES", chunk * vocab * 4)
        if plain:
            use_plain(monkeypatch)
        head = Head(tokens=tokens, hidden=hidden, vocab=vocab, ignored=ignored, seed=seed)
        # With V = 1 every gradient is 0 and a relative error has no meaning.
        leaves, exact = head.leaves(), head.leaves(torch.float64)
        for function, tensors in ((linear_cross_entropy, leaves), (linear_cross_entropy_reference, exact)):
            function(*tensors, head.labels).backward()
        for ours, right in zip(leaves, exact):
            torch.testing.assert_close(ours.grad.double(), right.grad, rtol=1e-4, atol=2e-6)


def test_large_logits_do_not_overflow(path):
    head = Head()
    head.tensors[0] *= 1000  # logits to 1e4, which fp32 knows to 1e-3
    head.compare(linear_cross_entropy, linear_cross_entropy_reference, torch.float32, tolerance=1e-4)


def test_any_strides_and_leading_dimensions(path):
    head = Head(tokens=42, ignored=4)
    hidden, weight = head.tensors
    expected = linear_cross_entropy_reference(hidden.double(), weight.double(), head.labels)
    strided = torch.stack([weight, weight], -1)[..., 0]
    assert 1 not in strided.stride()
    for h, w in (
        (hidden.T.contiguous().T, weight),
        (hidden, weight.T.contiguous().T),
        (torch.cat([hidden, hidden], 1)[:, :HIDDEN], strided),
    ):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        loss = linear_cross_entropy(h.unflatten(0, (6, 7)), w, head.labels.view(6, 7).int())
        assert error(loss.detach(), expected) < 3e-6
        loss.backward()
        exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        linear_cross_entropy_reference(*exact, head.labels).backward()
        assert error(h.grad, exact[0].grad) < 3e-6
        assert error(w.grad, exact[1].grad) < 3e-6
    assert linear_log_probs(hidden.view(6, 7, -1), weight, head.labels.view(6, 7)).shape == (6, 7)


@pytest.mark.parametrize("label", [-1, VOCAB, 2**40])
def test_label_outside_the_vocabulary_is_nan_and_reads_nothing(path, label):
    head = Head()
    head.labels[1] = label
    leaves = head.leaves()
    loss = linear_cross_entropy(*leaves, head.labels)
    loss.backward()
    assert loss.isnan()
    assert leaves[0].grad[1].isnan().all()
    assert leaves[0].grad[2].isfinite().all()
    log_probs = linear_log_probs(*head.tensors, head.labels)
    assert torch.equal(log_probs.isnan(), torch.arange(TOKENS, device=DEVICE) == 1)


def test_no_items_are_no_loss():
    head = Head(ignored=1)
    for items in (None, 0, torch.tensor(0)):
        leaves = head.leaves()
        loss = linear_cross_entropy(*leaves, head.labels, num_items_in_batch=items)
        loss.backward()
        assert loss == 0
        assert all((leaf.grad == 0).all() for leaf in leaves)


def test_other_ignore_index(path):
    head = Head(ignored=0)
    head.labels[::4] = 0
    head.compare(linear_cross_entropy, linear_cross_entropy_reference, torch.float32, ignore_index=0)
    head.compare(linear_log_probs, linear_log_probs_reference, torch.float32, ignore_index=0)


def test_the_same_twice(path):
    results = []
    for _ in range(2):
        leaves = Head(torch.float16).leaves()
        linear_cross_entropy(*leaves, Head().labels).backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels do bf16 there")
def test_autocast_sums_the_weight_gradient_in_the_weights_own_dtype():
    head = Head()
    leaves, exact = head.leaves(), head.leaves(torch.float64)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_plain(monkeypatch)
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(*leaves, head.labels)
        loss.backward()
    linear_cross_entropy_reference(*exact, head.labels).backward()
    for ours, right in zip(leaves, exact):
        assert ours.grad.dtype == torch.float32
        assert not torch.equal(ours.grad, ours.grad.bfloat16().float()) or ours is leaves[0]
        assert error(ours.grad, right.grad) < TOLERANCE[torch.bfloat16]


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_a_kept_graph_can_be_used_again(path):
    head = Head()
    leaves = head.leaves()
    loss = linear_cross_entropy(*leaves, head.labels) * 5
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    for leaf, gradient in zip(leaves, once):
        torch.testing.assert_close(leaf.grad, 2 * gradient)


def test_gradients_are_not_differentiable_again():
    head = Head()
    leaves = head.leaves()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(*leaves, head.labels), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), leaves[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_takes_the_result_without_a_copy(path, dtype):
    head = Head(dtype, vocab=130)
    leaves = head.leaves()
    loss = linear_cross_entropy(*leaves, head.labels)
    places = [tensor.data_ptr() for tensor in loss.grad_fn.saved_tensors[:2]]
    with Watch(*loss.grad_fn.saved_tensors[:2]) as watch:
        loss.backward()
    assert watch.peak < 100  # bytes: nothing the size of a gradient is made
    assert [leaf.grad.data_ptr() for leaf in leaves] == places
    assert leaves[0].grad.untyped_storage().nbytes() == leaves[0].nbytes
    spare = 128 * HIDDEN * dtype.itemsize  # halves are in whole steps of 64 rows
    assert leaves[1].grad.untyped_storage().nbytes() <= leaves[1].nbytes + spare * (dtype == torch.float16)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128, 129, 200])
@pytest.mark.parametrize("columns", [1, 7, 1000])
def test_sum_in_two_halves_rounds_to_the_same(rows, columns):
    weight = torch.empty(rows, columns, dtype=torch.bfloat16)
    weight_sum = module.WeightSum(weight)
    generator = torch.Generator().manual_seed(rows)
    a, b = torch.randn(5, rows, generator=generator), torch.randn(5, columns, generator=generator)
    weight_sum.add(a, b)
    weight_sum.add(a, b)
    total = torch.cat(weight_sum.parts)
    torch.testing.assert_close(total, 2 * (a.T @ b))
    assert weight_sum.parts[0].nbytes >= weight.nbytes
    assert torch.equal(weight_sum.result(), total.bfloat16())


# --- work and memory --------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Operations of matrix products, elements of the largest tensor, and bytes alive at once beside `inputs`."""

    def __init__(self, *inputs: torch.Tensor):
        super().__init__()
        self.flops = self.largest = self.live = self.peak = 0
        self.storages = {tensor.untyped_storage()._cdata: 0 for tensor in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                if tensor.is_floating_point():  # the interpreter copies arguments as bytes
                    self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, key: int) -> None:
        self.live -= self.storages.pop(key)


@pytest.fixture
def open_operators(monkeypatch):
    """Operators as plain functions, so that a dispatch mode sees what they do."""
    for name in ("forward_op", "log_prob_gradients_op"):
        monkeypatch.setattr(module, name, getattr(module, name)._init_fn)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)], ids=["all", "head only", "frozen head", "evaluation"])
def test_only_kept_tokens_and_wanted_gradients_are_computed(path, open_operators, frozen):
    head = Head(tokens=60, hidden=8, ignored=2)
    leaves = head.leaves(frozen=frozen)
    product = 2 * 30 * 8 * VOCAB  # 30 of 60 tokens are kept
    with Watch(*leaves) as watch:
        loss = linear_cross_entropy(*leaves, head.labels)
    assert watch.flops == (3 - len(frozen)) * product
    assert watch.largest <= 16 * VOCAB  # a chunk
    with Watch(*leaves) as watch:
        if loss.requires_grad:
            loss.backward()
    assert watch.flops == 0
    with Watch(*leaves) as watch:
        log_probs = linear_log_probs(*leaves, head.labels)
        if log_probs.requires_grad:
            log_probs.square().sum().backward()
    wanted = 2 - len(frozen)
    assert watch.flops == (1 + wanted + (wanted > 0)) * product
    assert watch.largest <= 16 * VOCAB  # a chunk


@pytest.mark.parametrize("grads", ["no_grad", "inference"])
def test_evaluation_computes_no_gradient(open_operators, grads):
    head = Head()
    leaves = head.leaves()
    with torch.no_grad() if grads == "no_grad" else torch.inference_mode(), Watch(*leaves) as watch:
        loss = linear_cross_entropy(*leaves, head.labels)
        linear_token_figures(*leaves, head.labels, expect_equal_weights=True)
    assert not loss.requires_grad
    assert watch.flops == 2 * 2 * int((head.labels != -100).sum()) * HIDDEN * VOCAB


def test_memory_at_the_size_of_jai_1(open_operators, monkeypatch):
    """The loop as a GPU runs it, with tensors that have a shape and no memory: 1.6 GiB beside the inputs."""
    monkeypatch.undo()
    for name in ("forward_op", "log_prob_gradients_op"):
        monkeypatch.setattr(module, name, getattr(module, name)._init_fn)
    monkeypatch.setattr(module, "DEVICES_WITH_FP32_SUMS", ("meta",))

    class NoKernels:
        @staticmethod
        def loss_figures(*args, **options):
            pass

    monkeypatch.setattr(module, "kernels_for", lambda device, dtype: NoKernels)
    sizes = []

    def all_chunks(kept, tokens, size):
        sizes.append(size)
        return ((start, min(start + size, tokens)) for start in range(0, tokens, size))

    monkeypatch.setattr(module, "chunks", all_chunks)
    hidden = torch.empty(16384, 5120, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(64000, 5120, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels = torch.empty(16384, dtype=torch.int64, device="meta")
    with Watch(hidden, weight, labels) as watch:
        loss = linear_cross_entropy(hidden, weight, labels)
    assert sizes == [1664]
    assert watch.flops == 6 * 16384 * 5120 * 64000
    assert 1.55 * 2**30 < watch.peak <= 1.6 * 2**30
    results = (hidden.numel() + weight.numel()) * 2
    assert results <= watch.live < results + 2**20  # what waits for the backward pass
    del loss


@pytest.mark.parametrize(
    ("tokens", "vocab", "itemsize", "size"),
    [
        (16384, 64000, 2, 1664),
        (1664, 64000, 2, 1664),
        (1800, 64000, 2, 1024),
        (100, 64000, 2, 100),
        (0, 64000, 2, 1),
        (65536, 32064, 2, 3328),
        (16384, 64000, 4, 768),
        (16384, 10**9, 4, 1),
    ],
)
def test_chunks_have_whole_tiles_and_equal_sizes(monkeypatch, tokens, vocab, itemsize, size):
    monkeypatch.undo()
    assert module.chunk_size(tokens, vocab, itemsize) == size


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "wants"), [("triton", (True, True)), ("plain", (False, True))], indirect=["path"])
def test_operators_are_what_they_say(path, wants):
    tensors, labels = Head().tensors, Head().labels
    settings = (torch.float32, torch.float32, -100, 1.3)
    scale = torch.ones((), device=DEVICE)
    torch.library.opcheck(module.forward_op, (*tensors, labels, scale, *settings, True, *wants))
    lse = torch.ones(TOKENS, device=DEVICE)
    torch.library.opcheck(module.log_prob_gradients_op, (*tensors, labels, lse, lse, *settings, *wants))


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
def test_compiles_whole(path, function):
    head = Head()

    def program(hidden, weight, labels):
        return (function(hidden * 2, weight, labels) * 3).sum()

    results = []
    for run in (program, torch.compile(program, fullgraph=True, backend="aot_eager")):
        leaves = head.leaves()
        result = run(*leaves, head.labels)
        result.backward()
        results.append([result.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


@pytest.fixture
def copied(tmp_path) -> Path:
    """The files of the loss alone, in a package of another name."""
    folder = tmp_path / "jai_kernels_copy"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in ("loss.py", "triton_kernels.py"):
        shutil.copy(ROOT / "kernels" / "head" / name, folder)
    return folder


def test_two_copies_of_the_package_live_side_by_side(copied, monkeypatch):
    monkeypatch.syspath_prepend(copied.parent)
    other = importlib.import_module("jai_kernels_copy.loss")
    assert other.NAMESPACE != module.NAMESPACE
    head = Head()
    assert torch.equal(
        other.linear_cross_entropy(*head.tensors, head.labels), linear_cross_entropy(*head.tensors, head.labels)
    )


def test_serves_without_triton_and_says_so_once(copied):
    program = """
import sys, warnings
sys.modules["triton"] = None
import torch
from jai_kernels_copy.loss import linear_cross_entropy, linear_cross_entropy_reference
h, w, y = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3), torch.arange(5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        loss = linear_cross_entropy(h, w, y)
        loss.backward()
torch.testing.assert_close(loss, linear_cross_entropy_reference(h, w, y))
print([str(w.message) for w in caught if "cross-entropy" in str(w.message)])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=copied.parent)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Triton is not installed") == 1


# --- wrong input ------------------------------------------------------------------------------------------------------

H, W, Y = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ((H, W.T, Y), ValueError, r"\(4, 3\) and weight \(3, 5\)"),
        ((H, W[:0], Y), ValueError, "V above 0"),
        ((H, W, Y[:3]), ValueError, "Shift them first"),
        ((H, W, Y.float()), TypeError, "expected integers"),
        ((H.long(), W, Y), TypeError, "bf16, fp16"),
        ((H, W.double(), Y), TypeError, "one dtype"),
        ((H, W.to("meta"), Y), ValueError, "one device"),
        ((H, W.tolist(), Y), TypeError, "expected a tensor"),
    ],
)
def test_wrong_input_is_said(tensors, kind, message):
    with pytest.raises(kind, match=message):
        linear_cross_entropy(*tensors)


def test_wrong_temperature_is_said():
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_log_probs(H, W, Y, temperature=0)


# --- peers ------------------------------------------------------------------------------------------------------------


def test_reference_is_torchs_cross_entropy():
    head = Head(torch.float64)
    logits = head.tensors[0] @ head.tensors[1].T
    ours = linear_cross_entropy_reference(*head.tensors, head.labels)
    torch.testing.assert_close(ours, torch_cross_entropy(logits, head.labels))


def test_equals_trls_chunked_log_probs(path):
    from trl.kernels import ChunkedLogProbFunction

    head = Head(ignored=0)
    upstream = torch.linspace(-1, 1, TOKENS, device=DEVICE)
    ours, theirs = head.leaves(), head.leaves()
    figures = linear_token_figures(*ours, head.labels, temperature=0.7)
    (figures.log_probs * upstream).sum().backward()
    expected = ChunkedLogProbFunction.apply(*theirs, None, head.labels, 0.7, 40, None)
    (expected[0] * upstream).sum().backward()
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    for name, value in zip(names, expected):
        torch.testing.assert_close(getattr(figures, name), value, rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours, theirs):
        assert error(mine.grad, other.grad) < 3e-6


def test_equals_ligers_fused_linear_cross_entropy(path):
    liger = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    head = Head()
    ours, theirs = head.leaves(), head.leaves()
    loss = linear_cross_entropy(*ours, head.labels)
    loss.backward()
    expected = liger.LigerFusedLinearCrossEntropyFunction.apply(*theirs, head.labels)[0]
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for mine, other in zip(ours, theirs):
        assert error(mine.grad, other.grad) < 1e-5


# --- models -----------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(kind: str, tiny_model, **overrides) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "jai":
        return tiny_model(**overrides)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, **overrides)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, **overrides)).eval()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("kind", ["jai", "mixtral", "llama"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 9}, {"output_router_logits": True}], ids=str)
def test_model_loss_and_gradients_are_the_models_own(tiny_model, kind, options):
    if kind == "llama" and "output_router_logits" in options:
        pytest.skip("no router")
    model = build(kind, tiny_model)
    native = model(**batch(), **options)
    native.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert use_linear_cross_entropy(model) is model
    ours = model(**batch(), **options)
    ours.loss.backward()
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, native.loss)
    if "output_router_logits" in options:
        torch.testing.assert_close(ours.aux_loss, native.aux_loss)
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, gradients[name]) < 2e-5, name


def test_model_without_labels_is_as_it_was(tiny_model):
    model = build("jai", tiny_model)
    inputs = batch()
    labels = inputs.pop("labels")
    expected, generated = model(**inputs).logits, model.generate(inputs["input_ids"], max_new_tokens=3)
    use_linear_cross_entropy(model)
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=3), generated)
    as_tuple = model(inputs["input_ids"], inputs["attention_mask"], labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], model(**inputs, labels=labels).loss)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, as_tuple[0])


def test_copy_of_a_model_uses_its_own_weights(tiny_model):
    model = use_linear_cross_entropy(build("jai", tiny_model))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert other(**batch()).loss.item() == pytest.approx(math.log(99), rel=1e-5)
    assert other(batch()["input_ids"]).logits.abs().max() == 0
    assert model(**batch()).loss.item() != pytest.approx(math.log(99), rel=1e-3)


def test_models_that_it_cannot_serve_are_refused(tiny_model):
    from peft import LoraConfig, get_peft_model

    for name in ("logit_scale", "final_logit_softcapping"):
        model = build("llama", tiny_model)
        setattr(model.config, name, 0.5)
        with pytest.raises(ValueError, match=f"changes its logits \\({name} in its config\\)"):
            use_linear_cross_entropy(model)
    model = build("llama", tiny_model)
    model.lm_head = torch.nn.Linear(32, 99)
    with pytest.raises(ValueError, match="has a bias"):
        use_linear_cross_entropy(model)
    with pytest.raises(ValueError, match="LoRA on the head"):
        use_linear_cross_entropy(
            get_peft_model(build("llama", tiny_model), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
        )
    model = use_linear_cross_entropy(build("llama", tiny_model))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:50].detach())
    with pytest.raises(ValueError, match="split over devices"):
        model(**batch())


def test_adapters_elsewhere_are_served(tiny_model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("jai", tiny_model), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    expected = model(**batch()).loss
    use_linear_cross_entropy(model)
    result = model(**batch())
    assert result.logits is None
    torch.testing.assert_close(result.loss, expected)
    result.loss.backward()
    assert model.get_base_model().lm_head.weight.grad is None


# --- TRL --------------------------------------------------------------------------------------------------------------

LOGGED = (
    "loss",
    "grad_norm",
    "entropy",
    "mean_token_accuracy",
    "aux_loss",
    "eval_loss",
    "logits/chosen",
    "rewards/margins",
)


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": DEVICE == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def logs(trainer) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k in LOGGED} for row in trainer.state.log_history]


def test_sft_logs_what_trls_own_head_logs(tiny_model, tiny_tokenizer, sentences, quiet, monkeypatch):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"prompt": s[:12], "completion": s[12:40]} for s in sentences])
    args = SFTConfig(**quiet, loss_type="nll", max_length=32, gradient_accumulation_steps=2)
    runs, calls = [], []
    original = module.forward_op
    for ours in (False, True):
        model = tiny_model(vocab_size=len(tiny_tokenizer), output_router_logits=True)
        trainer = SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer)
        if ours:
            use_plain(monkeypatch)  # the interpreter takes six seconds
            use_linear_cross_entropy(trainer.model)
            monkeypatch.setattr(module, "forward_op", lambda *args: calls.append(args) or original(*args))
            monkeypatch.setattr(module, "log_prob_gradients_op", None)  # all gradients come from the forward pass
        trainer.train()
        trainer.evaluate()
        runs.append(logs(trainer))
    assert len(calls) >= 6
    assert len(runs[0]) == len(runs[1]) > 3
    assert {"loss", "grad_norm", "entropy", "mean_token_accuracy", "aux_loss"} <= runs[0][0].keys()
    for theirs, mine in zip(*runs):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-6)


def test_dpo_logs_what_trls_own_head_logs(tiny_model, tiny_tokenizer, sentences, quiet, monkeypatch):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([{"prompt": s[:12], "chosen": s[12:30], "rejected": s[30:50] + "a"} for s in sentences])
    args = DPOConfig(**quiet, max_length=32, beta=0.5)
    runs = []
    for ours in (False, True):
        models = [tiny_model(vocab_size=len(tiny_tokenizer)) for _ in range(2)]
        trainer = DPOTrainer(models[0], models[1], args, train_dataset=data, processing_class=tiny_tokenizer)
        if ours:
            use_plain(monkeypatch)
            use_linear_cross_entropy(trainer.model, expect_equal_weights=False)
            use_linear_cross_entropy(trainer.ref_model, expect_equal_weights=False)
        trainer.train()
        runs.append(logs(trainer))
    assert {"loss", "logits/chosen", "rewards/margins"} <= runs[0][0].keys()
    for theirs, mine in zip(*runs):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_a_trainers_temperature_must_be_given(tiny_model):
    from trl.trainer.utils import add_fused_lm_head

    model = build("llama", tiny_model)
    add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    with pytest.raises(ValueError, match=r"the trainer divides logits by 0\.5"):
        use_linear_cross_entropy(model)
    with torch.no_grad():
        expected = model(**batch(), fused_lm_head=True)
        mine = use_linear_cross_entropy(model, temperature=0.5)(**batch(), fused_lm_head=True)
    for name in ("loss", "log_probs", "entropy", "label_mask"):
        torch.testing.assert_close(getattr(mine, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_cuda_graph_can_hold_it():
    head = Head(torch.bfloat16, tokens=200)
    hidden, weight = head.leaves()
    static = head.labels.clone()

    def step():
        hidden.grad = weight.grad = None
        loss = linear_cross_entropy(hidden, weight, static)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    static.copy_(head.labels.roll(1))
    graph.replay()
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, head.labels.roll(1)))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_memory_is_measured_as_computed(monkeypatch):
    monkeypatch.undo()
    torch.use_deterministic_algorithms(False)
    hidden = torch.randn(16384, 5120, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    weight = (torch.randn(64000, 5120, dtype=torch.bfloat16, device=DEVICE) * 0.02).requires_grad_()
    labels = torch.randint(64000, (16384,), device=DEVICE)
    linear_cross_entropy(hidden[:4096], weight, labels[:4096])  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 1.61 * 2**30
