"""Planted bugs: each is a small patch of the real source, and each must be caught by an assertion
of the check under which it stands.

    make mutants                                                # all of them: caught / planted
    .venv/bin/python tests/mutants.py "the ratio inverted"      # one

A bug says which invariant it breaks; many are bugs that public implementations of speculative
sampling have had. Where the source has changed, a bug "does not fit": adapt what it quotes, as
little as is there exactly once. A bug that merely crashes is not caught. To add one, under its
check: "what is wrong": ("the invariant", "old source", "new source").
"""
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import torch
from common import DoesNotFit, planted
from exact import check_exact
from test_bench import test_compared, test_interval
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


RESIDUAL = "rest = (p - q).clamp(min=0)"
ACCEPT = "u_accept * q_draft < p_draft"
LAST = "draw(residual(p_last, q_last), u_last[:, 0])"
COMMIT = "cache.commit(count * s.alive)"
PASS_1 = "cache.commit(s.alive)  # x_n, and none of the look-ahead"
BONUS = "q_last = q_last * (accepted < L)[:, None]"
SEES = "mask[:, tokens:, :cache.first] = True"
BUGS = {
    test_rule: {
        "p in place of the residual": ("a rejected draft is drawn anew from norm(max(0, p - q))",
            RESIDUAL, "rest = p"),
        "residual of the absolute value": ("the residual is 0 where q > p",
            RESIDUAL, "rest = (p - q).abs()"),
        "the ratio inverted": ("accept while u < p/q",
            ACCEPT, "u_accept * p_draft < q_draft"),
        "the ratio 5 % too large": ("accept while u < p/q",
            ACCEPT, "u_accept * q_draft < 1.05 * p_draft"),
        "half a percent of q not subtracted": ("the residual is p - q",
            RESIDUAL, "rest = (p - 0.995 * q).clamp(min=0)"),
        "argmax in place of a draw": ("what follows a rejection is drawn",
            LAST, "residual(p_last, q_last).argmax(-1)"),
        "a draft accepted after a rejection": ("nothing after the first rejection is kept",
            "accept.cumprod(1).sum(1)", "accept.sum(1)"),
        "q of the last draft subtracted from the bonus": ("after L acceptances draw from p itself",
            BONUS, "pass"),
        "the bonus from the place before": ("after a acceptances draw from p_{a+1}",
            "p_last = p[rows, accepted]", "p_last = p[rows, accepted.clamp(max=L - 1)]"),
        "one random number for accepting and drawing": ("accepting and drawing are independent",
            LAST, "draw(residual(p_last, q_last), u[:, 0])"),
    },
    test_zeros: {
        "residual clamped to a small positive number": ("no token outside of p's support comes out",
            RESIDUAL, "rest = (p - q).clamp(min=1e-9)"),
        "accepted where u equals p/q": ("a draft of p = 0 is rejected, at u = 0 too",
            ACCEPT, "u_accept * q_draft <= p_draft"),
        "the draw may take a token of weight 0": ("a token of probability 0 never comes out",
            "right=True)", "right=False)"),
    },
    test_probs: {
        "top-p before the temperature": ("temperature, then top-k, then top-p",
            "logits = logits / max(params.temperature, 1e-20)", "pass",
            "        p = p / p.sum(-1, keepdim=True)\n    return p\n",
            "        p = p / p.sum(-1, keepdim=True)\n"
            "    p = p ** (1 / max(params.temperature, 1e-20))\n"
            "    return p / p.sum(-1, keepdim=True)\n"),
        "top-p without the token that crosses it": (
            "top-p keeps the token that crosses the threshold",
            "before = falling.cumsum(-1) - falling", "before = falling.cumsum(-1)"),
        "top-p not renormalised": ("p is a distribution",
            "p = p / p.sum(-1, keepdim=True)", "pass"),
        "top-k cuts ties by position": ("what ties with the k-th token is kept",
            "logits = logits.masked_fill(logits < least, -math.inf)",
            "top = logits.topk(params.top_k)\n        logits = torch.full_like(logits, -math.inf)"
            ".scatter(-1, top.indices, top.values)"),
        "top-k off by one": ("top-k keeps k tokens",
            "values[..., -1:]", "values[..., -2:-1]"),
    },
    exact_pass: {
        "p and q of different parameters": ("p and q are made by the same function",
            "s.model(block, cache)))  # pass 2", "s.model(block, cache)) / 0.9)  # pass 2"),
        "q in another precision": ("the rule is given the q of the drafts",
            "verify(p, q, drafts, u_verify)\n        count", "verify(p, "
            "q.bfloat16().to(q), drafts, u_verify)\n        count"),
        "drafts judged by the columns after them": ("p_i follows i - 1 drafts",
            "verify(p, q, drafts, u_verify)\n        count", "verify(p.roll(-1, 1), "
            "q, drafts, u_verify)\n        count"),
        "a rejected draft left in the cache": ("the cache holds the text",
            COMMIT, "cache.commit((2 + accepted).clamp(max=1 + L) * s.alive)"),
        "an accepted draft missing in the cache": ("the cache holds the text",
            COMMIT, "cache.commit(accepted.clamp(min=1) * s.alive)"),
        "look-ahead committed with the token": ("look-ahead tokens never enter the text",
            PASS_1, "cache.commit(2 * s.alive)"),
        "positions of row 0 for all rows": ("rows may differ in length",
            "positions = slots - cache.first",
            "positions = (slots - cache.first)[:1].expand(B, T)"),
        "look-ahead one position too far": ("LA_j stands where x_{n+j} will",
            "return model(x, cache, mask=mask)",
            "T, where = tokens.shape[1], torch.arange(x.shape[1])\n        "
            "return model(x, cache, cache.length[:, None] + where + (where >= T), mask)"),
        "memory seen by ordinary tokens": ("the model is untouched",
            SEES, SEES.replace("tokens:", ":")),
        "memory not seen by the look-ahead": ("the memory serves the look-ahead",
            SEES, "pass"),
        "one random number for all drafts": ("each decision has a random number of its own",
            "draw(q_j, u[:, j:j + 1])", "draw(q_j, u[:, :1])"),
        "the drafts' random numbers judge them": ("each decision has a random number of its own",
            "verify(p, q, drafts, u_verify)\n        count", "verify(p, q, drafts, "
            "torch.cat([u_draft, u[:, -1:]], 1))\n        count"),
        "the first draft drawn by the token's random number": (
            "each decision has a random number of its own",
            "x, u_draft)\n        block", "x, u[:, :L])\n        block"),
        "x is not the last token": ("x is the last token of the text",
            "self.x.copy_(last[:, None])",
            "self.x.copy_((block if block.numel() else last[:, None])[:, :1])"),
        "the head is given the first token throughout": ("each q is given the draft before it",
            "drafts = []\n        for j", "drafts = []\n        first = x\n        for j",
            "candidates.logits(j, x)", "candidates.logits(j, first)"),
        "drafts without the head": ("the head corrects q",
            "torch.baddbmm(best, features", "torch.baddbmm(best, 0 * features"),
        "judged by a q without the head": ("the rule is given the q of the drafts",
            "return torch.cat(drafts, 1), q", "return torch.cat(drafts, 1), probs(logits, params)"),
        "one q for all drafts": ("the rule is given the q of the drafts",
            "return torch.cat(drafts, 1), q", "return torch.cat(drafts, 1), q[:, :1].expand_as(q)"),
        "all look-ahead tokens are the first": ("LA_j has an embedding of its own",
            "embeddings = self.embeddings.expand(len(tokens), -1, -1)\n        x",
            "embeddings = self.embeddings[:1].expand(len(tokens), L := len(self.embeddings), -1)"
            "\n        x"),
    },
    exact_paper: {
        "LA_1 in all places": ("LA_j has an embedding of its own",
            "self.embeddings.expand(len(tokens), -1, -1)\n        return",
            "self.embeddings[:1].expand(len(tokens), len(self.embeddings), -1)\n        return"),
        "the look-ahead before the token": ("look-ahead tokens follow x_n",
            "return model(torch.cat([model.embed(tokens), embeddings], 1), cache)",
            "return model(torch.cat([embeddings, model.embed(tokens)], 1), cache)"),
        "drafts from another q": ("drafts are drawn from the q that judges them",
            "return draw(q, u), q", "return draw(q.flip(1), u), q"),
    },
    test_ended_rows: {
        "a finished row commits": ("a row that has ended stays where it is",
            COMMIT, "cache.commit(count)"),
        "a finished row of fused commits": ("a row that has ended stays where it is",
            "(1 + accepted) * s.alive)\n        group", "1 + accepted)\n        group"),
    },
    test_memory: {
        "memory shown to the text": ("the model is untouched",
            "torch.full((self.first,), 2**62", "torch.full((self.first,), 0"),
    },
    independent_rows: {
        "rows share their random numbers": ("rows are independent",
            "self.u.uniform_(generator=self.generator)",
            "self.u.copy_(self.u[:1].clone().uniform_(generator=self.generator))"),
        "the same random numbers at every step": ("steps are independent",
            "self.u.uniform_(generator=self.generator)",
            "self.u.uniform_(generator=self.generator.manual_seed(0))"),
    },
    exact_fused: {
        "the group of another draft": ("drafts follow the last accepted draft",
            "group.keep(h, logits, accepted)", "group.keep(h, logits, 0 * accepted)"),
    },
    test_groups: {
        "a group sees the groups before it": ("a group sees its node, the path to it, and itself",
            "visible[column, n + i * L:column + 1] = True", "visible[column, n:column + 1] = True"),
        "nodes see the root's group": ("ordinary tokens never see look-ahead tokens",
            "visible[i, path] = True",
            "visible[i, path] = True\n            visible[i, n:n + L] = True"),
        "positions by column in place of depth": ("siblings share a position",
            "offset = [len(set(path)) - 1 for path in paths]", "offset = list(range(n))"),
    },
    exact_tree: {
        "a sibling visible to a draft": ("a node sees the path to it",
            "visible[i, path] = True", "visible[i, :i + 1] = True"),
        "the accepted path not moved down": ("the cache holds the text",
            "cache.commit((1 + accepted) * s.alive, path)",
            "cache.commit((1 + accepted) * s.alive)"),
        "a child tried twice": ("a node whose children were all rejected is the last",
            "child[rank][some] = by_rank[rank]",
            "child[rank][:] = self.levels[0].child[rank] if d else 0\n"
            "                child[rank][some] = by_rank[rank]"),
        "children of another node": ("a draft follows its parent",
            "parents.sort(key=lambda i: -len(children(i)))", "pass"),
        "q of another node": ("the rule is given the q of the drafts",
            "residual(rest, q[rows, child])", "residual(rest, q[rows, child.clamp(max=1)])"),
        "judged at another temperature than the model's": ("p is the target's",
            "s.target_probs(logits[:, :1 + N])", "s.target_probs(logits[:, :1 + N] / 0.9)"),
    },
    test_rule_for_trees: {
        "p not reduced after a rejection": ("p <- norm(max(0, p - q)) after each sibling",
            "rest = residual(rest, q[rows, child])", "pass"),
        "p reduced but not renormalised": ("the residual is a distribution",
            "torch.where(total > 0, rest / total, p)", "torch.where(total > 0, rest, p)"),
        "a sibling tried after one was accepted": ("one child of a node is accepted at most",
            "(node == parent) & (u_q", "(node == node) & (u_q"),
        "a draft that could not be drawn is kept": ("a draft of q = 0 is no draft",
            ".masked_fill(q_draft == 0, math.inf)", ".index_fill(1, rows[:1] * 0, math.inf)"),
    },
    test_siblings: {
        "siblings drawn with replacement": ("siblings are drawn without replacement",
            "z.scatter(2, choice, -math.inf)[:", "z[:"),
        "one random number for all siblings": ("each decision has a random number of its own",
            "u[:, level.draws[rank]]", "u[:, level.draws[rank] * 0]"),
        "q not that of the sibling": ("each sibling's q is what it was drawn from",
            "nothing.scatter_(2, ids, q_node)",
            "nothing.scatter_(2, ids, probs(candidates.best[:, d, None].expand_as(z), s.params))"),
    },
    exact_draft_model: {
        "the draft model does not roll back": ("both caches roll back to the same text",
            "small.length.copy_(cache.length)", "pass"),
        "the draft model never reads its last draft": ("both caches hold the text",
            "draft_model(block[-1], small)  # for", "pass  # for"),
    },
    test_stops: {
        "a stop token inside an accepted run is overlooked": (
            "the text ends at the first stop token",
            "if token in stops:", "if token in stops and i == len(made.tokens) - 1:"),
        "text after a stop token": ("the text ends at the first stop token",
            "if self.ending:\n                break", "pass"),
        "the budget checked before the stop": ("a stop token at the end of the budget is a stop",
            "if token in stops:", "if token in stops and len(self.tokens) < self.room:"),
        "the budget overshot": ("no more tokens than were asked for",
            "elif len(self.tokens) == self.room:", "elif len(self.tokens) == self.room + 1:"),
        "the end of the context called a length": ("the reason is the one that applies",
            '"length" if max_new_tokens <= room else "context"', '"length"'),
    },
    test_recordable: {
        "the cache rebinds its length": ("what outlives a step is written in place",
            "self.length += count", "self.length = self.length + count"),
        "the group rebinds its buffer": ("what outlives a step is written in place",
            "torch.index_select(h.flatten(0, 1), 0, columns, out=self.h.flatten(0, 1))",
            "self.h = torch.index_select(h.flatten(0, 1), 0, columns).view_as(self.h)"),
        "x is rebound": ("what outlives a step is written in place",
            "self.x.copy_(last[:, None])", "self.x = last[:, None]"),
        "a step looks whether all was accepted": ("a step does not wait for the device",
            COMMIT, COMMIT + "\n        if (accepted == L).all():\n            pass"),
        "a step counts in Python": ("a step does not wait for the device",
            "shape.path[node], shape", "shape.path[node.tolist()], shape"),
    },
    test_model: {
        "heads of a group in the wrong order": ("query head h reads key/value head h // G",
            "q = q.view(B, T, K, G, E).transpose(1, 2)",
            "q = q.view(B, T, G, K, E).transpose(2, 3).transpose(1, 2)"),
        "rotary pairs interleaved": ("x_i turns with x_{i+E/2}",
            "x.roll(x.shape[-1] // 2, -1)", "x.roll(1, -1)"),
        "rotary angles reversed": ("(a, b) -> (a cos - b sin, b cos + a sin)",
            "torch.cat([-angle.sin(), angle.sin()], -1)",
            "torch.cat([angle.sin(), -angle.sin()], -1)"),
        "values rotated too": ("positions turn queries and keys only",
            "rotate_(qkv[:, :, :H + K], cos, sin)", "rotate_(qkv, cos, sin)"),
        "norm with another epsilon": ("RMSNorm divides by sqrt(mean(x^2) + eps)",
            "weight, self.config.norm_eps)", "weight, 0.1)"),
        "attention not scaled": ("scores are divided by sqrt(E)",
            "F.scaled_dot_product_attention(q, k, v, attn_mask=bias)",
            "F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1)"),
        "gate and up exchanged": ("SwiGLU is silu(gate) * up",
            "gate, up = linear(y", "up, gate = linear(y"),
        "rows see as far as the longest": ("a row sees its own committed columns",
            "self.place[:S] - self.length[:, None]",
            "self.place[:S] - self.length.max().expand_as(self.length)[:, None]"),
        "committed one too many": ("the cache holds what was committed",
            "self.length += count", "self.length += count + 1"),
        "a path committed in the order of the block": ("the path moves down in its order",
            "self.kv[:, :, self.rows, :, to] = kept", "pass"),
        "blocks begin in the memory": ("slots are [memory | committed | block]",
            "torch.arange(self.first, self.first + T,", "torch.arange(0, T,"),
        "one row written backwards": ("a block stands in its order",
            "copy_(kv.permute(2, 0, 3, 1, 4))", "copy_(kv.permute(2, 0, 3, 1, 4).flip(3))"),
    },
    test_types: {
        "norm of the sum in place of the mean": (
            "RMSNorm divides by sqrt(mean(x^2) + eps), in float32 too",
            "value=1 / x.shape[-1]", "value=1 / self.config.head_dim"),
    },
    test_gradients: {
        "kl the wrong way round": ("kl is KL(p || q)",
            'F.kl_div(log_q, p, reduction="sum")',
            'F.kl_div(p.log(), log_q.exp(), reduction="sum")'),
        "tv without its half": ("tv is 1 - sum_x min(p(x), q(x))",
            "(p - log_q.exp()).clamp(min=0)", "(p - log_q.exp()).abs()"),
        "the loss of each piece a mean of its own": ("the loss is a mean over all columns",
            "tokens[part], p) / len(h)", "tokens[part], p) / len(leaf)"),
    },
    test_expected: {
        "drafts after a rejected one expected": ("a chain ends at the first rejection",
            "(1, -1), value=1).cumprod(1)", "(1, -1), value=1)"),
        "a draft's own chance counted twice": ("draft j stands if those before it do",
            "F.pad(kept.clamp(max=1).view(-1, L), (1, -1), value=1)",
            "kept.clamp(max=1).view(-1, L)"),
    },
    test_evaluate: {
        "acceptance measured at another temperature": ("a table says what is accepted at its own",
            "params = Params(temperature)\n        measured",
            "params = Params(1)\n        measured"),
        "acceptance measured at the first position": ("texts stand where they are said to",
            "offset = torch.full((len(text),), position,", "offset = torch.full((len(text),), 0,"),
    },
    test_cover: {
        "p not reduced for the second candidate": ("p <- norm(max(0, p - q)) after each sibling",
            "logits.scatter(1, draw(residual(q, p), u)[:, None], -math.inf)\n"
            "        p = residual(p, q)\n",
            "logits.scatter(1, draw(residual(q, p), u)[:, None], -math.inf)\n"),
        "a refused candidate comes again": ("siblings are drawn without replacement",
            "logits = logits.scatter(1, draw(residual(q, p), u)[:, None], -math.inf)\n", "pass\n"),
        "what is refused drawn from q": ("a refused draft follows norm(max(0, q - p))",
            "draw(residual(q, p), u)[:, None]", "draw(q, u)[:, None]"),
    },
    test_figures: {
        "a step that kept n drafts counted as one that kept more": (
            "accepted_at_least[i] is the share of steps that kept i+1",
            "sum(n > i for", "sum(n >= i for"),
    },
    test_columns: {
        "trained for the token before": ("LA_j is trained for x_{n+j+1}",
            "text.gather(1, here + 1).flatten()", "text.gather(1, here).flatten()"),
        "trained one position too far": ("trained columns are the sampler's",
            "offset[:, None] + here, mask", "offset[:, None] + here + 1, mask"),
        "groups see each other in training": ("trained columns are the sampler's",
            "(place == place[:, None]).tril()", "(place >= 0).expand(M * L, -1).tril()"),
        "a group sees beyond its place in training": ("trained columns are the sampler's",
            "mask = slot < places", "mask = slot < 1 + places"),
    },
    test_frozen: {
        "a weight of the frozen model moves": ("the model is frozen",
            "    optimizer.step()\n", "    optimizer.step()\n    model.norm.data += 1e-6\n"),
    },
    test_freed: {
        "a step keeps its sampler": ("a sampler that nobody holds is freed",
            "weakref.proxy(self)", "self"),
    },
    test_interval: {
        "rounds taken for prompts": ("the interval holds for other prompts",
            "(resamples, n, 1), generator", "(resamples, n, rounds), generator"),
    },
    test_compared: {
        "prefill counted as decoding": ("times are those of decoding",
            'result["seconds"] - result["prefill_seconds"]', 'result["seconds"]'),
        "slower shown as faster": ("times as fast is plain time by this one's",
            "interval(plain / taken)", "interval(taken / plain)"),
    },
}


def caught(check, patches):
    """Plant it and run the check. Returns the message of the assertion that caught it, or None."""
    with planted(*patches) as code:
        try:
            check(code)
        except AssertionError as failure:
            return str(failure)
    return None


def main():
    torch.set_num_threads(1)
    known = [name for bugs in BUGS.values() for name in bugs]
    wanted = sys.argv[1:] or known
    if not set(wanted) <= set(known):
        sys.exit(f"no such bug: {', '.join(set(wanted) - set(known))}")
    survived = len(wanted)
    for check, bugs in BUGS.items():
        named = [name for name in bugs if name in wanted]
        if named:
            failure = caught(check, ())
            assert failure is None, f"{check.__name__} fails without a bug: {failure}"
        for name in named:
            claim, *patches = bugs[name]
            start = time.perf_counter()
            try:
                message = caught(check, zip(patches[::2], patches[1::2]))
                said = "NOT CAUGHT" if message is None else "caught"
            except DoesNotFit as error:
                message, said, claim = None, "DOES NOT FIT, adapt it", str(error)
            except Exception as error:  # a bug that merely crashes
                message, said, claim = None, "NOT CAUGHT", f"{type(error).__name__}: {error}"
            survived -= message is not None
            first_line = (message or "").partition("\n")[0]
            print(f"{said}: {name} ({claim}) by {check.__name__}, "
                  f"{time.perf_counter() - start:.1f} s\n    {first_line}", flush=True)
    print(f"{len(wanted) - survived} caught / {len(wanted)} planted")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
