"""The vocabulary in chunks: their products with the unembedding, and the room these take."""

from collections.abc import Iterator

import torch
from torch import Tensor

from shl.linear import linear

PIECE = 1024
"""Words per product: MKL is up to twice as fast at a batch of them, a thread to each, as at a wide
one that its threads share."""


def chunk(tokens: int, vocab: int) -> int:
    """Words per chunk: a function of the shape alone, so results repeat bit for bit. A chunk of
    logits takes 4 MB: larger ones leave the cache, and with smaller ones threads wait for each
    other more often, which a busy neighbour makes long."""
    return max(1, min(vocab, max(512, (1 << 20) // max(tokens, 1))))


def pieces(tokens: int, vocab: int) -> Iterator[tuple[int, int, int]]:
    """(start, count, width) of chunks that are `count` times `width` words.

    Example:
        >>> list(pieces(512, 5000))
        [(0, 2, 1024), (2048, 2, 1024), (4096, 1, 904)]
    """
    words = chunk(tokens, vocab)
    width = min(words, PIECE)
    most = words // width
    start = 0
    while start < vocab:
        count = min(most, (vocab - start) // width)
        yield (start, count, width) if count else (start, 1, vocab - start)
        start += count * width or vocab - start


class Chunk:
    """Words of the unembedding, `[count * width, d]`, and their bias, `[count, width]`; fp32."""

    def __init__(
        self, unembed: Tensor, bias: Tensor | None, start: int, count: int, width: int
    ) -> None:
        end = start + count * width
        self.weight = unembed.T[start:end].float()
        self.bias = None if bias is None else bias[start:end].float().view(count, width)
        self.shape = (count, width)

    def products(self, rows: Tensor, room: Tensor) -> Tensor:
        """`[rows, count, width]`, a view into `room`, without bias."""
        count, width = self.shape
        out = room[: count * len(rows) * width].view(count, len(rows), width)
        shares = self.weight.unflatten(0, self.shape).mT
        return torch.bmm(rows.expand(count, -1, -1), shares, out=out).transpose(0, 1)

    def exact_enough(self, rows: Tensor) -> Tensor:
        """The same by the faster of two libraries, up to twice as far off."""
        return linear(rows, self.weight).unflatten(1, self.shape)

    def weighted(self, e: Tensor) -> Tensor:
        """e W, from `[tok, count, width]` to `[tok, d]`."""
        return linear(e.flatten(1), self.weight.T, deep=True)

    def inside(self, room: Tensor, tok: int) -> Tensor:
        """`[tok, count, width]` of `room`, the words of a token side by side."""
        count, width = self.shape
        return room[: tok * count * width].view(tok, count, width)


def space(tok: int, vocab: int, like: Tensor) -> Tensor:
    """Room for a chunk, allocated once per sweep: fresh pages cost more than the sums."""
    return like.new_empty(len(like) * max(count * width for _, count, width in pieces(tok, vocab)))
