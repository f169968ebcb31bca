# SPDX-License-Identifier: Apache-2.0
"""What conversion promises about its output folder: every byte has a source, and the folder is whole or not there."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3ForCausalLM

from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.convert.plan import plan_conversion
from jai.conversion.inputs.header import read_header
from jai.conversion.inputs.parts import Computed, Copied
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.merge.command import merge
from jai.conversion.merge.options import MergeOptions
from jai.conversion.output import shard_file
from jai.conversion.output import shards as writing
from jai.conversion.upcycle.command import upcycle
from jai.conversion.upcycle.options import UpcycleOptions
from jai.errors import UserError
from jai.files import UnfinishedFolder, resumable_folder, work_folder

PLAN = {"block_size": 2, "block_repeats": [1, 3, 2], "duplicate_init": "copy"}
SHARD = 150_000  # bytes: some ten shards


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_phi3):
    folder = tiny_phi3(tmp_path_factory.mktemp("base") / "phi3")
    Phi3ForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="120KB")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def changing_base(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "base"))


def options(base: Path, out: Path, **changes) -> ConvertOptions:
    plan = {} if {"method", "layers"} & changes.keys() else PLAN
    experts = {} if changes.get("experts") == 1 else {"expert_init": "noise"}
    return ConvertOptions(**({"base": str(base), "out": out, "max_shard_size": SHARD} | experts | plan | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Killed(BaseException):
    """What stops a run in this process, as SIGKILL would in another."""


@pytest.fixture
def stop_after(monkeypatch):
    """Let a run stop once it has finished so many shards."""

    def install(shards: int, then=None) -> None:
        finish = UnfinishedFolder.finish

        def finish_some(job: UnfinishedFolder, name: str) -> None:
            finish(job, name)
            if len(job.finished) == shards:
                if then is None:
                    raise Killed
                then()

        monkeypatch.setattr(UnfinishedFolder, "finish", finish_some)

    return install


class TestEveryByte:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"expert_init": "copy"},
            {"expert_init": "random"},
            {"experts": 1},
            {"dtype": "bfloat16"},
            {"duplicate_init": "identity"},
            {"method": "dus-v1", "k": 4},
            {"layers": [5, 0, 0, 3]},
        ],
        ids=str,
    )
    def test_has_one_source_or_formula(self, base, tmp_path, changes):
        asked = options(base, tmp_path / "jai", **changes)
        plan = plan_conversion(asked)
        convert(asked)
        planned = {tensor.name: tensor for tensor in plan.tensors}
        found = set()
        for path in sorted((tmp_path / "jai").glob("*.safetensors")):
            header, data = read_header(path), path.read_bytes()
            end = 0
            for name, entry in sorted(header.tensors.items(), key=lambda item: item[1]["data_offsets"]):
                start, stop = entry["data_offsets"]
                assert start == end, "a gap, or bytes that two tensors share"
                end = stop
                assert name not in found
                found.add(name)
                at = header.data_start + start
                for part in planned[name].parts:
                    assert data[at : at + part.length] == self.expected(part, planned[name].dtype)
                    at += part.length
                assert at == header.data_start + stop
            assert header.data_start + end == len(data)
        assert found == planned.keys()

    def expected(self, part: Copied | Computed, dtype: torch.dtype) -> bytes:
        if isinstance(part, Copied):
            return part.files.path(part.file).read_bytes()[part.start : part.start + part.length]
        assert part.formula
        return b"".join(bytes(chunk.to(dtype).contiguous().view(torch.uint8).numpy().data) for chunk in part.make())

    def test_is_copied_where_it_is_not_new(self, base, tmp_path):
        computed = {
            tensor.name
            for tensor in plan_conversion(options(base, tmp_path / "jai")).tensors
            if any(isinstance(part, Computed) for part in tensor.parts)
        }
        assert {name.split(".", 3)[-1] for name in computed} == {
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
            "mlp.gate.weight",
            "skip_alpha",
        }

    def test_verify_reads_them_all_and_finds_a_changed_one(self, base, tmp_path, capsys, monkeypatch):
        convert(options(base, tmp_path / "jai", verify=True))
        plan = plan_conversion(options(base, tmp_path / "jai"))
        assert f"{plan.bytes:,} bytes are what their sources give" in " ".join(capsys.readouterr().out.split())

        finish = UnfinishedFolder.finish

        def flip(job: UnfinishedFolder, name: str) -> None:
            data = bytearray((job.folder / name).read_bytes())
            data[-1] ^= 1
            (job.folder / name).write_bytes(data)
            finish(job, name)

        monkeypatch.setattr(UnfinishedFolder, "finish", flip)
        with pytest.raises(UserError, match=r"model\.layers.* is not what its source gives"):
            convert(options(base, tmp_path / "bad", verify=True))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["jai"]

    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize("way", ["past the cache", "refused when written", "in the kernel", "through a buffer"])
    def test_is_the_same_however_it_was_written(self, base, tmp_path, monkeypatch, workers, way):
        convert(options(base, tmp_path / "one"))
        write = os.write
        monkeypatch.setattr(shard_file, "_BUFFER_BYTES", 1 << 14)

        def refuse_unless_whole(descriptor: int, data) -> int:
            """As file systems without direct writes, or with larger blocks."""
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return write(descriptor, data)

        def refuse(*_) -> int:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        if way == "refused when written":
            monkeypatch.setattr(os, "write", refuse_unless_whole)
        elif way != "past the cache":
            monkeypatch.setattr(shard_file, "_O_DIRECT", 0)
        if way == "through a buffer":
            monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
        convert(options(base, tmp_path / "other", workers=workers))
        assert contents(tmp_path / "one") == contents(tmp_path / "other")


class TestPlainPlans:
    @pytest.mark.parametrize(
        ("changes", "origins"),
        [
            ({"method": "dus-v1", "k": 4}, [0, 1, 2, 3, 2, 3, 4, 5]),
            ({"layers": [5, 0, 0, 3]}, [5, 0, 0, 3]),
        ],
        ids=str,
    )
    def test_computes_what_phi3_with_these_layers_computes(self, base, tmp_path, changes, origins):
        convert(options(base, tmp_path / "jai", experts=1, **changes))
        jai = AutoModelForCausalLM.from_pretrained(tmp_path / "jai").eval()
        phi3 = Phi3ForCausalLM.from_pretrained(base)
        state = phi3.state_dict()
        layers = {}
        for name, value in state.items():
            if ".layers." not in name:
                layers[name] = value
        for layer, origin in enumerate(origins):
            prefix = f"model.layers.{origin}."
            layers |= {
                f"model.layers.{layer}.{name.removeprefix(prefix)}": value
                for name, value in state.items()
                if name.startswith(prefix)
            }
        phi3.config.num_hidden_layers = len(origins)
        stacked = Phi3ForCausalLM(phi3.config).eval()
        stacked.load_state_dict(layers)
        ids = torch.arange(3, 40).unsqueeze(0)
        torch.testing.assert_close(jai(ids).logits, stacked(ids).logits)
        assert not any("skip_alpha" in name for name in jai.state_dict())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"method": "dus-v1"}, "dus-v1 needs k"),
            ({"k": 4}, "only dus-v1 has it"),
            ({"method": "dus-v1", "k": 2}, "for 6 layers it must be from 3 to 6"),
            ({"method": "dus-v1", "k": 7}, "for 6 layers it must be from 3 to 6"),
            ({"method": "dus-v1", "k": 4, "layers": [0]}, "two plans"),
            ({"layers": [0, 6]}, "layers names 6, but the base has layers 0 to 5"),
            ({"layers": []}, "layers is empty"),
            ({"layers": [0], "skip_alpha": 0.5}, "no skip alphas"),
            ({"max_shard_size": "5 apples"}, "expected a size, such as 500MB"),
            ({"workers": 0}, "workers is 0"),
        ],
        ids=str,
    )
    def test_misfits_are_refused(self, base, tmp_path, changes, message):
        with pytest.raises(UserError, match=message):
            convert(options(base, tmp_path / "jai", **changes))
        assert list(tmp_path.iterdir()) == []


class TestResume:
    def test_goes_on_with_the_shards_that_are_finished(self, base, tmp_path, stop_after, monkeypatch, capsys):
        convert(options(base, tmp_path / "whole"))
        stop_after(3)
        with pytest.raises(Killed):
            convert(options(base, tmp_path / "jai"))
        monkeypatch.undo()
        assert not (tmp_path / "jai").exists()
        kept = sorted(work_folder(tmp_path / "jai").glob("files/model-*"))
        times = {path.name: path.stat().st_mtime_ns for path in kept[:3]}
        capsys.readouterr()
        convert(options(base, tmp_path / "jai"))
        assert "Going on: 3 of" in capsys.readouterr().out
        assert {name: (tmp_path / "jai" / name).stat().st_mtime_ns for name in times} == times
        assert contents(tmp_path / "jai") == contents(tmp_path / "whole")
        assert not work_folder(tmp_path / "jai").exists()

    @pytest.mark.parametrize(
        ("changes", "difference"),
        [
            ({"seed": 1}, "options seed was 0 and is 1"),
            ({"expert_init": "copy"}, 'options expert_init was "noise" and is "copy"'),
            ({"max_shard_size": 2 * SHARD}, f"options max_shard_size was {SHARD} and is {2 * SHARD}"),
        ],
        ids=str,
    )
    def test_other_options_are_refused_and_lose_nothing(
        self, base, tmp_path, stop_after, monkeypatch, changes, difference
    ):
        stop_after(3)
        with pytest.raises(Killed):
            convert(options(base, tmp_path / "jai"))
        monkeypatch.undo()
        before = contents(work_folder(tmp_path / "jai") / "files")
        with pytest.raises(UserError, match=f"begun with other inputs or options: {difference}"):
            convert(options(base, tmp_path / "jai", **changes))
        assert contents(work_folder(tmp_path / "jai") / "files") == before
        convert(options(base, tmp_path / "jai"))

    @pytest.mark.parametrize(
        "change",
        [
            lambda path: os.truncate(path, path.stat().st_size - 1),
            lambda path: path.write_bytes(path.read_bytes() + b"x"),
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
            lambda path: path.unlink(),
            lambda path: (path.unlink(), path.mkdir(), (path / "file").touch()),
            lambda path: (path.rename(path.parent.parent / "elsewhere"), path.symlink_to("../elsewhere")),
        ],
        ids=["shortened", "lengthened", "altered", "removed", "a folder", "a link"],
    )
    def test_a_finished_shard_that_changed_is_made_again(self, base, tmp_path, stop_after, monkeypatch, capsys, change):
        convert(options(base, tmp_path / "whole"))
        stop_after(3)
        with pytest.raises(Killed):
            convert(options(base, tmp_path / "jai"))
        monkeypatch.undo()
        change(sorted(work_folder(tmp_path / "jai").glob("files/model-*"))[1])
        capsys.readouterr()
        convert(options(base, tmp_path / "jai"))
        assert "Going on: 2 of" in capsys.readouterr().out
        assert contents(tmp_path / "jai") == contents(tmp_path / "whole")

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"identity": {}, "finished": [1]}'])
    def test_a_damaged_journal_says_what_to_remove(self, base, tmp_path, content):
        work = work_folder(tmp_path / "jai")
        work.mkdir()
        (work / "journal.json").write_text(content)
        with pytest.raises(UserError, match=f"journal.json .*Remove {work} to start again"):
            convert(options(base, tmp_path / "jai"))
        assert (work / "journal.json").read_text() == content

    def test_another_base_is_refused(self, changing_base, tmp_path, stop_after, monkeypatch):
        stop_after(3)
        with pytest.raises(Killed):
            convert(options(changing_base, tmp_path / "jai"))
        monkeypatch.undo()
        shard = sorted(changing_base.glob("*.safetensors"))[0]
        os.utime(shard, ns=(1, 1))
        with pytest.raises(UserError, match=rf"base {shard.name} was .* and is "):
            convert(options(changing_base, tmp_path / "jai"))


class TestTrouble:
    def test_a_source_cut_short_meanwhile(self, changing_base, tmp_path, stop_after):
        last = sorted(changing_base.glob("*.safetensors"))[-1]
        stop_after(1, then=lambda: os.truncate(last, last.stat().st_size // 2))
        with pytest.raises(UserError, match=r"is shorter than it was|changed while it was read"):
            convert(options(changing_base, tmp_path / "jai"))
        assert not (tmp_path / "jai").exists()

    def test_a_source_altered_meanwhile(self, changing_base, tmp_path, stop_after, monkeypatch):
        def alter() -> None:
            for path in changing_base.glob("*.safetensors"):
                path.write_bytes(path.read_bytes()[:-1] + b"x")

        stop_after(1, then=alter)
        with pytest.raises(UserError, match="changed while it was read"):
            convert(options(changing_base, tmp_path / "jai"))
        assert not (tmp_path / "jai").exists()
        monkeypatch.undo()
        convert(options(changing_base, tmp_path / "jai"))  # as the error advises

    def test_too_little_room_is_said_first(self, base, tmp_path, monkeypatch):
        monkeypatch.setattr(writing.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"needs .* more, but its disk has 1.0 kB"):
            convert(options(base, tmp_path / "jai"))
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_fills_up(self, base, tmp_path, monkeypatch):
        disk = tmp_path / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        try:
            # Another process takes it meanwhile.
            monkeypatch.setattr(writing.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
            with pytest.raises(UserError, match="No space left on device"):
                convert(options(base, disk / "jai"))
            assert not (disk / "jai").exists()
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            convert(options(base, disk / "jai"))
            convert(options(base, tmp_path / "whole"))
            assert contents(disk / "jai") == contents(tmp_path / "whole")
        finally:
            subprocess.run(["umount", disk], check=True)

    def test_two_processes_on_one_output(self, base, tmp_path):
        with resumable_folder(tmp_path / "jai", {}):
            command = [sys.executable, "-m", "jai", "convert", str(base), str(tmp_path / "jai")]
            process = subprocess.run(
                [*command, "--block-size", "2", "--block-repeats", "1,3,2"],
                capture_output=True,
                text=True,
                cwd=tmp_path,
            )
            assert process.returncode == 1
            assert "Another process is making" in process.stderr
            (work_folder(tmp_path / "jai") / "files" / "mine").touch()
        assert [path.name for path in (tmp_path / "jai").iterdir()] == ["mine"]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda index: index["weight_map"].update({"model.ghost": "model-00001-of-00001.safetensors"}), "lacks"),
            (
                lambda index: index["weight_map"].update({"model.ghost": next(iter(index["weight_map"].values()))}),
                "ghost",
            ),
            (
                lambda index: index["weight_map"].update({"model.ghost": "../secret.safetensors"}),
                "not a file beside it",
            ),
            (lambda index: index["weight_map"].update({"model.ghost": "/etc/passwd"}), "not a file beside it"),
            (lambda index: index.pop("weight_map"), "is not an index of weights"),
        ],
    )
    def test_a_damaged_index(self, changing_base, tmp_path, damage, message):
        path = changing_base / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        damage(index)
        path.write_text(json.dumps(index))
        with pytest.raises(UserError, match=message):
            convert(options(changing_base, tmp_path / "jai"))

    @pytest.mark.parametrize(
        "start",
        [
            struct.pack("<Q", 2**63 - 1),
            struct.pack("<Q", 200_000_000),
            struct.pack("<Q", 8) + b'["a", 1]',
            struct.pack("<Q", 2) + b"{}",
            struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'.ljust(60),
            struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'.ljust(60) + b"0000",
            b"",
            b"1234567",
        ],
        ids=["absurd", "huge", "list", "longer", "negative", "shape", "empty", "short"],
    )
    def test_a_damaged_header(self, tmp_path, start):
        (tmp_path / "model.safetensors").write_bytes(start + (b"x" if start == struct.pack("<Q", 2) + b"{}" else b""))
        with pytest.raises(UserError, match=r"Fetch or save"):
            CheckpointReader(tmp_path)

    def test_an_output_that_cannot_be_written(self, base, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="Cannot write to"):
            convert(options(base, tmp_path / "file" / "jai"))

    def test_ctrl_c_says_how_to_go_on(self, base, tmp_path):
        script = (
            "import sys, time\n"
            "from jai.files import UnfinishedFolder\n"
            "from jai.cli import main\n"
            "finish = UnfinishedFolder.finish\n"
            "def slow(job, name):\n"
            "    finish(job, name)\n"
            "    time.sleep(0.3)\n"
            "UnfinishedFolder.finish = slow\n"
            "main()\n"
        )
        command = ["convert", str(base), str(tmp_path / "jai"), "--block-size", "2", "--block-repeats", "1,3,2"]
        process = subprocess.Popen(
            [sys.executable, "-c", script, *command, "--max-shard-size", str(SHARD)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            # A shell's background jobs ignore Ctrl-C, and so would their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 120
        journal = work_folder(tmp_path / "jai") / "journal.json"
        while not (journal.exists() and json.loads(journal.read_text())["finished"]):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
        kept = json.loads(journal.read_text())["finished"]
        assert re.search(rf"{len(kept)} finished files? stays? in {journal.parent}: the same command goes on", output)
        assert "Interrupted." in output
        assert "Nothing was kept" not in output
        assert "Traceback" not in output
        assert not (tmp_path / "jai").exists()


@pytest.fixture
def work(request, base, tmp_path) -> tuple[Callable, Any]:
    """A verb's function and its options, for the output `tmp_path / "jai"`."""
    if request.param == "convert":
        return convert, options(base, tmp_path / "jai", workers=2)
    dense = [tmp_path / "dense" / str(seed) for seed in range(3)]
    for seed, folder in enumerate(dense):
        convert(options(base, folder, experts=1, skip_alpha=0.1 * seed, dtype="bfloat16"))
    names = [str(folder) for folder in dense]
    shared = {"out": tmp_path / "jai", "max_shard_size": SHARD // 4, "workers": 2}
    if request.param == "upcycle":
        return upcycle, UpcycleOptions(dense=names[0], snapshots=names[1:], experts=4, **shared)
    return merge, MergeOptions(models=names, base=names[0], method="dare-ties", **shared)


@pytest.mark.parametrize("work", ["convert", "upcycle", "merge"], indirect=True)
def test_killed_at_random_moments(work, tmp_path, pytestconfig):
    """SIGKILL leaves no folder, or a whole one; what follows ends with the same bytes as a run that was left alone."""
    run, asked = work
    run(asked)
    whole = contents(tmp_path / "jai")
    shutil.rmtree(tmp_path / "jai")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run.__module__])
    draw = random.Random(0)
    kills = 50 if pytestconfig.getoption("--run-slow") else 12
    killed, longest = 0, 1.0
    while killed < kills:
        process = context.Process(target=run, args=(asked,))
        process.start()
        process.join(draw.uniform(0, longest))
        process.kill()
        process.join()
        # About as many runs are killed as come to their end.
        longest *= 0.9 if process.exitcode == 0 else 1.1
        killed += process.exitcode == -signal.SIGKILL
        if (tmp_path / "jai").exists():
            assert contents(tmp_path / "jai") == whole
            shutil.rmtree(tmp_path / "jai")
        elif draw.random() < 0.3:
            run(asked)
            assert contents(tmp_path / "jai") == whole
            shutil.rmtree(tmp_path / "jai")
