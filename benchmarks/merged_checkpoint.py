"""A base model and its adapter as one fp32 checkpoint, which all sides of `peers.py` load.

transformers 4 and 5 read it the same.

    python benchmarks/merged_checkpoint.py BASE ADAPTER OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def merge(base: str, adapter: str, out: str) -> None:
    """Merge in fp32 and save model and tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.chat_template = None  # a reranker has none, and packages look for one
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    rope = model.config.rope_parameters
    if rope["rope_type"] != "default":
        sys.exit(f"transformers 4 knows {rope} under other names, which are not written here")
    # Version 4 knows these under other names, and makes `token_type_ids` unless it is told not to.
    name = json.loads(Path(base, "config.json").read_text()).get("_name_or_path", Path(base).name)
    change(Path(out, "config.json"), rope_theta=rope["rope_theta"], _name_or_path=name)
    names = ["input_ids", "attention_mask"]
    change(
        Path(out, "tokenizer_config.json"),
        tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=names,
    )


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2) + "\n")


if __name__ == "__main__":
    merge(*sys.argv[1:])
