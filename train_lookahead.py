"""Train the look-ahead tokens of PaSS (arXiv 2311.13581, section 3) for a frozen LLaMA.

    python train_lookahead.py --model DIR --data PATH .. --objective ce --out FILE  # paper
    python train_lookahead.py --model DIR --data PATH .. --texts TEXTS --head 256 --out FILE

Beyond the paper are the objectives kl and tv, a draft head and a memory (beyond/lookahead.py), and
texts that the model wrote (beyond/own_texts.py). FILE is for pass_sampler.py; FILE.jsonl has what
was measured on the way. Killed, the same command with --resume ends bit for bit where an
undisturbed run ends: all chance in a step comes from (seed, step). With many GPUs: torchrun
--nproc-per-node N train_lookahead.py .. Read `states`, `backward`, `train`. Shapes as in model.py;
M groups of L look-ahead tokens per text, N columns.
"""
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import files
from beyond.lookahead import LookaheadPlus, initial_head, initial_memory
from beyond.own_texts import (
    PROMPT, TEMPERATURES, TEXT, check_context, own_texts, read_texts)
from beyond.tree import cover
from files import InputError
from model import Cache, load_model
from pass_sampler import Params, probs

GROUPS = 4  # M, per text and step
READ_FOR = 16  # steps, each at other places: reading texts costs more than a step
RATES = {"embeddings": 0.02, "memory": 0.02, "head_in": 0.003, "head_out": 0.003}
EVALUATIONS = 10  # per run, about
CHECKPOINT_SECONDS = 20
# May differ on --resume; hashes stand for the model, data and texts.
MOVABLE = ("model", "data", "texts", "device", "out", "resume", "process", "processes")

# ----------------------- the columns, as sampling runs them; the loss


def prefix(model, text, offset, room):
    """Read text (B,T), positions shifted by offset (B,): a cache with room for more columns,
    and the model's own states (B,T,D)."""
    cache = Cache(model, text.shape[0], text.shape[1] + room)
    with torch.no_grad():
        positions = offset[:, None] + torch.arange(text.shape[1], device=text.device)
        target = model(text, cache, positions)
    cache.commit(text.shape[1])
    return cache, target


def states(model, lookahead, text, places, offset, cache, target):
    """Run M groups of look-ahead tokens after M places of each text, in one block.

    text (B,T). places (B,M): how many tokens of the text a group follows. offset (B,): added to all
    positions, since the memory's keys are not rotated: it is trained at all distances. cache,
    target: of `prefix`. Returns the columns' states h (N,D), whence q; the model's own at the same
    places (N,D), whence p; and the tokens (N,) that come next, which both predict.
    """
    M, L = places.shape[1], len(lookahead.embeddings)
    if lookahead.memory is not None:
        cache = cache.with_memory(lookahead.memory)
    # LA_j, after n tokens, stands where x_{n+j} does, text[n+j-1], and guesses x_{n+j+1}.
    here = (places[:, :, None] + torch.arange(L, device=text.device)).flatten(1)  # (B,M*L)
    # A group sees the memory, the text up to its place, and itself, causally.
    start = cache.memory_slots + text.shape[1]
    slot = torch.arange(start + M * L, device=text.device)
    group = torch.arange(M * L, device=text.device) // L
    mask = slot < cache.memory_slots + places.repeat_interleave(L, 1)[:, :, None]  # (B,M*L,S)
    mask[:, :, start:] = (group == group[:, None]).tril()
    x = lookahead.embeddings.repeat(M, 1).expand(len(text), -1, -1)
    h = model(x, cache, offset[:, None] + here, mask)
    if lookahead.head_in is not None:
        features = lookahead.features(h, model.embed(text.gather(1, here)))
        h = h + F.linear(features, lookahead.head_out)
    target = target.gather(1, here[:, :, None].expand(-1, -1, target.shape[2]))
    return h.flatten(0, 1), target.flatten(0, 1), text.gather(1, here + 1).flatten()


def loss_of(objective, logits, tokens, p):
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


def backward(model, h, tokens, objective, teacher=None, target=None, columns=64):
    """The mean loss over h (N,D), a tensor. Adds its gradients to all that h came from.

    p comes from the teacher's states target (N,D). In pieces of some columns, each back to h before
    the next begins: (N,V) in float32 would not fit.
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

def measure(model, lookahead, params, text, position, generator, ranks):
    """`cover` (n,L,ranks), and the expected accepted drafts of a chain (n,), after every sixth
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
    accepted = cover(p, logits, params, generator, ranks).view(-1, L, min(ranks, p.shape[1]))
    # The text's x_i is from p, and of a chain min(p, q) is kept: so a place counts by the product
    # of min(1, q(x_i) / p(x_i)) over the drafts before it.
    x = tokens[:, None]
    kept = probs(logits, params).gather(1, x) / p.gather(1, x).clamp(min=1e-30)
    before = F.pad(kept.clamp(max=1).view(-1, L), (1, -1), value=1).cumprod(1)
    return accepted, (accepted[:, :, 0] * before).sum(1)


@torch.no_grad()
def evaluate(model, lookahead, texts, position=0, ranks=5):
    """Acceptance on texts {temperature: (n,T)} that the model wrote.

    Per temperature: by_position, how probably a draft is accepted where those before it are the
    text's own tokens; expected, the accepted drafts of a chain; by_rank [position][k]: `cover`.
    """
    lookahead = lookahead.ready(model)
    table = {}
    for temperature, text in texts.items():
        generator = torch.Generator(model.embedding.device).manual_seed(0)
        params = Params(temperature)
        measured = []
        for rows in text.split(4):
            measured.append(measure(model, lookahead, params, rows, position, generator, ranks))
        by_rank, expected = (torch.cat(parts).mean(0) for parts in zip(*measured))
        by_rank = [[round(share, 4) for share in row] for row in by_rank.tolist()]
        table[temperature] = {"by_position": [row[0] for row in by_rank],
                              "expected": round(expected.item(), 4), "by_rank": by_rank}
    return table


# ----------------------------------------------------------- training

def initial(model, tokens, args):
    """{name: float32 parameter}. Embeddings begin as the mean of all tokens."""
    generator = torch.Generator().manual_seed(args.seed)
    noise = 0.01 * torch.randn(args.length, model.config.dim, generator=generator)
    parts = {"embeddings": model.embedding.float().mean(0) + noise.to(model.embedding.device)}
    if args.memory:
        text = files.windows(tokens, 1, args.memory, generator)
        parts["memory"] = initial_memory(model, text.to(model.embedding.device))
    if args.head:
        parts |= initial_head(model, args.head, generator)
    return {name: part.requires_grad_() for name, part in parts.items()}


def rate(step, steps):
    """Share of the full learning rate: up for 10 steps, then down along a cosine."""
    return min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))


def batches(model, pool, args, first):
    """For each step from `first` on: this process's columns, as `states` takes them.

    pool: tokens (N,) to cut texts from, or texts (N,TEXT).
    """
    share = args.batch // args.processes
    mine = slice(args.process * share, (args.process + 1) * share)
    for step in range(first, args.steps):
        if step == first or step % READ_FOR == 0:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step // READ_FOR)
            if pool.ndim == 1:
                text = files.windows(pool, args.batch, TEXT, generator)
            else:
                text = pool[torch.randint(len(pool), (args.batch,), generator=generator)]
            # Places in random order: each serves once. A group ends within the text.
            order = torch.rand(args.batch, TEXT - 1 - args.length, generator=generator).argsort(1)
            room = max(1, model.config.context - TEXT - args.length)
            offset = torch.randint(room, (args.batch,), generator=generator)
            text, places, offset = (
                x[mine].to(model.embedding.device) for x in (text, order + 1, offset))
            read = prefix(model, text, offset, GROUPS * args.length)
        yield text, places[:, step % READ_FOR * GROUPS:][:, :GROUPS], offset, *read


def train_step(model, parts, optimizer, objective, scale, columns):
    """One step of Adam on the columns of `states`; returns the loss, a tensor."""
    lookahead = LookaheadPlus(**{name: p.to(model.embedding) for name, p in parts.items()})
    h, target, tokens = states(model, lookahead, *columns)
    loss = backward(model, h, tokens, objective, model, target)
    if dist.is_initialized():
        for mean in (loss, *(p.grad for p in parts.values())):  # nothing else is exchanged
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
    for group in optimizer.param_groups:
        group["lr"] = scale * RATES[group["name"]]
    optimizer.step()
    optimizer.zero_grad()
    return loss


def beside(out, suffix):
    return out.with_name(f"{out.name}.{suffix}")


def record(model, parts, texts, state, out, ranks):
    """Evaluate; write all measured so far."""
    table = evaluate(model, LookaheadPlus(**parts), texts, ranks=ranks)
    losses, state["losses"] = state["losses"], []
    state["measured"].append({
        "step": state["step"], "seconds": round(state["seconds"], 1),
        "loss": sum(losses) / len(losses) if losses else None, "acceptance": table})
    lines = "".join(json.dumps(line) + "\n" for line in state["measured"])
    files.write_file(beside(out, "jsonl"), lambda path: path.write_text(lines))
    expected = ", ".join(f"{row['expected']:.3f} at {t:g}" for t, row in table.items())
    L = len(parts["embeddings"])
    tqdm.write(f"step {state['step']}: of {L} drafts accepted {expected}", file=sys.stderr)


def train(args, model, pool, held):
    """Train, and write args.out. pool: as in `batches`; held (N,): to evaluate."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in MOVABLE}
    settings["model"] = files.fingerprint(model.config)
    settings["data and weights"] = files.digest(model, pool, held)
    parts = initial(model, pool.flatten(), args)
    optimizer = torch.optim.Adam([{"params": [p], "name": name} for name, p in parts.items()])
    moments = {name: optimizer.state[p] for name, p in parts.items()}
    state = {"settings": settings, "step": 0, "seconds": 0.0, "losses": [], "measured": []}
    checkpoint = beside(args.out, "checkpoint")
    leads = args.process == 0
    if args.resume and checkpoint.exists():
        state = files.read_checkpoint(checkpoint, settings, parts, moments)
    if args.resume and leads:
        print(f"going on from step {state['step']}", file=sys.stderr)
    if leads:  # this process measures and writes
        prompts = files.windows(held, 32, PROMPT, torch.Generator().manual_seed(args.seed))
        texts = {t: own_texts(model, prompts, t, args.seed, length=160) for t in TEMPERATURES}
    bar = tqdm(total=args.steps, initial=state["step"], disable=not leads, unit="step",
               smoothing=0, mininterval=1 if sys.stderr.isatty() else 60)
    began = saved = time.perf_counter()
    with bar:
        for columns in batches(model, pool, args, state["step"]):
            if leads and state["step"] % max(1, args.steps // EVALUATIONS) == 0:
                start = time.perf_counter()
                record(model, parts, texts, state, args.out, ranks=1)
                pause = time.perf_counter() - start
                began += pause
                bar.start_t += pause  # or the time left would count evaluations
            loss = train_step(model, parts, optimizer, args.objective,
                              rate(state["step"], args.steps), columns)
            state["losses"].append(loss.item())
            state["step"] += 1
            state["seconds"] += time.perf_counter() - began
            began = time.perf_counter()
            bar.update()
            if leads and began - saved > CHECKPOINT_SECONDS:
                files.write_checkpoint(checkpoint, state, parts, moments)
                saved = began
    if leads:
        record(model, parts, texts, state, args.out, ranks=5)
        about = {"model": settings["model"], "settings": settings, "steps": args.steps,
                 "acceptance": state["measured"][-1]["acceptance"]}
        # One entry: safetensors writes several in random order.
        files.write_tensors({name: p.to(torch.bfloat16) for name, p in parts.items()}, args.out,
                            {"lookahead": json.dumps(about)})
        checkpoint.unlink(missing_ok=True)
        print(f"{args.out}: {args.steps} steps, {state['seconds'] / 60:.1f} min")


# ------------------------------------------------------- command line

def parse():
    parser = files.new_parser(__doc__)
    add = parser.add_argument
    files.add_common(add)
    files.add_data(add)
    add("--texts", type=Path, help="to train on in place of data")
    add("--objective", choices=["ce", "kl", "tv"], default="tv", help="(default: tv)")
    add("--length", type=int, default=4, help="look-ahead tokens L (default: 4)")
    add("--head", type=int, default=0, help="rank of the draft head (default: 0, none)")
    add("--memory", type=int, default=0, help="memory slots R (default: 0)")
    add("--batch", type=int, default=8, help="texts per step (default: 8)")
    add("--steps", type=int, default=1000, help="(default: 1000)")
    add("--out", type=Path, required=True, help="file to write")
    add("--resume", action="store_true", help="from the checkpoint, if there is one")
    parser.set_defaults(process=0, processes=1)  # which of how many, of torchrun's
    args = parser.parse_args()
    files.check_seed(args.seed)
    for name, largest in (("length", 64), ("batch", 2**16), ("steps", 2**40)):
        files.check_number(name, getattr(args, name), largest)
    if not 0 <= args.memory <= TEXT or not 0 <= args.head <= 2**14:
        raise InputError(f"--memory must be 0 to {TEXT}, --head 0 to {2**14}")
    files.check_writable(args.out)
    checkpoint = beside(args.out, "checkpoint")
    files.check_no_checkpoint(checkpoint, args.resume)
    if args.resume and args.out.is_file() and not checkpoint.exists():
        raise InputError(f"{args.out} has no checkpoint: there is nothing to resume")
    return args


def join_processes(args):
    """Become one of torchrun's processes, on its own device."""
    if args.device not in (None, "cpu", "cuda"):
        raise InputError("under torchrun --device must be cpu or cuda")
    if args.device == "cuda" or args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = files.device_named(args.device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    args.process, args.processes = dist.get_rank(), dist.get_world_size()
    if args.batch % args.processes:
        raise InputError(f"{args.processes} processes cannot share {args.batch} texts evenly")


def main():
    args = parse()
    if dist.is_torchelastic_launched():
        join_processes(args)
    model, tokenizer = load_model(args, packed=False)
    check_context(model)
    pool, held = files.read_data(tokenizer, args.data, args.suffix, TEXT)
    if args.texts:
        pool = read_texts(args.texts, model.config)
    try:
        train(args, model, pool, held)
    except KeyboardInterrupt:
        saved = beside(args.out, "checkpoint").exists()
        print("stopped:", "--resume goes on" if saved else "nothing is saved yet", file=sys.stderr)
        raise
    if dist.is_initialized():
        dist.barrier()  # the first process still evaluates and writes
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # or gloo's threads abort, in one run of 40 on a busy machine


if __name__ == "__main__":
    files.run_script(main)
