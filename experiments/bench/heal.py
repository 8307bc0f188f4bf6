"""One training step of `heal` against transformers with PEFT and full logits."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM

from experiments.bench.decode import MODEL, prompts
from experiments.bench.measure import Row, interleave, spread_note
from shl.config import HealConfig
from shl.hooks.adapter import Adapter, fresh_adapter
from shl.hooks.handle import suspended
from shl.hooks.sites import HF_NAMES
from shl.kl import aggregate, reverse_kl_and_nll
from shl.models.generate import Completion
from shl.models.load import load_model
from shl.models.scores import completion_hidden
from shl.models.tokens import decode, encode
from shl.models.weights import model_folder

NEW, BATCH = 64, 4
CONFIG = HealConfig(tau=0.0)  # the barrier is open from the first step


def completions(model: HookedTransformer) -> list[Completion]:
    """Texts of a length that training sees, without generating them."""
    out = []
    for asked, said in zip(prompts(BATCH, 20), prompts(2 * BATCH, 80)[BATCH:], strict=True):
        tokens = tuple(encode(model, said)[4 : 4 + NEW])
        text = decode(model, list(tokens))
        out.append(Completion(asked, text, tokens, tuple(encode(model, asked))))
    return out


def loss_of(kl: Sequence[Tensor], nll: Sequence[Tensor]) -> Tensor:
    """The barrier's loss from per-token values, one tensor per completion."""
    terms = [
        n.mean() + CONFIG.lam * torch.relu(aggregate(k, CONFIG.aggregate) - CONFIG.tau)
        for k, n in zip(kl, nll, strict=True)
    ]
    return torch.stack(terms).mean()


def our_step(
    model: HookedTransformer, adapter: Adapter, texts: list[Completion]
) -> Callable[[], Tensor]:
    """Reference states are computed once for a whole training, so they are not part of a step."""
    with suspended(model):
        reference = completion_hidden(model, texts).detach()
    targets = torch.tensor([t for c in texts for t in c.tokens], device=reference.device)
    sizes = [len(c.tokens) for c in texts]

    def run() -> Tensor:
        for p in adapter.parameters():
            p.grad = None
        with adapter.attach(model):
            hidden = completion_hidden(model, texts)
            kl, nll = reverse_kl_and_nll(hidden, reference, model.W_U, targets)
            loss = loss_of(kl.split(sizes), nll.split(sizes))
            loss.backward()
        return loss.detach()

    return run


def peft_model(adapter: Adapter) -> Any:
    """The same adapter in PEFT, on transformers' model, factors included."""
    from peft import LoraConfig, get_peft_model

    kinds = sorted({site.kind for site in adapter.sites})
    layers = sorted({site.layer for site in adapter.sites})
    base = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=torch.float32)
    rank = CONFIG.rank
    config = LoraConfig(
        r=rank,
        lora_alpha=round(adapter.scale * rank),
        target_modules=[HF_NAMES[kind].split(".")[-1] for kind in kinds],
        layers_to_transform=layers,
    )
    peft = get_peft_model(base, config).eval()
    state = dict(peft.named_parameters())
    for site in adapter.sites:
        name = f"base_model.model.model.layers.{site.layer}.{HF_NAMES[site.kind]}"
        state[f"{name}.lora_A.default.weight"].data.copy_(adapter.down[site.name].detach())
        state[f"{name}.lora_B.default.weight"].data.copy_(adapter.up[site.name].detach())
    return peft


def their_step(peft: Any, texts: list[Completion], *, sliced: bool) -> Callable[[], Tensor]:
    """Right-padded, a reference forward in every step; `sliced` takes the head on completion
    positions only."""
    rows = [[*c.prompt_tokens, *c.tokens] for c in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    spans = [(len(c.prompt_tokens) - 1, len(c.tokens)) for c in texts]
    targets = [torch.tensor(c.tokens) for c in texts]
    head = peft.get_base_model().lm_head
    body = peft.get_base_model().model

    def log_probs() -> list[Tensor]:
        if sliced:
            hidden = body(input_ids=tokens, attention_mask=mask).last_hidden_state
            picked = torch.cat([hidden[i, s : s + n] for i, (s, n) in enumerate(spans)])
            return list(head(picked).log_softmax(-1).split([n for _, n in spans]))
        full = peft(input_ids=tokens, attention_mask=mask).logits.log_softmax(-1)
        return [full[i, s : s + n] for i, (s, n) in enumerate(spans)]

    def run() -> Tensor:
        peft.zero_grad()
        with torch.no_grad(), peft.disable_adapter():
            reference = log_probs()
        student = log_probs()
        kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(student, reference, strict=True)]
        nll = [-p.gather(1, t[:, None])[:, 0] for p, t in zip(student, targets, strict=True)]
        loss = loss_of(kl, nll)
        loss.backward()
        return loss.detach()

    return run


def bench(repeats: int = 3) -> list[Row]:
    """Wall time and extra memory of a step, and the largest difference in the numbers."""
    target = [
        ("full PEFT step / ours", ">= 2"),
        ("ours / full PEFT, extra memory", "<= 0.33"),
        ("our gradient's relative error against PEFT in float64", "<= 1e-4"),
    ]
    if importlib.util.find_spec("peft") is None:
        return [Row(what, None, aim, note="install peft") for what, aim in target]
    model = load_model(MODEL)
    adapter = fresh_adapter(model, CONFIG)
    generator = torch.Generator().manual_seed(0)
    for b in adapter.up.values():
        b.data.copy_(0.01 * torch.randn(b.shape, generator=generator))
    texts = completions(model)
    peft = peft_model(adapter)
    cases = {
        "ours": our_step(model, adapter, texts),
        "full": their_step(peft, texts, sliced=False),
        "sliced": their_step(peft, texts, sliced=True),
    }
    t = interleave(cases, repeats)
    off, their_off = errors(cases["ours"], adapter, peft, texts)
    ours, full, sliced = t["ours"], t["full"], t["sliced"]
    note = spread_note(ours, full, sliced)
    return [
        Row(
            target[0][0],
            full.seconds / ours.seconds,
            target[0][1],
            ours.seconds,
            full.seconds,
            "s",
            note,
        ),
        Row(
            "sliced PEFT step / ours",
            sliced.seconds / ours.seconds,
            "",
            ours.seconds,
            sliced.seconds,
            "s",
            note,
        ),
        Row(
            target[1][0],
            ours.peak_mb / full.peak_mb,
            target[1][1],
            ours.peak_mb,
            full.peak_mb,
            "MB",
        ),
        Row(
            "ours / sliced PEFT, extra memory",
            ours.peak_mb / sliced.peak_mb,
            "",
            ours.peak_mb,
            sliced.peak_mb,
            "MB",
        ),
        Row(target[2][0], off, target[2][1], off, their_off, "", "theirs: PEFT in fp32"),
    ]


def their_gradient(adapter: Adapter, peft: Any) -> Tensor:
    """PEFT's gradients in the order of `adapter.parameters()`, flat, float64."""
    state = dict(peft.named_parameters())
    found = []
    for site in adapter.sites:
        name = f"base_model.model.model.layers.{site.layer}.{HF_NAMES[site.kind]}"
        for factor in "AB":
            grad = state[f"{name}.lora_{factor}.default.weight"].grad
            assert grad is not None
            found.append(grad.flatten().double())
    return torch.cat(found)


def errors(
    step: Callable[[], Tensor], adapter: Adapter, peft: Any, texts: list[Completion]
) -> tuple[float, float]:
    """Relative error (2-norm) of our gradient and of PEFT's fp32 one, against PEFT in float64."""
    step()
    ours = torch.cat(
        [p.grad.flatten().double() for p in adapter.parameters() if p.grad is not None]
    )
    their_step(peft, texts, sliced=True)()
    theirs = their_gradient(adapter, peft)
    their_step(peft.double(), texts, sliced=True)()
    exact = their_gradient(adapter, peft)
    size = exact.norm()
    return float((ours - exact).norm() / size), float((theirs - exact).norm() / size)
