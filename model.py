"""LLaMA in one file: configuration, key/value cache, forward pass, loading.

A *block* is T columns per row: tokens, or vectors in the place of tokens. `Llama.forward` runs a
block after the text that the cache holds. The caller says at which positions the columns stand and
what each of them sees, and afterwards commits the columns that turned out to be right; the others
are as if they had never run. Prefill, plain decoding and both passes of PaSS differ in nothing
else: a decoder is a choice of blocks.

Shapes: B batch rows, T block columns, S cache slots, V vocabulary, D width, R memory slots,
H query heads, K key/value heads, G = H/K, E width of a head.
Read `Config`, `Cache`, `Llama.forward`; then go on to pass_sampler.py.
"""
import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from files import (
    DTYPES, InputError, device_named, load_tokenizer, open_tensors, read_config, weight_files)

# -------------------------------------------- configuration

@dataclass(frozen=True)
class Config:
    """What a LLaMA needs of a Hugging Face `config.json`. context: the longest text, in tokens."""
    vocab_size: int
    dim: int
    ffn_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope: dict  # {"rope_type": "default", "linear" or "llama3", and what that needs}
    context: int
    tied: bool  # the output matrix is the embedding
    dtype: str
    stop_tokens: tuple

    @staticmethod
    def load(folder):
        """Read folder/config.json. Raises InputError where that cannot be, or is not supported."""
        return Config(**read_config(folder))


# ---------------------------------------------------- cache

class Cache:
    """Keys and values of B rows. Slots of a row: [ memory R | committed | block T ].

    `length` (B,) counts the committed columns per row, so rows of different lengths need no code of
    their own. `Llama.forward` writes its block after them and commits nothing: what `commit` does
    not keep, no mask shows again. So rejecting a draft costs nothing and cannot be forgotten.
    """

    def __init__(self, model, rows, slots):
        """Room for `slots` columns per row, committed and block together."""
        c = model.config
        like = model.embedding
        # Zeros, not empty: a slot that is not seen has weight 0, but 0 * NaN is NaN. In this order
        # the keys of a layer are (B*K,S,E) without a copy, which is what a GPU multiplies.
        self.kv = like.new_zeros(c.n_layers, 2, rows, c.n_kv_heads, slots, c.head_dim)
        self.length = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.memory_slots = 0  # R
        self.reads_all = like.is_cuda  # a GPU wants fixed shapes: it looks at all slots

    def with_memory(self, memory):
        """This cache with memory (layers,2,R,K,E), keys and values, before the text of every row.

        Only columns that ask for it see it (`mask`). Gradients flow to the memory.
        """
        cache = copy.copy(self)
        rows = self.kv.shape[2]
        memory = memory.transpose(2, 3)[:, :, None]  # (layers,2,1,K,R,E)
        cache.kv = torch.cat([memory.expand(-1, -1, rows, -1, -1, -1), self.kv], 4)
        cache.memory_slots = memory.shape[4]
        return cache

    def next(self, T):
        """(B,1) and (B,T): rows and slots, as indices, of the next block of T columns."""
        rows = len(self.length)
        device = self.length.device
        slots = self.memory_slots + self.length[:, None] + torch.arange(T, device=device)
        return torch.arange(rows, device=device)[:, None], slots

    def mask(self, T, visible=None, sees_memory=None):
        """(B,T,S): which slots the columns of the next block see. All of them see the committed.

        visible (T,T): which columns of the block (second axis) a column (first axis) sees, itself
        included; None is causal. sees_memory (T,): which columns see the memory; None is none.
        """
        rows = len(self.length)
        device = self.length.device
        S = self.kv.shape[4] if self.reads_all else self.memory_slots + int(self.length.max()) + T
        slot = torch.arange(S, device=device) - self.memory_slots  # the memory is negative
        committed = (slot >= 0) & (slot < self.length[:, None, None])
        seen = committed.repeat(1, T, 1)
        if sees_memory is not None:
            seen |= sees_memory[:, None] & (slot < 0)
        if visible is None:
            visible = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        block = self.next(T)[1][:, None].expand(rows, T, T)
        return seen.scatter_(2, block, visible.expand(rows, T, T))

    def commit(self, count, columns=None):
        """Keep, per row, the first `count` (an int, or (B,)) columns of the block that just ran.

        columns (B,n): keep these, in this order, in place of 0, 1, 2, ..: a path through a tree.
        In place: a view of `length` changes with it.
        """
        if columns is not None:
            rows, to = self.next(columns.shape[1])
            kept = self.kv[:, :, rows, :, to[:, :1] + columns]  # (B,n,layers,2,K,E)
            self.kv[:, :, rows, :, to] = kept
        self.length += count


# ---------------------------------------------------- model

def rope_frequencies(config):
    """(E/2,): the angle by which each pair of a head turns per position (arXiv 2104.09864, eq. 15).

    "linear" squeezes all positions; "llama3" only the wavelengths that are long against the context
    of the first training.
    """
    E = config.head_dim
    rope = config.rope
    frequency = config.rope_theta ** (-torch.arange(0, E, 2, dtype=torch.float32) / E)
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short, unchanged; 0: long, squeezed
        return keep * frequency + (1 - keep) * frequency / rope["factor"]
    return frequency


def attention(q, k, v, bias):
    """Softmax attention of q (B,K,N,E) over k, v (B,K,S,E); bias (B,1,N,S), 0 or -inf.

    A CPU has a fused kernel for it. A GPU's, given a mask, runs as few blocks as there are
    key/value heads: with 2048 slots an H200 took 2.5 times as long per pass as with plain products.
    Those train faster on a CPU too.
    """
    if q.device.type == "cpu" and not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    B, K, N, E = q.shape
    flat_q, flat_k, flat_v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    bias = bias.expand(-1, K, -1, -1).flatten(0, 1)  # (B*K,N,S)
    if q.requires_grad:
        scores = torch.baddbmm(bias.to(q.dtype), flat_q, flat_k.mT, alpha=E**-0.5)
    else:  # scores in float32: bfloat16 would round them
        scores = torch.baddbmm(bias, flat_q, flat_k.mT, alpha=E**-0.5, out_dtype=bias.dtype)
    return torch.bmm(scores.softmax(-1).to(v.dtype), flat_v).view(q.shape)


def linear(x, weight):
    """x (..,I) -> (..,O); weight (O,I), or what `Llama.pack` made of it."""
    if torch.is_tensor(weight):
        return F.linear(x, weight)
    return torch.ops.quantized.linear_dynamic_fp16(x, weight)


class Layer(nn.Module):
    """Weights of one layer. q, k, v are one matrix, and so are gate and up: one product each."""

    def __init__(self, c, **like):
        super().__init__()
        qkv = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
        self.attention_norm = nn.Parameter(torch.empty(c.dim, **like))
        self.qkv = nn.Parameter(torch.empty(qkv, c.dim, **like))
        self.o = nn.Parameter(torch.empty(c.dim, c.n_heads * c.head_dim, **like))
        self.ffn_norm = nn.Parameter(torch.empty(c.dim, **like))
        self.gate_up = nn.Parameter(torch.empty(2 * c.ffn_dim, c.dim, **like))
        self.down = nn.Parameter(torch.empty(c.dim, c.ffn_dim, **like))


class Llama(nn.Module):
    """LLaMA (arXiv 2302.13971): RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    def __init__(self, config, dtype=torch.float32, device="cpu"):
        """Weights are allocated but not set: use `Llama.load`, or fill `parameters()` yourself."""
        super().__init__()
        like = dict(dtype=dtype, device=device)
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim, **like))
        self.layers = nn.ModuleList(Layer(config, **like) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.empty(config.dim, **like))
        self.output = self.embedding
        if not config.tied:
            self.output = nn.Parameter(torch.empty(config.vocab_size, config.dim, **like))
        # (H+2K,E/2). Queries and keys turn, values do not: one product turns all heads at once.
        turning = rope_frequencies(config).expand(config.n_heads + config.n_kv_heads, -1)
        self.frequency = F.pad(turning, (0, 0, 0, config.n_kv_heads)).to(device)
        self.eps = torch.tensor(config.norm_eps, device=device)

    @property
    def dtype(self):
        """Type of the matrices; that of the arithmetic is the embedding's."""
        return self.output.dtype if torch.is_tensor(self.output) else torch.float16

    @property
    def precision(self):
        """Both types, in words."""
        weights, arithmetic = str(self.dtype)[6:], str(self.embedding.dtype)[6:]
        return weights if weights == arithmetic else f"{weights} weights, {arithmetic} arithmetic"

    def embed(self, tokens):
        """(B,T) token ids -> (B,T,D)."""
        return F.embedding(tokens, self.embedding)

    def logits(self, h):
        """Output of `forward` (..,D) -> logits (..,V). Apart, since many columns need none."""
        return linear(h, self.output)

    def rms_norm(self, x, weight):
        """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""
        if x.is_cuda or x.dtype != torch.float32:
            return F.rms_norm(x, x.shape[-1:], weight, self.config.norm_eps)
        # On a CPU that is eight small calls. By way of |x| a step of SmolLM2 is 4 % faster.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt()
        return x * scale * weight

    def forward(self, x, cache, positions=None, mask=None):
        """Run one block after the committed columns of the cache. Commits nothing.

        x: (B,T) token ids or (B,T,D) embeddings.
        positions: (B,T); None is the next ones. Two columns may share one.
        mask: (B,T,S) bool, which slots each column sees, see `Cache.mask`; None is causal.
        Returns the last hidden states (B,T,D), normalised, ready for `logits`.
        """
        c = self.config
        if not x.is_floating_point():
            x = self.embed(x)
        B, T, _ = x.shape
        H, K, E, G = c.n_heads, c.n_kv_heads, c.head_dim, c.n_heads // c.n_kv_heads
        rows, slots = cache.next(T)
        if positions is None:
            positions = slots - cache.memory_slots
        if mask is None:
            mask = cache.mask(T)
        S = mask.shape[2]

        # The G query heads that share a key/value head stand as G columns: k and v are read once.
        wide = torch.promote_types(x.dtype, torch.float32) if x.is_cuda else x.dtype
        bias = torch.zeros(mask.shape, dtype=wide, device=x.device).masked_fill_(~mask, -math.inf)
        bias = bias.repeat_interleave(G, 1)[:, None]  # (B,1,T*G,S)

        # Rotary positions turn pairs (x_i, x_{i+E/2}): (a, b) -> (a cos - b sin, b cos + a sin).
        angle = positions[:, :, None, None] * self.frequency  # (B,T,H+2K,E/2)
        cos = torch.cat([angle.cos(), angle.cos()], -1).to(x.dtype)
        sin = torch.cat([-angle.sin(), angle.sin()], -1).to(x.dtype)

        # Where the block goes. One row on a CPU is written as a slice: a step is 4 % faster.
        seen = cache.kv[:, :, :, :, :S]
        block = seen[:, :, :, :, S - T:].permute(0, 2, 4, 1, 3, 5)  # (layers,B,T,2,K,E)
        one_row = B == 1 and not cache.reads_all

        for layer, cached, new in zip(self.layers, seen, block):
            y = self.rms_norm(x, layer.attention_norm)
            qkv = linear(y, layer.qkv).view(B, T, H + 2 * K, E)
            qkv = torch.addcmul(qkv * cos, qkv.roll(E // 2, -1), sin)
            q, kv = qkv.split((H, 2 * K), 2)
            kv = kv.view(B, T, 2, K, E)
            if kv.requires_grad:
                cached = cached.clone()  # autograd needs what attention read
            if one_row and not kv.requires_grad:
                new.copy_(kv)
            else:
                cached[:, rows, :, slots] = kv
            keys, values = cached  # each (B,K,S,E)
            q = q.view(B, T, K, G, E).transpose(1, 2).reshape(B, K, T * G, E)
            a = attention(q, keys, values, bias)
            a = a.view(B, K, T, G, E).transpose(1, 2).reshape(B, T, H * E)
            x = x + linear(a, layer.o)
            y = self.rms_norm(x, layer.ffn_norm)
            gate, up = linear(y, layer.gate_up).chunk(2, -1)
            x = x + linear(F.silu(gate) * up, layer.down)
        return self.rms_norm(x, self.norm)

    def named_weights(self):
        """The weights by their Hugging Face names: views of the fused matrices."""
        c = self.config
        E = c.head_dim
        named = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not c.tied:
            named["lm_head.weight"] = self.output
        for i, layer in enumerate(self.layers):
            q, k, v = layer.qkv.split((c.n_heads * E, c.n_kv_heads * E, c.n_kv_heads * E))
            gate, up = layer.gate_up.chunk(2)
            parts = {
                "input_layernorm": layer.attention_norm,
                "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                "self_attn.o_proj": layer.o,
                "post_attention_layernorm": layer.ffn_norm,
                "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down,
            }
            for name, tensor in parts.items():
                named[f"model.layers.{i}.{name}.weight"] = tensor
        return named

    @classmethod
    @torch.no_grad()
    def load(cls, folder, dtype=None, device="cpu", packed=True):
        """Load a Hugging Face folder: config.json, and model.safetensors or shards and their index.

        dtype: a torch dtype to run in; None is the checkpoint's own. packed: on an x86 CPU let
        `pack` have the matrices of a half-precision model; False to read or train them. No second
        copy of the model is held. Raises InputError that names what is wrong.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"no model folder {folder} here; the repository has demo/model")
        config = Config.load(folder)
        own = DTYPES[config.dtype]
        half = dtype == torch.float16 or dtype is None and own.itemsize == 2
        packed = packed and half and has_fbgemm(device)
        try:
            model = cls(config, own if packed or dtype is None else dtype, device)
        except RuntimeError as error:
            raise InputError(f"{folder}: a model of the sizes in config.json does not fit into "
                             f"memory: {str(error).splitlines()[0]}") from None
        missing = model.named_weights()
        head = None
        for path in weight_files(folder):
            with open_tensors(path) as file:
                for name in file.keys():
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # old checkpoints carry what is computed here
                    if config.tied and name == "lm_head.weight":
                        head = torch.empty_like(model.embedding)
                        copy_weight(head, file, name, path)
                        continue
                    if name not in missing:
                        raise InputError(f"{path}: tensor {name} does not belong to this model, or "
                                         f"comes twice")
                    copy_weight(missing.pop(name), file, name, path)
        if head is not None and missing.pop("model.embed_tokens.weight", None) is not None:
            model.embedding.copy_(head)
        elif head is not None and not torch.equal(head, model.embedding):
            model.output = nn.Parameter(head)  # config.json is wrong: they are not tied
            model.config = replace(config, tied=False)
        if missing:
            raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is "
                             f"{[*missing][0]}")
        if packed:
            pack(model)
        return model.requires_grad_(False)


def load_model(args, packed=True):
    """The model and the tokenizer that a command line names, see `files.add_common`."""
    model = Llama.load(args.model, DTYPES.get(args.dtype), device_named(args.device), packed)
    return model, load_tokenizer(args.model, model.config.vocab_size)


FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights in files


def copy_weight(target, file, name, path):
    """Copy tensor `name` of an open file to its place, where it must fit."""
    source = file.get_slice(name)
    found = f"{source.get_dtype()} {source.get_shape()}"
    if source.get_shape() != list(target.shape) or source.get_dtype() not in FLOATS:
        raise InputError(f"{path}: {name} is {found}, expected {' or '.join(FLOATS)} "
                         f"{list(target.shape)}")
    if not target.copy_(file.get_tensor(name)).isfinite().all():
        raise InputError(f"{path}: {name} has numbers that are not finite in {target.dtype}: "
                         f"damaged?")


def has_fbgemm(device):
    """Is there what `pack` needs, a CPU with FBGEMM (x86)?"""
    engines = torch.backends.quantized.supported_engines
    return torch.device(device).type == "cpu" and "fbgemm" in engines


def pack(model):
    """Keep the matrices as float16 and compute in float32, in place. The model then only decodes.

    A pass over few columns takes as long as reading the matrices. PyTorch's own product of
    half-precision matrices rearranges them at every call; FBGEMM's arranges them once, here.
    Activations and cache stay float32, so methods agree to its rounding.
    """
    for module in (model, *model.layers):
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            fits = weight.abs().max() < torch.finfo(torch.float16).max
            if weight.ndim == 2 and name != "embedding" and fits:
                delattr(module, name)
                packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
                setattr(module, name, packed)
            else:
                setattr(module, name, nn.Parameter(weight.float(), requires_grad=False))
