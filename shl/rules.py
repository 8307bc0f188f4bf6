"""Extraction rules: how two sets of residuals become one direction. A rule is any function of
`(positive, negative)`, so a user's own does as well."""

from collections.abc import Callable

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from shl.shapes import Direction

Rule = Callable[[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]], Direction]


def mean_difference(
    positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "n d_model"]
) -> Direction:
    """The default extraction rule, `[n, d_model]` twice to `[d_model]`.

    Example:
        >>> import torch
        >>> mean_difference(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([2., 0.])
    """
    return reduce(positive - negative, "n d_model -> d_model", "mean")


def first_component(
    positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "n d_model"]
) -> Direction:
    """First principal component of the differences (uncentred), in the direction and at the size
    of their mean along it (Zou et al. 2023, arXiv:2310.01405, section 3.1).

    Example:
        >>> import torch
        >>> first_component(torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.zeros(2, 2))
        tensor([4., 0.])
    """
    differences = positive - negative
    component = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return component * (differences @ component).mean()


def rule_name(rule: Rule) -> str:
    """What a file calls a rule: its function's name.

    Example:
        >>> rule_name(mean_difference)
        'mean_difference'
    """
    return str(getattr(rule, "__name__", type(rule).__name__))
