"""Saved adapters as files: whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft import LoraConfig, PeftModel, get_peft_model
from peft.checkpoint import load_peft_weights, model_card, read_adapter, write_adapter
from peft.config import read_config_file
from peft.errors import PeftWarning
from peft.folder import COMMITTED, STAGED, find, read_at_rest, replace_files


@pytest.fixture(scope="module", autouse=True)
def pickles_are_read():
    """With any torch; that one before 2.6 reads none unasked is tested in test_hostile_weights.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.pickles.safe_pickles", lambda: True)
        yield


CONFIG, WEIGHTS, PICKLE, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What a killed process has written is not lost with it, so that most tests need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(folder: os.PathLike, mark: int, safe_serialization: bool = True, size: int = 100) -> None:
    """An adapter whose configuration and weights, all of them, carry the same mark."""
    config = {"peft_type": "LORA", "r": mark, "padding": [mark] * size}
    tensors = {f"base_model.model.{i}.weight": torch.full((size, size), float(mark)) for i in range(3)}
    card = model_card(None, method="LORA") if mark % 2 else None
    write_adapter(folder, config, tensors, card=card, safe_serialization=safe_serialization)


def mark_of(folder: os.PathLike) -> int:
    """The mark of the adapter in `folder`, which must be all of one save."""
    config, tensors = read_adapter(folder, device="cpu")
    assert len(tensors) == 3
    assert {float(value) for tensor in tensors.values() for value in tensor.unique()} == {float(config["r"])}
    return config["r"]


def names(folder: os.PathLike) -> set[str]:
    return set(os.listdir(folder))


def in_child(job: Callable[[], None], wait: bool = True) -> int:
    """Runs `job` in a process of its own. Returns its exit status (0 if it ended well), or its id without waiting."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which are idle here
        child = os.fork()
    if child == 0:
        status = 1
        try:
            job()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if wait else child


# what is written and read


def test_a_save_is_two_files_and_a_card(tmp_path):
    save(tmp_path / "new" / "folder", 1)
    assert names(tmp_path / "new" / "folder") == {CONFIG, WEIGHTS, CARD}
    assert json.loads((tmp_path / "new" / "folder" / CONFIG).read_text())["r"] == 1
    with safe_open(tmp_path / "new" / "folder" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert mark_of(tmp_path / "new" / "folder") == 1


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]


@settings(max_examples=50, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text("abc._01", min_size=1, max_size=8),
        st.tuples(
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 4), max_size=3),
            st.sampled_from(["own", "transposed", "expanded", "sliced"]),
        ),
        max_size=5,
    ),
    safe=st.booleans(),
)
def test_tensors_come_back_as_they_were(tensors, safe):
    made = {}
    for name, (dtype, shape, view) in tensors.items():
        tensor = torch.randint(0, 2, shape).to(dtype)
        if view == "transposed":
            tensor = tensor.transpose(0, -1) if tensor.dim() > 1 else tensor
        elif view == "expanded":
            tensor = tensor.unsqueeze(0).expand(2, *shape)
        elif view == "sliced" and tensor.dim():
            tensor = tensor[1:]
        made[name] = tensor
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(folder, {"peft_type": "LORA"}, made, safe_serialization=safe)
        loaded = load_peft_weights(folder, device="cpu")
        assert loaded.keys() == made.keys()
        for name, tensor in made.items():
            assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
            assert loaded[name].float().equal(tensor.float())


@pytest.mark.parametrize("safe", [True, False])
def test_tensors_that_share_memory_are_all_written(tmp_path, safe):
    whole = torch.arange(40_000.0)
    shared = {
        "a": whole[:4].view(2, 2),
        "b": whole[:4].view(2, 2).T,
        "c": whole[2:6],
        "d": torch.nn.Parameter(whole[:1]),
    }
    write_adapter(tmp_path, {"peft_type": "LORA"}, shared, safe_serialization=safe)
    loaded = load_peft_weights(tmp_path, "cpu")
    assert {key: value.tolist() for key, value in loaded.items()} == {k: v.tolist() for k, v in shared.items()}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000, "the memory they are views of was written"


def test_what_cannot_be_saved_is_refused_before_anything_changes(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"meta device.*'w'"):
        write_adapter(tmp_path, {}, {"w": torch.empty(2, device="meta")})
    with pytest.raises(TypeError, match="'w' is a str"):
        write_adapter(tmp_path, {}, {"w": "text"})
    with pytest.raises(ValueError, match="directory is needed"):
        write_adapter(tmp_path / CONFIG, {}, {})
    (tmp_path / "blocked" / CONFIG).mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=CONFIG):
        save(tmp_path / "blocked", 2)
    assert mark_of(tmp_path) == 1
    assert names(tmp_path / "blocked") == {CONFIG}


def test_loading_maps_the_file_and_survives_its_replacement(tmp_path):
    save(tmp_path, 1)
    weights = load_peft_weights(tmp_path, "cpu")
    save(tmp_path, 2)
    assert {float(v) for tensor in weights.values() for v in tensor.unique()} == {1.0}
    weights["base_model.model.0.weight"].fill_(5)
    assert mark_of(tmp_path) == 2


def test_missing_weights(tmp_path):
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=rf"no {WEIGHTS} and no {PICKLE} in that folder"):
        load_peft_weights(tmp_path)
    with pytest.raises(ValueError, match="subfolder 'sub'"):
        load_peft_weights(tmp_path, subfolder="sub")
    with pytest.raises(ValueError, match=CONFIG):
        read_adapter(tmp_path / "sub")
    with pytest.raises(TypeError, match="'sub_folder'"):
        load_peft_weights(tmp_path, sub_folder="sub")


def test_a_damaged_file_is_named(tmp_path):
    save(tmp_path, 1)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(SafetensorError, match=str(tmp_path / WEIGHTS)):
        load_peft_weights(tmp_path, "cpu")


def test_a_pickle_runs_no_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    for legacy in (False, True):
        torch.save({"w": Harm()}, tmp_path / PICKLE, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(pickle.UnpicklingError):
            load_peft_weights(tmp_path, "cpu")
        assert not (tmp_path / "harm").exists()
        torch.save({"w": torch.ones(2)}, tmp_path / PICKLE, _use_new_zipfile_serialization=not legacy)
        assert zipfile.is_zipfile(tmp_path / PICKLE) is not legacy
        assert load_peft_weights(tmp_path, "cpu")["w"].tolist() == [1, 1]


def test_key_mapping(tmp_path):
    kinds = {"base_model.model.old.lora_A.weight": torch.ones(1), "base_model.old.x": torch.zeros(1)}
    write_adapter(tmp_path, {"peft_type": "LORA"}, kinds)
    mapped = load_peft_weights(tmp_path, "cpu", {r"^old\.": "new.", "new": "never, the first match counts"})
    assert mapped.keys() == {"base_model.model.new.lora_A.weight", "base_model.new.x"}
    write_adapter(tmp_path, {}, {"base_model.a": torch.ones(1), "base_model.b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"two tensors the name 'base_model\.c'"):
        load_peft_weights(tmp_path, "cpu", {"[ab]": "c"})
    write_adapter(tmp_path, {}, {"elsewhere": torch.ones(1)})
    with pytest.raises(ValueError, match="'elsewhere'"):
        load_peft_weights(tmp_path, "cpu", {"a": "b"})


def test_the_weights_go_to_the_device(tmp_path):
    save(tmp_path, 1)
    for device in ("meta", torch.device("meta")):
        assert all(tensor.is_meta for tensor in load_peft_weights(tmp_path, device).values())
    kind = "cuda" if torch.cuda.is_available() else None
    if kind:
        assert {tensor.device.type for tensor in load_peft_weights(tmp_path).values()} == {"cuda"}


# one adapter after another in the same folder


def test_the_formats_replace_each_other(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2, safe_serialization=False)
    assert (names(tmp_path), mark_of(tmp_path)) == ({CONFIG, PICKLE, CARD}, 2)
    save(tmp_path, 3)
    assert (names(tmp_path), mark_of(tmp_path)) == ({CONFIG, WEIGHTS, CARD}, 3)


def test_safetensors_are_read_before_a_pickle(tmp_path):
    save(tmp_path, 1)
    (tmp_path / PICKLE).write_bytes(b"of another program")
    assert mark_of(tmp_path) == 1


def test_other_files_and_permissions_stay(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / WEIGHTS).chmod(0o600)
    save(tmp_path, 3)
    assert names(tmp_path) == {CONFIG, WEIGHTS, CARD, "tokenizer.json", "checkpoint-5"}
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes.pop(WEIGHTS) == 0o600
    assert modes[CONFIG] == modes[CARD] == modes["tokenizer.json"], "those of any new file"
    (tmp_path / WEIGHTS).unlink()
    save(tmp_path, 3)
    assert stat.S_IMODE((tmp_path / WEIGHTS).stat().st_mode) == modes["tokenizer.json"]


def test_what_a_link_points_to_is_not_written_over(tmp_path):
    save(tmp_path / "cache", 1)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG, WEIGHTS):
        (linked / name).symlink_to(tmp_path / "cache" / name)
    save(linked, 2)
    assert (mark_of(tmp_path / "cache"), mark_of(linked)) == (1, 2)


def test_a_file_system_that_cannot_rename_folders(tmp_path, monkeypatch):
    save(tmp_path, 1, safe_serialization=False)
    rename = os.rename

    def rename_files_only(old, new):
        if os.path.isdir(old):
            raise OSError(38, "Function not implemented")
        rename(old, new)

    monkeypatch.setattr(os, "rename", rename_files_only)
    with pytest.warns(PeftWarning, match="one after the other"):
        save(tmp_path, 2)
    assert (names(tmp_path), mark_of(tmp_path)) == ({CONFIG, WEIGHTS, CARD}, 2)


# processes that are killed, and disks that are full

STEPS = ("mkdir", "chmod", "rename", "replace", "unlink", "rmdir")


def die_at(step: int) -> None:
    """Lets this process die at once, with no clearing up, before its `step`th change of the file system."""
    count = 0

    def dying(call):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count > step:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapper

    for name in STEPS:
        setattr(os, name, dying(getattr(os, name)))


@needs_fork
@pytest.mark.parametrize(("first_safe", "second_safe"), [(True, True), (True, False), (False, True)])
def test_death_at_every_step_leaves_the_old_or_the_new(tmp_path, first_safe, second_safe):
    seen = []
    for step in range(1000):
        folder = tmp_path / str(step)
        save(folder, 1, first_safe, size=4)
        died = in_child(lambda: (die_at(step), save(folder, 2, second_safe, size=4))) == 9  # noqa: B023 - runs at once
        before = sorted(str(path) for path in folder.rglob("*"))
        seen.append(mark_of(folder))
        assert sorted(str(path) for path in folder.rglob("*")) == before, "a reader changes nothing"
        save(folder, 3, second_safe, size=4)
        assert names(folder) == {CONFIG, WEIGHTS if second_safe else PICKLE, CARD}, "the next save clears up"
        assert mark_of(folder) == 3
        if not died:
            break
    assert len(seen) > 10 and seen == sorted(seen) and set(seen) == {1, 2}, seen


def test_all_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    save(tmp_path, 1)
    synced, at_commit = set(), []
    rename = os.rename

    def commit(old, new):
        at_commit.extend(path.stat().st_ino for path in [Path(old), *Path(old).rglob("*")])
        assert synced.issuperset(at_commit)
        rename(old, new)
        synced.clear()

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", commit)
    save(tmp_path, 3)
    assert len(at_commit) == 6, "two folders, three files and the note that a pickle has to go"
    assert tmp_path.stat().st_ino in synced, "the commit itself"


@needs_fork
def test_processes_killed_while_saving(tmp_path):
    """40 times SIGKILL at a random moment of a loop of saves."""
    save(tmp_path, 1)
    seen, generator = [], random.Random(0)

    def save_for_ever(mark):
        while True:
            save(tmp_path, mark, safe_serialization=bool(generator.getrandbits(2)), size=150)
            mark = 5 - mark

    for turn in range(400):
        if turn >= 40 and {2, 3} <= set(seen):
            break
        child = in_child(lambda: save_for_ever(2 + turn % 2), wait=False)  # noqa: B023 - called before the next turn
        time.sleep(generator.uniform(0.002, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.append(mark_of(tmp_path))
    assert {2, 3} <= set(seen)
    save(tmp_path, 5)
    assert names(tmp_path) == {CONFIG, WEIGHTS, CARD}


@needs_fork
@pytest.mark.parametrize("safe", [True, False])
def test_a_limit_on_file_size_leaves_the_old_adapter(tmp_path, safe):
    resource = pytest.importorskip("resource")
    save(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def save_too_much():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(OSError):
            save(tmp_path, 2, safe)

    assert in_child(save_too_much) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("safe", [True, False])
def test_a_full_disk_leaves_the_old_adapter(tmp_path, safe):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        save(disk, 1)
        with pytest.raises(OSError):
            save(disk, 2, safe, size=200)
        with pytest.raises(OSError):
            write_adapter(disk, {"peft_type": "x" * 500_000}, {}, safe_serialization=safe)
        assert (names(disk), mark_of(disk)) == ({CONFIG, WEIGHTS, CARD}, 1)
        save(disk, 2, safe)
        assert mark_of(disk) == 2
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@needs_fork
def test_a_folder_that_may_only_be_read():
    """The files of a committed save are found where they are, if they cannot be moved."""

    def die_before_moving():
        os.replace = lambda *_: os._exit(9)
        save(folder, 2)

    def read_without_rights():
        if os.getuid() == 0:
            os.setuid(65534)
        assert not os.access(folder, os.W_OK)
        assert mark_of(folder) == 2

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, 1)
        assert in_child(die_before_moving) == 9
        assert {COMMITTED, CONFIG, WEIGHTS} <= names(folder)
        before = sorted(str(path) for path in folder.rglob("*"))
        folder.chmod(0o555)
        assert in_child(read_without_rights) == 0
        folder.chmod(0o755)
        assert sorted(str(path) for path in folder.rglob("*")) == before
        assert mark_of(folder) == 2
        save(folder, 4)
        assert COMMITTED not in names(folder)


@needs_fork
def test_a_model_is_loaded_from_what_was_committed(tmp_path):
    def model(r):
        return get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=r, target_modules=["0"]))

    def die_before_moving():
        os.replace = lambda *_: os._exit(9)
        model(3).save_pretrained(tmp_path)

    model(2).save_pretrained(tmp_path)
    assert in_child(die_before_moving) == 9
    loaded = PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path)
    assert loaded.peft_config["default"].r == 3
    assert loaded.base_model.model[0].lora_A["default"].weight.shape == (3, 4)
    assert names(tmp_path) == {CONFIG, WEIGHTS, CARD, COMMITTED}
    model(4).save_pretrained(tmp_path)
    assert names(tmp_path) == {CONFIG, WEIGHTS, CARD}


def test_a_config_alone_is_found_in_a_committed_save(tmp_path):
    (tmp_path / CONFIG).write_text('{"r": 1}')
    pending = tmp_path / COMMITTED / "0123456789ab"
    pending.mkdir(parents=True)
    (pending / CONFIG).write_text('{"r": 2}')
    assert read_config_file(tmp_path) == {"r": 2}


# several processes at once


@needs_fork
def test_readers_and_writers_at_the_same_time(tmp_path):
    """Three writers, of both formats, and a reader beside them: no reading is a mixture, nothing is lost."""
    save(tmp_path, 1, size=30)
    start, seen, stop = time.monotonic(), [], tmp_path / "stop"

    def keep_saving(mark):
        while not stop.exists():
            save(tmp_path, mark, safe_serialization=mark != 4, size=30)

    writers = [in_child(lambda mark=mark: keep_saving(mark), wait=False) for mark in (2, 4, 6)]
    try:
        while time.monotonic() < start + 1 or (not {2, 4, 6} <= set(seen) and time.monotonic() < start + 30):
            seen.append(mark_of(tmp_path))
            assert read_config_file(tmp_path)["peft_type"] == "LORA"
            assert len(load_peft_weights(tmp_path, "cpu")) == 3
    finally:
        stop.touch()
        ends = [os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) for writer in writers]
    stop.unlink()
    assert ends == [0, 0, 0]
    assert {2, 4, 6} <= set(seen)
    assert mark_of(tmp_path) in (2, 4, 6)
    save(tmp_path, 7)
    assert names(tmp_path) == {CONFIG, WEIGHTS, CARD}


def test_who_reads_slowly_is_given_the_time():
    """Files that are replaced faster than they are read: writers wait for the reader in the end."""
    with tempfile.TemporaryDirectory() as folder:
        stop = threading.Event()

        def keep_saving():
            for mark in itertools.count():
                if stop.is_set():
                    break
                replace_files(folder, {"first": b"%d" % mark, "second": b"%d" % mark})

        def read_slowly():
            first = Path(find(folder, "first")).read_text()
            time.sleep(0.1)
            return first, Path(find(folder, "second")).read_text()

        replace_files(folder, {"first": b"", "second": b""})
        writer = threading.Thread(target=keep_saving)
        writer.start()
        try:
            for _ in range(3):
                first, second = read_at_rest(folder, "first", read_slowly)
                assert first == second
        finally:
            stop.set()
            writer.join()


@pytest.mark.parametrize("looks", [1, 2, 3, 4])
def test_a_file_that_another_program_removes_as_soon_as_it_was_seen(tmp_path, monkeypatch, looks):
    """Permissions of the file that is there are taken over; that it is gone after the n-th look stops no save."""
    path, look, seen = tmp_path / "file", os.stat, []
    path.touch()

    def look_and_remove(looked_at, **options):
        found = look(looked_at, **options)
        if os.fspath(looked_at) == str(path):
            seen.append(looked_at)
            if len(seen) == looks:
                path.unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", look_and_remove)
        replace_files(tmp_path, {"file": b"new"})
    assert path.read_bytes() == b"new"


def test_what_another_process_is_writing_is_not_cleared_up(tmp_path):
    started, go_on = threading.Event(), threading.Event()

    def write_slowly(path):
        Path(path).write_text("slow")
        started.set()
        go_on.wait(10)

    slow = threading.Thread(target=replace_files, args=(tmp_path, {"file": write_slowly}))
    slow.start()
    started.wait(10)
    replace_files(tmp_path, {"file": b"fast"})
    assert any(name.startswith(STAGED) for name in names(tmp_path))
    assert Path(find(tmp_path, "file")).read_text() == "fast"
    go_on.set()
    slow.join()
    assert Path(find(tmp_path, "file")).read_text() == "slow"
    assert names(tmp_path) == {"file"}


# model cards


def card_data(text: str) -> dict:
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def test_a_new_card():
    text = model_card(
        None, method="LORA", base_model="facebook/opt-350m", task_type="CAUSAL_LM", tags=["transformers"],
        quantization={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )  # fmt: skip
    assert card_data(text) == {
        "library_name": "peft",
        "base_model": "facebook/opt-350m",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:facebook/opt-350m", "lora", "transformers"],
    }
    assert "AutoPeftModelForCausalLM.from_pretrained" in text
    assert "`bitsandbytes` quantization config" in text and "- load_in_4bit: True" in text
    assert "### Framework versions\n\n- PEFT " in text


def test_a_card_is_brought_up_to_date_and_kept(tmp_path):
    (tmp_path / CARD).write_text(
        "---\nlicense: mit\ntags:\n- mine\n- base_model:adapter:old/base\nbase_model: old/base\n---\n\n# My adapter\n\n"
        "Words.\n\n### Framework versions\n\n- PEFT 0.3.0\n- Transformers 4.0\n\n## Thanks\n"
    )
    settings = {"method": "IA3", "base_model": "new/base", "quantization": {"load_in_8bit": True}}
    text = model_card(tmp_path, **settings)
    data = card_data(text)
    assert (data["license"], data["base_model"]) == ("mit", "new/base")
    assert data["tags"] == ["mine", "base_model:adapter:new/base"]
    assert "# My adapter\n\nWords." in text and "## Thanks" in text and "- Transformers 4.0" in text
    assert "0.3.0" not in text and text.count("- PEFT ") == 1
    (tmp_path / CARD).write_text(text)
    assert model_card(tmp_path, **settings) == text, "a second save changes nothing"


def test_a_local_base_model_is_no_id_of_the_hub(tmp_path, monkeypatch):
    for name in ("/data/my model", str(tmp_path)):
        data = card_data(text := model_card(None, method="LORA", base_model=name))
        assert "base_model" not in data and data["tags"] == ["lora"]
        assert f"`{name}`" in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert "base_model" not in card_data(model_card(None, method="LORA", base_model="org/model"))


def test_a_card_that_cannot_be_read_is_left_alone(tmp_path):
    broken = "---\ntags: [unclosed\n---\n# Precious text\n"
    (tmp_path / CARD).write_text(broken)
    with pytest.warns(PeftWarning, match="left as it is"):
        assert model_card(tmp_path, method="LORA") == broken


def test_weights_written_by_another_program(tmp_path):
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.w": torch.ones(2)}, tmp_path / WEIGHTS)
    assert read_adapter(tmp_path, device="cpu")[1]["base_model.model.w"].tolist() == [1, 1]
