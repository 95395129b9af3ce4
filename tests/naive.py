"""The definitions once more, as slowly and plainly as they can be written: no cache, no batch, no
tensors, float64, plain loops. From the papers alone: LLaMA (arXiv 2302.13971), RoPE (2104.09864),
grouped heads (2305.13245), PaSS (2311.13581), speculative sampling (2211.17192). Nothing here is
shared with the code that it judges.

First the model, then `probs`, then one step of each method as an algorithm. Where an algorithm
takes a random number it says choose(i, weights): the outcome, an index into weights, that uniform
number i decides. tests/exact.py runs every outcome.
"""
import math


def product(matrix, x):
    return [sum(w * v for w, v in zip(row, x)) for row in matrix]


def softmax(z):
    weights = [math.exp(v - max(z)) for v in z]
    return [w / sum(weights) for w in weights]


def silu(v):
    return v / (1 + math.exp(-v))


def norm(x, eps, weight=None):
    scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + eps)
    return [v * scale * w for v, w in zip(x, weight or [1.0] * len(x))]


def rotate(x, position, theta):
    """Turn the pairs (x_i, x_{i+E/2}) by position * theta^(-2i/E)."""
    half = len(x) // 2
    turned = list(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return turned


class Model:
    """A Llama's weights under their Hugging Face names, as lists; optionally a look-ahead's.

    A column is (vector, position, columns that it sees, whether it sees the memory).
    """

    def __init__(self, llama, lookahead=None):
        self.config = llama.config
        self.w = {name: tensor.double().tolist() for name, tensor in llama.named_weights().items()}
        self.extra, self.known = {}, {}
        for name in ("embeddings", "memory", "head_in", "head_out"):
            part = getattr(lookahead, name, None)
            if part is not None:
                self.extra[name] = part.double().tolist()

    def states(self, columns):
        """What comes out of the last norm, for each column."""
        c, w, E = self.config, self.w, self.config.head_dim
        hidden = [list(vector) for vector, *_ in columns]
        for layer in range(c.n_layers):
            name = f"model.layers.{layer}.%s.weight"
            queries, keys, values = [], [], []
            for x, (_, position, *_) in zip(hidden, columns):
                x = norm(x, c.norm_eps, w[name % "input_layernorm"])
                q, k, v = (product(w[name % f"self_attn.{part}_proj"], x) for part in "qkv")
                q, k, v = ([z[i:i + E] for i in range(0, len(z), E)] for z in (q, k, v))
                queries.append([rotate(head, position, c.rope_theta) for head in q])
                keys.append([rotate(head, position, c.rope_theta) for head in k])
                values.append(v)
            for i, (_, _, sees, sees_memory) in enumerate(columns):
                mixed = []
                for head in range(c.n_heads):
                    shared = head // (c.n_heads // c.n_kv_heads)  # the key/value head of this group
                    pairs = [(keys[j][shared], values[j][shared]) for j in sorted(sees)]
                    if sees_memory and "memory" in self.extra:
                        k, v = self.extra["memory"][layer]
                        pairs += [(key[shared], value[shared]) for key, value in zip(k, v)]
                    query = queries[i][head]
                    scores = [sum(a * b for a, b in zip(query, k)) / math.sqrt(E) for k, _ in pairs]
                    share = softmax(scores)
                    mixed += [sum(s * v[e] for s, (_, v) in zip(share, pairs)) for e in range(E)]
                x = [a + b for a, b in zip(hidden[i], product(w[name % "self_attn.o_proj"], mixed))]
                y = norm(x, c.norm_eps, w[name % "post_attention_layernorm"])
                gate = product(w[name % "mlp.gate_proj"], y)
                up = product(w[name % "mlp.up_proj"], y)
                inner = [silu(g) * u for g, u in zip(gate, up)]
                hidden[i] = [a + b for a, b in zip(x, product(w[name % "mlp.down_proj"], inner))]
        return [norm(x, c.norm_eps, w["model.norm.weight"]) for x in hidden]

    def logits(self, state):
        return product(self.w.get("lm_head.weight", self.embedding), state)

    @property
    def embedding(self):
        return self.w["model.embed_tokens.weight"]

    def text(self, tokens):
        return [(self.embedding[t], i, set(range(i + 1)), False) for i, t in enumerate(tokens)]

    def next_logits(self, tokens):
        """Of the token after `tokens`, from the model itself."""
        key = tuple(tokens)
        if key not in self.known:
            self.known[key] = self.logits(self.states(self.text(tokens))[-1])
        return self.known[key]

    def draft_logits(self, tokens, between):
        """Of draft d_j, j = len(between). LA_1 .. LA_j stand after x_1 .. x_n = tokens, at the
        positions of x_{n+1} .. x_{n+j}, and see the memory. With a head, the state of LA_j is
        corrected for the token before d_j: between is x_{n+1}, d_1 .. d_{j-1}.
        tokens None: the columns have not run, and their states are 0."""
        key = (None if tokens is None else tuple(tokens), tuple(between))
        if key not in self.known:
            self.known[key] = self._draft_logits(tokens, between)
        return self.known[key]

    def _draft_logits(self, tokens, between):
        if tokens is None:
            h = [0.0] * self.config.dim
        else:
            n, columns = len(tokens), self.text(tokens)
            for j in range(len(between)):
                columns.append((self.extra["embeddings"][j], n + j, set(range(n + j + 1)), True))
            h = self.states(columns)[-1]
        if "head_in" in self.extra:
            e = self.embedding[between[-1]]
            inner = [silu(v) for v in product(self.extra["head_in"], norm(h, 1e-7) + norm(e, 1e-7))]
            h = [a + b for a, b in zip(h, product(self.extra["head_out"], inner))]
        return self.logits(h)


def probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Temperature, then top-k, then top-p; what ties with the last token kept is kept."""
    if temperature == 0:
        best = max(range(len(logits)), key=lambda token: logits[token])
        return [float(token == best) for token in range(len(logits))]
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    if top_k:
        least = sorted(weights)[-min(top_k, len(weights))]
        weights = [w if w >= least else 0.0 for w in weights]
    if top_p < 1:
        kept, least = 0.0, 0.0
        for w in sorted(weights, reverse=True):
            if kept < top_p * sum(weights):
                kept, least = kept + w, w
        weights = [w if w >= least else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


# ---------------------------------- one step of each method

def residual(p, q):
    """norm(max(0, p - q))."""
    rest = [max(0.0, a - b) for a, b in zip(p, q)]
    if sum(rest) < 1e-15:
        return p  # p = q: there is no rejection
    return [r / sum(rest) for r in rest]


def accepts(p, q, draft, choose, i):
    """Is the draft kept? With probability min(1, p/q)."""
    ratio = min(1.0, p[draft] / q[draft])
    return choose(i, [ratio, 1 - ratio]) == 0


def verify(p_after, drafts, q, choose, i):
    """Leviathan et al., algorithm 1. p_after(kept): the target after the drafts kept. Uniforms i,
    i+1, .. judge the drafts; the one after them makes the last draw."""
    kept = []
    for draft, q_draft in zip(drafts, q):
        p = p_after(kept)
        if not accepts(p, q_draft, draft, choose, i + len(kept)):
            return kept, choose(i + len(drafts), residual(p, q_draft))
        kept.append(draft)
    return kept, choose(i + len(drafts), p_after(kept))


def autoregressive(model, text, settings, choose, cold):
    return [], [], choose(0, probs(model.next_logits(text), *settings))


def chain(model, text, settings, choose, L, first, q_after):
    """Drafts d_1 .. d_L by uniforms first, first+1, ..; then `verify`. q_after(drafts so far)."""
    drafts, q = [], []
    for j in range(L):
        q.append(probs(q_after(drafts), *settings))
        drafts.append(choose(first + j, q[j]))
    return verify(lambda kept: probs(model.next_logits(text + kept), *settings), drafts, q, choose,
                  first + L)


def parallel(model, text, settings, choose, cold, L):
    """PaSS, algorithm 1: a token of the model, then drafts of what follows it."""
    x = choose(0, probs(model.next_logits(text), *settings))
    q_after = lambda drafts: model.draft_logits(text, [x, *drafts])
    return [x], *chain(model, text + [x], settings, choose, L, 1, q_after)


def fused(model, text, settings, choose, cold, L):
    """The look-ahead stood before the last token, or, in the first step, has not run (cold)."""
    before = None if cold else text[:-1]
    q_after = lambda drafts: model.draft_logits(before, [text[-1], *drafts])
    return [], *chain(model, text, settings, choose, L, 0, q_after)


def draft_model(model, text, settings, choose, cold, L, small):
    q_after = lambda drafts: small.next_logits(text + drafts)
    return [], *chain(model, text, settings, choose, L, 0, q_after)


def tree(model, text, settings, choose, cold, paths):
    """Candidates are drawn one after the other, each from what is left of q; and judged so, of
    p."""
    paths = sorted(paths, key=lambda path: (len(path), path))
    before = None if cold else text[:-1]
    token, q = {"": text[-1]}, {}
    for i, path in enumerate(paths):
        above = [token[path[:d]] for d in range(len(path))]
        logits = list(model.draft_logits(before, above))
        for rank in range(int(path[-1])):
            logits[token[path[:-1] + str(rank)]] = -math.inf
        q[path] = probs(logits, *settings)
        token[path] = choose(i, q[path])
    node, kept = "", []
    p = probs(model.next_logits(text), *settings)
    for i, path in enumerate(paths):
        if path[:-1] != node:
            continue
        if accepts(p, q[path], token[path], choose, len(paths) + 1 + i):
            node, kept = path, kept + [token[path]]
            p = probs(model.next_logits(text + kept), *settings)
        else:
            p = residual(p, q[path])
    return [], kept, choose(len(paths), p)
