"""Train the look-ahead tokens of PaSS (arXiv 2311.13581, section 3) for a frozen LLaMA.

    python train_lookahead.py --model DIR --data PATH .. --out FILE     # the paper's method

FILE is for pass_sampler.py; FILE.jsonl has what was measured on the way. A run that was killed goes
on with the same command and --resume, and ends bit for bit where an undisturbed one ends: all
chance in a step comes from (seed, step). On many GPUs: torchrun --nproc-per-node N
train_lookahead.py ..

Beyond the paper are the objectives kl and tv, --texts that the model wrote, and what beyond/ adds
to train. Read `states`, `backward`, `train`. Shapes are as in model.py; M places per text, L
look-ahead tokens at each, N columns in all.
"""
import json
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm

from model import Cache, Llama, load_model
from pass_sampler import Lookahead, Params, add_beyond, generate, lookahead_of, probs
from support.checkpoint import (
    check_no_checkpoint,
    digest,
    fingerprint,
    read_checkpoint,
    read_texts,
    write_checkpoint,
)
from support.data import PROMPT, TEMPERATURES, TEXT, add_data, check_context, read_data, windows
from support.errors import InputError, check_number, check_seed, device_named, run_script
from support.storage import check_writable, write_tensors, write_text
from support.terminal import add_common, new_parser, user_path

PLACES = 4  # M, per text and step
READ_FOR = 16  # steps: to read a batch of texts costs more than a step, so each is read once for 16
EVALUATIONS = 10  # per run, about
CHECKPOINT_SECONDS = 20
# These may differ on --resume. Hashes stand for the model, data and texts.
MOVABLE = ("model", "data", "texts", "device", "out", "resume", "process", "processes")

# ----------------------- the columns, as sampling runs them; the loss


def prefix(model: Llama, text: Tensor, offset: Tensor, room: int) -> tuple[Cache, Tensor]:
    """Read text (B,T), positions shifted by offset (B,): a cache with room for more columns,
    and the model's own states (B,T,D)."""
    cache = Cache(model, text.shape[0], text.shape[1] + room)
    with torch.no_grad():
        positions = offset[:, None] + torch.arange(text.shape[1], device=text.device)
        target = model(text, cache, positions)
    cache.commit(text.shape[1])
    return cache, target


def states(model: Llama, lookahead: Lookahead, text: Tensor, places: Tensor, offset: Tensor,
           cache: Cache, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the look-ahead tokens after M places of each text, in one block.

    text (B,T). places (B,M): how many tokens of the text a look-ahead follows. offset (B,): added
    to all positions, for what is trained at all distances. cache, target: of `prefix`. Returns the
    columns' states h (N,D), whence q; the model's own at the same places (N,D), whence p; and the
    tokens (N,) that come next, which both predict.
    """
    T = text.shape[1]
    M, L = places.shape[1], len(lookahead.embeddings)
    # LA_j, after n tokens, stands where x_{n+j} does, text[n+j-1], and guesses x_{n+j+1}.
    here = (places[:, :, None] + torch.arange(L, device=text.device)).flatten(1)  # (B,M*L)
    # The look-ahead of one place sees the text up to there, and itself, causally.
    slot = torch.arange(T + M * L, device=text.device)
    place = torch.arange(M * L, device=text.device) // L
    mask = slot < places.repeat_interleave(L, 1)[:, :, None]  # (B,M*L,T+M*L)
    mask[:, :, T:] = (place == place[:, None]).tril()
    x = lookahead.embeddings.repeat(M, 1).expand(len(text), -1, -1)
    h = lookahead.training_states(
        model, x, cache, offset[:, None] + here, mask, text.gather(1, here))
    target = target.gather(1, here[:, :, None].expand(-1, -1, target.shape[2]))
    return h.flatten(0, 1), target.flatten(0, 1), text.gather(1, here + 1).flatten()


def loss_of(objective: str, logits: Tensor, tokens: Tensor, p: Tensor | None) -> Tensor:
    """Loss, summed over columns. logits (N,V) of q; tokens (N,), what the text has; p (N,V).

    "ce" is the paper's. "kl" distils the model, KL(p || q). "tv" is 1 - sum_x min(p(x), q(x)), the
    probability that the rejection rule rejects a draft from q. All at temperature 1.
    """
    log_q = logits.float().log_softmax(-1)
    if objective == "ce":
        return F.nll_loss(log_q, tokens, reduction="sum")
    if objective == "kl":
        return F.kl_div(log_q, p, reduction="sum")
    return (p - log_q.exp()).clamp(min=0).sum()


def backward(model: Llama, h: Tensor, tokens: Tensor, objective: str,
             teacher: Llama | None = None, target: Tensor | None = None, columns: int = 64
             ) -> Tensor:
    """The mean loss over h (N,D), a tensor. Adds its gradients to all that h came from.

    p comes from the teacher's states target (N,D). It works on some columns at a time, and goes
    back to h before it takes the next: (N,V) in float32 would not fit.
    """
    total = 0.0
    gradient = []
    for start in range(0, len(h), columns):
        part = slice(start, start + columns)
        p = None
        if objective != "ce":
            p = teacher.logits(target[part]).float().softmax(-1)
        leaf = h[part].detach().requires_grad_()
        loss = loss_of(objective, model.logits(leaf), tokens[part], p) / len(h)
        loss.backward()
        total += loss.detach()
        gradient.append(leaf.grad)
    h.backward(torch.cat(gradient))
    return total


# --------------------------------------------------------- evaluation

def accepted_once(p: Tensor, logits: Tensor, params: Params, generator: Generator) -> Tensor:
    """(N,1): the probability that a draft from q is accepted, sum_x min(p(x), q(x))."""
    return torch.minimum(p, probs(logits, params)).sum(1, keepdim=True)


def measure(model: Llama, lookahead: Lookahead, params: Params, text: Tensor, position: int,
            generator: Generator, accepted: Callable) -> tuple[Tensor, Tensor]:
    """accepted(..) (n,L,ranks), and the expected accepted drafts of a step (n,), after every sixth
    token of text (B,T), whose first token stands at `position`."""
    L = len(lookahead.embeddings)
    device = model.embedding.device
    text = text.to(device)
    places = torch.arange(PROMPT, text.shape[1] - L, 6, device=device).expand(len(text), -1)
    offset = torch.full((len(text),), position, device=device)
    read = prefix(model, text, offset, places.shape[1] * L)
    h, target, tokens = states(model, lookahead, text, places, offset, *read)
    logits = model.logits(h)
    p = probs(model.logits(target), params)
    share = accepted(p, logits, params, generator).unflatten(0, (-1, L))
    # The text's x_i is from p, and of L drafts min(p, q) is kept: so a place counts by the product
    # of min(1, q(x_i) / p(x_i)) over the drafts before it.
    x = tokens[:, None]
    kept = probs(logits, params).gather(1, x) / p.gather(1, x).clamp(min=1e-30)
    before = F.pad(kept.clamp(max=1).view(-1, L), (1, -1), value=1).cumprod(1)
    return share, (share[:, :, 0] * before).sum(1)


@torch.no_grad()
def evaluate(model: Llama, lookahead: Lookahead, texts: dict[float, Tensor], position: int = 0,
             accepted: Callable = accepted_once) -> dict[float, dict]:
    """Acceptance on texts {temperature: (n,T)} that the model wrote.

    Per temperature: by_position, how probably a draft is accepted where those before it are the
    text's own tokens; expected, the accepted drafts of a step; by_rank [position][k], what
    accepted(p, logits, params, generator) says of 1 to k+1 candidates for one place.
    """
    lookahead = lookahead.ready(model)
    table = {}
    for temperature, text in texts.items():
        generator = Generator(model.embedding.device).manual_seed(0)
        params = Params(temperature)
        measured = []
        for rows in text.split(4):
            measured.append(
                measure(model, lookahead, params, rows, position, generator, accepted))
        by_rank, expected = (torch.cat(parts).mean(0) for parts in zip(*measured))
        by_rank = [[round(share, 4) for share in row] for row in by_rank.tolist()]
        table[temperature] = {"by_position": [row[0] for row in by_rank],
                              "expected": round(expected.item(), 4), "by_rank": by_rank}
    return table


# ----------------------------------------------------------- training

class Part(NamedTuple):
    """Something of a look-ahead that can be trained. beyond/training.py adds one to PARTS."""
    options: dict[str, dict]  # {option: what argparse is told of it}
    ranges: dict[str, tuple[int, int]]  # {option: the least and the largest}
    initial: Callable  # (model, tokens to train on, args, generator) -> {name: float32 tensor}
    rates: dict[str, float]  # {name: rate of learning}
    accepted: Callable = accepted_once  # how to measure the acceptance at the end


def mean_embedding(model: Llama, tokens: Tensor, args: Namespace, generator: Generator
                   ) -> dict[str, Tensor]:
    """Embeddings begin as the mean of all tokens, and a little noise."""
    noise = 0.01 * torch.randn(args.length, model.config.dim, generator=generator)
    mean = model.embedding.float().mean(0)
    return {"embeddings": mean + noise.to(model.embedding.device)}


PARTS = [Part(
    {"length": dict(type=int, default=4, help="look-ahead tokens L (default: 4)")},
    {"length": (1, 64)}, mean_embedding, {"embeddings": 0.02})]


def initial(model: Llama, tokens: Tensor, args: Namespace) -> dict[str, Tensor]:
    """{name: float32 parameter} of all that the command line asks for."""
    generator = Generator().manual_seed(args.seed)
    found = {}
    for part in PARTS:
        found |= part.initial(model, tokens, args, generator)
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: up for 10 steps, then down along a cosine."""
    return min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))


def batches(model: Llama, pool: Tensor, args: Namespace, first: int) -> Iterator[tuple]:
    """For each step from `first` on: this process's columns, as `states` takes them.

    pool: tokens (N,) to cut texts from, or texts (N,TEXT).
    """
    share = args.batch // args.processes
    mine = slice(args.process * share, (args.process + 1) * share)
    for step in range(first, args.steps):
        if step == first or step % READ_FOR == 0:
            generator = Generator().manual_seed(args.seed * 1_000_003 + step // READ_FOR)
            if pool.ndim == 1:
                text = windows(pool, args.batch, TEXT, generator)
            else:
                text = pool[torch.randint(len(pool), (args.batch,), generator=generator)]
            # Each step takes other places, in random order; the last token guessed is in the text.
            order = torch.rand(args.batch, TEXT - 1 - args.length, generator=generator).argsort(1)
            room = max(1, model.config.context - TEXT - args.length)
            offset = torch.randint(room, (args.batch,), generator=generator)
            text, places, offset = (
                x[mine].to(model.embedding.device) for x in (text, order + 1, offset))
            read = prefix(model, text, offset, PLACES * args.length)
        yield text, places[:, step % READ_FOR * PLACES:][:, :PLACES], offset, *read


def train_step(model: Llama, parts: dict[str, Tensor], optimizer: torch.optim.Optimizer,
               objective: str, scale: float, columns: tuple) -> Tensor:
    """One step of Adam on the columns of `states`; returns the loss, a tensor. scale: of rates."""
    lookahead = lookahead_of({name: p.to(model.embedding) for name, p in parts.items()})
    h, target, tokens = states(model, lookahead, *columns)
    loss = backward(model, h, tokens, objective, model, target)
    if dist.is_initialized():
        for mean in (loss, *(p.grad for p in parts.values())):  # Nothing else is exchanged.
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
    for group in optimizer.param_groups:
        group["lr"] = scale * group["rate"]
    optimizer.step()
    optimizer.zero_grad()
    return loss


def optimizer_of(tensors: dict[str, Tensor]) -> torch.optim.Optimizer:
    """Adam, with a rate of its own for each tensor."""
    rates = {}
    for part in PARTS:
        rates |= part.rates
    groups = [{"params": [tensor], "rate": rates[name]} for name, tensor in tensors.items()]
    return torch.optim.Adam(groups)


def file_beside(out: Path, suffix: str) -> Path:
    return out.with_name(f"{out.name}.{suffix}")


def record(model: Llama, parts: dict[str, Tensor], texts: dict[float, Tensor], state: dict,
           out: Path, accepted: Callable = accepted_once) -> None:
    """Evaluate; write all that was measured so far."""
    table = evaluate(model, lookahead_of(parts), texts, accepted=accepted)
    losses, state["losses"] = state["losses"], []
    state["measured"].append({
        "step": state["step"], "seconds": round(state["seconds"], 1),
        "loss": sum(losses) / len(losses) if losses else None, "acceptance": table})
    write_text(file_beside(out, "jsonl"),
               "".join(json.dumps(line) + "\n" for line in state["measured"]))
    expected = ", ".join(f"{row['expected']:.3f} at {t:g}" for t, row in table.items())
    L = len(parts["embeddings"])
    tqdm.write(f"step {state['step']}: of {L} drafts accepted {expected}", file=sys.stderr)


def texts_to_measure(model: Llama, held: Tensor, seed: int) -> dict[float, Tensor]:
    """{temperature: (32,160)}: held-out beginnings, and what the model writes after them."""
    prompts = windows(held, 32, PROMPT, Generator().manual_seed(seed)).tolist()
    texts = {}
    for t in TEMPERATURES:
        written = generate(model, prompts, "autoregressive", Params(t), 160 - PROMPT, seed,
                           stop_tokens=())["tokens"]
        texts[t] = torch.tensor([before + after for before, after in zip(prompts, written)])
    return texts


def train(args: Namespace, model: Llama, pool: Tensor, held: Tensor) -> None:
    """Train, and write args.out. pool: as in `batches`; held (N,): to measure on."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in MOVABLE}
    settings["model"] = fingerprint(model.config)
    settings["data and weights"] = digest(model, pool, held)
    parts = initial(model, pool.flatten(), args)
    optimizer = optimizer_of(parts)
    moments = {name: optimizer.state[p] for name, p in parts.items()}
    state = {"settings": settings, "step": 0, "seconds": 0.0, "losses": [], "measured": []}
    checkpoint = file_beside(args.out, "checkpoint")
    leads = args.process == 0
    if args.resume and checkpoint.exists():
        state = read_checkpoint(checkpoint, settings, parts, moments)
    if args.resume and leads:
        print(f"going on from step {state['step']}", file=sys.stderr)
    if leads:  # This process measures and writes.
        texts = texts_to_measure(model, held, args.seed)
    bar = tqdm(total=args.steps, initial=state["step"], disable=not leads, unit="step",
               smoothing=0, mininterval=1 if sys.stderr.isatty() else 60)
    began = saved = time.perf_counter()
    with bar:
        for columns in batches(model, pool, args, state["step"]):
            if leads and state["step"] % max(1, args.steps // EVALUATIONS) == 0:
                start = time.perf_counter()
                record(model, parts, texts, state, args.out)
                pause = time.perf_counter() - start
                began += pause
                bar.start_t += pause  # or the time left would count evaluations
            loss = train_step(model, parts, optimizer, args.objective,
                              rate(state["step"], args.steps), columns)
            if not math.isfinite(loss):
                raise InputError(f"the loss of step {state['step']} is {loss.item()}, in "
                                 f"{model.precision}: try --dtype float32; an older checkpoint "
                                 f"is as it was")
            state["losses"].append(loss.item())
            state["step"] += 1
            state["seconds"] += time.perf_counter() - began
            began = time.perf_counter()
            bar.update()
            if leads and began - saved > CHECKPOINT_SECONDS:
                write_checkpoint(checkpoint, state, parts, moments)
                saved = began
    if leads:
        record(model, parts, texts, state, args.out, PARTS[-1].accepted)
        about = {"model": settings["model"], "settings": settings, "steps": args.steps,
                 "acceptance": state["measured"][-1]["acceptance"]}
        # In one entry: safetensors writes several in random order.
        write_tensors({name: p.to(torch.bfloat16) for name, p in parts.items()}, args.out,
                      {"lookahead": json.dumps(about)})
        checkpoint.unlink(missing_ok=True)
        print(f"{args.out}: {args.steps} steps, {state['seconds'] / 60:.1f} min")


# ------------------------------------------------------- command line

def parse() -> Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_common(add)
    add_data(add)
    add("--texts", type=user_path, help="of beyond/own_texts.py, to train on in place of data")
    add("--objective", choices=["ce", "kl", "tv"], default="ce", help="(default: ce, the paper's)")
    for part in PARTS:
        for name, about in part.options.items():
            add(f"--{name}", **about)
    add("--batch", type=int, default=8, help="texts per step (default: 8)")
    add("--steps", type=int, default=1000, help="(default: 1000)")
    add("--out", type=user_path, required=True, help="file to write")
    add("--resume", action="store_true", help="from the checkpoint, if there is one")
    parser.set_defaults(process=0, processes=1)  # which of how many, of torchrun's
    args = parser.parse_args()
    check_seed(args.seed)
    check_number("batch", args.batch, 2**16)
    check_number("steps", args.steps, 2**40)
    for part in PARTS:
        for name, (least, largest) in part.ranges.items():
            check_number(name, getattr(args, name), largest, least)
    check_writable(args.out)
    checkpoint = file_beside(args.out, "checkpoint")
    check_no_checkpoint(checkpoint, args.resume)
    if args.resume and args.out.is_file() and not checkpoint.exists():
        raise InputError(f"{args.out} has no checkpoint: there is nothing to resume")
    return args


def join_processes(args: Namespace) -> None:
    """Become one of torchrun's processes, on its own device."""
    if args.device not in (None, "cpu", "cuda"):
        raise InputError("under torchrun --device must be cpu or cuda")
    if args.device == "cuda" or args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = device_named(args.device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    args.process, args.processes = dist.get_rank(), dist.get_world_size()
    if args.batch % args.processes:
        raise InputError(f"{args.processes} processes cannot share {args.batch} texts evenly")


def main() -> None:
    add_beyond("training")
    args = parse()
    if dist.is_torchelastic_launched():
        join_processes(args)
    model, tokenizer = load_model(args, packed=False)
    check_context(model.config.context)
    pool, held = read_data(tokenizer, args.data, args.suffix, TEXT)
    if args.texts:
        pool = read_texts(args.texts, model.config)
    try:
        train(args, model, pool, held)
    except KeyboardInterrupt:
        saved = file_beside(args.out, "checkpoint").exists()
        print("stopped:", "--resume goes on" if saved else "nothing is saved yet", file=sys.stderr)
        raise
    if dist.is_initialized():
        dist.barrier()  # the first process still evaluates and writes
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # or gloo's threads abort, in one run of 40 on a busy machine


if __name__ == "__main__":
    from train_lookahead import main  # Not this copy of the file, but the one that beyond/ imports.
    run_script(main)
