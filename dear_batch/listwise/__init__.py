"""Stage 2: prompts, windows and permutation decoding with a causal language model."""
