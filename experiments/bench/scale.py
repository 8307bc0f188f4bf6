"""What a larger model needs, from its config: `python -m experiments.bench.scale`.

Arithmetic, not measurements: memory of weights, adapters, KV cache and final hidden states, and the
time of an arm as its floating-point operations over a machine's rate.
"""

import math
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

GB = 1e9
ROWS, LENGTH = 64, 80
"""Rows decoded together, and the positions of one: a prompt with its persona and 32 tokens."""
STEP = 3
"""Texts of an optimiser step, whose final states student, teacher and reference hold at once."""
RANK = 16
"""Rank of an adapter."""
ROUNDS = 2
"""Rounds of an arm, the later of which keep the earlier adapters."""
DECODED, READ, TRAINED = 14_000, 60_000, 5_000
"""Tokens of the default study of two rounds. Decoded and trained ones are counted in the record of
`RESULTS.md`; those that are only read are known to about a factor of two."""


@dataclass(frozen=True)
class Shape:
    """Sizes from a model's config; the embedding is tied, as in Gemma-3.

    Example:
        >>> GEMMA_270M.parameters  # embedding 262144 x 640, 18 layers of 5,573,632, a norm of 640
        268098176
    """

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    d_head: int
    d_mlp: int
    vocab: int

    @property
    def sites(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear maps of a layer: q, k, v, o, gate, up, down."""
        d, own, shared = self.d_model, self.heads * self.d_head, self.kv_heads * self.d_head
        mlp = [(d, self.d_mlp), (d, self.d_mlp), (self.d_mlp, d)]
        return [(d, own), (d, shared), (d, shared), (own, d), *mlp]

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, which is the unembedding too."""
        return self.vocab * self.d_model

    @property
    def body(self) -> int:
        """Parameters of everything else: linear maps and norms."""
        norms = 4 * self.d_model + 2 * self.d_head
        return self.layers * (sum(a * b for a, b in self.sites) + norms) + self.d_model

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.body + self.embedding

    @property
    def adapted(self) -> int:
        """Layers with an adapter: all but the first and last sixth, as `shl.hooks.sites.band`."""
        n = self.layers
        return min(n - 1, round(5 / 6 * n)) + 1 - round(1 / 6 * n)


def shape_of(config: Any) -> Shape:
    """The sizes in a transformers config."""
    text = config.get_text_config()
    return Shape(
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.head_dim,
        text.intermediate_size,
        text.vocab_size,
    )


@dataclass(frozen=True)
class Machine:
    """A machine: FLOP/s and bytes/s that it reaches, bytes of memory, and bytes per weight."""

    name: str
    rate: float
    bandwidth: float
    memory: float
    width: int


def memory(shape: Shape, width: int) -> dict[str, float]:
    """Bytes by what they hold.

    A HookedTransformer stores the tied embedding twice. Adapters and their optimiser are fp32: 16
    bytes for each parameter of the one that is trained, 4 for those of earlier rounds. While a
    stack of adapters decodes, its layers' weights are there a second time if they are fp32, unless
    it is baked with `fused=False`.
    """
    adapter = RANK * shape.adapted * sum(a + b for a, b in shape.sites)
    return {
        "weights": (shape.body + 2 * shape.embedding) * width,
        "merged copy": shape.adapted * sum(a * b for a, b in shape.sites) * width * (width == 4),
        "adapters": adapter * (16 + 4 * (ROUNDS - 1)),
        "KV cache": 2 * shape.layers * shape.kv_heads * shape.d_head * ROWS * LENGTH * width,
        "hidden states": 3 * STEP * LENGTH * shape.d_model * width,
    }


def gpus(shape: Shape, machine: Machine) -> int:
    """How many are needed for nine tenths of their memory to hold the sum."""
    return math.ceil(sum(memory(shape, machine.width).values()) / (0.9 * machine.memory))


def hours(shape: Shape, machine: Machine) -> float:
    """Time of an arm of two rounds; a lower bound where launching a kernel outlasts the kernel.

    2 operations per parameter and token. A trained token is two forwards of the student's body and
    back, and one forward each of teacher and reference; at every second position the vocabulary has
    three products and one back. Decoding reads all weights per step, or computes, whichever takes
    longer.
    """
    read = 2 * shape.body * READ
    trained = (2 * shape.body * 4 + 2 * shape.embedding * 4 / 2) * TRAINED
    token = max(
        2 * shape.parameters / machine.rate,
        shape.parameters * machine.width / (ROWS * machine.bandwidth),
    )
    return ((read + trained) / machine.rate + DECODED * token) / 3600


GEMMA_270M = Shape(640, 18, 4, 1, 256, 2048, 262_144)
GEMMA_12B = Shape(3840, 48, 16, 8, 256, 15_360, 262_208)
GEMMA_27B = Shape(5376, 62, 32, 16, 128, 21_504, 262_208)
"""Gemma-3's text models, from their public configs."""
MODELS = {"270m": GEMMA_270M, "12b": GEMMA_12B, "27b": GEMMA_27B}
# 16 rows of gemma-3-270m take 253 ms a step there (README.md): 16 x 2 x 268e6 / 0.253 s.
TWO_CORES = Machine("two cores, fp32", 34e9, 27e9, 16 * GB, 4)
# Peaks of 989e12 FLOP/s and 3.35e12 bytes/s, of which 0.3 and 0.6 are assumed.
H100 = Machine("H100, bf16", 0.3 * 989e12, 0.6 * 3.35e12, 80 * GB, 2)


def main() -> None:
    """Print a row per model and machine."""
    console, table = Console(width=130), Table("model", "machine")
    for name in (*memory(GEMMA_270M, 4), "sum", "GPUs", "hours per arm"):
        table.add_column(name, justify="right")
    for name, shape in MODELS.items():
        for machine in (TWO_CORES, H100):
            held = memory(shape, machine.width)
            cells = [f"{value / GB:.2f} GB" for value in (*held.values(), sum(held.values()))]
            needed = str(gpus(shape, machine)) if machine is H100 else ""
            table.add_row(name, machine.name, *cells, needed, f"{hours(shape, machine):.2g}")
    console.print(table)


if __name__ == "__main__":
    main()
