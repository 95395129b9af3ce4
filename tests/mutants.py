"""Planted bugs: each is a small patch of the real source, and each must be caught by an assertion
of the check that is named beside it.

    make mutants                                                # all of them: caught / planted
    .venv/bin/python tests/mutants.py "the ratio inverted"      # one

A mutant says which invariant it breaks; many are bugs that public implementations of speculative
sampling have had. A patch that no longer fits the source is an error here, and only here; so is a
mutant that merely crashes. To add one: "what is wrong": mutant("the invariant", check, "module",
"old source, there exactly once", "new source").
"""
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import torch

from common import planted
from exact import check_exact
from pass_sampler import Params
from test_beyond import BOTH, check_groups, check_rule_for_trees, check_siblings
from test_equivalence import check_joint, check_probs, check_rule, check_zeros
from test_model import check_model, check_one_row, check_types
from test_sampler import check_ended_rows, check_freed, check_memory, check_recordable, check_stops
from test_bench import check_compared, check_interval
from test_train import check_columns, check_expected, check_frozen, check_gradients


def exact_pass(code):
    check_exact(code, "pass", (0.5,), BOTH)
    check_exact(code, "pass", (1.0, 2), BOTH, steps=2)


def exact_fused(code):
    check_exact(code, "fused", (1.0, 2), BOTH, steps=2)


def exact_tree(code):
    check_exact(code, "tree", (1.0,), BOTH, "0 1")
    check_exact(code, "tree", (2.0, 2), BOTH, "0 1", steps=2)
    check_exact(code, "tree", (2.0, 2), BOTH, "0 1 00 10")
    check_exact(code, "tree", (0.0,), BOTH, "0 1 00", steps=3)


def exact_draft_model(code):
    check_exact(code, "draft-model", (1.0, 2), (), 2, steps=2)


def independent_rows(code):
    check_joint(code, "pass", Params(1))


class Mutant(NamedTuple):
    breaks: str  # the invariant
    check: Callable
    module: str
    patches: list


def mutant(breaks, check, module, *patches):
    return Mutant(breaks, check, module, list(zip(patches[::2], patches[1::2])))


RESIDUAL = "rest = (p - q).clamp(min=0)"
ACCEPT = "accept = u[:, :-1] * q_draft < p_draft"
LAST = "draw(residual(p_last, q_last), u[:, -1])"
COMMIT = "cache.commit(kept * s.alive)"
PASS_1 = "cache.commit(s.alive)  # x_n, and none of the look-ahead"
VERIFY = "accepted, last = verify(p, q, drafts, u[:, 1 + L:])"
SEES = "sees_memory = torch.arange(columns, device=x.device) >= T"
MUTANTS = {
    # The rejection rule (Leviathan et al. 2022, algorithm 1)
    "p in place of the residual": mutant(
        "a rejected draft is drawn anew from norm(max(0, p - q))", check_rule, "pass_sampler",
        RESIDUAL, "rest = p"),
    "residual of the absolute value": mutant(
        "the residual is 0 where q > p", check_rule, "pass_sampler",
        RESIDUAL, "rest = (p - q).abs()"),
    "residual not clamped": mutant(
        "the residual is not negative", check_rule, "pass_sampler", RESIDUAL, "rest = p - q"),
    "residual clamped to a small positive number": mutant(
        "no token outside of p's support comes out", check_zeros, "pass_sampler",
        RESIDUAL, "rest = (p - q).clamp(min=1e-9)"),
    "the ratio inverted": mutant(
        "accept while u < p/q", check_rule, "pass_sampler",
        ACCEPT, "accept = u[:, :-1] * p_draft < q_draft"),
    "the ratio clamped from below": mutant(
        "accept while u < p/q", check_rule, "pass_sampler",
        ACCEPT, "accept = u[:, :-1] < (p_draft / q_draft).clamp(min=0.2)"),
    "accepted where u equals p/q": mutant(
        "a draft of p = 0 is rejected, at u = 0 too", check_zeros, "pass_sampler",
        ACCEPT, "accept = u[:, :-1] * q_draft <= p_draft"),
    "the ratio 5 % too large": mutant(
        "accept while u < p/q", check_rule, "pass_sampler",
        ACCEPT, "accept = u[:, :-1] * q_draft < 1.05 * p_draft"),
    "half a percent of q not subtracted": mutant(
        "the residual is p - q", check_rule, "pass_sampler",
        RESIDUAL, "rest = (p - 0.995 * q).clamp(min=0)"),
    "accepted if merely possible": mutant(
        "accept while u < p/q", check_rule, "pass_sampler", ACCEPT, "accept = p_draft > 0"),
    "argmax in place of a draw": mutant(
        "what follows a rejection is drawn", check_rule, "pass_sampler",
        LAST, "residual(p_last, q_last).argmax(-1)"),
    "a draft accepted after a rejection": mutant(
        "nothing after the first rejection is kept", check_rule, "pass_sampler",
        "accept.long().cumprod(1).sum(1)", "accept.long().sum(1)"),
    "q of the last draft subtracted from the bonus": mutant(
        "after L acceptances draw from p itself", check_rule, "pass_sampler",
        "F.pad(q, (0, 0, 0, 1))[rows", "torch.cat([q, q[:, -1:]], 1)[rows"),
    "the bonus from the place before": mutant(
        "after a acceptances draw from p_{a+1}", check_rule, "pass_sampler",
        "p_last = p[rows, accepted]", "p_last = p[rows, accepted.clamp(max=p.shape[1] - 2)]"),
    "one random number for accepting and drawing": mutant(
        "accepting and drawing are independent", check_rule, "pass_sampler",
        LAST, "draw(residual(p_last, q_last), u[:, 0])"),
    "the draw may take a token of weight 0": mutant(
        "a token of probability 0 never comes out", check_zeros, "pass_sampler",
        "right=True)[..., 0]", "right=False)[..., 0]"),
    # p and q
    "top-p before the temperature": mutant(
        "temperature, then top-k, then top-p", check_probs, "pass_sampler",
        "    logits = logits / max(params.temperature, 1e-30)\n", "",
        "        p = p / p.sum(-1, keepdim=True)\n    return p\n",
        "        p = p / p.sum(-1, keepdim=True)\n"
        "    p = p ** (1 / max(params.temperature, 1e-30))\n"
        "    return p / p.sum(-1, keepdim=True)\n"),
    "top-p without the token that crosses it": mutant(
        "top-p keeps the token that crosses the threshold", check_probs, "pass_sampler",
        "before = falling.cumsum(-1) - falling", "before = falling.cumsum(-1)"),
    "top-p not renormalised": mutant(
        "p is a distribution", check_probs, "pass_sampler",
        "p = p / p.sum(-1, keepdim=True)", "pass"),
    "top-k cuts ties by position": mutant(
        "what ties with the k-th token is kept", check_probs, "pass_sampler",
        "logits = logits.masked_fill(logits < least, -math.inf)",
        "top = logits.topk(params.top_k)\n        logits = torch.full_like(logits, -math.inf)"
        ".scatter(-1, top.indices, top.values)"),
    "top-k off by one": mutant(
        "top-k keeps k tokens", check_probs, "pass_sampler",
        "values[..., -1:]", "values[..., -2:-1]"),
    "p and q of different parameters": mutant(
        "p and q are made by the same function", exact_pass, "pass_sampler",
        "p = s.probs(s.model.logits(s.model(block, cache)))",
        "p = s.probs(s.model.logits(s.model(block, cache)) / 0.9)"),
    "q not the one that was drawn from": mutant(
        "the rule is given the q of the drafts", exact_pass, "pass_sampler",
        VERIFY, VERIFY.replace("q,", "q**2 / (q**2).sum(-1, keepdim=True),")),
    "q in another precision": mutant(
        "the rule is given the q of the drafts", exact_pass, "pass_sampler",
        VERIFY, VERIFY.replace("q,", "q.bfloat16().to(q),")),
    # The steps
    "drafts judged by the columns after them": mutant(
        "p_i follows i - 1 drafts", exact_pass, "pass_sampler", VERIFY, VERIFY.replace(
            "verify(p,", "verify(p.roll(-1, 1),")),
    "a rejected draft left in the cache": mutant(
        "the cache holds the text", exact_pass, "pass_sampler",
        COMMIT, "cache.commit((2 + accepted).clamp(max=1 + L) * s.alive)"),
    "an accepted draft missing in the cache": mutant(
        "the cache holds the text", exact_pass, "pass_sampler",
        COMMIT, "cache.commit(accepted.clamp(min=1) * s.alive)"),
    "the cache cleared in place of rolled back": mutant(
        "the cache holds the text", exact_pass, "pass_sampler",
        COMMIT, "cache.commit(-cache.length * (accepted < L))"),
    "look-ahead committed with the token": mutant(
        "look-ahead tokens never enter the text", exact_pass, "pass_sampler",
        PASS_1, "cache.commit(2 * s.alive)"),
    "a finished row commits": mutant(
        "a row that has ended stays where it is", check_ended_rows, "pass_sampler",
        COMMIT, "cache.commit(kept)"),
    "a finished row of fused commits": mutant(
        "a row that has ended stays where it is", check_ended_rows, "fused",
        "cache.commit((1 + accepted) * s.alive)", "cache.commit(1 + accepted)"),
    "positions of row 0 for all rows": mutant(
        "rows may differ in length", exact_pass, "model",
        "positions = slots - cache.memory_slots",
        "positions = (slots - cache.memory_slots)[:1].expand(B, T)"),
    "look-ahead one position too far": mutant(
        "LA_j stands where x_{n+j} will", exact_pass, "pass_sampler",
        "return model(x, cache, positions, cache.mask",
        "positions = positions if visible is not None else cache.length[:, None] + torch.arange("
        "columns) + (torch.arange(columns) >= T)\n"
        "        return model(x, cache, positions, cache.mask"),
    "look-ahead all at one position": mutant(
        "LA_j stands where x_{n+j} will", exact_pass, "pass_sampler",
        "return model(x, cache, positions, cache.mask",
        "positions = positions if visible is not None else cache.length[:, None] + torch.arange("
        "columns).clamp(max=T)\n        return model(x, cache, positions, cache.mask"),
    "memory seen by ordinary tokens": mutant(
        "the model is untouched", exact_pass, "pass_sampler", SEES, SEES.replace(">= T", ">= 0")),
    "memory shown to the text": mutant(
        "the model is untouched", check_memory, "model",
        "committed = (slot >= 0) & (slot <", "committed = (slot <"),
    "memory not seen by the look-ahead": mutant(
        "the memory serves the look-ahead", exact_pass, "pass_sampler", SEES, "pass"),
    "rows share their random numbers": mutant(
        "rows are independent", independent_rows, "pass_sampler",
        "self.u.uniform_(generator=self.generator)",
        "self.u.copy_(self.u[:1].clone().uniform_(generator=self.generator))"),
    "the same random numbers at every step": mutant(
        "steps are independent", independent_rows, "pass_sampler",
        "self.u.uniform_(generator=self.generator)",
        "self.u.uniform_(generator=self.generator.manual_seed(0))"),
    "one random number for all drafts": mutant(
        "each decision has a random number of its own", exact_pass, "lookahead",
        "k = draw(q[-1], u[:, j:j + 1])", "k = draw(q[-1], u[:, :1])"),
    "the drafts' random numbers judge them": mutant(
        "each decision has a random number of its own", exact_pass, "pass_sampler",
        "u[:, 1 + L:])", "torch.cat([u[:, 1:1 + L], u[:, -1:]], 1))"),
    "the first draft drawn by the token's random number": mutant(
        "each decision has a random number of its own", exact_pass, "pass_sampler",
        "u[:, 1:1 + L])", "u[:, :L])"),
    "x is not the last token": mutant(
        "x is the last token of the text", exact_pass, "pass_sampler",
        "tokens.gather(1, count[:, None] - 1))\n        return", "tokens[:, :1])\n        return"),
    # The draft head
    "the head is given the first token throughout": mutant(
        "each q is given the draft before it", exact_pass, "lookahead",
        "drafts[-1])", "drafts[0])"),
    "drafts without the head": mutant(
        "the head corrects q", exact_pass, "lookahead",
        "z = best[:, j, None] + self.correction", "z = best[:, j, None] + 0 * self.correction"),
    "judged by a q without the head": mutant(
        "the rule is given the q of the drafts", exact_pass, "lookahead",
        "return torch.cat(drafts[1:], 1), q",
        "return torch.cat(drafts[1:], 1), probs(logits, params)"),
    "one q for all drafts": mutant(
        "the rule is given the q of the drafts", exact_pass, "lookahead",
        "2, ids, torch.cat(q, 1))", "2, ids, torch.cat(q[:1] * len(q), 1))"),
    # One pass per step, and trees
    "the group of another draft": mutant(
        "drafts follow the last accepted draft", exact_fused, "fused",
        "group.keep(h, logits, 1 + L, accepted)", "group.keep(h, logits, 1 + L, 0 * accepted)"),
    "the group of the draft after it": mutant(
        "drafts follow the last accepted draft", exact_fused, "fused",
        "group.keep(h, logits, 1 + L, accepted)",
        "group.keep(h, logits, 1 + L, (accepted + 1).clamp(max=L))"),
    "a group sees the groups before it": mutant(
        "a group sees its node, the path to it, and itself", check_groups, "fused",
        "visible[column, n + i * L:column + 1] = True", "visible[column, n:column + 1] = True"),
    "nodes see the root's group": mutant(
        "ordinary tokens never see look-ahead tokens", check_groups, "fused",
        "visible[i, path] = True", "visible[i, path] = True\n        visible[i, n:n + L] = True"),
    "positions by column in place of depth": mutant(
        "siblings share a position", check_groups, "fused",
        "offset = [len(path) - 1 for path in paths]", "offset = list(range(n))"),
    "a sibling visible to a draft": mutant(
        "a node sees the path to it", exact_tree, "fused",
        "visible[i, path] = True", "visible[i, :i + 1] = True"),
    "the accepted path not moved down": mutant(
        "the cache holds the text", exact_tree, "tree",
        "cache.commit((1 + accepted) * s.alive, path)", "cache.commit((1 + accepted) * s.alive)"),
    "p not reduced after a rejection": mutant(
        "p <- norm(max(0, p - q)) after each sibling", check_rule_for_trees, "tree",
        "rest = torch.where(tried[:, None], residual(rest, q_child), rest)", "pass"),
    "p reduced but not renormalised": mutant(
        "the residual is a distribution", check_rule_for_trees, "pass_sampler",
        "torch.where(total > 0, rest / total, p)", "torch.where(total > 0, rest, p)"),
    "a child tried twice": mutant(
        "a node whose children were all rejected is the last", exact_tree, "tree",
        "going = next_node != node\n", "going = next_node == next_node\n"),
    "a sibling tried after one was accepted": mutant(
        "one child of a node is accepted at most", check_rule_for_trees, "tree",
        "tried = going & (child > 0) & (next_node == node)", "tried = going & (child > 0)"),
    "a draft that could not be drawn is kept": mutant(
        "a draft of q = 0 is no draft", check_rule_for_trees, "tree",
        "accept = tried & (q_draft > 0) &", "accept = tried &"),
    "siblings drawn with replacement": mutant(
        "siblings are drawn without replacement", check_siblings, "tree",
        "z[:, with_child] = z[:, with_child].scatter(2, k[..., None], -math.inf)", "pass"),
    "one random number for all siblings": mutant(
        "each decision has a random number of its own", check_siblings, "tree",
        "k = draw(q_node, u[:, nodes - 1])", "k = draw(q_node, u[:, nodes * 0])"),
    "q not that of the sibling": mutant(
        "each sibling's q is what it was drawn from", check_siblings, "tree",
        "q_node = probs(z[:, with_child], s.params)\n            k = draw(q_node, u[:, nodes - 1])",
        "q_node = probs(best[:, d, None].expand_as(z)[:, with_child], s.params)\n"
        "            k = draw(probs(z[:, with_child], s.params), u[:, nodes - 1])"),
    "q of another node": mutant(
        "the rule is given the q of the drafts", exact_tree, "tree",
        "q_child = q[rows, child]", "q_child = q[rows, child.clamp(max=1)]"),
    "judged at another temperature than the model's": mutant(
        "p is the target's", exact_tree, "tree",
        "p = s.probs(logits[:, :1 + N])", "p = s.probs(logits[:, :1 + N] / 0.9)"),
    # The draft model
    "the draft model keeps a rejected draft": mutant(
        "both caches roll back to the same text", exact_draft_model, "draft_model",
        "small.length.copy_(cache.length)", "small.length.copy_(cache.length + (accepted < L))"),
    "the draft model does not roll back": mutant(
        "both caches roll back to the same text", exact_draft_model, "draft_model",
        "small.length.copy_(cache.length)", "pass"),
    "the draft model never reads its last draft": mutant(
        "both caches hold the text", exact_draft_model, "draft_model",
        "        draft_model(block[-1], small)  # for", "        # for"),
    # The loop
    "a stop token inside an accepted run is overlooked": mutant(
        "the text ends at the first stop token", check_stops, "pass_sampler",
        "if token in stops:", "if token in stops and i == count - 1:"),
    "text after a stop token": mutant(
        "the text ends at the first stop token", check_stops, "pass_sampler",
        "                        self.alive[row] = 0\n                        break\n",
        "                        self.alive[row] = 0\n"),
    "the budget checked before the stop": mutant(
        "a stop token at the end of the budget is a stop", check_stops, "pass_sampler",
        "if token in stops:", "if token in stops and len(texts[row]) < budget[row]:"),
    "the budget overshot": mutant(
        "no more tokens than were asked for", check_stops, "pass_sampler",
        "elif len(texts[row]) == budget[row]:", "elif len(texts[row]) == budget[row] + 1:"),
    "the end of the context called a length": mutant(
        "the reason is the one that applies", check_stops, "pass_sampler",
        '"length" if budget[row] == max_new_tokens else "context"', '"length"'),
    # What a GPU can record
    "the cache rebinds its length": mutant(
        "what outlives a step is written in place", check_recordable, "model",
        "self.length += count", "self.length = self.length + count"),
    "the group rebinds its buffer": mutant(
        "what outlives a step is written in place", check_recordable, "fused",
        "self.h.copy_(h[rows, columns])", "self.h = h[rows, columns]"),
    "x is rebound": mutant(
        "what outlives a step is written in place", check_recordable, "pass_sampler",
        "self.x.copy_(tokens.gather(1, count[:, None] - 1))\n        return",
        "self.x = tokens.gather(1, count[:, None] - 1)\n        return"),
    "a step looks whether all was accepted": mutant(
        "a step does not wait for the device", check_recordable, "pass_sampler",
        COMMIT, COMMIT + "\n        if (accepted == L).all():\n            pass"),
    "a step counts in Python": mutant(
        "a step does not wait for the device", check_recordable, "tree",
        "path, accepted = shape.path[node], shape.depths[node]",
        "path, accepted = shape.path[node.tolist()], shape.depths[node]"),
    # Model and cache
    "heads of a group in the wrong order": mutant(
        "query head h reads key/value head h // G", check_model, "model",
        "q = q.view(B, T, K, G, E).transpose(1, 2)",
        "q = q.view(B, T, G, K, E).transpose(2, 3).transpose(1, 2)"),
    "rotary pairs interleaved": mutant(
        "x_i turns with x_{i+E/2}", check_model, "model",
        "qkv.roll(E // 2, -1)", "qkv.roll(1, -1)"),
    "rotary angles reversed": mutant(
        "(a, b) -> (a cos - b sin, b cos + a sin)", check_model, "model",
        "torch.cat([-angle.sin(), angle.sin()], -1)", "torch.cat([angle.sin(), -angle.sin()], -1)"),
    "values rotated too": mutant(
        "positions turn queries and keys only", check_model, "model",
        "F.pad(turning, (0, 0, 0, config.n_kv_heads))",
        "F.pad(turning, (0, 0, 0, config.n_kv_heads), value=0.1)"),
    "norm with another epsilon": mutant(
        "RMSNorm divides by sqrt(mean(x^2) + eps)", check_model, "model",
        "weight, self.config.norm_eps)", "weight, 0.1)"),
    "norm of the sum in place of the mean": mutant(
        "RMSNorm divides by sqrt(mean(x^2) + eps), in float32 too", check_types, "model",
        "value=1 / x.shape[-1]", "value=1 / self.config.head_dim"),
    "attention not scaled": mutant(
        "scores are divided by sqrt(E)", check_model, "model",
        "F.scaled_dot_product_attention(q, k, v, attn_mask=bias)",
        "F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1)"),
    "gate and up exchanged": mutant(
        "SwiGLU is silu(gate) * up", check_model, "model",
        "gate, up = linear(y", "up, gate = linear(y"),
    "rows see as far as the longest": mutant(
        "a row sees its own committed columns", check_model, "model",
        "(slot < self.length[:, None, None])",
        "(slot < self.length.max().expand(rows)[:, None, None])"),
    "committed one too many": mutant(
        "the cache holds what was committed", check_model, "model",
        "self.length += count", "self.length += count + 1"),
    "a path committed in the order of the block": mutant(
        "the path moves down in its order", check_model, "model",
        "self.kv[:, :, rows, :, to] = kept", "pass"),
    "blocks begin in the memory": mutant(
        "slots are [memory | committed | block]", check_model, "model",
        "slots = self.memory_slots + self.length[:, None] +", "slots = self.length[:, None] +"),
    "one row written backwards": mutant(
        "a block stands in its order", check_one_row, "model",
        "block = seen[:, :, :, :, S - T:]", "block = seen[:, :, :, :, S - T:].flip(4)"),
    "all look-ahead tokens are the first": mutant(
        "LA_j has an embedding of its own", exact_pass, "pass_sampler",
        "groups = self.embeddings.repeat(", "groups = self.embeddings[:1].expand_as("
        "self.embeddings).repeat("),
    # Training
    "kl the wrong way round": mutant(
        "kl is KL(p || q)", check_gradients, "train_lookahead",
        'F.kl_div(log_q, p, reduction="sum")', 'F.kl_div(p.log(), log_q.exp(), reduction="sum")'),
    "tv without its half": mutant(
        "tv is 1 - sum_x min(p(x), q(x))", check_gradients, "train_lookahead",
        "(p - log_q.exp()).clamp(min=0)", "(p - log_q.exp()).abs()"),
    "the loss of each piece a mean of its own": mutant(
        "the loss is a mean over all columns", check_gradients, "train_lookahead",
        "tokens[part], p) / len(h)", "tokens[part], p) / len(leaf)"),
    "drafts after a rejected one expected": mutant(
        "a chain ends at the first rejection", check_expected, "train_lookahead",
        "(1, -1), value=1).cumprod(1)", "(1, -1), value=1)"),
    "a draft's own chance counted twice": mutant(
        "draft j stands if those before it do", check_expected, "train_lookahead",
        "F.pad(kept.clamp(max=1).view(-1, L), (1, -1), value=1)", "kept.clamp(max=1).view(-1, L)"),
    "trained for the token before": mutant(
        "LA_j is trained for x_{n+j+1}", check_columns, "train_lookahead",
        "text.gather(1, here + 1).flatten()", "text.gather(1, here).flatten()"),
    "trained one position too far": mutant(
        "trained columns are the sampler's", check_columns, "train_lookahead",
        "h = model(x, cache, offset[:, None] + here, mask)",
        "h = model(x, cache, offset[:, None] + here + 1, mask)"),
    "groups see each other in training": mutant(
        "trained columns are the sampler's", check_columns, "train_lookahead",
        "mask[:, :, start:] = (group == group[:, None]).tril()",
        "mask[:, :, start:] = (group >= 0).expand(M * L, -1).tril()"),
    "a group sees beyond its place in training": mutant(
        "trained columns are the sampler's", check_columns, "train_lookahead",
        "cache.memory_slots + places.repeat_interleave(L, 1)[:, :, None]",
        "cache.memory_slots + 1 + places.repeat_interleave(L, 1)[:, :, None]"),
    "a weight of the frozen model moves": mutant(
        "the model is frozen", check_frozen, "train_lookahead",
        "    optimizer.step()\n", "    optimizer.step()\n    model.norm.data += 1e-6\n"),
    "a step keeps its sampler": mutant(
        "a sampler that nobody holds is freed", lambda code: check_freed(code, ["pass"]),
        "pass_sampler", "weakref.proxy(self)", "self"),
    # What is measured
    "rounds taken for prompts": mutant(
        "the interval holds for other prompts", check_interval, "bench",
        "(resamples, n, 1), generator", "(resamples, n, rounds), generator"),
    "prefill counted as decoding": mutant(
        "times are those of decoding", check_compared, "bench",
        'result["seconds"] - result["prefill_seconds"]', 'result["seconds"]'),
    "slower shown as faster": mutant(
        "times as fast is plain time by this one's", check_compared, "bench",
        "interval(plain / taken)", "interval(taken / plain)"),
}


def caught(name):
    """Plant it and run its check. Returns the message of the assertion that caught it, or None."""
    bug = MUTANTS[name]
    with planted(**{bug.module: bug.patches}) as code:
        try:
            bug.check(code)
        except AssertionError as failure:
            return str(failure)
    return None


def main():
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(MUTANTS)
    if unknown := set(names) - set(MUTANTS):
        sys.exit(f"no such bugs: {', '.join(unknown)}; the table in {__file__} has their names")
    checks = {MUTANTS[name].check for name in names}
    for check in sorted(checks, key=lambda check: check.__name__):
        with planted() as code:
            check(code)  # a check that fails without a bug proves nothing
    print(f"{len(checks)} checks pass on the code as it is")
    survived = 0
    for name in names:
        bug, start = MUTANTS[name], time.perf_counter()
        try:
            message = caught(name)
        except Exception as error:  # a patch that does not fit, or a mutant that merely crashes
            message, bug = None, bug._replace(breaks=f"{type(error).__name__}: {error}")
        survived += message is None
        first_line = (message or "").partition("\n")[0]
        said = "NOT CAUGHT" if message is None else "caught"
        print(f"{said}: {name} ({bug.module}: {bug.breaks}) by {bug.check.__name__}, "
              f"{time.perf_counter() - start:.1f} s\n    {first_line}", flush=True)
    print(f"{len(names) - survived} caught / {len(names)} planted")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
