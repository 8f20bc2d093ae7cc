"""What the `peft` command makes of files, records and options, before any model is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import LlamaConfig, Wav2Vec2CTCTokenizer

from peft.cli.models import check_task, device_of, locate
from peft.cli.options import ALIASES, COMMANDS, TABLES
from peft.cli.parse import OptionError, help_of, init_types, read, settings_of
from peft.cli.plan import learning_rate
from peft.cli.records import read_records, understand, unused
from peft.cli.tasks import Encoder, measures, word_error_rate
from peft.registry import METHODS
from tiny_models import byte_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
TALK = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
MORE = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
SHAREGPT = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]


def encoder(task: str, length: int = 200, template: str | None = TABLES.chatml) -> Encoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Encoder(task, tokenizer, length)


def learnt(example: dict) -> str:
    """The text that the labels of an example hold."""
    return byte_tokenizer().decode([label for label in example["labels"] if label != -100])


@pytest.mark.parametrize(
    ("row", "task", "read_as"),
    [
        ({"text": "a"}, "causal-lm", {"text": "a"}),
        ({"prompt": "a", "completion": "b"}, "causal-lm", {"prompt": "a", "completion": "b"}),
        ({"messages": TALK}, "chat", {"messages": TALK}),
        ({"conversations": SHAREGPT, "id": 3}, "chat", {"messages": TALK}),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, "chat", {"messages": TALK}),
        ({"instruction": "a?", "input": "", "output": "b"}, "chat", {"messages": TALK}),
        ({"question": "a", "answer": "b", "id": 1}, "causal-lm", {"prompt": "a", "completion": "b"}),
        ({"instruction": "c", "output": "d", "history": [["a?", "b"]]}, "chat", {"messages": [*TALK, *MORE]}),
        ({"conversations": SHAREGPT, "system": "s"}, "chat", {"messages": [{"role": "system", "content": "s"}, *TALK]}),
        ({"text": "a", "label": "0.5"}, "regression", {"text": "a", "label": "0.5"}),
        ({"text": "a", "label": "1.0"}, "classification", {"text": "a", "label": "1.0"}),
        ({"text": "a", "label": "x"}, "classification", {"text": "a", "label": "x"}),
        ({"sentence": "a", "label": 0}, "classification", {"text": "a", "label": 0}),
        ({"text": "a", "labels": 0.5}, "regression", {"text": "a", "label": 0.5}),
        ({"tokens": ["a", "b"], "ner_tags": [0, 1]}, "token-classification", {"tokens": ["a", "b"], "label": [0, 1]}),
        ({"chosen": "b", "rejected": "c"}, "preference", {"chosen": "b", "rejected": "c"}),
        ({"chosen": SHAREGPT, "rejected": TALK}, "preference", {"chosen": TALK, "rejected": TALK}),
        (
            {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
            "preference",
            {"prompt": "a\n\nb", "chosen": "c", "rejected": "d"},
        ),
        (
            {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": SHAREGPT[1]},
            "preference",
            {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]},
        ),
    ],
)
def test_records_say_by_their_fields_what_they_are_for(row, task, read_as):
    assert understand([("x", row)], {}, None) == (task, [("x", read_as)])


def test_fields_that_nothing_is_learnt_from_are_named():
    row = {"prompt": "a", "completion": "b", "label": True, "tags": [], "body": "c"}
    assert unused(row, {}, "causal-lm") == ["label", "body"]
    assert unused({"instruction": "a", "input": "", "output": "b", "id": 3}, {}, "chat") == ["id"]
    assert unused({"body": "a", "label": "b"}, {"text": "body"}, "classification") == []


def test_the_input_of_alpaca_is_not_lost():
    _, ((_, row),) = understand([("x", {"instruction": "Sum up:", "input": "1, 2", "output": "3"})], {}, None)
    assert row["messages"][0]["content"] == "Sum up:\n\n1, 2"


def test_columns_by_other_names_and_tasks_by_name():
    rows = [("x", {"body": "a", "stars": "4"})]
    assert understand(rows, {"text": "body", "label": "stars"}, "regression")[0] == "regression"
    assert understand(rows, {"text": "body"}, None) == ("causal-lm", [("x", {"text": "a"})])
    assert understand([("x", {"text": "a", "label": "b"})], {}, "causal-lm") == ("causal-lm", [("x", {"text": "a"})])
    with pytest.raises(ValueError, match=r"x: the fields 'body', 'stars' .*--columns"):
        understand(rows, {}, None)
    with pytest.raises(ValueError, match="x: --columns names bod, but the fields are body, stars"):
        understand(rows, {"text": "bod"}, None)
    row = {"prompt": "a?", "completion": "b"}
    assert understand([("x", row)], {}, "chat") == ("chat", [("x", {"messages": TALK})])
    for task in ("causal-lm", "seq2seq"):
        with pytest.raises(ValueError, match=f"not those of {task}"):
            understand([("x", {"messages": TALK})], {}, task)
    with pytest.raises(ValueError, match="not those of preference"):
        understand([("x", {"text": "a"})], {}, "preference")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2, column 10: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n\n{"body": "b"}\n', r"a\.jsonl, line 3: field 'text' is not there, but 'body'"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', r"a\.jsonl, line 2: field 'text' is null"),
        ("a.jsonl", '{"text": "a"}\n{"text": " "}\n', r"a\.jsonl, line 2: field 'text' is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": 7}\n', r"a\.jsonl, line 2: field 'text' has to be a text, got 7"),
        ("a.jsonl", '{"text": "a", "label": [0, 1]}', r"field 'label' has to be one value, got \[0, 1\]"),
        ("a.jsonl", '{"tokens": "a b", "label": [0, 1]}', "field 'tokens' has to be a list of words, got 'a b'"),
        ("a.jsonl", '{"tokens": ["a", 3], "label": [0, 1]}', "field 'tokens' has to be a list of words"),
        ("a.jsonl", '{"tokens": ["a"], "label": [null]}', "field 'label' has to be a list, one for each word"),
        ("a.jsonl", '{"instruction": 3, "output": "b"}', "field 'instruction' has to be a text, got 3"),
        ("a.jsonl", '{"instruction": "a", "output": "b", "history": [["c"]]}', "has to be a list of pairs of texts"),
        ("a.jsonl", '{"text": "a", "task_id": -1}', "field 'task_id' has to be a number from 0 on, got -1"),
        ("a.csv", "text,text,label\na,b,c\n", r"a\.csv, line 1: a column is there twice \(text, text, label\)"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1: an object with named fields is needed, got list"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.json", "", r"a\.json is empty"),
        ("a.json", '[\n{"text": "a"},\n{"text" "b"}]', r"a\.json, line 3, column 9: not valid JSON"),
        ("a.json", '[{"text": "a"}, {"text": null}]', r"a\.json, record 2: field 'text' is null"),
        ("a.json", '{"text": "a"}', r"a\.json: a list of records is needed, got dict"),
        ("a.csv", "text,label\na,b\nc\n", r"a\.csv, line 3: not as many columns as the first line names \(2\)"),
        ("a.csv", "body,class\na,b\n", r"a\.csv, line 2: the fields 'body', 'class' are not those of a task"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.txt", " \n", r"a\.txt is empty"),
        ("a.txt", b"ok\nna\xefve\n", r"a\.txt, line 2: byte 0xef is no UTF-8"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"line 1: 'messages': a turn has to have role and content"),
        ("a.jsonl", '{"messages": "hello"}', r"line 1: 'messages': a list of turns is needed"),
        ("a.jsonl", json.dumps({"messages": TALK[:1]}), r"line 1: 'messages': no turn of the assistant has a text"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [0, 1]}', r"line 1: 'tokens' with 'label': 1 tokens, but 2 labels"),
    ],
)
def test_what_is_wrong_with_data_is_said_with_file_line_and_field(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        understand(read_records([str(path)]), {}, None)


def test_files_that_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("prose,\nnot a table")
    (tmp_path / "a.csv").write_bytes('\ufefftext,label\r\n"one, two\nthree",x\r\n'.encode())
    (tmp_path / "a.tsv").write_text("text\tlabel\nfour\ty\n")
    rows = [row for _, row in read_records([str(tmp_path / name) for name in ("a.txt", "a.csv", "a.tsv")])]
    assert rows[0] == {"text": "prose,\nnot a table"}
    assert rows[1:] == [{"text": "one, two\nthree", "label": "x"}, {"text": "four", "label": "y"}]
    from datasets import Dataset

    Dataset.from_list([{"text": "five"}]).to_parquet(str(tmp_path / "a.parquet"))
    assert read_records([str(tmp_path / "a.parquet")]) == [(f"{tmp_path}/a.parquet, row 1", {"text": "five"})]


@pytest.mark.parametrize("name", ["./nowhere.txt", "nowhere.jsonl", "nowhere/", "a/b/c"])
def test_a_path_that_is_not_there_is_no_name_on_the_hub(name):
    with pytest.raises(ValueError, match="is not there"):
        read_records([name])
    if name != "nowhere.jsonl":
        with pytest.raises(ValueError, match="no such folder"):
            locate(name)


def test_a_folder_is_no_data(tmp_path):
    with pytest.raises(ValueError, match="is a folder without data"):
        read_records([str(tmp_path)])


def test_of_a_chat_the_turns_of_the_assistant_are_learnt():
    talk = [{"role": "system", "content": "s"}, *TALK, {"role": "user", "content": "c?"}, {**TALK[1], "content": "d"}]
    (example,) = encoder("chat")([("x", {"messages": talk})]).examples
    assert learnt(example) == "b<|im_end|>\nd<|im_end|>\n"
    whole = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in talk)
    assert byte_tokenizer().decode(example["input_ids"]) == whole


def test_a_template_that_leads_answers_in_with_words_of_its_own():
    """The prompt for an answer ends in what the answer itself does not have, as with templates that think."""
    thinking = TABLES.chatml.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    (example,) = encoder("chat", template=thinking)([("x", {"messages": TALK})]).examples
    assert learnt(example) == "b<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    last = "{% for m in messages %}{{ m['content'] if loop.last else '-' }};{% endfor %}"
    with pytest.raises(ValueError, match="x: the chat template changes earlier turns"):
        encoder("chat", template=last)([("x", {"messages": TALK + TALK})])


def test_truncation_is_counted_and_what_is_left_without_an_answer_is_dropped():
    rows = [("x", {"messages": TALK}), ("y", {"messages": [{**TALK[0], "content": "a" * 300}, TALK[1]]})]
    found = encoder("chat")(rows)
    assert (len(found.examples), found.cut, found.dropped) == (1, 1, 1)
    with pytest.raises(ValueError, match="nothing is left to learn within --max-length 8"):
        encoder("chat", 8)(rows)


def test_of_an_answer_to_a_prompt_the_answer_alone_is_learnt():
    tokenizer = byte_tokenizer()

    def example(prompt: str, completion: str, length: int) -> tuple[dict, int]:
        found = encoder("causal-lm", length)([("x", {"prompt": prompt, "completion": completion})])
        return found.examples[0], found.cut

    found, cut = example("ab", "cd", 16)
    answer = [*tokenizer("cd")["input_ids"], tokenizer.eos_token_id]
    assert found == {"input_ids": tokenizer("ab")["input_ids"] + answer, "labels": [-100, -100, *answer]}
    assert cut == 0
    found, cut = example("abcdef", "gh", 5)
    assert tokenizer.decode(found["input_ids"]).startswith("efgh")  # a long prompt loses its beginning
    assert cut == 1
    found, cut = example("ab", "cdefgh", 4)
    assert (tokenizer.decode(found["input_ids"]), cut) == ("bcde", 1)


def test_texts_are_joined_and_cut_into_blocks():
    found = encoder("causal-lm", 4)([("x", {"text": "abcd"}), ("y", {"text": "efg"})]).examples
    assert [byte_tokenizer().decode(example["input_ids"]) for example in found] == ["abcd", "</s>efg"]
    assert all(example["labels"] == example["input_ids"] for example in found)


def test_labels_of_classes_and_words():
    encode = encoder("classification")
    found = encode([("x", {"text": "a", "label": "10"}), ("y", {"text": "b", "label": "9"})])
    assert encode.labels == ["9", "10"]
    assert [example["label"] for example in found.examples] == [1, 0]
    found = encoder("token-classification")([("x", {"tokens": ["ab", "c"], "label": ["O", "N"]})])
    assert found.examples[0]["labels"] == [1, -100, 0]
    with pytest.raises(ValueError, match="x: could not convert"):
        encoder("regression")([("x", {"text": "a", "label": "high"})])


@pytest.mark.parametrize(
    ("said", "heard", "rate"),
    [
        (["a b c d"], ["a b c d"], 0.0),
        (["a b c d"], ["a x c"], 0.5),
        (["a b"], ["a a b b c"], 1.5),
        (["a b", "c"], ["", "c"], 2 / 3),
        (["one two three four"], ["two three four five"], 0.5),
    ],
)
def test_word_errors_are_the_fewest_edits(said, heard, rate):
    assert word_error_rate(said, heard) == pytest.approx(rate)


def test_letters_that_are_twice_in_what_was_said_count(tmp_path):
    """A CTC decoder takes letters in a row for one; those of the labels are two."""
    (tmp_path / "letters.json").write_text(json.dumps({letter: i for i, letter in enumerate(["<pad>", "|", *"abl"])}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "letters.json"), unk_token="<pad>", bos_token=None, eos_token=None)
    measure = measures("ctc", SimpleNamespace(tokenizer=tokenizer))["compute_metrics"]
    labels = [[2, 4, 4, -100], [3, 1, 2, -100]]  # "all", "b a"
    frames = [[2, 2, 4, 0, 4, -100], [3, 1, 1, 3, 3, -100]]  # "all", "b b"
    assert measure(SimpleNamespace(predictions=np.array(frames), label_ids=np.array(labels))) == {"wer": 1 / 3}


@pytest.mark.parametrize(
    ("kind", "names", "task", "message"),
    [
        ("bert", ["BertForMaskedLM"], "chat", "a bert model has no head for chat; it can do classification"),
        ("distilbert", [], "causal-lm", "has no head for causal-lm"),
        ("t5", ["T5ForConditionalGeneration"], "causal-lm", "a t5 model has no head for causal-lm; it can do seq2seq"),
        ("llama", ["LlamaForCausalLM"], "seq2seq", "a llama model has no head for seq2seq"),
        ("gpt2", ["GPT2LMHeadModel"], "causal-lm", None),
        ("llama", None, "classification", None),
    ],
)
def test_a_task_needs_a_head(kind, names, task, message):
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, architectures=names)
    if message is None:
        check_task(config, task)
    else:
        with pytest.raises(ValueError, match=message):
            check_task(config, task)


def test_the_learning_rate_follows_from_method_and_width():
    assert learning_rate("LORA", LlamaConfig(hidden_size=4096)) == pytest.approx(2e-4)
    assert learning_rate("LORA", LlamaConfig(hidden_size=2048)) == pytest.approx(4e-4)
    assert learning_rate("VERA", LlamaConfig(hidden_size=4096)) == pytest.approx(2e-3)
    assert learning_rate("PROMPT_TUNING", LlamaConfig(hidden_size=64)) == 0.3
    assert learning_rate("OSF", LlamaConfig(hidden_size=2048)) == pytest.approx(4e-4 / 16)
    known = {*TABLES.rates, *TABLES.factors}
    assert known <= {*METHODS} and len(known) == len(TABLES.rates) + len(TABLES.factors)
    assert all(0 < learning_rate(method, LlamaConfig()) < 1 for method in METHODS)


def test_a_device_that_is_not_here():
    with pytest.raises(ValueError, match="--device abacus cannot be used here"):
        device_of("abacus")
    with pytest.raises(ValueError, match="--device cuda:99 cannot be used here"):
        device_of("cuda:99")


def test_the_only_device_that_a_process_sees_is_its_first(monkeypatch):
    monkeypatch.setattr("torch.empty", lambda size, device: SimpleNamespace(device=device))
    assert device_of("cuda:3") == "cuda:3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert device_of("cuda:3") == "cuda"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--r 16", "r", 16),
        ("--lora_r=16", "r", 16),
        ("--target-modules q_proj", "target_modules", ["q_proj"]),
        ("--target_modules q_proj,v_proj", "target_modules", ["q_proj", "v_proj"]),
        ("--target_modules q_proj v_proj", "target_modules", ["q_proj", "v_proj"]),
        ("--target_modules [q_proj,v_proj]", "target_modules", ["q_proj", "v_proj"]),
        ("--target_modules all-linear", "target_modules", "all-linear"),
        (r"--target_modules .*\.(q|v)_proj{1,2}", "target_modules", r".*\.(q|v)_proj{1,2}"),
        ("--layers_to_transform 0,2", "layers_to_transform", [0, 2]),
        ("--rank_pattern {q_proj:4}", "rank_pattern", {"q_proj": 4}),
        ("--init_lora_weights false", "init_lora_weights", False),
        ("--init_lora_weights pissa_niter_4", "init_lora_weights", "pissa_niter_4"),
        ("--use_rslora", "use_rslora", True),
        ("--lr 1e-3", "lr", 1e-3),
        ("--lora_target all", "target_modules", "all-linear"),
        ("--warmup_ratio 0.1", "warmup_steps", 0.1),
        ("--evaluation_strategy epoch", "eval_strategy", "epoch"),
        ("--learning_rate=1e-3", "lr", 1e-3),
        ("--num_train_epochs 2", "epochs", 2),
        ("--no-packing", "packing", False),
        ("--packing", "packing", True),
        ("--columns text=body,label=class", "columns", {"text": "body", "label": "class"}),
        ("--data a.txt b.txt", "data", ["a.txt", "b.txt"]),
        ("--weight_decay 0.1", "weight_decay", 0.1),
    ],
)
def test_text_becomes_the_type_of_the_option(line, name, value):
    own, fields, trainer = read("train", line.replace("{q_proj:4}", "{q_proj:\t4}").split(" "))
    found = {**vars(own), **fields, **trainer}[name]
    assert found == value
    assert type(found) is type(value) or isinstance(value, int)


@pytest.mark.parametrize("text", ["", " a ", "# a", "'a'", "[a", "5", "true", "~", "{}", "a: b"])
def test_a_text_stays_as_it_stands(text):
    options, _, _ = read("generate", ["adapter", "--prompt", text])
    assert options.prompt == text


def test_a_name_is_that_of_the_method_then_of_the_command_then_of_the_trainer():
    from transformers import TrainingArguments

    own = {(m, name) for m, row in METHODS.items() for name in ALIASES.keys() & init_types(row.config_class).keys()}
    assert ("C3A", "block_size") in own
    for method, name in own:
        assert read("train", ["--method", method.lower(), f"--{name}", "4"])[1] == {name: 4}
    theirs = ALIASES.keys() & init_types(TrainingArguments).keys()
    assert {"learning_rate", "output_dir"} <= theirs
    for name in theirs - {"resume_from_checkpoint"}:  # which reads what a run has written
        known = init_types(COMMANDS["train"])[ALIASES[name]]
        value = "x" if known in (str, str | None) else "true" if known is bool else "1"
        options, fields, trainer = read("train", ["--weight_decay", "0.1", f"--{name}", value])
        assert trainer == {"weight_decay": 0.1} and not fields
        assert str(getattr(options, ALIASES[name])).lower() in (value, "1.0")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lora_alfa 16", "no option 'lora_alfa'. Did you mean 'lora_alpha'"),
        ("--max-step 3", "no option 'max_step'. Did you mean 'max_steps'"),
        ("--stage sft", "no option 'stage': the task follows from the data"),
        ("--r many", "r has to be int, got 'many'"),
        ("--use_rslora maybe", "unexpected argument 'maybe'"),
        ("--task chatt", "task has to be causal-lm or chat or .*, got 'chatt'"),
        ("16", "unexpected argument '16'"),
        ("--r", "--r needs a value"),
        ("--peft_type IA3", "no option 'peft_type'"),
        ("--method lorra", "unknown method 'lorra'. Did you mean 'lora'"),
        ("--weight-decay -1", "weight_decay must be non-negative, got -1"),
        ("--max-grad-norm -1", "max_grad_norm must be non-negative, got -1"),
        ("--adam-beta2 1", "adam_beta2 must be at least 0 and less than 1, got 1"),
        ("--per-device-eval-batch-size 0", "per_device_eval_batch_size must be a positive integer, got 0"),
        ("--lr-scheduler-kwargs num_cycles=2", "lr_scheduler_kwargs: a JSON object is needed"),
        ("--warmup-steps -1", "warmup_steps must be non-negative"),
        ("--config nowhere.yaml", "--config: there is no nowhere.yaml"),
        ("--resume --output nowhere", "--resume: there is no nowhere/train.yaml"),
    ],
)
def test_a_command_line_that_cannot_be_read(line, message):
    with pytest.raises(OptionError, match=message):
        read("train", line.split())


def test_yaml_and_command_line_make_one_run(tmp_path):
    path = tmp_path / "run.yaml"
    lines = ("method: vera", "learning_rate: 1e-3", "target_modules: [q_proj]", "d-initial: 0.2", "bf16:", "seed: 4")
    path.write_text("\n".join(lines))
    own, fields, trainer = read("train", ["--config", str(path), "--seed", "5"])
    assert settings_of(own, fields, trainer) == {
        "method": "vera", "lr": 1e-3, "target_modules": ["q_proj"], "d_initial": 0.2, "seed": 5,
    }  # fmt: skip
    for content, message in (
        ("- a", "a mapping"),
        ("lr: 1\nlearning_rate: 2", "lr is there twice"),
        ("confi: 1", "no option 'confi'"),
        ("a: [", "run.yaml"),
    ):
        path.write_text(content)
        with pytest.raises(OptionError, match=message):
            read("train", ["--config", str(path)])


def test_the_example_of_a_run_can_be_read():
    own, fields, _ = read("train", ["--config", str(EXAMPLES / "train_lora.yaml")])
    assert (own.max_steps, own.schedule, fields["r"]) == (200, "cosine", 16)


def test_every_option_has_a_line_of_help():
    for command, options in COMMANDS.items():
        missing = [name for name in init_types(options) if not re.search(rf"\n    {name}: \S.{{10}}", options.__doc__)]
        assert not missing, command


def test_help_shows_no_objects_of_python():
    asked = [("train", ["--fields", name.lower()]) for name in METHODS] + [(name, ["--help"]) for name in COMMANDS]
    for command, argv in asked:
        assert not re.search(r"<\w+ |0x[0-9a-f]", help_of(command, argv)), (command, argv)


def test_the_data_of_the_demo_has_one_form_and_not_its_questions():
    from peft.cli.demo import DATA

    task, rows = understand(read_records([str(DATA)]), {}, None)
    assert task == "chat"
    assert len(rows) > 200
    for where, row in rows:
        question, answer = row["messages"]
        assert question["content"] not in TABLES.demo["smollm2-135m"]["questions"], where
        assert [line.partition(":")[0] for line in answer["content"].split("\n")] == ["In short", "Why", "Check"], where
