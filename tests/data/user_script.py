# ruff: noqa
import torch
from torch import nn

import peft
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.optimizers import create_loraplus_optimizer as create

base = nn.Sequential(nn.Linear(2, 2))
config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], task_type=TaskType.CAUSAL_LM)
config2 = LoraConfig(lora_alpah=3)  # wrong
config3 = LoraConfig(r="8")  # wrong
config4 = peft.VeraConfig(vera_dropuot=0.1)  # wrong
model = get_peft_model(base, config)
model.print_trainable_parameters()
model.save_pretrained("out")
model.savee_pretrained("out")  # wrong
merged = model.merge_and_unload()
merged.save_pretrained("merged")
model.merge_and_unlod()  # wrong
model.add_weighted_adapter(["a"], [1.0], "b", combination_type="linear")
model.gradient_checkpointing_enable()
model.enable_input_require_grads()
device: torch.device = model.device
with model.disable_adapter():
    model(torch.zeros(1, 2))
loaded = PeftModel.from_pretrained(base, "out", is_trainable=True)
loaded.load_adapter("out", adapter_name="other")
loaded.set_adapter("other")
loaded.set_adaptr("other")  # wrong
auto = AutoPeftModelForCausalLM.from_pretrained("out")
auto.merge_and_unload()
rank: int = config.r
saved = PeftConfig.from_pretrained("out")
print(peft.LoraConfg)  # wrong
print(peft.helpers.rescale_adapter_scale, peft.__version__.split("."))
peft.get_peft_model(base, config, adaptername="x")  # wrong
layers = model.base_model.model.layers
optimizer = create(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
config.targte_modules  # wrong
