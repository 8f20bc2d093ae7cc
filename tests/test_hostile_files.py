"""Files that are damaged, or written to do harm: what they say is checked before it is believed, errors name them."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft
import tiny_models
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, patterns, pickles
from peft.checkpoint import load_peft_weights, read_adapter
from peft.errors import AdapterFileError, PeftWarning
from peft.folder import COMMITTED, STAGED, replace_files

CONFIG, WEIGHTS, PICKLE, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def lora(**fields) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["lin0", "lin1"], "r": 4, "init_lora_weights": False, **fields})


def saved(folder: Path, config: PeftConfig | None = None, model: torch.nn.Module | None = None, **options) -> Path:
    torch.manual_seed(1)
    get_peft_model(model or tiny_models.MLP(), config or lora()).save_pretrained(folder, **options)
    return folder


def change(folder: Path, **fields) -> None:
    """Writes fields into the configuration of a saved adapter."""
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **fields}))


def refused(folder: Path, *words: str, model: torch.nn.Module | None = None, error: type = AdapterFileError) -> str:
    """Loads what has to be refused at once, leaving the model as it was; the error names the folder and `words`."""
    model = model or tiny_models.MLP()
    before, start = tiny_models.state(model), time.process_time()
    with warnings.catch_warnings(), pytest.raises(error) as raised:
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(model, folder)
    assert time.process_time() - start < 2
    tiny_models.assert_same_state(model, before)
    for word in (str(folder), *words):
        assert word in str(raised.value), (word, str(raised.value))
    return str(raised.value)


def listing(folder: Path) -> dict[str, bytes | str | None]:
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


# ---- the fuzz, a short part of it


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are those of Linux")
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_harmless():
    from fuzz_files import run

    found = list(run(range(200)))
    assert [number for number, _ in found] == list(range(200))
    faults = [(number, result) for number, result in found if result["faults"]]
    assert faults == [], "tests/fuzz_files.py shows one: --start NUMBER --show 1"
    outcomes = {result["outcome"].split(":")[0] for _, result in found}
    assert {"loaded", "AdapterFileError", "WeightsFileError"} <= outcomes


# ---- what a configuration may say


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "not a mapping"),
        (b'{"peft_type": "L\xd6RA"}', "UTF-8"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "without end"),
        (b'{"auto_mapping": ' + b'{"a":' * 60 + b"1" + b"}" * 60 + b"}", "auto_mapping"),
        (b'{"peft_type": "LORA"}' + b" " * (16 << 20), "larger than 16 MiB"),
    ],
)
def test_json_that_is_none(tmp_path, text, words):
    (saved(tmp_path / "a") / CONFIG).write_bytes(text)
    refused(tmp_path / "a", CONFIG, words)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", None), ("r", "8"), ("r", 8.5), ("r", True), ("r", 10**30), ("r", 10**9), ("r", [8]),
        ("lora_alpha", math.nan), ("lora_alpha", math.inf), ("lora_dropout", 1.5), ("lora_dropout", -0.1),
        ("lora_dropout", None), ("target_modules", ["lin0", None]), ("target_modules", [["lin0"]]),
        ("target_modules", "("), ("target_modules", "a\x00b"), ("target_modules", ["\ud800"]),
        ("target_modules", [f"m{i}" for i in range(5000)]), ("exclude_modules", "["), ("modules_to_save", [None]),
        ("modules_to_save", "lin1"), ("modules_to_save", [""]), ("layers_to_transform", [[1]]),
        ("rank_pattern", {"lin(": 2}), ("rank_pattern", {"lin0": "2"}), ("rank_pattern", {"lin0": 10**9}),
        ("rank_pattern", {f"lin{i}": 2 for i in range(5000)}), ("alpha_pattern", {"lin0": math.nan}),
        ("bias", 5), ("use_dora", 1), ("eva_config", {"rho": "x"}), ("peft_type", 5),
        ("loftq_config", {"loftq_bits": 4, "loftq_iter": 10**9}), ("init_lora_weights", "pissa_niter_1000000000"),
        ("layer_replication", [[0, 10**9]]), ("megatron_core", "evil"), ("megatron_core", "megatron.evil"),
        ("exclude_modules", r"(\w+)\1*\1*x"), ("task_type", "X"),
    ],
)  # fmt: skip
def test_fields_that_hold_what_they_may_not(tmp_path, field, value):
    change(saved(tmp_path / "a"), **{field: value})
    shown = "init_lora_weights" if field == "init_lora_weights" else field
    refused(tmp_path / "a", CONFIG, {"loftq_config": "loftq_iter", "task_type": "task"}.get(field, shown))


def test_what_older_and_newer_files_say_is_read(tmp_path):
    folder = saved(tmp_path / "a")
    change(folder, rank_pattern=None, alpha_pattern={"lin1": 3.5}, layers_to_transform=[], layers_pattern="")
    change(folder, new_field=1, eva_config={"rho": 2.0, "new": 1}, init_lora_weights="eva")
    with pytest.warns(PeftWarning, match=r"no field 'new_field', 'eva_config.new'; ignored"):
        config = PeftConfig.from_pretrained(folder)
    assert (config.rank_pattern, config.layers_to_transform, config.layers_pattern) == ({}, None, None)
    assert config.eva_config.rho == 2.0
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    with pytest.warns(PeftWarning):
        assert PeftConfig.from_pretrained(folder).alpha_pattern == {"lin1": 3.5}


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)x", "(a?){40}a{40}", "(.*.*)*=", "((l|.)*)*in0x"]
)
def test_regular_expressions_take_no_time(tmp_path, field, pattern):
    class Deep(tiny_models.MLP):
        def __init__(self):
            super().__init__()
            self.add_module("a" * 60 + "b", torch.nn.ModuleList([torch.nn.Linear(2, 2)]))

    change(saved(tmp_path / "a"), **{field: {pattern: 4} if field == "rank_pattern" else pattern})
    if field == "layers_pattern":
        change(tmp_path / "a", layers_to_transform=[0], target_modules=["0"])
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if field in ("target_modules", "layers_pattern"):
            with pytest.raises(ValueError, match=r"not found|No module"):
                PeftModel.from_pretrained(Deep(), tmp_path / "a")
        else:
            PeftModel.from_pretrained(Deep(), tmp_path / "a")
    assert time.process_time() - start < 2


def test_names_match_as_re_has_it():
    """All ways at once and one after the other: the same answers, on random expressions."""
    rng = random.Random(0)
    atoms = ["a", "b", r"\.", "[ab]", r"\d", ".", "(a|b)", "(a|bb|)", "^", "$", r"\b", "[^a]", r"\w"]

    def expression(depth: int) -> str:
        if depth == 0:
            return rng.choice(atoms)
        inner = expression(depth - 1)
        forms = [inner + expression(depth - 1), f"({inner}|{expression(depth - 1)})", f"(?={inner})", f"(?!{inner})"]
        return rng.choice([*forms, f"(?:{inner})" + rng.choice(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?"])])

    matched = 0
    for _ in range(3000):
        pattern, text = expression(rng.randrange(1, 4)), "".join(rng.choices("ab.1", k=rng.randrange(7)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            expected = re.fullmatch(pattern, text) is not None
            machine = patterns._Machine(patterns._parsed(pattern))
        assert machine.fullmatch(text) == patterns.fullmatch(pattern, text) == expected, (pattern, text)
        matched += expected
    assert matched > 300


# ---- places and code


def with_tokenizer(folder: Path, canary: Path) -> None:
    """A folder whose tokenizer is a class in the folder itself, which leaves a trace when it is imported."""
    tiny_models.byte_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "evil.py").write_text(
        f"import os\nos.makedirs({str(canary)!r}, exist_ok=True)\n"
        "from transformers import PreTrainedTokenizerFast as Evil\n"
    )


@pytest.mark.parametrize("by_caller", [(), ("tokenizer_name_or_path",)])
def test_a_configuration_runs_no_code_of_its_folder(tmp_path, monkeypatch, by_caller):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "a"
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    saved(folder, config, tiny_models.llama(vocab_size=300))
    with_tokenizer(folder, tmp_path / "canary")
    change(
        folder,
        inference_mode=False,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="hello",
        tokenizer_name_or_path=str(folder),
        tokenizer_kwargs={"trust_remote_code": True},
    )
    read = PeftConfig.from_pretrained(folder, **dict.fromkeys(by_caller, str(folder)))
    with pytest.raises(ValueError, match=r"tokenizer_(kwargs|name_or_path)=.*a file may not say"):
        get_peft_model(tiny_models.llama(vocab_size=300), read)
    PeftModel.from_pretrained(tiny_models.llama(vocab_size=300), folder)  # starts from no text
    assert not (tmp_path / "canary").exists()


def test_the_caller_may_name_the_tokenizer(tmp_path):
    folder = tmp_path / "a"
    saved(folder, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), tiny_models.llama())
    tiny_models.byte_tokenizer().save_pretrained(folder)
    change(folder, inference_mode=False, prompt_tuning_init="TEXT", prompt_tuning_init_text="hello")
    change(folder, tokenizer_name_or_path=str(folder), tokenizer_kwargs={"padding_side": "left"})
    named = {"tokenizer_name_or_path": str(folder), "tokenizer_kwargs": {"padding_side": "right"}}
    for allowed in (named, {"trust_remote_code": True}):
        model = get_peft_model(tiny_models.llama(vocab_size=300), PeftConfig.from_pretrained(folder, **allowed))
        assert model.get_prompt(1).shape[1] == 2


def test_a_file_says_from_where_no_other_prompt_is_loaded(tmp_path):
    torch.save({"prompt_embeddings": torch.ones(2, 32)}, tmp_path / "source.bin")
    config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_tasks=2)
    folder = saved(tmp_path / "a", config, tiny_models.llama())
    change(folder, inference_mode=False, prompt_tuning_init="ONLY_SOURCE_SHARED")
    change(folder, prompt_tuning_init_state_dict_path=str(tmp_path / "source.bin"))
    read = PeftConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"prompt_tuning_init_state_dict_path=.*a file may not say"):
        get_peft_model(tiny_models.llama(), read)
    read = PeftConfig.from_pretrained(folder, prompt_tuning_init_state_dict_path=str(tmp_path / "source.bin"))
    get_peft_model(tiny_models.llama(), read)


def test_corda_caches_are_not_those_of_a_file(tmp_path):
    folder = saved(tmp_path / "a")
    change(folder, init_lora_weights="corda", corda_config={"cache_file": str(tmp_path / "cache")})
    config = PeftConfig.from_pretrained(folder)
    from peft.tuners.lora.preprocess import preprocess_corda

    with pytest.raises(ValueError, match=r"corda_config=.*a file may not say"):
        preprocess_corda(tiny_models.MLP(), config, run_model=lambda: None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"parent_library": "transformers.nothing", "base_model_class": "X"}, "cannot be had"),
        ({"parent_library": "transformers", "base_model_class": "nothing"}, "cannot be had"),
        ({"parent_library": "transformers.utils.hub", "base_model_class": "os"}, "no class of models"),
        ({"parent_library": "transformers", "base_model_class": "set_seed"}, "no class of models"),
        ({"parent_library": 5, "base_model_class": "X"}, "two texts"),
        ({"parent_library": "os", "base_model_class": "system"}, "not among the packages"),
    ],
)
def test_only_classes_of_models_are_taken_for_the_base_model(tmp_path, mapping, words):
    change(saved(tmp_path / "a"), auto_mapping=mapping, base_model_name_or_path="x")
    with pytest.raises(ValueError, match=words):
        peft.AutoPeftModel.from_pretrained(tmp_path / "a")


# ---- links and strays in the folder


def test_reading_follows_no_link_and_writes_nothing(tmp_path):
    outside = tmp_path / "outside"
    (outside / "0123456789ab").mkdir(parents=True)
    (outside / "0123456789ab" / CONFIG).write_text('{"peft_type": "evil"}')
    (outside / "0123456789ab" / f"-{WEIGHTS}").write_text("")
    before = listing(outside)
    for number, lay in enumerate(
        (
            lambda place: place.symlink_to(outside),
            lambda place: (place.mkdir(), (place / "0123456789ab").symlink_to(outside / "0123456789ab")),
            lambda place: (
                (place / "0123456789ab").mkdir(parents=True),
                (place / "0123456789ab" / CONFIG).symlink_to(outside / "0123456789ab" / CONFIG),
            ),
            lambda place: ((place / "other").mkdir(parents=True), (place / "other" / CONFIG).write_text("{}")),
            lambda place: ((place / "0123456789ab").mkdir(parents=True), (place / "0123456789ab" / "-..").touch()),
            lambda place: place.write_text("a file"),
        )
    ):
        folder = saved(tmp_path / str(number))
        lay(folder / COMMITTED)
        found = listing(folder)
        assert PeftModel.from_pretrained(tiny_models.MLP(), folder).peft_config["default"].r == 4
        assert listing(folder) == found and listing(outside) == before
        saved(folder, lora(r=2))  # none of them is in the way of the next save
        assert set(os.listdir(folder)) == {CONFIG, WEIGHTS, CARD} and listing(outside) == before
        assert read_adapter(folder, device="cpu")[0]["r"] == 2


def test_strays_among_what_is_staged_are_in_nobodys_way(tmp_path):
    folder = saved(tmp_path / "a")
    os.mkfifo(folder / f"{STAGED}fifo")
    (folder / f"{STAGED}link").symlink_to(tmp_path)
    (folder / f"{STAGED}file").touch()
    saved(folder, lora(r=2))
    assert read_adapter(folder, device="cpu")[0]["r"] == 2


def test_what_is_no_file_is_not_waited_for(tmp_path):
    for name in (CONFIG, WEIGHTS):
        folder = saved(tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match="Can't find"):
            PeftModel.from_pretrained(tiny_models.MLP(), folder)
    with pytest.raises(AdapterFileError, match="is no file"):
        LoraConfig.from_json_file(tmp_path / CONFIG / CONFIG)


def experts(folder: Path) -> dict[str, str]:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return {name: str(saved(folder / name, config, tiny_models.llama(use_cache=False))) for name in ("a", "b")}


def test_experts_lie_with_their_mixture(tmp_path):
    places = experts(tmp_path)
    mixture = get_peft_model(
        tiny_models.llama(use_cache=False), peft.XLoraConfig(task_type="CAUSAL_LM", adapters=places)
    )
    mixture.save_pretrained(tmp_path / "all")
    (tmp_path / "all" / "a" / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(AdapterFileError, match=r"Adapter 'a' cannot be read.*damaged"):  # no other place is tried
        PeftModel.from_pretrained(tiny_models.llama(use_cache=False), tmp_path / "all")
    change(tmp_path / "all", adapters={"../evil": places["a"], "b": places["b"]})
    with pytest.raises(ValueError, match="cannot name an"):
        PeftModel.from_pretrained(tiny_models.llama(use_cache=False), tmp_path / "all")
    for name in ("/tmp/evil", "a/b", "a\\b"):
        config = peft.XLoraConfig(task_type="CAUSAL_LM", adapters={name: places["a"]})
        with pytest.raises(ValueError, match="cannot name an"):
            get_peft_model(tiny_models.llama(use_cache=False), config)


# ---- tensors


def with_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    there = load_file(folder / WEIGHTS)
    save_file({**there, **{name.replace("__", "."): value for name, value in tensors.items()}}, folder / WEIGHTS)


def test_base_weights_in_a_file_are_refused_and_named(tmp_path):
    base = tiny_models.MLP()
    before = tiny_models.base_state(base)
    saved(tmp_path / "a")
    keys = ("lin0.weight", "lin0.base_layer.bias", "lin1.base_layer.weight")
    tensors = {
        f"base_model.model.{key}".replace(".", "__"): torch.full_like(before[key.replace(".base_layer", "")], 7.0)
        for key in keys
    }
    with_tensors(tmp_path / "a", **tensors)
    with pytest.warns(PeftWarning, match=r"Refused.*lin0.weight.*modules_to_save"):
        loaded = PeftModel.from_pretrained(base, tmp_path / "a")
    tiny_models.assert_base_untouched(loaded, before)
    change(tmp_path / "a", bias="all")
    with pytest.warns(PeftWarning, match="Refused"):
        loaded = PeftModel.from_pretrained(tiny_models.MLP(), tmp_path / "a")
    after = tiny_models.base_state(loaded)
    changed = {key for key, value in before.items() if not value.equal(after[key])}
    assert changed == {"lin0.bias"}, "a bias that the configuration says was trained"


def test_embeddings_that_a_file_replaces_are_said(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = saved(tmp_path / "a", config, tiny_models.llama(), save_embedding_layers=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        PeftModel.from_pretrained(tiny_models.llama(), folder)  # the same ones
    with_tensors(folder, base_model__model__model__embed_tokens__weight=torch.ones(40, 32))
    with pytest.warns(PeftWarning, match=r"replaces embeddings of the base model, \S*embed_tokens"):
        loaded = PeftModel.from_pretrained(tiny_models.llama(), folder)
    assert loaded.get_input_embeddings().weight.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_factors_are_numbers_with_a_fraction(tmp_path, dtype):
    folder = saved(tmp_path / "a")
    key = "base_model.model.lin0.lora_A.weight"
    tensors = load_file(folder / WEIGHTS)
    torch.save({**tensors, key: tensors[key].to(dtype)}, folder / PICKLE)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=re.escape(f"{key} is {dtype} in the file")):
        PeftModel.from_pretrained(tiny_models.MLP(), folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_said(tmp_path, value):
    folder = saved(tmp_path / "a")
    with_tensors(folder, base_model__model__lin1__lora_B__weight=torch.full((4, 4), value))
    with pytest.warns(PeftWarning, match=r"not finite.*lin1\.lora_B\.weight"):
        PeftModel.from_pretrained(tiny_models.MLP(), folder)
    with_tensors(folder, base_model__model__lin1__lora_B__weight=torch.full((4, 4), 3e38))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(tiny_models.MLP(), folder)  # large, and its sum is not finite


def test_positions_outside_of_the_weight(tmp_path):
    folder = saved(tmp_path / "a", peft.ShiraConfig(target_modules=["lin0"], r=2))
    key = "base_model.model.lin0.shira_indices"
    positions = load_file(folder / WEIGHTS)[key]
    positions[1, 3] = 1000
    with_tensors(folder, **{key.replace(".", "__"): positions})
    with pytest.raises(ValueError, match=r"shira_indices names rows .* to 1000 of a weight \[24, 16\]"):
        PeftModel.from_pretrained(tiny_models.MLP(), folder)


class Harm:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


PICKLES = {
    "a list": lambda tensors, folder: [1],
    "a number for a tensor": lambda tensors, folder: {**tensors, "x": 1},
    "a number for a name": lambda tensors, folder: {1: torch.ones(1)},
    "sparse": lambda tensors, folder: {"x": torch.ones(2, 2).to_sparse()},
    "wider than its memory": lambda tensors, folder: {"x": torch.ones(1).expand(2**40)},
    "code": lambda tensors, folder: {"x": Harm(folder / "harm")},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_that_hold_something_else_are_named(tmp_path, kind, legacy):
    folder = saved(tmp_path / "a")
    content = PICKLES[kind](load_file(folder / WEIGHTS), tmp_path)
    torch.save(content, folder / PICKLE, _use_new_zipfile_serialization=not legacy)
    (folder / WEIGHTS).unlink()
    refused(folder, PICKLE)
    assert not (tmp_path / "harm").exists()


NO_PICKLES = {
    "empty": b"",
    "zeros": b"\0" * 999,
    "cut short": b"PK\x03\x04",
    "of other things": pickle.dumps({"a": 1}),
    "nothing in it": b"\x80\x02}.",
    "a text of two gigabytes": b"\x80\x02X\xff\xff\xff\x7fabc",
    "one disk of several": b"PK\x06\x07\1" + b"\0" * 11 + b"\5\0\0\0" + b"PK\x05\x06" + b"\0" * 18,
}


@pytest.mark.parametrize("text", NO_PICKLES.values(), ids=NO_PICKLES)
def test_pickles_that_are_none_are_named(tmp_path, text):
    folder = saved(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    (folder / PICKLE).write_bytes(text)
    refused(folder, PICKLE)


def test_a_pickle_that_swells_is_not_unpacked(tmp_path):
    import zipfile

    folder = saved(tmp_path / "a", safe_serialization=False)
    with zipfile.ZipFile(folder / PICKLE) as plain:
        entries = {entry.filename: plain.read(entry) for entry in plain.infolist()}
    with zipfile.ZipFile(folder / PICKLE, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, content + b"\0" * 10_000_000)
    refused(folder, PICKLE, "compressed")


def test_pickles_are_read_as_they_were_asked_for(tmp_path, monkeypatch):
    folder = saved(tmp_path / "a", safe_serialization=False)
    assert len(load_peft_weights(folder, "cpu")) == len(load_peft_weights(folder, "cpu", use_safetensors=False)) == 4
    with pytest.raises(ValueError, match=f"no {WEIGHTS} in that folder"):
        PeftModel.from_pretrained(tiny_models.MLP(), folder, use_safetensors=True)
    monkeypatch.setattr(pickles.torch, "__version__", "2.5.1")
    with pytest.raises(AdapterFileError, match=rf"{PICKLE} is a pickle, and with torch 2\.5\.1 .*use_safetensors="):
        PeftModel.from_pretrained(tiny_models.MLP(), folder)
    PeftModel.from_pretrained(tiny_models.MLP(), folder, use_safetensors=False)


# ---- saving


CALLS = ("mkdir", "chmod", "rename", "replace", "unlink", "rmdir", "fsync", "listdir", "open", "lstat", "close")


def test_a_save_that_has_counted_does_not_raise(tmp_path):
    """Every call to the system fails once: the save raises and the old adapter is there, or it does not and the new."""
    ends = []
    for step in range(500):
        folder = saved(tmp_path / str(step))
        count = 0

        def failing(call):
            def wrapper(*args, **kwargs):
                nonlocal count
                count += 1
                if count == step + 1:  # noqa: B023 - called before the next turn
                    raise OSError(5, "injected")
                return call(*args, **kwargs)

            return wrapper

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in CALLS:
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                replace_files(folder, {CONFIG: b'{"peft_type": "LORA", "r": 2}'})
                raised = False
            except OSError:
                raised = True
        assert read_adapter(folder, device="cpu")[0]["r"] == (4 if raised else 2), step
        ends.append(raised)
        saved(folder, lora(r=3))
        assert set(os.listdir(folder)) == {CONFIG, WEIGHTS, CARD}
        if count <= step:
            break
    assert len(ends) > 30 and True in ends and ends[-1] is False
    assert ends[-8:] == [False] * 8, "what comes after the commit raises nothing"


BROKEN_CARDS = [b"\xff\xfe", b"---\ntags: [unclosed\n---\n", b"---\ntags: 5\n---\n", b"---\n- 1\n---\n", None]


@pytest.mark.parametrize("card", BROKEN_CARDS)
def test_a_broken_card_stops_no_save(tmp_path, card):
    folder = saved(tmp_path / "a")
    (folder / CARD).unlink()
    if card is None:
        (folder / CARD).mkdir()
    else:
        (folder / CARD).write_bytes(card)
    with pytest.warns(PeftWarning, match=f"{CARD} is left as it is"):
        saved(folder, lora(r=2))
    assert read_adapter(folder, device="cpu")[0]["r"] == 2
    assert (folder / CARD).is_dir() if card is None else (folder / CARD).read_bytes() == card


@pytest.mark.parametrize("text", [b"\xff", b"[]", b'{"vocab_size": "x"}', b"[" * 100_000])
def test_a_broken_configuration_of_the_base_model_stops_no_save(tmp_path, text):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes(text)
    config = LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(tmp_path / "base"))
    model = get_peft_model(tiny_models.llama(), config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    assert not any("embed" in key for key in load_file(tmp_path / "a" / WEIGHTS))
