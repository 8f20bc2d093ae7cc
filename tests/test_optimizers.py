"""Optimizers made for LoRA: what they compute, and the effect that their papers report, on small problems."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from peft import IA3Config, LoraConfig, PeftModel, PeftWarning, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer


def teacher(features: int = 32, rank: int = 4) -> tuple[PeftModel, Tensor, Tensor]:
    """A linear layer with a LoRA, inputs, and the outputs of the layer with a low-rank change to be learned."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(features, features))
    change = torch.randn(features, rank) @ torch.randn(rank, features) / features**0.5
    x = torch.randn(256, features)
    target = (base(x) + x @ change.T).detach()
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"])), x, target


def train(model: nn.Module, optimizer, x: Tensor, target: Tensor, steps: int) -> float:
    """The loss after some steps."""
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    return (model(x) - target).square().mean().item()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.conv(self.norm(self.linear(self.embed(tokens))).mT).mT)


def net(**settings) -> PeftModel:
    config = {"r": 4, "target_modules": ["embed", "linear", "conv"], "modules_to_save": ["norm", "head"], **settings}
    return get_peft_model(Net(), LoraConfig(**config))


def layer_of(model: PeftModel) -> nn.Module:
    return model.base_model.model[0]


def factors(model: PeftModel) -> tuple[nn.Parameter, nn.Parameter]:
    return layer_of(model).lora_A["default"].weight, layer_of(model).lora_B["default"].weight


# ---- LoRA+


def test_loraplus_rates():
    model = net()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, betas=(0.8, 0.9)
    )
    found = {
        names[id(p)].removeprefix("base_model.model.").replace(".default", ""): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    b = pytest.approx(1.6e-2)
    assert found == {
        "linear.lora_A.weight": (1e-3, 0.1),
        "conv.lora_A.weight": (1e-3, 0.1),
        "head.modules_to_save.weight": (1e-3, 0.1),
        "embed.lora_embedding_A": (1e-6, 0.1),
        "embed.lora_embedding_B": (1e-6, 0.1),
        "linear.lora_B.weight": (b, 0.1),
        "conv.lora_B.weight": (b, 0.1),
        "head.modules_to_save.bias": (b, 0.0),
        "norm.modules_to_save.weight": (b, 0.0),
        "norm.modules_to_save.bias": (b, 0.0),
    }
    assert optimizer.defaults["betas"] == (0.8, 0.9) and type(optimizer) is torch.optim.AdamW


def test_loraplus_takes_plain_weight_decay():
    """huggingface/peft leaves it without effect."""
    optimizer = create_loraplus_optimizer(net(), torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2, weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.3, 0.0]


def test_loraplus_learns_faster():
    """With B on a higher rate the same number of steps gets further, where one rate for both is stuck with a slow B."""
    losses = {}
    for ratio in (1, 16):
        model, x, target = teacher()
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-3, loraplus_lr_ratio=ratio)
        losses[ratio] = train(model, optimizer, x, target, steps=60)
    assert losses[16] < 0.3 * losses[1]


# ---- LoRA-FA


def test_lorafa_trains_b_alone():
    model, x, target = teacher()
    a, b = factors(model)
    start, before = a.clone(), train(model, torch.optim.SGD(model.parameters(), lr=0), x, target, steps=1)
    after = train(model, create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.05), x, target, steps=60)
    assert torch.equal(a, start) and not a.requires_grad and b.requires_grad
    assert after < 0.95 * before


def test_lorafa_steps_by_the_nearest_gradient():
    """A B of that gradient times A is the projection of the weight's own gradient on what A sees."""
    model, x, target = teacher()
    layer, (a, b) = layer_of(model), factors(model)
    layer.base_layer.weight.requires_grad_(True)
    (model(x) - target).square().mean().backward()
    whole, scaling = layer.base_layer.weight.grad, layer.scaling["default"]
    layer.base_layer.weight.requires_grad_(False)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    optimizer.step()
    # What the first moment has after one step is a tenth of the gradient.
    gradient = 10 * optimizer.state[b]["exp_avg"]
    projection = whole @ torch.linalg.pinv(a) @ a
    torch.testing.assert_close(scaling * gradient @ a, projection, rtol=2e-2, atol=2e-2 * projection.abs().max().item())


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    """Bytes of activations that a forward pass keeps."""
    own = {p.data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x).sum()
    return sum(sizes.values())


def test_lorafa_keeps_no_inputs():
    """The memory that the paper saves: with A frozen, only the r columns of the low-rank product are kept."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1", "2", "3"]))
    x = torch.randn(32, 64)
    both = kept_for_backward(model, x)
    create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-3)
    assert kept_for_backward(model, x) < both / 4


def test_lorafa_trains_what_is_beside_the_loras():
    model = net()
    tokens = torch.arange(12).view(2, 6)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01, weight_decay=0.1)
    plain = copy.deepcopy(model)
    reference = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1, eps=1e-6
    )
    for each, steps in ((model, optimizer), (plain, reference)):
        each(tokens).square().mean().backward()
        steps.step()
    head, other = (m.base_model.model.head.modules_to_save["default"].weight for m in (model, plain))
    torch.testing.assert_close(head, other, atol=1e-4, rtol=1e-3)


def test_lorafa_settings():
    model = net(use_rslora=True)
    with pytest.raises(ValueError, match="use_rslora=False"):
        create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.1, use_rslora=False)
    with pytest.raises(ValueError, match="r must be positive"):
        create_lorafa_optimizer(model, r=0, lora_alpha=8, lr=0.1)
    with pytest.raises(ValueError, match="no LoRA"):
        create_lorafa_optimizer(ia3(), r=4, lora_alpha=8, lr=0.1)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)
    with pytest.warns(PeftWarning, match="r=2 is not what"):
        create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=0.1)


# ---- Riemannian


def test_riemannian_gradients():
    model, x, target = teacher()
    a, b = factors(model)
    nn.init.normal_(b)
    (model(x) - target).square().mean().backward()
    before = [p.detach().clone() for p in (a, b)]
    gradients = [p.grad.clone() for p in (a, b)]
    create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=0.05).step()
    identity = 0.05 * torch.eye(4)
    for_a = torch.linalg.inv(before[1].T @ before[1] + identity) @ gradients[0]
    for_b = gradients[1] @ torch.linalg.inv(before[0] @ before[0].T + identity)
    torch.testing.assert_close(a.detach(), before[0] - 0.1 * for_a, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(b.detach(), before[1] - 0.1 * for_b, atol=1e-5, rtol=1e-4)
    assert torch.equal(a.grad, gradients[0]) and torch.equal(b.grad, gradients[1])


def path_of_losses(make, share: float) -> Tensor:
    """Losses of some steps from a product that is shared out unevenly between A and B."""
    model, x, target = teacher()
    a, b = factors(model)
    torch.manual_seed(1)
    nn.init.normal_(b, std=0.1)
    with torch.no_grad():
        a.mul_(share), b.div_(share)
    optimizer = make(model)
    return torch.tensor([train(model, optimizer, x, target, steps=1) for _ in range(30)])


def test_riemannian_steps_depend_on_the_product_alone():
    def riemannian(model):
        return create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=1e-6)

    def plain(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)

    even, uneven = path_of_losses(riemannian, 1.0), path_of_losses(riemannian, 8.0)
    torch.testing.assert_close(uneven, even, rtol=1e-2, atol=1e-4)
    assert (path_of_losses(plain, 8.0) - path_of_losses(plain, 1.0)).abs().max() > 0.1 * even[0]
    # And it gets there: the same change is learned in fewer steps than by the best rate of plain SGD.
    best = min(
        path_of_losses(lambda m, lr=lr: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=lr), 8.0)[-1]
        for lr in (0.003, 0.01, 0.03, 0.1)
    )
    assert uneven[-1] < 0.5 * best


def test_riemannian_wraps_any_optimizer():
    model = net()
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["weight_decay"] == 0.1
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    tokens = torch.arange(12).view(2, 6)

    def closure():
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert second < first and calls == ["pre", "post"] * 2
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01),
        lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01),
    ],
    ids=["riemannian", "lorafa"],
)
def test_state_is_kept(make):
    """Through a state dict, as checkpoints have it, and through copies and pickles of model and optimizer together."""
    model, x, target = teacher()
    optimizer = make(model)
    train(model, optimizer, x, target, steps=3)
    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    expected = train(model, optimizer, x, target, steps=3)
    for twin in ((other, resumed), copied, pickled):
        assert train(*twin, x, target, steps=3) == pytest.approx(expected, rel=1e-5)


def ia3() -> PeftModel:
    return get_peft_model(Net(), IA3Config(target_modules=["linear"], feedforward_modules=[]))


def test_riemannian_settings():
    with pytest.raises(ValueError, match="lora_A"):
        create_riemannian_optimizer(ia3(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="reg"):
        create_riemannian_optimizer(net(), torch.optim.SGD, lr=0.1, reg=0.0)
    with pytest.raises(ValueError, match="LBFGS"):
        create_riemannian_optimizer(net(), torch.optim.LBFGS, lr=0.1)


@pytest.mark.parametrize("wrong", [int, "AdamW", torch.optim.lr_scheduler.StepLR])
def test_what_is_no_optimizer_is_refused(wrong):
    with pytest.raises(TypeError, match="optimizer"):
        create_riemannian_optimizer(net(), wrong, lr=0.1)
    with pytest.raises(TypeError, match="optimizer"):
        create_loraplus_optimizer(net(), wrong, lr=0.1, loraplus_lr_ratio=2)


def test_loraplus_settings():
    with pytest.raises(ValueError, match="ratio"):
        create_loraplus_optimizer(net(), torch.optim.SGD, lr=0.1, loraplus_lr_ratio=0)
    with pytest.raises(ValueError, match="trainable"):
        create_loraplus_optimizer(nn.Sequential(), torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2)
