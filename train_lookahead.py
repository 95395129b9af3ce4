"""Train the look-ahead tokens of PaSS (arXiv 2311.13581, section 3) for a frozen LLaMA.

    python train_lookahead.py --model DIR --data PATH .. --out FILE     # the paper's method

FILE is for pass_sampler.py; FILE.jsonl has what was measured on the way. A run that was killed goes
on with the same command and --resume, and ends bit for bit where an undisturbed one ends: all
chance in a step comes from (seed, step). On many GPUs: torchrun --nproc-per-node N
train_lookahead.py ..

Beyond the paper are the objectives kl and tv, --texts that the model wrote in place of --data, a
file to --start from, and what beyond/ adds to train. Read `states`, `backward`, `train`. Shapes are
as in model.py; M places per text, L look-ahead tokens at each, N columns in all.
"""
import support

support.ctrl_c_leaves(__name__)
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from model import Cache, Llama, load_model
from pass_sampler import (
    Lookahead,
    Params,
    generate,
    lookahead_of,
    lookahead_tensors,
    probs,
)
from support.checkpoint import (
    check_no_checkpoint,
    digest,
    fingerprint,
    read_checkpoint,
    read_texts,
    write_checkpoint,
)
from support.data import (
    PROMPT,
    TEMPERATURES,
    TEXT,
    Texts,
    add_data,
    check_context,
    long_enough,
    read_data,
    tokens_of,
    windows,
)
from support.errors import InputError, check_number, check_seed, run_script
from support.journal import Journal, file_beside, new_state
from support.methods import add_beyond
from support.processes import average, join_processes, leave_processes
from support.storage import check_writable, write_tensors
from support.terminal import add_common, new_parser, progress, user_path
from support.tokenizer import Tokenizer

PLACES = 4  # M, per text and step
READ_FOR = 16  # steps: to read a batch of texts costs more than a step, so each is read once for 16
MEASURED = 32  # texts per temperature to measure on, at most
MEASURED_TOKENS = 65  # that the model writes for such a text: for 64 look-ahead tokens, enough
MEASURED_PLACES = 12  # in a text, where drafts are made
EVALUATIONS = 10  # on the way, at most
CHECKPOINT_SECONDS = 20
# These may differ on --resume. Hashes stand for the model, data, texts and start.
MOVABLE = ("model", "data", "texts", "start", "device", "out", "resume", "process", "processes",
           "began")

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


def places_of(begin: Tensor, end: Tensor, L: int, shares: Tensor) -> Tensor:
    """Places (B,M) in texts of which the model wrote the tokens from begin (B,) to end (B,). A
    share (B,M) of 0 is the first place; one just below 1 is the last after which all L guesses are
    tokens of the text."""
    room = (end - begin - L)[:, None]
    return begin[:, None] + (shares * room).long().minimum(room - 1)  # Rounding can make a share 1.


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


def measure(model: Llama, lookahead: Lookahead, params: Params, texts: Texts, position: int,
            generator: Generator, accepted: Callable) -> tuple[Tensor, Tensor]:
    """accepted(..) (n,L,ranks), and the expected accepted drafts of a step (n,), at n places that
    are evenly spread over what the model wrote. The first token of a text stands at `position`."""
    L = len(lookahead.embeddings)
    device = model.embedding.device
    text = texts.tokens.to(device)
    spread = (torch.arange(MEASURED_PLACES) + 0.5) / MEASURED_PLACES
    places = places_of(texts.begin, texts.end, L, spread.expand(len(text), -1)).to(device)
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
def evaluate(model: Llama, lookahead: Lookahead, texts: Texts, position: int = 0,
             accepted: Callable = accepted_once) -> dict[float, dict]:
    """Acceptance on texts that the model wrote.

    Per temperature: by_position, how probably a draft is accepted where those before it are the
    text's own tokens; expected, the accepted drafts of a step; by_rank [position][k], what
    accepted(p, logits, params, generator) says of 1 to k+1 candidates for one place.
    """
    lookahead = lookahead.ready(model)
    table = {}
    for temperature in texts.temperature.unique().tolist():
        generator = Generator(model.embedding.device).manual_seed(0)
        params = Params(temperature)
        measured = []
        for rows in (texts.temperature == temperature).nonzero()[:, 0].split(4):
            measured.append(measure(
                model, lookahead, params, texts.chosen(rows), position, generator, accepted))
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
    {"length": dict(type=int, help="look-ahead tokens L (default: 4, or those of --start)")},
    {"length": (1, MEASURED_TOKENS - 1)}, mean_embedding, {"embeddings": 0.02})]


def initial(model: Llama, tokens: Tensor, args: Namespace) -> dict[str, Tensor]:
    """{name: float32 parameter}: those in the file of --start, or new ones as the command line
    asks. Sets args.length."""
    found = {}
    if args.start:
        found, _ = lookahead_tensors(args.start, model, args.length)
    else:
        args.length = args.length or 4
        generator = Generator().manual_seed(args.seed)
        for part in PARTS:
            found |= part.initial(model, tokens, args, generator)
    args.length = len(found["embeddings"])
    device = model.embedding.device
    return {name: x.to(device, torch.float32).requires_grad_() for name, x in found.items()}


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: up for 10 steps, then down along a cosine."""
    return min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))


def batches(model: Llama, pool: Tensor | Texts, args: Namespace, first: int) -> Iterator[tuple]:
    """For each step from `first` on: this process's columns, as `states` takes them.

    pool: tokens (N,) to cut texts from, or texts.
    """
    share = args.batch // args.processes
    mine = slice(args.process * share, (args.process + 1) * share)
    for step in range(first, args.steps):
        if step == first or step % READ_FOR == 0:
            generator = Generator().manual_seed(args.seed * 1_000_003 + step // READ_FOR)
            if torch.is_tensor(pool):
                text = windows(pool, args.batch, TEXT, generator)
                begin = torch.ones(args.batch, dtype=torch.long)
                end = TEXT * begin
            else:
                some = torch.randint(len(pool.end), (args.batch,), generator=generator)
                text, begin, end, *_ = pool.chosen(some)
                text = text[:, :end.max()]
            # Evenly spread places, in random order. A text with fewer of them has some twice.
            n = READ_FOR * PLACES
            order = torch.rand(args.batch, n, generator=generator).argsort(1)
            shift = torch.rand(args.batch, 1, generator=generator)
            places = places_of(begin, end, args.length, (order + shift) / n)
            room = max(1, model.config.context - text.shape[1] - args.length)
            offset = torch.randint(room, (args.batch,), generator=generator)
            text, places, offset = (
                x[mine].to(model.embedding.device) for x in (text, places, offset))
            read = prefix(model, text, offset, PLACES * args.length)
        yield text, places[:, step % READ_FOR * PLACES:][:, :PLACES], offset, *read


def train_step(model: Llama, parts: dict[str, Tensor], optimizer: torch.optim.Optimizer,
               objective: str, scale: float, columns: tuple) -> Tensor:
    """One step of Adam on the columns of `states`; returns the loss, a tensor. scale: of rates."""
    lookahead = lookahead_of({name: p.to(model.embedding) for name, p in parts.items()})
    h, target, tokens = states(model, lookahead, *columns)
    loss = backward(model, h, tokens, objective, model, target)
    average(loss, *(p.grad for p in parts.values()))  # over torchrun's processes
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


def plan(args: Namespace) -> tuple[int, int]:
    """(texts per temperature to measure on at the end, evaluations before it). Those before use a
    quarter of the texts. Both together take about a tenth of the run, or as little as makes sense.
    Work is counted in columns; a column with gradients counts as three."""
    L = args.length
    run = args.steps * args.batch * (TEXT / READ_FOR + 3 * PLACES * L)
    one = len(TEMPERATURES) * (PROMPT + MEASURED_TOKENS + MEASURED_PLACES * L)
    texts = min(MEASURED, max(2, int(run / 20 / one)))
    return texts, min(EVALUATIONS, int(run / 20 / one / max(1, texts // 4)))


def texts_to_measure(model: Llama, held: Tensor | Texts, count: int, seed: int) -> Texts:
    """`count` texts per temperature: some of held; or, if these are the tokens (N,) of held-out
    files, what the model writes after pieces of them. In random order."""
    generator = Generator().manual_seed(seed)
    if isinstance(held, Texts):
        mixed = held.chosen(torch.randperm(len(held.end), generator=generator))
        first = [(mixed.temperature == t).nonzero()[:count, 0] for t in TEMPERATURES]
        return mixed.chosen(torch.cat(first))
    prompts = windows(held, count, PROMPT, generator).tolist()
    parts = []
    new = MEASURED_TOKENS
    with progress(len(TEMPERATURES) * new, "writing texts to measure on", "token") as bar:
        for t in TEMPERATURES:
            written = generate(
                model, prompts, "autoregressive", Params(t), new, seed,
                lambda row, token, from_draft: bar.update(row == 0), stop_tokens=())["tokens"]
            texts = [before + after for before, after in zip(prompts, written)]
            parts.append(Texts.of(texts, [PROMPT] * count, t, [True] * count))
    return Texts.joined(parts)


def train(args: Namespace, model: Llama, pool: Tensor | Texts, held: Tensor | Texts) -> None:
    """Train, and write args.out. pool: as in `batches`; held: as in `texts_to_measure`."""
    parts = initial(model, tokens_of(pool), args)
    pool, held = long_enough(pool, args.length), long_enough(held, args.length)
    settings = {name: str(value) for name, value in vars(args).items() if name not in MOVABLE}
    settings["model"] = fingerprint(model.config)
    settings["data and weights"] = digest(model, tokens_of(pool), tokens_of(held))
    if args.start:
        settings["start"] = digest(model, *(part.detach() for part in parts.values()))
    optimizer = optimizer_of(parts)
    moments = {name: optimizer.state[p] for name, p in parts.items()}
    state = new_state(settings)
    checkpoint = file_beside(args.out, "checkpoint")
    leads = args.process == 0  # This process measures and writes.
    if args.resume and checkpoint.exists():
        state = read_checkpoint(checkpoint, settings, parts, moments)
    if args.resume and leads:
        print(f"going on from step {state['step']}" if state["step"] else
              "there is no checkpoint yet: beginning with step 0", file=sys.stderr)
    when = []
    if leads:
        count, evaluations = plan(args)
        texts = texts_to_measure(model, held, count, args.seed)
        few = texts.quarter()
        when = [i * args.steps // evaluations for i in range(evaluations)]
    journal = Journal(state, args, READ_FOR)
    saved = time.perf_counter()
    with journal.bar:
        for columns in batches(model, pool, args, state["step"]):
            if state["step"] in when:
                journal.measure(lambda: evaluate(model, lookahead_of(parts), few), len(few.end))
            loss = train_step(model, parts, optimizer, args.objective,
                              args.rate * rate(state["step"], args.steps), columns).item()
            if not math.isfinite(loss):
                raise InputError(f"the loss of step {state['step']} is {loss}, in "
                                 f"{model.precision}: try --dtype float32; an older checkpoint is "
                                 f"as it was")
            journal.step(loss)
            if leads and time.perf_counter() - saved > CHECKPOINT_SECONDS:
                write_checkpoint(checkpoint, state, parts, moments)
                saved = time.perf_counter()
        if leads:
            table = journal.measure(
                lambda: evaluate(model, lookahead_of(parts), texts, accepted=PARTS[-1].accepted),
                len(texts.end))
    if leads:
        about = {"model": settings["model"], "settings": settings, "steps": args.steps,
                 "acceptance": table}
        # In one entry: safetensors writes several in random order.
        write_tensors({name: p.to(torch.bfloat16) for name, p in parts.items()}, args.out,
                      {"lookahead": json.dumps(about)})
        checkpoint.unlink(missing_ok=True)
        journal.end()


# ------------------------------------------------------- command line

def parse() -> Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_common(add)
    add_data(add, required=False)
    add("--texts", type=user_path, nargs="+", action="extend",
        help="of beyond/own_texts.py, to train on; --data is then only to measure on")
    add("--start", type=user_path, metavar="FILE", help="a look-ahead to train further")
    add("--objective", choices=["ce", "kl", "tv"], default="ce", help="(default: ce, the paper's)")
    for part in PARTS:
        for name, about in part.options.items():
            add(f"--{name}", **about)
    add("--batch", type=int, default=8, help="texts per step (default: 8)")
    add("--steps", type=int, default=1000, help="(default: 1000)")
    add("--rate", type=float, default=1.0,
        help="share of the usual rates of learning (default: 1; after --start try 0.3)")
    add("--out", type=user_path, required=True, help="file to write")
    add("--resume", action="store_true", help="from the checkpoint, if there is one")
    # Which process of how many, torchrun's; and when this one began.
    parser.set_defaults(process=0, processes=1, began=time.perf_counter())
    args = parser.parse_args()
    check_seed(args.seed)
    check_number("batch", args.batch, 2**16)
    check_number("steps", args.steps, 2**40)
    if not 0 < args.rate <= 100:
        raise InputError(f"--rate must be above 0 and at most 100, not {args.rate}")
    for part in PARTS:
        for name, (least, largest) in part.ranges.items():
            given = getattr(args, name)
            if given is not None:
                check_number(name, given, largest, least)
            if given is not None and args.start and name != "length":
                raise InputError(f"--{name} has no effect beside --start: the file says it")
    if args.data is None and args.texts is None:
        raise InputError("give --data, --texts, or both")
    check_writable(args.out)
    checkpoint = file_beside(args.out, "checkpoint")
    check_no_checkpoint(checkpoint, args.resume)
    if args.resume and args.out.is_file() and not checkpoint.exists():
        raise InputError(f"{args.out} has no checkpoint: there is nothing to resume")
    return args


def read_pool(args: Namespace, model: Llama, tokenizer: Tokenizer
              ) -> tuple[Tensor | Texts, Tensor | Texts]:
    """What to train on, and what to measure on. Training uses --texts, or else --data. Measuring
    uses the held-out files of --data, or else the held-out texts of --texts."""
    pool = held = None
    if args.texts:
        texts = Texts.joined([read_texts(path, model.config) for path in args.texts])
        pool, held = texts.chosen(~texts.held), texts.chosen(texts.held)
    if args.data:
        tokens, held = read_data(tokenizer, args.data, args.suffix, TEXT)
        if pool is None:
            pool = tokens
        elif args.process == 0:
            print("training on --texts, measuring on --data", file=sys.stderr)
    elif not set(TEMPERATURES) <= set(held.temperature.tolist()):
        raise InputError("the files of --texts hold no texts out to measure on: give --data too")
    return pool, held


def main() -> None:
    add_beyond("training")
    args = parse()
    join_processes(args)
    model, tokenizer = load_model(args, packed=False)
    check_context(model.config.context)
    if args.start:
        lookahead_tensors(args.start, model, args.length)  # A bad file is said before data is read.
    pool, held = read_pool(args, model, tokenizer)
    try:
        train(args, model, pool, held)
    except KeyboardInterrupt:
        saved = file_beside(args.out, "checkpoint").exists()
        print("stopped:", "--resume goes on" if saved else "nothing is saved yet", file=sys.stderr)
        raise
    leave_processes()


if __name__ == "__main__":
    from train_lookahead import main  # Not this copy of the file, but the one that beyond/ imports.
    run_script(main)
