# SPDX-License-Identifier: Apache-2.0
"""The Space: what it records while the model generates, the HTML of it, and the page in a real browser."""

import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from huggingface_hub import metadata_load

SPACE = Path(__file__).parents[1] / "hub_card" / "space"
CHAT = [{"role": "user", "content": "ประเทศไทย and the river"}]


@pytest.fixture(scope="module")
def space() -> Iterator[tuple[ModuleType, ModuleType]]:
    """The modules `routing` and `page`, imported as in a Space, where they lie beside app.py."""
    sys.path.insert(0, str(SPACE))
    try:
        yield importlib.import_module("routing"), importlib.import_module("page")
    finally:
        sys.path.remove(str(SPACE))
        for name in ("routing", "page"):
            sys.modules.pop(name, None)


@pytest.fixture
def routing(space) -> ModuleType:
    return space[0]


@pytest.fixture
def page(space) -> ModuleType:
    return space[1]


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer):
    return tiny_model(
        vocab_size=len(tiny_tokenizer), eos_token_id=tiny_tokenizer.eos_token_id, max_position_embeddings=512
    )


def last(replies: Iterator[list]) -> list:
    return list(replies)[-1]


def hooks_of(routing: ModuleType, model) -> int:
    """Hooks on the routers, of which transformers may have some of its own."""
    return sum(len(gate._forward_hooks) for gate in routing.routers(model))


# What is recorded


def test_the_choices_are_the_models_own(routing, model, tiny_tokenizer):
    """The trace of a reply, against one forward pass over the whole of it."""
    states = list(routing.reply(model, tiny_tokenizer, CHAT, max_new_tokens=12, temperature=0))
    tokens = states[-1]
    ids = torch.tensor([[token.id for token in tokens]])
    with torch.no_grad():
        router_logits = model(ids, output_router_logits=True, use_cache=False).router_logits
    assert len(router_logits) == model.config.num_hidden_layers
    for position, token in enumerate(tokens[:-1]):
        assert len(token.choices) == len(router_logits)
        for layer, choice in enumerate(token.choices):
            weights, experts = router_logits[layer][position].softmax(-1).topk(2)
            assert choice.experts == tuple(experts.tolist())
            assert choice.weights == pytest.approx((weights / weights.sum()).tolist(), abs=1e-5)
    assert tokens[-1].choices == ()  # the last token never runs
    load = routing.load_by_expert(tokens, 4)
    assert sum(load) == pytest.approx(1)
    chosen = torch.cat([logits[:-1].topk(2).indices.flatten() for logits in router_logits])
    assert load == pytest.approx((torch.bincount(chosen, minlength=4) / len(chosen)).tolist())

    prompt = tiny_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert [token.id for token in tokens if not token.made] == prompt
    # Token by token: each state has one more, and all but its newest have run.
    assert [len(state) for state in states] == [len(prompt) + 1 + n for n in range(len(states))]
    assert all([bool(token.choices) for token in state] == [True] * (len(state) - 1) + [False] for state in states)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
    assert ids[0].tolist() == expected[: ids.shape[1]]
    specials = {token.piece for token in tokens if token.special}
    assert {"<|user|>", "<|end|>", "<|assistant|>"} <= specials


def test_a_reply_that_nobody_reads_stops_the_model(routing, model, tiny_tokenizer):
    hooks = hooks_of(routing, model)
    replies = routing.reply(model, tiny_tokenizer, CHAT, max_new_tokens=400, temperature=0)
    next(replies)
    assert hooks_of(routing, model) == hooks + model.config.num_hidden_layers
    before = threading.active_count()
    replies.close()
    assert threading.active_count() == before - 1
    assert hooks_of(routing, model) == hooks
    assert last(routing.reply(model, tiny_tokenizer, CHAT, max_new_tokens=3, temperature=0))


def test_two_replies_at_once_are_not_mixed(routing, model, tiny_tokenizer):
    chats = [CHAT, [{"role": "user", "content": "The quick brown fox jumps over the lazy dog"}]]
    alone = [last(routing.reply(model, tiny_tokenizer, chat, max_new_tokens=10, temperature=0)) for chat in chats]
    together = [routing.reply(model, tiny_tokenizer, chat, max_new_tokens=10, temperature=0) for chat in chats]
    found: list = [None, None]

    def read(which: int) -> None:
        found[which] = last(together[which])

    threads = [threading.Thread(target=read, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == alone


def test_a_dense_model_has_no_choices(routing, page, tiny_model, tiny_tokenizer):
    dense = tiny_model(vocab_size=len(tiny_tokenizer), num_local_experts=1)
    tokens = last(routing.reply(dense, tiny_tokenizer, CHAT, max_new_tokens=3, temperature=0))
    assert len([token for token in tokens if token.made]) == 3
    assert not any(token.choices for token in tokens)
    assert "has no routers" in page.routing_html(tokens, 1)


def test_errors_of_the_model_reach_the_reader(routing, model, tiny_tokenizer):
    hooks = hooks_of(routing, model)
    with pytest.raises(ValueError, match=r"The chat has \d+ tokens, and 500 more do not fit .* context of 512"):
        next(routing.reply(model, tiny_tokenizer, CHAT, max_new_tokens=500))
    with pytest.raises(ValueError, match="temperature"):
        next(routing.reply(model, tiny_tokenizer, CHAT, max_new_tokens=3, temperature=-1.0))
    assert hooks_of(routing, model) == hooks


# The HTML


class Text(HTMLParser):
    """The text of each element of a kind."""

    def __init__(self, tag: str):
        super().__init__()
        self.tag, self.found, self.tags, self.inside = tag, [], set(), False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == self.tag:
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != self.tag

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


def texts(html: str, tag: str) -> list[str]:
    parser = Text(tag)
    parser.feed(html)
    assert parser.tags <= {"div", "h3", "h4", "p", "span", "table", "thead", "tbody", "tr", "th", "td", "i"}
    return parser.found


def test_the_html_shows_every_token_and_is_escaped(routing, page):
    choice = routing.Choice((3, 1), (0.75, 0.25))
    pieces = ["<|user|>", "▁is", "ุ", "<0xE0>", "<0x0A>", "<script>", '"&amp;']
    choices = (choice, routing.Choice((0, 2), (1.0, 0.0)))
    tokens = [
        routing.Token(number, piece, special=number == 0, made=number > 4, choices=choices)
        for number, piece in enumerate(pieces)
    ]
    spelt = ["<|user|>", "␣is", "◌ุ", "E0", "↵", "<script>", '"&amp;']
    split = page.split_html(tokens)
    assert texts(split, "span") == spelt
    assert texts(split, "h4") == ["What the model read: 5 tokens", "What it wrote: 2 tokens"]
    table = page.routing_html(tokens, 4)
    assert texts(table, "th") == ["layer", "0", "1", *reversed(spelt)]
    assert texts(table, "td") == ["31", "02"] * len(tokens)
    assert texts(table, "span") == ["expert 0: 25 %", "expert 1: 25 %", "expert 2: 25 %", "expert 3: 25 %"]
    assert 'class="e3" title="75 %"' in table
    for html in (page.split_html([]), page.routing_html([], 4)):
        assert texts(html, "h3")
        assert not texts(html, "span")


# The Space


def test_the_hub_understands_the_spaces_files():
    data = metadata_load(SPACE / "README.md")
    assert data["sdk"] == "gradio"
    assert (SPACE / data["app_file"]).is_file()
    assert data["license"] == "apache-2.0"
    assert len(data["short_description"]) <= 60  # the Hub takes no more
    requirements = (SPACE / "requirements.txt").read_text().split()
    imported = {
        name
        for path in SPACE.glob("*.py")
        for name in re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    }
    here = {path.stem for path in SPACE.glob("*.py")}
    third_party = imported - here - set(sys.stdlib_module_names)
    # It must run where this package is not; gradio comes with the Space's sdk.
    assert third_party - {"gradio"} <= {re.match(r"\w+", line)[0] for line in requirements}
    assert "jai" not in third_party


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("space") / "tiny-jai"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def environment(tmp_path: Path, **values: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "JAI_", "GRADIO_"))}
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    return kept | offline | values


def test_nothing_is_trusted_unless_it_is_said(checkpoint, tmp_path):
    pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[space]'")
    command, settings = [sys.executable, SPACE / "app.py"], environment(tmp_path, JAI_MODEL=str(checkpoint))
    run = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert re.search("custom code .*JAI_TRUST_REMOTE_CODE=1", run.stderr, re.DOTALL), run.stderr
    assert "Traceback" not in run.stderr
    assert not list((tmp_path / "home").rglob("modeling_jai.py"))


@pytest.fixture
def chromium() -> str:
    for name in ("playwright.sync_api", "gradio"):
        pytest.importorskip(name, reason=f"needs {name.split('.')[0]}: pip install -e '.[space]'")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    return path


@pytest.fixture
def address(chromium, checkpoint, tmp_path) -> Iterator[str]:
    """The app, in a process of its own, where it has to load the checkpoint's own code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"JAI_MODEL": str(checkpoint), "JAI_TRUST_REMOTE_CODE": "1", "GRADIO_SERVER_PORT": str(port)}
    command, settings = [sys.executable, SPACE / "app.py"], environment(tmp_path, **values)
    with open(tmp_path / "log", "w") as log:
        app = subprocess.Popen(command, env=settings, stdout=log, stderr=log, cwd=tmp_path)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert app.poll() is None, (tmp_path / "log").read_text()
            try:
                urlopen(address, timeout=5).close()
                break
            except URLError:
                time.sleep(0.5)
        yield address
    finally:
        app.terminate()
        app.wait(30)


def test_the_page_in_a_browser(chromium, address, tiny_tokenizer, model):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        box = tab.get_by_placeholder("Ask in Thai or English")

        def ask(question: str) -> list[str]:
            """Ask in a new chat; the boxes of the tokens that the model read."""
            box.fill(question)
            box.press("Enter")
            tab.get_by_text("What it wrote").wait_for()
            return tab.locator(".tokens").first.locator("span").all_inner_texts()

        question = "ประเทศไทย and the river"
        ids = tiny_tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        read = ask(question)
        assert len(read) == len(ids["input_ids"])
        assert "<|user|>" in read
        row = tab.locator(".trace tbody tr").last  # the first token of the prompt
        assert row.locator("th").inner_text() == read[0]
        assert row.locator("td").count() == model.config.num_hidden_layers
        assert re.fullmatch(r"[0-3]\s*[0-3]", row.locator("td").first.inner_text())

        tab.get_by_role("button", name="New chat").click()
        tab.get_by_text("Ask something").wait_for()
        evil = """<img src=x onerror="document.title='owned'"><b>b</b> ${document.title='owned'}"""
        ask(evil)
        assert tab.get_by_test_id("user").first.inner_text().strip() == evil
        assert tab.locator("img[src=x]").count() == 0
        assert tab.title() == "Chat with tiny-jai"
        assert errors == []
        browser.close()
