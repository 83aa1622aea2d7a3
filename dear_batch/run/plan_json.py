"""The outputs of a plan as `plan.json` holds them; read back without reading the inputs again."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dear_batch.data import Shard
from dear_batch.files.parquet import InputFile, open_input
from dear_batch.run.plan import Output, Plan, Regroup, Source


def outputs_to_json(plan: Plan) -> list[dict[str, Any]]:
    """The outputs of a plan as `outputs_from_json` reads them."""
    return [
        {
            "stem": output.stem,
            "queries": output.n_queries,
            "sources": [
                {
                    "inputs": source.inputs,
                    "regrouped": source.regrouped,
                    "kept_rows": source.kept_rows,
                    "shards": [_shard_fields(shard) for shard in shards],
                }
                for source, shards in zip(output.sources, output.shards, strict=True)
            ],
        }
        for output in plan.outputs
    ]


def _shard_fields(shard: Shard) -> dict[str, Any]:
    fields = asdict(shard)
    del fields["path"]
    return fields


def outputs_from_json(
    outputs: Sequence[dict[str, Any]], files: Sequence[InputFile], regrouped: Regroup
) -> Plan:
    """The plan that an earlier attempt wrote for the same inputs, without reading them again."""
    return Plan(
        tuple(files),
        tuple(_output_from_json(i, fields, files, regrouped) for i, fields in enumerate(outputs)),
    )


def _output_from_json(
    number: int, fields: dict[str, Any], files: Sequence[InputFile], regrouped: Regroup
) -> Output:
    sources, shards = list[Source](), list[tuple[Shard, ...]]()
    for item in fields["sources"]:
        inputs = tuple(item["inputs"])
        paths = [files[i].path for i in inputs]
        made = regrouped(number, paths) if item["regrouped"] else None
        file = open_input(made, regrouped=True) if made else files[inputs[0]]
        sources.append(Source(file, inputs, item["regrouped"], item["kept_rows"]))
        shards.append(tuple(Shard(path=file.path, **shard) for shard in item["shards"]))
    return Output(fields["stem"], tuple(sources), tuple(shards))
