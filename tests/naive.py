"""The definitions once more, as slowly and plainly as they can be written: no cache, no batch, no tensors, float64, plain loops.

From the papers alone: LLaMA (arXiv 2302.13971), RoPE (2104.09864), grouped heads (2305.13245), PaSS (2311.13581). Nothing here is
shared with the code that it judges. A column is (vector, position, columns that it sees, whether it sees the memory).
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
    """A Llama's weights under their Hugging Face names, as lists; optionally a look-ahead's."""

    def __init__(self, llama, lookahead=None):
        self.config, self.w = llama.config, {name: tensor.double().tolist() for name, tensor in llama.named_weights().items()}
        parts = {name: getattr(lookahead, name, None) for name in ("embeddings", "memory", "head_in", "head_out")}
        self.extra = {name: part.double().tolist() for name, part in parts.items() if part is not None}

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
                heads = lambda z: [z[i:i + E] for i in range(0, len(z), E)]
                queries.append([rotate(head, position, c.rope_theta) for head in heads(q)])
                keys.append([rotate(head, position, c.rope_theta) for head in heads(k)])
                values.append(heads(v))
            for i, (_, _, sees, sees_memory) in enumerate(columns):
                mixed = []
                for head in range(c.n_heads):
                    shared = head // (c.n_heads // c.n_kv_heads)  # the key/value head of this group
                    pairs = [(keys[j][shared], values[j][shared]) for j in sorted(sees)]
                    if sees_memory and "memory" in self.extra:
                        k, v = self.extra["memory"][layer]
                        pairs += [(key[shared], value[shared]) for key, value in zip(k, v)]
                    share = softmax([sum(a * b for a, b in zip(queries[i][head], k)) / math.sqrt(E) for k, _ in pairs])
                    mixed += [sum(s * v[e] for s, (_, v) in zip(share, pairs)) for e in range(E)]
                x = [a + b for a, b in zip(hidden[i], product(w[name % "self_attn.o_proj"], mixed))]
                y = norm(x, c.norm_eps, w[name % "post_attention_layernorm"])
                gate, up = product(w[name % "mlp.gate_proj"], y), product(w[name % "mlp.up_proj"], y)
                hidden[i] = [a + b for a, b in zip(x, product(w[name % "mlp.down_proj"], [silu(g) * u for g, u in zip(gate, up)]))]
        return [norm(x, c.norm_eps, w["model.norm.weight"]) for x in hidden]

    def logits(self, state):
        return product(self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"]), state)

    def text(self, tokens):
        return [(self.w["model.embed_tokens.weight"][t], i, set(range(i + 1)), False) for i, t in enumerate(tokens)]

    def next_logits(self, tokens):
        """Of the token after `tokens`, from the model itself."""
        return self.logits(self.states(self.text(tokens))[-1])

    def draft_logits(self, tokens, between):
        """Of draft d_j, j = len(between): LA_1 .. LA_j stand after x_1 .. x_n = tokens, at the positions of x_{n+1} .. x_{n+j}, and
        see the memory. With a head, the state of LA_j is corrected for the token before d_j: between is x_{n+1}, d_1 .. d_{j-1}."""
        n, columns = len(tokens), self.text(tokens)
        for j in range(len(between)):
            columns.append((self.extra["embeddings"][j], n + j, set(range(n + j + 1)), True))
        h = self.states(columns)[-1]
        if "head_in" in self.extra:
            e = self.w["model.embed_tokens.weight"][between[-1]]
            inside = [silu(v) for v in product(self.extra["head_in"], norm(h, 1e-7) + norm(e, 1e-7))]
            h = [a + b for a, b in zip(h, product(self.extra["head_out"], inside))]
        return self.logits(h)


def probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Temperature, then top-k, then top-p; what ties with the last token kept is kept."""
    if temperature == 0:
        return [float(i == max(range(len(logits)), key=lambda j: logits[j])) for i in range(len(logits))]
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
