"""`peft train` and `peft tune`, as a user calls them, on tiny models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from peft import LoraConfig
from peft.cli import main
from peft.pickles import safe_pickles
from peft.registry import METHODS
from tiny_models import bert, byte_tokenizer, llama, t5

TEXT = "\n".join(f"{i} and {i + 1} make {2 * i + 1}; {i} times {i} makes {i * i}." for i in range(160))
STEPS = 12
FIELDS = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "lora_dropout": 0.1}
SETTINGS = {
    "max_steps": STEPS,
    "block_size": 48,
    "batch-size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.02,
    "eval_split": 0.1,
    "eval_steps": 2,
    "device": "cpu",
    **FIELDS,
}


resumes = pytest.mark.skipif(not safe_pickles(), reason="transformers resumes a run with torch 2.6 or later")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def words(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


def log_of(folder: Path) -> list[dict]:
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [entry[key] for entry in log_of(folder) if key in entry]


def write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> SimpleNamespace:
    """A folder with tiny models, data and a YAML file, and in `run` what `peft train` made of them."""
    folder = tmp_path_factory.mktemp("cli")
    files = SimpleNamespace(folder=folder, base=folder / "base", data=folder / "sums.txt", yaml=folder / "run.yaml")
    files.t5, files.bert = folder / "t5", folder / "bert"
    models = {files.base: llama(vocab_size=259, max_position_embeddings=256), files.t5: t5(vocab_size=259)}
    models[files.bert] = bert("BertForMaskedLM", vocab_size=259, max_position_embeddings=128)
    for path, model in models.items():
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    files.data.write_text(TEXT)
    files.yaml.write_text(yaml.safe_dump({"model": str(files.base), "data": [str(files.data)], **SETTINGS}))
    files.run = folder / "run"
    assert main(["train", "--config", str(files.yaml), "--output", str(files.run)]) == 0
    return files


def quick(work: SimpleNamespace, output: Path, *arguments: object) -> int:
    """`peft train` in this process, for a few steps."""
    few = ("--max-steps", 2, "--batch-size", 2, "--max-length", 64, "--eval-split", 0, "--device", "cpu")
    files = ("--model", work.base, "--data", work.data, "--output", output)
    return main(words("train", *files, *few, *arguments))


def test_training_from_a_yaml_file(work):
    held_out = losses(work.run, "eval_loss")
    assert len(held_out) == 1 + STEPS // 2
    assert held_out[-1] < held_out[0] - 0.5
    assert len(losses(work.run)) == STEPS
    assert (work.run / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = LoraConfig.from_pretrained(work.run)
    assert (config.r, config.target_modules, config.lora_dropout) == (4, set(FIELDS["target_modules"]), 0.1)
    assert config.task_type == "CAUSAL_LM"
    assert Path(config.base_model_name_or_path) == work.base
    assert "block_size" not in (work.run / "train.yaml").read_text()
    assert "max_length: 48" in (work.run / "train.yaml").read_text()
    assert "| lr | 0.02 |" in (work.run / "README.md").read_text()


@resumes
@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(work, capsys):
    """SIGKILL in the middle, then --resume: every loss and every weight as in the run that was left alone."""
    broken = work.folder / "broken"
    process = subprocess.Popen(
        [sys.executable, "-m", "peft", "train", "--config", str(work.yaml), "--output", str(broken)],
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 300
    while not list(broken.glob("checkpoint-*/trainable.pt")) and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "adapter_model.safetensors").exists()

    assert main(["train", "--resume", "--output", str(broken)]) == 0  # by the settings that the run has written
    assert "Going on after step" in capsys.readouterr().out
    for key in ("loss", "eval_loss", "learning_rate"):
        assert losses(broken, key) == pytest.approx(losses(work.run, key), rel=1e-5, abs=1e-9)
    weights = load_file(broken / "adapter_model.safetensors")
    for name, tensor in load_file(work.run / "adapter_model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


@resumes
@pytest.mark.parametrize("method", ["lora", "p-tuning"])
def test_more_steps_for_a_finished_run(work, tmp_path, capsys, method):
    """Also where the file of an adapter is not what trains: p-tuning stores the outcome of its encoder."""
    options = ("--schedule", "constant", "--seed", 3, "--method", method, "--eval-steps", 1, "--eval-split", 0.02)
    assert quick(work, tmp_path / "long", *options, "--max-steps", 4) == 0
    assert quick(work, tmp_path / "short", *options) == 0
    capsys.readouterr()
    assert main(words("train", "--resume", "--output", tmp_path / "short", "--max-steps", 4)) == 0
    assert "max_steps 2 -> 4" in capsys.readouterr().out
    card = (tmp_path / "short" / "README.md").read_text()
    assert card.count("## Training\n") == 1 and "| max_steps | 4 |" in card
    for key in ("loss", "eval_loss"):
        assert losses(tmp_path / "short", key) == pytest.approx(losses(tmp_path / "long", key), rel=1e-5)


def test_a_checkpoint_that_is_not_whole_is_not_gone_on_with(tmp_path):
    from peft.cli.watch import last_checkpoint

    for step, files in ((4, ["trainer_state.json", "trainable.pt"]), (10, ["trainer_state.json"]), (12, [])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            (tmp_path / f"checkpoint-{step}" / name).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "trainable.pt").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_run_goes_on_only_as_it_was(work, capsys):
    before = (work.run / "train.yaml").read_bytes()
    assert main(words("train", "--resume", "--output", work.run, "--r", 8, "--lr", 0.1, "--max-steps", 40)) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in ("r 4 -> 8", "lr 0.02 -> 0.1", "max_steps 12 -> 40"))
    assert (work.run / "train.yaml").read_bytes() == before


#: what the tiny model asks of methods that are made for larger ones
NEEDS = {
    "SHIRA": ["--r", "2"],
    "MISS": ["--r", "2"],
    "TRAINABLE_TOKENS": ["--token_indices", "5,6"],
    "FOURIERFT": ["--n_frequency", "20"],
    "VBLORA": ["--vector_length", "16", "--num_vectors", "8"],
    "PSOFT": ["--r", "4"],
    "C3A": ["--block_size", "8"],
    "ROAD": ["--group_size", "8"],
    "WAVEFT": ["--n_frequency", "20"],
    "IA3": ["--target_modules", "q_proj,down_proj", "--feedforward_modules", "down_proj"],
}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "XLORA"])
def test_every_method_trains(work, tmp_path, method):
    name = method.lower().replace("_", "-")
    assert quick(work, tmp_path / "run", "--method", name, *NEEDS.get(method, [])) == 0
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["peft_type"] == method
    assert len(losses(tmp_path / "run")) == 2
    # FRoD draws by values of the base weights
    estimated = main(words("estimate", work.base, "--length", 16, "--method", name, *NEEDS.get(method, [])))
    assert estimated == (1 if method == "FROD" else 0)


def test_accumulated_gradients_are_those_of_a_large_batch(work, tmp_path):
    records = [{"prompt": "1" * (i % 7 + 1), "completion": "2" * (3 * i % 11 + 1)} for i in range(24)]
    data = write_records(tmp_path / "pairs.jsonl", records)
    found = []
    for size, accumulate, memory in ((8, 1, "--no-gradient-checkpointing"), (2, 4, "--gradient-checkpointing")):
        options = ("--data", data, "--batch-size", size, "--grad-accum", accumulate, "--max-steps", 3, "--lr", 0.02)
        assert quick(work, tmp_path / str(size), *options, memory, "--target_modules", "q_proj,v_proj") == 0
        found.append(losses(tmp_path / str(size)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][-1] < found[0][0]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(work, tmp_path):
    records = [{"prompt": f"{i}?", "completion": "even" if i % 2 else "odd"} for i in range(24)]
    data = write_records(tmp_path / "pairs.jsonl", records)
    options = ("--data", data, "--lora_r", 4, "--target_modules", "q_proj", "--lr", 0.02, "--max-length", 32)
    options += ("--eval-split", 0.02)
    assert quick(work, tmp_path / "one", *options, "--batch-size", 8) == 0
    files = ("--model", work.base, "--output", tmp_path / "two", "--max-steps", 2)
    command = words("train", "--num-processes", 2, *files, "--batch-size", 4, "--device", "cpu", *options)
    run = subprocess.run(
        [sys.executable, "-m", "peft", *command], env=environment(), capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("step 2/2") == 1  # the first process alone speaks
    assert losses(tmp_path / "two", "eval_loss") == pytest.approx(losses(tmp_path / "one", "eval_loss"), rel=1e-4)
    assert "num_processes: 2" in (tmp_path / "two" / "train.yaml").read_text()  # so many go on with it


@pytest.mark.slow
def test_the_tiny_model_is_made_by_one_of_several_processes(tmp_path):
    home = {"PEFT_HOME": str(tmp_path / "home"), "PEFT_TINY_STEPS": "2"}
    few = ("--max-steps", 1, "--max-length", 16, "--batch-size", 2, "--eval-split", 0, "--device", "cpu")
    line = words("train", "--num-processes", 2, "--output", tmp_path / "run", *few)
    command = [sys.executable, "-m", "peft", *line]
    run = subprocess.run(command, env=environment() | home, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("Making a tiny model") == 1


TURNS = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}] for i in range(20)]
CHAT = [{"messages": turns} for turns in TURNS]
TASKS = {
    "chat": ("base", CHAT, ["--chat-template", "chatml"], "CAUSAL_LM", "token accuracy"),
    "packed": ("base", CHAT, ["--chat-template", "chatml", "--packing"], "CAUSAL_LM", "token accuracy"),
    "preference": (
        "base",
        [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(20)],
        [],
        "CAUSAL_LM",
        "margin",
    ),
    "seq2seq": ("t5", [{"prompt": f"{i}?", "completion": "yes"} for i in range(20)], [], "SEQ_2_SEQ_LM", "held out"),
    "classification": (
        "bert",
        [{"text": f"{i}", "label": ["even", "odd"][i % 2]} for i in range(20)],
        ["--target_modules", "query"],
        "SEQ_CLS",
        "F1",
    ),
    "regression": ("base", [{"text": f"{i}", "label": i / 10} for i in range(20)], [], "SEQ_CLS", "RMSE"),
    "token-classification": (
        "bert",
        [{"tokens": ["a", f"{i}"], "ner_tags": ["O", "N"]} for i in range(20)],
        ["--target_modules", "query"],
        "TOKEN_CLS",
        "accuracy",
    ),
}


@pytest.mark.parametrize("case", TASKS)
def test_the_task_follows_from_the_data(work, tmp_path, capsys, case):
    if case in ("chat", "packed", "preference"):
        pytest.importorskip("trl")
    model, records, options, task_type, measure = TASKS[case]
    data = write_records(tmp_path / "data.jsonl", records)
    base = getattr(work, model)
    assert quick(work, tmp_path / "run", "--model", base, "--data", data, "--eval-split", 0.2, *options) == 0
    printed = capsys.readouterr().out
    assert measure in printed
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["task_type"] == task_type
    if task_type == "SEQ_CLS" or task_type == "TOKEN_CLS":
        names = load_file(tmp_path / "run" / "adapter_model.safetensors")
        head = next(tensor for name, tensor in names.items() if re.search(r"(classifier|score)\.weight$", name))
        assert head.shape[0] == (1 if case == "regression" else 2)


@pytest.mark.parametrize("task", ["causal-lm", "preference"])
@pytest.mark.parametrize("optim", ["loraplus", "lorafa", "riemannian", "adafactor"])
def test_optimizers(work, tmp_path, optim, task):
    data = work.data
    if task == "preference":
        pytest.importorskip("trl")
        data = write_records(tmp_path / "data.jsonl", TASKS["preference"][1])
    options = ("--data", data, "--optim", optim, "--target_modules", "q_proj", "--lr", 0.01)
    assert quick(work, tmp_path / "run", *options) == 0
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in weights.values())


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_starts_that_see_the_data(work, tmp_path, capsys, start):
    options = ("--init_lora_weights", start, "--target_modules", "q_proj,v_proj", "--r", 2)
    assert quick(work, tmp_path / "run", *options) == 0
    assert f"The start '{start}' looks at" in capsys.readouterr().out


def test_a_tensor_without_a_gradient_is_named(work, tmp_path, capsys, monkeypatch):
    from peft.cli import train

    load = train.models.load_for_training

    def with_unused(*arguments):
        model = load(*arguments)
        model.model.unused = torch.nn.Linear(4, 4)
        return model

    monkeypatch.setattr(train.models, "load_for_training", with_unused)
    assert quick(work, tmp_path / "run", "--target_modules", "q_proj,unused") == 1
    assert "base_model.model.model.unused.lora_A.default.weight" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_run_that_gets_no_better_stops(work, tmp_path, capsys):
    options = ("--lr", 1e-12, "--patience", 2, "--eval-steps", 1, "--eval-split", 0.1, "--target_modules", "q_proj")
    assert quick(work, tmp_path / "run", *options, "--max-steps", 9) == 0
    assert "step 2/9" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) < 9


def test_a_loss_that_is_no_number_stops_the_run(work, tmp_path, capsys):
    options = ("--lr", 1e30, "--max_grad_norm", 1e30, "--target_modules", "q_proj,v_proj")
    assert quick(work, tmp_path / "run", *options, "--max-steps", 5) == 1
    assert "a lower --lr may help" in capsys.readouterr().err


def test_the_learning_rate_is_tuned(work, tmp_path, capsys):
    few = ("--max-steps", 3, "--batch-size", 4, "--max-length", 48, "--device", "cpu", "--target_modules", "q_proj")
    lrs = ("--lrs", 1e-9, 0.03, "--ranks", 2, 4)
    assert main(words("tune", "--model", work.base, "--data", work.data, "--output", tmp_path, *few, *lrs)) == 0
    rows = json.loads((tmp_path / "tune.json").read_text())
    assert [(row["lr"], row["rank"]) for row in rows] == [(1e-9, 2), (0.03, 2), (1e-9, 4), (0.03, 4)]
    assert min(rows, key=lambda row: row["loss"])["lr"] == 0.03
    assert "Best: --lr 0.03 --r" in capsys.readouterr().out
    assert (tmp_path / "tune.png").is_file()


def test_a_candidate_that_stays_behind_is_stopped(work, tmp_path, capsys):
    few = ("--max-steps", 6, "--batch-size", 4, "--max-length", 48, "--target_modules", "q_proj,v_proj")
    lrs = ("--lrs", 0.03, 1e-9, 0.04)
    assert main(words("tune", "--model", work.base, "--data", work.data, "--output", tmp_path, *few, *lrs)) == 0
    steps = {row["lr"]: row["steps"] for row in json.loads((tmp_path / "tune.json").read_text())}
    assert steps == {0.03: 6, 1e-9: 1, 0.04: 6}
    assert "(behind, and stopped at step 1)" in capsys.readouterr().out
