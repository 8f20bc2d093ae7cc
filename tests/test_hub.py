"""Adapters on the hub: pushed and loaded with the real client, against a hub on localhost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

import peft
import tiny_models
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.checkpoint import load_peft_weights, model_card, read_adapter, write_adapter
from peft.hub import fetch, push
from peft.pickles import safe_pickles

if TYPE_CHECKING:
    from hub_server import Hub

pytest_plugins = ["hub_server"]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own upload

reads_pickles = pytest.mark.skipif(not safe_pickles(), reason="pickles are read with torch 2.6 or later")
CONFIG, WEIGHTS, PICKLE, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"


def push_marked(mark: int, repo_id: str = "me/adapter", *, card: bool = True, safe: bool = True, **hub):
    """Pushes an adapter whose configuration and weights carry the same mark."""

    def write(folder):
        text = model_card(folder, method="LORA") if card else None
        weights = {"base_model.model.w": torch.full((3,), float(mark))}
        write_adapter(folder, {"peft_type": "LORA", "r": mark}, weights, card=text, safe_serialization=safe)

    return push(write, repo_id, **hub)


def mark_of(repo_id: str = "me/adapter", **hub) -> int:
    config, weights = read_adapter(repo_id, device="cpu", **hub)
    assert weights["base_model.model.w"].tolist() == [config["r"]] * 3
    return config["r"]


def lora_model(seed: int = 0) -> PeftModel:
    """A tiny Llama with an adapter that has an effect."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = tiny_models.llama()
    torch.manual_seed(seed)
    return get_peft_model(base, config).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 12).view(2, 5)).logits


# models and configurations


def test_a_model_there_and_back(hub: Hub):
    model = lora_model()
    info = model.push_to_hub("me/adapter", commit_message="First", private=True)
    assert set(hub.repos["me/adapter"].files()) == {CONFIG, WEIGHTS, CARD}
    assert hub.repos["me/adapter"].messages == ["initial commit", "First"], "one commit"
    assert info.oid == hub.repos["me/adapter"].branches["main"]
    assert hub.repos["me/adapter"].private
    loaded = PeftModel.from_pretrained(tiny_models.llama(), "me/adapter")
    assert logits(loaded).equal(logits(model))
    assert loaded.peft_config["default"].r == 2


def test_save_pretrained_can_push(hub: Hub, tmp_path):
    model = lora_model()
    model.save_pretrained(tmp_path / "adapter", push_to_hub=True)
    assert (
        set(hub.repos[f"{hub.user}/adapter"].files())
        == {CONFIG, WEIGHTS, CARD}
        == set(os.listdir(tmp_path / "adapter"))
    )


def test_named_adapters_lie_in_subfolders(hub: Hub):
    model = lora_model()
    model.add_adapter(
        "other", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["o_proj"], init_lora_weights=False)
    )
    model.push_to_hub("me/two")
    assert set(hub.repos["me/two"].files()) == {CONFIG, WEIGHTS, CARD, f"other/{CONFIG}", f"other/{WEIGHTS}"}
    loaded = PeftModel.from_pretrained(tiny_models.llama(), "me/two", subfolder="other")
    model.set_adapter("other")
    assert logits(loaded).equal(logits(model))
    loaded.load_adapter("me/two", "first")
    loaded.set_adapter("first")
    model.set_adapter("default")
    assert logits(loaded).equal(logits(model))


def test_a_model_by_its_adapter_alone(hub: Hub, tmp_path):
    base = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")
    model = lora_model()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.push_to_hub("me/adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained("me/adapter")
    assert logits(loaded).equal(logits(model))


@tiny_models.needs_transformers_5("pushes to the hub that was there when it was imported")
def test_a_snapshot_of_an_adapter_with_its_tokenizer_is_enough_without_a_network(hub: Hub, tmp_path, monkeypatch):
    tiny_models.llama().save_pretrained(tmp_path / "base")
    model = lora_model()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.push_to_hub("me/adapter")
    tiny_models.byte_tokenizer().push_to_hub("me/adapter")
    snapshot_download("me/adapter")  # all there is, so nobody has asked for a file that is not there
    from hub_server import forget_sessions

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained("me/adapter")
    assert loaded.get_input_embeddings().num_embeddings == 259
    assert logits(loaded)[..., :40].equal(logits(model))


def test_a_configuration_there_and_back(hub: Hub):
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.push_to_hub("config", commit_message="A configuration", token=hub.token)
    assert set(hub.repos[f"{hub.user}/config"].files()) == {CONFIG}
    loaded = PeftConfig.from_pretrained(f"{hub.user}/config")
    assert (type(loaded), loaded.r, loaded.target_modules) == (LoraConfig, 3, {"q_proj"})
    assert PeftConfig.from_pretrained(f"{hub.user}/config", r=5).r == 5, "keyword arguments override fields"


# what a push changes in a repository


@reads_pickles
def test_weights_of_the_other_format_go(hub: Hub):
    push_marked(1)
    push_marked(2, safe=False)
    assert set(hub.repos["me/adapter"].files()) == {CONFIG, PICKLE, CARD}
    assert mark_of() == 2
    push_marked(3)
    assert set(hub.repos["me/adapter"].files()) == {CONFIG, WEIGHTS, CARD}
    assert len(hub.repos["me/adapter"].messages) == 4


def test_the_card_on_the_hub_is_kept(hub: Hub):
    push_marked(1, tags=["first"])
    text = hub.repos["me/adapter"].files()[CARD].decode()
    assert "- first\n" in text and "- lora\n" in text
    edited = text + "\nWritten by a person.\n"
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo=CARD, repo_id="me/adapter")
    push_marked(2, tags=["second"])
    text = hub.repos["me/adapter"].files()[CARD].decode()
    assert "Written by a person." in text and "- first\n" in text and "- second\n" in text
    push_marked(3, card=False)
    assert hub.repos["me/adapter"].files()[CARD].decode() == text


def test_a_branch_and_a_pull_request(hub: Hub):
    push_marked(1)
    push_marked(2, revision="trial/one")
    assert (mark_of(), mark_of(revision="trial/one")) == (1, 2)
    info = push_marked(3, create_pr=True)
    assert info.pr_url.endswith("/me/adapter/discussions/1")
    assert (mark_of(), mark_of(revision="refs/pr/1"), mark_of(revision=info.oid)) == (1, 3, 3)


def test_a_base_model_on_this_machine_does_not_spoil_the_push(hub: Hub, tmp_path):
    model = lora_model()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    model.push_to_hub("me/adapter")  # the hub refuses cards whose metadata names a path as the base model
    assert str(tmp_path) in hub.repos["me/adapter"].files()[CARD].decode()


def test_pushing_needs_a_token(hub: Hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HfHubHTTPError, match="401"):
        push_marked(1)
    with pytest.raises(HfHubHTTPError, match="401"):
        push_marked(1, token=False)
    push_marked(1, token=hub.token)
    assert mark_of(token=hub.token) == 1


# loading


def test_a_private_repository(hub: Hub, monkeypatch):
    push_marked(1, private=True)
    assert mark_of() == 1
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-other")
    with pytest.raises(RepositoryNotFoundError):
        load_peft_weights("me/adapter", token=False)
    with pytest.raises(ValueError, match=r"adapter_config.json.*me/adapter"):
        PeftConfig.from_pretrained("me/adapter", token=False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        load_peft_weights("me/adapter")
    assert mark_of(token=hub.token) == 1
    assert mark_of(use_auth_token=hub.token) == 1


@reads_pickles
def test_a_pickle_on_the_hub(hub: Hub):
    push_marked(1, safe=False)
    assert mark_of() == 1
    assert load_peft_weights("me/adapter", "cpu")["base_model.model.w"].tolist() == [1, 1, 1]


def test_what_is_not_there_is_named(hub: Hub):
    push(lambda folder: Path(folder, CONFIG).write_text('{"peft_type": "LORA"}'), "me/empty")
    with pytest.raises(ValueError, match=rf"no {WEIGHTS} and no {PICKLE} in that repository"):
        load_peft_weights("me/empty")
    with pytest.raises(ValueError, match=rf"{CONFIG}.*'me/empty' \(subfolder 'sub'\)"):
        PeftConfig.from_pretrained("me/empty", subfolder="sub")
    with pytest.raises(ValueError, match=rf"{CONFIG}.*'me/nothing'"):
        PeftConfig.from_pretrained("me/nothing")
    with pytest.raises(ValueError, match="no-such-branch"):
        PeftConfig.from_pretrained("me/empty", revision="no-such-branch")
    with pytest.raises(RepositoryNotFoundError):
        load_peft_weights("me/nothing")


def test_files_are_downloaded_once(hub: Hub, tmp_path):
    push_marked(1)
    hub.requests.clear()
    assert mark_of() == 1
    assert len(hub.downloads()) == 2
    assert mark_of() == 1
    assert len(hub.downloads()) == 2, "the second time they come from the cache"
    push_marked(2, card=False)
    assert mark_of() == 2
    assert len(hub.downloads()) == 5, "both files are new, and the card was read to be kept"
    assert mark_of(cache_dir=tmp_path / "elsewhere") == 2
    assert (tmp_path / "elsewhere" / "models--me--adapter").is_dir()
    before = len(hub.downloads())
    assert mark_of(force_download=True) == 2
    again = hub.downloads()[before:]
    assert any(path.endswith(CONFIG) for path in again) and any(path.startswith("/lfs/") for path in again)


def test_configuration_and_weights_are_of_one_commit(hub: Hub, monkeypatch):
    """Somebody pushes after the configuration was read and before the weights are."""
    from peft.checkpoint import files

    push_marked(1)
    pushed = []

    def push_in_between(*args, **kwargs):
        if not pushed:
            pushed.append(push_marked(2, card=False))
        return load_peft_weights(*args, **kwargs)

    monkeypatch.setattr(files, "load_peft_weights", push_in_between)
    assert mark_of() == 1
    assert pushed
    assert mark_of() == 2


@reads_pickles
def test_without_a_network(hub: Hub, monkeypatch):
    push_marked(1)
    push_marked(1, "me/pickle", safe=False)
    assert (mark_of(), mark_of("me/pickle")) == (1, 1)
    push_marked(2, card=False)
    push_marked(2, "me/unseen")
    hub.requests.clear()
    assert mark_of(local_files_only=True) == 1
    from hub_server import forget_sessions

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    assert (mark_of(), mark_of("me/pickle")) == (1, 1)
    with pytest.raises(LocalEntryNotFoundError, match=rf"'me/unseen': no {WEIGHTS} and no {PICKLE} in the cache"):
        load_peft_weights("me/unseen")
    with pytest.raises(ValueError, match=CONFIG):
        PeftConfig.from_pretrained("me/unseen")
    assert hub.requests == []


def test_a_hub_that_is_down(hub: Hub):
    push_marked(1)
    assert mark_of() == 1
    hub.shutdown()
    hub.server_close()
    assert mark_of() == 1
    assert fetch("me/adapter", CONFIG) is not None


def test_the_environment_decides(hub: Hub, tmp_path):
    """In a process of its own, as users have it: HF_ENDPOINT, HF_HOME, HF_TOKEN, then HF_HUB_OFFLINE."""
    push_marked(7, private=True)
    script = "import sys, peft.config as c; print(c.read_config_file('me/adapter'))"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token, "HF_ENDPOINT": hub.url}

    def run(**more: str) -> dict:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.replace("'", '"'))

    assert run() == {"peft_type": "LORA", "r": 7}
    hub.requests.clear()
    assert run(HF_HUB_OFFLINE="1") == {"peft_type": "LORA", "r": 7}
    assert hub.requests == []


def test_the_client_says_who_asks(hub: Hub):
    push_marked(1)
    hub.user_agents.clear()
    assert mark_of() == 1
    assert any(f"peft/{peft.__version__}" in agent for agent in hub.user_agents)
