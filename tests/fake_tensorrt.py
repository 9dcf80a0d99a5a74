"""A stand-in for TensorRT that records what it is asked and runs on the CPU: it knows the names of `tensorrt_manifest` only.

`model.onnx` holds a JSON here (`write_graph`), a plan is that JSON with its profiles, and an engine calls the Python function
registered for its module on tensors made of the addresses it was given. It is as strict as the documentation and the bindings: shapes out
of range, tensors without an address, inputs without a shape and contexts without memory are errors; addresses that are not
multiples of 256 are refused by a return value; exceptions in callbacks are swallowed; the operator Attention is read from 10.14 on, and
in float32 not built unless it may be decomposed; 11 has STRONGLY_TYPED still, as 0.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import torch
from torch import Tensor

ALIGNMENT = 256
KINDS = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
}


def write_graph(
    path: Path, module: str, inputs: Mapping[str, Any], output: Mapping[str, Any], attention: int = 0, **more: Any
) -> None:
    """`inputs`: name -> (dims, kind), open ones -1. `output`: name, kind and dims: (input, dimension, times, over) each, or a
    size. `attention`: operators of that name. `more`: errors, the parser's; fail, the builder's; and so on."""
    nodes = [onnx.helper.make_node("Attention", ["q", "k", "v"], [f"y{i}"]) for i in range(attention)]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, module, [], []))
    model.doc_string = json.dumps({"module": module, "inputs": inputs, "output": output, **more})
    path.write_bytes(model.SerializeToString())


def make_tensorrt(version: str, manifest: Any, functions: Mapping[str, Callable[..., Tensor]]) -> ModuleType:
    """The module `tensorrt` of a version ("10.12.0.36", "11.4.0"), with `calls`, what it was asked, in order.

    Args:
        functions: name of a module -> (inputs by name) -> output.
    """
    major, minor = (int(n) for n in version.split(".")[:2])
    calls: list[tuple[Any, ...]] = []

    class Checked:
        """No attribute that the manifest does not have, also not by assignment: a misspelt property is a silent no-op."""

        def __setattr__(self, name: str, value: Any) -> None:
            allowed = manifest.CLASSES.get(type(self).__name__, ())
            if not name.startswith("_") and name not in allowed:
                raise AttributeError(f"{type(self).__name__} has no property {name}")
            object.__setattr__(self, name, value)

    class ILogger:
        class Severity(enum.IntEnum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2

        def __init__(self) -> None:
            self._ready = True

    class IProgressMonitor:
        def __init__(self) -> None:
            self._ready = True

    def logger_of(log: Any) -> Any:
        # pybind11 classes need their own __init__ to have been called by a subclass
        assert isinstance(log, ILogger) and log._ready
        return log

    def swallowed(callback: Callable[..., Any], *arguments: Any) -> Any:
        """A callback as the bindings call it: what it raises is printed and gone."""
        try:
            return callback(*arguments)
        except BaseException:
            calls.append(("swallowed", callback.__name__))
            return None

    def fail(log: Any, text: str) -> None:
        swallowed(log.log, ILogger.Severity.ERROR, text)

    class ITensor(Checked):
        def __init__(self, name: str, shape: list[int]):
            self.name, self.shape = name, tuple(shape)

    class INetworkDefinition(Checked):
        def __init__(self) -> None:
            self._graph: dict[str, Any] = {"inputs": {}}

        @property
        def num_inputs(self) -> int:
            return len(self._graph["inputs"])

        def get_input(self, index: int) -> ITensor:
            name = list(self._graph["inputs"])[index]
            return ITensor(name, self._graph["inputs"][name][0])

    class ParserError(Checked):
        def __init__(self, found: Mapping[str, str]):
            self._found = found

        def desc(self) -> str:
            return self._found["desc"]

        def node_name(self) -> str:
            return self._found["node"]

        def node_operator(self) -> str:
            return self._found["operator"]

    class OnnxParser(Checked):
        def __init__(self, network: INetworkDefinition, log: Any):
            self._network, self._log, self._errors = network, logger_of(log), []  # type: ignore[var-annotated]

        def parse(self, model: bytes, path: str) -> bool:
            assert isinstance(model, bytes) and isinstance(path, str) and Path(path).is_file()
            proto = onnx.load_model_from_string(model)
            graph = json.loads(proto.doc_string)
            nodes = [node for node in proto.graph.node if node.op_type == "Attention"]
            self._errors = list(graph.get("errors", []))
            if nodes and (major, minor) < (10, 14):
                self._errors.append(
                    {"node": "", "operator": "Attention", "desc": "No importer registered for op: Attention"}
                )
            decomposable = [any(a.name == "TRT_decomposable" and a.i == 1 for a in node.attribute) for node in nodes]
            graph["fused only"] = decomposable.count(False)
            if not self._errors:
                self._network._graph = graph
            return not self._errors

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return ParserError(self._errors[index])

    class IOptimizationProfile(Checked):
        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}

        def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
            for a, b, c in zip(low, opt, high, strict=True):
                assert all(isinstance(v, int) for v in (a, b, c)) and 0 < a <= b <= c, (name, low, opt, high)
            self._shapes[name] = [list(low), list(opt), list(high)]

    class ITimingCache(Checked):
        def __init__(self, data: bytes):
            self._data = data

        def serialize(self) -> memoryview:
            return memoryview(self._data + b"+timed")

    class IBuilderConfig(Checked):
        def __init__(self) -> None:
            self._profiles: list[dict[str, Any]] = []
            self._flags = ["TF32"]
            self._cache: ITimingCache | None = None
            self.progress_monitor: Any = None
            self.profiling_verbosity: Any = None

        def clear_flag(self, flag: Any) -> None:
            self._flags.remove(flag.name)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            calls.append(("memory", pool.name, size))

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self._profiles.append(profile._shapes)
            return len(self._profiles) - 1

        def create_timing_cache(self, data: bytes) -> ITimingCache:
            return ITimingCache(data)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            calls.append(("cache", cache._data, ignore_mismatch))
            if cache._data.startswith(b"other GPU"):
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> ITimingCache | None:
            return self._cache

    class Builder(Checked):
        def __init__(self, log: Any):
            self._log = logger_of(log)

        def create_network(self, flags: int) -> INetworkDefinition:
            # 10: STRONGLY_TYPED is bit 1. 11: it is bit 0 and ignored, and bit 1 means something else.
            assert flags == 1 << 1 if major == 10 else flags in (0, 1), flags
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> memoryview | None:
            graph = network._graph
            calls.append(("build", graph["module"], list(config._flags), config.profiling_verbosity))
            if graph.get("fail"):
                fail(self._log, graph["fail"])
                return None
            kinds = {kind for _, kind in graph["inputs"].values()}
            if graph["fused only"] and "FLOAT" in kinds:
                fail(self._log, "IAttention: no fused kernel, and it is not decomposable")
                return None
            for shapes in config._profiles:
                missing = [n for n, (dims, _) in graph["inputs"].items() if -1 in dims and n not in shapes]
                if missing or any(
                    d not in (-1, v)
                    for n, rows in shapes.items()
                    for row in rows
                    for d, v in zip(graph["inputs"][n][0], row)
                ):
                    fail(self._log, f"profile is wrong at {missing}")
                    return None
            if not config._profiles:
                fail(self._log, "network has dynamic inputs, but no optimization profile has been defined")
                return None
            monitor = config.progress_monitor
            if monitor is not None:
                assert IProgressMonitor in type(monitor).__mro__ and monitor._ready
                swallowed(monitor.phase_start, "Building Engine", None, 4)
                swallowed(monitor.phase_start, "Tactics", "Building Engine", 1000)
                for i in range(4):
                    if graph.get("interrupted") == i:
                        os.kill(os.getpid(), signal.SIGINT)
                        for n in range(600):  # TensorRT goes on until it asks the next time
                            time.sleep(0.05)
                            if swallowed(monitor.step_complete, "Tactics", n) is not True:
                                return None
                    calls.append(("step", i))
                    if swallowed(monitor.step_complete, "Building Engine", i) is not True:
                        return None
                    swallowed(monitor.step_complete, "Tactics", i)
                swallowed(monitor.phase_finish, "Tactics")
                swallowed(monitor.phase_finish, "Building Engine")
            if graph.get("warning"):
                swallowed(self._log.log, ILogger.Severity.WARNING, graph["warning"])
            plan = graph | {"profiles": config._profiles, "version": version}
            return memoryview(json.dumps(plan).encode())

    class EngineInspector(Checked):
        def get_engine_information(self, form: Any) -> str:
            assert form is LayerInformationFormat.JSON
            return json.dumps({"Layers": ["one"]})

    class IExecutionContext(Checked):
        def __init__(self, engine: ICudaEngine):
            self._engine, self._profile = engine, -1
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._at: dict[str, int] = {}
            self._memory = 0
            engine._contexts.append(self)

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            calls.append(("profile", index, stream))
            self._profile = index
            self._shapes.clear()
            return 0 <= index < self._engine.num_optimization_profiles

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            graph = self._engine._graph
            low, _, high = graph["profiles"][self._profile].get(name, [graph["inputs"][name][0]] * 3)
            if len(shape) != len(low) or any(not a <= v <= c for a, v, c in zip(low, shape, high)):
                fail(self._engine._log, f"{name}: {shape} is not in the profile")
                return False
            self._shapes[name] = tuple(shape)
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert name in self._engine._names and address != 0
            if address % ALIGNMENT:
                fail(self._engine._log, f"{name}: address is not aligned to {ALIGNMENT}")
                return False
            self._at[name] = address
            return True

        def set_device_memory(self, memory: int, size: int) -> None:
            assert memory % ALIGNMENT == 0 and size >= self._engine.device_memory_size_v2
            calls.append(("memory of context", memory, size))
            self._memory = memory

        def infer_shapes(self) -> list[str]:
            return [n for n in self._engine._graph["inputs"] if n not in self._shapes]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            out = self._engine._graph["output"]
            if name != out["name"]:
                return self._shapes[name]
            return tuple(d if isinstance(d, int) else self._shapes[d[0]][d[1]] * d[2] // d[3] for d in out["dims"])

        def execute_async_v3(self, stream: int) -> bool:
            graph = self._engine._graph
            unset = [n for n in self._engine._names if n not in self._at] + self.infer_shapes()
            unset += [] if self._memory else ["device memory"]
            if unset or self._profile < 0:
                fail(self._engine._log, f"not set: {', '.join(unset) or 'profile'}")
                return False
            calls.append(("execute", graph["module"], self._profile, dict(self._shapes), stream))
            graph["executed"] = graph.get("executed", 0) + 1
            if graph.get("warning"):
                swallowed(self._engine._log.log, ILogger.Severity.WARNING, graph["warning"])
            if graph["executed"] >= graph.get("fails at", math.inf):
                fail(self._engine._log, "CUDA error 700: an illegal memory access")
                return False
            if graph.get("broken"):
                fail(self._engine._log, graph["broken"])
                return False
            given = {n: _tensor(self._at[n], s, KINDS[graph["inputs"][n][1]]) for n, s in self._shapes.items()}
            out = graph["output"]
            want = _tensor(self._at[out["name"]], self.get_tensor_shape(out["name"]), KINDS[out["kind"]])
            want.copy_(functions[graph["module"]](**given))
            return True

    class ICudaEngine(Checked):
        def __init__(self, graph: dict[str, Any], log: Any):
            self._graph, self._log = graph, log
            self._names = [*graph["inputs"], graph["output"]["name"]]
            self._contexts: list[IExecutionContext] = []

        @property
        def num_io_tensors(self) -> int:
            return len(self._names)

        @property
        def num_optimization_profiles(self) -> int:
            return len(self._graph["profiles"])

        def get_tensor_name(self, index: int) -> str:
            return str(self._names[index])

        def get_tensor_mode(self, name: str) -> Any:
            return TensorIOMode.INPUT if name in self._graph["inputs"] else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            kind = self._graph["inputs"][name][1] if name in self._graph["inputs"] else self._graph["output"]["kind"]
            return DataType[kind]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self._graph["inputs"][name][0])

        def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
            return [tuple(row) for row in self._graph["profiles"][index][name]]

        @property
        def device_memory_size_v2(self) -> int:
            return int(self._graph.get("scratch", 1000))

        def create_execution_context(self, strategy: Any) -> IExecutionContext | None:
            assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
            if len(self._contexts) >= self._graph.get("memory", 100):
                fail(self._log, "out of memory")
                return None
            return IExecutionContext(self)

        def create_engine_inspector(self) -> EngineInspector:
            return EngineInspector()

    class Runtime(Checked):
        def __init__(self, log: Any):
            self._log = logger_of(log)

        def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
            assert isinstance(plan, bytes)
            try:
                graph = json.loads(plan)
            except ValueError:
                fail(self._log, "Magic tag does not match")
                return None
            calls.append(("load", graph["module"]))
            return ICudaEngine(graph, self._log)

    DataType = enum.Enum("DataType", {n: n for n in KINDS} | {"BOOL": "BOOL"})  # type: ignore[misc]
    TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    LayerInformationFormat = enum.Enum("LayerInformationFormat", ["ONELINE", "JSON"])
    ExecutionContextAllocationStrategy = enum.Enum(
        "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]
    )
    typed = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1} if major == 10 else {"STRONGLY_TYPED": 0, "PREFER_AOT": 1}
    made = ModuleType("tensorrt")
    made.__spec__ = ModuleSpec("tensorrt", None)
    parts: dict[str, Any] = {
        "Builder": Builder,
        "BuilderFlag": enum.Enum("BuilderFlag", ["TF32", "REFIT", "STRIP_PLAN"]),
        "DataType": DataType,
        "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
        "ILogger": ILogger,
        "IProgressMonitor": IProgressMonitor,
        "LayerInformationFormat": LayerInformationFormat,
        "MemoryPoolType": enum.Enum("MemoryPoolType", ["WORKSPACE"]),
        "NetworkDefinitionCreationFlag": enum.IntEnum("NetworkDefinitionCreationFlag", typed),
        "OnnxParser": OnnxParser,
        "ProfilingVerbosity": enum.Enum("ProfilingVerbosity", ["NONE", "DETAILED"]),
        "Runtime": Runtime,
        "TensorIOMode": TensorIOMode,
        "__version__": version,
        "calls": calls,
        "functions": functions,
        "made": {c.__name__: c for c in (EngineInspector, IBuilderConfig, ICudaEngine, IExecutionContext,
                                         INetworkDefinition, IOptimizationProfile, ITensor, ITimingCache, ParserError, Builder,
                                         OnnxParser, Runtime)},
    }  # fmt: skip
    for name, value in parts.items():
        setattr(made, name, value)
    return made


def _tensor(address: int, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """The memory at an address as a tensor."""
    size = math.prod(shape) * torch.empty(0, dtype=kind).element_size()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=kind).view(shape)
