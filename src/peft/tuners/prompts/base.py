"""Soft prompts: trained virtual tokens in front of the input, and what a model needs to hold several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.core import tensor_parallel
from peft.core.call import cached_tokens
from peft.core.model_config import MODEL_CONFIG_NAMES, cache_in, embeddings_of, read_model_config
from peft.core.storage import onloaded, place_of
from peft.core.storage.gradients import keep_open
from peft.core.storage.sharded import agree, average_gradients, call_whole
from peft.core.storage.shared import gathered, put, shape_of
from peft.core.undo import as_before, undone_on_error
from peft.registry import TaskType, method_of

#: inputs with one entry per token, for which 0 is a good entry for a virtual token
TYPES_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
#: positions of labelled entries that a loss leaves out, as `torch.nn.functional.cross_entropy` has it
IGNORED = -100


def find_word_embeddings(model: nn.Module) -> nn.Module:
    """The module that turns token ids into vectors: what `get_input_embeddings` names, else the `nn.Embedding` with
    as many rows as `config.vocab_size`, else the only `nn.Embedding` there is.

    Raises:
        ValueError: none of these.
    """
    found = embeddings_of(model)
    if found is not None and embedding_width(found) is not None:
        return found
    embeddings = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    vocabulary = read_model_config(model, "vocab_size")
    matching = [module for module in embeddings.values() if vocabulary in (None, module.num_embeddings)]
    if len(matching) == 1 or (matching and vocabulary is not None):
        return matching[0]
    raise ValueError(
        f"Cannot tell the word embeddings of {type(model).__name__}, which a soft prompt stands beside: it has no"
        f" get_input_embeddings(), config.vocab_size is {vocabulary}, and its embeddings are"
        f" {', '.join(f'{name} ({module.num_embeddings})' for name, module in embeddings.items()) or 'none'}."
    )


def embedding_width(embeddings: nn.Module) -> int | None:
    """Width of the vectors that word embeddings give; None for a module that is no table of vectors."""
    weight = getattr(embeddings, "weight", None)
    shape = () if weight is None else shape_of(weight)
    return getattr(embeddings, "embedding_dim", shape[1] if len(shape) == 2 else None)


def lengthen(inputs: dict[str, Any], name: str, front: Tensor) -> None:
    """Puts `front` [batch, tokens] before the input `name` [batch, length], where it is given.

    Raises:
        ValueError: the input has another shape.
    """
    value = inputs.get(name)
    if value is None:
        return
    if not isinstance(value, Tensor) or value.ndim != 2:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"With a soft prompt, {name} must have the shape [batch, length]; got {shape}.")
    inputs[name] = torch.cat((front.to(value), value), dim=1)


class VirtualTokens(nn.Module):
    """Base of the soft prompts: makes the vectors of the virtual tokens and puts them into a model's inputs.

    As it is, the prompt is a table `embedding` [tokens, token_dim] that goes before the token embeddings; a method
    says what else it does by overriding attributes and methods. The number of tokens is `num_virtual_tokens` times
    `num_transformer_submodules`: an encoder-decoder has a prompt for each.

    Args:
        config: the configuration, with all its shapes filled in.
        word_embeddings: the base model's, for starting from tokens.
    """

    #: whether the model sees a longer sequence; not so where the prompt is keys and values that attention reads
    adds_tokens: ClassVar[bool] = True
    #: whether an encoder-decoder's decoder gets its half of the prompt too
    prompts_decoder: ClassVar[bool] = False
    #: whether tensors of its modules are read, rather than the modules called
    reads_weights: ClassVar[bool] = False
    #: tensors that are stored beside the prompt, under their own names
    stored_beside: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None):
        super().__init__()
        self.num_virtual_tokens: int = config.num_virtual_tokens
        self.embedding = nn.Embedding(config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim)

    @classmethod
    def shapes(cls, config: PromptLearningConfig, model: nn.Module, word_embeddings: nn.Module) -> dict[str, Any]:
        """The fields of `config` that say how the prompt fits the base model: those given, and the rest as read from
        the model. Where nothing is known they stay None.

        Raises:
            ValueError: the prompt cannot fit.
        """
        found: dict[str, Any] = {field: read_model_config(model, field) for field in MODEL_CONFIG_NAMES}
        found["num_transformer_submodules"] = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
        width = embedding_width(word_embeddings)
        if cls.adds_tokens:
            # Not always the hidden size: some models project their embeddings.
            found["token_dim"] = width
            if config.token_dim not in (None, width):
                raise ValueError(f"token_dim={config.token_dim}, but word embeddings are {width} wide; leave it out.")
        given = {field: getattr(config, field) for field in found if getattr(config, field) is not None}
        return {**found, **given}

    @classmethod
    def build(cls, config: PromptLearningConfig, model: nn.Module, word_embeddings: nn.Module) -> VirtualTokens:
        """The prompt for a base model."""
        return cls(config, word_embeddings)

    def forward(self, indices: Tensor) -> Tensor:
        """Vectors [..., token_dim] of the virtual tokens with these indices."""
        return self.embedding(indices)

    @property
    def indices(self) -> Tensor:
        """Indices of all virtual tokens."""
        return torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)

    def prompt(self, batch_size: int, task_ids: Tensor | None = None, **options: Any) -> Any:
        """The prompt of each sample: vectors [batch, tokens, token_dim], or what `insert` takes instead.

        Args:
            batch_size: number of samples.
            task_ids: [batch], which task each is, for methods that tell tasks apart.
            options: what a method's own `get_prompt` may take further.
        """
        return self(self.indices[None]).expand(batch_size, -1, -1)

    def insert(self, inputs: dict[str, Any], prompt: Any, embed: nn.Module, side: str = "") -> None:
        """Puts the prompt into the keyword arguments of a model's forward pass, in place.

        Args:
            inputs: with `<side>input_ids` or `<side>inputs_embeds`.
            prompt: as `prompt` gives it.
            embed: the word embeddings of that side.
            side: `""`, or `"decoder_"` for the decoder of an encoder-decoder.
        """
        ids, vectors = inputs.pop(f"{side}input_ids", None), inputs.get(f"{side}inputs_embeds")
        vectors = call_whole(embed, ids) if vectors is None else vectors
        count = self.num_virtual_tokens
        own = prompt[:, count:] if side else prompt[:, :count]
        inputs[f"{side}inputs_embeds"] = torch.cat((own.to(vectors), vectors), dim=1)

    def make_room(self, inputs: dict[str, Any], batch_size: int, seen: int, side: str = "") -> None:
        """Fits the inputs that accompany the tokens to a sequence with the virtual tokens in front, in place.

        Args:
            inputs: the keyword arguments of a model's forward pass.
            batch_size: number of samples.
            seen: tokens in the cache; if there are any, the virtual tokens are among them.
            side: `""`, or `"decoder_"` for the decoder of an encoder-decoder.
        """
        lengthen(inputs, f"{side}attention_mask", self.mask(batch_size))
        longer = self.adds_tokens and not seen
        for name in TYPES_OF_TOKENS if longer and not side else ():
            lengthen(inputs, name, torch.zeros(batch_size, self.num_virtual_tokens))
        given = inputs.get(f"{side}position_ids")
        if given is not None:
            front = given.amin(-1, keepdim=True) + torch.arange(self.num_virtual_tokens, device=given.device)
            moved = given + self.num_virtual_tokens
            inputs[f"{side}position_ids"] = torch.cat((front, moved), dim=-1) if longer else moved

    def mask(self, batch_size: int) -> Tensor:
        """[batch, num_virtual_tokens]: 1 for each virtual token that attention may see."""
        return torch.ones(batch_size, self.num_virtual_tokens, dtype=torch.long)

    def around(self, model: nn.Module, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """What a forward pass of the base model with these arguments, the prompt among them, runs in."""
        return nullcontext()

    def labels(self, batch_size: int) -> Tensor:
        """[batch, num_virtual_tokens]: what stands before the labels, where they go by token."""
        return torch.full((batch_size, self.num_virtual_tokens), IGNORED)

    def finish(self, output: Any, labels: Tensor | None, given: dict[str, Any]) -> Any:
        """What to make of the base model's output; `labels` as the base model saw them, `given` the user's inputs."""
        return output

    def rows_to_save(self) -> Tensor:
        """What a file stores as `prompt_embeddings`: the prompt, ready for use."""
        return self.forward(self.indices).detach().cpu()

    def stored_tensors(self) -> dict[str, Tensor]:
        """The tensors that a file's are copied into, by the names they have there."""
        beside = {name: getattr(self, name) for name in self.stored_beside}
        return {"prompt_embeddings": self.embedding.weight, **beside}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes in tensors of a file, of the shapes and by the names of `stored_tensors`."""
        own = self.stored_tensors()
        for name, value in tensors.items():
            put(own[name], value)


class PromptHost(nn.Module):
    """What a `PeftModel` knows of soft prompts: its encoders by adapter name, and how a prompt gets into the inputs."""

    base_model: Any
    peft_config: dict[str, Any]
    prompt_encoder: nn.ModuleDict
    #: whether the forward pass knows where a prompt goes: so for the classes of the tasks
    takes_prompts: ClassVar[bool] = False
    _prompt_disabled: bool = False

    # ---- life of a prompt

    def _setup_prompt_encoder(self, adapter_name: str) -> None:
        """Makes the soft prompt of an adapter whose configuration is in `peft_config`, and fills in its shapes there.

        Raises:
            ValueError: the prompt does not fit the base model; model and configuration are as before.
        """
        config = self.peft_config[adapter_name]
        if not self.takes_prompts:
            raise ValueError(
                f"{config.peft_type.value} needs a task_type, which says where the prompt goes: one of"
                f" {', '.join(task.value for task in TaskType)}. Got task_type={config.task_type}."
            )
        if config.num_virtual_tokens is None:
            raise ValueError(f"{type(config).__name__} needs num_virtual_tokens, the length of the prompt; got None.")
        encoder_class: type[VirtualTokens] = method_of(config.peft_type).model_class
        if not encoder_class.adds_tokens:
            tensor_parallel.check_heads(self.base_model, config.peft_type.value)
        embeddings = self._prompted_embeddings(encoder_class)
        with undone_on_error(as_before(config)), onloaded(embeddings):
            config.__dict__.update(encoder_class.shapes(config, self.base_model, embeddings))
            encoder = encoder_class.build(config, self.base_model, embeddings).to(place_of(embeddings)[0])
        if "prompt_encoder" not in self._modules:
            self.base_model.requires_grad_(False)
            keep_open(self.base_model.modules())
            self.prompt_encoder = nn.ModuleDict()
        self.prompt_encoder[adapter_name] = encoder.requires_grad_(False)  # until it is active
        agree((*encoder.parameters(), *encoder.buffers()), self.base_model)
        average_gradients(self)

    def _delete_prompt_encoder(self, adapter_name: str) -> None:
        """Forgets an adapter's prompt, where it has one."""
        if adapter_name in (self._modules.get("prompt_encoder") or {}):  # type: ignore[operator]
            del self.prompt_encoder[adapter_name]

    # ---- access

    @property
    def prompt_active(self) -> bool:
        """Whether the next forward pass has a soft prompt."""
        return not self._prompt_disabled and self._prompt is not None

    @property
    def _prompt(self) -> Any:
        """The active adapter's [`VirtualTokens`]; None if it has none."""
        name: Any = self.active_adapter
        encoders: Any = self._modules.get("prompt_encoder") or {}
        return encoders[name] if isinstance(name, str) and name in encoders else None

    @property
    def word_embeddings(self) -> nn.Module:
        """The base model's word embeddings; there is no such attribute where they cannot be told."""
        try:
            return find_word_embeddings(self.base_model)
        except ValueError as error:  # a model's attributes are looked at one by one, by `torch.jit.trace` for one
            raise AttributeError(str(error)) from error

    def _prompted_embeddings(self, encoder: VirtualTokens | type[VirtualTokens], side: str = "") -> nn.Module:
        """The word embeddings that a prompt stands beside; the model where it has none, and the prompt needs none."""
        model: Any = self.base_model.get_decoder() if side else self.base_model
        try:
            return find_word_embeddings(model)
        except ValueError:
            if encoder.adds_tokens:
                raise
            return model

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """Indices of the virtual tokens of each adapter."""
        encoders: Any = self.prompt_encoder
        return {name: encoder.indices.cpu() for name, encoder in encoders.items()}

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, **options: Any) -> Any:
        """The active prompt for a batch: vectors [batch, tokens, token_dim], or a cache of keys and values for methods
        that have one. An encoder-decoder's has the tokens of both, the encoder's first.

        Args:
            batch_size: number of samples.
            task_ids: [batch], which task each is, for methods that tell tasks apart.
            options: what the method takes further.

        Raises:
            ValueError: the active adapter is no soft prompt.
        """
        if self._prompt is None:
            raise ValueError(f"The active adapter {self.active_adapter!r} is no soft prompt.")
        return self._prompt.prompt(batch_size, task_ids, **options)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """What a file stores as `prompt_embeddings`: [tokens, width]."""
        encoder: Any = self.prompt_encoder[adapter_name]
        with torch.no_grad(), gathered([encoder]):
            return encoder.rows_to_save()

    # ---- the prompt in the inputs

    @property
    def _encodes_first(self) -> bool:
        """Whether the base model is an encoder-decoder."""
        return bool(getattr(getattr(self.base_model, "config", None), "is_encoder_decoder", False))

    def with_prompt(
        self, inputs: Mapping[str, Any], labels_by_token: Sequence[str] = (), labelled_positions: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The base model's keyword arguments with the active soft prompt in them (the encoder's, if there is one).

        Where the model continues from a cache the prompt is in there already, and only the mask gets longer.

        Args:
            inputs: as a user gives them, `input_ids` or `inputs_embeds` among them.
            labels_by_token: names of labels [batch, length].
            labelled_positions: names of labels [batch] that are positions in the input.

        Raises:
            ValueError: the inputs leave no place for a prompt.
        """
        inputs = dict(inputs)
        given = [name for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "neither"
            raise ValueError(f"A soft prompt needs either input_ids or inputs_embeds to go before, got {found}.")
        encoder: Any = self._prompt
        batch = inputs[given[0]].shape[0]
        task_ids = inputs.pop("task_ids", None)
        inputs.pop("cache_position", None)  # of older transformers; models work it out themselves
        # The decoder's cache says nothing of the encoder, which runs anew on whatever input it is given.
        seen = 0 if encoder.adds_tokens and self._encodes_first else cached_tokens(cache_in(inputs))
        encoder.make_room(inputs, batch, seen)
        if seen:
            return inputs
        for name in labels_by_token if encoder.adds_tokens else ():
            lengthen(inputs, name, encoder.labels(batch))
        for name in labelled_positions if encoder.adds_tokens else ():
            if inputs.get(name) is not None:
                inputs[name] = inputs[name].clamp(min=0) + encoder.num_virtual_tokens
        encoder.insert(inputs, encoder.prompt(batch, task_ids), self._prompted_embeddings(encoder))
        return inputs
