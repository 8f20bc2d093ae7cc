"""Writes docs/support.md, serving.md and methods/: what works on what, by trying it, and what tables and classes say.
The table of distributed.md comes from what a run of its tests has recorded.

python docs/generate.py            # write the pages
python docs/generate.py --check    # say which pages are not up to date
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
import yaml

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "src"), str(DOCS.parent / "tests")]

import file_sizes  # noqa: E402
from method_example import example  # noqa: E402

import peft  # noqa: E402
import test_conformance as cells  # noqa: E402
from peft.config import LayerConfig, PeftConfig, PromptLearningConfig  # noqa: E402
from peft.integrations.serving import ENGINES, FEATURES, REMEDIES  # noqa: E402
from peft.registry import METHODS  # noqa: E402
from peft.values import field_types  # noqa: E402

TEXTS: dict[str, dict[str, Any]] = yaml.safe_load((DOCS / "methods.yaml").read_text(encoding="utf-8"))
DISTRIBUTED, RECORD = DOCS / "distributed.md", DOCS.parent / "tests" / "data" / "distributed.json"
TABLE_BEGINS = "<!-- The table is written by `python docs/generate.py`, of what `make test-distributed` found. -->"
TABLE_ENDS = "<!-- end of the table -->"
BY_HAND = "<!-- Written by `python docs/generate.py`; do not edit. -->"
#: bases whose fields all methods of a kind have
COMMON = (PeftConfig, LayerConfig, PromptLearningConfig)


# ---- support.md


def _merges(method: str, kind: str) -> None:
    model = cells.adapted(method, kind)
    x = cells.inputs_of(model)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)


def _mixes(method: str, kind: str) -> None:
    model = cells.adapted(method, kind, names=("a", "b"))
    x = cells.inputs_of(model)
    mixed = model(x, adapter_names=["a", "__base__", "b", "a"])
    dim = model.get_base_model().batch_dim
    for row, name in ((0, "a"), (2, "b")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed.select(dim, row), model(x).select(dim, row), rtol=1e-3, atol=1e-4)


def _stacks(method: str, kind: str) -> None:
    model = cells.adapted(method, kind, names=("a", "b"))
    x = cells.inputs_of(model)
    alone = model(x)
    model.base_model.set_adapter(["a", "b"])
    assert not torch.allclose(model(x), alone)


def _converts(method: str, kind: str) -> None:
    model = cells.adapted(method, kind)
    x = cells.inputs_of(model)
    expected = model(x)
    config, tensors = peft.convert_to_lora(model, rank=0.9999, progressbar=False)
    lora = peft.get_peft_model(cells.build(kind), config).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    base = cells.build(kind)(x)
    assert (lora(x) - expected).norm() < 0.05 * (expected - base).norm()


#: letter -> what it stands for in a cell, and the attempt
TRIED: dict[str, tuple[str, Callable[[str, str], None]]] = {
    "M": ("merged into the weight, and taken out again bit for bit", _merges),
    "B": ("mixed batches: `adapter_names` gives each sample an adapter of its own", _mixes),
    "S": ("several adapters active at once", _stacks),
    "L": ("converted to a LoRA (`convert_to_lora`)", _converts),
}


#: the same for linear layers whose weights are quantised, by the tests of that
TRIED_QUANTISED: dict[str, tuple[str, Callable[[str, str], None]]] = {
    "T": ("the adapter has its effect, and alone gets gradients", cells.test_quantised_forward_and_gradients),
    "M": (
        "merged to the nearest that the storage can hold, and the old bytes put back",
        cells.test_quantised_weights_are_merged_to_the_nearest_and_unmerged_exactly,
    ),
    "B": ("mixed batches", cells.test_quantised_mixed_batch_is_each_alone),
}


def _quantised_table() -> list[str]:
    lines = [
        "## Quantised linear layers",
        "",
        "Tried in the same way; [quantisation.md](quantisation.md) has more on it.",
        "",
        *(f"- **{letter}**: {words}" for letter, (words, _) in TRIED_QUANTISED.items()),
        "",
        "| method | " + " | ".join(cells.STORAGES) + " |",
        "|---|" + "---|" * len(cells.STORAGES),
    ]
    for method in cells.WITH_LINEAR:
        row = [_letters(TRIED_QUANTISED, method, storage)[0] for storage in cells.STORAGES]
        lines.append(f"| {method} | " + " | ".join(" ".join(letters) or "no" for letters in row) + " |")
    return [*lines, ""]


def support_page() -> str:
    kinds = [kind for kind in cells.KINDS if kind not in ("Linear no bias", "MultiheadAttention sequence first")]
    notes: dict[str, int] = {}
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in cells.LAYER_METHODS:
            lines.append(f"| {method} | " + " | ".join(_cell(method, kind, notes) for kind in kinds) + " |")
        quantised = _quantised_table()
    return "\n".join(
        [
            BY_HAND,
            "# What works on what",
            "",
            "Each cell was tried on a small model when this page was written: the method on a module of that kind, with"
            " an adapter that has an effect.",
            "",
            *(f"- **{letter}**: {words}" for letter, (words, _) in TRIED.items()),
            "- a number: the note below says why something is not there",
            "",
            "| method | " + " | ".join(kinds) + " |",
            "|---|" + "---|" * len(kinds),
            *lines,
            "",
            *(f"{number}. {note}" for note, number in notes.items()),
            "",
            *quantised,
            "## Methods that do not change a weight",
            "",
            "| method | merge, mixed batch, conversion |",
            "|---|---|",
            *(f"| {name} | {why} |" for name, why in _elsewhere()),
            "",
        ]
    )


def _elsewhere() -> Iterator[tuple[str, str]]:
    why = {
        "POLY": "no: each task has a weight of its own; `task_ids` says what each sample gets",
        "ADAPTION_PROMPT": "no: it acts inside attention",
        "XLORA": "no: each token has a weight of its own",
    }
    for name, row in METHODS.items():
        if row.prompt or name in cells.ELSEWHERE:
            yield name, why.get(name, "no: no weight changes, and all samples of a batch get the same prompt")


def _cell(method: str, kind: str, notes: dict[str, int]) -> str:
    if (method, kind) not in cells.SUPPORTED:
        return _note(_why_not(method, kind), notes)
    letters, reasons = _letters(TRIED, method, kind)
    return " ".join([*letters, *(_note(reason, notes) for reason in reasons)])


def _letters(tried: dict[str, tuple[str, Callable[[str, str], None]]], method: str, kind: str) -> tuple[str, list[str]]:
    """What works, and why the rest does not."""
    letters, reasons = "", []
    for letter, (_, attempt) in tried.items():
        try:
            attempt(method, kind)
        except (NotImplementedError, ValueError, TypeError, AssertionError) as error:
            reasons.append(f"{letter}: {_first_sentence(str(error)) or 'another outcome'}")
        else:
            letters += letter
    return letters, reasons


def _why_not(method: str, kind: str) -> str:
    if kind == "LayerNorm":
        return "A norm's weight is a vector, which has no rank and no blocks: LN tuning trains it in full."
    if method == "TRAINABLE_TOKENS":
        return "Only embeddings and output layers have a row for each token."
    try:
        peft.get_peft_model(cells.build(kind), cells.config_for(method, kind))
    except (ValueError, TypeError, NotImplementedError) as error:
        return _first_sentence(str(error))
    return f"{METHODS[method.split()[0]].config_class.__name__} is not meant for it."


def _first_sentence(text: str) -> str:
    text = re.sub(r"'target[\w.]*'(, (which is )?an? \w+)?", "modules of this kind", text.strip().split("\n")[0])
    return re.split(r"(?<=[.;])\s", text)[0].rstrip(";:. ") + "."


def _note(reason: str, notes: dict[str, int]) -> str:
    return f"({notes.setdefault(reason, len(notes) + 1)})"


# ---- serving.md


def serving_page() -> str:
    reasons: dict[str, int] = {}
    titles = " | ".join(engine.title for engine in ENGINES.values())
    lines = [f"| an adapter with | {titles} |", "|---" * (len(ENGINES) + 1) + "|"]
    for key, feature in FEATURES.items():
        row = [f"| {feature.title}"]
        for engine in ENGINES.values():
            answer = engine.answers[key]
            why = f"{answer.why}: {REMEDIES[answer.remedy]}." if answer.remedy else ""
            row.append(f"{answer.verdict} {_note(why, reasons)}" if why else answer.verdict)
        lines.append(" | ".join(row) + " |")
    intro = (
        "Engines read adapters with code of their own. What an adapter may have they *take*, *refuse* with an error, or"
        " load without a word to compute something else (*differs*). The numbers say why, and what to do."
        " [Serving](tasks/serving.md) has the commands, and how to ask about one adapter."
    )
    notes = [f"{number}. {why}" for why, number in reasons.items()]
    notes += ["", "Read from:", "", *(f"- {engine.title}: {engine.read}" for engine in ENGINES.values()), ""]
    return "\n".join([BY_HAND, "# What serving engines take", "", intro, "", *lines, "", *notes])


# ---- methods/


def arguments_of(config_class: type) -> dict[str, str]:
    """What a docstring says of each field."""
    texts: dict[str, str] = {}
    block = (inspect.getdoc(config_class) or "").partition("Args:\n")[2]
    names: list[str] = []
    for line in block.split("\n"):
        if line and not line.startswith(" "):
            break
        found = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if found:
            names = found[1].split(", ")
            texts.update(dict.fromkeys(names, found[2]))
        elif line.strip():
            texts.update({name: f"{texts[name]} {line.strip()}" for name in names})
        else:
            names = []
    return texts


def about(config_class: type) -> str:
    """The docstring's text without its lists of arguments and errors."""
    text = inspect.getdoc(config_class) or ""
    return re.sub(r"^(Args|Raises):\n(    .*\n?|\n)*", "", text, flags=re.MULTILINE).strip()


def field_table(config_class: Any, leave_out: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    kinds = field_types(config_class)
    texts: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if "__doc__" in base.__dict__ and base is not object:
            texts.update(arguments_of(base))
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(config_class):
        if field.name in leave_out:
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        default = getattr(default, "value", default)
        kind = kinds[field.name]
        spelled = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
        spelled = re.sub(r"\b(typing|peft[\w.]*)\.", "", spelled).replace("|", "\\|")
        idle = field.name in getattr(config_class, "idle", ())
        meaning = "LoRA's, without effect" if idle else texts.get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{field.name}` | {spelled} | `{default!r}` | {meaning} |")
    return lines


class Llama7B:
    """The shape of Llama-2-7B without memory, to count on."""

    def __init__(self) -> None:
        import transformers

        with torch.device("meta"):
            self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(use_cache=False))

    def count(self, method: str) -> tuple[int, str] | None:
        """How many values an adapter of the defaults trains, and where it goes."""
        settings = dict(TEXTS.get(method, {}).get("settings", {}))
        config_class = METHODS[method].config_class
        if method == "XLORA":
            return None
        try:
            config = config_class(task_type="CAUSAL_LM", **settings)
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = peft.get_peft_model(self.model, config)
        except Exception as error:  # a method that needs more than settings has no count
            print(f"no count for {method}: {error}", file=sys.stderr)
            return None
        trained = model.get_nb_trainable_parameters()[0]
        targets = getattr(model.peft_config["default"], "target_modules", None)
        self.model = model.base_model if METHODS[method].prompt else model.base_model.unload()
        self.model.requires_grad_(True)
        names = sorted(targets) if isinstance(targets, (set, list)) else []
        where = ", ".join(f"`{name}`" for name in names if not name.isdigit())  # numbers are blocks, of which all are
        return trained, where


def method_page(method: str, count: tuple[int, str] | None) -> str:
    config_class = METHODS[method].config_class
    text = TEXTS.get(method, {})
    papers = re.findall(r"arXiv:(\d{4}\.\d{5})", config_class.__doc__ or "")
    kept = {"num_virtual_tokens"} if METHODS[method].prompt else set()
    inherited = {field.name for base in COMMON for field in fields(base)} - kept
    lines = [BY_HAND, f"# {text.get('name', method)}", "", about(config_class), ""]
    if text.get("use"):
        lines += ["## When to use it", "", text["use"], ""]
    lines += ["## In code", "", example(method, METHODS[method].config_class.__name__, text), ""]
    if count is not None:
        settings = ", ".join(f"{name}={value!r}" for name, value in text.get("settings", {}).items())
        with_settings = f" with `{settings}`" if settings else ""
        on = f", on {count[1]}" if count[1] else ""
        share = f"{100 * count[0] / 6_738_415_616:.3g} %"
        size = f"{count[0]:,} trained values on Llama-2-7B ({share}), by default{with_settings}{on}."
        lines += ["## Size", "", size, ""]
    elif "size" in text:
        lines += ["## Size", "", text["size"], ""]
    has = f"`{config_class.__name__}` has the [common fields](README.md#common-fields), and:"
    lines += ["## Fields", "", has, "", *field_table(config_class, inherited), ""]
    if papers:
        lines += ["## Paper", "", *(f"- [arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers), ""]
    return "\n".join(lines)


def index_page(counts: dict[str, tuple[int, str] | None]) -> str:
    lines = [
        BY_HAND,
        "# The methods",
        "",
        *_GUIDE,
        "",
        "| method | values on 7B | merges | when |",
        "|---|---|---|---|",
    ]
    for method, row in METHODS.items():
        text = TEXTS.get(method, {})
        number = counts.get(method)
        size = f"{number[0]:,}" if number else ""
        merges = "no" if row.prompt or method in cells.ELSEWHERE else "yes"
        first = text.get("use", about(row.config_class).split("\n")[0]).split(". ")[0].rstrip(".")
        lines.append(f"| [{text.get('name', method)}]({page_name(method)}) | {size} | {merges} | {first}. |")
    lines += ["", "## Files", "", _FILES, ""]
    names = {method: f"[{TEXTS.get(method, {}).get('name', method)}]({page_name(method)})" for method in METHODS}
    lines += file_sizes.table(names, {method: text.get("settings", {}) for method, text in TEXTS.items()})
    lines += ["", "## Common fields", "", "Every configuration has:", "", *field_table(PeftConfig), ""]
    base = {field.name for field in fields(PeftConfig)}
    lines += ["Those of methods that adapt layers have:", "", *field_table(LayerConfig, base), ""]
    lines += ["Those of soft prompts have:", "", *field_table(PromptLearningConfig, base), ""]
    return "\n".join(lines)


_GUIDE = (
    "Begin with LoRA. Take another method for a reason: fewer values to store (VeRA, VB-LoRA, FourierFT, (IA)³),"
    " weights that are turned rather than shifted (OFT, BOFT, HRA), a change of full rank (RandLoRA, SHiRA), a model"
    " that may not be touched (the soft prompts), tasks that are told apart (Poly, multitask prompt tuning)."
    " [What works on what](../support.md) says on which kinds of module.",
    "",
    "Sizes are those of an adapter with the default settings on Llama-2-7B, which adapt the query and value projections"
    " in most methods.",
)


_FILES = (
    "An adapter on a model of the shape of SmolLM2-135M (its default targets and settings, float32). The smallest file"
    " is that of `save_pretrained(folder, minimal=True)`: what comes from a seed or from the base weights is left out,"
    " made again in loading, and checked. huggingface/peft reads it where the method has a field for that"
    " (`save_projection`, `save_precomputed_indices`). Saving what was loaded gives the default file again; so does"
    " `peft convert`.\n\n"
    "Default files have what huggingface/peft's have, name for name. Of the methods whose layers share tensors,"
    " RandLoRA"
    " (its bases, where `save_projection` stores them) and Lily (its factors) therefore write these once a layer."
    " Tried: huggingface/peft gets the same outputs, bit for bit, from files that have them once, but warns that keys"
    " are"
    " missing, and returns these as missing from `load_adapter`, as it does of a damaged file; and in the safetensors"
    " format two names cannot stand for the same bytes. The others write what they share once as it is: FRoD, PVeRA,"
    " TinyLoRA, Uni-LoRA, VB-LoRA, VeRA. Layers of SHiRA, Super-tuning, OSF and AdaMSS share nothing: their entries,"
    " directions and clusters are each layer's own."
)


def page_name(method: str) -> str:
    return f"{method.lower()}.md"


# ---- distributed.md


def distributed_page() -> str:
    """The page with its table anew, of what `make test-distributed` has recorded; the rest is written by hand."""
    record: dict[str, dict[str, str]] = json.loads(RECORD.read_text(encoding="utf-8"))
    methods = sorted({method for found in record.values() for method in found})
    notes: dict[str, int] = {}
    lines = ["| method | " + " | ".join(record) + " |", "|---|" + "---|" * len(record)]
    for method in methods:
        cells_ = [found.get(method, "") for found in record.values()]  # empty: not tried
        row = [cell if cell in ("", "yes") else _note(_why(cell), notes) for cell in cells_]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    tried = [cell for found in record.values() for cell in found.values()]
    lines += ["", f"{len(tried)} cells tried, {tried.count('yes')} as in one process; the others:", ""]
    lines += [*(f"{number}. {note}" for note, number in notes.items()), ""]
    page = DISTRIBUTED.read_text(encoding="utf-8")
    head, tail = page.split(TABLE_BEGINS)[0], page.split(TABLE_ENDS)[1]
    return head + TABLE_BEGINS + "\n" + "\n".join(lines) + TABLE_ENDS + tail


def _why(cell: str) -> str:
    """What is said of a cell that does not hold, without names and numbers that differ from method to method."""
    return re.sub(r"'\w+\.[\w.]*'", "a module", cell.split("\n")[0])


def pages(support: bool = True, methods: bool = True) -> dict[Path, str]:
    """All generated pages by their path."""
    made: dict[Path, str] = {}
    made[DISTRIBUTED] = distributed_page()
    if support:
        made[DOCS / "support.md"] = support_page()
    if methods:
        llama = Llama7B()
        counts = {method: llama.count(method) for method in METHODS}
        made[DOCS / "serving.md"] = serving_page()
        made |= {DOCS / "methods" / page_name(method): method_page(method, counts[method]) for method in METHODS}
        made[DOCS / "methods" / "README.md"] = index_page(counts)
    return made


def stale(made: dict[Path, str]) -> list[str]:
    """Names of the pages that are not as they should be."""
    has_methods = any(path.parent.name == "methods" for path in made)
    old = set((DOCS / "methods").glob("*.md")) - set(made) if has_methods else set()
    wrong = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    return sorted(str(path.relative_to(DOCS)) for path in {*wrong, *old})


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the pages of docs that come from the code.")
    parser.add_argument("--check", action="store_true", help="say which pages are not up to date, and change nothing")
    made = pages()
    if parser.parse_args().check:
        sys.exit(f"Not up to date: {', '.join(stale(made))}. Run `python docs/generate.py`." if stale(made) else 0)
    for path in (DOCS / "methods").glob("*.md"):
        path.unlink()
    for path, text in made.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
