"""The sides of `peers.py`, each as its package is meant to be used: load, then score lists.

Every side gets the same texts, and gives a raw logit for each pair in their order. Packages are
imported where they are used, since no environment has all of them. Knows nothing of clocks.
"""

import os
from collections.abc import Sequence
from typing import Any

MAX_LENGTH = 228  # DeAR README: q_max_len + p_max_len
THREADS = len(os.sched_getaffinity(0))
Lists = Sequence[tuple[str, Sequence[str]]]
Pairs = list[tuple[str, str]]


def pairs_of(lists: Lists) -> Pairs:
    """The two texts of every candidate, as the DeAR README has them; titles are empty."""
    return [(f"query: {query}", f"document:  {text}") for query, texts in lists for text in texts]


class Transformers:
    """Hugging Face's own model and tokenizer, as the DeAR README loads them."""

    def __init__(self, model: str, dtype: str = "float32") -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.model = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=getattr(torch, dtype)
        ).eval()
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def ids(self, pairs: Pairs) -> list[list[int]]:
        """The token ids that each pair becomes."""
        queries, documents = (list(side) for side in zip(*pairs, strict=True))
        found = self.tokenizer(queries, documents, truncation=True, max_length=MAX_LENGTH)
        ids: list[list[int]] = found["input_ids"]
        return ids

    def logits(self, inputs: dict[str, Any]) -> list[float]:
        """What the model says of a padded batch."""
        import torch

        with torch.inference_mode():
            found: list[float] = self.model(**inputs).logits.squeeze(-1).float().tolist()
        return found


class ReadmeLoop(Transformers):
    """`rerank()` of the DeAR README: a list at a time, in its order, padded to the longest."""

    def score(self, lists: Lists, batch: int) -> list[float]:
        """The logit of every pair."""
        scores = []
        for one in lists:
            pairs = pairs_of([one])
            for start in range(0, len(pairs), batch):
                queries, documents = zip(*pairs[start : start + batch], strict=True)
                inputs = self.tokenizer(
                    list(queries),
                    list(documents),
                    return_tensors="pt",
                    truncation=True,
                    padding=True,
                    max_length=MAX_LENGTH,
                    return_attention_mask=True,
                )
                scores += self.logits(inputs)
        return scores


class SortedTransformers(Transformers):
    """All pairs at once, tokenised together, in batches of like length, the longest first."""

    def __init__(self, model: str, dtype: str = "float32") -> None:
        super().__init__(model, dtype)
        self.model.config.use_cache = False  # which nothing here reads

    def score(self, lists: Lists, batch: int) -> list[float]:
        """The logit of every pair."""
        import torch

        ids = self.ids(pairs_of(lists))
        order = sorted(range(len(ids)), key=lambda n: -len(ids[n]))
        scores = [0.0] * len(ids)
        for start in range(0, len(ids), batch):
            chosen = order[start : start + batch]
            rows = [torch.tensor(ids[n]) for n in chosen]
            masks = [torch.ones_like(row) for row in rows]
            pad = torch.nn.utils.rnn.pad_sequence
            inputs = {
                "input_ids": pad(rows, True, self.tokenizer.pad_token_id),
                "attention_mask": pad(masks, True, 0),
            }
            for n, score in zip(chosen, self.logits(inputs), strict=True):
                scores[n] = score
        return scores


class SortedBf16(SortedTransformers):
    """The same in bf16."""

    def __init__(self, model: str) -> None:
        super().__init__(model, "bfloat16")


class Optimum(SortedTransformers):
    """Optimum's export of the checkpoint in its own ONNX Runtime class, sorted in the same way."""

    def __init__(self, model: str) -> None:
        from optimum.onnxruntime import ORTModelForSequenceClassification
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = ORTModelForSequenceClassification.from_pretrained(
            model, export=True, session_options=session_options()
        )


class CrossEncoders:
    """sentence-transformers; `predict` is given all pairs and sorts them by itself."""

    def __init__(self, model: str, **settings: Any) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        self.model = CrossEncoder(
            model,
            device="cpu",
            max_length=MAX_LENGTH,
            activation_fn=torch.nn.Identity(),
            **settings,
        )

    def ids(self, pairs: Pairs) -> list[list[int]]:
        """The token ids that each pair becomes."""
        found = self.model.preprocess([list(pair) for pair in pairs])
        rows = zip(found["input_ids"], found["attention_mask"], strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in rows]

    def score(self, lists: Lists, batch: int) -> list[float]:
        """The logit of every pair."""
        pairs = [list(pair) for pair in pairs_of(lists)]
        found: list[float] = self.model.predict(
            pairs, batch_size=batch, show_progress_bar=False
        ).tolist()
        return found


class CrossEncodersOnnx(CrossEncoders):
    """Its ONNX backend, which exports by Optimum.

    sentence-transformers 6 asks for transformers 5 and Optimum's ONNX half for 4, so this is the
    last version that both can be installed beside.
    """

    def __init__(self, model: str) -> None:
        options = {"provider": "CPUExecutionProvider", "session_options": session_options()}
        super().__init__(model, backend="onnx", model_kwargs=options)


class Rerankers:
    """`rerankers`; `rank` takes a list at a time."""

    def __init__(self, model: str) -> None:
        from rerankers import Reranker

        self.model = Reranker(
            model,
            model_type="cross-encoder",
            device="cpu",
            verbose=0,
            # The only place where the length that it cuts at can be said.
            tokenizer_kwargs={"model_max_length": MAX_LENGTH},
        )

    def ids(self, pairs: Pairs) -> list[list[int]]:
        """The token ids that each pair becomes."""
        found = self.model.tokenize(pairs)
        rows = zip(found["input_ids"], found["attention_mask"], strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in rows]

    def score(self, lists: Lists, batch: int) -> list[float]:
        """The logit of every pair."""
        scores: list[float] = []
        for one in lists:
            pairs = pairs_of([one])
            found = self.model.rank(
                pairs[0][0],
                [document for _, document in pairs],
                doc_ids=list(range(len(pairs))),
                batch_size=batch,
            )
            # A list of one comes back as a bare result.
            by_id = {r.document.doc_id: float(r.score) for r in getattr(found, "results", [found])}
            scores += [by_id[n] for n in range(len(pairs))]
        return scores


class Ours:
    """A bundle as `dear-batch run` loads it; lists are encoded, planned and scored together."""

    def __init__(self, bundle: str) -> None:
        from dear_batch.run.loading import load_pointwise
        from dear_batch.specs import ExecutionSpec

        self.loaded = load_pointwise(bundle, ExecutionSpec(device="cpu"))
        scorer = self.loaded.scorer
        self.facts: dict[str, Any] = {"engine": scorer.engine, "precision": scorer.precision}

    def encode(self, lists: Lists) -> list[Any]:
        """Every pair of the lists."""
        documents = [(query, [("", text) for text in texts]) for query, texts in lists]
        return [pair for pairs in self.loaded.encoder.encode(documents) for pair in pairs]

    def ids(self, pairs: Pairs) -> list[list[int]]:
        """The token ids that each pair becomes."""
        lists = [
            (query.removeprefix("query: "), [document.removeprefix("document:  ")])
            for query, document in pairs
        ]
        return [pair.input_ids().tolist() for pair in self.encode(lists)]

    def score(self, lists: Lists, _batch: int) -> list[float]:
        """The logit of every pair."""
        from dear_batch.pointwise.scorer import score_pairs

        done: list[Any] = []
        scores = score_pairs(self.loaded.scorer, self.encode(lists), done.append)
        self.facts["computed_tokens"] = sum(len(batch.rows) * batch.length for batch in done)
        found: list[float] = scores.tolist()
        return found


SIDES: dict[str, Any] = {
    "readme-loop": ReadmeLoop,
    "sorted": SortedTransformers,
    "sorted-bf16": SortedBf16,
    "optimum": Optimum,
    "cross-encoder": CrossEncoders,
    "cross-encoder-onnx": CrossEncodersOnnx,
    "rerankers": Rerankers,
    "ours": Ours,
}


def session_options() -> Any:
    """ONNX Runtime's, with as many threads as the other sides have."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return options
