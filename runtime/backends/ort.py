"""Engines in ONNX Runtime: graphs that `iedit export onnx` wrote, on the CPU or a GPU.

Tensors are bound by address: nothing is copied on the way in or out. On one core the picture-book UNet takes 8.1 ms a
sample alone and 5.1 ms in a batch of 8, eager torch 18 and 6.7. Two samples on two cores take 9.5 ms by two threads in one
call and 8.1 by one thread each, twenty 67 and 59.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoise_step import Condition, IdentityCache
from ..errors import RunError, UsageError
from ..model import module_io
from ..model.model import Model
from ..profile import module_call
from .base import missing, refuse, unet_inputs, unet_module
from .engine_spec import EngineSpec, damaged, engines_folder, find_engines, writable_by_all

GRAPH = "model.onnx"
SMALL = 128 << 20  # bytes of a UNet that may be held twice
_PRECISION = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def why_unavailable() -> list[str]:
    """Reasons why ONNX Runtime cannot run here; empty if it can."""
    return missing("onnxruntime", extra="onnx")


class OnnxBackend:
    """The modules of a model for which a valid engine was found; see `backends.Backend`.

    An engine is used if every field of its spec is the model's: the others are refused, and `why_not` says why. Sessions
    are made when a module is first called. Calls from several threads are safe.

    Args:
        engines: folder of engines; None is the user's cache, by the model's digest.
        providers: of ONNX Runtime, best first; None is CUDA on a GPU and the CPU's on a CPU.
        threads: of the CPU; None is torch's.
        trust_engines: also use engines that every user of this machine may change.

    Raises:
        UsageError: no engine of a UNet can be used.
    """

    name = "onnx"

    def __init__(
        self,
        model: Model,
        engines: Path | None = None,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        trust_engines: bool = False,
    ):
        self.model, self.device, self.threads = model, model.device, threads
        self.folder = engines_folder(model.weights_digest) if engines is None else engines
        self.trust = trust_engines
        self.refused: dict[str, list[str]] = {}  # module, or a folder that names none -> reasons
        self._found: dict[str, list[tuple[Path, EngineSpec]]] = {}  # best first, until one turns out damaged
        self._sound: dict[str, tuple[Path, EngineSpec]] = {}  # files compared with their digests
        self._sessions: dict[tuple[str, int], Any] = {}  # module, threads
        self._bytes: dict[str, int] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.RLock()
        self._cache: IdentityCache[dict[str, Tensor]] = IdentityCache(4)
        self._find()
        if not any(self.engine(m) for m in list(self._found) if m.startswith("unet")):
            told = [f"{m}: {'; '.join(why)}" for m, why in self.refused.items()] or ["there are no ONNX engines in it"]
            raise UsageError(
                f"no engine of {model.name} can be used: {self.folder}: {'; '.join(told)}; run `iedit export onnx {model.name}`"
            )
        # Not before there is something to run: see `_onnxruntime`.
        self.providers = _providers(model.device, providers)

    def _find(self) -> None:
        own = _PRECISION[self.model.dtype]
        wanted = [own] if own == "fp32" else [own, "fp32"]
        for folder, spec in find_engines(self.folder):
            if isinstance(spec, UsageError):
                self.refused.setdefault(folder.name, []).append(str(spec))
                continue
            if spec.format != "onnx":
                continue
            why = self._differs(spec)
            if not why and spec.precision not in wanted:
                why = [f"precision: the engine has {spec.precision}, wanted {' or '.join(wanted)}"]
            if not why and self.device.type == "cpu" and spec.precision == "bf16":
                why = ["precision: bf16 has no convolutions in ONNX Runtime on a CPU; export fp32"]
            if why:
                self.refused.setdefault(spec.module, []).extend(f"{folder}: {w}" for w in why)
            else:
                self._found.setdefault(spec.module, []).append((folder, spec))
        for found in self._found.values():
            found.sort(key=lambda one: (wanted.index(one[1].precision), -one[1].opset))

    def _differs(self, spec: EngineSpec) -> list[str]:
        try:
            digest = self.model.module_digest(spec.module)
        except KeyError as error:
            return [f"module: {spec.module} needs {error.args[0]}, which the model does not have"]
        return spec.differs(weights=digest) + ([] if GRAPH in spec.files else [f"files: {GRAPH} is not among them"])

    def engine(self, module: str) -> tuple[Path, EngineSpec] | None:
        """The folder and spec of the engine that runs `module`, its files compared with their digests; None if there is none."""
        with self._lock:
            while module not in self._sound and self._found.get(module):
                folder, spec = self._found[module][0]
                why = damaged(folder, spec) or ([] if self.trust else writable_by_all(folder, spec, self.folder))
                if not why:
                    self._sound[module] = (folder, spec)
                    break
                self.refused.setdefault(module, []).extend(f"{folder}: {w}" for w in why)
                self._found[module].pop(0)
            return self._sound.get(module)

    def engine_digests(self, module: str) -> list[str]:
        """`EngineSpec.digest` of what runs `module`; empty if nothing does."""
        found = self.engine(module)
        return [] if found is None else [found[1].digest]

    def modules(self) -> list[str]:
        """Names of the modules that an engine fits; its files may turn out damaged (`engine`)."""
        return sorted(self._found)

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        """A fused UNet needs the engines of its layouts' embeddings too."""
        hints = module_io.hint_modules(module)
        return [why for name in (module, *hints) for why in self._why_not(name, batch, height, width)]

    def _why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        found = self.engine(module)
        if found is None:
            none = f"there is no engine for {module} in {self.folder} (run `iedit export onnx {self.model.name}`)"
            return [none, *self.refused.get(module, [])]
        spec = found[1]
        if module == "text_encoder":  # a text has no height
            height, width = spec.shapes[0].height[1], spec.shapes[0].width[1]
        why = spec.out_of_range(batch, height, width)
        # The VAE's halves take multiples of its own factor; a UNet's levels halve the latent further.
        step = self.model.multiple if module.startswith("unet") else self.model.vae_scale_factor
        if module != "text_encoder" and (height % step or width % step):
            why.append(f"{module} takes width and height in multiples of {step}, asked for {width}x{height}")
        return why

    # --- modules ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `base.Denoiser`."""
        module, size = (
            unet_module(condition),
            (x.shape[-2] * self.model.vae_scale_factor, x.shape[-1] * self.model.vae_scale_factor),
        )
        hints: Mapping[str, Tensor] = {}
        if condition.controls:
            refuse(self, module, len(x), *size)  # before the hints, so that it is the UNet that is named
            hints = self._hints(condition)
        inputs = unet_inputs(x, t, condition, hints)
        return self._run(module, inputs, tuple(x.shape), size)

    def _hints(self, condition: Condition) -> dict[str, Tensor]:
        return self._cache.get([condition], lambda: {c.name: self.hint(c.name, c.image) for c in condition.controls})

    @torch.no_grad()
    def hint(self, name: str, maps: Tensor) -> Tensor:
        """(B, 3, H, W) map in [0, 1] -> (B, C0, h, w) float32, its embedding; `predict` asks once for each condition."""
        batch, _, height, width = maps.shape
        channels = int(self.model.controlnets[name].config.block_out_channels[0])
        shape = (batch, channels, height // self.model.vae_scale_factor, width // self.model.vae_scale_factor)
        return self._run(module_io.HINT_PREFIX + name, [maps], shape, (height, width))

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        b, _, height, width = images.shape
        shape = (b, self.model.channels, height // self.model.vae_scale_factor, width // self.model.vae_scale_factor)
        return self._run("vae_encoder", [images], shape, (height, width))

    @torch.no_grad()
    def decode_latent(self, latents: Tensor) -> Tensor:
        height, width = latents.shape[-2] * self.model.vae_scale_factor, latents.shape[-1] * self.model.vae_scale_factor
        return self._run("vae_decoder", [latents], (len(latents), 3, height, width), (height, width))

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor) -> Tensor:
        shape = (*ids.shape, int(self.model.text_encoder.config.hidden_size))
        return self._run("text_encoder", [ids], shape, (0, 0))

    def _run(self, module: str, inputs: Sequence[Tensor], shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
        """One call; `size` is (height, width) in pixels. Returns (shape) float32 of the caller's own."""
        refuse(self, module, shape[0], *size)
        first = inputs[0]
        threads = self._threads()
        alone = self._one_thread_each(module, shape[0], threads)
        key = (module, 1 if alone else threads)
        (engine,) = self.engine_digests(module)
        cold = key not in self._sessions
        with module_call(module, self.name, shape[0], cold=cold, device=first.device, engine=engine):
            session = self._session(*key)
            result = torch.empty(shape, dtype=torch.float32, device=self.device)
            kinds = [torch.int64 if name in module_io.INTEGERS else torch.float32 for name in module_io.inputs(module)]
            # Bound by address: they live until the call is over.
            given = [value.to(self.device, kind).contiguous() for value, kind in zip(inputs, kinds, strict=True)]
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
            if alone:
                step = shape[0] // threads
                pieces = [slice(i, i + step) for i in range(0, shape[0], step)]
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
            else:
                self._execute(module, session, given, result)
        return result

    def _execute(self, module: str, session: Any, given: Sequence[Tensor], result: Tensor) -> None:
        """Inputs of the module's own types, contiguous, into `result`."""
        binding = session.io_binding()
        for name, value in zip(module_io.inputs(module), given, strict=True):
            _bind(binding.bind_input, name, value)
        _bind(binding.bind_output, module_io.output(module), result)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            told = str(error).splitlines()[0][:300]
            if "allocate" in told.lower():
                # The words by which `network.Network` knows it and goes on with smaller batches.
                raise MemoryError(f"onnxruntime can't allocate memory: {told}") from error
            raise RunError(f"onnxruntime could not run {module} on {tuple(given[0].shape)}: {told}") from error

    def _threads(self) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads

    def _one_thread_each(self, module: str, batch: int, threads: int) -> bool:
        """Whether the samples of a call are shared out to threads that do not wait for each other in every operator: for a
        small UNet and a batch that they divide. It has a session of its own, with its own copy of the weights."""
        found = self.engine(module)
        if (
            self.device.type != "cpu"
            or threads == 1
            or batch % threads
            or not module.startswith("unet")
            or found is None
        ):
            return False
        if module not in self._bytes:
            self._bytes[module] = sum((found[0] / name).stat().st_size for name in found[1].files)
        return self._bytes[module] <= SMALL

    def _workers(self, threads: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(threads - 1, "iedit-onnx")
            return self._pool

    def _session(self, module: str, threads: int) -> Any:
        with self._lock:
            if (module, threads) not in self._sessions:
                found = self.engine(module)
                assert found is not None  # `refuse` has been asked
                looped = module.startswith("unet")
                self._sessions[module, threads] = new_session(found[0] / GRAPH, self.providers, threads, looped=looped)
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


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    import numpy as np

    kind = np.int64 if tensor.dtype == torch.int64 else np.float32
    bind(name, tensor.device.type, tensor.device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr())


def _providers(device: torch.device, asked: Sequence[str] | None) -> list[Any]:
    """With their options, for the model's device; the CPU's is always the last.

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
    options = {"device_id": str(device.index or 0)} if device.type == "cuda" else {}
    found: list[Any] = [(name, options) if name != "CPUExecutionProvider" else name for name in wanted]
    return found if "CPUExecutionProvider" in wanted else [*found, "CPUExecutionProvider"]


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
        RunError: ONNX Runtime cannot load it; its own words.
    """
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors: it warns of every weight that a fusion leaves over
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if looped:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "2000")
    else:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.parent.resolve())
    )
    tensorrt = any("Tensorrt" in str(p) for p in providers)  # which has its own GroupNormalization
    try:
        source: bytes | str = str(graph)
        if not tensorrt and not missing("onnx", extra="onnx"):
            import onnx

            proto = onnx.load(str(graph), load_external_data=False)
            instance_norms(proto.graph)
            source = proto.SerializeToString()
        return onnxruntime.InferenceSession(source, options, providers=list(providers))
    except Exception as error:
        told = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise RunError(f"{graph}: onnxruntime cannot load it: {told}") from error


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
