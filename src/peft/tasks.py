"""One class per task: which heads are trained with an adapter, and where a soft prompt goes in its inputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from peft.core.call import cached_tokens
from peft.core.model_config import cache_in, take_cache
from peft.core.undo import replaced
from peft.errors import warn
from peft.model import TASK_CLASSES, PeftModel
from peft.tuners.prompts.base import lengthen

_COMMON = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")


@functools.cache
def _signature(arguments: tuple[str, ...]) -> inspect.Signature:
    """`(self, <arguments, each None if not given>, **kwargs)`."""
    parameter, kind = inspect.Parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = (parameter(name, kind, default=None) for name in arguments)
    return inspect.Signature([parameter("self", kind), *named, parameter("kwargs", parameter.VAR_KEYWORD)])


def _with_arguments(forward: Callable[..., Any], arguments: tuple[str, ...]) -> Callable[..., Any]:
    """`forward`, saying which arguments it has: trainers and pipelines look which columns a model takes."""

    @functools.wraps(forward)
    def forward_of_task(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    forward_of_task.__signature__ = _signature(arguments)  # type: ignore[attr-defined]
    return forward_of_task


class TaskModel(PeftModel):
    """Base of the classes below.

    Adapters on layers leave the forward pass as the base model has it. A soft prompt goes before the tokens of the
    input; outputs with one entry per token have those of the virtual tokens first.
    """

    takes_prompts = True
    #: the arguments of `forward`, in order
    arguments: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "inputs_embeds", "labels", *_COMMON)
    #: labels with one entry per token
    labels_by_token: ClassVar[tuple[str, ...]] = ()
    #: labels that are positions in the input
    labelled_positions: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, task: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            TASK_CLASSES[task] = cls
        if inspect.unwrap(cls.forward) is TaskModel.forward:
            cls.forward = _with_arguments(TaskModel.forward, cls.arguments)  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass, with the active adapter.

        Args:
            args: positional arguments, in the order of `arguments`; in the base model's own order if that does not
                take the first of these, `input_ids`.
            kwargs: whatever the base model takes; `adapter_names` for a mixed batch; `task_ids` for methods that
                tell tasks apart.

        Raises:
            TypeError: an argument is given twice, or there are too many.
        """
        base = self.get_base_model()
        if args and (self.prompt_active or self.arguments[0] in inspect.signature(base.forward).parameters):
            given = _signature(self.arguments).bind(self, *args, **kwargs).arguments
            args, kwargs = (), {name: given[name] for name in self.arguments if name in given} | given.get("kwargs", {})
        with self._passing():
            if not self.prompt_active:
                return super().forward(*args, **kwargs)
            with self.routed((), kwargs):
                inputs = self._prompted(kwargs)
                with self._prompt.around(self.base_model, inputs):
                    output = self._run(inputs, kwargs.get("input_ids"))
                return self._prompt.finish(output, inputs.get("labels"), kwargs)

    def _prompted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.with_prompt(inputs, self.labels_by_token, self.labelled_positions)

    def _run(self, inputs: dict[str, Any], input_ids: Tensor | None) -> Any:
        """The base model's forward pass; `input_ids` as they were before the prompt took their place."""
        return self.base_model(**inputs)


class PeftModelForSequenceClassification(TaskModel, task="SEQ_CLS"):
    """A classifier of whole texts; `classifier` or `score` is trained with the adapter."""

    heads = ("classifier", "score")

    def _run(self, inputs: dict[str, Any], input_ids: Tensor | None) -> Any:
        # Decoders (their heads are called `score`) judge by the last token that is not padding, which they find in the
        # ids: so they get ids, with any for the virtual tokens, and the vectors where those are looked up.
        if input_ids is None or "inputs_embeds" not in inputs or not hasattr(self.base_model, "score"):
            return super()._run(inputs, input_ids)
        vectors = inputs.pop("inputs_embeds")
        config = getattr(self.base_model, "config", None)
        any_id = 1 if getattr(config, "pad_token_id", None) == 0 else 0
        ids = pad(input_ids, (vectors.shape[1] - input_ids.shape[1], 0), value=any_id)

        def look_up(*_: Any) -> Tensor:
            hook.remove()
            return vectors

        hook = self.word_embeddings.register_forward_hook(look_up)
        try:
            return self.base_model(input_ids=ids, **inputs)
        finally:
            hook.remove()


class PeftModelForTokenClassification(TaskModel, task="TOKEN_CLS"):
    """A classifier of tokens; `classifier` or `score` is trained with the adapter. Labels go by token."""

    heads = ("classifier", "score")
    labels_by_token = ("labels",)


class PeftModelForQuestionAnswering(TaskModel, task="QUESTION_ANS"):
    """Finds an answer in a text; `qa_outputs` is trained with the adapter.

    With a soft prompt of n virtual tokens, logit n + i belongs to token i; `start_positions` and `end_positions` count
    tokens of the input.
    """

    heads = ("qa_outputs",)
    arguments = (
        "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds",
        "start_positions", "end_positions", *_COMMON,
    )  # fmt: skip
    labelled_positions = ("start_positions", "end_positions")


class PeftModelForFeatureExtraction(TaskModel, task="FEATURE_EXTRACTION"):
    """A model whose hidden states are the result."""

    arguments = ("input_ids", "attention_mask", "inputs_embeds", *_COMMON)


class GeneratingModel(TaskModel):
    """Base of the tasks that generate text."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with the active adapter; with a soft prompt, the result has no virtual tokens.

        Args:
            args: as the base model takes them.
            kwargs: whatever the base model takes; `adapter_names` for a mixed batch; `task_ids` for methods that
                tell tasks apart.
        """
        with self._passing():
            if not self.prompt_active:
                return super().generate(*args, **kwargs)
            with self.routed(args, kwargs):
                return self._generate_with_prompt(*args, **kwargs)

    def _generate_with_prompt(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if kwargs.pop("position_ids", None) is not None:
            warn("position_ids are ignored: with a soft prompt, generate counts itself.")
        with self._prompted_steps(task_ids):
            return self.base_model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the base model's next forward pass gets during generation, the soft prompt included."""
        prepare = self.base_model.prepare_inputs_for_generation
        if not self.prompt_active:
            return prepare(*args, **kwargs)
        return self._prepare_step(prepare, kwargs.pop("task_ids", None), *args, **kwargs)

    @contextmanager
    def _prompted_steps(self, task_ids: Tensor | None) -> Iterator[None]:
        """For a while, the base model generates with the soft prompt."""
        prepare = self.base_model.prepare_inputs_for_generation
        tokens = self._prompt.num_virtual_tokens

        # `wraps` lets transformers see which arguments the base model takes.
        @functools.wraps(prepare)
        def prepare_step(input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
            return self._prepare_step(prepare, task_ids, input_ids, **kwargs)

        # A cache of fixed length needs room for the virtual tokens: the fifth argument is its length.
        make_cache: Any = getattr(self.base_model, "_prepare_cache_for_generation", None)

        def make_longer_cache(*args: Any, **kwargs: Any) -> Any:
            return make_cache(*args[:4], args[4] + tokens, *args[5:], **kwargs)

        room = replaced(self.base_model, "_prepare_cache_for_generation", make_longer_cache)
        with (
            replaced(self.base_model, "prepare_inputs_for_generation", prepare_step),
            nullcontext() if make_cache is None else room,
        ):
            yield

    def _prepare_step(
        self, prepare: Callable[..., dict[str, Any]], task_ids: Tensor | None, input_ids: Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        """The base model's own preparation, made to believe that the virtual tokens are tokens like others: they stand
        in its inputs as padding, so that what it slices and masks has the right length, and are put in afterwards."""
        prompt, batch = self._prompt, input_ids.shape[0]
        side = "decoder_" if self._encodes_first else ""
        ids, vectors, tokens = f"{side}input_ids", f"{side}inputs_embeds", prompt.num_virtual_tokens
        if kwargs.get("use_cache") is False:
            take_cache(kwargs)  # a prompt of keys and values comes back from the step before
        seen = cached_tokens(cache_in(kwargs))
        filled = tokens if prompt.adds_tokens and not seen else 0
        mask = kwargs.get(f"{side}attention_mask")
        length = tokens + (input_ids if mask is None else mask).shape[1]
        if kwargs.get("next_sequence_length") is not None and prompt.adds_tokens:
            kwargs["next_sequence_length"] = length - seen
        if kwargs.get("cache_position") is not None and prompt.adds_tokens:  # older transformers
            kwargs["cache_position"] = torch.arange(seen, length, device=input_ids.device)
        prompt.make_room(kwargs, batch, seen, side)
        if kwargs.get(vectors) is not None:
            kwargs[vectors] = pad(kwargs[vectors], (0, 0, filled, 0))
        inputs = prepare(pad(input_ids, (filled, 0)), **kwargs)
        # Positions count as in `forward`, where models tell them from the mask, if at all: transformers would have the
        # padding of a batch share them, and makes a mask of four dimensions for some caches.
        positions = f"{side}position_ids"
        if prompt.adds_tokens:
            inputs.pop(positions, None)
        elif inputs.get(positions) is not None:  # which older transformers cut beside a cache alone
            read = inputs[vectors] if inputs.get(ids) is None else inputs[ids]
            inputs[positions] = inputs[positions][..., -read.shape[1] :]
        if f"{side}attention_mask" in inputs and mask is not None:
            inputs[f"{side}attention_mask"] = kwargs[f"{side}attention_mask"]
        if not prompt.adds_tokens:
            inputs.pop("cache_position", None)
        if not seen:
            for name in (ids, vectors):
                if inputs.get(name) is not None:
                    inputs[name] = inputs[name][:, filled:]
            if task_ids is not None:  # beams stand next to each other
                task_ids = task_ids.repeat_interleave(batch // task_ids.shape[0], dim=0)
            prompt.insert(inputs, prompt.prompt(batch, task_ids), self._prompted_embeddings(prompt, side), side)
        return inputs


class PeftModelForCausalLM(GeneratingModel, task="CAUSAL_LM"):
    """A language model that continues texts. Labels go by token."""

    labels_by_token = ("labels",)


class PeftModelForSeq2SeqLM(GeneratingModel, task="SEQ_2_SEQ_LM"):
    """An encoder-decoder that turns texts into texts. A soft prompt goes before the encoder's input."""

    arguments = (
        "input_ids", "attention_mask", "inputs_embeds",
        "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels", *_COMMON,
    )  # fmt: skip

    def _prompted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        task_ids = inputs.get("task_ids")
        inputs = super()._prompted(inputs)
        prompt = self._prompt
        if not prompt.prompts_decoder:
            return inputs
        given = [name for name in ("decoder_input_ids", "decoder_inputs_embeds") if inputs.get(name) is not None]
        if not given and inputs.get("labels") is not None:
            inputs["decoder_input_ids"] = self.base_model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
        batch = inputs["inputs_embeds"].shape[0]
        lengthen(inputs, "labels", prompt.labels(batch))
        prompt.make_room(inputs, batch, 0, "decoder_")
        prompt.insert(inputs, prompt.prompt(batch, task_ids), self._prompted_embeddings(prompt, "decoder_"), "decoder_")
        return inputs

    def _generate_with_prompt(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if not self._prompt.adds_tokens:
            return super()._generate_with_prompt(*args, task_ids=task_ids, **kwargs)
        ids = kwargs.pop("inputs", None) if not args else args[0]
        if ids is not None:
            kwargs["input_ids"] = ids
        if kwargs.pop("encoder_outputs", None) is not None:
            warn("encoder_outputs are ignored: they were made without the soft prompt.")
        kwargs = self.with_prompt({**kwargs, "task_ids": task_ids})
        if self._prompt.prompts_decoder:
            return super()._generate_with_prompt(None, *args[1:], task_ids=task_ids, **kwargs)
        return self.base_model.generate(None, *args[1:], **kwargs)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING = TASK_CLASSES
