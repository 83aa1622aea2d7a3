"""A manifest of any contents ends in a bundle that can be shown, or in an error of ours."""

import copy
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from dear_batch.bundle import Engine, Manifest, Source, open_bundle
from dear_batch.errors import DearBatchError
from dear_batch.inspection import inspect_path
from dear_batch.manifest_fields import misfit
from dear_batch.pointwise.own_pairs import N_OWN_PAIRS, own_pairs
from dear_batch.pointwise.profiles import Profile, Span
from dear_batch.pointwise.recipe import Recipe

FIGURES = {
    "pairs": 4,
    "max_abs_difference": 1e-6,
    "relative_difference": 0,
    "kendall_tau": 1.0,
    "top10_overlap": 1.0,
    "ties": 0,
    "reference_ties": 0,
}
MANIFEST = Manifest(
    task="pointwise",
    source=Source("some/model", "0" * 40, "some/adapter", "1" * 40, "name"),
    precision="fp32",
    recipe=Recipe("paper-script", "final-position", (1,), (1, 2), (), 2, 228, 32, 193),
    architecture={"hidden_size": 8, "model_type": "llama"},
    graphs={"onnx/model.onnx": {"inputs": {}, "outputs": {}}},
    parity={
        "gate": {"absolute": 1e-4, "relative": None, "tau": 0.0, "overlap": 0.0},
        "graphs": {"model.onnx": FIGURES},
        "data": "dear-batch",
    },
    versions={"torch": "2.13"},
    created="2026-01-01T00:00:00+00:00",
    own_scores=(0.5, -1.25) * 32,
    peaks=(3.0,),
    engines=(
        Engine(
            path=f"engines/tensorrt_rtx-sm_89/{'0' * 64}.plan",
            bytes=9,
            sha256="0" * 64,
            flavour="tensorrt_rtx",
            version="1.7.1",
            sm="sm_89",
            platform="linux-x86_64",
            precision="fp16",
            row_tokens=512,
            batch_tokens=1024,
            profiles=(Profile(Span(1, 2, 2), Span(1, 512, 512), Span(1, 8, 1024)),),
            build_seconds=1.5,
        ),
    ),
)
GOOD: dict[str, Any] = json.loads(json.dumps(MANIFEST.to_json()))
GOOD["files"] = {"config.json": {"bytes": 2, "sha256": "0" * 64}}


def changed(path: str, value: object) -> dict[str, Any]:
    fields = copy.deepcopy(GOOD)
    *above, last = path.split(".")
    place = fields
    for key in above:
        place = place[key]
    place[last] = value
    return fields


def spans(**rows: int) -> dict[str, Any]:
    """The profile of the engine above, with other rows."""
    profile: dict[str, Any] = copy.deepcopy(GOOD["engines"][0]["profiles"][0])
    profile["rows"] = {"least": 1, "best": 1, "most": 2} | rows
    return profile


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("path", "engines/../../x.plan", ".path is no path"),
        ("path", f"engines/a/b/{'0' * 64}.plan", ".path is no path"),
        ("path", f"engines/a/{'0' * 64}.plan\n", ".path is no path"),
        ("sm", "sm_8.9", ".sm is no SM: 'sm_8.9'"),
        ("version", "1.7.1; rm -rf ~", ".version is no version: '1.7.1; rm -rf ~'"),
        ("version", "1.7.1\n", ".version is no version"),
        ("version", "", ".version is no version"),
        ("version", "latest", ".version is no version"),
        ("version", 10, ".version is no version"),
        ("platform", "linux", ".platform is no platform"),
        ("platform", "linux-x86_64 && id", ".platform is no platform"),
        ("flavour", "tensorrt_lite", ".flavour is no 'tensorrt' or 'tensorrt_rtx'"),
        ("row_tokens", 0, ".row_tokens is no whole number of 1 to"),
        ("profiles", [{"rows": {}}], ".profiles[0] has no documents"),
        ("profiles", [], ".profiles is empty"),
        ("profiles", [spans(least=2)], ".profiles[0].rows is not from least to most"),
        ("profiles", [spans(best=3)], ".profiles[0].rows is not from least to most"),
        ("profiles", [spans(most=4)], ".batch_tokens is 1024, and its profiles take 2048"),
        ("row_tokens", 513, ".row_tokens is 513, and its profiles take 512"),
        ("batch_tokens", 2048, ".batch_tokens is 2048, and its profiles take 1024"),
    ],
)
def test_an_engine_of_a_wrong_form(field: str, value: object, why: str) -> None:
    fields = copy.deepcopy(GOOD)
    fields["engines"][0][field] = value
    assert str(misfit(fields)).startswith(f".engines[0]{why}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "10.13.2.6"),
        ("version", "10.14.1.48.post1"),
        ("version", "9.3.0.post12.dev1"),
        ("version", "10.0.0b6"),
        ("platform", "linux-aarch64"),
        ("platform", "win32-AMD64"),
    ],
)
def test_versions_and_platforms_as_there_are(field: str, value: str) -> None:
    fields = copy.deepcopy(GOOD)
    fields["engines"][0][field] = value
    assert misfit(fields) is None


def test_what_was_written_is_read() -> None:
    assert Manifest.from_json({**GOOD, "files": {}}) == MANIFEST


def test_what_an_export_writes_is_good() -> None:
    assert misfit(GOOD) is None
    assert misfit({**GOOD, "task": "listwise", "own_scores": None}) is None
    assert sum(len(documents) for _, documents in own_pairs()) == N_OWN_PAIRS
    assert misfit({**GOOD, "recipe": None, "parity": None, "graphs": {}, "files": {}}) is None


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("task", "ranking", ".task is no 'pointwise' or 'listwise': 'ranking'"),
        ("source", [], ".source is no object: []"),
        ("source.model", None, ".source.model is no text: None"),
        ("source.revision", "main", ".source.revision is no commit of 40 hex digits: 'main'"),
        ("source.other", 1, ".source has an unknown field 'other'"),
        ("precision", 32, ".precision is no 'fp32' or 'fp16' or 'bf16': 32"),
        ("own_scores", [1, "x"], ".own_scores[1] is no number: 'x'"),
        ("own_scores", [float("nan")] * 64, ".own_scores[0] is no number: nan"),
        ("own_scores", [10**400] * 64, ".own_scores[0] is no number: 1000"),
        ("own_scores", [1] * 63, ".own_scores holds 63 scores, not 64"),
        ("own_scores", None, ".own_scores holds 0 scores, not 64"),
        ("peaks", 3, ".peaks is no list: 3"),
        ("engines", {}, ".engines is no list: {}"),
        ("recipe.head_ids", [1, -1], ".recipe.head_ids[1] is no whole number"),
        ("recipe.pad_id", True, ".recipe.pad_id is no whole number"),
        ("recipe.max_length", 3, ".recipe.max_length leaves no room"),
        ("architecture.x", [], ".architecture.'x' is no text or number: []"),
        ("parity.graphs.x", {}, ".parity.graphs.'x' has no kendall_tau"),
        ("versions.torch", 2, ".versions.'torch' is no text: 2"),
        ("files.a", {"bytes": -1, "sha256": "0" * 64}, ".files.'a'.bytes is no whole number"),
        ("files.a", {"bytes": 1, "sha256": "0" * 63}, ".files.'a'.sha256 is no sha256"),
        ("files.a", {"bytes": 1.0, "sha256": "0" * 64}, ".files.'a'.bytes is no whole number"),
        ("files.../a", {}, ".files"),
        ("created", "\ud800", "half a surrogate pair"),
        ("created", "x" * 10_000, None),
        ("graphs", "x" * 10_000, "…"),
    ],
)
def test_a_field_of_a_wrong_type(path: str, value: object, why: str | None) -> None:
    found = (
        misfit(changed(path, value))
        if "../" not in path
        else misfit({**GOOD, "files": {"../a": GOOD["files"]["config.json"]}})
    )
    if why is None:
        assert found is None
    else:
        assert found is not None
        assert why in found
        assert len(found) < 200


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "0" * 40, "0" * 64, "../x", 2**31, -1]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["../x", "a\0"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else ()
    return [above, *(place for key, inner in pairs for place in places(inner, (*above, key)))]


@settings(
    max_examples=int(os.environ.get("DEAR_BATCH_FUZZ_EXAMPLES", "200")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.sampled_from(places(GOOD)[1:]), value=VALUES, remove=st.booleans())
def test_any_value_anywhere(
    place: tuple[Any, ...], value: object, remove: bool, tmp_path: Path
) -> None:
    fields = copy.deepcopy(GOOD)
    parent = fields
    for key in place[:-1]:
        parent = parent[key]
    if remove:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    (tmp_path / "bundle.json").write_text(json.dumps(fields))
    try:
        bundle = open_bundle(tmp_path, verify=False)
    except DearBatchError:
        return
    Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8")).print(inspect_path(tmp_path))
    assert bundle.manifest.to_json()
    if bundle.manifest.files:  # and none of them is there
        with pytest.raises(DearBatchError):
            open_bundle(tmp_path)
