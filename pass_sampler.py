"""PaSS, parallel speculative sampling (Monea, Joulin, Grave 2023, arXiv 2311.13581), top to bottom.

    python pass_sampler.py --model DIR --prompt "def fibonacci(n):" --compare

In equations p is the target's next-token distribution (the model's own) and q the draft's; x_1..x_n is the text so far.
Shapes: B batch rows, T block columns, V vocabulary, L look-ahead tokens, D width.
Read `probs`, `draw`, `verify` (the rule that makes drafts harmless), then the loops `autoregressive` and `parallel`.
Start with model.py, where block, cache and commit are explained.
"""
import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from model import DTYPES, Cache, InputError, Llama, device_named, load_tokenizer, open_tensors, run_script

# ------------------------------------------------------------------------------------- distributions and the rejection rule


@dataclass(frozen=True)
class Params:
    """Sampling parameters. temperature 0 is greedy; top_k 0 and top_p 1 are off."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top-k must be 0 (off) or a positive number of tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be above 0 and at most 1 (off), not {self.top_p}")


def probs(logits, params):
    """Logits (...,V) -> probabilities (...,V) in float32 (float64 for float64). The same function makes p and q.

    In this order: temperature; top-k, the tokens at least as likely as the k-th; top-p, the fewest most likely tokens that
    together reach top_p (arXiv 1904.09751), the one that crosses it included. Tokens that tie with the last one kept are kept.
    Temperature 0 is the one-hot distribution, so greedy decoding needs no code of its own anywhere.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if params.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(params.temperature, 1e-30)  # maximum 0: no overflow
    if 0 < params.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[..., -1:], -math.inf)
    p = logits.softmax(-1)
    if params.top_p < 1:
        falling = p.sort(-1, descending=True).values
        before = falling.cumsum(-1) - falling  # probability of all more likely tokens
        least = falling.masked_fill(before >= params.top_p, 1).amin(-1, keepdim=True)
        p = p.masked_fill(p < least, 0)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p, u):
    """Inverse CDF: weights p (...,V), not necessarily normalised, and uniforms u (...) in [0, 1) -> tokens (...).

    Takes the first token whose cumulative weight exceeds u times the total, so never one of weight 0.
    """
    cdf = p.double().cumsum(-1)
    return torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)[..., 0]


def verify(p, q, drafts, u):
    """The rejection rule of speculative sampling (Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).

    p (B,L+1,V): the target after 0 .. L drafts.  q (B,L,V): what the drafts (B,L) were drawn from.  u (B,L+1): independent
    uniforms in [0, 1); they are arguments, and the rule a pure function, so that a test can integrate over them exactly.
    Returns accepted (B,), how many drafts to keep, and the token (B,) that follows them.

    Accept draft d while u < p(d)/q(d); at the first rejection draw from norm(max(0, p - q)); after L acceptances draw from p.
    Why the output follows p, for one position: token x comes out as an accepted draft with probability
    q(x) min(1, p(x)/q(x)) = min(p(x), q(x)). A rejection has probability 1 - sum_y min(p(y), q(y)) = sum_y max(0, p(y) - q(y)),
    which is just what the residual is divided by, so x comes out after one with probability max(0, p(x) - q(x)).
    The sum is p(x), whatever q is. A bad q costs time, never truth.
    """
    p_draft = p[:, :-1].gather(-1, drafts[..., None])[..., 0]
    q_draft = q.gather(-1, drafts[..., None])[..., 0]
    accept = u[:, :-1] * q_draft < p_draft
    accepted = accept.long().cumprod(1).sum(1)  # those before the first rejection
    rows = torch.arange(len(p), device=p.device)
    p, q = p[rows, accepted], F.pad(q, (0, 0, 0, 1))[rows, accepted]  # q = 0 after the last draft: the residual is p itself
    residual = (p - q).clamp(min=0)
    # p and q can be equal up to rounding; then a "rejection" is rounding too, and p is as right as the empty residual.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    return accepted, draw(residual, u[:, -1])


# ---------------------------------------------------------------------------------------------------------------- look-ahead

@dataclass
class Lookahead:
    """All that is trained; the model is frozen. The paper's method is `embeddings` alone, the rest is optional.

    embeddings (L,D): what stands in the look-ahead columns.
    memory (layers,2,R,K,E): keys (as they enter attention, not rotated) and values that only look-ahead columns see.
    head_in (r,2D), head_out (D,r): the draft head. A look-ahead column does not know the token before the one it predicts, but when
    its draft is drawn that token is known. Its embedding e corrects the column's state h to h + head_out @ features(h, e).
    """
    embeddings: torch.Tensor
    memory: torch.Tensor | None = None
    head_in: torch.Tensor | None = None
    head_out: torch.Tensor | None = None
    folded: torch.Tensor | None = None  # made by `fit`

    def features(self, h, e):
        """h, e (...,D) -> (...,r)."""
        both = torch.cat([F.rms_norm(h, h.shape[-1:]), F.rms_norm(e, e.shape[-1:])], -1)
        return F.silu(F.linear(both, self.head_in))

    def to(self, model):
        """A copy in the model's dtype and on its device; gradients flow through it to the parts of this one."""
        return replace(self, **{name: part.to(model.embedding) for name, part in vars(self).items() if part is not None})

    def fit(self, model):
        """Make it ready, in place, for sampling from this model: its dtype, its device, and the head folded into the vocabulary,
        folded = W_out @ head_out (V,r), so that a draft needs no second product with W_out."""
        vars(self).update(vars(self.to(model)))
        if self.head_in is not None and self.folded is None:
            self.folded = model.logits(self.head_out.T).T.contiguous()
        return self


# -------------------------------------------------------------------------------------------------------- what methods share

class Run:
    """The state of one generation: cache, random numbers, and the rows' texts with their stops and statistics."""

    def __init__(self, model, prompts, params, lookahead, max_new_tokens, seed, on_token):
        length = lookahead.embeddings.shape[-2]
        context, longest = model.config.context, max(map(len, prompts))
        self.model, self.prompts, self.params, self.on_token = model, prompts, params, on_token
        self.lookahead, self.embeddings = lookahead, lookahead.embeddings.expand(len(prompts), -1, -1)
        self.device = model.embedding.device
        self.budget = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        self.limit = ["length" if max_new_tokens <= context - len(prompt) else "context" for prompt in prompts]
        self.cache = Cache(model, len(prompts), min(longest + max_new_tokens, context) + 1 + length, lookahead.memory)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.tokens = [[] for _ in prompts]
        self.from_draft = [[] for _ in prompts]  # per token: was it an accepted draft?
        self.stop_reason = [None] * len(prompts)
        self.alive = torch.ones(len(prompts), dtype=torch.long, device=self.device)
        self.passes, self.drafted, self.accepted = 0, [0] * length, [0] * length
        self.start, self.prefill_seconds = time.perf_counter(), None

    def uniform(self, n):
        """(B,n) uniforms in [0, 1): every row and every decision has its own."""
        return torch.rand(len(self.prompts), n, dtype=torch.float64, generator=self.generator, device=self.device)

    def probs(self, logits):
        return probs(logits, self.params)

    def forward(self, tokens, L=0):
        """Run tokens (B,T) and the first L look-ahead tokens after the text: next positions, causal. Returns (B,T+L,D)."""
        self.passes += 1
        x = torch.cat([self.model.embed(tokens), self.embeddings[:, :L]], 1)
        column = torch.arange(x.shape[1], device=self.device)
        return self.model(x, self.cache.length[:, None] + column, self.cache,
                          sees_memory=column >= tokens.shape[1] if L and self.cache.memory else None)

    def commit(self, count):
        self.cache.commit(count * self.alive)  # a finished row stays where it is, whatever the others do

    def emit(self, last, drafts=None, accepted=None):
        """Append to each living row its accepted drafts, drafts[:accepted] of (B,L), then `last` (B,), a token from the model.

        A row ends at a stop token wherever in the run it is, else at its budget of new tokens, else at the end of the context.
        Returns False when every row has ended.
        """
        last = last.tolist()
        drafts, accepted = (drafts.tolist(), accepted.tolist()) if drafts is not None else ([[]] * len(last), [0] * len(last))
        for row in (row for row, reason in enumerate(self.stop_reason) if reason is None):
            for i in range(len(drafts[row])):
                self.drafted[i] += 1
                self.accepted[i] += i < accepted[row]
            for i, token in enumerate(drafts[row][:accepted[row]] + last[row:row + 1]):
                self.tokens[row].append(token)
                self.from_draft[row].append(i < accepted[row])
                if self.on_token:
                    self.on_token(row, token, i < accepted[row])
                if token in self.model.config.stop_tokens:
                    self.stop_reason[row] = "stop"
                elif len(self.tokens[row]) == self.budget[row]:
                    self.stop_reason[row] = self.limit[row]
                if self.stop_reason[row]:
                    self.alive[row] = 0
                    break
        return None in self.stop_reason

    def useful_drafts(self):
        """L, or fewer at the end: a step of PaSS gives one token more before its drafts and one after them."""
        left = max(self.budget[row] - len(self.tokens[row]) for row, reason in enumerate(self.stop_reason) if reason is None)
        return max(0, min(self.embeddings.shape[1], left - 2))


PREFILL_BLOCK = 512  # columns; bounds the memory of the mask and of the activations, however long the prompt


def prefill(run, L=0):
    """Commit the prompts and carry the first group of L look-ahead tokens along. Returns the states (B,1+L,D) of each row's last
    prompt token and of its look-ahead tokens, as every later drafting pass does.

    Rows differ in length, so each is laid out [ prompt | look-ahead | padding ]: causality hides the padding.
    """
    model, cache, device = run.model, run.cache, run.device
    lengths = torch.tensor([len(prompt) for prompt in run.prompts], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in run.prompts], batch_first=True).to(device)
    early = (lengths - PREFILL_BLOCK).clamp(min=0)  # tokens that go before the last block, itself at most PREFILL_BLOCK + L

    def columns(width):
        positions = cache.length[:, None] + torch.arange(width, device=device)
        return tokens.gather(1, positions.clamp(max=tokens.shape[1] - 1)), positions

    while (cache.length < early).any():
        model(*columns(PREFILL_BLOCK), cache)
        cache.commit((early - cache.length).clamp(max=PREFILL_BLOCK))
    count = lengths - early
    x, positions = columns(int(count.max()) + L)
    x, rows = model.embed(x), torch.arange(len(lengths), device=device)[:, None]
    group = count[:, None] + torch.arange(L, device=device)  # (B,L), the columns of the look-ahead
    x[rows, group] = run.embeddings[:, :L]
    own = positions - cache.length[:, None] - count[:, None]  # 0 .. L-1 for the look-ahead
    h = model(x, positions, cache, sees_memory=(0 <= own) & (own < L) if L and cache.memory else None)
    h = h[rows, count[:, None] - 1 + torch.arange(1 + L, device=device)]
    cache.commit(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    run.passes, run.prefill_seconds = 1, time.perf_counter() - run.start
    return h


# --------------------------------------------------------------------------------------------------------------- the methods

def autoregressive(run):
    """One pass a token: what every method must equal in distribution, and beat in time."""
    h = prefill(run)
    while True:
        x = draw(run.probs(run.model.logits(h[:, 0])), run.uniform(1)[:, 0])
        if not run.emit(x):
            return
        h = run.forward(x[:, None])
        run.commit(1)


SHORTLIST = 1024  # tokens whose logits the draft head corrects; the others get q = 0, and the rule is told so


def draft(run, h, logits, x):
    """Draw d_1 .. d_L (B,L) from the states h (B,L,D) and logits (B,L,V) of the look-ahead tokens; also returns their q (B,L,V).

    x (B,) is the token before d_1. Without a draft head no draft depends on another and all are drawn at once; with one, each q
    is conditional on the draft before it, which is as exact, since the rule is given that q.
    """
    u, head = run.uniform(h.shape[1]), run.lookahead.folded
    if head is None or h.shape[1] == 0:
        q = run.probs(logits)
        return draw(q, u), q
    drafts, q = [x], []
    for j in range(h.shape[1]):
        best, ids = logits[:, j].topk(min(SHORTLIST, logits.shape[-1]))
        features = run.lookahead.features(h[:, j], run.model.embed(drafts[j]))
        best = best + (head[ids] @ features[:, :, None])[:, :, 0]
        q.append(run.probs(torch.full_like(logits[:, j], -math.inf).scatter(1, ids, best)))
        drafts.append(draw(q[j], u[:, j]))
    return torch.stack(drafts[1:], 1), torch.stack(q, 1)


def parallel(run):
    """PaSS (arXiv 2311.13581, section 3): two passes give 2 to L+2 tokens.

    Pass 1 runs [x_n, LA_1 .. LA_L]: x_n yields p for x_{n+1}, and LA_j, at the position of x_{n+j} without having seen it,
    yields q for draft d_j of x_{n+1+j}. Pass 2 runs [x_{n+1}, d_1 .. d_L] and yields the p that judge the drafts.
    """
    L = run.useful_drafts()
    h = prefill(run, L)
    while True:
        logits = run.model.logits(h)
        x = draw(run.probs(logits[:, 0]), run.uniform(1)[:, 0])
        if not run.emit(x):
            return
        drafts, q = draft(run, h[:, 1:], logits[:, 1:], x)
        p = run.probs(run.model.logits(run.forward(torch.cat([x[:, None], drafts], 1))))  # pass 2
        accepted, x = verify(p, q, drafts, run.uniform(1 + L))
        if not run.emit(x, drafts, accepted):
            return
        run.commit(1 + accepted)
        L = run.useful_drafts()
        h = run.forward(x[:, None], L)  # pass 1
        run.commit(1)


METHODS = {"autoregressive": autoregressive, "pass": parallel}


@torch.inference_mode()
def generate(model, prompts, method="pass", lookahead=None, params=Params(), max_new_tokens=128, seed=0, on_token=None):
    """Continue each of `prompts`, lists of token ids that may differ in length, by a method of METHODS.

    lookahead: a Lookahead; autoregressive needs none.  on_token(row, token, from_draft) is called for
    each token as it is made. The same seed, method, batch and machine give the same text.
    Returns a dict: method, tokens and from_draft (lists of lists), stop_reason ("stop", "length" or "context", per row),
    passes (forward passes, prefill being one), drafted (count), accepted_by_position (share of the drafts at each position that
    were accepted, each position after all before it), tokens_per_pass (per row), seconds (in all) and prefill_seconds.
    Raises InputError for an empty prompt, one that leaves no room in the context, and ids outside of the vocabulary.
    """
    config = model.config
    for prompt in prompts:
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if len(prompt) >= config.context:
            raise InputError(f"the prompt has {len(prompt)} tokens and the context {config.context}: shorten the prompt")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(f"the prompt has tokens from {min(prompt)} to {max(prompt)}, the model only 0 to "
                             f"{config.vocab_size - 1}: is this the model's own tokenizer?")
    if not prompts or max_new_tokens < 1:
        raise InputError("at least one prompt and one new token are needed")
    if lookahead is None and method != "autoregressive":
        raise InputError(f"method {method} needs a look-ahead")
    lookahead = (Lookahead(torch.zeros(0, config.dim)) if lookahead is None else lookahead).fit(model)
    run = Run(model, prompts, params, lookahead, max_new_tokens, seed, on_token)
    METHODS[method](run)
    drafted = [n for n in run.drafted if n]
    return {"method": method, "tokens": run.tokens, "from_draft": run.from_draft, "stop_reason": run.stop_reason,
            "passes": run.passes, "drafted": sum(drafted),
            "accepted_by_position": [round(a / n, 4) for a, n in zip(run.accepted, drafted)],
            "tokens_per_pass": round(sum(map(len, run.tokens)) / len(prompts) / run.passes, 4),
            "seconds": time.perf_counter() - run.start, "prefill_seconds": run.prefill_seconds}


# ---------------------------------------------------------------------------------------------------------- look-ahead files

def fingerprint(config):
    """Names the model that a look-ahead was trained for: a hash of what shapes it."""
    return hashlib.sha256(repr(replace(config, dtype="", stop_tokens=())).encode()).hexdigest()[:16]


def load_lookahead(spec, model, tokenizer, prompt, length=None):
    """The Lookahead that `spec` names.

    A safetensors file as train_lookahead.py writes: tensor `embeddings` (L,D), optionally `memory`, `head_in` and `head_out`;
    "unk", the embedding of the unknown token, the untrained baseline of the paper; or "mean", the mean embedding of the prompt
    (arXiv 2603.17942), without training too. length: L; None is all that the file has, or 4.
    Raises InputError where the file does not fit the model.
    """
    if length is not None and length < 1:
        raise InputError(f"length must be at least 1, not {length}; for none use --method autoregressive")
    c = model.config
    if spec == "mean":
        return Lookahead(model.embed(torch.tensor(prompt, device=model.embedding.device)).mean(0).repeat(length or 4, 1))
    if spec == "unk":
        if tokenizer.unk is None:
            raise InputError("this tokenizer has no unknown token; use --lookahead mean or a trained file")
        return Lookahead(model.embedding[tokenizer.unk].repeat(length or 4, 1))
    with open_tensors(spec) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        about = json.loads((file.metadata() or {}).get("lookahead", "{}"))
    if about.get("model", fingerprint(c)) != fingerprint(c):
        raise InputError(f"{spec} was trained for another model; train one for this model with train_lookahead.py")
    sizes = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in tensors.items()}
    rank, slots = sizes.get("head_in", 0), tensors["memory"].shape[2] if tensors.get("memory", torch.empty(0)).ndim == 5 else 0
    shapes = {"embeddings": (sizes.get("embeddings"), c.dim), "memory": (c.n_layers, 2, slots, c.n_kv_heads, c.head_dim),
              "head_in": (rank, 2 * c.dim), "head_out": (c.dim, rank)}
    if "embeddings" not in tensors or ("head_in" in tensors) != ("head_out" in tensors) or set(tensors) - set(shapes):
        raise InputError(f"{spec} is no look-ahead file: its tensors are {', '.join(tensors)}, not {', '.join(shapes)}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(f"{spec}: {name} must be finite floats of shape {shapes[name]}, not {tensor.dtype} "
                             f"{tuple(tensor.shape)}: damaged, or trained for another model?")
    if length is not None and length > len(tensors["embeddings"]):
        raise InputError(f"{spec} has {len(tensors['embeddings'])} look-ahead tokens, fewer than --length {length}")
    return Lookahead(tensors.pop("embeddings")[:length], **tensors)


# -------------------------------------------------------------------------------------------------------------- command line

def read_prompt(args):
    try:
        if args.stdin:
            text = sys.stdin.buffer.read().decode()
        else:
            text = args.prompt if args.prompt_file is None else args.prompt_file.read_bytes().decode()
        text.encode()  # a command line that is not UTF-8 fails here
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot read the prompt: {error}") from None
    if not text:
        raise InputError("the prompt is empty; give --prompt TEXT, --prompt-file FILE, or - for standard input")
    return text


def printer(tokenizer):
    """An on_token function that writes row 0 to stdout as it is made, accepted drafts in colour on a terminal."""
    to_text, colour = tokenizer.stream(), sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def on_token(row, token, from_draft):
        text = to_text(token) if row == 0 else ""
        if text:
            print(f"\033[32m{text}\033[0m" if colour and from_draft else text, end="", flush=True)
    return on_token


def summary(results):
    """One line of figures for the runs of one method; the acceptance is that of the first, the one that was shown."""
    tokens, seconds = sum(len(t) for r in results for t in r["tokens"]), sum(r["seconds"] for r in results)
    shares = " ".join(f"{share:.2f}" for share in results[0]["accepted_by_position"])
    drafts = f", accepted by position {shares}" if shares else ""
    return (f"{results[0]['method']}: {tokens} tokens, {sum(r['passes'] for r in results)} passes, "
            f"{statistics.mean(r['tokens_per_pass'] for r in results):.2f} tokens a pass{drafts}, {seconds:.2f} s "
            f"({sum(r['prefill_seconds'] for r in results):.2f} s of it prefill), {tokens / seconds:.1f} tokens/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json, model.safetensors and a tokenizer")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="def fibonacci(n):\n", help="text to continue (default: %(default)r)")
    source.add_argument("--prompt-file", type=Path, help="file whose text to continue")
    source.add_argument("stdin", nargs="?", choices=["-"], help="continue the text on standard input")
    add("--method", choices=METHODS, default="pass", help="default: %(default)s")
    add("--lookahead", default="mean", metavar="FILE|unk|mean", help="trained file, or untrained baseline (default: %(default)s)")
    add("--length", type=int, help="look-ahead tokens L (default: all of the file, or 4)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=0, help="0 is off (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="1 is off (default: %(default)s)")
    add("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    add("--samples", type=int, default=1, help="independent continuations, one batch (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--compare", action="store_true", help="run autoregressive too, interleaved, and print the ratio of their speeds")
    add("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    args = parser.parse_args()

    params, prompt = Params(args.temperature, args.top_k, args.top_p), read_prompt(args)
    if args.compare and args.method == "autoregressive":
        raise InputError("--compare sets a method against autoregressive; give another --method")
    if args.samples < 1:
        raise InputError(f"samples must be at least 1, not {args.samples}")
    model = Llama.load(args.model, DTYPES.get(args.dtype), device_named(args.device))
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    prompt = tokenizer.encode(prompt)
    if not prompt:
        raise InputError("the prompt has no tokens; give a longer one")
    lookahead = None
    if args.method != "autoregressive":
        lookahead = load_lookahead(args.lookahead, model, tokenizer, prompt, args.length)

    def once(method, seed, tokens=args.max_new_tokens, show=False):
        if show and args.compare:
            print(f"--- {method}", flush=True)
        result = generate(model, [prompt] * args.samples, method, lookahead, params, tokens, seed,
                          printer(tokenizer) if show else None)
        result["text"] = [tokenizer.decode(row) for row in result["tokens"]]
        del result["from_draft"]
        if show:
            print("".join(f"\n--- sample {i}\n{text}" for i, text in enumerate(result["text"]) if i))
        return result

    if not args.compare:
        result = once(args.method, args.seed, show=not args.json)
        if args.json:
            print(json.dumps(result))
        else:
            print(summary([result]), file=sys.stderr)
        return

    methods, rounds = ["autoregressive", args.method], 3
    for method in methods:
        once(method, args.seed, tokens=4)  # warm up
    results = {method: [] for method in methods}
    for seed in range(args.seed, args.seed + rounds):  # interleaved: what disturbs the machine meets both
        for method in methods:
            results[method].append(once(method, seed, show=seed == args.seed and not args.json))
    per_token = {m: [r["seconds"] / sum(map(len, r["tokens"])) for r in results[m]] for m in methods}
    ratio = statistics.median(a / b for a, b in zip(*per_token.values()))
    if args.json:
        print(json.dumps({m: results[m][0] for m in methods} | {"ratio": ratio}))
        return
    for method in methods:
        print(summary(results[method]), file=sys.stderr)
    print(f"{args.method} takes {1 / ratio:.2f} of the time per token: {ratio:.2f}x as fast (median of {rounds} interleaved runs)",
          file=sys.stderr)
    if args.temperature == 0:
        a, b = (results[m][0]["tokens"] for m in methods)
        print("greedy: both texts are the same" if a == b else "greedy: the texts differ; in "
              f"{str(model.embedding.dtype)[6:]} usually since two logits tie within the rounding: see --dtype float32", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
