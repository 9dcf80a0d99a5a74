"""Engines in ONNX Runtime: graphs that `iedit export onnx` wrote, on the CPU or a GPU.

Tensors are bound by address: nothing is copied on the way in or out. On one core the picture-book UNet takes 8.1 ms a
sample alone and 5.1 ms in a batch of 8, eager torch 18 and 6.7. Two samples on two cores take 9.5 ms by two threads in one
call and 8.1 by one thread each, twenty 67 and 59.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError, UsageError, first_line
from ..model import module_io
from ..model.model import Model
from ..profile import module_call
from .base import BackendOptions, UnavailableError, import_failure, missing
from .engine import Engine, EngineBackend
from .engine_spec import EngineSpec

GRAPH = "model.onnx"
ATTENTION_ON_CUDA = (
    1,
    27,
)  # the version of onnxruntime-gpu from which on opset 23's Attention is taken to run on the GPU
SMALL = 128 << 20  # bytes of a UNet's engine up to which a second session may hold its weights too


def why_unavailable() -> list[str]:
    """Reasons why ONNX Runtime cannot run here; empty if it can. It is imported to know that."""
    return missing("onnxruntime", extra="onnx") or import_failure("onnxruntime", _onnxruntime)


def load(model: Model, options: BackendOptions) -> OnnxBackend:
    """See `backends.load_backend`."""
    return OnnxBackend(model, options.engines, trust_engines=options.trust_engines)


class OnnxBackend(EngineBackend):
    """The modules of a model for which a valid ONNX graph was found. A session is made when a module is first called; calls from
    several threads are safe. Arguments as of `EngineBackend`, and:

    Args:
        providers: of ONNX Runtime, best first; None is CUDA on a GPU and the CPU's on a CPU.
        threads: of the CPU; None is torch's.
    """

    name = "onnx"
    format_name = "ONNX"
    file = GRAPH

    def __init__(
        self,
        model: Model,
        engines: Path | None = None,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        trust_engines: bool = False,
    ):
        absent = missing("onnxruntime", extra="onnx")
        if absent:
            raise UnavailableError(self.name, absent)
        super().__init__(model, engines, trust_engines)
        self.threads = threads
        self._sessions: dict[tuple[str, int], Any] = {}  # by module and threads
        self._bytes: dict[str, int] = {}
        self._pool: ThreadPoolExecutor | None = None
        # Last, so that ONNX Runtime is imported only where there is something to run (see `_onnxruntime`).
        why = why_unavailable()
        if why:
            raise UnavailableError(self.name, why)
        self.providers = _providers(model.device, providers)

    def _differs(self, spec: EngineSpec) -> list[str]:
        why = super()._differs(spec)
        if not why and self.device.type == "cpu" and spec.precision == "bf16":
            why = ["precision: bf16 has no convolutions in ONNX Runtime on a CPU; export fp32"]
        if not why and self.device.type == "cuda" and spec.attention == "operator":
            why = _attention_on_cpu(installed_version())
        return why

    def engines(self, module: str) -> list[Engine]:
        """The best engine of a module alone: one graph takes every shape."""
        return list(itertools.islice(self._sound(module), 1))

    def engine(self, module: str) -> Engine | None:
        """The engine that runs a module; None if there is none."""
        return next(self._sound(module), None)

    # --- calls --------------------------------------------------------------------------------------------------

    def _output_shape(self, module: str, first: Tensor) -> tuple[int, ...]:
        """Shape of a module's output, by its first input."""
        model, factor = self.model, self.model.vae_scale_factor
        batch, (height, width) = len(first), first.shape[-2:]
        if module.startswith(module_io.CONTROL_EMBEDDING_PREFIX):
            net = model.controlnets[module.removeprefix(module_io.CONTROL_EMBEDDING_PREFIX)]
            return (batch, int(net.config.block_out_channels[0]), height // factor, width // factor)
        if module == "vae_encoder":
            return (batch, model.channels, height // factor, width // factor)
        if module == "vae_decoder":
            return (batch, 3, height * factor, width * factor)
        if module == "text_encoder":
            return (*first.shape, int(model.text_encoder.config.hidden_size))
        return (batch, model.channels, height, width)  # what an InstructPix2Pix UNet takes is wider

    def _run(self, module: str, inputs: Sequence[Tensor], height: int, width: int) -> Tensor:
        first = inputs[0]
        batch = len(first)
        threads = torch.get_num_threads() if self.threads is None else self.threads
        alone = self._one_thread_each(module, batch, threads)
        key = (module, 1 if alone else threads)
        (digest,) = self.engine_digests(module)
        cold = key not in self._sessions
        with module_call(module, self.name, batch, cold=cold, device=first.device, engine=digest):
            session = self._session(*key)
            result = torch.empty(self._output_shape(module, first), dtype=torch.float32, device=self.device)
            names = module_io.inputs(module)
            dtypes = [torch.int64 if name in module_io.INTEGERS else torch.float32 for name in names]
            # Bound by address, so they must live until the call is over.
            given = [value.to(self.device, dtype).contiguous() for value, dtype in zip(inputs, dtypes, strict=True)]
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
            if alone:
                self._share_out(module, session, given, result, threads)
            else:
                self._execute(module, session, given, result)
        return result

    def _share_out(self, module: str, session: Any, given: Sequence[Tensor], result: Tensor, threads: int) -> None:
        """One call with its samples shared out to `threads` threads, of which this one is the first."""
        step = len(result) // threads
        pieces = [slice(i, i + step) for i in range(0, len(result), step)]
        calls = [
            self._workers(threads).submit(self._execute, module, session, [g[p] for g in given], result[p])
            for p in pieces[1:]
        ]
        try:
            self._execute(module, session, [g[pieces[0]] for g in given], result[pieces[0]])
        finally:
            wait(calls)
        for call in calls:
            call.result()

    def _execute(self, module: str, session: Any, given: Sequence[Tensor], result: Tensor) -> None:
        """One call of a session.

        Args:
            given: contiguous inputs of the module's own types, in the order of `module_io.inputs`.
            result: contiguous, filled.
        """
        binding = session.io_binding()
        for name, value in zip(module_io.inputs(module), given, strict=True):
            _bind(binding.bind_input, name, value)
        _bind(binding.bind_output, module_io.output(module), result)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            reason = first_line(error, 300)
            if "allocate" in reason.lower():
                # The words by which `network.Network` knows it and goes on with smaller batches.
                raise MemoryError(f"onnxruntime can't allocate memory: {reason}") from error
            raise RunError(f"onnxruntime could not run {module} on {tuple(given[0].shape)}: {reason}") from error

    def _one_thread_each(self, module: str, batch: int, threads: int) -> bool:
        """Whether the samples of a call are shared out to threads that do not wait for each other in every operator: for a
        small UNet and a batch that they divide. It has a session of its own, with its own copy of the weights."""
        engine = self.engine(module)
        divides = threads > 1 and batch % threads == 0
        if self.device.type != "cpu" or not divides or not module.startswith("unet") or engine is None:
            return False
        if module not in self._bytes:
            self._bytes[module] = sum((engine[0] / name).stat().st_size for name in engine[1].files)
        return self._bytes[module] <= SMALL

    def _workers(self, threads: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(threads - 1, "iedit-onnx")
            return self._pool

    def _session(self, module: str, threads: int) -> Any:
        with self._lock:
            if (module, threads) not in self._sessions:
                engine = self.engine(module)
                assert engine is not None  # `refuse` has been asked
                looped = module.startswith("unet")
                self._sessions[module, threads] = new_session(engine[0] / GRAPH, self.providers, threads, looped=looped)
            return self._sessions[module, threads]


def _onnxruntime() -> Any:
    """The package, with its telemetry off.

    From 1.31 on importing it writes a device id and a queue of events to the user's cache, unless this variable was set
    before; to switch it off afterwards (`disable_telemetry_events`) is too late for those.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def installed_version() -> str:
    """Of whichever package ONNX Runtime was installed as; "" where none says. It is not imported for that."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""


def _attention_on_cpu(version: str) -> list[str]:
    """A reason if the CUDA provider of a version computes ONNX's operator Attention on the CPU, or refuses `softmax_precision`
    (ONNX Runtime's issue 28025 and pull request 27714)."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if not numbers or numbers >= ATTENTION_ON_CUDA:
        return []
    least = ".".join(map(str, ATTENTION_ON_CUDA))
    return [
        f"attention: the operator runs on the CPU before onnxruntime-gpu {least}, here is {version}; install a newer one, or export with --opset 22"
    ]


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    import numpy as np

    dtype = np.int64 if tensor.dtype == torch.int64 else np.float32
    bind(name, tensor.device.type, tensor.device.index or 0, dtype, tuple(tensor.shape), tensor.data_ptr())


def _providers(device: torch.device, asked: Sequence[str] | None) -> list[Any]:
    """The execution providers of ONNX Runtime for the model's device, with their options; the CPU's is always the last.

    Raises:
        UsageError: the installed ONNX Runtime has none for it, or not the one that was asked for.
    """
    onnxruntime = _onnxruntime()
    have = onnxruntime.get_available_providers()
    wanted = list(asked) if asked else ["CUDAExecutionProvider"] if device.type == "cuda" else ["CPUExecutionProvider"]
    for name in wanted:
        if name not in have:
            fix = ' (pip install "iedit[gpu]")' if name.startswith(("CUDA", "Tensorrt")) else ""
            raise UsageError(f"this onnxruntime has no {name}{fix}; it has {', '.join(have)}")
    options = {}
    if device.type == "cuda":
        # By default every new shape tries all of cuDNN's algorithms, and float32 is rounded to TF32's 10 bits.
        options = {"device_id": str(device.index or 0), "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
    own = {"CUDAExecutionProvider": options, "TensorrtExecutionProvider": {"device_id": options.get("device_id", "0")}}
    providers: list[Any] = [(name, own[name]) if name in own else name for name in wanted]
    return providers if "CPUExecutionProvider" in wanted else [*providers, "CPUExecutionProvider"]


def new_session(
    graph: Path,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    threads: int | None = None,
    *,
    looped: bool = False,
) -> Any:
    """An ONNX Runtime session of a graph, whose weights lie beside it.

    Args:
        threads: None is torch's number.
        looped: the next call follows within 2 ms, so the threads wait for it awake. A session's threads that wait longer take
            the cores from the next session's: after the VAE's encoder the mask's call took 104 ms, with this 68.

    Raises:
        RunError: ONNX Runtime cannot load it, in its own words, or has quietly taken another provider than the first.
    """
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # A memory plan for each shape that was ever seen holds memory of its own: gigabytes after many batches and sizes, and no faster.
    options.enable_mem_pattern = False
    options.log_severity_level = 3  # errors: it warns of every weight that a fusion leaves over
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if looped:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "2000")
    else:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.parent.resolve())
    )
    names = [p if isinstance(p, str) else p[0] for p in providers]
    try:
        # Measured on a CPU; other providers have a GroupNormalization of their own.
        source = _rewritten(graph) if names == ["CPUExecutionProvider"] else str(graph)
        session = onnxruntime.InferenceSession(source, options, providers=list(providers))
    except Exception as error:
        raise RunError(f"{graph}: onnxruntime cannot load it: {first_line(error, 300)}") from error
    taken = session.get_providers()
    if names[0] not in taken:  # its libraries could not be loaded, which is an error in no log that anybody sees
        raise RunError(
            f"{graph}: onnxruntime took {', '.join(taken)} in place of {names[0]}, whose libraries it could not load; install the "
            "CUDA and cuDNN that this onnxruntime-gpu was built for"
        )
    return session


def _rewritten(graph: Path) -> bytes | str:
    """A graph with `instance_norms`; as it is where `onnx` is not there, or broken."""
    try:
        import onnx
    except Exception:
        return str(graph)
    proto = onnx.load(str(graph), load_external_data=False)
    instance_norms(proto.graph)
    data: bytes = proto.SerializeToString()
    return data


def instance_norms(graph: Any) -> None:
    """GroupNormalization -> Reshape, InstanceNormalization, Reshape, BatchNormalization, in place.

    ONNX Runtime has no kernel for the former and runs it as eleven operators; these four have one each. On the
    picture-book UNet that saves 14 % at batch 1, 11 % at 2 and 7 % at 8.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    taken = {i.name for i in graph.initializer}
    channels = {i.name: i.dims[0] for i in graph.initializer if len(i.dims) == 1}
    # BatchNormalization divides by sqrt(variance + epsilon): exactly 1.
    epsilon = 2.0**-10

    def constant(name: str, value: Any) -> str:
        if name not in taken:
            taken.add(name)
            graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    nodes = []
    for node in graph.node:
        if node.op_type != "GroupNormalization" or node.input[1] not in channels:
            nodes.append(node)
            continue
        x, scale, bias = node.input
        y = node.output[0]
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        groups, size = given["num_groups"], channels[scale]
        into = constant(f"iedit_into_{groups}_groups", np.array([0, groups, -1], dtype=np.int64))
        ones = constant(f"iedit_ones_{groups}", np.ones(groups, dtype=np.float32))
        zeros = constant(f"iedit_zeros_{groups}", np.zeros(groups, dtype=np.float32))
        mean = constant(f"iedit_mean_{size}", np.zeros(size, dtype=np.float32))
        variance = constant(f"iedit_variance_{size}", np.full(size, 1 - epsilon, dtype=np.float32))
        nodes += [
            helper.make_node("Reshape", [x, into], [y + "_groups"]),
            helper.make_node(
                "InstanceNormalization",
                [y + "_groups", ones, zeros],
                [y + "_normal"],
                epsilon=given.get("epsilon", 1e-5),
            ),
            helper.make_node("Shape", [x], [y + "_shape"]),
            helper.make_node("Reshape", [y + "_normal", y + "_shape"], [y + "_back"]),
            helper.make_node("BatchNormalization", [y + "_back", scale, bias, mean, variance], [y], epsilon=epsilon),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
