"""LLaMA in one file: configuration, key/value cache, forward pass, loading.

A *block* is T columns per row: tokens, or vectors in the place of tokens. `Llama.forward` runs a
block after the text that the cache holds. The caller says at which positions the columns stand and
what each of them sees, and afterwards commits the columns that turned out to be right; the others
are as if they had never run. Prefill, plain decoding and both passes of PaSS differ in nothing
else: a decoder is a choice of blocks.

Shapes: B batch rows, T block columns, S cache slots, V vocabulary, D width, H query heads,
K key/value heads, G = H/K query heads per key/value head, E width of a head.
Read `Config`, `Cache`, `Llama.forward`; then go on to pass_sampler.py.
"""
import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.added_tokens import stop_tokens
from support.errors import DTYPES, InputError, device_named
from support.storage import copy_tensor, open_tensors, read_json, weight_files
from support.tokenizer import Tokenizer, load_tokenizer

# -------------------------------------------- configuration

# What this file computes. A checkpoint that wants anything else is refused by name.
ONLY = {
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "sliding_window": None, "quantization_config": None, "partial_rotary_factor": 1.0,
}
# Kinds of rotary scaling, and the numbers that each needs.
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


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
    stop_tokens: tuple[int, ...]

    @staticmethod
    def load(folder: str | Path) -> "Config":
        """Read folder/config.json. Raises InputError where that cannot be, or is not supported."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        if "model_type" not in raw:
            raise InputError(f"{path} has no model_type; expected the config.json of a LLaMA")
        for key, supported in ONLY.items():
            if raw.get(key) is not None and raw[key] != supported:
                raise InputError(f"{path}: {key} = {raw[key]!r} is not supported, only "
                                 f"{supported!r}")

        def number(key, default=None, type_=int, source=raw):
            value = source.get(key)
            value = default if value is None else value
            largest = 2**31 if type_ is int else 1e30
            largest = 2**12 if key == "num_hidden_layers" else largest  # each is an object
            if type(value) not in (int, type_) or not 0 < value < largest:
                raise InputError(f"{path}: {key} must be a positive {type_.__name__}, not "
                                 f"{str(value)[:40]}")
            return type_(value)

        # Rotary settings, with the precedence of transformers: `rope_scaling`, else
        # `rope_parameters`; in either `rope_theta`, else the one beside it.
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise InputError(f"{path}: rotary scaling must be an object, not {str(rope)[:40]!r}")
        scaling = rope.get("rope_type") or rope.get("type") or "default"
        if not isinstance(scaling, str) or scaling not in SCALINGS:
            raise InputError(f"{path}: rotary scaling {scaling!r} is not supported, only "
                             f"{', '.join(SCALINGS)}")
        numbers = {key: number(key, None, float, rope) for key in SCALINGS[scaling]}

        n_heads = number("num_attention_heads")
        n_kv_heads = number("num_key_value_heads", n_heads)
        dim = number("hidden_size")
        head_dim = number("head_dim", dim // n_heads)
        if n_heads % n_kv_heads or head_dim % 2:
            raise InputError(f"{path}: {n_heads} heads must be a multiple of {n_kv_heads} "
                             f"key/value heads, and head_dim {head_dim} even")
        dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise InputError(f"{path}: dtype {dtype!r} is not supported, only {', '.join(DTYPES)}")
        return Config(
            vocab_size=number("vocab_size"), dim=dim, ffn_dim=number("intermediate_size"),
            n_layers=number("num_hidden_layers"), n_heads=n_heads, n_kv_heads=n_kv_heads,
            head_dim=head_dim, norm_eps=number("rms_norm_eps", 1e-6, float),
            rope_theta=number("rope_theta", number("rope_theta", 10000.0, float), float, rope),
            rope={"rope_type": scaling, **numbers},
            context=number("max_sequence_length", number("max_position_embeddings", 2048)),
            tied=bool(raw.get("tie_word_embeddings", False)), dtype=dtype,
            stop_tokens=stop_tokens(path.parent))


# ---------------------------------------------------- cache

class Cache:
    """Keys and values of B rows. The slots of a row are [ committed | block T | not used yet ].

    `length` (B,) counts the committed columns per row, so rows of different lengths need no code of
    their own. `Llama.forward` writes its block after them and commits nothing: what `commit` does
    not keep, no mask shows again. So rejecting a draft costs nothing and cannot be forgotten.
    """

    first = 0  # the slot where texts begin

    def __init__(self, model: "Llama", rows: int, slots: int):
        """Room for `slots` columns per row, committed and block together."""
        c = model.config
        like = model.embedding
        # Zeros, not empty: a slot that is not seen has weight 0, but 0 * NaN is NaN. In this order
        # the keys of a layer are (B*K,S,E) without a copy, which is what a GPU multiplies.
        self.kv = like.new_zeros(c.n_layers, 2, rows, c.n_kv_heads, slots, c.head_dim)
        self.length = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.rows = torch.arange(rows, device=like.device)[:, None]  # (B,1)
        self.place = torch.arange(1, 1 + slots, device=like.device)  # of a slot in the text
        self.reads_all = like.is_cuda  # A CUDA graph has fixed shapes: it looks at all slots.

    def slots(self, T: int) -> Tensor:
        """(B,T): the slots of the next block of T columns."""
        return self.length[:, None] + torch.arange(self.first, self.first + T,
                                                   device=self.length.device)

    def mask(self, T: int, pattern: Tensor | None = None) -> Tensor:
        """(B,T,S): which slots each column of the next block sees; by default what is committed,
        the columns before it, and itself.

        pattern (T,T+2): does a column see what is committed | each column of the block | slots that
        are not used yet?
        """
        S = len(self.place) if self.reads_all else self.first + int(self.length.max()) + T
        # 0 or less is committed, 1 to T is the block, more is not used yet.
        place = self.place[:S] - self.length[:, None]  # (B,S)
        if pattern is None:
            return place[:, None] <= torch.arange(1, 1 + T, device=place.device)[:, None]
        return pattern[:, place.clamp(0, T + 1)].transpose(0, 1)

    def write(self, layer: int, kv: Tensor, slots: Tensor, S: int) -> tuple[Tensor, Tensor]:
        """Put a block's keys and values (B,T,2,K,E) into their slots (B,T). Returns the layer's
        keys and values of the first S slots, each (B,K,S,E)."""
        kept = self.kv[layer, :, :, :, :S]
        if kv.requires_grad:
            kept = kept.clone()  # Autograd needs what attention has read, as it was.
        if len(slots) == 1 and not self.reads_all and not kv.requires_grad:
            # The slots of one row are the last T of S. To copy into a slice takes less time than to
            # copy by index: on a CPU a step of one row is 4 % faster.
            kept[:, :, :, S - kv.shape[1]:].copy_(kv.permute(2, 0, 3, 1, 4))
        else:
            kept[:, self.rows, :, slots] = kv
        return kept[0], kept[1]

    def commit(self, count: int | Tensor, columns: Tensor | None = None) -> None:
        """Keep, per row, the first `count` (an int, or (B,)) columns of the block that just ran.

        columns (B,n): keep these, in this order, in place of 0, 1, 2, .. In place: a view of
        `length` changes with it.
        """
        if columns is not None:
            to = self.slots(columns.shape[1])
            kept = self.kv[:, :, self.rows, :, to[:, :1] + columns]  # (B,n,layers,2,K,E)
            self.kv[:, :, self.rows, :, to] = kept
        self.length += count

    def clear(self, columns: int) -> None:
        """Begin new texts. columns: of the largest block that ran.

        What stands in the slots that were used is masked from now on. But a masked slot has weight
        0, and 0 * NaN is NaN: so what is not finite becomes 0.
        """
        used = self.first + int(self.length.max()) + columns
        self.kv[:, :, :, :, :used].nan_to_num_(0, 0, 0)
        self.length.zero_()


# ---------------------------------------------------- model

def rope_frequencies(config: Config) -> Tensor:
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


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn each pair (a, b) = (x_i, x_{i+E/2}) of heads x (B,T,heads,E) by an angle, in place, to
    (a cos - b sin, b cos + a sin).

    cos (B,T,1,E) has every cosine twice, sin too, the first half negative: (b, a) is x with both
    halves exchanged, and three operations turn all pairs.
    """
    exchanged = x.roll(x.shape[-1] // 2, -1)  # (b, a)
    x.mul_(cos).addcmul_(exchanged, sin)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
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


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 where it has a smaller type."""
    return x if x.dtype == torch.float64 else x.float()


def linear(x: Tensor, weight) -> Tensor:
    """x (..,I) -> (..,O); weight (O,I), or what `pack` made of it."""
    if torch.is_tensor(weight):
        return F.linear(x, weight)
    return torch.ops.quantized.linear_dynamic_fp16(x, weight)


class Layer(nn.Module):
    """Weights of one layer. q, k, v are one matrix, and so are gate and up: one product each."""

    def __init__(self, c: Config, **like):
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

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu"):
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
        self.frequency = rope_frequencies(config).to(device)
        self.eps = torch.tensor(config.norm_eps, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matrices. The embedding has the type of the arithmetic."""
        return self.output.dtype if torch.is_tensor(self.output) else torch.float16

    @property
    def precision(self) -> str:
        """Both types, in words."""
        weights, arithmetic = str(self.dtype)[6:], str(self.embedding.dtype)[6:]
        return weights if weights == arithmetic else f"{weights} weights, {arithmetic} arithmetic"

    def embed(self, tokens: Tensor) -> Tensor:
        """(B,T) token ids -> (B,T,D)."""
        return F.embedding(tokens, self.embedding)

    def logits(self, h: Tensor) -> Tensor:
        """What `forward` returns, (..,D) -> logits (..,V). Many columns need none, so this is a
        function of its own."""
        return linear(h, self.output)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""
        if x.is_cuda or x.dtype != torch.float32:
            return F.rms_norm(x, x.shape[-1:], weight, self.config.norm_eps)
        # On a CPU that is eight small operations, and these are five, by way of the length of x: a
        # step of SmolLM2 is 4 % faster.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt()
        return x * scale * weight

    def forward(self, x: Tensor, cache: Cache, positions: Tensor | None = None,
                mask: Tensor | None = None) -> Tensor:
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
        slots = cache.slots(T)
        if positions is None:
            positions = slots - cache.first
        if mask is None:
            mask = cache.mask(T)
        S = mask.shape[2]
        angle = positions[:, :, None, None] * self.frequency  # (B,T,1,E/2)
        cos = torch.cat([angle.cos(), angle.cos()], -1).to(x.dtype)
        sin = torch.cat([-angle.sin(), angle.sin()], -1).to(x.dtype)
        # The G query heads that share a key/value head stand as G columns in its attention, so its
        # keys and values are read once. The mask is made a bias once, and not in every layer.
        like = at_least_float32(x) if x.is_cuda else x
        bias = torch.zeros(mask.shape, dtype=like.dtype, device=x.device)
        bias = bias.masked_fill_(~mask, -math.inf)
        bias = bias.repeat_interleave(G, 1)[:, None]  # (B,1,T*G,S)

        for i, layer in enumerate(self.layers):
            y = self.rms_norm(x, layer.attention_norm)
            qkv = linear(y, layer.qkv).view(B, T, H + 2 * K, E)
            rotate_(qkv[:, :, :H + K], cos, sin)
            q, kv = qkv.split((H, 2 * K), 2)
            keys, values = cache.write(i, kv.view(B, T, 2, K, E), slots, S)
            q = q.view(B, T, K, G, E).transpose(1, 2).reshape(B, K, T * G, E)
            a = attention(q, keys, values, bias)
            a = a.view(B, K, T, G, E).transpose(1, 2).reshape(B, T, H * E)
            x = x + linear(a, layer.o)
            y = self.rms_norm(x, layer.ffn_norm)
            gate, up = linear(y, layer.gate_up).chunk(2, -1)
            x = x + linear(F.silu(gate) * up, layer.down)
        return self.rms_norm(x, self.norm)

    def named_weights(self) -> dict[str, Tensor]:
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
    def load(cls, folder: str | Path, dtype: torch.dtype | None = None,
             device: torch.device | str = "cpu", packed: bool = True) -> "Llama":
        """Load a Hugging Face folder: config.json, and model.safetensors or shards and their index.

        dtype: a torch dtype to run in; None is the checkpoint's own. packed: on an x86 CPU `pack`
        rearranges the matrices of a half-precision model; with False they can be read and trained.
        No second copy of the model is held. Raises InputError that names what is wrong.
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
        output = None
        for path in weight_files(folder):
            with open_tensors(path) as file:
                for name in file.keys():
                    if ".rotary_emb." in name:
                        continue  # Old checkpoints carry what is computed here.
                    if config.tied and name == "lm_head.weight":
                        output = torch.empty_like(model.embedding)
                        copy_tensor(output, file, name, path)
                        continue
                    # A base model has no prefix before its names.
                    full = name if name in missing else f"model.{name}"
                    if full not in missing:
                        raise InputError(f"{path}: tensor {name} does not belong to this model, or "
                                         f"comes twice")
                    copy_tensor(missing.pop(full), file, name, path)
        if output is not None and missing.pop("model.embed_tokens.weight", None) is not None:
            model.embedding.copy_(output)
        elif output is not None and not torch.equal(output, model.embedding):
            model.output = nn.Parameter(output)  # config.json is wrong: they are not tied.
            model.config = replace(config, tied=False)
        if missing:
            raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is "
                             f"{[*missing][0]}")
        if packed:
            pack(model)
        return model.requires_grad_(False)


def load_model(args: Namespace, packed: bool = True) -> tuple[Llama, Tokenizer]:
    """The model and the tokenizer that a command line names, see `terminal.add_common`.

    packed: as in `Llama.load`. Without it and without --dtype, a CPU that has no instructions for
    bfloat16 takes float32: on one with AVX2 alone a step of training takes 1/26 of the time.
    """
    device = device_named(args.device)
    dtype = DTYPES.get(args.dtype)
    if dtype is None and not packed and not has_bfloat16(device):
        own = Config.load(args.model).dtype
        dtype = torch.float32 if own == "bfloat16" else None
    model = Llama.load(args.model, dtype, device, packed)
    return model, load_tokenizer(args.model, model.config.vocab_size)


def has_bfloat16(device: torch.device) -> bool:
    """Does the device multiply bfloat16 by instructions of its own?"""
    if device.type != "cpu":
        return True
    mkldnn = torch.backends.mkldnn.is_available()
    return mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_fbgemm(device: torch.device | str) -> bool:
    """Is there what `pack` needs, a CPU with FBGEMM (x86)?"""
    engines = torch.backends.quantized.supported_engines
    return torch.device(device).type == "cpu" and "fbgemm" in engines


def pack(model: Llama) -> None:
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
