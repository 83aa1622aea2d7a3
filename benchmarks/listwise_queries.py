"""Seconds a query of the whole sliding-window pass, with random weights of a real shape.

Order and text do not matter to the time, so no checkpoint is needed: 64 queries of 100
candidates, window 20, step 10, no reasoning, through the job's own waves. The floor is the
time that the prompt tokens alone would take at the device's dense peak. The last line is JSON.

    python benchmarks/listwise_queries.py TOKENIZER.json --shape 8b --device cuda
    python benchmarks/listwise_queries.py TOKENIZER.json --shape 135m --queries 2 --candidates 30
"""

import argparse
import json
import platform
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from dear_batch.data import Ranked, RankedList, Ranking
from dear_batch.listwise.encoding import PromptEncoder
from dear_batch.listwise.model import DTYPES, LanguageModel
from dear_batch.listwise.preflight import answer_tokens
from dear_batch.listwise.prompts import load_prompt
from dear_batch.listwise.ranker import ListwiseRanker
from dear_batch.run.waves import rerank
from dear_batch.specs import ListwiseSpec

COLLECTION = Path(__file__).parent.parent / "examples" / "collection" / "corpus.jsonl"
H100_BF16 = 989e12  # dense FLOP/s of an H100 SXM, NVIDIA's data sheet
# meta-llama/Llama-3.1-8B, Llama-3.2-3B and HuggingFaceTB/SmolLM2-135M.
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
}  # fmt: skip


def random_model(shape: str, device: str, precision: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=8192, eos_token_id=2, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[precision])
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def lists(queries: int, candidates: int) -> list[RankedList]:
    texts = [json.loads(line)["text"] for line in COLLECTION.read_text("utf-8").splitlines()]
    pick = random.Random(0)
    entries = tuple(Ranked(f"d{i}", i + 1, float(-i), None, None, i + 1) for i in range(candidates))
    return [
        RankedList(
            f"what is told of number {q}?",
            Ranking(f"q{q}", entries),
            tuple(("", text) for text in pick.choices(texts, k=candidates)),
        )
        for q in range(queries)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=DTYPES)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--prompt", default="readme")
    arguments = parser.parse_args()
    precision = arguments.precision or ("fp32" if arguments.device == "cpu" else "bf16")
    model = random_model(arguments.shape, arguments.device, precision)
    parameters = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    tokenizer = Tokenizer.from_file(arguments.tokenizer)
    spec = ListwiseSpec("random", arguments.prompt, depth=arguments.candidates)
    prompt = load_prompt(spec.prompt)
    encoder = PromptEncoder(tokenizer, prompt, 8192 - answer_tokens(prompt, spec))
    ranker = ListwiseRanker(LanguageModel(model, arguments.device), encoder, spec, tokenizer)
    items = lists(arguments.queries, arguments.candidates)
    rerank(items[:1], spec, ranker)  # warm
    before = ranker.forwards
    start = time.perf_counter()
    waves = range(0, len(items), ranker.wave_queries)
    courses = [c for w in waves for c in rerank(items[w : w + ranker.wave_queries], spec, ranker)]
    seconds = time.perf_counter() - start
    answers = [t.permutation for course in courses for t in course.transcripts]
    tokens = sum(a.prompt_tokens for a in answers)
    on_gpu = arguments.device != "cpu"
    result = {
        "shape": arguments.shape,
        "precision": precision,
        "queries": len(items),
        "candidates": arguments.candidates,
        "windows": len(answers),
        "failed": sum(a.status != "ok" for a in answers),
        "seconds_a_query": round(seconds / len(items), 3),
        "prompt_tokens_a_query": round(tokens / len(items), 1),
        "h100_floor_seconds_a_query": round(2 * parameters * tokens / len(items) / H100_BF16, 4),
        "forwards": ranker.forwards - before,
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
