"""Laws that hold after every step of any sequence of operations, whatever the method and the kind of module.

A random sequence is run on a tiny model with two adapted modules; beside it stands what is known of the model: which
adapters there are, act, are merged, are trained. `make laws` runs 10,000 sequences (LAWS=N: N of them).
"""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

import peft
from failures import fails
from law_subjects import SHARE, SUBJECTS
from peft.core.layer import AdapterLayer
from peft.core.walk import parts_of

torch.set_num_threads(1)

#: sequences in all; a few for each subject unless LAWS says how many
SEQUENCES = int(os.environ.get("LAWS") or 0)
STEPS = 25 if SEQUENCES else 8
NAMES = ("a", "b", "c", "d")
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
#: in memory where that can be: thousands of saves wait for a disk each
FOLDERS = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def layers_of(model) -> list:
    """The status of what adapters there are in the layers; a soft prompt is in none."""
    with suppress(TypeError, ValueError):
        return model.get_layer_status()
    return []


def state_of(model) -> dict:
    """What a call that fails must not have half changed."""
    return {
        "adapters": {name: config.inference_mode for name, config in model.peft_config.items()},
        "active": model.active_adapters,
        "trained": {name for name, parameter in model.named_parameters() if parameter.requires_grad},
        "keys": list(model.state_dict()),
        "layers": [
            (part.name, part.available_adapters, part.enabled, part.active_adapters, part.merged_adapters)
            for part in layers_of(model)
        ],
    }


def base_value(model: nn.Module, name: str) -> Tensor:
    """A tensor of the base model by the name it has without adapters."""
    module: nn.Module = model
    for part in name.split("."):
        while hasattr(module, "wrapped"):
            module = module.wrapped
        module = getattr(module, part)
    return module


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits, packed ones too."""
    names = one.__tensor_flatten__()[0] if hasattr(one, "__tensor_flatten__") else ()
    pairs = [(getattr(one, name), getattr(other, name)) for name in names] or [(one, other)]
    return all(torch.equal(a, b) for a, b in pairs)


class Laws(RuleBasedStateMachine):
    """One model and what is known of it."""

    def __init__(self, subject: str):
        super().__init__()
        self.subject = subject

    @initialize(data=st.data())
    def begin(self, data):
        warnings.simplefilter("ignore")
        self.case = SUBJECTS[self.subject](data)
        self.bits = {
            name: parameter.detach().clone()
            for name, parameter in self.case.build().named_parameters()
            if type(parameter.data) is Tensor
        }
        self.base = self.case.run_base(self.case.build()).detach()
        methods = self.case.methods
        self.method_of: dict[str, str] = {"a": methods[0]}
        self.came = [methods[0]]  # methods in the order in which their layers came, inner ones first
        self.order = ["a"]
        self.active, self.trained, self.merged = ["a"], ["a"], []
        self.disabled = False
        self.outputs: dict[tuple[str, ...], Tensor] = {}
        self.model = self.fresh("a")
        self.start("a")
        self.check()

    def fresh(self, name: str) -> nn.Module:
        """A base model with a new adapter."""
        return peft.get_peft_model(self.case.build(), self.config(name), name, mixed=self.case.mixed).eval()

    def config(self, name: str):
        return self.case.config(self.method_of[name], name == "a")

    @property
    def is_prompt(self) -> bool:
        return self.model.peft_config[self.order[0]].is_prompt_learning

    def start(self, name: str) -> None:
        """Gives a new adapter an effect."""
        with torch.no_grad():
            own = self.own(name)
            for key, parameter in self.model.named_parameters():
                if parameter in own:
                    generator = torch.Generator().manual_seed(len(self.order) + sum(map(ord, key)))
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.forget(name)

    def own(self, name: str) -> set:
        """The parameters of an adapter that are trained when it is active."""
        found = set()
        for _, part in parts_of(self.model.get_base_model()):
            if part.has(name):
                found.update(part.trainable_parameters(name))
        for path in self.case.beside:
            held = self.model.get_submodule(path)
            held = held[name] if name in held._modules else held
            before = [(parameter, parameter.requires_grad) for parameter in held.parameters()]
            held.requires_grad_(True)  # some of them leave some of their parameters as they are
            found.update(parameter for parameter in held.parameters() if parameter.requires_grad)
            for parameter, trained in before:
                parameter.requires_grad_(trained)
        return found

    def forget(self, name: str) -> None:
        self.outputs = {key: value for key, value in self.outputs.items() if name not in key}

    # ---- what is known

    def live(self) -> tuple[str, ...]:
        """The adapters that act: on the layers of each method those merged, then others that are active."""
        found: list[str] = []
        for method in self.came:
            names = dict.fromkeys([*self.merged, *self.active])
            found += [name for name in names if self.method_of[name] == method]
        return tuple(found)

    def expected(self, names: tuple[str, ...]) -> Tensor:
        """The output with these adapters, as it was when it was first asked for."""
        if not names:
            return self.base
        if names not in self.outputs:
            twin = copy.deepcopy(self.model)
            if self.merged:
                twin.base_model.unmerge_adapter()
            if not self.is_prompt:
                twin.base_model.enable_adapter_layers()
            twin.set_adapter(list(names) if len(names) > 1 else names[0])
            self.outputs[names] = self.case.run(twin).detach()
        return self.outputs[names]

    def check(self) -> None:
        """The laws."""
        model, off = self.model, self.disabled
        assert [name for name in model.peft_config if name not in self.case.members] == self.order
        assert model.active_adapters == self.active
        out = self.case.run(model).detach()
        if off:
            assert torch.equal(out, self.base), "disabled is not the base"
        elif not self.says_nothing():
            torch.testing.assert_close(out, self.expected(self.live()), **CLOSE)
        if off or not self.merged:
            base = model.get_base_model()
            for name, value in self.bits.items():
                if off or "bias" not in name or self.own_biases():
                    assert torch.equal(base_value(base, name), value), f"{name} is not what it was"
        self.check_status(off)
        self.check_trained(off)

    def says_nothing(self) -> bool:
        """Whether the output while adapters are merged is not that of the same adapters unmerged."""
        if not self.merged:
            return False
        return self.case.rounds or (self.case.apart and self.merged != self.active) or self.is_out_of_turn()

    def is_out_of_turn(self) -> bool:
        """Whether one that is merged acts before one that would come first: the order matters, unless both only add.

        Where a layer is around another, what is merged into either comes before what is not merged on both.
        """
        live = self.live()
        layers = [part for _, part in parts_of(self.model.get_base_model()) if isinstance(part, AdapterLayer)]
        nested = any(isinstance(layer.base_layer, AdapterLayer) for layer in layers)
        in_turn = live[: len(self.merged)] == tuple(name for name in live if name in self.merged)
        if in_turn and (not nested or len(self.merged) == len(live)):
            return False
        names = {layer: [name for name in live if layer.has(name)] for layer in layers}
        return not all(change.additive for layer in layers for change in layer.changes(names[layer]))

    def trains_biases(self, name: str) -> bool:
        """Whether an adapter of the kind of `name` trains biases, and is refused beside others."""
        return getattr(self.config(name), "bias", "none") != "none"

    def own_biases(self) -> bool:
        return all(getattr(config, "bias", "none") == "none" for config in self.model.peft_config.values())

    def check_status(self, off: bool) -> None:
        for part in layers_of(self.model):
            here = [name for name in self.order if name in part.available_adapters]
            assert part.enabled != off
            wanted = [name for name in self.active if name in here]
            assert [name for name in part.active_adapters if name in here] == wanted
            if part.module_type != "ModulesToSaveWrapper":
                merged = [name for name in self.merged if name in here]
                assert sorted(part.merged_adapters) == ([] if off else sorted(merged))
        there = {name for part in layers_of(self.model) for name in part.available_adapters}
        if not self.is_prompt and self.subject != "ADAPTION_PROMPT":
            assert there - {*self.case.members} == {*self.order} - {*(self.order if self.case.members else ())}

    def check_trained(self, off: bool) -> None:
        wanted = {parameter for name in self.trained for parameter in self.own(name)}
        found = {parameter for parameter in self.model.parameters() if parameter.requires_grad}
        # What set_adapter() makes trainable while the adapters are switched off is so at once.
        assert found <= wanted if off else found == wanted

    # ---- operations: each a call, and what is known after it

    def free(self) -> str | None:
        return next((name for name in NAMES[: self.case.most] if name not in self.order), None)

    def operation(self, data, *more) -> tuple[str, Callable[[nn.Module], object], Callable[[], None] | None]:
        """One that changes the state: its name, the call, and what is known afterwards; None where it is refused."""
        kinds = ["set"]
        if self.free():
            kinds.append("add")
        if len(self.order) > 1:
            kinds.append("delete")
        if self.case.mergeable and not self.disabled:
            # disabled and merged: docs/differences.md, "merge_adapter() in ..."
            kinds += ["merge", "unmerge"] if self.merged else ["merge"]
        if not self.is_prompt:
            kinds.append("enable" if self.disabled else "disable")
        kind = data.draw(st.sampled_from([*kinds, *more]))
        return (kind, *getattr(self, f"to_{kind}")(data))

    def draw_names(self, data, of: list[str]) -> list[str]:
        most = len(of) if self.case.several else 1
        return data.draw(st.lists(st.sampled_from(of), min_size=1, max_size=most, unique=True))

    def to_set(self, data):
        names = self.draw_names(data, self.order)

        def after():
            self.active, self.trained = names, self.trainable(names)

        return (lambda model: model.set_adapter(names if len(names) > 1 else names[0])), after

    def trainable(self, names: list[str]) -> list[str]:
        """Those of some adapters that become trainable when they are set: not soft prompts out of a file."""
        return [name for name in names if not (self.is_prompt and self.model.peft_config[name].inference_mode)]

    def to_add(self, data):
        name, method = self.free(), data.draw(st.sampled_from(self.case.methods))
        self.method_of[name] = method
        if self.trains_biases(name):
            return (lambda model: model.add_adapter(name, self.config(name))), None

        def after():
            self.order.append(name)
            if method not in self.came:
                self.came.append(method)
            self.start(name)

        return (lambda model: model.add_adapter(name, self.config(name))), after

    def to_delete(self, data):
        name = data.draw(st.sampled_from(self.order))

        def after():
            self.order.remove(name)
            self.active = [other for other in self.active if other != name]
            self.trained = [other for other in self.trained if other != name]
            self.merged = [other for other in self.merged if other != name]
            if not self.active:
                self.active = self.order[:1]
                self.trained = [] if self.model.peft_config[self.order[0]].inference_mode else self.order[:1]
            self.forget(name)

        return (lambda model: model.delete_adapter(name)), after

    def to_merge(self, data):
        names = data.draw(st.none() | st.just(self.draw_names(data, self.order)))
        wanted = self.active if names is None else names
        if self.case.overlaps and len({*self.merged, *wanted}) > 1:
            return (lambda model: model.merge_adapter(names)), None

        def after():
            for name in wanted:
                if name not in self.merged:
                    self.merged.append(name)

        return (lambda model: model.merge_adapter(names)), after

    def to_unmerge(self, data):
        return (lambda model: model.unmerge_adapter()), (lambda: self.merged.clear())

    def to_disable(self, data):
        return (lambda model: model.base_model.disable_adapter_layers()), (lambda: setattr(self, "disabled", True))

    def to_look(self, data):
        def look(model):
            with model.disable_adapter():
                pass

        return look, lambda: None

    def to_enable(self, data):
        return (lambda model: model.base_model.enable_adapter_layers()), (lambda: setattr(self, "disabled", False))

    @rule(data=st.data(), times=st.integers(1, 3))
    def change(self, data, times):
        for _ in range(times):
            _, call, after = self.operation(data)
            if after is None:
                before = state_of(self.model)
                with pytest.raises(ValueError, match=r"merged|bias"):
                    call(self.model)
                assert state_of(self.model) == before
            else:
                call(self.model)
                after()
            self.check()

    @precondition(lambda self: self.trained and not self.disabled and not self.merged)
    @rule(data=st.data())
    def train(self, data):
        """What is trained gets gradients, and nothing else does."""
        self.model.train()
        self.model.zero_grad()
        self.case.run(self.model).square().mean().backward()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        reached = {parameter for parameter in self.model.parameters() if parameter.grad is not None}
        assert reached <= set(trained) if self.case.idle else reached == set(trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.05)
        assert norm.isfinite() and norm > 0
        with torch.no_grad():
            for parameter in reached:
                parameter.sub_(parameter.grad)
        self.model.zero_grad()
        self.model.eval()
        for name in self.active:
            self.forget(name)
        self.check()

    @rule(pickled=st.booleans())
    def go_on_with_a_copy(self, pickled):
        pickled = pickled and self.case.pickles
        twin = pickle.loads(pickle.dumps(self.model)) if pickled else copy.deepcopy(self.model)
        assert state_of(twin) == state_of(self.model)
        assert torch.equal(self.case.run(twin), self.case.run(self.model))
        self.model = twin
        self.check()

    @precondition(lambda self: not self.case.rounds)
    @rule()
    def to_another_dtype_and_back(self):
        before = self.case.run(self.model).detach()
        self.model.to(torch.float64)
        wide = {key: x.double() for key, x in self.case.inputs.items() if x.is_floating_point()}
        torch.testing.assert_close(self.case.run(self.model, **wide).float(), before, **CLOSE)
        self.model.to(torch.float32)
        self.check()

    @rule(data=st.data())
    def mixed_batch(self, data):
        """Each sample as in a batch of its own; an error while adapters are merged."""
        dim = self.case.samples
        size = next(iter(self.case.inputs.values())).shape[dim]
        rows = data.draw(st.lists(st.sampled_from([*self.order, "__base__"]), min_size=size, max_size=size))
        if self.merged or self.disabled or not self.case.routed:
            before = state_of(self.model)
            with suppress(ValueError):
                self.case.run(self.model, adapter_names=rows)
            assert state_of(self.model) == before
            return self.check()
        out = self.case.run(self.model, adapter_names=rows).detach()
        for name in set(rows):
            own = torch.tensor([i for i, row in enumerate(rows) if row == name])
            alone = self.expected(() if name == "__base__" else (name,)).index_select(dim, own)
            torch.testing.assert_close(out.index_select(dim, own), alone, **CLOSE)
        self.check()

    @precondition(lambda self: not self.case.mixed)  # saving a mixed model is not supported, as in the reference
    @rule(data=st.data())
    def save_and_load(self, data):
        """A new model with what was saved, and the same file under a further name."""
        name, new = data.draw(st.sampled_from(self.order)), self.free()
        with tempfile.TemporaryDirectory(dir=FOLDERS) as folder:
            self.model.save_pretrained(folder, selected_adapters=[name, *self.case.members])
            place = folder if name == "default" else os.path.join(folder, name)
            loaded = peft.PeftModel.from_pretrained(self.case.build(), place).eval()
            torch.testing.assert_close(self.case.run(loaded), self.expected((name,)), **CLOSE)
            if new is not None and data.draw(st.booleans()):
                self.method_of[new] = self.method_of[name]
                wanted = self.expected((name,))
                if getattr(self.model.peft_config[name], "bias", "none") != "none":
                    with pytest.raises(ValueError, match="bias"):
                        self.model.load_adapter(place, new)
                    return self.check()
                self.model.load_adapter(place, new)
                self.order.append(new)
                self.forget(new)
                torch.testing.assert_close(self.expected((new,)), wanted, **CLOSE)
        self.check()

    @precondition(lambda self: self.case.combines)
    @rule(data=st.data())
    def swap(self, data):
        """An adapter out of a file in the place of another is that adapter; a merged one is not replaced."""
        name = data.draw(st.sampled_from(self.order))
        with tempfile.TemporaryDirectory(dir=FOLDERS) as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            wanted = self.expected((name,))
            if name in self.merged and not self.disabled:
                with pytest.raises(ValueError, match="merged"):
                    hotswap_adapter(self.model, os.path.join(folder, name), name)
                return self.check()
            self.start(name)
            hotswap_adapter(self.model, os.path.join(folder, name), name)
            self.forget(name)
            torch.testing.assert_close(self.expected((name,)), wanted, **CLOSE)
        self.check()

    @precondition(lambda self: self.case.combines and self.free())
    @rule(data=st.data(), how=st.sampled_from(["cat", "linear", "svd"]))
    def combine_one(self, data, how):
        """One adapter with weight 1 is that adapter."""
        name, new = data.draw(st.sampled_from(self.order)), self.free()
        wanted = self.expected((name,))
        self.method_of[new] = "LORA"
        self.model.add_weighted_adapter([name], [1.0], new, combination_type=how)
        self.order.append(new)
        self.forget(new)
        torch.testing.assert_close(self.expected((new,)), wanted, **CLOSE)
        self.check()

    @rule()
    def take_off(self):
        """Without its adapters the model is the base; merged for good it acts as before."""
        if self.is_prompt:
            return
        twin = copy.deepcopy(self.model).unload()
        assert torch.equal(self.case.run_base(twin), self.base)
        if self.case.mergeable and not self.case.rounds and not self.disabled and not self.merged:
            merged = copy.deepcopy(self.model).merge_and_unload()
            torch.testing.assert_close(self.case.run_base(merged), self.expected(self.live()), **CLOSE)

    @rule(data=st.data(), n=st.integers(1, 40) | st.integers(1, 1500))
    def fail(self, data, n):
        """A call that fails has done nothing, or all of what it does."""
        error = data.draw(st.sampled_from([KeyboardInterrupt, MemoryError]))
        kind, call, after = self.operation(data, "look")
        if after is None:
            return
        before = state_of(self.model)
        values = {key: value.clone() for key, value in self.model.state_dict().items()}
        twin = copy.deepcopy(self.model)
        call(twin)
        done = state_of(twin)
        if not fails(lambda: call(self.model), n, error):
            after()
        elif state_of(self.model) == before:
            now = self.model.state_dict()
            assert all(is_same(now[key], value) for key, value in values.items()), f"{kind} has changed values"
        else:
            assert state_of(self.model) == done, f"{kind} is half done after line {n}"
            after()
        self.check()

    @rule()
    def look_at_the_base(self):
        """`disable_adapter()` leaves all as it was."""
        before = state_of(self.model)
        with self.model.disable_adapter(), self.model.disable_adapter():
            assert torch.equal(self.case.run(self.model), self.base)
        assert state_of(self.model) == before
        self.check()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_laws(subject):
    share = SHARE.get(subject, 1)
    count = -(-SEQUENCES * share // sum(SHARE.get(name, 1) for name in SUBJECTS)) if SEQUENCES else share
    run_state_machine_as_test(
        lambda: Laws(subject),
        settings=settings(
            max_examples=count,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            derandomize=not SEQUENCES,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
