"""Recording HookPoints as they pass, in any forward and in cached generation."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.errors import check
from shl.hooks import ROWS, Handle
from shl.shapes import Float


class Recorder(Handle):
    """Keeps a clone of every tensor that passes the named HookPoints, in order, while it is on.

    A context manager and a handle. Under `generate` the first tensor of each name is that of a
    batch's prompts (left-padded), the others are one position long; `by_row` sorts them into the
    caller's rows. Clones are ordinary tensors that may enter autograd.

    Args:
        names: TransformerLens's names of HookPoints (`blocks.3.hook_resid_post`).

    Raises:
        ShlError: a name that the model does not have.

    Example:
        >>> from shl.generate import generate
        >>> from shl.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with Recorder(model, ["blocks.1.hook_resid_post"]) as recorder:
        ...     texts = generate(model, ["Hello?"], max_new_tokens=3, min_new_tokens=3)
        >>> [x.shape[1] for x in recorder.seen["blocks.1.hook_resid_post"]]
        [13, 1, 1]
    """

    def __init__(self, model: HookedTransformer, names: Iterable[str]) -> None:
        names = tuple(names)
        for name in names:
            check(
                name in model.hook_dict,
                f"{name!r} is no HookPoint of {model.cfg.model_name}, one is "
                "'blocks.0.hook_resid_post'.",
            )
        super().__init__(model)
        self.seen: dict[str, list[Tensor]] = {name: [] for name in names}
        self._rows: dict[str, list[Tensor | None]] = {name: [] for name in names}
        for name in names:
            self._add(model.hook_dict[name], partial(self._keep, name))

    @property
    def per_row(self) -> bool:
        """True: a prompt prefix that rows share must pass for each of them."""
        return True

    def _keep(self, name: str, x: Tensor) -> None:
        # Not `detach().clone()` alone: a tensor made in inference mode could never enter autograd.
        with torch.inference_mode(False):
            self.seen[name].append(x.detach().clone())
        self._rows[name].append(ROWS.get())

    def by_row(self, prompt_lengths: Sequence[int]) -> dict[str, list[Float[Tensor, "pos ..."]]]:
        """What one call of `generate` let pass, per HookPoint and row: `[pos, ...]`, where index i
        is absolute position i of the prompt and then of the completion, however rows were batched,
        padded and dropped. The last token is chosen and never run, so it has no position.

        Args:
            prompt_lengths: `len(c.prompt_tokens)` of each completion of the call, in its order.

        Raises:
            ShlError: something else passed than one call of `generate` with that many rows.

        Example:
            >>> from shl.generate import generate
            >>> from shl.tiny import tiny_gemma
            >>> model, name = tiny_gemma(), "blocks.1.hook_resid_post"
            >>> with Recorder(model, [name]) as recorder:
            ...     texts = generate(model, ["Hi?", "Hello?"], max_new_tokens=3, min_new_tokens=3)
            >>> rows = recorder.by_row([len(c.prompt_tokens) for c in texts])[name]
            >>> [tuple(row.shape) for row in rows]
            [(12, 32), (15, 32)]
        """
        wrong = f"what was recorded is not one call of generate with {len(prompt_lengths)} rows."
        out: dict[str, list[Tensor]] = {}
        for name, tensors in self.seen.items():
            pieces: list[list[Tensor]] = [[] for _ in prompt_lengths]
            for x, rows in zip(tensors, self._rows[name], strict=True):
                check(rows is not None and int(rows.max()) < len(pieces), wrong)
                assert rows is not None
                for own, row in zip(x, rows.tolist(), strict=True):
                    length = 1 if pieces[row] else prompt_lengths[row]
                    check(len(own) == 1 if pieces[row] else len(own) >= length, wrong)
                    pieces[row].append(own[-length:])
            check(all(pieces), wrong)
            out[name] = [torch.cat(own) for own in pieces]
        return out
