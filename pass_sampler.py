"""PaSS, parallel speculative sampling (Monea, Joulin, Grave 2023, arXiv 2311.13581), top to bottom.

    python pass_sampler.py --model demo/model --lookahead demo/model/lookahead.safetensors

x_1 .. x_n is the text so far, p the target's (the model's own) distribution of the next token, q
the distribution that a draft was drawn from. Shapes are as in model.py, and L look-ahead tokens.
First comes the rule that makes drafts harmless (`verify`), then what is trained (`Lookahead`), then
the two methods as steps (`autoregressive`, `parallel`), then the loop that they share (`Sampler`).
Read model.py before, and train_lookahead.py after.
"""
import support

support.ctrl_c_leaves(__name__)
import inspect
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from model import Cache, Config, Llama, at_least_float32, load_model
from support import terminal
from support.chat import encode_prompt
from support.checkpoint import read_lookahead
from support.errors import InputError, check_number, check_options, check_seed, run_script
from support.graph import Replay
from support.methods import (
    Method,
    add_beyond,
    add_flags,
    given_flags,
    method_named,
    method_options,
)
from support.prompts import add_prompt, check_prompts, checked_stop_tokens, read_prompt
from support.text import figures, new_texts, rows_of
from support.tokenizer import Tokenizer

# --------------------------------------- the rejection rule


@dataclass(frozen=True)
class Params:
    """Sampling parameters; the command line has a flag for each. To add one: a field with its range
    here, and a line in `probs`. For the proof: the same line in `probs` of tests/naive.py, and in
    SETTINGS of tests/test_equivalence.py values that drop some tokens of a few, but not all but
    one. Then plant a bug in tests/mutants.py and run all: a new line that repeats an old one makes
    an old bug's diff fit twice."""
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off

    def __post_init__(self):
        kinds = {float: Real, int: Integral}
        if not (all(isinstance(getattr(self, f.name), kinds[f.type]) for f in fields(self))
                and 0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise InputError(f"temperature and top-k must be 0 or positive, top-p above 0 and at "
                             f"most 1, not {self}")


def probs(logits: Tensor, params: Params) -> Tensor:
    """Logits (..,V) -> probabilities (..,V), in float32 or float64. It makes both p and q.

    Temperature; then top-k; then top-p, the fewest most likely tokens that together reach top_p
    (arXiv 1904.09751). What ties with the last token kept is kept. Temperature 0 gives a one-hot p:
    greedy decoding follows the same rule as all else.
    """
    logits = at_least_float32(logits)
    if params.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    logits = logits / max(params.temperature, 1e-20)  # A smaller one could overflow.
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


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: p (..,V) and uniforms u (..) -> tokens (..).

    The first token whose cumulative weight exceeds u times the total, so never one of weight 0.
    Where a weight is NaN it gives the last token; `verify` rejects such a draft.
    """
    cdf = p.cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)[..., 0]
    return token.clamp(max=p.shape[-1] - 1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(0, p - q)) (..,V): what is left of p when a draft from q has been rejected."""
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    # Where p = q there are no rejections; if rounding makes one, nothing is left, and p is right.
    return torch.where(total > 0, rest / total, p)


def verify(p: Tensor, q: Tensor, drafts: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The rejection rule (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

    p (B,L+1,V): the target after 0 .. L drafts. q (B,L,V): what the drafts (B,L) were drawn from.
    u (B,L+1): independent uniforms in [0, 1); an argument, so that a test can integrate over them.
    Returns accepted (B,), how many drafts to keep, and the token (B,) that follows them.

    Accept draft d while u < p(d)/q(d); at the first rejection draw from norm(max(0, p - q)); after
    L acceptances draw from p. Why the output follows p, for one position: token x comes out as an
    accepted draft with probability q(x) min(1, p(x)/q(x)) = min(p(x), q(x)). A rejection has
    probability 1 - sum_y min(p(y), q(y)) = sum_y max(0, p(y) - q(y)), which is just what the
    residual is divided by, so x comes out after one with probability max(0, p(x) - q(x)).
    The sum is p(x), whatever q is: with a bad q only time is lost. So it is at every position,
    given the tokens before it, since each p is that after the drafts kept.
    """
    L = drafts.shape[1]
    p_draft = p[:, :-1].gather(2, drafts[..., None])[..., 0]  # (B,L)
    q_draft = q.gather(2, drafts[..., None])[..., 0]
    u_accept, u_last = u.split([L, 1], 1)
    accept = u_accept * q_draft < p_draft  # u < p/q, without a division by 0
    accepted = accept.cumprod(1).sum(1)  # those before the first rejection
    rows = torch.arange(len(p), device=p.device)
    p_last = p[rows, accepted]  # (B,V)
    q_last = q[rows, accepted.clamp(max=L - 1)]
    q_last = q_last * (accepted < L)[:, None]  # Where all were accepted, 0: the residual is p.
    return accepted, draw(residual(p_last, q_last), u_last[:, 0])


# ----------------------------------------------- look-ahead

class Lookahead:
    """L look-ahead tokens. Their embeddings (L,D) are all that PaSS trains; the model is frozen."""

    def __init__(self, embeddings: Tensor, acceptance: dict | None = None):
        """acceptance: what train_lookahead.evaluate measured, {temperature: table}."""
        self.embeddings = embeddings
        self.acceptance = acceptance or {}

    @staticmethod
    def shapes(config: Config) -> dict[str, tuple]:
        """{name: shape} of the tensors in a file; a size of None may be any."""
        return {"embeddings": (None, config.dim)}

    def ready(self, model: Llama) -> "Lookahead":
        """A copy to sample from this model: in its type, on its device."""
        return Lookahead(self.embeddings.to(model.embedding), self.acceptance)

    def new_cache(self, model: Llama, rows: int, slots: int) -> Cache:
        """A cache for a text and this look-ahead."""
        return Cache(model, rows, slots)

    def forward(self, model: Llama, tokens: Tensor, cache: Cache) -> Tensor:
        """Run a block of tokens (B,T) and, after them, the look-ahead: (B,T+L,D)."""
        embeddings = self.embeddings.expand(len(tokens), -1, -1)
        return model(torch.cat([model.embed(tokens), embeddings], 1), cache)

    def draft(self, params: Params, h: Tensor, logits: Tensor, x: Tensor, u: Tensor
              ) -> tuple[Tensor, Tensor]:
        """Drafts d_1 .. d_L (B,L) and the q (B,L,V) that each is drawn from.

        h (B,L,D), logits (B,L,V): of the look-ahead columns. x (B,1): the token before d_1.
        """
        q = probs(logits, params)
        return draw(q, u), q

    def training_states(self, model: Llama, x: Tensor, cache: Cache, positions: Tensor,
                        mask: Tensor, before: Tensor) -> Tensor:
        """States (B,N,D) of look-ahead columns x (B,N,D) as train_lookahead.py lays them out.

        before (B,N): the token before the one that each guesses, for look-aheads that use it.
        """
        return model(x, cache, positions, mask)


LOOKAHEADS = [Lookahead]  # The kinds there are. beyond/ adds one that has more to train.


def lookahead_of(tensors: dict[str, Tensor], acceptance: dict | None = None) -> Lookahead:
    """The look-ahead, of the first kind that has all of these tensors; there must be one."""
    kinds = (kind for kind in LOOKAHEADS if set(tensors) <= {*inspect.signature(kind).parameters})
    return next(kinds)(**tensors, acceptance=acceptance)


def load_lookahead(spec: str, model: Llama, length: int | None = None,
                   tokenizer: Tokenizer | None = None) -> Lookahead:
    """The look-ahead in a file; or an untrained one: "mean" of all tokens' embeddings, or "unk",
    the unknown token's. length: L (None: the file's, or 4)."""
    if length is not None:
        check_number("length", length, 64)
    if spec == "mean":
        return Lookahead(model.embedding.mean(0).repeat(length or 4, 1))
    if spec == "unk":
        if tokenizer is None or tokenizer.unk is None:
            raise InputError("unk needs a tokenizer that has an unknown token; use mean, or a "
                             "trained file")
        return Lookahead(model.embedding[tokenizer.unk].repeat(length or 4, 1))
    return lookahead_of(*lookahead_tensors(spec, model, length))


def lookahead_tensors(path: str, model: Llama, length: int | None = None) -> tuple[dict, dict]:
    """{name: tensor} and the acceptance of a look-ahead file for this model."""
    shapes = {}
    for kind in LOOKAHEADS:
        shapes |= kind.shapes(model.config)
    return read_lookahead(path, model.config, shapes, length)


# ---------------------------------------------- the methods

class Made(NamedTuple):
    """What a step made, per row. The text grows by block[:count], and then by last."""
    block: Tensor  # (B,n): tokens for the next places; the drafts stand at the end
    count: Tensor  # (B,): how many of them are kept
    last: Tensor  # (B,): the token that was drawn last; it is x of the next step


class Step(NamedTuple):
    """What the function of a method returns.

    run(u), u (B,uniforms) in [0, 1): before it the cache holds each row's text without the last
    token, which is s.x. It commits s.x and all new tokens but the last. Its shapes are fixed, it
    does not wait for the device, and what the next step needs it writes into tensors that are
    there. So a GPU can record it once and replay it.
    """
    run: Callable[[Tensor], Made]
    uniforms: int
    drafts: int = 0  # that a step may accept; they stand at the end of `Made.block`
    passes: int = 1  # of the model


def autoregressive(s: "Sampler") -> Step:
    """Plain decoding, one pass per token: what every method must equal in distribution."""
    cache = s.new_cache(s.model, columns=1)
    nothing = torch.zeros_like(s.alive)

    def run(u):
        h = s.model(s.x, cache)  # (B,1,D)
        cache.commit(s.alive)
        x = draw(s.target_probs(s.model.logits(h)), u)  # (B,1)
        return Made(x[:, :0], nothing, x[:, 0])

    return Step(run, uniforms=1)


def parallel(s: "Sampler", lookahead: Lookahead) -> Step:
    """PaSS (arXiv 2311.13581, section 3): two passes give 2 to L+2 tokens.

    Pass 1 runs [x_n, LA_1 .. LA_L]. x_n yields p of x_{n+1}. LA_j stands where x_{n+j} will, has
    not seen it, and guesses the token after it: it yields the q of d_j, a draft of x_{n+1+j}.
    Pass 2 runs [x_{n+1}, d_1 .. d_L] and yields the p that judge the drafts.
    """
    lookahead = lookahead.ready(s.model)
    L = len(lookahead.embeddings)
    cache = s.new_cache(s.model, 1 + L, lookahead.new_cache)

    def run(u):
        u_next, u_draft, u_verify = u.split([1, L, L + 1], 1)
        h = lookahead.forward(s.model, s.x, cache)  # pass 1: (B,1+L,D)
        cache.commit(s.alive)  # x_n, and none of the look-ahead
        logits = s.model.logits(h)
        x = draw(s.target_probs(logits[:, :1]), u_next)  # (B,1): x_{n+1}
        drafts, q = lookahead.draft(s.params, h[:, 1:], logits[:, 1:], x, u_draft)
        block = torch.cat([x, drafts], 1)
        p = s.target_probs(s.model.logits(s.model(block, cache)))  # pass 2: (B,1+L,V)
        accepted, last = verify(p, q, drafts, u_verify)
        count = 1 + accepted  # x_{n+1} and the accepted drafts
        cache.commit(count * s.alive)
        return Made(block, count, last)

    return Step(run, uniforms=2 * L + 2, drafts=L, passes=2)


LOOKAHEAD_FLAGS = {
    "lookahead": dict(metavar="FILE|unk|mean", help="trained; or untrained (mean)"),
    "length": dict(type=int, metavar="L", help="drafts: the first L look-ahead tokens of the file"),
}


def lookahead_options(model: Llama, tokenizer: Tokenizer, lookahead: str = "mean",
                      length: int | None = None, **given) -> dict:
    """The options of a method that has a look-ahead."""
    return {"lookahead": load_lookahead(lookahead, model, length, tokenizer), **given}


METHODS = {
    "autoregressive": Method(autoregressive),
    "pass": Method(parallel, LOOKAHEAD_FLAGS, lookahead_options),
}


# ------------------------------------------------- the loop

PREFILL = 2048  # columns per block of prefill, of all rows: bounds its memory


class Sampler:
    """Decodes by one method. Owns caches, buffers and random numbers, and serves many prompts.

    x (B,1): the last token of each row, not yet in the cache. alive (B,): 1, or 0 for a row that
    has ended, which commits nothing.
    """

    def __init__(self, model: Llama, method: str = "pass", params: Params = Params(),
                 rows: int = 1, context: float = math.inf, graph: bool = True, **options):
        """rows: prompts at once, at most. context: tokens of prompt and text (at most the model's;
        a GPU reads as many slots per step). graph: whether a GPU records the step."""
        make = method_named(METHODS, method).step
        known = dict(inspect.signature(make).parameters)
        del known["s"]
        needed = [name for name, option in known.items() if option.default is option.empty]
        check_options(method, options, [*known], needed)
        check_number("rows", rows, 2**16)
        if context != math.inf:
            check_number("context", context, math.inf)
        device = model.embedding.device
        self.model, self.name, self.params, self.rows = model, method, params, rows
        self.context = min(context, model.config.context)
        self.caches = []
        self.buffers = []
        self.x = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.alive = torch.zeros(rows, dtype=torch.long, device=device)
        self.overflow = torch.zeros(rows, device=device)  # NaN once a logit is not finite
        # A weak reference: with a strong one, sampler and step would hold each other, and the
        # caches would stay in memory until the garbage collector runs.
        self.step = make(weakref.proxy(self), **options)
        self.u = torch.zeros(rows, self.step.uniforms, dtype=torch.float64, device=device)
        self.generator = torch.Generator(device)
        self.replay = Replay(graph and device.type == "cuda")

    def new_cache(self, model: Llama, columns: int, make: Callable[..., Cache] = Cache) -> Cache:
        """A cache for blocks of so many columns, which `prefill` fills.

        It has room for two blocks more than the text: the last step of a text may commit more than
        the text needs, and a row that has ended runs blocks as long as others go on. So no step
        has other shapes, which a CUDA graph requires.
        """
        cache = make(model, self.rows, self.context + 2 * columns)
        self.caches.append((model, cache, columns))
        return cache

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A buffer (B,*shape) for what a step leaves to the next; 0 before the first step."""
        self.buffers.append(self.x.new_zeros(self.rows, *shape, dtype=dtype))
        return self.buffers[-1]

    def target_probs(self, logits: Tensor) -> Tensor:
        """The target's p (B,T,V) of its logits. If one of these is not finite, their sum is not
        either, and 0 times the sum makes `overflow` NaN for good."""
        logits = at_least_float32(logits)
        self.overflow.add_(logits.sum((1, 2)), alpha=0)
        return probs(logits, self.params)

    def prefill(self, prompts: list[list[int]]) -> None:
        """Commit each prompt but for its last token, which becomes x. Reset all else."""
        prompts = [*prompts, *[[0]] * (self.rows - len(prompts))]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.x.device)
        tokens = [torch.tensor(prompt) for prompt in prompts]
        tokens = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(self.x.device)
        self.x.copy_(tokens.gather(1, lengths[:, None] - 1))
        self.overflow.zero_()
        for buffer in self.buffers:
            buffer.zero_()
        width = max(1, PREFILL // self.rows)
        for model, cache, columns in self.caches:
            cache.clear(columns)
            for start in range(0, tokens.shape[1] - 1, width):
                block = tokens[:, start:-1][:, :width]
                model(block, cache)  # Padding stands after the text, which does not see it.
                cache.commit((lengths - 1 - cache.length).clamp(max=block.shape[1]))

    def advance(self) -> Tensor:
        """One step. Returns what the host must know of it in one tensor (B,n+3), for `rows_of`."""
        block, count, last = self.step.run(self.u)
        self.x.copy_(last[:, None])
        finite = self.overflow == 0
        return torch.cat([block, last[:, None], count[:, None], finite[:, None]], 1)

    def next_step(self) -> Tensor:
        """`advance` with new uniforms. A GPU records it as a CUDA graph, and replays that."""
        self.u.uniform_(generator=self.generator)
        return self.replay(self.advance)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int = 128, seed: int = 0,
                 on_token: Callable[[int, int, bool], object] | None = None,
                 stop_tokens: list[int] | None = None) -> dict:
        """Continue each of `prompts`, lists of token ids that may differ in length.

        on_token(row, token, from_draft) is called for each token as it is made. stop_tokens: ids
        that end a text (None: the model's). The same seed, rows and machine give the same text.
        Returns a dict: the `figures` of support/text.py, and seconds, of them prefill_seconds and
        capture_seconds (to record a graph).
        """
        start = time.perf_counter()
        config = self.model.config
        prompts = check_prompts(
            prompts, max_new_tokens, config.vocab_size, self.context, self.rows)
        check_seed(seed)
        stops = config.stop_tokens
        if stop_tokens is not None:
            stops = checked_stop_tokens(stop_tokens, config.vocab_size)
        texts = new_texts(prompts, max_new_tokens, self.context)
        self.replay.capture_seconds = 0.0
        self.generator.manual_seed(seed)
        self.alive.copy_(torch.arange(self.rows) < len(prompts))
        self.prefill(prompts)
        if self.x.is_cuda:
            torch.cuda.synchronize()
        prefill_seconds = time.perf_counter() - start
        while not all(text.ending for text in texts):
            made = rows_of(self.next_step(), self.step.drafts)  # the one wait for the device
            for row, (text, new) in enumerate(zip(texts, made)):
                if text.ending:
                    continue
                if not new.finite:
                    raise InputError(f"the logits are not finite, in {self.model.precision}: try "
                                     f"--dtype float32, or no --lookahead")
                for token, from_draft in text.grow(new, stops):
                    if on_token:
                        on_token(row, token, from_draft)
                if text.ending:
                    self.alive[row] = 0
        return figures(texts, self.step.drafts, self.step.passes) | {
            "method": self.name, "device": str(self.x.device),
            "seconds": time.perf_counter() - start, "prefill_seconds": prefill_seconds,
            "capture_seconds": self.replay.capture_seconds}


def generate(model: Llama, prompts: list[list[int]], method: str = "pass",
             params: Params = Params(), max_new_tokens: int = 128, seed: int = 0,
             on_token: Callable[[int, int, bool], object] | None = None,
             stop_tokens: list[int] | None = None, graph: bool = True, **options) -> dict:
    """`Sampler.generate` of a Sampler that is used once."""
    config = model.config
    prompts = check_prompts(prompts, max_new_tokens, config.vocab_size, config.context)
    context = max(map(len, prompts)) + max_new_tokens
    sampler = Sampler(model, method, params, len(prompts), context, graph, **options)
    return sampler.generate(prompts, max_new_tokens, seed, on_token, stop_tokens)


# --------------------------------------------- command line

def main() -> None:
    add_beyond()
    parser = terminal.new_parser(__doc__)
    add = parser.add_argument
    terminal.add_common(add)
    add_prompt(parser)
    add("--method", choices=METHODS, default="pass", help="(default: pass)")
    add_flags(add, METHODS)
    terminal.add_params(add, Params)
    add("--max-new-tokens", type=int, default=128, help="(default: 128)")
    add("--samples", type=int, default=1, help="texts (default: 1)")
    add("--no-graph", action="store_true", help="record no CUDA graph")
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    params = terminal.read_params(args, Params)
    text = read_prompt(args)
    check_seed(args.seed)
    check_number("samples", args.samples, 2**16)
    model, tokenizer = load_model(args)
    options = method_options(METHODS, args.method, given_flags(args, METHODS), model, tokenizer)
    prompts = [encode_prompt(args, text, tokenizer)] * args.samples
    show = None if args.json else terminal.printer(tokenizer, "" if args.chat else text)
    result = generate(model, prompts, args.method, params, args.max_new_tokens, args.seed, show,
                      graph=not args.no_graph, **options)
    terminal.report(result, tokenizer, args.json)


if __name__ == "__main__":
    from pass_sampler import main  # Not this copy of the file, but the one that beyond/ imports.
    run_script(main)
