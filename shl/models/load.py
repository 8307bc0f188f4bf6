"""Load a model by name or from a folder, on either of TransformerLens's engines."""

import json
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from shl.fast import Bridge
from shl.models.weights import (
    ARCHITECTURES,
    EMBEDDED,
    converter,
    hooked_config,
    hooked_parameters,
    inverse_frequencies,
    model_folder,
    no_progress_bars,
)
from shl.utils.errors import ShlError, require
from shl.utils.model import Model

ENGINES = ("auto", "hooked", "bridge")
DeviceMap = str | Mapping[str, str | int]


def load_model(
    name: str = "gemma-3-270m",
    *,
    engine: str = "auto",
    device: str | None = None,
    device_map: DeviceMap | None = None,
    dtype: torch.dtype | None = None,
    fast: bool = True,
) -> Model:
    """Load a model with all parameters frozen.

    Args:
        name: an embedded model (`gemma-3-270m`, `smollm2-135m-instruct`), a hub name
            (`google/gemma-3-1b-it`), or the path of a local Hugging Face folder.
        engine: "hooked" is a HookedTransformer (Gemma-3 and Llama; TransformerLens 3.9), "bridge" a
            TransformerBridge around transformers' own modules (every architecture that
            TransformerLens knows), "auto" the first where it is installed. Vectors and adapters of
            one work on the other.
        device: None is CUDA if available, else the CPU.
        device_map: devices by module, as in transformers ("auto", or names such as
            `model.layers.0`), for the engine "bridge".
        dtype: None is fp32 on the CPU and bf16 on CUDA. On a CPU with bf16 instructions, bf16 takes
            about a third of the time of a forward; on gemma-3-270m its mean KL per token to fp32 is
            then 0.002 nats (0.0012 in transformers).
        fast: use the faster classes of `shl.fast` on a HookedTransformer; False keeps
            TransformerLens's own. Results agree up to rounding.

    Returns:
        A model without weight processing, with the same logits as in transformers.

    Raises:
        ShlError: the model or device is unknown, access is denied, the checksum is wrong, the disk
            is full, the engine is not installed or does not know the architecture, or the device
            map leaves a module out.

    Example:
        >>> model = load_model("gemma-3-270m", device="cpu")
        >>> model("The capital of France is").shape
        torch.Size([1, 6, 262144])
    """
    device = choose_device(device)
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    chosen = choose_engine(engine)
    # Vectors and adapters carry the name.
    require(name.isprintable(), f"the model name {name!r} has a character that is not printable.")
    folder = model_folder(name)
    if chosen == "bridge":
        return _load_bridge(name, folder, device, device_map, dtype)
    require(device_map is None, f"device_map is {device_map!r}, only engine='bridge' takes one.")
    with _Reading(folder):
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        state = _read_safetensors(folder)
        tokenizer = _read_tokenizer(folder, ours=name in EMBEDDED)
    return build_model(
        hf_config, state, tokenizer, name=name, device=device, dtype=dtype, fast=fast
    )


def choose_device(name: str | None) -> str:
    """The device that a name in `load_model` stands for, by default CUDA if there is any.

    Raises:
        ShlError: the name is unknown, or torch does not find the device.

    Example:
        >>> choose_device("cpu")
        'cpu'
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = name or ("cuda" if available else "cpu")
    kind, colon, index = name.partition(":")
    require(
        name == "cpu" or (kind == "cuda" and index.isdecimal() == bool(colon)),
        f"device is {name!r}, it must be cpu, cuda or cuda:N.",
    )
    require(
        name == "cpu" or int(index or 0) < available,
        f"device is {name!r}, torch finds {available} CUDA devices.",
    )
    return name


def choose_engine(engine: str) -> str:
    """The engine that a name in `load_model` stands for.

    Raises:
        ShlError: the name is unknown, or the engine is not in the installed TransformerLens.

    Example:
        >>> choose_engine("bridge")
        'bridge'
    """
    require(engine in ENGINES, f"engine is {engine!r}, it must be one of {', '.join(ENGINES)}.")
    installed = find_spec("transformer_lens.HookedTransformer") is not None
    require(
        installed or engine != "hooked",
        f"engine 'hooked' is not in TransformerLens {version('transformer-lens')}; run "
        "`pip install 'transformer-lens<4'`, or use engine='bridge'.",
    )
    if engine == "auto":
        return "hooked" if installed else "bridge"
    return engine


def _load_bridge(
    name: str, folder: Path, device: str, device_map: DeviceMap | None, dtype: torch.dtype
) -> Bridge:
    with _Reading(folder):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        architectures = config.architectures or ["none"]
        _require_known(name, architectures[0])
        if isinstance(device_map, Mapping):
            _require_complete(config, device_map)
        # SDPA has no soft cap of the scores.
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        with no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="eager" if capped else "sdpa",
                device_map=device_map,
                output_loading_info=True,
            )
        hf, info = loaded
        missing = sorted(info["missing_keys"])
        require(not missing, f"the weights of {name} have no tensor {', '.join(missing[:3])}.")
        tokenizer = _read_tokenizer(folder, ours=name in EMBEDDED)
    return build_bridge(hf if device_map else hf.to(device), tokenizer, name=name)


def _require_known(name: str, architecture: str) -> None:
    require(
        architecture in SUPPORTED_ARCHITECTURES,
        f"the architecture of {name} is {architecture}, it must be one of the "
        f"{len(SUPPORTED_ARCHITECTURES)} that TransformerBridge knows, such as Qwen3ForCausalLM.",
    )


def _require_complete(config: PretrainedConfig, device_map: Mapping[str, str | int]) -> None:
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
    prefixes = tuple(f"{key}." for key in device_map)
    out = [name for name in names if not name.startswith(prefixes) and "" not in device_map]
    require(
        not out,
        f"the device map has no device for {', '.join(out[:2])}, it must cover every parameter; "
        "the key '' is the whole model.",
    )


def build_bridge(
    hf: Any, tokenizer: PreTrainedTokenizerBase | None, *, name: str = "custom"
) -> Bridge:
    """A TransformerBridge around a causal language model of transformers, which is changed.

    The attention implementation of `hf` is kept.

    Raises:
        ShlError: TransformerBridge does not know the architecture.

    Example:
        >>> from shl.models.tiny import tiny_hf
        >>> build_bridge(tiny_hf(), None)(torch.tensor([[2, 5]])).shape
        torch.Size([1, 2, 104])
    """
    architecture = type(hf).__name__
    _require_known(name, architecture)
    weights = dict(hf.requires_grad_(False).eval().named_parameters())
    text, attention = hf.config.get_text_config(), hf.get_decoder().config._attn_implementation
    prepends = tokenizer is not None and _mark_bos(tokenizer)
    model = Bridge.of(
        build_bridge_from_module(
            hf, architecture, hf_config=hf.config, tokenizer=tokenizer, model_name=name
        )
    )
    hf.set_attn_implementation(attention)
    model.requires_grad_(False)
    cfg: Any = model.cfg
    if tokenizer is not None:
        cfg.default_prepend_bos = prepends
    layer_types = getattr(text, "layer_types", None) or ["sliding_attention"]
    window = getattr(text, "sliding_window", None) if "sliding_attention" in layer_types else None
    cfg.use_local_attn, cfg.window_size = window is not None, window
    if hf.config.model_type in ARCHITECTURES:
        vars(model)["stored"] = partial(hooked_parameters, hf.config, weights, cfg)
    else:
        vars(model)["stored"] = weights.items
    return model


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
) -> Model:
    """A HookedTransformer from a transformers config, a state dict and a tokenizer.

    Raises:
        ShlError: the architecture is neither Gemma-3 nor Llama, or a tensor is missing or has
            another shape than in the config.
    """
    from transformer_lens import HookedTransformer

    from shl.fast.blocks import speed_up

    cfg = hooked_config(hf_config, name=name, device=device, dtype=dtype)
    if tokenizer is not None:
        cfg.default_prepend_bos = _mark_bos(tokenizer)
    with warnings.catch_warnings():
        # HookedTransformer warns that it is removed in 4.0.
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
