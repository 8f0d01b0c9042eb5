"""A GPU that only pretends, for test_gpu_path.py: `run_on_it(SCRIPT, FLAGS)`, in a process of its own.

A tensor of this device holds its numbers in a CPU tensor, `inner`, and refuses to meet CPU tensors. While a graph is
captured, operations are recorded, what they write is undone, and asking for a value is an error. A replay runs them
again on the same memory. Scripts are run with the device's name in place of "cuda"; autocast does nothing.
"""

import contextlib
import sys
import types

import torch
import torch._decomp.decompositions_for_jvp  # noqa: F401  before functions of torch are replaced
from helpers import ROOT, run_main
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  the same

NAME = "pretend"


class PretendTensor(torch.Tensor):
    """A tensor of the device, around `inner`, a tensor of the CPU."""

    @staticmethod
    def __new__(cls, inner):
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=f"{NAME}:0", **layout)
        tensor.inner = inner.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), settings=None):
        return run(operation, *args, **(settings or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = PretendTensor(self.inner.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def tolist(self):
        return self.cpu().tolist()


def is_pretend(value):
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def to_inner(value):
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.inner if is_pretend(value) else value


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def run(operation, *args, **settings):
    """Run an operation on the inner tensors. Refuses what a GPU refuses."""
    name, tensors = operation._schema.name, tensors_of((args, settings))
    from_cpu = [tensor for tensor in tensors if not is_pretend(tensor)]
    to_cpu = name == "aten::_local_scalar_dense"
    to_cpu |= name == "aten::_to_copy" and torch.device(settings.get("device") or NAME).type == "cpu"
    is_copy = name in ("aten::copy_", "aten::_to_copy")
    if Graph.current and (to_cpu or from_cpu):
        raise RuntimeError(f"{name} needs the CPU while a graph is captured")
    if not is_copy and any(tensor.ndim for tensor in from_cpu) and len(from_cpu) < len(tensors):
        raise RuntimeError(f"{name} of tensors on different devices: {[str(tensor.device) for tensor in tensors]}")
    inner_args, inner_settings = tree_map(to_inner, (args, settings))
    if name == "aten::_efficientzerotensor":  # forward mode makes these; they have no memory
        operation = torch.ops.aten.zeros.default
    if Graph.current:
        Graph.current.remember(operation, inner_args, inner_settings)
    result = operation(*inner_args, **inner_settings)
    if Graph.current:
        Graph.current.tape.append((operation, inner_args, inner_settings, tensors_of(result)))
    if operation._schema.is_mutable and isinstance(result, torch.Tensor):  # in place: the same tensor again
        return next(tensor for tensor in tensors if to_inner(tensor) is result)
    return result if to_cpu else tree_map(lambda x: PretendTensor(x) if isinstance(x, torch.Tensor) else x, result)


class Graph:
    """What torch.cuda.CUDAGraph is to a GPU."""

    current, num_captures, num_replays = None, 0, 0

    def remember(self, operation, args, settings):
        """Keep a copy of what an operation is about to write to."""
        for index, argument in enumerate(operation._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else settings[argument.name]
                self.before.append((value, value.clone()))

    def replay(self):
        Graph.num_replays += 1
        for operation, args, settings, outputs in self.tape:
            for output, new in zip(outputs, tensors_of(operation(*args, **settings)), strict=True):
                if output.data_ptr() != new.data_ptr():  # neither a view nor in place
                    output.copy_(new)


@contextlib.contextmanager
def capture(graph, capture_error_mode):
    graph.tape, graph.before = [], []
    Graph.current = graph
    yield
    Graph.current = None
    Graph.num_captures += 1
    inputs = {tensor.data_ptr() for _, args, settings, _ in graph.tape for tensor in tensors_of((args, settings))}
    outputs = [output for *_, outputs in graph.tape for output in outputs]
    for tensor, old in reversed(graph.before):
        tensor.copy_(old)
    for output in outputs:  # nothing was computed yet
        if output.is_floating_point() and output.data_ptr() not in inputs:
            output.fill_(float("nan"))


class Device(backend_registration._DummyBackendModule):
    """What torch.cuda is to a GPU."""

    CUDAGraph, graph = Graph, staticmethod(capture)

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def set_device(self, device):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def without_device(function):
    """A function that makes its tensor on the CPU and puts it onto the device without a copy that a graph would see."""

    def make(*args, device=None, **settings):
        on_it = device is not None and torch.device(device).type == NAME
        tensor = function(*args, device=None if on_it else device, **settings)
        return PretendTensor(tensor) if on_it else tensor

    return make


def load(name):
    """The module `name` of the project, for this device."""
    source = (ROOT / f"{name}.py").read_text().replace('"cuda', f'"{NAME}').replace("torch.cuda.", f"torch.{NAME}.")
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = str(ROOT / f"{name}.py")
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


def run_on_it(name, flags):
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Device())
    everything, autocast = torch.library.Library("_", "IMPL"), torch.library.Library("_", "IMPL")
    everything.fallback(run, "PrivateUse1")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    common = load("common")
    script = load(name)
    with torch.device("meta"):  # torch lists its constructors here, once: without it, three of them would be missing,
        torch.empty(0)  # and a loaded checkpoint would keep rotary frequencies that were never written
    for function in ("tensor", "arange"):
        setattr(torch, function, without_device(getattr(torch, function)))
    generator = torch.Generator
    torch.Generator = lambda device: generator("cpu")
    common.NUM_SORT_PROMPTS = 2**9
    common.save_model = common.save_checkpoint = lambda *args: None  # files are written from memory it does not have
    run_main(script, *flags)
    print(f"{Graph.num_captures} captures, {Graph.num_replays} replays")
