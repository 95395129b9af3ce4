"""Planted bugs: each is a small patch of the real source, and each must be caught by an assertion of the check named beside it.

    make mutants                                                # all of them: caught / planted
    .venv/bin/python tests/mutants.py "the ratio inverted"      # one

`make test` plants all but those that need statistics (SLOW). A mutant says which invariant it breaks; many are bugs that public
implementations of speculative sampling have had. A patch that no longer fits the source is an error, and so is a mutant that
merely crashes. To add one: "what is wrong": mutant("the invariant", check, "old source, there exactly once", "new source").
"""
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import torch

from common import planted
from exact import check_exact, check_later_drafts
from pass_sampler import Params
from test_exact import BOTH, check_model, check_stops
from test_fused import check_groups, check_rollback, check_rule_for_trees, check_siblings
from test_rule import check_probs, check_rule, check_zeros
from test_samplers import check_joint
from test_train import check_columns, check_frozen, check_gradients


def exact_pass(code):
    check_exact(code, "pass", (0.5,), parts=BOTH)
    check_exact(code, "pass", (1.0, 2), n=4, parts=BOTH)


def exact_fused(code):
    check_exact(code, "fused", parts=BOTH, tree="0 1 00", drafts=False, draft_temperature=0.6)
    check_exact(code, "fused", (1.0, 2), n=4, parts=BOTH, tree="0 1", drafts=False)
    check_exact(code, "fused", (2.0, 2), n=3, parts=BOTH, tree="0 1 00 10", drafts=False)


def independent_rows(code):
    check_joint(code.pass_sampler, "pass", Params(1))


class Mutant(NamedTuple):
    breaks: str  # the invariant
    check: Callable
    module: str
    patches: list


def mutant(breaks, check, *patches, module="pass_sampler"):
    return Mutant(breaks, check, module, list(zip(patches[::2], patches[1::2])))


OFFSET = "else (column, None)"
SEES = "sees_memory=column >= tokens.shape[1] if L and self.cache.memory else None"
PREFILL_SEES = "sees_memory=(0 <= own) & (own < L) if L and cache.memory else None"
COMMIT = "        run.commit(1 + accepted)\n        L ="
MUTANTS = {
    # The rejection rule (Leviathan et al. 2022, algorithm 1)
    "p in place of the residual": mutant("a rejected draft is drawn anew from norm(max(0, p - q))", check_rule,
        "rest = (p - q).clamp(min=0)", "rest = p"),
    "residual of the absolute value": mutant("the residual is 0 where q > p", check_rule, "(p - q).clamp(min=0)", "(p - q).abs()"),
    "residual not clamped": mutant("the residual is not negative", check_rule, "(p - q).clamp(min=0)", "(p - q)"),
    "residual clamped to a small positive number": mutant("no token outside of p's support comes out", check_zeros,
        "(p - q).clamp(min=0)", "(p - q).clamp(min=1e-9)"),
    "the ratio inverted": mutant("accept while u < p/q", check_rule, "u[:, :-1] * q_draft < p_draft", "u[:, :-1] * p_draft < q_draft"),
    "the ratio clamped from below": mutant("accept while u < p/q", check_rule, "u[:, :-1] * q_draft < p_draft",
        "u[:, :-1] < (p_draft / q_draft).clamp(min=0.2)"),
    "accepted where u equals p/q": mutant("a draft of p = 0 is rejected, at u = 0 too", check_zeros, "u[:, :-1] * q_draft < p_draft",
        "u[:, :-1] * q_draft <= p_draft"),
    "the ratio 5 % too large": mutant("accept while u < p/q", check_rule, "u[:, :-1] * q_draft < p_draft",
        "u[:, :-1] * q_draft < 1.05 * p_draft"),
    "half a percent of q not subtracted": mutant("the residual is p - q", check_rule, "rest = (p - q).clamp(min=0)",
        "rest = (p - 0.995 * q).clamp(min=0)"),
    "accepted if merely possible": mutant("accept while u < p/q", check_rule, "u[:, :-1] * q_draft < p_draft", "p_draft > 0"),
    "argmax in place of a draw": mutant("what follows a rejection is drawn", check_rule, "draw(residual(p, q), u[:, -1])",
        "residual(p, q).argmax(-1)"),
    "a draft accepted after a rejection": mutant("nothing after the first rejection is kept", check_rule,
        "accept.long().cumprod(1).sum(1)", "accept.long().sum(1)"),
    "q of the last draft subtracted from the bonus": mutant("after L acceptances draw from p itself", check_rule,
        "F.pad(q, (0, 0, 0, 1))[rows", "torch.cat([q, q[:, -1:]], 1)[rows"),
    "the bonus from the row before": mutant("after a acceptances draw from p_{a+1}", check_rule, "p, q = p[rows, accepted],",
        "p, q = p[rows, accepted.clamp(max=p.shape[1] - 2)],"),
    "one random number for accepting and drawing": mutant("accepting and drawing are independent", check_rule,
        "draw(residual(p, q), u[:, -1])", "draw(residual(p, q), u[:, 0])"),
    "the draw may take a token of weight 0": mutant("a token of probability 0 never comes out", check_zeros, "right=True)[..., 0]",
        "right=False)[..., 0]"),
    # The rule for several candidates
    "p not reduced after a rejection": mutant("p <- norm(max(0, p - q)) after each sibling", check_rule_for_trees,
        "rest = torch.where(tried[:, None], residual(rest, q[:, i]), rest)", "pass"),
    "p reduced but not renormalised": mutant("the residual is a distribution", check_rule_for_trees,
        "return torch.where(total > 0, rest / total, p)", "return torch.where(total > 0, rest, p)"),
    "a sibling tried after one was accepted": mutant("one child of a node is accepted at most", check_rule_for_trees,
        "tried = node == above", "tried = (node == above) | (node > 0)"),
    "a draft that could not be drawn is kept": mutant("a draft of q = 0 is no draft", check_rule_for_trees,
        "accept = tried & (q_draft > 0) &", "accept = tried &"),
    "siblings drawn with replacement": mutant("siblings are drawn without replacement", check_siblings,
        "tokens = (q / arrival).topk(k).indices",
        "tokens = torch.stack([(q / torch.empty_like(arrival).exponential_(generator=generator))" ".argmax(-1) for _ in range(k)], -1)"),
    "the same arrival times for all siblings' q": mutant("siblings are drawn without replacement", check_siblings,
        "tokens = (q / arrival).topk(k).indices", "tokens = q.topk(k).indices"),
    "q not renormalised without the siblings": mutant("each sibling's q is what it was drawn from", exact_fused,
        "return tokens, torch.where(total > 0, left / total, 0)", "return tokens, left"),
    # p and q
    "p and q of different parameters": mutant("p and q are made by the same function", exact_pass, "drafts], 1))))  # pass 2",
        "drafts], 1))) / 0.9)"),
    "q not the one that was drawn from": mutant("the rule is given the q of the drafts", exact_pass, "verify(p, q, drafts, run",
        "verify(p, q ** 2 / (q ** 2).sum(-1, keepdim=True), drafts, run"),
    "q in another precision": mutant("the rule is given the q of the drafts", exact_pass, "verify(p, q, drafts, run",
        "verify(p, q.bfloat16().to(q), drafts, run"),
    "top-p before the temperature": mutant("temperature, then top-k, then top-p", check_probs,
        "logits = (logits - logits.amax(-1, keepdim=True)) / max(params.temperature, 1e-30)",
        "logits = (logits - logits.amax(-1, keepdim=True))", "    return p\n\n\ndef draw(",
        "    p = p ** (1 / max(params.temperature, 1e-30))\n    return p / p.sum(-1, keepdim=True)\n\n\ndef draw("),
    "top-p without the token that crosses it": mutant("top-p keeps the token that crosses the threshold", check_probs,
        "before = falling.cumsum(-1) - falling", "before = falling.cumsum(-1)"),
    "top-p not renormalised": mutant("p is a distribution", check_probs, "p = p / p.sum(-1, keepdim=True)", "pass"),
    "top-k cuts ties by position": mutant("what ties with the k-th token is kept", check_probs,
        "logits.masked_fill(logits < logits.topk(params.top_k).values[..., -1:], -math.inf)",
        "torch.full_like(logits, -math.inf).scatter(-1, (top := logits.topk(params.top_k)).indices, top.values)"),
    "top-k off by one": mutant("top-k keeps k tokens", check_probs, "values[..., -1:], -math.inf)",
        "values[..., -2:-1], -math.inf)"),
    # The methods
    "drafts judged by the columns after them": mutant("p_i follows i - 1 drafts", exact_pass, "drafts], 1))))  # pass 2",
        "drafts], 1)))).roll(-1, 1)"),
    "a rejected draft left in the cache": mutant("the cache holds the text", exact_pass, COMMIT,
        "        run.commit((2 + accepted).clamp(max=1 + L))\n        L ="),
    "an accepted draft missing in the cache": mutant("the cache holds the text", exact_pass, COMMIT,
        "        run.commit(accepted.clamp(min=1))\n        L ="),
    "the cache cleared in place of rolled back": mutant("the cache holds the text", exact_pass, COMMIT,
        "        run.commit(-run.cache.length * (accepted < L))\n        L ="),
    "look-ahead committed with the token": mutant("look-ahead tokens never enter the text", exact_pass,
        "h = run.forward(x[:, None], L)  # pass 1\n        run.commit(1)",
        "h = run.forward(x[:, None], L)\n        run.commit(1 + (L > 0))"),
    "positions of row 0 for all rows": mutant("rows may differ in length", exact_pass, "self.cache.length[:, None] + offset,",
        "self.cache.length[:1, None] + offset,"),
    "look-ahead one position too far": mutant("LA_j stands where x_{n+j} will", check_columns, OFFSET,
        "else (column + (column >= tokens.shape[1]), None)"),
    "look-ahead all at one position": mutant("LA_j stands where x_{n+j} will", check_columns, OFFSET,
        "else (column * (column < 1), None)"),
    "memory seen by ordinary tokens": mutant("the model is untouched", exact_pass, SEES,
        "sees_memory=column >= 0 if L and self.cache.memory else None"),
    "memory seen by the prompt": mutant("the model is untouched", check_model, PREFILL_SEES,
        "sees_memory=own < L if L and cache.memory else None"),
    "memory not seen by the look-ahead": mutant("the memory serves the look-ahead", check_columns, SEES, "sees_memory=None"),
    "memory not seen by the first look-ahead": mutant("the memory serves the look-ahead", check_columns, PREFILL_SEES,
        "sees_memory=None"),
    "the first group after the padding": mutant("LA_1 follows the prompt of its own row", check_model,
        "group = count[:, None] + torch.arange(L", "group = count.max() + 0 * count[:, None] + torch.arange(L"),
    "rows share their random numbers": mutant("rows are independent", independent_rows, "torch.rand(len(self.prompts), n,",
        "torch.rand(1, n,", "device=self.device)\n\n    def probs",
        "device=self.device).expand(len(self.prompts), -1)\n\n    def probs"),
    "the head is given the first token throughout": mutant("each q is given the draft before it", check_columns, "drafts[j][:, None])",
        "drafts[0][:, None])"),
    "drafts without the head": mutant("the head corrects q", check_columns, "best = best + (rows", "best + (rows"),
    "judged by a q without the head": mutant("the rule is given the q of the drafts", exact_pass,
        "torch.stack(drafts[1:], 1), torch.stack(q, 1)", "torch.stack(drafts[1:], 1), run.probs(logits)"),
    "one q for all drafts": mutant("the rule is given the q of the drafts", exact_pass,
        "torch.stack(drafts[1:], 1), torch.stack(q, 1)", "torch.stack(drafts[1:], 1), torch.stack(q[:1] * len(q), 1)"),
    "a sibling visible to a draft": mutant("a node sees its ancestors", exact_fused,
        "[[a.startswith(b) for b in nodes] for a in nodes]",
        "[[a.startswith(b) or len(a) == len(b) and b < a for b in nodes] for a in nodes]"),
    "nodes see the root's group": mutant("ordinary tokens never see look-ahead tokens", exact_fused,
        "torch.cat([F.pad(above, (0, len(groups))),", "torch.cat([F.pad(above, (0, len(groups)), value=True),"),
    "a group sees the groups before it": mutant("a group sees its node, that one's ancestors, and itself", check_groups,
        "torch.block_diag(*[inside] * n)", "torch.ones(n * self.depth, n * self.depth).tril().bool()"),
    "the accepted path not moved down": mutant("the cache holds the text", exact_fused, "None if tree.chain else path", "None"),
    "positions by column in place of depth": mutant("siblings share a position", exact_fused,
        "self.offset = torch.cat([self.depths,", "self.offset = torch.cat([torch.arange(n),"),
    "judged at the drafts' temperature": mutant("p is the target's", exact_fused, "run.probs(logits[:, :n])",
        "probs(logits[:, :n], run.draft_params)"),
    "q of another node": mutant("the rule is given the q of the drafts", exact_fused,
        "q[:, i].scatter_(1, ids, left[:, parent, k])", "q[:, i].scatter_(1, ids, left[:, 0, k])"),
    "the root's group drafts, whatever was accepted": mutant("drafts follow the last accepted node", check_later_drafts,
        "group = n + node[:, None] * tree.depth +", "group = n + 0 * node[:, None] +"),
    "the draft model keeps a rejected draft": mutant("both caches roll back to the same text", check_rollback,
        "small.cache.length = run.cache.length", "small.cache.length = run.cache.length + (accepted < drafts.shape[1] - 1)"),
    "the draft model does not roll back": mutant("both caches roll back to the same text", check_rollback,
        "small.cache.length = run.cache.length", "small.cache.length = small.cache.length"),
    "the draft model never reads its last draft": mutant("both caches hold the text", check_rollback,
        "        small.forward(drafts[-1][:, None])", "        0 and small.forward(drafts[-1][:, None])"),
    "one random number for all drafts": mutant("each decision has a random number of its own", exact_pass, "draw(q[j], u[:, j])",
        "draw(q[j], u[:, 0])"),
    "the drafts' random numbers judge them": mutant("each decision has a random number of its own", exact_pass,
        "    return torch.stack(drafts[1:], 1), torch.stack(q, 1)",
        "    run.u = u\n    return torch.stack(drafts[1:], 1), torch.stack(q, 1)", "verify(p, q, drafts, run.uniform(1 + L))",
        "verify(p, q, drafts, torch.cat([run.u, run.uniform(1)], 1))"),
    # Stopping
    "a stop token inside an accepted run is overlooked": mutant("the text ends at the first stop token", check_stops,
        "if token in self.model.config.stop_tokens:", "if token in self.model.config.stop_tokens and i == accepted[row]:"),
    "text after a stop token": mutant("the text ends at the first stop token", check_stops, "                    break\n", ""),
    "the budget checked before the stop": mutant("a stop token at the end of the budget is a stop", check_stops,
        "if token in self.model.config.stop_tokens:",
        "if token in self.model.config.stop_tokens and len(self.tokens[row]) < self.budget[row]:"),
    "the budget overshot": mutant("no more tokens than were asked for", check_stops,
        "elif len(self.tokens[row]) == self.budget[row]:", "elif len(self.tokens[row]) == self.budget[row] + 1:"),
    "the end of the context called a length": mutant("the reason is the one that applies", check_stops,
        'else "context" for prompt', 'else "length" for prompt'),
    # Model and cache
    "heads of a group in the wrong order": mutant("query head h reads key/value head h // G", check_model,
        "q.view(B, T, K, G, E).transpose(1, 2)", "q.view(B, T, G, K, E).transpose(2, 3).transpose(1, 2)", module="model"),
    "rotary pairs interleaved": mutant("x_i turns with x_{i+E/2}", check_model, "qkv.roll(E // 2, -1), sin)",
        "qkv.roll(1, -1), sin)", module="model"),
    "rotary angles reversed": mutant("(a, b) -> (a cos - b sin, b cos + a sin)", check_model, "(-angle.sin(), angle.sin())",
        "(angle.sin(), -angle.sin())", module="model"),
    "values rotated too": mutant("positions turn queries and keys only", check_model,
        "F.pad(turned, (0, 0, 0, config.n_kv_heads))", "F.pad(turned, (0, 0, 0, config.n_kv_heads), value=0.1)", module="model"),
    "norm without the model's epsilon": mutant("RMSNorm divides by sqrt(mean(x^2) + eps)", check_model,
        "x = x + linear(F.silu(gate) * up, layer.down)\n        return rms_norm(x, self.norm, c.norm_eps)",
        "x = x + linear(F.silu(gate) * up, layer.down)\n        return rms_norm(x, self.norm, 0.1)", module="model"),
    "attention not scaled": mutant("scores are divided by sqrt(E)", check_model,
        "F.scaled_dot_product_attention(q, k, v, attn_mask=mask)",
        "F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1)", module="model"),
    "gate and up exchanged": mutant("SwiGLU is silu(gate) * up", check_model, "gate, up = linear(rms", "up, gate = linear(rms",
        module="model"),
    "rows see as far as the longest": mutant("a row sees its own committed columns", check_model,
        "limit = self.length[:, None] if", "limit = self.length.max().expand(rows)[:, None] if", module="model"),
    "committed one too many": mutant("the cache holds what was committed", check_model, "self.length = self.length + count",
        "self.length = self.length + count + 1", module="model"),
    "a path committed in the order of the block": mutant("the path moves down in its order", check_model,
        "flat[:, self.next() + to] = flat[:, self.next() + columns]", "pass", module="model"),
    "blocks begin in the memory": mutant("slots are [memory | committed | block]", check_model,
        "* slots + self.memory + self.length)", "* slots + self.length)", module="model"),
    # Training
    "kl the wrong way round": mutant("the gradient is that of KL(p || q)", check_gradients, "g = q - p", "g = p - q",
        module="train_lookahead"),
    "tv without its normalisation": mutant("dq_y / dlogit_x = q_y (1[x = y] - q_x)", check_gradients,
        "g = q * below.sum(-1, keepdim=True) - below", "g = -below", module="train_lookahead"),
    "trained for the token before": mutant("LA_j is trained for x_{n+j+1}", check_columns, "text.gather(1, before + 1).flatten()",
        "text.gather(1, before).flatten()", module="train_lookahead"),
    "trained one position too far": mutant("trained columns are the sampler's", check_columns, "offset[:, None] + before, cache,",
        "offset[:, None] + before + 1, cache,", module="train_lookahead"),
    "groups see each other in training": mutant("trained columns are the sampler's", check_columns,
        "visible=torch.block_diag(*[inside] * M)", "visible=torch.ones(M * L, M * L).tril().bool()", module="train_lookahead"),
    "a weight of the frozen model moves": mutant("the model is frozen", check_frozen, "        optimizer.step()\n",
        "        optimizer.step()\n        model.norm.data += 1e-6\n", module="train_lookahead"),
}
SLOW = (independent_rows,)


def caught(name):
    """Plant it and run its check. Returns the message of the assertion that caught it; raises AssertionError where none did."""
    bug = MUTANTS[name]
    code = planted(**{bug.module: bug.patches})
    try:
        bug.check(code)
    except AssertionError as failure:
        return str(failure)
    raise AssertionError(f"the planted bug {name!r} (it breaks: {bug.breaks}) was not caught by {bug.check.__name__}")


def main():
    torch.set_num_threads(1)
    names = sys.argv[1:] or MUTANTS
    if unknown := set(names) - set(MUTANTS):
        sys.exit(f"no such bugs: {', '.join(unknown)}; the table in {__file__} has their names")
    checks = {MUTANTS[name].check for name in names}
    for check in sorted(checks, key=lambda check: check.__name__):
        check(planted(model=[]))  # a check that fails without a bug proves nothing
    print(f"{len(checks)} checks pass on the code as it is")
    survived = []
    for name in names:
        bug, start = MUTANTS[name], time.perf_counter()
        try:
            message = caught(name)
        except AssertionError as failure:
            message = str(failure)
            survived.append(name)
        print(f"{'NOT CAUGHT' if name in survived else 'caught'}: {name} ({bug.module}: {bug.breaks}) by {bug.check.__name__}, "
              f"{time.perf_counter() - start:.1f} s\n    {message.partition(chr(10))[0]}", flush=True)
    print(f"{len(names) - len(survived)} caught / {len(names)} planted")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
