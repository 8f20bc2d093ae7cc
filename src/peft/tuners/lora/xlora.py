"""X-LoRA: a mixture of saved LoRA adapters, weighed anew for each token."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.config import PeftConfig
from peft.core.call import calling, current, fact
from peft.core.change import Beside, Change
from peft.core.injection import check_adapter_name
from peft.core.layer import AdapterLayer
from peft.core.routing import Route
from peft.core.tuner import UPCAST_DTYPES
from peft.errors import PeftWarning
from peft.ops.lora import compute_dtype
from peft.registry import PeftType
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.kinds import Embedding, Linear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraMethod, LoraModel
from peft.tuners.lora.variants import VARIANTS
from peft.untrusted import is_said_by_file

_NO_ROUTES = "adapter_names (a mixed batch) cannot be used with X-LoRA, which weighs all experts itself."


@dataclass
class XLoraConfig(PeftConfig):
    """A mixture of LoRA adapters, the experts (X-LoRA, arXiv:2402.07148).

    A first pass of the model gives the last hidden state of each token; a classifier makes of it a weight for each
    expert, and in the second pass y = W x + g sum_e w_e s_e B_e A_e x, with weights w_e for each token (and layer). The
    classifier is what is trained. Needs a decoder of transformers with `use_cache=False`: the experts that a token gets
    change its keys and values.

    Args:
        hidden_size: width of the model's hidden states; read from the model if None.
        adapters: name of each expert -> folder or hub repository of a saved LoRA. A saved X-LoRA has its experts along,
            in subfolders of these names; where a file names other places, pass `adapters=...` to load from there.
        enable_softmax: make the weights of a token sum to one.
        enable_softmax_topk: the same, over the experts that `top_k_lora` has left; instead of `enable_softmax`.
        layerwise_scalings: weights of their own for each adapted layer.
        xlora_depth: linear layers of the classifier.
        xlora_size: width between them.
        xlora_dropout_p: probability of dropout between them.
        use_trainable_adapters: train the experts too.
        softmax_temperature: what the classifier's outputs are divided by before `enable_softmax`.
        top_k_lora: how many experts a token gets, those of the largest weights; all if None.
        scaling_pass_value: the weight of every expert in the first pass.
        global_scaling_weight: g, a factor on all weights in the second.

    Raises:
        ValueError: a number that is out of range.
    """

    hidden_size: int | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    positive_fields = ("hidden_size", "xlora_depth", "xlora_size", "top_k_lora", "softmax_temperature")
    fraction_fields = ("xlora_dropout_p",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.XLORA
        self.adapters = dict(self.adapters or {})
        self._saved_in: tuple[str, dict[str, Any]] | None = None
        self.check_top_k()
        if self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn("enable_softmax_topk without top_k_lora is a softmax over all experts.", PeftWarning)
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn(
                "enable_softmax_topk applies a second softmax to what enable_softmax gives, which evens the weights"
                " out; set enable_softmax=False.",
                PeftWarning,
            )

    def check_top_k(self) -> None:
        """Raises ValueError where `top_k_lora` is more than there are experts, if those are given."""
        if self.top_k_lora is not None and self.adapters and self.top_k_lora > len(self.adapters):
            raise ValueError(f"top_k_lora={self.top_k_lora} is more than there are adapters ({len(self.adapters)}).")

    def was_read(self, source: str | os.PathLike, options: Mapping[str, Any]) -> None:
        if options.get("adapters") is not None:
            self.adapters = dict(options["adapters"])
            self.__dict__.pop("_said_by", None)  # the caller has named the places
        else:
            self._saved_in = os.fspath(source), dict(options)


class XLoraClassifier(nn.Module):
    """What gives each token its weights: hidden states [batch, tokens, hidden] to [batch, tokens, layers, experts].

    `layers` is a stack of linear layers with ReLU and dropout between them.
    """

    def __init__(self, config: XLoraConfig, n_classes: int, n_layers: int):
        super().__init__()
        self.config, self.n_classes, self.n_layers = config, n_classes, n_layers
        outputs = n_classes * (n_layers if config.layerwise_scalings else 1)
        widths = [config.hidden_size or 0, *[config.xlora_size] * (config.xlora_depth - 1), outputs]
        dropout = [nn.Dropout(config.xlora_dropout_p)] if config.xlora_dropout_p else []
        stack: list[nn.Module] = []
        for before, after in pairwise(widths):
            stack += [nn.ReLU(), *dropout] if stack else []
            stack.append(nn.Linear(before, after))
        self.layers = nn.Sequential(*stack)

    def forward(self, hidden: Tensor) -> Tensor:
        first: Any = self.layers[0]
        logits = self.layers(hidden.to(first.weight.dtype))
        logits = logits.unflatten(-1, (-1, self.n_classes)).expand(-1, -1, self.n_layers, -1)
        return (logits / self.config.softmax_temperature).softmax(-1) if self.config.enable_softmax else logits


def choose(scalings: Tensor, top_k: int | None, softmax: bool) -> Tensor:
    """The weights of the `top_k` largest along the last dimension, others zero; their softmax if `softmax`."""
    chosen = scalings.topk(top_k or scalings.shape[-1], dim=-1)
    values = chosen.values.softmax(-1) if softmax else chosen.values
    return torch.zeros_like(scalings).scatter(-1, chosen.indices, values)


#: what a call knows: the weights of the experts, [batch, tokens, layers, experts]; a number in the first pass
_WEIGHTS = "xlora_weights"


class Mixture:
    """How much of each expert the tokens of a batch take, which all layers of a model read."""

    experts: Sequence[str] = ()
    #: what the classifier gave last
    scalings: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"experts": self.experts}  # what belongs to one batch is not copied

    def at(self, layer: int, rows: torch.Size) -> Tensor | float:
        """The weights in one layer for an input of this shape, features aside: [*rows, experts], or a number for all.

        Raises:
            ValueError: the input does not count tokens as the model's own does.
        """
        weights = fact(_WEIGHTS)
        if not isinstance(weights, Tensor):
            return weights or 0.0
        weights = weights[:, :, layer]
        batch, tokens, experts = weights.shape
        if rows[:2] == (batch, tokens):
            return weights.view(batch, tokens, *[1] * (len(rows) - 2), experts)
        if rows == (batch * tokens,):  # models that flatten batch and sequence
            return weights.flatten(0, 1)
        if len(rows) == 2 and rows[0] == batch and rows[1] < tokens:  # the last ones, as an output layer may see
            return weights[:, tokens - rows[1] :]
        raise ValueError(
            f"X-LoRA has weights for {batch} samples of {tokens} tokens, and a layer sees an input of shape"
            f" {tuple(rows)} without its features. Leave that layer out of the experts' target_modules."
        )


class XLoraLayer(LoraLayer):
    """A module with LoRA experts, of which each token takes what the mixture says."""

    # Other kinds see no tokens, or have one weight for all of them.
    kinds: ClassVar[frozenset[str]] = frozenset(("Linear", "Conv1D", "Embedding"))

    #: set by the model
    mixture: Mixture
    layer_number: int

    def low(self, name: str, x: Tensor) -> Tensor:
        """A x of one expert: [..., r]."""
        raise NotImplementedError

    def changes(self, names: Sequence[str]) -> list[Change]:
        if fact(_WEIGHTS) is None:
            return super().changes(names)
        return [Beside(lambda x: self.mixed(names, x), "the experts are weighed anew for each token")]

    def mixed(self, names: Sequence[str], x: Tensor) -> Tensor:
        """What the experts add for each token, in its shares: [..., out]."""
        weights = self.mixture.at(self.layer_number, x.shape if self.op.kind == "Embedding" else x.shape[:-1])
        if isinstance(weights, float) and weights == 0:
            return torch.zeros((), device=x.device)
        dtype = compute_dtype(x) if x.is_floating_point() else self.place()[1] or torch.float32
        low, up = [], []
        for name in names:
            share = weights[..., self.mixture.experts.index(name), None] if isinstance(weights, Tensor) else weights
            low.append((self.low(name, x) * (share * self.scaling[name])).to(dtype))
            up.append(self.factors(name)[1].to(dtype))
        change = F.linear(torch.cat(low, -1), torch.cat(up, 1))
        scale = getattr(self.get_base_layer(), "embed_scale", None)  # embeddings that multiply what they look up
        return change if scale is None else change * torch.as_tensor(scale).to(change)

    def check_merge(self, name: str) -> None:
        raise NotImplementedError("X-LoRA weighs its experts anew for each token, so they cannot be merged.")

    def _forward_routed(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(_NO_ROUTES)


class XLoraLinearLayer(XLoraLayer, Linear):
    """A linear layer with experts."""

    def low(self, name: str, x: Tensor) -> Tensor:
        a = self.lora_A[name].weight
        return F.linear(self.lora_dropout[name](x), a.to(compute_dtype(x)))


class XLoraEmbeddingLayer(XLoraLayer, Embedding):
    """An embedding with experts."""

    def low(self, name: str, x: Tensor) -> Tensor:
        return F.embedding(x, self.lora_embedding_A[name].T)


class _Holder(nn.Module):
    """Holds the model under the name that checkpoints of X-LoRA models give it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class XLoraMethod(LoraMethod):
    """What X-LoRA says about a whole model: what its experts are, and that each pass is weighed by one before it."""

    tuner: XLoraModel

    @classmethod
    def start_is_replaceable(cls, config: Any) -> bool:
        return isinstance(config, XLoraConfig) or super().start_is_replaceable(config)

    def members(self, adapter_name: str, config: XLoraConfig) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        if self.tuner.xlora_name is not None:
            raise ValueError(
                f"The model has an X-LoRA adapter ({self.tuner.xlora_name!r}); there cannot be a second one."
            )
        model_config: Any = getattr(self.model, "config", None)
        if getattr(model_config, "use_cache", False):
            raise ValueError(
                "X-LoRA needs model.config.use_cache = False: it runs every token through the model twice, with other"
                " keys and values each time."
            )
        if model_config is None or getattr(model_config, "is_encoder_decoder", False):
            raise ValueError(
                f"X-LoRA needs a decoder of transformers, whose outputs have hidden_states; got a"
                f" {type(self.model).__name__}."
            )
        text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
        found = getattr(text_config, "hidden_size", None)
        if config.hidden_size is None:
            config.hidden_size = found
        if config.hidden_size is None or found not in (None, config.hidden_size):
            raise ValueError(f"hidden_size={config.hidden_size}, but that of the model is {found or 'not known'}.")
        if not config.adapters:
            raise ValueError("XLoraConfig.adapters is empty: give a name and a saved LoRA for each expert.")
        if config.top_k_lora is not None and config.top_k_lora > len(config.adapters):
            raise ValueError(
                f"top_k_lora={config.top_k_lora} is more than there are adapters ({len(config.adapters)})."
            )
        for name in config.adapters:
            check_adapter_name(name)
            if "/" in name or "\\" in name:
                raise ValueError(f"{name!r} cannot name an expert: it is saved in a folder of that name.")
            if name == adapter_name:
                raise ValueError(f"Adapter name {name!r} is that of the mixture; call the expert otherwise.")
        places: dict[str, list[tuple[str, dict[str, Any]]]] = {
            name: [(os.fspath(path), {})] for name, path in config.adapters.items()
        }
        if config._saved_in is not None:
            source, options = config._saved_in
            for name, candidates in places.items():
                subfolder = "/".join(part for part in (options.get("subfolder"), name) if part)
                candidates.insert(0, (source, {**options, "subfolder": subfolder}))
                if is_said_by_file(config, "adapters"):
                    del candidates[1:]
        return places

    def owner(self, adapter_name: str) -> str | None:
        return None if adapter_name == self.tuner.xlora_name else self.tuner.xlora_name

    def make_layer(self, config: Any, target: nn.Module, parameter_name: str | None, key: str) -> AdapterLayer:
        kind = XLoraEmbeddingLayer if isinstance(target, nn.Embedding) else XLoraLinearLayer
        layer = kind(target, parameter_name=parameter_name)
        layer.mixture = self.tuner.mixture
        return layer

    def check_config(self, adapter_name: str, config: Any) -> None:
        if not isinstance(config, LoraConfig):
            raise ValueError(f"Expert {adapter_name!r} is a {config.peft_type} adapter; X-LoRA mixes LoRA adapters.")
        super().check_config(adapter_name, config)
        for setting in (*VARIANTS, "lora_bias"):
            if getattr(config, setting):
                raise ValueError(
                    f"Expert {adapter_name!r} has {setting}={getattr(config, setting)!r}; X-LoRA mixes plain LoRA"
                    " adapters."
                )

    def key_map(self, adapter_name: str, config: Any) -> dict[str, str]:
        if adapter_name != self.tuner.xlora_name:
            return {}
        name = "internal_xlora_classifier"
        return {f"{name}.{key}": f"{name}.{key}" for key in self.tuner.internal_xlora_classifier.state_dict()}

    # ---- forward

    @contextmanager
    def around_forward(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        if self.tuner.disabled or self.tuner.xlora_name is None:
            yield
            return
        # `generate` calls the model many times, so what comes before a pass is a hook.
        hook = self.model.register_forward_pre_hook(self._weigh, with_kwargs=True)
        try:
            with calling():
                yield
        finally:
            hook.remove()

    @contextmanager
    def around_generate(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        if kwargs.setdefault("use_cache", False) and not self.tuner.disabled:
            raise ValueError("X-LoRA generates with use_cache=False only: weights change a token's keys and values.")
        with self.around_forward(args, kwargs):
            yield

    def _weigh(self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs the first pass and sets the weights for the second."""
        if isinstance(fact(_WEIGHTS), float):
            return  # this is the first pass
        if kwargs.get("past_key_values") is not None:
            raise ValueError("X-LoRA cannot go on from a cache (past_key_values): it runs all tokens twice.")
        config, classifier = self.tuner.xlora_config, self.tuner.internal_xlora_classifier
        first = {key: value for key, value in kwargs.items() if key != "labels"}
        first.update(output_hidden_states=True, return_dict=True)
        share = float(config.scaling_pass_value * config.global_scaling_weight)
        with torch.no_grad(), calling(**{_WEIGHTS: share}):
            hidden = module(*args, **first).hidden_states[-1]
        scalings = classifier(hidden)
        self.tuner.mixture.scalings = scalings
        if self.tuner._is_logging:
            self.tuner._log.append(scalings.detach())
        if config.top_k_lora is not None or config.enable_softmax_topk:
            scalings = choose(scalings, config.top_k_lora, config.enable_softmax_topk)
        call = current()
        assert call is not None  # `around_forward` has begun one
        call.facts[_WEIGHTS] = scalings * config.global_scaling_weight


class XLoraModel(LoraModel):
    """A model with a mixture of LoRA adapters (arXiv:2402.07148).

    `internal_xlora_classifier` weighs the experts, which are LoRA adapters with configurations in `peft_config` under
    their own names.
    """

    prefix = "xlora_"
    layer_class = XLoraLayer
    method_class = XLoraMethod
    holder = "lora_model.model"

    internal_xlora_classifier: XLoraClassifier

    def hold(self, model: nn.Module) -> None:
        self.lora_model = _Holder(model)
        self.mixture = Mixture()
        #: name of the mixture; None while only experts are there
        self.xlora_name: str | None = None
        self._is_logging = False
        self._log: list[Tensor] = []

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The base model."""
        return self.lora_model.model

    @property
    def xlora_config(self) -> XLoraConfig:
        """The configuration of the mixture."""
        return self.peft_config[self.xlora_name or ""]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        config: Any = None,
    ) -> None:
        """Adds an expert, or the mixture when all experts are there."""
        if not isinstance(config, XLoraConfig):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict, config)
            return
        layers = list(self.layers())
        device, dtype = layers[0].place()
        if autocast_adapter_dtype and dtype in UPCAST_DTYPES:
            dtype = torch.float32
        classifier = XLoraClassifier(config, len(config.adapters), len(layers)).to(device, dtype)
        for number, layer in enumerate(layers):
            layer.__dict__["layer_number"] = number
        self.internal_xlora_classifier = classifier
        self.mixture.experts = tuple(config.adapters)
        self.xlora_name = adapter_name
        experts = {name: self.peft_config.pop(name) for name in config.adapters}
        self.peft_config.update({adapter_name: config, **experts})
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    # ---- the life of the adapter

    @property
    def active_adapters(self) -> list[str]:
        return super().active_adapters if self.xlora_name is None else [self.xlora_name]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        names = self.check_names(adapter_name)
        if self.xlora_name is None:  # while the experts are loaded
            super().set_adapter(names, inference_mode)
            return
        if names != [self.xlora_name]:
            raise ValueError(
                f"Only the mixture {self.xlora_name!r} can be active, not {', '.join(map(repr, names))}: it has all"
                " experts at work."
            )
        trains_experts = self.xlora_config.use_trainable_adapters and not inference_mode
        super().set_adapter(self.mixture.experts, inference_mode=not trains_experts)
        self.internal_xlora_classifier.requires_grad_(not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = self.check_names(adapter_names)
        super().set_requires_grad([name for name in names if name != self.xlora_name], requires_grad)
        if self.xlora_name in names:
            self.internal_xlora_classifier.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        if self.xlora_name is None or adapter_name not in self.peft_config:
            super().delete_adapter(adapter_name)
            return
        if adapter_name != self.xlora_name:
            raise ValueError(f"Adapter {adapter_name!r} is an expert of {self.xlora_name!r}, which needs it.")
        del self.peft_config[adapter_name], self.internal_xlora_classifier
        self.xlora_name = None
        for name in self.mixture.experts:
            super().delete_adapter(name)

    @contextmanager
    def routed(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        if adapter_names is not None:
            raise ValueError(_NO_ROUTES)
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("An X-LoRA model mixes its adapters itself; combine them before.")

    # ---- settings that may change, and what the classifier has said

    def set_topk_lora(self, value: int | None) -> None:
        """Sets how many experts a token gets; all if None.

        Raises:
            ValueError: not from 1 to the number of experts.
        """
        if value is not None and not 1 <= value <= len(self.mixture.experts):
            raise ValueError(f"top_k_lora must be from 1 to {len(self.mixture.experts)}, or None; got {value}.")
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Sets the factor on all weights."""
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """The factor on all weights."""
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Sets the weight of every expert in the first pass; one over the number of experts if None."""
        self.xlora_config.scaling_pass_value = 1 / len(self.mixture.experts) if value is None else value

    def get_latest_scalings(self) -> Tensor | None:
        """What the classifier gave last, before `top_k_lora`: [batch, tokens, layers, experts]; None if nothing yet."""
        return self.mixture.scalings

    internal_xlora_scalings = property(get_latest_scalings)

    def enable_scalings_logging(self) -> None:
        """From now on, what the classifier gives is kept."""
        self._is_logging = True

    def disable_scalings_logging(self) -> None:
        """Ends that; what has been kept stays."""
        self._is_logging = False

    def clear_scalings_log(self) -> None:
        """Forgets what has been kept."""
        self._log.clear()

    def get_scalings_log(self) -> list[Tensor]:
        """What has been kept, one [batch, tokens, layers, experts] for each forward pass, without gradients."""
        return list(self._log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The log by number of tokens: tokens -> (places in the log, what is there)."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for place, scalings in enumerate(self._log):
            places, entries = buckets.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            entries.append(scalings)
        return buckets
