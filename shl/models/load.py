"""Load a model by name or from a folder as a HookedTransformer."""

import json
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from shl.fast import speed_up
from shl.models.weights import EMBEDDED, converter, hooked_config, inverse_frequencies, model_folder
from shl.utils.errors import ShlError, require


def load_model(
    name: str = "gemma-3-270m",
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    fast: bool = True,
) -> HookedTransformer:
    """Load a model with all parameters frozen.

    Args:
        name: an embedded model (`gemma-3-270m`, `smollm2-135m-instruct`), a hub name
            (`google/gemma-3-1b-it`), or the path of a local Hugging Face folder.
        device: None is CUDA if available, else the CPU.
        dtype: None is fp32 on the CPU and bf16 on CUDA. On a CPU with bf16 instructions, bf16 takes
            about a third of the time of a forward; on gemma-3-270m its mean KL per token to fp32 is
            then 0.002 nats (0.0012 in transformers).
        fast: use the faster classes of `shl.fast`; False keeps TransformerLens's own. Results agree
            up to rounding.

    Returns:
        A HookedTransformer without weight processing, with the same logits as in transformers.

    Raises:
        ShlError: the model is unknown, access is denied, the checksum is wrong, the disk is full,
            or the architecture is neither Gemma-3 nor Llama.

    Example:
        >>> model = load_model("gemma-3-270m", device="cpu")
        >>> model("The capital of France is").shape
        torch.Size([1, 6, 262144])
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    folder = model_folder(name)
    with _Reading(folder):
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        state = _read_safetensors(folder)
        tokenizer = _read_tokenizer(folder, ours=name in EMBEDDED)
    return build_model(
        hf_config, state, tokenizer, name=name, device=device, dtype=dtype, fast=fast
    )


READ_ERRORS = (
    OSError | ValueError | LookupError | TypeError | AttributeError | ArithmeticError | RuntimeError
)


class _Reading(AbstractContextManager[None]):
    """Convert errors of the libraries that read a damaged folder to ShlError.

    Only readers run inside, so that errors of this package are not converted. tokenizers raises
    plain `Exception`, which is matched exactly.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, ShlError | torch.OutOfMemoryError):
            return
        if type(error) in (Exception, SafetensorError) or isinstance(error, READ_ERRORS):
            reason = (str(error).splitlines() or [""])[0].rstrip(".:")
            raise ShlError(
                f"the model folder {self.folder} cannot be read ({type(error).__name__}: {reason})."
            ) from error


def build_model(
    hf_config: PretrainedConfig,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str = "custom",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    fast: bool = True,
) -> HookedTransformer:
    """A HookedTransformer from a transformers config, a state dict and a tokenizer.

    Raises:
        ShlError: the architecture is neither Gemma-3 nor Llama, or a tensor is missing or has
            another shape than in the config.
    """
    cfg = hooked_config(hf_config, name=name, device=device, dtype=dtype)
    if tokenizer is not None:
        cfg.default_prepend_bos = _mark_bos(tokenizer)
    with warnings.catch_warnings():
        # HookedTransformer warns that it is removed in 4.0; the version is pinned below that.
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    convert = converter(hf_config, state, cfg)
    for key, parameter in model.named_parameters():
        value = convert(key)
        if value is None:
            parameter.data = torch.zeros(parameter.shape, dtype=dtype, device=device)
            continue
        require(
            value.shape == parameter.shape,
            f"the weights of {key} have shape {tuple(value.shape)}, by the config of {name} it "
            f"must be {tuple(parameter.shape)}.",
        )
        parameter.data = value.to(device=device, dtype=dtype)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    if fast:
        speed_up(model, inverse_frequencies(hf_config))
    model.requires_grad_(False)
    return model.eval()


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        table = json.loads(index.read_text("utf-8"))
        weight_map = table.get("weight_map") if isinstance(table, dict) else None
        files: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        require(
            all(isinstance(file, str) for file in files),
            f"{index} has no weight_map from tensors to files.",
        )
        names = sorted(set(files))
        require(
            all(Path(name).name == name for name in names),
            f"{index} names a file outside its folder.",
        )
    state: dict[str, Tensor] = {}
    for name in names:
        state |= load_file(folder / name)
    return state


def _read_tokenizer(folder: Path, *, ours: bool) -> PreTrainedTokenizerBase:
    if ours:
        # Three times as fast as AutoTokenizer, which parses the file three times.
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        settings.pop("tokenizer_class", None)
        file, template = folder / "tokenizer.json", folder / "chat_template.jinja"
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(file), **settings)
        if template.is_file():
            tokenizer.chat_template = template.read_text("utf-8")
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    require(
        tokenizer.bos_token is not None or tokenizer.eos_token is not None,
        f"the tokenizer in {folder} has neither a bos nor an eos token.",
    )
    return tokenizer


def _mark_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Mark a tokenizer as prepending BOS, and return whether it does.

    TransformerLens reloads a tokenizer from disk unless it is marked. One that was not loaded from
    a named folder cannot be reloaded, so it is marked even if it does not prepend BOS.
    """
    if tokenizer.bos_token is None:
        return False
    prepends = tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    if prepends:
        tokenizer.add_bos_token = True
    if prepends or not tokenizer.init_kwargs.get("name_or_path"):
        tokenizer.init_kwargs["add_bos_token"] = True
        tokenizer.init_kwargs.setdefault("name_or_path", "")
    return prepends
