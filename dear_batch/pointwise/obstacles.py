"""What keeps an engine from running on a machine, whatever the model, and what helps.

Decides from facts alone, so that any machine can be simulated.
"""

from collections.abc import Callable, Sequence

from dear_batch.machine import LEAST_DRIVER, VISIBLE, Gpu, Machine, Package

Obstacle = tuple[str, str]  # why not, and what helps

NO_GPU = (
    "with an NVIDIA GPU here, install its driver, or start the container with --gpus all; "
    "nvidia-smi shows whether that worked"
)
HIDDEN = f"unset {VISIBLE}, or name in it a GPU that nvidia-smi -L lists"
# What TensorRT for RTX builds for ahead of time; Hopper (sm_90) needs the full TensorRT.
RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")


def gpu_of(machine: Machine, device: str) -> Gpu | Obstacle:
    """The GPU of "auto", "cuda" or "cuda:N"."""
    if not machine.driver.gpus:
        hidden = machine.driver.cuda and machine.driver.visible is not None
        return machine.driver.fault, HIDDEN if hidden else NO_GPU
    found = machine.gpu("cuda" if device == "auto" else device)
    if found is None:
        numbers = ", ".join(f"cuda:{gpu.number}" for gpu in machine.driver.gpus)
        return f"there is no GPU {device}", f"--device with one of {numbers}"
    return found


def on_cpu(machine: Machine, engine: str) -> Obstacle | None:
    """What keeps ONNX Runtime or PyTorch from the CPU."""
    if engine == "onnxruntime" and machine.onnxruntime is None:
        return "onnxruntime is not installed", "pip install onnxruntime-gpu"
    if engine == "torch" and machine.torch is None:
        return "torch is not installed", "pip install 'dear-batch[export]'"
    return None


def on_cuda(machine: Machine, engine: str) -> Obstacle | None:
    """What keeps ONNX Runtime or PyTorch from a GPU that is there."""
    return (_onnxruntime if engine == "onnxruntime" else _torch)(machine)


def tensorrt(machine: Machine, package: Package, fault: Callable[[str], str]) -> Obstacle | None:
    """What keeps an installed TensorRT from a GPU; `fault` says why a module does not import."""
    name = package.name.replace("_", "-")
    install = f"pip install 'dear-batch[{name}]'"
    for needed in (package, machine.cuda_core):
        if needed is None:
            return "cuda-core, by which Python calls CUDA, is not installed", install
        if obstacle := _too_old(machine, needed):
            return obstacle
    return _unimportable(package, (package.name, "cuda.core"), fault)


def building(machine: Machine, package: Package, fault: Callable[[str], str]) -> Obstacle | None:
    """What keeps an installed TensorRT from building; the one for RTX needs no GPU for that."""
    if package.name == "tensorrt":
        if not machine.driver.gpus:
            return "it builds for the GPU that is there", NO_GPU
        if obstacle := _too_old(machine, package):
            return obstacle
    return _unimportable(package, (package.name,), fault)


def _unimportable(
    package: Package, modules: Sequence[str], fault: Callable[[str], str]
) -> Obstacle | None:
    install = f"pip install 'dear-batch[{package.name.replace('_', '-')}]' --force-reinstall"
    for module in modules:
        if why := fault(module):
            return f"{module} cannot be imported: {why}", install
    return None


def _onnxruntime(machine: Machine) -> Obstacle | None:
    package = machine.onnxruntime
    if package is None:
        return "onnxruntime is not installed", "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    if package.cuda is None:
        why = f"{package.name} {package.version} is a build for CPUs"
        again = "pip install --force-reinstall 'onnxruntime-gpu[cuda,cudnn]'"
        return why, f"pip uninstall onnxruntime, then {again}"
    if obstacle := _too_old(machine, package):
        return obstacle
    if package.fault:
        why = f"its CUDA libraries: {package.fault}"
        return why, "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    return None


def _torch(machine: Machine) -> Obstacle | None:
    package = machine.torch
    if package is None:
        return "torch is not installed", "pip install 'dear-batch[export]'"
    if package.cuda is None:
        why = f"torch {package.version} is a build for CPUs"
        return why, "install one for CUDA: https://pytorch.org/get-started/locally/"
    return _too_old(machine, package)


def _too_old(machine: Machine, package: Package) -> Obstacle | None:
    """What to do where the driver does not know the CUDA that a package was built for."""
    known = machine.driver.cuda
    if known is None or package.cuda is None or known[0] >= package.cuda:
        return None
    needs = f"{package.name} {package.version} needs CUDA {package.cuda}"
    driver = f"the NVIDIA driver {machine.driver.version or ''}".rstrip()
    least = LEAST_DRIVER.get(package.cuda)
    update = "update the NVIDIA driver" + (f" to {least} or newer" if least else "")
    return f"{needs}, and {driver} knows CUDA up to {known[0]}.{known[1]}", update
