"""One training step of `heal` against transformers with PEFT and full logits."""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.bench.decode import MODEL, prompts, transformers_model
from experiments.bench.measure import Row, extra_memory, interleave, speedup, spread_note
from shl.config import HealConfig
from shl.hooks.adapter import Adapter, fresh_adapter
from shl.hooks.handle import suspended
from shl.hooks.sites import HF_NAMES
from shl.kl import aggregate, reverse_kl_and_nll
from shl.models.generate import Completion
from shl.models.load import load_model
from shl.models.scores import completion_hidden
from shl.models.tokens import decode, encode
from shl.utils.model import Model

NEW, BATCH = 64, 4
CONFIG = HealConfig(tau=0.0)  # the barrier is open from the first step
STEP = ("full PEFT step / ours", ">= 2")
MEMORY = ("ours / full PEFT, extra memory", "<= 0.33")
ERROR = ("our gradient's relative error against PEFT in float64", "<= 1e-4")


def completions(model: Model) -> list[Completion]:
    """Completions of a typical length, cut from the vignettes instead of generated."""
    out = []
    for prompt, answer in zip(prompts(BATCH, 20), prompts(2 * BATCH, 80)[BATCH:], strict=True):
        tokens = tuple(encode(model, answer)[4 : 4 + NEW])
        text = decode(model, list(tokens))
        out.append(Completion(prompt, text, tokens, tuple(encode(model, prompt))))
    return out


def loss_of(kl: Sequence[Tensor], nll: Sequence[Tensor]) -> Tensor:
    """The barrier's loss from per-token values, one tensor per completion."""
    terms = [
        n.mean() + CONFIG.lam * torch.relu(aggregate(k, CONFIG.aggregate) - CONFIG.tau)
        for k, n in zip(kl, nll, strict=True)
    ]
    return torch.stack(terms).mean()


def our_step(model: Model, adapter: Adapter, texts: list[Completion]) -> Callable[[], Tensor]:
    """Our step; the reference's states are computed once per training and so not timed."""
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


def peft_model(model: Model, adapter: Adapter) -> Any:
    """The same adapter with the same factors in PEFT, on transformers' model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=CONFIG.rank,
        lora_alpha=round(adapter.scale * CONFIG.rank),
        target_modules=sorted({HF_NAMES[site.kind].split(".")[-1] for site in adapter.sites}),
        layers_to_transform=sorted({site.layer for site in adapter.sites}),
    )
    peft = get_peft_model(transformers_model(model), config).eval()
    for theirs, ours in zip(factors(peft, adapter), adapter.parameters(), strict=True):
        theirs.data.copy_(ours.detach())
    return peft


def factors(peft: Any, adapter: Adapter) -> list[Tensor]:
    """PEFT's factors in the order of `adapter.parameters()`."""
    state = dict(peft.named_parameters())
    return [
        state[f"base_model.model.model.layers.{s.layer}.{HF_NAMES[s.kind]}.lora_{f}.default.weight"]
        for s in adapter.sites
        for f in "AB"
    ]


def their_step(peft: Any, texts: list[Completion], *, sliced: bool) -> Callable[[], Tensor]:
    """PEFT's step, right-padded and with a forward of the reference; `sliced` applies the head at
    completion positions only."""
    rows = [[*c.prompt_tokens, *c.tokens] for c in texts]
    tokens, mask = (
        pad_sequence([torch.tensor(x) for x in padded], batch_first=True).to(peft.device)
        for padded in (rows, [[1] * len(row) for row in rows])
    )
    spans = [(len(c.prompt_tokens) - 1, len(c.tokens)) for c in texts]
    targets = [torch.tensor(c.tokens, device=peft.device) for c in texts]
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


def bench(repeats: int = 3, *, engine: str = "auto", step: tuple[str, str] = STEP) -> list[Row]:
    """Wall time and extra memory of a step, and the relative error of its gradient."""
    if importlib.util.find_spec("peft") is None:
        return [Row(what, None, aim, note="install peft") for what, aim in (step, MEMORY, ERROR)]
    model = load_model(MODEL, engine=engine)
    adapter = fresh_adapter(model, CONFIG)
    generator = torch.Generator().manual_seed(0)
    for b in adapter.up.values():
        b.data.copy_(0.01 * torch.randn(b.shape, generator=generator))
    texts = completions(model)
    peft = peft_model(model, adapter)
    cases = {
        "ours": our_step(model, adapter, texts),
        "full": their_step(peft, texts, sliced=False),
        "sliced": their_step(peft, texts, sliced=True),
    }
    ours, full, sliced = interleave(cases, repeats).values()
    off, their_off = errors(cases["ours"], adapter, peft, texts)
    note = spread_note(ours, full, sliced)
    return [
        speedup(*step, ours, full, note),
        speedup("sliced PEFT step / ours", "", ours, sliced, note),
        extra_memory(*MEMORY, ours, full),
        extra_memory("ours / sliced PEFT, extra memory", "", ours, sliced),
        Row(ERROR[0], off, ERROR[1], off, their_off, "", f"theirs: PEFT in {model.cfg.dtype}"),
    ]


def gradient(parameters: Iterable[Tensor]) -> Tensor:
    """The gradients of all parameters, flat, float64."""
    return torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])


def errors(
    step: Callable[[], Tensor], adapter: Adapter, peft: Any, texts: list[Completion]
) -> tuple[float, float]:
    """Relative error (2-norm) of our gradient and of PEFT's, against PEFT in float64."""
    step()
    ours = gradient(adapter.parameters())
    their_step(peft, texts, sliced=True)()
    theirs = gradient(factors(peft, adapter))
    their_step(peft.double(), texts, sliced=True)()
    exact = gradient(factors(peft, adapter))
    size = exact.norm()
    return float((ours - exact).norm() / size), float((theirs - exact).norm() / size)
