"""`peft train` on images and speech, made on the spot, as `datasets` stores them."""

from __future__ import annotations

import io
import json
import os
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from peft.cli import main
from peft.cli.tasks import collator_for
from test_cli import losses, words, write_records
from tiny_models import byte_tokenizer, vit, whisper

RATE = 6400
#: as versions of transformers name it
QUERY = r".*\.(query|q_proj)"


def picture(level: int) -> dict:
    """A grey square as PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.full((12, 12, 3), level, np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def sound(pitch: int, rate: int = RATE) -> dict:
    """A tone of half a second as WAV, in two channels."""
    file = io.BytesIO()
    samples = (8000 * np.sin(np.arange(rate // 2) * pitch * 6.28 / rate)).astype("<i2")
    with wave.open(file, "wb") as out:
        out.setnchannels(2)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.stack([samples, samples], 1).tobytes())
    return {"bytes": file.getvalue(), "path": None}


def save_vit(folder: Path) -> None:
    vit(num_channels=3).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def save_whisper(folder: Path) -> None:
    whisper(vocab_size=300).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, chunk_length=1)
    extractor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_wav2vec2(folder: Path) -> None:
    small = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, mask_time_prob=0.0)
    small |= dict(layerdrop=0.5)  # in most steps a layer is left out
    small |= dict(conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, vocab_size=32)
    small |= dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, ctc_zero_infinity=True)
    torch.manual_seed(0)
    transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**small)).save_pretrained(folder)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "letters.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "letters.json"))
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)


#: task -> how its model is made, a record for a number, what is adapted
KINDS = {
    "image-classification": (
        save_vit, lambda i: {"image": picture(200 if i % 2 else 30), "label": i % 2}, QUERY,
    ),
    "speech": (save_whisper, lambda i: {"audio": sound(200 + 100 * (i % 3)), "text": "abc"[i % 3]}, "q_proj,v_proj"),
    "ctc": (save_wav2vec2, lambda i: {"audio": sound(300 * (1 + i % 2), 8000), "text": "ab"[i % 2]}, "q_proj,v_proj"),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """(task, a model for it, its data as a Parquet file)"""
    from datasets import Audio, ClassLabel, Dataset, Features, Image, Value

    pytest.importorskip("soundfile")
    folder = tmp_path_factory.mktemp(request.param)
    save, record, _ = KINDS[request.param]
    (folder / "base").mkdir()
    save(folder / "base")
    stored = {"image": Image(), "label": ClassLabel(names=["dark", "light"]), "text": Value("string")}
    rows = [record(i) for i in range(20)]
    features = Features({name: stored.get(name) or Audio(decode=False) for name in rows[0]})
    Dataset.from_list(rows).cast(features).to_parquet(str(folder / "data.parquet"))
    return request.param, folder / "base", folder / "data.parquet"


def train(model: Path, data: Path, output: Path, target: str, *more: object) -> int:
    few = ("--max-steps", 6, "--batch-size", 4, "--eval-split", 0.2, "--eval-steps", 3, "--device", "cpu", "--lr", 0.02)
    files = ("--model", model, "--data", data, "--output", output)
    return main(words("train", *files, *few, "--target_modules", target, *more))


def test_the_task_follows_from_data_and_model(kind, tmp_path, capsys):
    task, model, data = kind
    assert train(model, data, tmp_path / "run", KINDS[task][2]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{task} with lora on ")
    assert len(losses(tmp_path / "run", "eval_loss")) == 3
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any("lora_B" in name and tensor.any() for name, tensor in saved.items())
    assert list((tmp_path / "run").glob("*processor_config.json"))
    if task == "image-classification":
        assert "F1" in printed
        head = next(tensor for name, tensor in saved.items() if name.endswith("classifier.weight"))
        assert head.shape[0] == 2  # of the data; the model had three
    else:
        assert "word errors" in printed and all(rate >= 0 for rate in losses(tmp_path / "run", "eval_wer"))
        assert not any("lm_head" in name for name in saved)


def test_sounds_become_the_rate_of_the_model_and_labels_lose_what_it_puts_before_them():
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, chunk_length=1)
    collate = collator_for("speech", SimpleNamespace(feature_extractor=extractor), start=2)
    at_rate, doubled = (collate([{"audio": sound(200, rate), "labels": [2, 5, 1]}]) for rate in (RATE, 2 * RATE))
    assert at_rate["labels"].tolist() == [[5, 1]]
    difference = (at_rate["input_features"] - doubled["input_features"]).abs()
    assert difference.mean() < 0.1 * at_rate["input_features"].std()
    array = np.sin(np.arange(RATE // 2) * 200 * 6.28 / RATE) * 8000 / 32768
    one = {"audio": {"array": array, "sampling_rate": RATE}, "labels": [5]}
    decoded = collate([one, {"audio": sound(200), "labels": [5, 6]}])
    torch.testing.assert_close(decoded["input_features"][0], decoded["input_features"][1], rtol=0, atol=0.05)
    assert decoded["labels"].tolist() == [[5, -100], [5, 6]]


def test_images_in_folders_and_by_path(tmp_path, capsys):
    (tmp_path / "base").mkdir()
    save_vit(tmp_path / "base")
    rows = []
    for i in range(12):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(200 if i % 2 else 30)["bytes"])
        rows.append({"image": str(path), "label": "ab"[i % 2]})
    beside = [{**row, "image": os.path.relpath(row["image"], tmp_path)} for row in rows]
    write_records(tmp_path / "beside.jsonl", beside)
    write_records(tmp_path / "rows.jsonl", rows)
    for name, data in (("folder", "images"), ("paths", "rows.jsonl"), ("beside", "beside.jsonl")):
        data = tmp_path / data
        assert train(tmp_path / "base", data, tmp_path / name, QUERY, "--seed", 1) == 0
        labels = json.loads((tmp_path / name / "adapter_config.json").read_text())["modules_to_save"]
        assert labels == ["classifier"] and len(losses(tmp_path / name, "eval_loss")) == 3
    write_records(tmp_path / "rows.jsonl", [*rows, {"image": "nowhere.png", "label": "a"}])
    assert train(tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "no", QUERY) == 1
    assert "rows.jsonl, line 13: there is no file nowhere.png" in capsys.readouterr().err


def test_a_soft_prompt_is_for_text(kind, tmp_path, capsys):
    task, model, data = kind
    files = words("--model", model, "--data", data, "--output", tmp_path / "run")
    assert main(["train", "--method", "prompt-tuning", *files]) == 2
    assert f"soft prompts are for models that read text, not for {task}" in capsys.readouterr().err
