"""Files that are damaged, or written to do harm: what they say is checked before it is believed, errors name them."""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import peft
import tiny_models
from damaged_files import CARD, CONFIG, WEIGHTS, change, lora, refused, saved
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, patterns
from peft.checkpoint import read_adapter
from peft.errors import AdapterFileError, PeftWarning
from peft.folder import COMMITTED, STAGED


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


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
        ("lora_alpha", math.nan), ("lora_alpha", math.inf), ("lora_alpha", 1e308), ("lora_dropout", 1.5),
        ("lora_dropout", -0.1), ("lora_dropout", None), ("target_modules", ["lin0", None]),
        ("target_modules", [["lin0"]]), ("target_modules", "("), ("target_modules", "a\x00b"),
        ("target_modules", ["\ud800"]),
        ("target_modules", [f"m{i}" for i in range(5000)]), ("exclude_modules", "["), ("modules_to_save", [None]),
        ("modules_to_save", "lin1"), ("modules_to_save", [""]), ("layers_to_transform", [[1]]),
        ("rank_pattern", {"lin(": 2}), ("rank_pattern", {"lin0": "2"}), ("rank_pattern", {"lin0": 10**9}),
        ("rank_pattern", {f"lin{i}": 2 for i in range(5000)}), ("alpha_pattern", {"lin0": math.nan}),
        ("bias", 5), ("use_dora", 1), ("eva_config", {"rho": "x"}), ("peft_type", 5),
        ("loftq_config", {"loftq_bits": 4, "loftq_iter": 10**9}), ("init_lora_weights", "pissa_niter_1000000000"),
        ("layer_replication", [[0, 10**9]]), ("megatron_core", "evil"), ("megatron_core", "megatron.evil"),
        ("task_type", "X"),
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


@pytest.mark.parametrize("targets", ["lin1", ["lin1"]])
def test_layers_that_have_no_effect_in_a_file_are_left_out(tmp_path, targets):
    """huggingface/peft writes them for some methods; here they are an error where somebody asks for them."""
    layers = {"layers_to_transform": [0]} if isinstance(targets, str) else {}
    change(saved(tmp_path / "a"), target_modules=targets, layers_pattern="h", **layers)
    with pytest.warns(PeftWarning, match="layers_pattern, which had no effect"):
        config = PeftConfig.from_pretrained(tmp_path / "a")
    assert (config.layers_to_transform, config.layers_pattern) == (None, None)


#: here the package `regex` tries as many ways as `re`
ENDLESS = r"(?P<x>a|aa)+(?P=x)\.$"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)x", "(a?){40}a{40}", "(.*.*)*=", "((l|.)*)*in0x", ENDLESS]
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
            with pytest.raises(ValueError, match=r"not found|No module|takes too long"):
                PeftModel.from_pretrained(Deep(), tmp_path / "a")
        elif (field, pattern) == ("exclude_modules", ENDLESS):
            with pytest.raises(ValueError, match="takes too long"):
                PeftModel.from_pretrained(Deep(), tmp_path / "a")
        else:
            PeftModel.from_pretrained(Deep(), tmp_path / "a")
    assert time.process_time() - start < 2


def test_names_match_as_re_has_it():
    """The answers of the package `re`, on random expressions."""
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
            matches = patterns.fullmatch(pattern, text)
        assert matches == expected, (pattern, text)
        matched += expected
    assert matched > 300


def test_many_expressions_take_no_time_together():
    """Each of them may take a while, all of them not more than a second or so above what plain names take."""
    start = time.process_time()
    with pytest.raises(patterns.PatternError, match="takes too long"):
        for index in range(20_000):
            patterns.fullmatch(f".*.*.*x{index}", "a" * 200)
    assert time.process_time() - start < 2
    patterns.fullmatch(".*", "a")  # and the next call has its time again
    with pytest.raises(ValueError, match="characters"):
        LoraConfig(target_modules="a.*" * 100_000)


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
