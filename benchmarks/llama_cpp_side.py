"""llama.cpp's side of model_speed.py: writes a GGUF file from a checkpoint, and answers with the seconds of its steps.

Runs in an environment of its own, which has llama-cpp-python, gguf and numpy, and knows nothing of ours.

    python llama_cpp_side.py write CHECKPOINT FILE q4_0|q8_0
    python llama_cpp_side.py serve FILE THREADS          then lines `prefill TOKENS` and `decode SEQUENCES TOKENS`

Every matrix takes the format, output head and embedding included, as llama.cpp's own quantizer does for these two.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
CONTEXT = 1024
SEQUENCES = 8


def write(checkpoint: Path, target: Path, name: str) -> None:
    """A Llama checkpoint in bfloat16 -> GGUF; without a tokenizer.json, tokens go in and out as numbers."""
    import gguf
    import numpy as np

    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kind = gguf.GGMLQuantizationType[name.upper()]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{name.upper()}"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    if (checkpoint / "tokenizer.json").is_file():
        write_vocabulary(writer, checkpoint)
    else:
        writer.add_tokenizer_model("none")

    def ggml_order(weight: Any, count: int) -> Any:
        """Rotary pairs side by side, where transformers keeps them half a head apart."""
        rows, columns = weight.shape
        return weight.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)

    data = (checkpoint / "model.safetensors").read_bytes()  # numpy has no bfloat16, so its file reader has none
    header_end = 8 + int.from_bytes(data[:8], "little")
    for key, entry in json.loads(data[8:header_end]).items():
        if key != "__metadata__":
            begin, end = (header_end + offset for offset in entry["data_offsets"])
            bits = np.frombuffer(data[begin:end], np.uint16).reshape(entry["shape"])
            values = (bits.astype(np.uint32) << 16).view(np.float32)
            stem = key.removesuffix(".weight")
            if stem.startswith("model.layers."):
                number, _, part = stem.removeprefix("model.layers.").partition(".")
                if part.endswith(("q_proj", "k_proj")):
                    values = ggml_order(values, heads if part.endswith("q_proj") else kv_heads)
                stem = f"blk.{number}.{NAMES[part]}"
            else:
                stem = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem]
            if values.ndim == 1:
                writer.add_tensor(f"{stem}.weight", values)
            else:
                packed = gguf.quants.quantize(values, kind)
                writer.add_tensor(f"{stem}.weight", packed, raw_shape=packed.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(writer: Any, checkpoint: Path) -> None:
    """A byte-level BPE tokenizer, GPT-2's kind, with one special token that ends a text."""
    import gguf

    made = json.loads((checkpoint / "tokenizer.json").read_text())
    special = {entry["id"] for entry in made["added_tokens"]}
    names = sorted(made["model"]["vocab"], key=made["model"]["vocab"].get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([control if number in special else normal for number in range(len(names))])
    writer.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])
    writer.add_eos_token_id(min(special))
    writer.add_add_bos_token(False)


class Server:
    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.silence = self.api.llama_log_callback(lambda *_: None)  # the library keeps no reference
        self.api.llama_log_set(self.silence, None)
        self.api.llama_backend_init()
        parameters = self.api.llama_model_default_params()
        self.model = self.api.llama_model_load_from_file(path.encode(), parameters)
        options = self.api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT * SEQUENCES, CONTEXT, CONTEXT
        options.n_seq_max = SEQUENCES
        options.n_threads = options.n_threads_batch = threads
        self.context = self.api.llama_init_from_model(self.model, options)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.batch = self.api.llama_batch_init(CONTEXT, 0, 1)

    def step(self, tokens: list[tuple[int, int, int]], wanted: set[int]) -> list[int]:
        """One call with (token, position, sequence) each -> the likeliest next tokens of the wanted rows."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = i in wanted
        if self.api.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [self.likeliest(row) for row in sorted(wanted)]

    def likeliest(self, row: int) -> int:
        import numpy as np

        logits = self.api.llama_get_logits_ith(self.context, row)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self.vocabulary,))))

    def prefill(self, count: int) -> float:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        tokens = [(7 + 31 * i % 20000, i, 0) for i in range(count)]
        start = time.perf_counter()
        self.step(tokens, {count - 1})
        return time.perf_counter() - start

    def decode(self, sequences: int, count: int) -> float:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        for sequence in range(sequences):
            self.step([(7 + 31 * i % 20000, i, sequence) for i in range(16)], {15})
        current = [5] * sequences
        start = time.perf_counter()
        for position in range(16, 16 + count):
            rows = [(token, position, sequence) for sequence, token in enumerate(current)]
            current = self.step(rows, set(range(sequences)))
        return time.perf_counter() - start


def main() -> None:
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return
    server = Server(sys.argv[2], int(sys.argv[3]))
    print("ready", flush=True)
    for line in sys.stdin:
        task, *numbers = line.split()
        print(getattr(server, task)(*map(int, numbers)), flush=True)


if __name__ == "__main__":
    main()
