"""Trained adapters as frozen hooks, stacked to one pair (A, B) per site over all rounds.

By default nothing is merged into the weights. `suspended(model)` restores the base model in both
cases.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from shl.fast import is_fast
from shl.hooks.adapter import Adapter, check_fits, common_value
from shl.hooks.handle import Handle, handles_on, suspended
from shl.hooks.lora import LoRA
from shl.hooks.positions import Positions, Scope
from shl.hooks.sites import as_linear, linear_input, linear_output
from shl.utils.errors import require
from shl.utils.model import Model
from shl.utils.shapes import Bool, Float


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter equivalent to `adapters` applied in sequence; scales are folded into B.

    At a linear site updates add, so A and B are concatenated. At the residual site they compose,
    (I + B2 A2)(I + B1 A1) = I + B1 A1 + B2 A2 (I + B1 A1), so A2 is replaced by A2 + A2 B1 A1.
    Metadata is kept where the adapters agree.

    Raises:
        ShlError: there is no adapter, or they were made for different models.

    Example:
        >>> from shl.config import HealConfig
        >>> from shl.hooks.adapter import fresh_adapter
        >>> from shl.models.tiny import tiny_gemma
        >>> one = fresh_adapter(tiny_gemma(), HealConfig(rank=2, sites=("q",), layers=(0,)))
        >>> stack([one, one]).down["blocks.0.q"].shape
        torch.Size([4, 32])
    """
    require(len(adapters) > 0, "there are no adapters to stack, give at least one.")
    models = {adapter.model_name for adapter in adapters}
    require(len(models) == 1, f"the adapters were made for different models: {sorted(models)}.")
    metadata = {
        key: common_value(getattr(a, key) for a in adapters) for key in ("weights", "dtype", "axis")
    }
    sites = {site.name: site for adapter in adapters for site in adapter.sites}
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    for name, site in sites.items():
        parts = [adapter for adapter in adapters if name in adapter.down]
        a_of = [adapter.down[name].detach() for adapter in parts]
        b_of = [adapter.up[name].detach() * adapter.scale for adapter in parts]
        if site.kind == "resid":
            for i in range(1, len(parts)):
                below = torch.cat(a_of[:i])
                a_of[i] = a_of[i] + (a_of[i] @ torch.cat(b_of[:i], dim=1)) @ below
        down[name] = torch.cat(a_of)
        up[name] = torch.cat(b_of, dim=1)
    ordered = tuple(sorted(sites.values(), key=lambda site: (site.layer, site.name)))
    return Adapter(ordered, down, up, 1.0, models.pop(), **metadata)


def _stack_for(model: Model, adapters: Sequence[Adapter]) -> Adapter:
    """The stack of `adapters`, which must fit the model; without sites if there are none."""
    for adapter in adapters:
        check_fits(model, adapter)
    return stack(adapters) if adapters else Adapter((), {}, {}, 1.0, "")


class Baked(LoRA):
    """A frozen stack of adapters on a model: a context manager with `.remove()`.

    Attributes:
        stacked: all adapters as one.
        fused: whether `fused_decoding` may merge the stack into the weights.
    """

    def __init__(
        self,
        model: Model,
        adapters: Sequence[Adapter],
        scope: Scope | None = None,
        *,
        fused: bool = True,
    ) -> None:
        self.fused, self.stacked = fused, _stack_for(model, adapters)
        count = Counter(s.name for a in adapters for s in a.sites if s.kind == "resid")
        repeated = [name for name, times in count.items() if times > 1]
        require(
            scope is None or scope.whole or not repeated,
            f"several adapters act at {', '.join(repeated)}, where a dose of their composition "
            "is not the composition of their doses; attach them one by one.",
        )
        one = self.stacked
        super().__init__(model, one.sites, one.down, one.up, one.scale, scope)
        one.down.update(self.down)  # share the hooks' tensors to save memory


class Materialised(Handle):
    """A stack of adapters merged into the weights, computed once in fp32.

    Base's tensors are kept and put back by reference on removal.
    """

    def __init__(self, model: Model, adapters: Sequence[Adapter]) -> None:
        stacked = _stack_for(model, adapters)
        require(
            not any(isinstance(h, Materialised) for h in handles_on(model)),
            "the model already has a materialised stack, remove it first.",
        )
        self.swaps: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for site in stacked.sites:
            require(
                site.kind != "resid",
                f"{site.name} is on the residual stream, which has no weight to merge it into; "
                "bake it as hooks.",
            )
            parameter, out_in, sizes = as_linear(model, site)
            base = rearrange(parameter.data, out_in, **sizes)
            a, b = stacked.down[site.name].float(), stacked.up[site.name].float()
            update = einsum(b, a, "d_out rank, rank d_in -> d_out d_in")
            effective = (base.float() + update * stacked.scale).to(base.dtype)
            back = " -> ".join(reversed(out_in.split(" -> ")))
            self.swaps.append((parameter, parameter.data, rearrange(effective, back, **sizes)))
        super().__init__(model)
        self._live = self._removed = False
        self._pause(False)

    @property
    def on(self) -> bool:
        """Whether the effective weights are in place."""
        return self._live

    def _pause(self, paused: bool) -> None:
        for parameter, base, effective in self.swaps:
            parameter.data = base if paused else effective
        # A handle removed inside `suspended` must not be restored when that ends.
        self._live = not paused and not self._removed

    def remove(self) -> None:
        """Put base's tensors back; a second call does nothing."""
        if self._live:
            self._pause(True)
        self.swaps.clear()
        self._removed = True
        super().remove()


def baked(
    model: Model,
    adapters: Sequence[Adapter],
    *,
    materialise: bool = False,
    fused: bool = True,
    dose: float | Float[Tensor, " batch"] = 1.0,
    mask: Bool[Tensor, "batch pos"] | None = None,
    positions: Positions | None = None,
) -> Baked | Materialised:
    """Apply trained adapters in sequence until the returned context manager ends.

    Args:
        materialise: merge the adapters into the weights (base's tensors are kept and restored
            exactly): no cost per token, one more copy of the adapted weights.
        fused: allow a long `generate` to merge the stack into the weights while it runs, if no
            other hook is on an adapted site (`fused_decoding`); False saves that copy.
        dose, mask, positions: factor of the updates for each token, as in
            `shl.hooks.positions.Scope`.

    Raises:
        ShlError: an adapter was made for another model or other sites; dose, mask or positions are
            out of range; or, with `materialise`, an adapter is on the residual stream, the model
            has a materialised stack, or dose, mask or positions are given.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with baked(model, []):
        ...     logits = model("Hello?")
    """
    scope = Scope(model, dose, mask=mask, positions=positions)
    if not materialise:
        return Baked(model, adapters, scope, fused=fused)
    require(
        scope.whole,
        "weights act on every token alike; bake as hooks to use a dose, mask or positions.",
    )
    return Materialised(model, adapters)


@contextmanager
def fused_decoding(model: Model) -> Iterator[None]:
    """Merge the baked stacks of `model` into the weights inside the body, instead of hooks.

    A decoding step is then as fast as base's. It applies to fast models with fp32 weights
    without gradients, and to stacks with a dose of 1 for every token whose sites have no other
    hooks; other stacks keep their hooks. Logits differ in their last bits.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with torch.no_grad(), fused_decoding(model):
        ...     logits = model("Hello?")
    """
    stacks = [h for h in handles_on(model) if isinstance(h, Baked) and _fusible(h)]
    others = any(isinstance(h, Materialised) for h in handles_on(model))
    if not stacks or others or torch.is_grad_enabled() or not is_fast(model):
        yield
        return
    with suspended(model, *stacks), Materialised(model, [h.stacked for h in stacks]):
        yield


def _fusible(handle: Baked) -> bool:
    model = handle.model
    modules = (
        module
        for site in handle.sites
        for module in (linear_input(model, site)[0], linear_output(model, site))
    )
    return (
        handle.fused
        and bool(handle.sites)
        and handle.scope.whole
        and model.W_U.dtype == torch.float32
        and all(site.kind != "resid" for site in handle.sites)
        and all(map(handle.owns_all_hooks, modules))
    )
