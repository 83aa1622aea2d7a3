"""Listwise windows decoded by dear-batch and by Hugging Face, same model, same prompts, one run.

Takes the first windows of a RankGPT file in first-stage order and writes their answers four
ways: dear-batch; `generate` on a batch; `generate` one by one; transformers' continuous
batching. Theirs write as many tokens as a full answer has, whatever they write (their end of
text does not stop them, so that the work compared is that of a full answer). Prefill ends with
the last forward that reads prompts; decode is the rest of the call, whatever it is spent on.
Medians of repeated, alternating runs; the last line is JSON.

    python benchmarks/listwise.py BUNDLE CANDIDATES.json --size 20 --windows 8
"""

import argparse
import json
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from dear_batch.bundle import open_bundle
from dear_batch.data import Permutation, Window
from dear_batch.listwise.grammar import Grammar
from dear_batch.listwise.model import DTYPES, LanguageModel
from dear_batch.listwise.preflight import check_listwise
from dear_batch.listwise.ranker import ListwiseRanker
from dear_batch.listwise.windows import WindowRequest
from dear_batch.specs import ListwiseSpec


class Clock:
    """Seconds, calls and tokens of the forwards of a model, prompts apart from steps."""

    def __init__(self, model: LanguageModel) -> None:
        self.seconds, self.forwards, self.tokens = Counter(), Counter(), Counter()
        model.read_prompts = self._timed("prefill", model.read_prompts)
        model.step = self._timed("decode", model.step)

    def _timed(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(first: Any, *others: Any) -> Any:
            start = time.perf_counter()
            result = call(first, *others)
            self.seconds[kind] += time.perf_counter() - start
            self.forwards[kind] += 1
            self.tokens[kind] += result.shape[0] * result.shape[1]
            return result

        return timed

    def reset(self) -> None:
        """Count from zero again."""
        for counter in (self.seconds, self.forwards, self.tokens):
            counter.clear()


class Ours:
    """A ranker over a model that the other ways use too."""

    def __init__(self, bundle: Any, model: Any, spec: ListwiseSpec) -> None:
        self.model = model
        language_model = LanguageModel(model)
        self.encoder = check_listwise(bundle, spec)
        tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
        self.ranker = ListwiseRanker(language_model, self.encoder, spec, tokenizer)
        self.clock = Clock(language_model)

    def run(self, requests: Sequence[WindowRequest]) -> tuple[dict[str, float], list[Permutation]]:
        """Seconds of both phases, and the permutations."""
        self.model.set_attn_implementation("dear_batch_slots")
        self.clock.reset()
        start = time.perf_counter()
        permutations = self.ranker.rank(requests)
        total = time.perf_counter() - start
        prefill = self.clock.seconds["prefill"]
        return {"prefill": prefill, "decode": total - prefill}, permutations


class Watch:
    """When the forwards of a Hugging Face model end, and how many tokens each had."""

    def __init__(self, model: Any) -> None:
        self.ends: list[tuple[float, int]] = []
        model.model.register_forward_hook(self._note)

    def _note(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.ends.append((time.perf_counter(), output[0].shape[:-1].numel()))

    def timed(self, call: Callable[[], Any], rows: int) -> tuple[dict[str, float], Any]:
        """Forwards of more tokens than rows read prompts."""
        self.ends.clear()
        start = time.perf_counter()
        result = call()
        end = time.perf_counter()
        read = max(at for at, tokens in self.ends if tokens > rows)
        return {"prefill": read - start, "decode": end - read}, result


def generate(model: Any, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    """Greedy answers of one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=None
    )
    answers: list[list[int]] = output[:, longest:].tolist()
    return answers


def continuous(model: Any, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    """Continuous batching of transformers, with its paged cache."""
    settings = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    outputs = model.generate_batch(inputs=list(prompts), generation_config=settings, warmup=False)
    answers = [outputs[f"req_{i}"].generated_tokens for i in range(len(prompts))]
    assert all(len(answer) == new for answer in answers)
    return answers


def verdicts(
    answers: Sequence[list[int]],
    ours: Sequence[Permutation],
    tokenizer: Tokenizer,
    prompt: Any,
    end_ids: frozenset[int],
) -> dict[str, int]:
    """How many of their answers follow the grammar, read leniently, and agree with ours."""
    counts = Counter(
        windows=len(answers),
        follow_grammar=0,
        lenient_permutation=0,
        identical=0,
    )
    for tokens, permutation in zip(answers, ours, strict=True):
        end = next((i for i, token in enumerate(tokens) if token in end_ids), len(tokens))
        text = tokenizer.decode(tokens[:end])
        identifiers = prompt.identifiers(len(permutation.order))
        grammar = Grammar(prompt.answer)
        state = grammar.read(grammar.start(identifiers), text)
        if state is not None:  # what no longer leaves a choice may be missing at the end
            state = grammar.read(state, grammar.forced(state))
        found = re.findall(r"\[(\d+)\]", text)
        missing = len(identifiers) - len(found)
        permutes = len(found) == len({*found} & {*identifiers})
        counts["lenient_permutation"] += permutes and missing in {0, 1}
        if state is not None and state.done:
            counts["follow_grammar"] += 1
            counts["identical"] += [identifiers[i] for i in permutation.order] == [*state.chosen]
    return dict(counts)


def windows(path: Path, size: int, count: int) -> list[WindowRequest]:
    lists = json.loads(path.read_text())[:count]
    return [
        WindowRequest(
            Window(str(item["hits"][0]["qid"]), 0, size),
            item["query"],
            tuple(hit["content"] for hit in item["hits"][:size]),
        )
        for item in lists
    ]


def median(runs: Sequence[dict[str, float]], count: int) -> dict[str, float]:
    """Seconds a window."""
    return {k: round(statistics.median(run[k] for run in runs) / count, 4) for k in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("candidates", type=Path)
    parser.add_argument("--size", type=int, default=20)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--prompt", default="readme")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one-by-one", type=int, default=2, help="windows for the slow ways")
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    model = AutoModelForCausalLM.from_pretrained(
        bundle.folder, dtype=DTYPES[arguments.precision]
    ).eval()
    spec = ListwiseSpec(
        str(arguments.bundle), arguments.prompt, depth=arguments.size, window=arguments.size
    )
    tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
    ours = Ours(bundle, model, spec)
    requests = windows(arguments.candidates, arguments.size, arguments.windows)
    encoded = ours.encoder.encode([(r.query, r.passages) for r in requests])
    prompts = [p.ids.tolist() for p in encoded if p]
    assert len(prompts) == len(requests)
    answer = ours.encoder.prompt.answer.text(ours.encoder.prompt.identifiers(arguments.size))
    new = len(tokenizer.encode(answer, add_special_tokens=False).ids)
    ends = LanguageModel(model).end_ids
    few = prompts[: arguments.one_by_one]

    watch = Watch(model)
    our_runs, batch_runs = [], []
    for _ in range(arguments.repeats):
        seconds, permutations = ours.run(requests)
        our_runs.append(seconds)
        model.set_attn_implementation("sdpa")
        seconds, answers = watch.timed(lambda: generate(model, prompts, new), len(prompts))
        batch_runs.append(seconds)
    alone = [watch.timed(lambda p=p: generate(model, [p], new), 1) for p in few]
    alone_answers = [answer for _, [answer] in alone]
    paged_seconds, _ = watch.timed(lambda: continuous(model, few, new), len(few))

    n = len(requests)
    mine, batched = median(our_runs, n), median(batch_runs, n)
    clock = ours.clock
    result = {
        "candidates": arguments.candidates.name,
        "window": arguments.size,
        "windows": n,
        "prompt": arguments.prompt,
        "precision": arguments.precision,
        "repeats": arguments.repeats,
        "prompt_tokens_a_window": round(sum(map(len, prompts)) / n, 1),
        "seconds_a_window": {
            "dear_batch": mine,
            "generate_batched": batched,
            "generate_one_by_one": median([seconds for seconds, _ in alone], 1),
            "continuous_batching": median([paged_seconds], len(few)),
        },
        "windows_of_the_slow_ways": len(few),
        "decode_gain_over_batched": round(batched["decode"] / mine["decode"], 2),
        "window_over_its_prefill": round(1 + mine["decode"] / mine["prefill"], 3),
        "forwards_a_window": {
            "dear_batch": round(sum(p.forwards for p in permutations) / n, 2),
            "generate": new,
        },
        "answer_tokens_a_window": {
            "dear_batch_chosen": round(sum(p.answer_tokens for p in permutations) / n, 2),
            "dear_batch_fed_with_padding": round(clock.tokens["decode"] / n, 2),
            "generate": new,
        },
        "theirs_batched": verdicts(answers, permutations, tokenizer, ours.encoder.prompt, ends),
        "theirs_one_by_one": verdicts(
            alone_answers, permutations[: len(few)], tokenizer, ours.encoder.prompt, ends
        ),
        "ours_invalid": sum(
            p.status != "ok" or sorted(p.order) != list(range(arguments.size)) for p in permutations
        ),
        "ours_overruled_tokens_a_window": round(sum(p.overruled for p in permutations) / n, 2),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    print(json.dumps(result, indent=2))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
