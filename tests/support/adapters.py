"""LoRA adapters in files, as PEFT saves them."""

import json

import torch
from safetensors.torch import save_file
from support.goldens import GOLDENS

# As PEFT 0.21 saves it, all its fields that are off left out.
PEFT_CONFIG = json.loads((GOLDENS / "adapter_config.json").read_bytes())
TARGETS = ("layers.1.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.2.self_attn.q_proj", "layers.2.mlp.down_proj")


def write_adapter(folder, module, ranks=(3, 3, 3, 3), prefix="model.", names=TARGETS, change=None, **fields):
    """Save an adapter of random numbers for layers of a module. Returns its A and B by the layers' names."""
    generator = torch.Generator().manual_seed(7)
    pairs, tensors = {}, {}
    linears = dict(module.named_modules())
    for name, rank in zip(names, ranks, strict=True):
        (found,) = (linear for path, linear in linears.items() if is_of_decoder(path, name))
        out, width = found.weight.shape
        pairs[name] = [torch.randn(shape, generator=generator) / 3 for shape in ((rank, width), (out, rank))]
        for kind, tensor in zip("AB", pairs[name], strict=True):
            tensors[f"base_model.model.{prefix}{name}.lora_{kind}.weight"] = tensor.clone()
    if change is not None:
        change(tensors)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG | fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return pairs


def is_of_decoder(path, name):
    return f".{path}".endswith(f".{name}") and "vision" not in path
