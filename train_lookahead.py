"""Train the look-ahead of PaSS (arXiv 2311.13581, section 3) for a frozen LLaMA: one safetensors file for pass_sampler.py.

    python train_lookahead.py --model DIR --data PATH [PATH ..] --length 4 --objective ce --minutes 10 --out FILE   # the paper
    python train_lookahead.py --model DIR --data PATH .. --length 3 --head 256 --minutes 10 --out FILE              # beyond it
    python train_lookahead.py --model DIR --data PATH .. --evaluate FILE                                            # measure again

Only the look-ahead has gradients. A few texts are read once without any and serve for STEPS steps; each step puts M groups of
look-ahead tokens after M places of each text into one block, the only differentiated pass; a group sees the text up to its place,
the memory and itself.
Killed at any moment, `--resume` goes on from the last checkpoint (FILE.checkpoint) and with --steps ends bit for bit where an
undisturbed run ends: all randomness of a step comes from (seed, step). With many GPUs: `torchrun --nproc-per-node N
train_lookahead.py ..`; only the look-ahead's gradients travel. Read `loss_and_gradient`, `states`, `train`. Shapes as in
pass_sampler.py; N columns, M groups.
"""
import argparse
import hashlib
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

from beyond.lookahead import LookaheadPlus
from files import (
    InputError, add_common, check_seed, check_writable, device_named, fingerprint, load_tokenizer,
    open_tensors, refuse_idle, run_script, write_tensors)
from model import DTYPES, Cache, Llama
from pass_sampler import Params, Sampler, draw, load_lookahead, probs, residual

TEXT, GROUPS, STEPS = 128, 4, 16  # tokens a text, groups a text and step, steps for which texts serve
PROMPT = 48  # tokens after which the model writes a text
RATES = {"embeddings": 0.02, "memory": 0.02, "head_in": 0.003, "head_out": 0.003}
TEMPERATURES = (0.0, 0.6, 1.0)
CHECKPOINT_SECONDS, EVALUATION_SECONDS = 20, 300


# ----------------------------------------------------------------------------------------------------------------- objective

@torch.no_grad()
def loss_and_gradient(model, h, target, tokens, objective, columns=192, to_output=None):
    """Loss, summed over columns, and its gradient with respect to h (N,D), the states from which the drafts' q come.

    p and q are at temperature 1, whatever the drafts will be drawn at.
    target (N,D): the model's own states at the same places, whence p; not read for "ce".  tokens (N,): what the text has there.
    to_output (V,D): the gradient with respect to the output matrix is added to it, where that is trained too (demo/pretrain.py).
    "ce" is the paper's: -log q(token).  "kl" distils the model: KL(p || q).  "tv" is the total variation 1 - sum_x min(p, q):
    the probability that the rejection rule rejects a draft from q, itself.
    The gradient with respect to the logits is written down, in pieces of some columns: V is large, and autograd would keep
    several (N,V) in float32.
    """
    total, gradient = 0.0, torch.empty_like(h)
    for i in range(0, len(h), columns):
        part = slice(i, i + columns)
        log_q = model.logits(h[part]).float().log_softmax(-1)
        q = log_q.exp()
        if objective == "ce":
            total -= log_q.gather(1, tokens[part, None]).sum()
            g = q.scatter_add_(1, tokens[part, None], -torch.ones_like(q[:, :1]))
        else:
            p = model.logits(target[part]).float().softmax(-1)
            if objective == "kl":
                total += F.kl_div(log_q, p, reduction="sum")
                g = q - p
            else:
                below = q * (q < p)  # only there does min(p, q) move with q, and dq_y / dlogit_x = q_y (1[x = y] - q_x)
                total += len(q) - torch.minimum(p, q).sum()
                g = q * below.sum(-1, keepdim=True) - below
        g = g.to(h.dtype)
        gradient[part] = g @ model.output
        if to_output is not None:
            to_output += g.T @ h[part]
    return total, gradient


def prefix(model, text, offset, room):
    """Read text (B,T) once, its positions shifted by offset (B,), with room for so many columns after it. Returns the cache and
    the model's own states (B,T,D)."""
    cache = Cache(model, text.shape[0], text.shape[1] + room)
    with torch.no_grad():
        own = model(text, cache, offset[:, None] + torch.arange(text.shape[1], device=text.device))
    cache.commit(text.shape[1])
    return cache, own


def states(model, lookahead, text, places, offset, cache, own):
    """Run M groups of look-ahead tokens after M places of each text.

    text (B,T) tokens.  places (B,M): how many tokens of the text a group follows.  offset (B,): added to all positions, since
    the memory's keys are not rotated and would fade at positions where they were never trained.  cache, own: of `prefix`.
    Returns drafts' and targets' states h, target (B*M*L, D), and the tokens (B*M*L,) that both predict.
    """
    M, L = places.shape[1], len(lookahead.embeddings)
    if lookahead.memory is not None:
        cache = cache.with_memory(lookahead.memory)
    before = (places[:, :, None] + torch.arange(L, device=text.device)).flatten(1)  # (B,M*L): index of the token before the draft's
    # A group sees the memory, the text up to its place, and itself, causally.
    start = cache.memory + text.shape[1]
    slot = torch.arange(start + M * L, device=text.device)
    group = torch.arange(M * L, device=text.device) // L
    mask = slot < cache.memory + places.repeat_interleave(L, 1)[:, :, None]  # (B,M*L,S)
    mask[:, :, start:] = (group == group[:, None]).tril()
    x = lookahead.embeddings.repeat(M, 1).expand(len(text), -1, -1)
    h = model(x, cache, offset[:, None] + before, mask)
    if lookahead.head_in is not None:
        h = h + F.linear(lookahead.features(h, model.embed(text.gather(1, before))), lookahead.head_out)
    target = own.gather(1, before[:, :, None].expand(-1, -1, own.shape[2]))
    return h.flatten(0, 1), target.flatten(0, 1), text.gather(1, before + 1).flatten()


def backward(model, parts, objective, *batch):
    """Add one step's gradient to parts {name: float32 parameter}, averaged over columns of all texts; returns the loss.
    batch: text, places, offset, cache, own, as `states` takes them."""
    lookahead = LookaheadPlus(**{name: part.to(model.embedding) for name, part in parts.items()})
    h, target, tokens = states(model, lookahead, *batch)
    loss, gradient = loss_and_gradient(model, h.detach(), target, tokens, objective)
    h.backward(gradient / len(h))
    return loss.item() / len(h)


# ---------------------------------------------------------------------------------------------------------------------- data

def split_files(paths, suffix):
    """All files below `paths` with that suffix: (for training, held out). The tenth whose names hash lowest is held out."""
    for path in paths:
        if not path.exists():
            raise InputError(f"--data {path} does not exist")
    files = sorted({f for path in paths for f in (path.rglob(f"*{suffix}") if path.is_dir() else [path]) if f.is_file()})
    if len(files) < 2:
        raise InputError(f"--data has {len(files)} files with suffix {suffix!r}; at least 2 are needed, as one is held out")
    ordered = sorted(files, key=lambda f: hashlib.sha256(f.name.encode()).digest())
    held = set(ordered[:max(1, len(files) // 10)])
    return [f for f in files if f not in held], [f for f in files if f in held]


def read_data(tokenizer, paths, suffix):
    """Tokens of all files below `paths`, (N,) for training and (N,) held out. Files are held out whole."""
    tokens = ([], [])
    for part, files in zip(tokens, split_files(paths, suffix)):
        for file in tqdm(files, "reading", leave=False, disable=None):
            try:
                content = file.read_bytes()
                part.extend([] if b"\0" in content else tokenizer.encode(content.decode("utf-8-sig", errors="replace")))  # no text: left out
            except OSError as error:
                raise InputError(f"cannot read {file}: {error}") from None
    if min(map(len, tokens)) <= TEXT:
        raise InputError(f"--data has {len(tokens[0])} tokens and {len(tokens[1])} held out; more than {TEXT} of both are needed")
    return [torch.tensor(t) for t in tokens]


def windows(tokens, n, length, generator):
    """n random pieces of `length` tokens: (n,length)."""
    return tokens[torch.randint(len(tokens) - length, (n, 1), generator=generator) + torch.arange(length)]


def some_prompts(tokens, n, seed):
    return windows(tokens, n, PROMPT, torch.Generator().manual_seed(seed))


def own_texts(model, prompts, temperature, seed, length=160, at_once=128):
    """What the model itself writes after prompts (n,T), so many at once: (n,length), prompts included.

    It is not stopped by its stop tokens.
    """
    new = length - prompts.shape[1]
    sampler = Sampler(model, "autoregressive", Params(temperature), min(at_once, len(prompts)), length)
    texts = []
    for i in tqdm(range(0, len(prompts), at_once), f"writing at {temperature}", leave=False, disable=None):
        rows = prompts[i:i + at_once].tolist()
        written = sampler.generate(rows, new, seed + i, stop_tokens=())["tokens"]
        texts += [before + after for before, after in zip(rows, written)]
    return torch.tensor(texts)


# ---------------------------------------------------------------------------------------------------------------- evaluation

def held_texts(model, held, seed):
    """{temperature: texts} that the model writes after held-out prompts: what `evaluate` measures on."""
    return {t: own_texts(model, some_prompts(held, 32, seed), t, seed) for t in TEMPERATURES}


@torch.no_grad()
def evaluate(model, lookahead, texts, position=0, ranks=5):
    """Acceptance on texts {temperature: (n,T)} that the model wrote itself, their first token at `position`.

    Per temperature: by_position, the probability a_j = sum_x min(p_j(x), q_j(x)) that draft j is accepted, the tokens x_i before
    it being the text's; expected, the accepted drafts of a chain, sum_j a_j prod_{i<j} min(1, q_i(x_i) / p_i(x_i)), which is
    unbiased since x_i ~ p_i; by_rank [position][k], the probability that one of k+1 drafts for that position is accepted, drawn
    without replacement as beyond/tree.py does.
    """
    lookahead = lookahead.ready(model)
    table, L, generator = {}, len(lookahead.embeddings), torch.Generator(model.embedding.device).manual_seed(0)
    for temperature, text in texts.items():
        accept, cover, chain = [], [], []
        for rows in text.split(8):
            rows = rows.to(model.embedding.device)
            places = torch.arange(PROMPT, rows.shape[1] - L, 6, device=rows.device).expand(len(rows), -1)
            offset = torch.full((len(rows),), position, device=rows.device)
            h, target, tokens = states(model, lookahead, rows, places, offset, *prefix(model, rows, offset, places.shape[1] * L))
            for hs, ts, x in zip(h.split(32 * L), target.split(32 * L), tokens.split(32 * L)):
                logits = model.logits(hs)
                p, q = probs(model.logits(ts), Params(temperature)), probs(logits, Params(temperature))
                rest, refused, z = p, [torch.ones(len(p), device=p.device)], logits.clone()
                for _ in range(min(ranks, p.shape[-1])):  # as in `verify_tree`, with the average over u
                    q_k = probs(z, Params(temperature))
                    refused.append(refused[-1] * (1 - torch.minimum(rest, q_k).sum(-1)))
                    rest = residual(rest, q_k)
                    u = torch.rand(len(z), dtype=torch.float64, generator=generator, device=z.device)
                    z.scatter_(1, draw(q_k, u)[:, None], -math.inf)
                cover.append(1 - torch.stack(refused[1:], 1).view(-1, L, len(refused) - 1))
                accept.append(torch.minimum(p, q).sum(-1).view(-1, L))
                kept = (q.gather(1, x[:, None]) / p.gather(1, x[:, None]).clamp(min=1e-30)).clamp(max=1).view(-1, L)
                chain.append((accept[-1] * F.pad(kept, (1, 0), value=1)[:, :-1].cumprod(1)).sum(1))
        accept, cover, chain = torch.cat(accept), torch.cat(cover).mean(0), torch.cat(chain)
        table[str(temperature)] = {"by_position": [round(a, 4) for a in accept.mean(0).tolist()],
                                   "expected": round(chain.mean().item(), 4),
                                   "by_rank": [[round(c, 4) for c in row] for row in cover.tolist()]}
    return table


def show(table):
    return "; ".join(f"t={t} {' '.join(f'{a:.3f}' for a in row['by_position'])} expected {row['expected']:.3f}"
                     for t, row in table.items())


# ------------------------------------------------------------------------------------------------------------------ training

def initial(model, tokens, length, memory, rank, seed):
    """The look-ahead before training. Embeddings: the mean of all tokens, the best guess of one who knows nothing, and inside the
    region that the model knows. Memory: the keys and values of a real text. Head: head_out is 0, so it begins as no correction."""
    c, generator = model.config, torch.Generator().manual_seed(seed)
    mean = model.embedding.float().mean(0)
    parts = {"embeddings": mean + 0.01 * torch.randn(length, c.dim, generator=generator).to(mean.device)}
    if memory:
        cache = Cache(model, 1, memory)
        model(windows(tokens, 1, memory, generator).to(mean.device), cache, torch.zeros(1, memory, device=mean.device))
        parts["memory"] = cache.kv[:, :, 0].transpose(2, 3).float().contiguous()  # (layers,2,R,K,E)
    if rank:
        parts["head_in"] = torch.randn(rank, 2 * c.dim, generator=generator).to(mean.device) / math.sqrt(2 * c.dim)
        parts["head_out"] = torch.zeros(c.dim, rank, device=mean.device)
    return {name: part.requires_grad_() for name, part in parts.items()}


def read_checkpoint(path, settings):
    """The state, a dict, and the tensors, {name: tensor}, of a checkpoint. Raises InputError where its settings are others."""
    with open_tensors(path) as file:
        try:
            state = json.loads(file.metadata()["state"])
            made_with = dict(state["settings"])
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path} is no checkpoint, or damaged: remove it to begin anew") from None
        if made_with != settings:
            other = ", ".join(f"{k} {made_with.get(k)}, now {v}" for k, v in settings.items() if made_with.get(k) != v)
            raise InputError(f"{path} was made with other settings ({other}): give those, or remove it to begin anew")
        return state, {name: file.get_tensor(name) for name in file.keys()}


def train(args, model, pool, held, settings):
    """Train and write args.out. pool: tokens (N,) to cut texts from, or texts (N,T) of the model's own."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = initial(model, pool.flatten(), args.length, args.memory, args.head, args.seed)
    optimizer = torch.optim.Adam([{"params": [p], "lr": RATES[name], "rate": RATES[name]} for name, p in parts.items()])
    checkpoint, step, spent = args.out.with_name(args.out.name + ".checkpoint"), 0, 0.0
    if args.resume and checkpoint.exists():
        saved, tensors = read_checkpoint(checkpoint, settings)
        step, spent = saved["step"], saved["spent"]
        for name, p in parts.items():
            p.data.copy_(tensors[name])
            optimizer.state[p] = {k: tensors[f"{name}.{k}"].to("cpu" if k == "step" else p.device)
                                  for k in ("step", "exp_avg", "exp_avg_sq")}
    texts = held_texts(model, held, args.seed) if rank == 0 else {}

    def save_state():
        state = {f"{name}.{k}": v for name, p in parts.items() for k, v in optimizer.state[p].items()}
        write_tensors(parts | state, checkpoint, {"state": json.dumps({"settings": settings, "step": step, "spent": spent})})

    bar = tqdm(total=args.steps or round(args.minutes * 60), initial=step if args.steps else round(spent), disable=rank > 0,
               unit="step" if args.steps else "s", smoothing=0, mininterval=1 if sys.stderr.isatty() else 60)
    if args.resume and rank == 0:
        tqdm.write(f"going on from step {step}" if step else "there is nothing to resume: beginning anew",
                   file=sys.stderr)
    every = EVALUATION_SECONDS if args.steps else min(EVALUATION_SECONDS, 15 * args.minutes)  # a short run: four times
    saved_at, measured_at, accept, read = spent, -math.inf, None, None
    mine = slice(rank * args.batch // world, (rank + 1) * args.batch // world)
    while (done := step / args.steps if args.steps else spent / (60 * args.minutes)) < 1:
        if rank == 0 and spent - measured_at > every:
            table, measured_at = evaluate(model, LookaheadPlus(**parts), texts), spent
            accept = " ".join(f"{a:.2f}" for a in table["1.0"]["by_position"])
            tqdm.write(f"step {step}, {spent / 60:.1f} min: {show(table)}", file=sys.stderr)
        began = time.perf_counter()
        if read is None or step % STEPS == 0:  # reading costs more than a step: let it serve for several, at other places
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step // STEPS)
            if pool.ndim == 1:
                text = windows(pool, args.batch, TEXT, generator)
            else:
                text = pool[torch.randint(len(pool), (args.batch,), generator=generator)]
            shuffled = torch.rand(args.batch, text.shape[1] - 1 - args.length, generator=generator).argsort(1) + 1
            offset = torch.randint(max(1, model.config.context - text.shape[1] - args.length), (args.batch,), generator=generator)
            text, shuffled, offset = (x[mine].to(model.embedding.device) for x in (text, shuffled, offset))
            read = prefix(model, text, offset, GROUPS * args.length)
        places = shuffled[:, step % STEPS * GROUPS:][:, :GROUPS]
        loss = backward(model, parts, args.objective, text, places, offset, *read)
        if world > 1:
            for p in parts.values():
                dist.all_reduce(p.grad)
                p.grad /= world
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.step()
        optimizer.zero_grad()
        step, seconds = step + 1, time.perf_counter() - began
        bar.update(1 if args.steps else round(spent + seconds) - round(spent))
        bar.set_postfix(loss=f"{loss:.4f}", accepted=accept, refresh=False)
        spent += seconds
        if rank == 0 and spent - saved_at > CHECKPOINT_SECONDS:
            save_state()
            saved_at = spent
    bar.close()
    if rank == 0:
        table = evaluate(model, LookaheadPlus(**parts), texts)
        about = {"model": fingerprint(model.config), "settings": settings, "steps": step, "acceptance": table}
        # One entry of metadata, not four: safetensors writes several in random order, and the file would differ from run to run.
        write_tensors({k: v.to(torch.bfloat16) for k, v in parts.items()}, args.out, {"lookahead": json.dumps(about)})
        checkpoint.unlink(missing_ok=True)
        print(f"{args.out}: {step} steps, {spent / 60:.1f} min; {show(table)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_common(add)
    add("--data", type=Path, nargs="+", required=True, help="text files, and folders to search for them")
    add("--suffix", default="", help="of the files in folders, such as .py (default: all)")
    add("--from-model", type=float, nargs="+", metavar="TEMPERATURE",
        help="train on texts that the model writes after prompts from the data, in equal parts at these temperatures")
    add("--texts", type=int, default=1024, help="how many texts --from-model writes (default: %(default)s)")
    add("--batch", type=int, default=8, help="texts a step, of all processes together (default: %(default)s; a GPU takes "
        "128); --from-model writes 16 times as many at once")
    add("--length", type=int, default=4, help="look-ahead tokens L (default: %(default)s)")
    add("--memory", type=int, default=0, help="memory slots R (default: %(default)s)")
    add("--head", type=int, default=0, help="rank of the draft head (default: %(default)s, no head)")
    add("--objective", choices=["ce", "kl", "tv"], default="tv", help="default: %(default)s; ce is the paper's")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=10, help="of training (default: %(default)s)")
    budget.add_argument("--steps", type=int, help="of training, in place of --minutes")
    add("--out", type=Path, help="file to write")
    add("--resume", action="store_true", help="go on from the checkpoint beside --out, if there is one")
    add("--evaluate", nargs="+", metavar="FILE|unk|mean", help="measure the acceptance, with a memory near "
        "positions 100, 1000 and 3000")
    args = parser.parse_args()
    check_seed(args.seed)
    if not 1 <= args.length <= 64 or not 0 <= args.memory <= TEXT or not 0 <= args.head <= 2**14 or args.batch < 1:
        raise InputError(f"--length must be 1 to 64, --memory 0 to {TEXT}, --head 0 to {2**14}, --batch at least 1")
    for temperature in args.from_model or ():
        Params(temperature)
    if args.texts < len(args.from_model or [0]):
        raise InputError(f"--texts must be at least one a temperature, not {args.texts}")
    if not 0 < args.minutes < math.inf or args.steps is not None and args.steps < 1:
        raise InputError("--steps and --minutes must be positive")
    if (args.out is None) == (args.evaluate is None):
        raise InputError("give --out FILE to train, or --evaluate FILE to measure")
    if args.out:
        check_writable(args.out)
    if args.from_model is None:
        refuse_idle(parser, args, ["texts"], "without --from-model")
    if args.evaluate:
        idle = ("from_model", "batch", "length", "memory", "head", "objective", "steps", "minutes", "resume")
        refuse_idle(parser, args, idle, "with --evaluate")
    if dist.is_torchelastic_launched():
        if not args.steps:
            raise InputError("under torchrun give --steps: processes that stop by the clock would not stop together")
        if args.device == "cuda" or args.device is None and torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if (args.device or "cpu").startswith("cuda") else "gloo")
        if args.batch % dist.get_world_size():
            raise InputError(f"{dist.get_world_size()} processes cannot share --batch {args.batch} texts evenly")
    model = Llama.load(args.model, DTYPES.get(args.dtype), device_named(args.device), packed=False)
    if model.config.context < TEXT:
        raise InputError(f"the model's context of {model.config.context} tokens is shorter than the training texts of {TEXT}")
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    pool, held = read_data(tokenizer, args.data, args.suffix)
    if args.evaluate and dist.is_initialized() and dist.get_rank():
        return  # one process is enough
    if args.evaluate:
        lookaheads = {spec: load_lookahead(spec, model, tokenizer) for spec in args.evaluate}
        texts = held_texts(model, held, args.seed)
        print("| look-ahead | near position | " + " | ".join(f"accepted at t = {t:g} | expected" for t in TEMPERATURES) + " |")
        print("|---|---|" + "---|---|" * len(TEMPERATURES))
        for spec, lookahead in lookaheads.items():
            for position in (0, 900, 2900) if lookahead.memory is not None else (0,):  # attention is relative, but for the memory
                if position + 160 <= model.config.context:
                    row = "".join(f" {' '.join(f'{a:.2f}' for a in row['by_position'])} | {row['expected']:.2f} |"
                                  for row in evaluate(model, lookahead, texts, position, ranks=1).values())
                    print(f"| {Path(spec).stem} | {'any' if lookahead.memory is None else position + 100} |{row}", flush=True)
        return
    settings = {"model": fingerprint(model.config), "data": " ".join(path.name for path in args.data)}
    settings |= {k: str(getattr(args, k)) for k in ("suffix", "from_model", "texts", "batch", "length", "memory", "head",
                                                    "objective", "seed", "dtype")}
    settings |= {"sizes": str((TEXT, GROUPS, STEPS)), "rates": str(RATES)}
    settings |= {"steps": str(args.steps)} if args.steps else {"minutes": str(args.minutes)}
    if args.from_model is not None:
        n = args.texts // len(args.from_model)
        pool = torch.cat([own_texts(model, some_prompts(pool, n, args.seed + i), t, args.seed + i, TEXT, 16 * args.batch)
                          for i, t in enumerate(args.from_model, 1)])
    try:
        train(args, model, pool, held, settings)
    except KeyboardInterrupt:
        checkpoint = args.out.with_name(args.out.name + ".checkpoint")
        saved = "nothing is saved yet"
        if checkpoint.exists():
            step = read_checkpoint(checkpoint, settings)[0]["step"]
            saved = f"{checkpoint} has step {step}: go on with the same command and --resume"
        tqdm.write(f"\nstopped; {saved}", file=sys.stderr)
        raise
    if dist.is_initialized():
        dist.barrier()  # the first process still evaluates and writes
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # not through the interpreter's end, where gloo's threads aborted one run in 40 on a busy machine


if __name__ == "__main__":
    run_script(main)
