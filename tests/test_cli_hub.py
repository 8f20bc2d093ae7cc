"""`peft train --push-to-hub`, with the real client, against a hub on localhost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants

from peft.cli import main
from peft.cli.models import load_processor
from peft.cli.options import TABLES
from test_cli import CHAT, TEXT, words, write_records
from tiny_models import byte_tokenizer, llama, needs_transformers_5

if TYPE_CHECKING:
    from hub_server import Hub

pytest_plugins = ["hub_server"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),  # huggingface_hub's own upload
    needs_transformers_5("pushes to the hub that was there when it was imported"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "base"
    llama(vocab_size=259, max_position_embeddings=256).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TABLES.chatml
    tokenizer.save_pretrained(folder)
    return folder


def pushed(base: Path, output: Path, *arguments: object) -> int:
    """`peft train --push-to-hub` of a few steps; on texts, or on chats where `--task chat` is among the arguments."""
    data = output.parent / "data.jsonl"
    write_records(data, CHAT if "chat" in arguments else [{"text": TEXT}])
    few = ("--max-steps", 2, "--eval-steps", 1, "--batch-size", 2, "--max-length", 64, "--device", "cpu")
    files = ("--model", base, "--data", data, "--output", output)
    return main(words("train", *files, *few, "--push-to-hub", *arguments))


@pytest.mark.parametrize("task", ["causal-lm", "chat"])
@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_the_hub_gets_adapter_and_card(hub: Hub, base, tmp_path, monkeypatch, capsys, task, strategy):
    if task == "chat":
        pytest.importorskip("trl")
    monkeypatch.setenv("HF_TOKEN", "")
    options = ("--hub-model-id", "me/adapter", "--hub-private-repo", "--hub-token", hub.token, "--eval-split", 0.2)
    assert pushed(base, tmp_path / "run", *options, "--task", task, "--hub-strategy", strategy) == 0
    assert f"On the hub: {hub.url}/me/adapter" in capsys.readouterr().out
    repo = hub.repos["me/adapter"]
    assert repo.private
    if strategy == "end":
        assert len(repo.messages) == 2, "the initial commit, and one for the adapter"
    found = repo.files()
    here = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert found == here
    assert found.keys() >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "loss.png"}
    card = found["README.md"].decode()
    assert all(part in card for part in ("| max_steps | 2 |", "| loss | ", "peft train --config", "![Loss](loss.png)"))
    assert "| hub_model_id | me/adapter |" in card
    assert not any(hub.token.encode() in content for content in found.values())


def test_the_folder_names_the_repository_and_a_branch_is_made(hub: Hub, base, tmp_path):
    assert pushed(base, tmp_path / "run", "--eval-split", 0, "--hub-revision", "trial", "--hub-strategy", "end") == 0
    repo = hub.repos[f"{hub.user}/run"]
    assert "adapter_model.safetensors" in repo.files("trial") and not repo.files()


def test_an_adapter_on_the_hub_has_its_chat_template(hub: Hub, base, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    options = ("--task", "chat", "--chat-template", template, "--hub-strategy", "end", "--hub-model-id", "me/adapter")
    assert pushed(base, tmp_path / "run", *options) == 0
    answers = []
    for adapter in (tmp_path / "run", "me/adapter"):
        capsys.readouterr()
        assert main(words("generate", adapter, "--prompt", "7?", "--max-new-tokens", 9, "--device", "cpu")) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert load_processor("me/adapter").chat_template == template.read_text()


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_without_access_nothing_is_begun(hub: Hub, base, tmp_path, monkeypatch, capsys, token):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("peft.cli.models.load_base", None)
    assert pushed(base, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert said.startswith("peft train: error: --push-to-hub needs access: `hf auth login`, or --hub-token: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists() and not hub.repos


def test_what_the_hub_does_not_take_is_kept(hub: Hub, base, tmp_path, capsys):
    hub.read_only.add("me/adapter")
    assert pushed(base, tmp_path / "run", "--hub-model-id", "me/adapter") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"the adapter is in {tmp_path / 'run'}, but not on the hub" in said
    assert f"hf upload me/adapter {tmp_path / 'run'} . --exclude 'checkpoint-*'" in said and "403" in said
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert "| max_steps | 2 |" in (tmp_path / "run" / "README.md").read_text()
    hub.read_only.clear()  # a run that is at its end goes on to its push, and elsewhere too
    assert main(words("train", "--resume", "--output", tmp_path / "run", "--hub-model-id", "me/other")) == 0
    assert "adapter_model.safetensors" in hub.repos["me/other"].files()


def test_candidates_are_not_for_the_hub(hub: Hub, base, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    line = ("tune", "--model", base, "--data", tmp_path / "text.txt", "--output", tmp_path / "tune", "--push-to-hub")
    assert main(words(*line)) == 2
    assert "candidates are not kept" in capsys.readouterr().err
    assert not hub.repos
