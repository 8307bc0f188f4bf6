"""What the package needs from a model, whichever of TransformerLens's engines runs it."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Model(Protocol):
    """A HookedTransformer, or the TransformerBridge of `shl.load_model(..., engine="bridge")`.

    Called with tokens `[batch, pos]`, it returns logits `[batch, pos, d_vocab]`; with
    `stop_at_layer=n` the residual stream `[batch, pos, d_model]` after n layers. `attention_mask`
    has the shape of the new tokens, `past_kv_cache` is a `shl.fast.KVCache`. Where a layer is
    hooked, and which parameters a linear has, is the table of `shl.hooks.sites`.

    Attributes:
        cfg: TransformerLens's config: `model_name`, `n_layers`, `d_model`, `n_ctx` and so on.
        ln_final: the final norm, from the residual stream to what `unembed` reads.
        unembed: the unembedding, `[..., d_model]` to `[..., d_vocab]`, without a soft cap.
        blocks: the layers, in order.
        hook_dict: every HookPoint by name.
    """

    cfg: Any
    tokenizer: Any
    training: bool

    @property
    def W_U(self) -> Any:
        """The unembedding, `[d_model, d_vocab]`."""

    @property
    def b_U(self) -> Any:
        """The bias of the logits, `[d_vocab]`."""

    if TYPE_CHECKING:
        # From Python 3.12 on, isinstance does not see the submodules of a module; before, it
        # evaluates properties, and a bridge makes this dictionary at each access.
        ln_final: Any
        unembed: Any
        blocks: Any

        @property
        def hook_dict(self) -> Mapping[str, Any]:
            """Every HookPoint by name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, see above."""

    def to_tokens(self, *args: Any, **kwargs: Any) -> Tensor:
        """Token ids `[batch, pos]` of texts."""

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's method: the output, and every activation by name."""

    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """TransformerLens's method: its own hooks for the length of a body."""

    def reset_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's method: remove its own hooks."""

    def modules(self) -> Iterator[nn.Module]:
        """As in torch."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """As in torch."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As in torch."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As in torch."""
