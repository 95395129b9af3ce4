"""A LLaMA in one file: configuration, weights, key/value cache, forward pass, tokenizer.

One idea carries the repository: *a decoder is a choice of block*. `Llama.forward` runs a block of T columns per row through the
network after whatever the cache has committed; the caller says which tokens (or bare embeddings) stand in the columns, at
which positions, and what each may see, and afterwards commits the columns that turned out to be right. Prefill, plain
decoding and both passes of PaSS differ in nothing else.

Shapes: B batch rows, T block columns, S cache slots, V vocabulary, L look-ahead tokens, D width, R memory slots,
H query heads, K key/value heads, E width of a head. Read `Config`, `Cache`, `Llama.forward`, then go on to pass_sampler.py.
"""
import codecs
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


# ---------------------------------------------------------------------------------------------------------- configuration

# What this file computes. A checkpoint that wants anything else is refused by name, never run wrongly.
ONLY = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None,
        "quantization_config": None, "partial_rotary_factor": 1.0}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Config:
    """The part of a Hugging Face `config.json` that a LLaMA needs. `context` is the longest text in tokens."""
    vocab_size: int
    dim: int
    ffn_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope: dict  # {"rope_type": "default" | "linear" | "llama3", and that scaling's numbers}
    context: int
    tied: bool
    dtype: str
    stop_tokens: tuple

    @staticmethod
    def load(folder):
        """Read folder/config.json. Raises InputError for what is missing, malformed or not supported."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        if not isinstance(raw, dict) or "model_type" not in raw:
            raise InputError(f"{path} has no model_type; expected the config.json of a Hugging Face LLaMA")
        for key, supported in ONLY.items():
            if raw.get(key, supported) != supported:
                raise InputError(f"{path}: {key} = {raw[key]!r} is not supported, only {supported!r}")

        def number(key, default=None, kind=int):
            value = raw.get(key) if raw.get(key) is not None else default
            if type(value) not in (int, kind) or not 0 < value < 2 ** 31:
                raise InputError(f"{path}: {key} must be a positive {kind.__name__}, not {value!r}")
            return kind(value)

        # Rotary settings: `rope_theta` beside `rope_scaling`, or both in `rope_parameters` (transformers 5).
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
        needs = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                                  "original_max_position_embeddings")}
        if rope["rope_type"] not in needs:
            raise InputError(f"{path}: rotary scaling {rope['rope_type']!r} is not supported, only {', '.join(needs)}")
        for key in needs[rope["rope_type"]]:
            if not isinstance(rope.get(key), (int, float)) or rope[key] <= 0:
                raise InputError(f"{path}: rotary scaling {rope['rope_type']!r} needs a positive {key}")
        raw.setdefault("rope_theta", rope.get("rope_theta"))
        rope = {"rope_type": rope["rope_type"], **{key: float(rope[key]) for key in needs[rope["rope_type"]]}}

        n_heads, dim = number("num_attention_heads"), number("hidden_size")
        n_kv_heads = number("num_key_value_heads", n_heads)
        head_dim = number("head_dim", dim // n_heads)
        if n_heads % n_kv_heads or head_dim % 2:
            raise InputError(f"{path}: {n_heads} heads must be a multiple of {n_kv_heads} key/value heads, and head_dim "
                             f"{head_dim} even")
        dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        if dtype not in DTYPES:
            raise InputError(f"{path}: dtype {dtype!r} is not supported, only {', '.join(DTYPES)}")
        generation = Path(folder) / "generation_config.json"
        stop = read_json(generation).get("eos_token_id") if generation.exists() else None
        stop = stop if stop is not None else raw.get("eos_token_id")
        stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
        if not all(type(token) is int for token in stop):
            raise InputError(f"{path}: eos_token_id must be a token's id or a list of them, not {stop}")
        return Config(number("vocab_size"), dim, number("intermediate_size"), number("num_hidden_layers"), n_heads, n_kv_heads,
                      head_dim, number("rms_norm_eps", 1e-6, float), number("rope_theta", 10000.0, float), rope,
                      number("max_position_embeddings", 2048), bool(raw.get("tie_word_embeddings", False)), dtype, tuple(stop))


def rope_frequencies(config):
    """Angle by which each of the E/2 pairs of a head turns per position, (E/2,) float32: RoFormer, arXiv 2104.09864, eq. 15.

    "linear" squeezes all positions; "llama3" squeezes only wavelengths that are long against the original context.
    """
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    rope = config.rope
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # full turns in the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, unchanged; 0: long, squeezed
        return keep * frequency + (1 - keep) * frequency / rope["factor"]
    return frequency


# ------------------------------------------------------------------------------------------------------------------ cache

class Cache:
    """Keys and values of B rows. Slots of a row: [ memory R | committed | block T ].

    `length` (B,) counts the committed columns, per row, so rows of different lengths need no other code. `Llama.forward`
    writes its block after them and commits nothing: what `commit` does not keep, the next block overwrites. Rejecting a draft
    therefore costs nothing and cannot be forgotten.
    """

    def __init__(self, model, rows, slots, memory=None):
        """Room for `slots` columns per row, committed and block together. memory: (layers, 2, R, K, E) or None."""
        c, weight = model.config, model.embedding
        # (layers,B,S,2K,E), first the keys' heads. Zeros, not empty: a masked slot has weight 0, but 0 * NaN is NaN.
        self.kv = torch.zeros(c.n_layers, rows, slots, 2 * c.n_kv_heads, c.head_dim, dtype=weight.dtype, device=weight.device)
        self.length = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.memory = 0
        if memory is not None:
            self.set_memory(memory)

    def set_memory(self, memory):
        """Put memory (layers,2,R,K,E) before every row's columns. Out of place: in training its gradient flows through here."""
        self.memory = memory.shape[2]
        memory = memory.transpose(1, 2).flatten(2, 3)  # (layers,R,2K,E), as they lie in a row: first the keys' heads
        self.kv = torch.cat([memory[:, None].expand(-1, self.kv.shape[1], -1, -1, -1), self.kv], 2)

    def next(self):
        """(B,1): where in the flattened (B*S) slots each row's block begins."""
        rows, slots = self.kv.shape[1:3]
        return (torch.arange(rows, device=self.length.device) * slots + self.memory + self.length)[:, None]

    def block(self, T, visible, sees_memory, sees_committed):
        """Where the next block of T columns goes and what it sees; the arguments are those of `Llama.forward`.

        Returns slots (B,T) in the flattened (B*S), the range of slots that attention reads, and an additive mask (B,1,T,range)
        or None where every column sees all of the range.
        """
        rows, device = len(self.length), self.length.device
        stop = self.memory + int(self.length.max()) + T
        if stop > self.kv.shape[2]:
            raise IndexError(f"block of {T} columns ends at slot {stop} of {self.kv.shape[2]}")
        start = self.memory if sees_memory is None else 0  # without memory readers its slots are not even looked at
        column = torch.arange(T, device=device)
        slots = self.next() + column
        if rows == T == 1 and sees_memory is None and sees_committed is None:
            return slots, (start, stop), None
        at = torch.arange(start - self.memory, stop - self.memory, device=device)  # memory < 0 <= committed < length
        limit = self.length[:, None] if sees_committed is None else sees_committed
        seen = (at < limit[:, :, None]).expand(rows, T, -1).clone()  # memory and committed; the block's own columns come below
        if sees_memory is not None:
            seen &= (at >= 0) | sees_memory[..., None]  # the memory only for those that see it
        visible = torch.ones(T, T, dtype=torch.bool, device=device).tril() if visible is None else visible
        own = self.length[:, None, None] + column + self.memory - start  # where in `at` the block's columns are: (B,1,T)
        seen.scatter_(2, own.expand(rows, T, T), visible.expand(rows, T, T))
        mask = torch.zeros(seen.shape, dtype=self.kv.dtype, device=device).masked_fill_(~seen, -math.inf)
        return slots, (start, stop), mask[:, None]

    def commit(self, count, columns=None):
        """Keep, per row, the first `count` (an int or (B,)) of the block's columns.

        columns: (n,) or (B,n) block columns to keep in that order, for a path through a tree; None is 0, 1, 2, ...
        """
        if columns is not None:
            flat = self.kv.flatten(1, 2)  # a view: (layers, B*S, 2K, E)
            to = torch.arange(columns.shape[-1], device=columns.device)
            flat[:, self.next() + to] = flat[:, self.next() + columns]
        self.length = self.length + count


# ------------------------------------------------------------------------------------------------------------------ model

def packs(device):
    """Does PyTorch have the matrix product here that `pack` wants? FBGEMM's, on x86."""
    return torch.device(device).type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def pack(model):
    """Keep the matrices in float16 and compute in float32, in place; the model then decodes only.

    A pass over few columns is bound by reading the matrices. PyTorch's own product of bfloat16 matrices on a CPU rearranges all of
    a matrix at every call; this one, made for inference, finds it laid out once and for all, and reads it at the speed of the
    memory. What bfloat16 rounds between the products stays exact besides, so that methods differ by float32's rounding alone. The
    price is a cache, and an embedding, of float32.
    """
    from torch.ao.nn.quantized.dynamic import Linear
    for module in (model, *model.layers):
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if weight.ndim == 2 and name != "embedding":
                packed = Linear(1, 1, bias_=False, dtype=torch.float16)  # its shape is that of the weight it is given
                packed.set_weight_bias(weight.float(), None)
                delattr(module, name)
                setattr(module, name, packed.forward)
            else:
                setattr(module, name, nn.Parameter(weight.float(), requires_grad=False))


def linear(x, weight):
    """x (...,I) -> (...,O); weight (O,I), or what `pack` made of it."""
    return F.linear(x, weight) if torch.is_tensor(weight) else weight(x)


def rms_norm(x, weight=None, eps=1e-7):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467). On a CPU F.rms_norm makes eight small calls, a layer norm one, and
    that of [x, -x], whose mean is 0 and whose variance is mean(x^2), is the same."""
    D = x.shape[-1]
    if x.is_cuda:
        return F.rms_norm(x, (D,), weight, eps)
    x = F.layer_norm(torch.cat((x, -x), -1), (2 * D,), eps=eps)[..., :D]
    return x if weight is None else x * weight


class Layer(nn.Module):
    """Weights of one layer. q, k, v are one matrix and so are gate and up: each product is one call, one read of memory."""

    def __init__(self, c, **kind):
        super().__init__()
        self.attention_norm = nn.Parameter(torch.empty(c.dim, **kind))
        self.qkv = nn.Parameter(torch.empty((c.n_heads + 2 * c.n_kv_heads) * c.head_dim, c.dim, **kind))
        self.o = nn.Parameter(torch.empty(c.dim, c.n_heads * c.head_dim, **kind))
        self.ffn_norm = nn.Parameter(torch.empty(c.dim, **kind))
        self.gate_up = nn.Parameter(torch.empty(2 * c.ffn_dim, c.dim, **kind))
        self.down = nn.Parameter(torch.empty(c.dim, c.ffn_dim, **kind))


# For the whole process: on a GPU PyTorch may prefer cuDNN's attention, which plans anew for every new number of slots. demo/model
# took 17 ms a token on an H200 with it, where a pass at one length took 2.5.
torch.backends.cuda.enable_cudnn_sdp(False)


def attention(q, k, v, mask):
    """Softmax attention, q (B,K,N,E) over k and v (B,K,S,E), mask additive or None. Where gradients flow it is spelled out: on a
    CPU the backward pass of PyTorch's fused kernel takes longer than these two lines, and a training step 1.5 times as long."""
    if not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    return (scores if mask is None else scores + mask).softmax(-1) @ v


class Llama(nn.Module):
    """LLaMA (arXiv 2302.13971): RMSNorm before, rotary positions, grouped-query attention, SwiGLU. It knows nothing of PaSS."""

    def __init__(self, config, dtype=torch.float32, device="cpu"):
        """Weights are allocated but not set: use `Llama.load`, or fill `parameters()` yourself."""
        super().__init__()
        kind = dict(dtype=dtype, device=device)
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim, **kind))
        self.layers = nn.ModuleList(Layer(config, **kind) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.empty(config.dim, **kind))
        self.output = self.embedding if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.dim, **kind))
        turned = rope_frequencies(config).expand(config.n_heads + config.n_kv_heads, -1)
        self.frequency = F.pad(turned, (0, 0, 0, config.n_kv_heads)).to(device)  # (H+2K,E/2): values turn by nothing

    @property
    def dtype(self):
        """Type of the matrices; that of the arithmetic is the embedding's."""
        return self.output.dtype if torch.is_tensor(self.output) else torch.float16

    @property
    def precision(self):
        """Both types in words."""
        weights, arithmetic = str(self.dtype)[6:], str(self.embedding.dtype)[6:]
        return weights if weights == arithmetic else f"{weights} weights, {arithmetic} arithmetic"

    def embed(self, tokens):
        """(B,T) token ids -> (B,T,D)."""
        return F.embedding(tokens, self.embedding)

    def logits(self, h):
        """Output of `forward` (...,D) -> logits (...,V). Apart from forward, since most columns of most blocks need none."""
        return linear(h, self.output)

    def forward(self, x, positions, cache, visible=None, sees_memory=None, sees_committed=None):
        """Run one block after the committed columns of the cache; commits nothing.

        x: (B,T) token ids or (B,T,D) embeddings.  positions: (B,T), given and not derived: two columns may share one.
        visible: (T,T) bool, which block columns (second axis) a column (first axis) sees; None is causal.
        sees_memory: (T,) or (B,T) bool, which columns see the memory slots; None: no column does.
        sees_committed: (B,T), how many committed columns each column sees (training puts many groups after one text); None: all.
        Returns the last hidden states (B,T,D), normalised, ready for `logits`.
        """
        c = self.config
        x = x if x.is_floating_point() else self.embed(x)
        B, T, _ = x.shape
        H, K, E, G = c.n_heads, c.n_kv_heads, c.head_dim, c.n_heads // c.n_kv_heads
        slots, (start, stop), mask = cache.block(T, visible, sees_memory, sees_committed)
        slots = slots.flatten()
        mask = mask if mask is None else mask.repeat_interleave(G, 2)
        angle = positions[:, :, None, None] * self.frequency  # (B,T,H+2K,E/2)
        cos = torch.cat((angle.cos(), angle.cos()), -1).to(x.dtype)
        sin = torch.cat((-angle.sin(), angle.sin()), -1).to(x.dtype)

        for layer, cached in zip(self.layers, cache.kv.flatten(1, 2)):  # (B*S,2K,E)
            qkv = linear(rms_norm(x, layer.attention_norm, c.norm_eps), layer.qkv).view(B, T, H + 2 * K, E)
            qkv = torch.addcmul(qkv * cos, qkv.roll(E // 2, -1), sin)  # (a, b) -> (a cos - b sin, b cos + a sin), halves of E
            q, kv = qkv.split((H, 2 * K), 2)
            write = cached.index_copy if kv.requires_grad else cached.index_copy_  # in place, but where gradients flow
            cached = write(0, slots, kv.flatten(0, 1)).view(B, -1, 2 * K, E)
            k, v = cached[:, start:stop].transpose(1, 2).chunk(2, 1)  # each (B,K,S,E)
            # The G query heads that share a key/value head stand as G columns, so that k and v are read once and not repeated.
            q = q.view(B, T, K, G, E).transpose(1, 2).reshape(B, K, T * G, E)
            a = attention(q, k, v, mask)
            x = x + linear(a.view(B, K, T, G, E).transpose(1, 2).reshape(B, T, H * E), layer.o)
            gate, up = linear(rms_norm(x, layer.ffn_norm, c.norm_eps), layer.gate_up).chunk(2, -1)
            x = x + linear(F.silu(gate) * up, layer.down)
        return rms_norm(x, self.norm, c.norm_eps)

    def named_weights(self):
        """The weights under their Hugging Face names: views into the fused matrices, to read from and to write to."""
        c, E = self.config, self.config.head_dim
        named = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not c.tied:
            named["lm_head.weight"] = self.output
        for i, layer in enumerate(self.layers):
            q, k, v = layer.qkv.split((c.n_heads * E, c.n_kv_heads * E, c.n_kv_heads * E))
            gate, up = layer.gate_up.chunk(2)
            named |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in {
                "input_layernorm": layer.attention_norm, "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                "self_attn.o_proj": layer.o, "post_attention_layernorm": layer.ffn_norm, "mlp.gate_proj": gate,
                "mlp.up_proj": up, "mlp.down_proj": layer.down}.items()}
        return named

    @classmethod
    @torch.no_grad()
    def load(cls, folder, dtype=None, device="cpu", packed=True):
        """Load a Hugging Face folder: config.json and model.safetensors, or its shards and their index.

        dtype: a torch dtype to run in; None is the checkpoint's own.
        packed: on an x86 CPU, let `pack` make of float16, and of None for a half-precision checkpoint, what it can; training and
        saving want False.
        Each tensor is copied from the mapped file straight to its place, so no second copy of the model is held.
        Raises InputError that names what is wrong.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"no model folder {folder}; demo/model is one, or give a Hugging Face LLaMA folder")
        config = Config.load(folder)
        index = folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if not (folder / names[0]).exists() and index.exists():
            named = read_json(index)
            named = named.get("weight_map") if isinstance(named, dict) else None
            if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
                raise InputError(f"{index} has no weight_map of tensors to files")
            names = sorted(set(named.values()))
        own = DTYPES[config.dtype]
        packed = packed and packs(device) and (dtype == torch.float16 or dtype is None and own.itemsize == 2)
        try:
            model = cls(config, own if packed or dtype is None else dtype, device)
        except RuntimeError as error:
            raise InputError(f"{folder}: a model of the sizes in config.json does not fit into memory: "
                             f"{str(error).splitlines()[0]}") from None
        missing = model.named_weights()
        for path in (folder / name for name in names):
            with open_tensors(path) as file:
                for name in file.keys():
                    if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
                        continue  # old checkpoints carry what can be computed; a tied head is the embedding
                    target, source = missing.pop(name, None), file.get_slice(name)
                    if target is None:
                        raise InputError(f"{path}: tensor {name} does not belong to this model or comes twice")
                    if source.get_shape() != list(target.shape) or source.get_dtype() not in ("F32", "F16", "BF16"):
                        raise InputError(f"{path}: {name} is {source.get_dtype()} {source.get_shape()}, expected "
                                         f"F32, F16 or BF16 {list(target.shape)}")
                    if not target.copy_(file.get_tensor(name)).isfinite().all():
                        raise InputError(f"{path}: {name} has numbers that are not finite in {target.dtype}: damaged?")
        if missing:
            raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {next(iter(missing))}")
        if packed:
            pack(model)
        return model.requires_grad_(False)


# -------------------------------------------------------------------------------------------------------------- tokenizer

class Tokenizer:
    """Text to token ids and back. `encode(text)` gives ids, with the beginning-of-text token where the model uses one; `pieces[id]`
    is a token's bytes: none for control tokens, one of a character's for byte-fallback; `unk` is the unknown token's id, or None."""

    def __init__(self, encode, pieces, unk):
        self.encode, self.pieces, self.unk = encode, pieces, unk

    def stream(self):
        """A function from the next token id to the text that became whole with it.

        Bytes, not texts, are put together: a character of several tokens appears with its last one, never broken.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(self.pieces[token] if token < len(self.pieces) else b"")

    def decode(self, tokens):
        """The text that `stream` gives for all of `tokens`."""
        return "".join(map(self.stream(), tokens))


def sentencepiece_bytes(piece):
    return bytes.fromhex(piece[3:5]) if len(piece) == 6 and piece.startswith("<0x") else piece.replace("▁", " ").encode()


def load_tokenizer(folder, vocab_size):
    """folder/tokenizer.model through sentencepiece, else folder/tokenizer.json through the optional package `tokenizers`.

    Raises InputError where it is missing, damaged, or has more pieces than the model's vocab_size.
    """
    def checked(tokenizer):
        if len(tokenizer.pieces) > vocab_size:
            raise InputError(f"the tokenizer of {folder} has {len(tokenizer.pieces)} pieces and the model a vocabulary of "
                             f"{vocab_size}: they do not belong together")
        return tokenizer

    folder = Path(folder)
    config = folder / "tokenizer_config.json"
    config = read_json(config) if config.exists() else {}
    if (folder / "tokenizer.model").exists():
        from sentencepiece import SentencePieceProcessor
        try:
            sp = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot read {folder / 'tokenizer.model'}: {error}") from None
        bos = [sp.bos_id()] if config.get("add_bos_token", True) and sp.bos_id() >= 0 else []
        pieces = [b"" if sp.is_control(i) or sp.is_unused(i) else sentencepiece_bytes(sp.id_to_piece(i))
                  for i in range(sp.vocab_size())]
        return checked(Tokenizer(lambda text: bos + sp.encode(text), pieces, sp.unk_id() if sp.unk_id() >= 0 else None))

    path = folder / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{folder} has neither tokenizer.model nor tokenizer.json")
    try:
        import tokenizers
    except ImportError:
        raise InputError(f"{path} needs the optional package tokenizers: pip install tokenizers") from None
    try:
        hf = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise InputError(f"cannot read {path}: {error}") from None
    # GPT-2's byte-level alphabet: printable bytes stand for themselves, the others for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(other)}
    raw = json.loads(hf.to_str())
    byte_level, added = "ByteLevel" in json.dumps(raw["decoder"]), hf.get_added_tokens_decoder()

    def to_bytes(i):
        piece = hf.id_to_token(i) or ""
        if i in added:
            return b"" if added[i].special else added[i].content.encode()
        return bytes(byte[char] for char in piece) if byte_level else sentencepiece_bytes(piece)

    unk = config.get("unk_token") or raw["model"].get("unk_token")
    unk = hf.token_to_id(unk["content"] if isinstance(unk, dict) else unk) if unk else None
    return checked(Tokenizer(lambda text: hf.encode(text).ids, [to_bytes(i) for i in range(hf.get_vocab_size())], unk))


# ------------------------------------------------------------------------------------------------------- files and errors

class InputError(ValueError):
    """Bad input. Its text is one line that names the cause and the remedy; `run_script` shows it and exits with 2."""


def run_script(main):
    """Run a script's main(): bad input becomes one line on stderr and exit code 2, Ctrl-C 130, a closed pipe silence."""
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # of stdout: a full disk, or `| head -1`, where nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        if not isinstance(error, BrokenPipeError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


def device_named(name):
    """torch.device for --device; raises InputError where there is none."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"device {name!r} cannot be used here; --device cpu always can") from None


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def check_writable(path):
    """Raise InputError where a file could not be written later, when the work for it has been done."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise InputError(f"cannot write {path}: its folder must exist and be writable, and it must not be a folder itself")


def write_file(path, save):
    """save(path), but by way of a temporary name: whoever looks, and whenever we are killed, finds the old file or the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save(temporary)
        temporary.chmod(mode)  # safetensors' own files are for their owner only
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}") from None


def write_tensors(tensors, path, metadata=None):
    """Save as safetensors, through `write_file`."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata))


def open_tensors(path):
    """safe_open for PyTorch, with an InputError where the file is missing, truncated or something else."""
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder, and should be a safetensors file")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
