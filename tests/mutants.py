"""Planted bugs: each is a small patch of the real source, and each must be caught by an assertion
of the check under which it stands.

    make mutants                                                # all of them: caught / planted
    .venv/bin/python tests/mutants.py "the ratio inverted"      # one

Under each check stand its bugs: in words, then as a diff of a piece of the source that stands
there exactly once, as short as can be. Many are bugs that public implementations of speculative
sampling have had. Where the source has changed a bug "does not fit": adapt the diff. A bug that
merely crashes is not caught. One that is NOT CAUGHT may change nothing: perhaps the source does the
same thing twice.
"""
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import torch
from common import DoesNotFit, planted
from exact import check_exact
from test_bench import test_decoded, test_factors, test_interval
from test_beyond import BOTH, test_cover, test_groups, test_rule_for_trees, test_siblings
from test_equivalence import check_joint, test_probs, test_rule, test_zeros
from test_model import test_model, test_types
from test_sampler import (
    test_ended_rows,
    test_figures,
    test_freed,
    test_memory,
    test_recordable,
    test_stops,
)
from test_tokenizer import (
    test_one_token_wherever_it_is,
    test_spaces_around_added_tokens,
    test_special_tokens_and_stop_tokens_print_nothing,
    test_which_file_wins,
)
from test_train import test_columns, test_evaluate, test_expected, test_frozen, test_gradients

from pass_sampler import Params


def exact_pass(code):
    check_exact(code, "pass", (0.5,), BOTH)
    check_exact(code, "pass", (1.0, 2), BOTH, steps=2)


def exact_paper(code):
    check_exact(code, "pass", (0.5,), ())


def exact_fused(code):
    check_exact(code, "fused", (1.0, 2), BOTH, steps=2)


def exact_tree(code):
    check_exact(code, "tree", (1.0,), BOTH, "0 1")
    check_exact(code, "tree", (1.0,), BOTH, "0 00")
    check_exact(code, "tree", (2.0, 2), BOTH, "0 1", steps=2)
    check_exact(code, "tree", (2.0, 2), BOTH, "0 1 00 10 11")
    check_exact(code, "tree", (0.0,), BOTH, "0 1 00", steps=3)


def exact_draft_model(code):
    check_exact(code, "draft-model", (1.0, 2), (), 2, steps=2)


def independent_rows(code):
    check_joint(code, "pass", Params(1))


BUGS = {
    test_rule: """
p in place of the residual
- rest = (p - q).clamp(min=0)
+ rest = p
|p - q| in place of the residual
- rest = (p - q).clamp(min=0)
+ rest = (p - q).abs()
the ratio inverted
- u_accept * q_draft < p_draft
+ u_accept * p_draft < q_draft
the ratio 5 % too large
- u_accept * q_draft < p_draft
+ u_accept * q_draft < 1.05 * p_draft
half a percent of q not subtracted
- rest = (p - q).clamp(min=0)
+ rest = (p - 0.995 * q).clamp(min=0)
argmax in place of a draw
- draw(residual(p_last, q_last), u_last[:, 0])
+ residual(p_last, q_last).argmax(-1)
a draft accepted after a rejection
- accept.cumprod(1).sum(1)
+ accept.sum(1)
after L acceptances a draw from p - q_L, not p
- q_last = q_last * (accepted < L)[:, None]
+ pass
after L acceptances a draw from p_L, not p_{L+1}
- p_last = p[rows, accepted]
+ p_last = p[rows, accepted.clamp(max=L - 1)]
one random number for accepting and drawing
- draw(residual(p_last, q_last), u_last[:, 0])
+ draw(residual(p_last, q_last), u[:, 0])
""",
    test_zeros: """
residual clamped to a small positive number
- rest = (p - q).clamp(min=0)
+ rest = (p - q).clamp(min=1e-9)
accepted where u equals p/q
- u_accept * q_draft < p_draft
+ u_accept * q_draft <= p_draft
the draw may take a token of weight 0
- right=True)
+ right=False)
""",
    test_probs: """
top-p before the temperature
- logits = logits / max(params.temperature, 1e-20)
+ pass
-     return p
-
-
- def draw
+     p = p ** (1 / max(params.temperature, 1e-20))
+     return p / p.sum(-1, keepdim=True)
+
+
+ def draw
top-p without the token that crosses it
- before = falling.cumsum(-1) - falling
+ before = falling.cumsum(-1)
p is no distribution after top-p
- p = p / p.sum(-1, keepdim=True)
+ pass
top-k cuts ties by position
- logits = logits.masked_fill(logits < least, -math.inf)
+ top = logits.topk(params.top_k)
+         logits = torch.full_like(logits, -math.inf).scatter(-1, top.indices, top.values)
top-k off by one
- values[..., -1:]
+ values[..., -2:-1]
""",
    exact_pass: """
p made with another temperature than q
- s.model(block, cache)))  # pass 2
+ s.model(block, cache)) / 0.9)  # pass 2
drafts judged by a q in another precision
- verify(p, q, drafts, u_verify)
-         count
+ verify(p, q.bfloat16().to(q), drafts, u_verify)
+         count
drafts judged by the columns after them
- verify(p, q, drafts, u_verify)
-         count
+ verify(p.roll(-1, 1), q, drafts, u_verify)
+         count
a rejected draft left in the cache
- cache.commit(count * s.alive)
+ cache.commit((2 + accepted).clamp(max=1 + L) * s.alive)
an accepted draft missing in the cache
- cache.commit(count * s.alive)
+ cache.commit(accepted.clamp(min=1) * s.alive)
look-ahead committed with the token
- cache.commit(s.alive)  # x_n, and none of the look-ahead
+ cache.commit(2 * s.alive)
positions of row 0 for all rows
- positions = slots - cache.first
+ positions = (slots - cache.first)[:1].expand(B, T)
look-ahead one position too far
- return model(x, cache, mask=mask)
+ T, where = tokens.shape[1], torch.arange(x.shape[1])
+         return model(x, cache, cache.length[:, None] + where + (where >= T), mask)
memory seen by ordinary tokens
- mask[:, tokens:, :cache.first] = True
+ mask[:, :, :cache.first] = True
memory not seen by the look-ahead
- mask[:, tokens:, :cache.first] = True
+ pass
one random number for all drafts
- draw(q_j, u[:, j:j + 1])
+ draw(q_j, u[:, :1])
the drafts' random numbers judge them
- verify(p, q, drafts, u_verify)
-         count
+ verify(p, q, drafts, torch.cat([u_draft, u[:, -1:]], 1))
+         count
the first draft drawn by the token's random number
- x, u_draft)
-         block
+ x, u[:, :L])
+         block
x is the first token of the block, not the last
- self.x.copy_(last[:, None])
+ self.x.copy_((block if block.numel() else last[:, None])[:, :1])
the head is given x for all drafts, not the draft before
- drafts = []
-         for j
+ drafts = []
+         first = x
+         for j
- candidates.logits(j, x)
+ candidates.logits(j, first)
drafts without the head
- torch.baddbmm(best, features
+ torch.baddbmm(best, 0 * features
judged by a q without the head
- return torch.cat(drafts, 1), q
+ return torch.cat(drafts, 1), probs(logits, params)
all drafts judged by the first one's q
- return torch.cat(drafts, 1), q
+ return torch.cat(drafts, 1), q[:, :1].expand_as(q)
all look-ahead tokens are the first
- embeddings = self.embeddings.expand(len(tokens), -1, -1)
-         x
+ embeddings = self.embeddings[:1].expand(len(tokens), L := len(self.embeddings), -1)
+         x
""",
    exact_paper: """
LA_1 in all places
- self.embeddings.expand(len(tokens), -1, -1)
-         return
+ self.embeddings[:1].expand(len(tokens), len(self.embeddings), -1)
+         return
the look-ahead before the token
- return model(torch.cat([model.embed(tokens), embeddings], 1), cache)
+ return model(torch.cat([embeddings, model.embed(tokens)], 1), cache)
drafts drawn from another q than judges them
- return draw(q, u), q
+ return draw(q.flip(1), u), q
""",
    test_ended_rows: """
a finished row commits
- cache.commit(count * s.alive)
+ cache.commit(count)
a finished row of fused commits
- (1 + accepted) * s.alive)
-         group
+ 1 + accepted)
+         group
""",
    test_memory: """
memory shown to the text
- torch.full((self.first,), 2**62
+ torch.full((self.first,), 0
""",
    independent_rows: """
rows share their random numbers
- self.u.uniform_(generator=self.generator)
+ self.u.copy_(self.u[:1].clone().uniform_(generator=self.generator))
the same random numbers at every step
- self.u.uniform_(generator=self.generator)
+ self.u.uniform_(generator=self.generator.manual_seed(0))
""",
    exact_fused: """
the group of another draft
- group.keep(h, logits, accepted)
+ group.keep(h, logits, 0 * accepted)
""",
    test_groups: """
a group sees the groups before it
- visible[column, n + i * L:column + 1] = True
+ visible[column, n:column + 1] = True
nodes see the root's group
- visible[i, path] = True
+ visible[i, path] = True
+             visible[i, n:n + L] = True
siblings stand in places of their own
- offset = [len(set(path)) - 1 for path in paths]
+ offset = list(range(n))
""",
    exact_tree: """
a sibling visible to a draft
- visible[i, path] = True
+ visible[i, :i + 1] = True
the accepted path not moved down
- cache.commit((1 + accepted) * s.alive, path)
+ cache.commit((1 + accepted) * s.alive)
children of the root tried again deeper
- child[rank][some] = by_rank[rank]
+ child[rank][:] = self.levels[0].child[rank] if d else 0
+                 child[rank][some] = by_rank[rank]
a draft follows another node than its parent
- parents.sort(key=lambda i: -len(children(i)))
+ pass
q of another node
- residual(rest, q[rows, child])
+ residual(rest, q[rows, child.clamp(max=1)])
the p of a tree made with another temperature
- s.target_probs(logits[:, :1 + N])
+ s.target_probs(logits[:, :1 + N] / 0.9)
""",
    test_rule_for_trees: """
p not reduced after a rejection
- rest = residual(rest, q[rows, child])
+ pass
p reduced but not renormalised
- torch.where(total > 0, rest / total, p)
+ torch.where(total > 0, rest, p)
a sibling tried after one was accepted
- (node == parent) & (u_q
+ (node == node) & (u_q
a draft of q = 0 is kept
- .masked_fill(q_draft == 0, math.inf)
+ .index_fill(1, rows[:1] * 0, math.inf)
""",
    test_siblings: """
siblings drawn with replacement
- z.scatter(2, choice, -math.inf)[:
+ z[:
one random number for all siblings
- u[:, level.draws[rank]]
+ u[:, level.draws[rank] * 0]
all siblings come with the q of the first
- nothing.scatter_(2, ids, q_node)
+ nothing.scatter_(2, ids, probs(candidates.best[:, d, None].expand_as(z), s.params))
""",
    exact_draft_model: """
the draft model does not roll back
- small.length.copy_(cache.length)
+ pass
the draft model never reads its last draft
- draft_model(block[-1], small)  # for
+ pass  # for
""",
    test_stops: """
a stop token inside an accepted run is overlooked
- if token in stops:
+ if token in stops and i == len(made.tokens) - 1:
text after a stop token
- if self.ending:
-                 break
+ pass
the budget checked before the stop
- if token in stops:
+ if token in stops and len(self.tokens) < self.room:
the budget overshot
- elif len(self.tokens) == self.room:
+ elif len(self.tokens) == self.room + 1:
a text that ends with the context gives length as the reason
- "length" if max_new_tokens <= room else "context"
+ "length"
""",
    test_recordable: """
the cache rebinds its length
- self.length += count
+ self.length = self.length + count
the group rebinds its buffer
- torch.index_select(h.flatten(0, 1), 0, columns, out=self.h.flatten(0, 1))
+ self.h = torch.index_select(h.flatten(0, 1), 0, columns).view_as(self.h)
x is rebound
- self.x.copy_(last[:, None])
+ self.x = last[:, None]
a step looks whether all was accepted
- cache.commit(count * s.alive)
+ cache.commit(count * s.alive)
+         if (accepted == L).all():
+             pass
a step asks for a number to use in Python
- shape.path[node], shape
+ shape.path[node.tolist()], shape
""",
    test_model: """
query head h reads key/value head h mod K
- q = q.view(B, T, K, G, E).transpose(1, 2)
+ q = q.view(B, T, G, K, E).transpose(2, 3).transpose(1, 2)
rotary pairs interleaved
- x.roll(x.shape[-1] // 2, -1)
+ x.roll(1, -1)
rotary angles reversed
- torch.cat([-angle.sin(), angle.sin()], -1)
+ torch.cat([angle.sin(), -angle.sin()], -1)
values rotated too
- rotate_(qkv[:, :, :H + K], cos, sin)
+ rotate_(qkv, cos, sin)
RMSNorm with another epsilon
- weight, self.config.norm_eps)
+ weight, 0.1)
attention not scaled
- F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
+ F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1)
gate and up exchanged
- gate, up = linear(y
+ up, gate = linear(y
rows see as far as the longest
- self.place[:S] - self.length[:, None]
+ self.place[:S] - self.length.max().expand_as(self.length)[:, None]
one column too many committed
- self.length += count
+ self.length += count + 1
a path committed in the order of the block
- self.kv[:, :, self.rows, :, to] = kept
+ pass
blocks begin in the memory
- torch.arange(self.first, self.first + T,
+ torch.arange(0, T,
the block of a single row stands backwards
- copy_(kv.permute(2, 0, 3, 1, 4))
+ copy_(kv.permute(2, 0, 3, 1, 4).flip(3))
""",
    test_types: """
RMSNorm of the sum in place of the mean
- value=1 / x.shape[-1]
+ value=1 / self.config.head_dim
""",
    test_gradients: """
kl the wrong way round
- F.kl_div(log_q, p, reduction="sum")
+ F.kl_div(p.log(), log_q.exp(), reduction="sum")
tv without its half
- (p - log_q.exp()).clamp(min=0)
+ (p - log_q.exp()).abs()
the loss of each piece a mean of its own
- tokens[part], p) / len(h)
+ tokens[part], p) / len(leaf)
""",
    test_expected: """
drafts after a rejected one expected
- (1, -1), value=1).cumprod(1)
+ (1, -1), value=1)
a draft's own chance counted twice
- F.pad(kept.clamp(max=1).view(-1, L), (1, -1), value=1)
+ kept.clamp(max=1).view(-1, L)
""",
    test_evaluate: """
acceptance measured at another temperature
- params = Params(temperature)
-         measured
+ params = Params(1)
+         measured
acceptance measured at the first position
- offset = torch.full((len(text),), position,
+ offset = torch.full((len(text),), 0,
""",
    test_cover: """
p not reduced for the second candidate
- p = residual(p, q)
+ pass
a refused candidate comes again
- logits = logits.scatter(1, draw(residual(q, p), u)[:, None], -math.inf)
+ pass
what is refused drawn from q
- draw(residual(q, p), u)[:, None]
+ draw(q, u)[:, None]
""",
    test_figures: """
a step that kept n drafts counted as one of n + 1
- sum(n > i for
+ sum(n >= i for
""",
    test_columns: """
LA_j trained for the token before its own
- text.gather(1, here + 1).flatten()
+ text.gather(1, here).flatten()
columns trained one position too far
- offset[:, None] + here, mask
+ offset[:, None] + here + 1, mask
groups see each other in training
- (place == place[:, None]).tril()
+ (place >= 0).expand(M * L, -1).tril()
a group sees beyond its place in training
- mask = slot < places
+ mask = slot < 1 + places
""",
    test_frozen: """
a weight of the frozen model moves
- optimizer.step()
+ optimizer.step()
+     model.norm.data += 1e-6
""",
    test_freed: """
a step keeps its sampler
- weakref.proxy(self)
+ self
""",
    test_one_token_wherever_it_is: """
a token that is only named is text
- for token in tokens + named:
+ for token in tokens:
</s> in a prompt is text
- if sp.is_control(i) or
+ if
""",
    test_which_file_wins: """
added_tokens.json read beside added_tokens_decoder
- if older.exists() and "added_tokens_decoder" not in settings:
+ if older.exists():
tokenizer.json wins over added_tokens_decoder
- tokens = by_id(path, decoder.items() if isinstance(decoder, dict) else ()) + own
+ tokens = own + by_id(path, decoder.items() if isinstance(decoder, dict) else ())
tokenizer.model wins over tokenizer.json
- if other.exists() and (installed or not model.exists()):
+ if not model.exists():
""",
    test_special_tokens_and_stop_tokens_print_nothing: """
a stop token is printed
- for i in (tokenizer.unk, *stop_tokens(folder)):
+ for i in (tokenizer.unk,):
a named special token is printed
- token.special or token.content in special
+ token.special
""",
    test_spaces_around_added_tokens: """
a space after each added token
- where == "first" and start == 0
+ where == "first"
the class LlamaTokenizer is not asked
- settings.get("legacy", not llama)
+ settings.get("legacy", True)
""",
    test_interval: """
the interval takes rounds for prompts
- (RESAMPLES, n, 1), generator
+ (RESAMPLES, n, rounds), generator
""",
    test_factors: """
a costly step shown as a gain
- all_of["tokens per step"] / all_of["cost"]
+ all_of["tokens per step"] * all_of["cost"]
the cost taken for certain
- costs.double()[turn].quantile(0.5, 1)
+ costs.double().quantile(0.5).expand(RESAMPLES)
""",
    test_decoded: """
prefill counted as decoding
- result["seconds"] - result["prefill_seconds"]
+ result["seconds"]
""",
}


def read(table):
    """{a bug in words: [(old source, new source), ..]} of a table."""
    bugs = {}
    before = ""
    for line in table.strip().splitlines():
        kind, piece = line[0], line[2:]
        if kind not in "-+":
            patches = bugs[line] = []
        elif kind == before:
            patches[-1][kind] += "\n" + piece
        elif kind == "-":
            patches.append({kind: piece})
        else:
            patches[-1][kind] = piece
        before = kind
    return {bug: [(patch["-"], patch["+"]) for patch in patches]
            for bug, patches in bugs.items()}


def caught(check, patches):
    """Plant them and run the check. Returns the message of the assertion that caught them, or
    None."""
    with planted(*patches) as code:
        try:
            check(code)
        except AssertionError as failure:
            return str(failure)
    return None


def main():
    torch.set_num_threads(1)
    tables = {check: read(table) for check, table in BUGS.items()}
    known = [bug for bugs in tables.values() for bug in bugs]
    wanted = sys.argv[1:] or known
    if not set(wanted) <= set(known):
        sys.exit(f"no such bug: {', '.join(set(wanted) - set(known))}")
    survived = len(wanted)
    for check, bugs in tables.items():
        chosen = [bug for bug in bugs if bug in wanted]
        if chosen:
            failure = caught(check, ())
            assert failure is None, f"{check.__name__} fails without a bug: {failure}"
        for bug in chosen:
            start = time.perf_counter()
            found = "NOT CAUGHT"
            try:
                message = caught(check, bugs[bug])
                if message is not None:
                    found = "caught"
                    survived -= 1
            except DoesNotFit as error:
                found, message = "DOES NOT FIT, adapt it", str(error)
            except Exception as error:  # a bug that merely crashes
                message = f"{type(error).__name__}: {error}"
            print(f"{found}: {bug}, by {check.__name__}, {time.perf_counter() - start:.1f} s\n"
                  f"    {(message or '').partition(chr(10))[0]}", flush=True)
    print(f"{len(wanted) - survived} caught / {len(wanted)} planted")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
