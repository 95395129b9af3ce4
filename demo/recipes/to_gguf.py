"""A model folder as a GGUF file, for llama.cpp in `results/peers.py`: weights, and no tokenizer.

    python demo/recipes/to_gguf.py --model models/smollm2 --type q8_0 --out models/smollm2/q8_0.gguf
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import support

support.ctrl_c_leaves(__name__)
from demo.recipes import smollm2
from model import Llama
from support.errors import InputError, extra, run_script
from support.storage import check_writable, write_file
from support.terminal import new_parser, user_path

TYPES = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
# By Hugging Face's names.
OUTER = {theirs: ours for ours, theirs in smollm2.OUTER.items()}
OUTER["lm_head.weight"] = "output.weight"
SHORT = {theirs: ours for ours, theirs in smollm2.NAMES.items()}


def gguf_name(name):
    """GGUF's name of a tensor of Hugging Face's."""
    if name in OUTER:
        return OUTER[name]
    _, _, layer, *part, _ = name.split(".")
    return f"blk.{layer}.{SHORT['.'.join(part)]}.weight"


def interleaved_halves(weight, heads):
    """Rows of queries or keys in GGUF's order: the rotation turns neighbours, ours row i with row
    i + E/2 of a head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write(model, kind, path):
    gguf = extra("gguf", "pip install -r requirements-smollm2.txt")
    c = model.config
    if c.rope["rope_type"] != "default":
        raise InputError(f"rotary scaling {c.rope['rope_type']} is not supported here")
    if kind == "q8_0" and any(width % 32 for width in (c.dim, c.ffn_dim, c.n_heads * c.head_dim)):
        raise InputError("q8_0 needs matrices whose rows are multiples of 32: take f16")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.ffn_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_file_type(gguf.LlamaFileType[TYPES[kind]])
    for name, weight in model.named_weights().items():
        if "q_proj" in name:
            weight = interleaved_halves(weight, c.n_heads)
        if "k_proj" in name:
            weight = interleaved_halves(weight, c.n_kv_heads)
        stored = gguf.GGMLQuantizationType[kind.upper() if weight.ndim == 2 else "F32"]
        data = gguf.quants.quantize(weight.float().numpy(), stored)
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=user_path, required=True, help="folder of the model")
    parser.add_argument("--type", choices=TYPES, default="f16", help="(default: f16)")
    parser.add_argument("--out", type=user_path, required=True, help="file to write")
    args = parser.parse_args()
    check_writable(args.out)
    model = Llama.load(args.model, packed=False)
    write_file(args.out, lambda path: write(model, args.type, path))


if __name__ == "__main__":
    run_script(main)
