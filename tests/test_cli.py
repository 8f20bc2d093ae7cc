"""The `peft` command as a user runs it, in processes and on a tiny model, and its parts where that says more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from peft import LoraConfig, PeftModel
from peft.cli import main, tiny
from peft.cli.data import make_examples, read_documents, split
from peft.cli.fields import OptionError, assignments, build, read_field
from tiny_models import byte_tokenizer, llama, t5

TEXT = "\n".join(f"{i} and {i + 1} make {2 * i + 1}; {i} times {i} makes {i * i}." for i in range(160))
STEPS = 24
FIELDS = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "lora_dropout": 0.1}
SETTINGS = {
    "method": "lora",
    "max_steps": STEPS,
    "block_size": 48,
    "batch-size": 4,
    "grad_accum": 2,
    "lr": 0.01,
    "eval_split": 0.1,
    "save_steps": 3,
    "device": "cpu",
    **FIELDS,
}


def command(*arguments: object) -> list[str]:
    return [str(Path(sys.executable).with_name("peft")), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def peft(*arguments: object, code: int = 0) -> str:
    """Runs the command, expects its exit code, returns what it printed."""
    done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def logits(model: torch.nn.Module, text: str = "7 and 8 make") -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**byte_tokenizer()(text, return_tensors="pt").to("cpu")).logits


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> SimpleNamespace:
    """A folder with a tiny model, data and a YAML file, and in `run` what `peft train` made of them."""
    folder = tmp_path_factory.mktemp("cli")
    files = SimpleNamespace(folder=folder, base=folder / "base", data=folder / "sums.txt", yaml=folder / "run.yaml")
    llama(vocab_size=259).save_pretrained(files.base)
    byte_tokenizer().save_pretrained(files.base)
    files.data.write_text(TEXT)
    files.yaml.write_text(yaml.safe_dump({"model": str(files.base), "data": [str(files.data)], **SETTINGS}))
    files.run = folder / "run"
    files.printed = peft("train", "--config", files.yaml, "--output", files.run)
    return files


def test_training_from_a_yaml_file(work):
    log = log_of(work.run)
    assert [entry["step"] for entry in log] == list(range(STEPS + 1))
    held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(held_out) > 5
    assert held_out[-1] < held_out[0] - 0.5
    assert f"step {STEPS}/{STEPS}" in work.printed

    assert (work.run / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = LoraConfig.from_pretrained(work.run)
    assert (config.r, config.target_modules, config.lora_dropout) == (4, set(FIELDS["target_modules"]), 0.1)
    assert config.task_type == "CAUSAL_LM"
    assert Path(config.base_model_name_or_path) == work.base
    assert [path.name for path in work.run.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


def test_a_killed_run_goes_on_as_if_it_had_not_been(work):
    """SIGKILL in the middle, then --resume: every loss and every weight as in the run that was left alone."""
    broken = work.folder / "broken"
    process = subprocess.Popen(
        command("train", "--config", work.yaml, "--output", broken), env=environment(), stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while not list(broken.glob("checkpoint-[0-9]*")) and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "adapter_model.safetensors").exists()

    printed = peft("train", "--resume", "--output", broken)  # by the settings that the run has written
    assert "Going on after step" in printed
    expected, found = log_of(work.run), log_of(broken)
    assert [entry["step"] for entry in found] == list(range(STEPS + 1))
    for key in ("loss", "eval_loss", "lr"):
        values = [entry[key] for entry in expected if key in entry]
        assert [entry[key] for entry in found if key in entry] == pytest.approx(values, rel=1e-6, abs=1e-9)
    weights = load_file(broken / "adapter_model.safetensors")
    for name, tensor in load_file(work.run / "adapter_model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_generate_writes_what_the_adapted_model_writes(work):
    from transformers import AutoModelForCausalLM

    printed = peft("generate", work.run, "--prompt", "7 and 8 make", "--max-new-tokens", 12)
    base = AutoModelForCausalLM.from_pretrained(work.base)
    tokenizer = byte_tokenizer()
    inputs = tokenizer("7 and 8 make", return_tensors="pt").to("cpu")
    model = PeftModel.from_pretrained(base, work.run)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert printed == tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"
    with model.disable_adapter():
        assert not torch.equal(tokens, model.generate(**inputs, max_new_tokens=12, do_sample=False))


def test_merge_writes_a_model_that_gives_the_same(work):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged_folder = work.folder / "merged"
    peft("merge", work.run, "--output", merged_folder)
    base = AutoModelForCausalLM.from_pretrained(work.base)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, work.run))
    merged = AutoModelForCausalLM.from_pretrained(merged_folder)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(merged_folder)("7 and")["input_ids"] == byte_tokenizer()("7 and")["input_ids"]
    assert main(["merge", str(work.run), "--output", str(merged_folder)]) == 1  # nothing is overwritten


def test_inspect_says_what_the_files_hold(work, monkeypatch, capsys):
    found = json.loads(peft("inspect", work.run, "--json"))
    weights = load_file(work.run / "adapter_model.safetensors")
    assert found["method"] == "LORA"
    assert found["rank"] == 4
    assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert found["bytes"] == 4 * found["parameters"]
    assert found["base_model"] == str(work.base)
    modules = {module["name"]: module for module in found["modules"]}
    head = modules.pop("lm_head")
    assert (head["full"], head["layer"], head["update_norm"]) == (True, None, None)
    assert head["norm"] == pytest.approx(weights["base_model.model.lm_head.weight"].norm().item(), rel=1e-5)
    assert len(modules) == 2 * 2
    for name, module in modules.items():
        assert not module["full"]
        a, b = (weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert module["norm"] == pytest.approx((a.square().sum() + b.square().sum()).sqrt().item(), rel=1e-5)
        assert module["update_norm"] == pytest.approx((8 / 4 * (b @ a)).norm().item(), rel=1e-5)
        assert module["parameters"] == a.numel() + b.numel()
    query = modules["model.layers.1.self_attn.q_proj"]
    assert (query["layer"], query["kind"]) == (1, "q_proj")

    monkeypatch.chdir(work.folder)
    assert main(["inspect", str(work.run)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("LORA", "lm_head", "q_proj", f"{found['parameters']:,}"))
    assert (work.folder / "run-norms.png").read_bytes().startswith(b"\x89PNG")


def quick(work: SimpleNamespace, output: Path, *arguments: object) -> int:
    """`peft train` in this process, for a few steps."""
    few = ("--max-steps", 2, "--batch-size", 2, "--block-size", 32, "--eval-split", 0.02, "--device", "cpu")
    files = ("--model", work.base, "--data", work.data, "--output", output)
    return main([str(argument) for argument in ("train", *files, *few, *arguments)])


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("hra", ["--r", "2", "--target_modules", "q_proj"]),
        ("ia3", ["--set", "target_modules=q_proj,down_proj", "--set", "feedforward_modules=down_proj"]),
        ("vera", ["--r=4", "--target-modules", "q_proj"]),
        ("prompt-tuning", ["--num_virtual_tokens", "3"]),
    ],
)
def test_any_method_trains_and_is_inspected(work, tmp_path, capsys, method, fields):
    assert quick(work, tmp_path / "run", "--method", method, *fields) == 0
    log = log_of(tmp_path / "run")
    assert len(log) == 3
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run"), "--json", "--png", str(tmp_path / "norms.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert found["method"] == method.upper().replace("-", "_")
    assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())
    whole = sum(module["norm"] ** 2 for module in found["modules"]) ** 0.5
    assert whole == pytest.approx(sum(tensor.square().sum().item() for tensor in weights.values()) ** 0.5, rel=1e-5)
    assert (tmp_path / "norms.png").is_file()


def test_accumulated_gradients_are_those_of_a_large_batch(work, tmp_path):
    records = [{"prompt": "1" * (i % 7 + 1), "completion": "2" * (3 * i % 11 + 1)} for i in range(24)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    losses = []
    for size, accumulate, memory in ((8, 1, "--no-gradient-checkpointing"), (2, 4, "--gradient-checkpointing")):
        output = tmp_path / str(size)
        options = ("--data", data, "--batch-size", size, "--grad-accum", accumulate, "--max-steps", 5, "--lr", 0.02)
        assert quick(work, output, *options, memory, "--target_modules", "q_proj,v_proj") == 0
        losses.append([entry["loss"] for entry in log_of(output)[1:]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_more_steps_for_a_finished_run(work, tmp_path):
    """--resume with another --max-steps, at a constant learning rate, is the longer run."""
    options = ("--schedule", "constant", "--target_modules", "q_proj", "--lora_dropout", 0.2, "--seed", 3)
    assert quick(work, tmp_path / "long", *options, "--max-steps", 4) == 0
    assert quick(work, tmp_path / "short", *options) == 0
    assert main(["train", "--resume", "--output", str(tmp_path / "short"), "--max-steps", "4"]) == 0
    long, short = log_of(tmp_path / "long"), log_of(tmp_path / "short")
    assert [entry["loss"] for entry in short[1:]] == pytest.approx([entry["loss"] for entry in long[1:]], rel=1e-6)
    assert short[-1]["eval_loss"] == pytest.approx(long[-1]["eval_loss"], rel=1e-6)


def test_an_encoder_decoder_learns_answers(work, tmp_path, capsys):
    base, data = tmp_path / "t5", tmp_path / "pairs.jsonl"
    t5(vocab_size=259).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    data.write_text("\n".join(json.dumps({"question": str(i), "answer": ["even", "odd"][i % 2]}) for i in range(40)))
    options = ("--model", base, "--data", data, "--prompt-field", "question", "--completion-field", "answer")
    assert quick(work, tmp_path / "run", *options, "--lr", 0.02, "--max-steps", 10, "--bf16") == 0
    log = log_of(tmp_path / "run")
    assert log[-1]["eval_loss"] < log[0]["eval_loss"]
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--prompt", "4", "--max-new-tokens", "4"]) == 0
    assert quick(work, tmp_path / "text", "--model", base) == 1
    assert "answers to prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--lora_alfa", "16"], 2, ["LoraConfig", "'lora_alfa'", "'lora_alpha'"]),
        (["--max-step", "3"], 2, ["no such option", "'max-steps'"]),
        (["--r", "many"], 2, ["r has to be int", "'many'"]),
        (["--set", "r"], 2, ["FIELD=VALUE"]),
        (["--use_rslora", "maybe"], 2, ["use_rslora has to be bool", "'maybe'"]),
        (["--bias", "some"], 1, ["'some'"]),
        (["16"], 2, ["unexpected argument '16'"]),
        (["--set", "peft_type=IA3"], 2, ["no field 'peft_type'"]),
        (["--target_modules", "q_prj"], 1, ["q_prj", "q_proj"]),
        (["--data", "nowhere.txt"], 1, ["nowhere.txt"]),
        (["--config", "nowhere.yaml"], 2, ["nowhere.yaml"]),
        (["--resume"], 2, ["no run in"]),
        (["--device", "abacus"], 1, ["abacus"]),
        (["--schedule", "wild"], 1, ["wild"]),
    ],
)
def test_errors_say_what_was_meant(work, tmp_path, capsys, arguments, code, words):
    assert quick(work, tmp_path / "run", *arguments) == code
    message = capsys.readouterr().err
    assert message.startswith("peft train: error: ")
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_errors_of_the_command_line_itself(work, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        quick(work, tmp_path, "--method", "lorra")
    assert stopped.value.code == 2
    assert "Did you mean 'lora'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quick(work, tmp_path, "--batch-size", "0")
    assert "from 1 on" in capsys.readouterr().err

    assert main(["inspect", str(work.run), "--jsn"]) == 2
    assert "'--json'" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 1
    assert "adapter_config.json" in capsys.readouterr().err
    assert quick(work, work.run) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([]) == 0
    assert "inspect" in capsys.readouterr().out

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(work.run)]) == 1
    assert "pip install 'peft[cli]'" in capsys.readouterr().err


def test_help_needs_nothing_heavy():
    code = (
        "import sys, peft.cli\n"
        "try: peft.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'rich', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--max-steps" in done.stdout


def test_the_fields_of_a_method_are_listed(capsys):
    assert main(["train", "--method", "lora", "--fields"]) == 0
    printed = capsys.readouterr().out
    assert "--lora_alpha" in printed
    assert "peft_type" not in printed


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("16", int, 16),
        ("1e-3", float, 1e-3),
        ("2", float, 2),
        ("true", bool, True),
        ("no", bool, False),
        ("no", str, "no"),
        ("none", str | None, None),
        ("none", Literal["none", "all"], "none"),
        ("q_proj", list[str] | str | None, ["q_proj"]),
        ("q_proj, v_proj", list[str] | str | None, ["q_proj", "v_proj"]),
        ("[q_proj, v_proj]", list[str] | str | None, ["q_proj", "v_proj"]),
        ("all-linear", list[str] | str | None, "all-linear"),
        (r".*\.(q|v)_proj{1,2}", list[str] | str | None, r".*\.(q|v)_proj{1,2}"),
        ("0,2", list[int] | int | None, [0, 2]),
        ("{q_proj: 4}", dict[str, int], {"q_proj": 4}),
        ("true", bool | Literal["gaussian"], True),
        ("gaussian", bool | Literal["gaussian"], "gaussian"),
        ("pissa_niter_4", bool | Literal["pissa_niter_[number of iters]"], "pissa_niter_4"),
    ],
)
def test_text_becomes_the_type_of_the_field(text, kind, value):
    found = read_field("field", text, kind)
    assert found == value
    assert type(found) is type(value) or kind is float


@pytest.mark.parametrize(
    ("text", "kind"), [("1.5", int), ("maybe", bool), ("{q_proj: many}", dict[str, int]), ("a,b", list[int])]
)
def test_text_that_does_not_fit_is_refused(text, kind):
    with pytest.raises(OptionError, match="field has to be"):
        read_field("field", text, kind)


def test_unknown_options_are_fields():
    found = assignments(["--r", "16", "--use_rslora", "--lora-alpha=-1", "--bias", "all"])
    assert found == {"r": "16", "use_rslora": "true", "lora_alpha": "-1", "bias": "all"}
    config = build(LoraConfig, {**found, "lora_alpha": 32, "rank_pattern": "{q_proj: 4}"})
    assert (config.r, config.use_rslora, config.lora_alpha, config.bias) == (16, True, 32, "all")
    assert config.rank_pattern == {"q_proj": 4}


def test_examples_learn_the_answer_alone():
    tokenizer = byte_tokenizer()
    (example,), cut = make_examples([("ab", "cd")], tokenizer, block=16)
    answer = [*tokenizer("cd")["input_ids"], tokenizer.eos_token_id]
    assert example == {"input_ids": tokenizer("ab")["input_ids"] + answer, "labels": [-100, -100, *answer]}
    assert cut == 0
    (example,), cut = make_examples([("abcdef", "gh")], tokenizer, block=5)
    assert tokenizer.decode(example["input_ids"]).startswith("efgh")  # a long prompt loses its beginning
    (example,), cut = make_examples([("ab", "cdefgh")], tokenizer, block=4)
    assert (tokenizer.decode(example["input_ids"]), cut) == ("bcde", 1)


def test_texts_are_joined_and_cut_into_blocks():
    tokenizer = byte_tokenizer()
    examples, _ = make_examples(["abcd", "efg"], tokenizer, block=4)
    assert [tokenizer.decode(example["input_ids"]) for example in examples] == ["abcd", "</s>efg"]
    assert all(example["labels"] == example["input_ids"] for example in examples)
    training, held_out = split(examples * 5, 0.25, seed=0)
    assert (len(training), len(held_out)) == (7, 3)


def test_records_without_the_fields_are_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(ValueError, match=r"record 2.*'body'.*--text-field"):
        read_documents([str(path)], text="text", prompt="prompt", completion="completion")
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="not valid JSON"):
        read_documents([str(path)], text="text", prompt="prompt", completion="completion")


def test_texts_may_part_where_two_tokens_are_equally_likely():
    from peft.cli.demo import _compared

    model = llama().eval()
    with torch.no_grad():
        first, second = model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].topk(2).indices.tolist()
        assert _compared(model, [5, 6, first], [5, 6, first]) == "yes"
        assert _compared(model, [5, 6, first], [5, 6, second]) == "NO"
        model.lm_head.weight[second] = model.lm_head.weight[first] + 1e-7
        assert _compared(model, [5, 6, first], [5, 6, second]).startswith("yes, to a tie of two")


def test_the_demo_runs_and_proves_the_merge(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo"), "--base-steps", "2", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("yes") == 3
    assert "NO" not in printed
    assert (tmp_path / "demo" / "loss.png").is_file()
    assert (tmp_path / "demo" / "merged" / "model.safetensors").is_file()
    assert "made now" in printed
    tiny.base_model(tmp_path / "demo", Console(), steps=2)  # kept for the next time
    assert "made now" not in capsys.readouterr().out
