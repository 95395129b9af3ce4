"""PaSS, parallel speculative sampling (Monea, Joulin, Grave 2023, arXiv 2311.13581), top to bottom.

    python pass_sampler.py --model demo/model --lookahead demo/model/lookahead.safetensors

x_1 .. x_n is the text so far, p the target's (the model's own) distribution of the next token, q
what a draft was drawn from. Shapes are as in model.py, L look-ahead tokens. First the rule that
makes drafts harmless (`verify`), then what is trained (`Lookahead`), then the methods as steps
(`autoregressive`, `parallel`), then the loop that they share (`Sampler`). Read model.py before,
train_lookahead.py after; beyond/ has what the paper lacks.
"""
import importlib
import inspect
import math
import time
import weakref
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

import files
from files import InputError
from model import Cache, load_model

# --------------------------------------- the rejection rule


@dataclass(frozen=True)
class Params:
    """Sampling parameters. To add one: a field, its range and message, a line in `probs`; for the
    proof the same argument and line in `probs` of tests/naive.py, and values in PARAMS and SETTINGS
    of tests/test_equivalence.py."""
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off

    def __post_init__(self):
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise InputError(f"temperature and top-k must be 0 or positive, top-p above 0 and at "
                             f"most 1, not {self}")


def probs(logits, params):
    """Logits (..,V) -> probabilities (..,V), in float32 or float64. It makes both p and q.

    Temperature; then top-k; then top-p, the fewest most likely tokens that together reach top_p
    (arXiv 1904.09751). What ties with the last token kept is kept. Temperature 0 gives a one-hot p:
    greedy decoding follows the same rule as all else.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if params.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    logits = logits - logits.amax(-1, keepdim=True)  # the largest is 0: no overflow
    logits = logits / max(params.temperature, 1e-30)
    if 0 < params.top_k < logits.shape[-1]:
        least = logits.topk(params.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    p = logits.softmax(-1)
    if params.top_p < 1:
        falling = p.sort(-1, descending=True).values
        before = falling.cumsum(-1) - falling  # what all more likely tokens have together
        least = falling.masked_fill(before >= params.top_p, 1).amin(-1, keepdim=True)
        p = p.masked_fill(p < least, 0)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p, u):
    """Inverse CDF: p (..,V) and uniforms u (..) -> tokens (..).

    The first token whose cumulative weight exceeds u times the total, so never one of weight 0.
    (Where a weight is NaN it is the last token, and `verify` rejects it.)
    """
    cdf = p.double().cumsum(-1)
    token = torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)[..., 0]
    return token.clamp(max=p.shape[-1] - 1)


def residual(p, q):
    """norm(max(0, p - q)) (..,V): what is left of p when a draft from q has been rejected."""
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    # If p = q but for rounding, a "rejection" is rounding too, and p is right.
    return torch.where(total > 0, rest / total, p)


def verify(p, q, drafts, u):
    """The rejection rule (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

    p (B,L+1,V): the target after 0 .. L drafts. q (B,L,V): what the drafts (B,L) were drawn from.
    u (B,L+1): independent uniforms in [0, 1); arguments, so that a test can integrate over them.
    Returns accepted (B,), how many drafts to keep, and the token (B,) that follows them.

    Accept draft d while u < p(d)/q(d); at the first rejection draw from norm(max(0, p - q)); after
    L acceptances draw from p. Why the output follows p, for one position: token x comes out as an
    accepted draft with probability q(x) min(1, p(x)/q(x)) = min(p(x), q(x)). A rejection has
    probability 1 - sum_y min(p(y), q(y)) = sum_y max(0, p(y) - q(y)), which is just what the
    residual is divided by, so x comes out after one with probability max(0, p(x) - q(x)).
    The sum is p(x), whatever q is. With a bad q only time is lost.
    """
    p_draft = p[:, :-1].gather(-1, drafts[..., None])[..., 0]  # (B,L)
    q_draft = q.gather(-1, drafts[..., None])[..., 0]
    accept = u[:, :-1] * q_draft < p_draft
    accepted = accept.long().cumprod(1).sum(1)  # those before the first rejection
    rows = torch.arange(len(p), device=p.device)
    p_last = p[rows, accepted]  # (B,V)
    q_last = F.pad(q, (0, 0, 0, 1))[rows, accepted]  # 0 after the last draft: the residual is p
    return accepted, draw(residual(p_last, q_last), u[:, -1])


# ----------------------------------------------- look-ahead

class Lookahead:
    """L look-ahead tokens. Their embeddings (L,D) are all that PaSS trains; the model is frozen."""

    memory = head_in = None  # what beyond/lookahead.py adds

    def __init__(self, embeddings, acceptance=()):
        """acceptance: what train_lookahead.evaluate measured, {temperature: table}."""
        self.embeddings = embeddings
        self.acceptance = dict(acceptance)

    def ready(self, model):
        """A copy to sample from this model: in its type, on its device."""
        return Lookahead(self.embeddings.to(model.embedding), self.acceptance)

    def forward(self, model, tokens, cache, positions=None, visible=None):
        """Run a block of tokens (B,T) and, after them, the look-ahead: (B,T+L,D).

        visible (C,C) is for a block of C columns: the tokens, then several groups of L.
        """
        T = tokens.shape[1]
        columns = T + len(self.embeddings) if visible is None else len(visible)
        groups = self.embeddings.repeat((columns - T) // len(self.embeddings), 1)
        x = torch.cat([model.embed(tokens), groups.expand(len(tokens), -1, -1)], 1)
        sees_memory = None
        if cache.memory_slots:
            sees_memory = torch.arange(columns, device=x.device) >= T
        return model(x, cache, positions, cache.mask(columns, visible, sees_memory))

    def draft(self, model, params, h, logits, x, u):
        """Drafts d_1 .. d_L (B,L) and the q (B,L,V) that each is drawn from.

        h (B,L,D), logits (B,L,V): of the look-ahead columns. x (B,1): the token before d_1.
        """
        q = probs(logits, params)
        return draw(q, u), q


# ---------------------------------------------- the methods

class Method(NamedTuple):
    """What a method's function returns.

    step(u), u (B,uniforms): before it the cache holds each row's text without the last token, which
    is s.x. It commits s.x and all new tokens but the last, and returns tokens (B,n) and how many of
    them count (B,). Its shapes are fixed, it does not wait for the device, and it writes in place
    what outlives it, so that a GPU can record it once and replay it.
    """
    step: Callable
    uniforms: int
    drafts: int = 0  # kept at most per step; those kept stand just before the last token
    passes: int = 1  # of the model, per step


def autoregressive(s):
    """Plain decoding, one pass per token: what every method must equal in distribution."""
    cache = s.new_cache(s.model, columns=1)

    def step(u):
        h = s.model(s.x, cache)  # (B,1,D)
        cache.commit(s.alive)
        x = draw(s.probs(s.model.logits(h)), u)
        return x, s.alive.new_ones(len(x))

    return Method(step, uniforms=1)


def parallel(s, lookahead):
    """PaSS (arXiv 2311.13581, section 3): two passes give 2 to L+2 tokens.

    Pass 1 runs [x_n, LA_1 .. LA_L]. x_n yields p of x_{n+1}. LA_j stands where x_{n+j} will, has
    not seen it, and guesses the token after it: it yields the q of d_j, a draft of x_{n+1+j}.
    Pass 2 runs [x_{n+1}, d_1 .. d_L] and yields the p that judge the drafts.
    """
    lookahead = lookahead.ready(s.model)
    L = len(lookahead.embeddings)
    cache = s.new_cache(s.model, 1 + L, lookahead.memory)

    def step(u):
        h = lookahead.forward(s.model, s.x, cache)  # pass 1: (B,1+L,D)
        cache.commit(s.alive)  # x_n, and none of the look-ahead
        logits = s.model.logits(h)
        x = draw(s.probs(logits[:, :1]), u[:, :1])  # (B,1): x_{n+1}
        drafts, q = lookahead.draft(
            s.model, s.params, h[:, 1:], logits[:, 1:], x, u[:, 1:1 + L])
        block = torch.cat([x, drafts], 1)
        p = s.probs(s.model.logits(s.model(block, cache)))  # pass 2: (B,1+L,V)
        accepted, last = verify(p, q, drafts, u[:, 1 + L:])
        kept = 1 + accepted  # x_{n+1} and the accepted drafts
        cache.commit(kept * s.alive)
        return ended_by(last, block, kept), 1 + kept

    return Method(step, uniforms=2 * L + 2, drafts=L, passes=2)


def ended_by(last, tokens, count):
    """(B,n+1): the first `count` (B,) of tokens (B,n), then last (B,), then what does not count."""
    return torch.cat([tokens, last[:, None]], 1).scatter_(1, count[:, None], last[:, None])


# A function of a Sampler and of options; or the module of beyond/ that has `method`.
METHODS = {
    "autoregressive": autoregressive,
    "pass": parallel,
    "fused": "beyond.fused",
    "tree": "beyond.tree",
    "draft-model": "beyond.draft_model",
}


def method_named(name):
    """The function of method `name`."""
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}, only {', '.join(METHODS)}")
    method = METHODS[name]
    return importlib.import_module(method).method if isinstance(method, str) else method


def options_of(name):
    """{option: inspect.Parameter} of a method."""
    options = dict(inspect.signature(method_named(name)).parameters)
    del options["s"]
    return options


# ------------------------------------------------- the loop

PREFILL = 2048  # columns per block of prefill, of all rows: bounds its memory


class Sampler:
    """Decodes by one method. Owns caches, buffers and random numbers, and serves many prompts.

    x (B,1): the last token of each row, not yet in the cache. alive (B,): 1, or 0 for a row that
    has ended, which commits nothing.
    """

    def __init__(self, model, method="pass", params=Params(), rows=1, context=math.inf,
                 graph=True, **options):
        """rows: prompts at once, at most. context: tokens of prompt and text (at most the model's;
        a GPU reads as many slots per step). graph: whether a GPU records the step."""
        files.check_options(method, options, options_of(method))
        device = model.embedding.device
        self.model, self.name, self.params, self.rows = model, method, params, rows
        self.context = min(context, model.config.context)
        self.caches = []
        self.buffers = []
        self.x = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.alive = torch.zeros(rows, dtype=torch.long, device=device)
        self.finite = torch.ones(rows, dtype=torch.bool, device=device)
        # Weakly: a cycle would keep the caches.
        self.method = method_named(method)(weakref.proxy(self), **options)
        self.u = torch.zeros(rows, self.method.uniforms, dtype=torch.float64, device=device)
        self.generator = torch.Generator(device)
        self.recorded = None
        self.result = None
        self.records = graph and device.type == "cuda"

    def new_cache(self, model, columns, memory=None):
        """A cache that `prefill` fills, with room for a step too many: no step must shrink."""
        cache = Cache(model, self.rows, self.context + 2 * columns)
        if memory is not None:
            cache = cache.with_memory(memory)
        self.caches.append((model, cache))
        return cache

    def zeros(self, *shape, dtype):
        """A buffer (B,*shape) for what a step leaves to the next; 0 before the first step."""
        self.buffers.append(self.x.new_zeros(self.rows, *shape, dtype=dtype))
        return self.buffers[-1]

    def probs(self, logits):
        """The target's p (B,T,V). Notes logits that are not finite, those of rejected drafts too.
        """
        self.finite &= logits.amax(-1).isfinite().all(1)
        return probs(logits, self.params)

    def prefill(self, prompts):
        """Commit each prompt but for its last token, which becomes x. Reset all else."""
        prompts = [*prompts, *[[0]] * (self.rows - len(prompts))]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.x.device)
        tokens = [torch.tensor(prompt) for prompt in prompts]
        tokens = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(self.x.device)
        self.x.copy_(tokens.gather(1, lengths[:, None] - 1))
        self.finite.fill_(True)
        for buffer in self.buffers:
            buffer.zero_()
        width = max(1, PREFILL // self.rows)
        for model, cache in self.caches:
            if self.result is not None:  # used: unseen slots weigh 0, but 0 * NaN is NaN
                cache.kv.nan_to_num_(0, 0, 0)
            cache.length.zero_()
            for start in range(0, tokens.shape[1] - 1, width):
                block = tokens[:, start:-1][:, :width]
                model(block, cache)  # padding stands after the text, which does not see it
                cache.commit((lengths - 1 - cache.length).clamp(max=block.shape[1]))

    def advance(self):
        """One step, and what the host must know of it: tokens | count | finite, (B,n+2)."""
        tokens, count = self.method.step(self.u)
        self.x.copy_(tokens.gather(1, count[:, None] - 1))
        return torch.cat([tokens, count[:, None], self.finite[:, None]], 1)

    def next_step(self):
        """`advance` with new uniforms. A GPU runs it once, records it as a CUDA graph, and replays
        that ever after."""
        self.u.uniform_(generator=self.generator)
        if self.records and self.result is not None and self.recorded is None:
            start = time.perf_counter()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, and runs nothing
                self.result = self.advance()
            self.recorded = graph
            self.capture_seconds = time.perf_counter() - start
        if self.recorded is not None:
            self.recorded.replay()
        else:
            self.result = self.advance()
        return self.result

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens=128, seed=0, on_token=None, stop_tokens=None):
        """Continue each of `prompts`, lists of token ids that may differ in length.

        on_token(row, token, from_draft) is called for each token as it is made. stop_tokens: ids
        that end a text (None: the model's). The same seed, rows and machine give the same text.
        Returns a dict: tokens and from_draft, lists per row; stop_reason per row ("stop", "length",
        "context"); passes, prefill apart; accepted_at_least, the share of steps that kept d_1,
        d_1 and d_2, ..; tokens_per_pass of a row; seconds, with prefill_ and capture_seconds.
        """
        c = self.model.config
        files.check_prompts(prompts, max_new_tokens, c, self.rows, self.context)
        start = time.perf_counter()
        steps = 0
        self.capture_seconds = 0.0
        stops = c.stop_tokens if stop_tokens is None else stop_tokens
        budget = [min(max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        texts = [[] for _ in prompts]
        from_draft = [[] for _ in prompts]
        ending = [None] * len(prompts)
        accepted = []  # drafts, per step and living row
        self.generator.manual_seed(seed)
        self.alive.copy_(torch.arange(self.rows) < len(prompts))
        self.prefill(prompts)
        if self.x.is_cuda:
            torch.cuda.synchronize()
        prefill_seconds = time.perf_counter() - start
        while None in ending:
            steps += 1
            result = self.next_step()[:len(prompts)].tolist()  # the one wait for the device
            for row, (*tokens, count, finite) in enumerate(result):
                if ending[row]:
                    continue
                if not finite:
                    raise InputError(f"the logits are not finite, in {self.model.precision}: try "
                                     f"--dtype float32, or no --lookahead")
                first = len(tokens) - 1 - self.method.drafts  # where d_1 stands in tokens
                accepted.append(count - 1 - first)
                for i, token in enumerate(tokens[:count]):
                    texts[row].append(token)
                    from_draft[row].append(first <= i < count - 1)
                    if on_token:
                        on_token(row, token, from_draft[row][-1])
                    if token in stops:
                        ending[row] = "stop"
                    elif len(texts[row]) == budget[row]:
                        ending[row] = "length" if budget[row] == max_new_tokens else "context"
                    if ending[row]:
                        self.alive[row] = 0
                        break
        passes = steps * self.method.passes
        kept = [sum(a > i for a in accepted) for i in range(self.method.drafts)]
        return {
            "method": self.name, "device": str(self.x.device), "passes": passes,
            "tokens": texts, "from_draft": from_draft, "stop_reason": ending,
            "accepted_at_least": [round(n / len(accepted), 4) for n in kept],
            "tokens_per_pass": round(sum(map(len, texts)) / len(texts) / passes, 4),
            "seconds": time.perf_counter() - start,
            "prefill_seconds": prefill_seconds, "capture_seconds": self.capture_seconds,
        }


def generate(model, prompts, method="pass", params=Params(), max_new_tokens=128, seed=0,
             on_token=None, graph=True, **options):
    """`Sampler.generate` of a Sampler that is used once."""
    files.check_prompts(prompts, max_new_tokens, model.config)
    context = max(map(len, prompts)) + max_new_tokens
    sampler = Sampler(model, method, params, len(prompts), context, graph, **options)
    return sampler.generate(prompts, max_new_tokens, seed, on_token)


# --------------------------------------------- command line

def load_lookahead(spec, model, length=None, tokenizer=None):
    """The Lookahead of a file; or untrained: "mean", of all tokens' embeddings, or "unk", the
    unknown token's. length: L (None: the file's, or 4)."""
    tensors, acceptance = files.read_lookahead(spec, model, length, tokenizer)
    if len(tensors) == 1:
        return Lookahead(**tensors, acceptance=acceptance)
    from beyond.lookahead import LookaheadPlus
    return LookaheadPlus(**tensors, acceptance=acceptance)


def method_options(args, model, tokenizer):
    """The options of args.method. An option that would have no effect is refused."""
    known = options_of(args.method)
    words = ("lookahead", "length", "tree", "draft_model")
    given = {name: getattr(args, name) for name in words if getattr(args, name) is not None}
    if "lookahead" in known:
        spec = given.get("lookahead", "mean")
        length = given.pop("length", None)
        given["lookahead"] = load_lookahead(spec, model, length, tokenizer)
    files.check_options(args.method, given, known)
    if args.draft_model:
        from beyond.draft_model import load_draft_model
        given["draft_model"] = load_draft_model(args.draft_model, model, tokenizer)
    return given


def main():
    parser = files.new_parser(__doc__)
    add = parser.add_argument
    files.add_common(add)
    files.add_prompt(parser)
    add("--method", choices=METHODS, default="pass", help="(default: pass)")
    add("--lookahead", metavar="FILE|unk|mean", help="trained; or untrained (mean)")
    add("--length", type=int, help="L, or drafts of the draft model")
    add("--tree", help="of method tree, such as \"0 1 00\"")
    add("--draft-model", type=Path, metavar="DIR", help="of method draft-model")
    for f in fields(Params):
        off = "greedy" if f.name == "temperature" else "off"
        add(f"--{f.name.replace('_', '-')}", type=f.type, default=f.default,
            help=f"(default: {f.default:g}, {off})")
    add("--max-new-tokens", type=int, default=128, help="(default: 128)")
    add("--samples", type=int, default=1, help="texts (default: 1)")
    add("--no-graph", action="store_true", help="record no CUDA graph")
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    params = Params(**{f.name: getattr(args, f.name) for f in fields(Params)})
    if params.temperature == 0 and params != Params():
        raise InputError("--top-k and --top-p need a --temperature above 0")
    text = files.read_prompt(args)
    files.check_seed(args.seed)
    files.check_number("samples", args.samples, 2**16)
    model, tokenizer = load_model(args)
    options = method_options(args, model, tokenizer)
    prompts = [tokenizer.encode(text)] * args.samples
    show = None if args.json else files.printer(tokenizer, text)
    result = generate(model, prompts, args.method, params, args.max_new_tokens, args.seed,
                      show, not args.no_graph, **options)
    files.report(result, tokenizer, args.json)


if __name__ == "__main__":
    from pass_sampler import main  # one of it: beyond/ imports it too
    files.run_script(main)
