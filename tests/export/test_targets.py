"""Which product builds for what: any machine, simulated."""

import pytest

from dear_batch.bundle import Flavour
from dear_batch.errors import ConfigurationError, DearBatchError, UsageError
from dear_batch.export.targets import targets

RTX = ("sm_80", "sm_89", "sm_120")
BOTH: dict[Flavour, tuple[str, ...]] = {"tensorrt": (), "tensorrt_rtx": RTX}
ONLY_RTX: dict[Flavour, tuple[str, ...]] = {"tensorrt_rtx": RTX}
ONLY_FULL: dict[Flavour, tuple[str, ...]] = {"tensorrt": ()}


@pytest.mark.parametrize(
    ("asked", "flavour", "gpus", "installed", "expected"),
    [
        ((), None, ("sm_90",), BOTH, ("tensorrt", ("sm_90",))),
        (("sm_89",), None, ("sm_89",), BOTH, ("tensorrt", ("sm_89",))),
        (("sm_89",), None, ("sm_90",), BOTH, ("tensorrt_rtx", ("sm_89",))),
        (("sm_89", "sm_80"), None, ("sm_89",), BOTH, ("tensorrt_rtx", ("sm_89", "sm_80"))),
        ((), "tensorrt_rtx", ("sm_89",), BOTH, ("tensorrt_rtx", ("sm_89",))),
        ((), None, ("sm_89",), ONLY_RTX, ("tensorrt_rtx", ("sm_89",))),
        (("sm_80", "sm_80"), None, (), ONLY_RTX, ("tensorrt_rtx", ("sm_80",))),
        ((), None, ("sm_89", "sm_80"), ONLY_FULL, ("tensorrt", ("sm_89",))),
    ],
)
def test_the_better_product_that_can(
    asked: tuple[str, ...],
    flavour: Flavour | None,
    gpus: tuple[str, ...],
    installed: dict[Flavour, tuple[str, ...]],
    expected: tuple[Flavour, tuple[str, ...]],
) -> None:
    assert targets(asked, flavour, gpus, installed) == expected


Case = tuple[tuple[str, ...], Flavour | None, tuple[str, ...], dict[Flavour, tuple[str, ...]]]
NO_CHOICE: list[tuple[Case, type[DearBatchError], str, str]] = [
    (((), None, (), {}), ConfigurationError, "'tensorrt', which is not", "dear-batch[tensorrt]"),
    (
        (("sm_89",), "tensorrt_rtx", (), ONLY_FULL),
        ConfigurationError,
        "'tensorrt-rtx', which",
        "dear-batch[tensorrt-rtx]",
    ),
    (((), None, (), ONLY_RTX), UsageError, "has no GPU", "sm_80, sm_89, sm_120"),
    (((), None, (), BOTH), UsageError, "has no GPU", "sm_80, sm_89, sm_120"),
    (((), None, (), ONLY_FULL), ConfigurationError, "cannot build for no GPU", "with a GPU"),
    (
        (("sm_90",), None, (), ONLY_RTX),
        ConfigurationError,
        "cannot build for sm_90",
        "sm_80, sm_89, sm_120",
    ),
    (
        ((), None, ("sm_90",), ONLY_RTX),
        ConfigurationError,
        "cannot build for sm_90",
        "dear-batch[tensorrt]",
    ),
    ((("sm_80",), None, ("sm_90",), ONLY_FULL), ConfigurationError, "build for sm_80", "sm_90"),
]


@pytest.mark.parametrize(("case", "kind", "match", "hint"), NO_CHOICE)
def test_what_cannot_be_built_says_what_to_do(
    case: Case, kind: type[DearBatchError], match: str, hint: str
) -> None:
    with pytest.raises(kind, match=match) as caught:
        targets(*case)
    assert type(caught.value) is kind
    assert hint in f"{caught.value.valid} {caught.value.next_step}"
