"""PaSS, parallel speculative sampling (Monea, Joulin, Grave 2023, arXiv 2311.13581), top to bottom.

    python pass_sampler.py --model DIR --prompt "def fibonacci(n):" --compare

In equations p is the target's next-token distribution (the model's own) and q the draft's; x_1..x_n is the text so far.
Shapes: B batch rows, T block columns, V vocabulary, L look-ahead tokens, D width.
Read `probs`, `draw`, `verify` (the rule that makes drafts harmless), then the loops `autoregressive` and `parallel`.
Start with model.py, where block, cache and commit are explained.
"""
import argparse
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from model import DTYPES, Cache, InputError, Llama, device_named, load_tokenizer, open_tensors, run

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
    logits = (logits - logits.amax(-1, keepdim=True)) / params.temperature  # the maximum is 0: no overflow near 0
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


# -------------------------------------------------------------------------------------------------------- what methods share

class Run:
    """The state of one generation: cache, random numbers, and the rows' texts with their stops and statistics."""

    def __init__(self, model, prompts, params, length, max_new_tokens, seed, on_token):
        context, longest = model.config.context, max(map(len, prompts))
        self.model, self.prompts, self.params, self.on_token = model, prompts, params, on_token
        self.device = model.embedding.device
        self.budget = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        self.limit = ["length" if max_new_tokens <= context - len(prompt) else "context" for prompt in prompts]
        self.cache = Cache(model, len(prompts), min(longest + max_new_tokens, context) + 1 + length)
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

    def probs(self, h):
        return probs(self.model.logits(h), self.params)

    def forward(self, x):
        """A chain: the columns stand at the next positions and see one another causally."""
        self.passes += 1
        positions = self.cache.length[:, None] + torch.arange(x.shape[1], device=self.device)
        return self.model(x, positions, self.cache)

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

    def remaining(self):
        """The most tokens that a living row may still get: drafting beyond it would be wasted."""
        return max(self.budget[row] - len(self.tokens[row]) for row, reason in enumerate(self.stop_reason) if reason is None)


PREFILL_BLOCK = 512  # columns; bounds the memory of the mask and of the activations, however long the prompt


def prefill(run, lookahead):
    """Commit the prompts and carry the first look-ahead group (B,L,D) along. Returns the states (B,1+L,D) of each row's last
    prompt token and of its look-ahead tokens, as every later drafting pass does.

    Rows differ in length, so each is laid out [ prompt | look-ahead | padding ]: causality hides the padding.
    """
    model, cache, L, device = run.model, run.cache, lookahead.shape[1], run.device
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
    x[rows, count[:, None] + torch.arange(L, device=device)] = lookahead
    h = model(x, positions, cache)[rows, count[:, None] - 1 + torch.arange(1 + L, device=device)]
    cache.commit(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    run.passes, run.prefill_seconds = 1, time.perf_counter() - run.start
    return h


# --------------------------------------------------------------------------------------------------------------- the methods

def autoregressive(run, lookahead):
    """One pass a token: what every method must equal in distribution, and beat in time."""
    h = prefill(run, lookahead[:, :0])
    while True:
        x = draw(run.probs(h[:, 0]), run.uniform(1)[:, 0])
        if not run.emit(x):
            return
        h = run.forward(x[:, None])
        run.commit(1)


def parallel(run, lookahead):
    """PaSS (arXiv 2311.13581, section 3): two passes give 2 to L+2 tokens.

    Pass 1 runs [x_n, LA_1 .. LA_L]: x_n yields p for x_{n+1}, and LA_j, at the position of x_{n+j} without having seen it,
    yields q for draft d_j of x_{n+1+j}. Pass 2 runs [x_{n+1}, d_1 .. d_L] and yields the p that judge the drafts.
    """
    L = max(0, min(lookahead.shape[1], run.remaining() - 2))
    h = prefill(run, lookahead[:, :L])
    while True:
        p = run.probs(h)
        tokens, q = draw(p, run.uniform(1 + L)), p[:, 1:]
        x, drafts = tokens[:, 0], tokens[:, 1:]
        if not run.emit(x):
            return
        p = run.probs(run.forward(tokens))  # pass 2
        accepted, x = verify(p, q, drafts, run.uniform(1 + L))
        run.commit(1 + accepted)
        if not run.emit(x, drafts, accepted):
            return
        L = max(0, min(lookahead.shape[1], run.remaining() - 2))  # the last tokens of a text need fewer columns
        h = run.forward(torch.cat([run.model.embed(x[:, None]), lookahead[:, :L]], 1))  # pass 1
        run.commit(1)


METHODS = {"autoregressive": autoregressive, "pass": parallel}


@torch.inference_mode()
def generate(model, prompts, method="pass", lookahead=None, params=Params(), max_new_tokens=128, seed=0, on_token=None):
    """Continue each of `prompts`, lists of token ids that may differ in length, by a method of METHODS.

    lookahead: (L,D), or (B,L,D) for one per row; None for autoregressive.  on_token(row, token, from_draft) is called for
    each token as it is made. The same seed, method, batch and machine give the same text.
    Returns a dict: method, tokens and from_draft (lists of lists), stop_reason ("stop", "length" or "context", per row),
    passes (forward passes, prefill being one), drafted (count), accepted_by_position (share of the drafts at each position that
    were accepted, each position after all before it), tokens_per_pass (per row), seconds (in all) and prefill_seconds.
    Raises InputError for an empty prompt, one that leaves no room in the context, and ids outside of the vocabulary.
    """
    config, device = model.config, model.embedding.device
    for prompt in prompts:
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if len(prompt) >= config.context:
            raise InputError(f"the prompt has {len(prompt)} tokens and the context {config.context}: shorten the prompt")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(f"the prompt has token {max(prompt)}, the model a vocabulary of {config.vocab_size}: "
                             "is this the model's own tokenizer?")
    if not prompts or max_new_tokens < 1:
        raise InputError("at least one prompt and one new token are needed")
    if lookahead is None and method != "autoregressive":
        raise InputError(f"method {method} needs a look-ahead")
    if lookahead is None:
        lookahead = torch.zeros(0, config.dim)
    lookahead = lookahead.to(device, model.embedding.dtype).expand(len(prompts), -1, -1)
    run = Run(model, prompts, params, lookahead.shape[1], max_new_tokens, seed, on_token)
    METHODS[method](run, lookahead)
    drafted = [n for n in run.drafted if n]
    return {"method": method, "tokens": run.tokens, "from_draft": run.from_draft, "stop_reason": run.stop_reason,
            "passes": run.passes, "drafted": sum(drafted),
            "accepted_by_position": [round(a / n, 4) for a, n in zip(run.accepted, drafted)],
            "tokens_per_pass": round(sum(map(len, run.tokens)) / len(prompts) / run.passes, 4),
            "seconds": time.perf_counter() - run.start, "prefill_seconds": run.prefill_seconds}


# ---------------------------------------------------------------------------------------------------------------- look-ahead

def load_lookahead(spec, model, tokenizer, prompt, length=None):
    """The look-ahead embeddings (L,D) that `spec` names.

    A safetensors file with a tensor `embeddings` (L,D), as train_lookahead.py writes; "unk", the embedding of the unknown token,
    the untrained baseline of the paper; or "mean", the mean embedding of the prompt (arXiv 2603.17942), without training too.
    length: L; None is all that the file has, or 4. Raises InputError where the file does not fit.
    """
    if length is not None and length < 1:
        raise InputError(f"length must be at least 1, not {length}; for none use --method autoregressive")
    if spec == "mean":
        return model.embed(torch.tensor(prompt, device=model.embedding.device)).mean(0).expand(length or 4, -1)
    if spec == "unk":
        if tokenizer.unk is None:
            raise InputError("this tokenizer has no unknown token; use --lookahead mean or a trained file")
        return model.embedding[tokenizer.unk].expand(length or 4, -1)
    with open_tensors(spec) as file:
        if list(file.keys()) != ["embeddings"]:
            raise InputError(f"{spec} is no look-ahead file: it has the tensors {', '.join(file.keys())}, not embeddings")
        embeddings = file.get_tensor("embeddings")
    if embeddings.ndim != 2 or embeddings.shape[1] != model.config.dim or not embeddings.is_floating_point():
        raise InputError(f"{spec}: embeddings are {list(embeddings.shape)}, this model needs (L, {model.config.dim}): "
                         "trained for another model?")
    if not embeddings.isfinite().all():
        raise InputError(f"{spec}: the embeddings are not finite numbers; train them again")
    if length is not None and length > len(embeddings):
        raise InputError(f"{spec} has {len(embeddings)} look-ahead tokens, fewer than --length {length}")
    return embeddings[:length]


# -------------------------------------------------------------------------------------------------------------- command line

def read_prompt(args):
    try:
        if args.stdin:
            text = sys.stdin.buffer.read().decode()
        else:
            text = args.prompt if args.prompt_file is None else args.prompt_file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
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
    """One line of figures for the runs of one method."""
    tokens, seconds = sum(len(t) for r in results for t in r["tokens"]), sum(r["seconds"] for r in results)
    drafts = f", accepted by position {' '.join(f'{a:.2f}' for a in results[0]['accepted_by_position'])}" * bool(results[0]["drafted"])
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
    if args.samples < 1:
        raise InputError(f"samples must be at least 1, not {args.samples}")
    model = Llama.load(args.model, DTYPES.get(args.dtype), device_named(args.device))
    tokenizer = load_tokenizer(args.model)
    if len(tokenizer.pieces) > model.config.vocab_size:
        raise InputError(f"the tokenizer has {len(tokenizer.pieces)} pieces and the model a vocabulary of "
                         f"{model.config.vocab_size}: they do not belong together")
    prompt = tokenizer.encode(prompt)
    lookahead = None
    if args.method != "autoregressive":
        lookahead = load_lookahead(args.lookahead, model, tokenizer, prompt, args.length)

    def once(method, seed, tokens=args.max_new_tokens, show=False):
        if show and args.compare:
            print(f"--- {method}", flush=True)
        result = generate(model, [prompt] * args.samples, method, lookahead, params, tokens, seed,
                          printer(tokenizer) if show else None)
        result["text"] = [tokenizer.decode(row) for row in result["tokens"]]
        if show:
            print("".join(f"\n--- sample {i}\n{text}" for i, text in enumerate(result["text"]) if i))
        return result

    if not args.compare:
        result = once(args.method, args.seed, show=not args.json)
        if args.json:
            print(json.dumps({key: value for key, value in result.items() if key != "from_draft"}))
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
        print(json.dumps({m: {k: v for k, v in results[m][0].items() if k != "from_draft"} for m in methods} | {"ratio": ratio}))
        return
    for method in methods:
        print(summary(results[method]), file=sys.stderr)
    print(f"{args.method} takes {1 / ratio:.2f} of the time per token: {ratio:.2f}x as fast (median of {rounds} interleaved runs)",
          file=sys.stderr)
    if args.temperature == 0:
        a, b = (results[m][0]["tokens"] for m in methods)
        print("greedy: both texts are the same" if a == b else "greedy: the texts differ where two logits tie within the rounding of "
              f"{model.embedding.dtype}; with --dtype float32 they do not", file=sys.stderr)


if __name__ == "__main__":
    run(main)
