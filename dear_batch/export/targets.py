"""Which TensorRT builds for which kinds of GPU: decided from plain facts."""

from collections.abc import Mapping, Sequence

from dear_batch.bundle import Flavour
from dear_batch.errors import ConfigurationError, UsageError

INSTALL = (
    "on a machine with the GPU: pip install 'dear-batch[tensorrt]'; to build ahead of time: "
    "pip install 'dear-batch[tensorrt-rtx]'"
)


def targets(
    asked: Sequence[str],
    flavour: Flavour | None,
    gpus: Sequence[str],
    installed: Mapping[Flavour, Sequence[str]],
) -> tuple[Flavour, tuple[str, ...]]:
    """The product to build with, and the kinds of GPU to build for.

    `tensorrt` is the faster one, and builds for the GPU that is there alone.

    Args:
        asked: kinds of GPU such as "sm_89"; empty for the one that is there.
        flavour: the product, if one is asked for.
        gpus: kinds of the GPUs of this machine; CUDA's first one builds.
        installed: products that can be imported, and what they build for without a GPU.

    Raises:
        ConfigurationError: nothing that is installed builds for them.
        UsageError: there is no GPU and no target.
    """
    for name in ("tensorrt", "tensorrt_rtx") if flavour is None else (flavour,):
        if name not in installed:
            continue
        known = {*gpus[:1], *installed[name]} if name == "tensorrt" else {*installed[name]}
        wanted = tuple(dict.fromkeys(asked)) or tuple(gpus[:1])
        if wanted and known.issuperset(wanted):
            return name, wanted
    raise _none(asked, flavour, gpus, installed)


def _none(
    asked: Sequence[str],
    flavour: Flavour | None,
    gpus: Sequence[str],
    installed: Mapping[Flavour, Sequence[str]],
) -> ConfigurationError | UsageError:
    usable = [name for name in installed if flavour in {None, name}]
    if not usable:
        what = (flavour or "tensorrt").replace("_", "-")
        return ConfigurationError(
            f"Building needs the package {what!r}, which is not installed or cannot be imported.",
            next_step=INSTALL,
        )
    ahead = [sm for name in usable for sm in installed[name]]
    if not asked and not gpus and ahead:
        return UsageError(
            "This machine has no GPU, so the kinds of GPU to build for must be named.",
            where="targets",
            valid=", ".join(ahead),
            next_step="--target sm_XX; nvidia-smi --query-gpu=compute_cap --format=csv "
            "tells on the GPU's machine (8.9 is sm_89)",
        )
    known = {*ahead, *(gpus[:1] if "tensorrt" in usable else ())}
    beyond = [sm for sm in asked or gpus[:1] if sm not in known] or [*asked, *gpus][:1]
    return ConfigurationError(
        f"{' and '.join(usable)} cannot build for {', '.join(beyond) or 'no GPU'} here.",
        valid=", ".join(dict.fromkeys([*gpus[:1], *ahead])) or "a machine with a GPU",
        next_step="on a machine that has such a GPU: pip install 'dear-batch[tensorrt]', then the "
        "same command without --target",
    )
