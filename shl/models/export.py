"""Export to PEFT's adapter format and to a merged Hugging Face folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from shl.hooks.adapter import Adapter, check_fits
from shl.hooks.bake import stack
from shl.hooks.handle import unhooked
from shl.hooks.sites import HF_NAMES, Site
from shl.models.tokens import tokenizer_of
from shl.models.weights import EMBEDDED
from shl.utils.errors import require
from shl.utils.model import Model


def _linear_sites(adapter: Adapter) -> tuple[Site, ...]:
    for site in adapter.sites:
        require(
            site.kind in HF_NAMES,
            f"{site.name} is on the residual stream, which has no weight to merge it into; it "
            "cannot be exported.",
        )
    return adapter.sites


def export_peft(
    adapters: Sequence[Adapter], folder: str | Path, *, prefix: str = "model.layers"
) -> Path:
    """Write all adapters as one in PEFT's format: `adapter_config.json` and
    `adapter_model.safetensors`.

    The rank is the sum of the ranks; scales are folded into B, so PEFT's scaling is 1.

    Args:
        prefix: name of the model's layers in transformers (`model.language_model.layers` for the
            multimodal Gemma-3 classes).

    Returns:
        The folder, for `PeftModel.from_pretrained(model, folder)`.

    Raises:
        ShlError: there is no adapter, they were made for different models, or one is on the
            residual stream.

    Example:
        >>> import tempfile
        >>> from shl.config import HealConfig
        >>> from shl.hooks.adapter import fresh_adapter
        >>> from shl.models.tiny import tiny_gemma
        >>> one = fresh_adapter(tiny_gemma(), HealConfig(rank=2, sites=("q",), layers=(0,)))
        >>> sorted(p.name for p in export_peft([one, one], tempfile.mkdtemp()).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    stacked = stack(adapters)
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for site in _linear_sites(stacked):
        name = f"{prefix}.{site.layer}.{HF_NAMES[site.kind]}"
        a, b = stacked.down[site.name], stacked.up[site.name] * stacked.scale
        ranks[name] = len(a)
        for factor, x in (("A", a), ("B", b)):
            key = f"base_model.model.{name}.lora_{factor}.weight"
            tensors[key] = x.detach().cpu().contiguous()
    largest = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != largest}
    embedded = EMBEDDED.get(stacked.model_name)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": embedded.hub_name if embedded else stacked.model_name,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return folder


@dataclass(frozen=True)
class Drift:
    """Distance between the log-probabilities of a merged, cast model and the hooked model."""

    largest: float
    mean_kl: float  # nats per token, hooked || merged
    dtype: str


@torch.no_grad()
def export_hf(
    model: Model,
    adapters: Sequence[Adapter],
    folder: str | Path,
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    text: str = "The manager told her to finish the shift, and she said that",
) -> Drift:
    """Write a Hugging Face folder with the adapters merged in fp32 and then cast to `dtype`.

    Args:
        model: the HookedTransformer of the adapters, for the drift and the tokenizer.
        source: the Hugging Face folder (or hub name) from which `model` was loaded.
        text: the text on which the drift is measured.

    Returns:
        The drift between `baked(model, adapters)`, without any other hook, and the folder's model.

    Raises:
        ShlError: there is no adapter, or one does not match the model or is on the residual stream.

    Example:
        >>> import tempfile
        >>> from shl.config import HealConfig
        >>> from shl.hooks.adapter import fresh_adapter
        >>> from shl.models.tiny import tiny_gemma, tiny_hf
        >>> source, folder = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> tiny_hf().save_pretrained(source)
        >>> model = tiny_gemma()
        >>> adapter = fresh_adapter(model, HealConfig(rank=2))
        >>> export_hf(model, [adapter], folder, source).largest < 1e-3
        True
    """
    stacked = stack(adapters)
    check_fits(model, stacked)
    hf: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    modules = dict(hf.named_modules())
    first = next(name for name in modules if name.endswith("layers.0.self_attn"))
    prefix = first.removesuffix(".0.self_attn")
    for site in _linear_sites(stacked):
        up, down = (x[site.name].float().cpu() for x in (stacked.up, stacked.down))
        update = einsum(up, down, "d_out rank, rank d_in -> d_out d_in")
        weight = modules[f"{prefix}.{site.layer}.{HF_NAMES[site.kind]}"].weight
        weight.data += update * stacked.scale
    hf.to(dtype=dtype)
    hf.save_pretrained(folder)
    tokenizer_of(model).save_pretrained(folder)
    tokens = model.to_tokens(text)
    with unhooked(model), stacked.attach(model):
        hooked = model(tokens).float()[0].log_softmax(-1).cpu()
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    difference = hooked - hf(tokens.cpu()).logits.float()[0].log_softmax(-1)
    kl = (hooked.exp() * difference).sum(-1).mean()
    return Drift(float(difference.abs().max()), float(kl), str(dtype).removeprefix("torch."))
