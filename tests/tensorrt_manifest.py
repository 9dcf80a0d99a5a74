"""The names of TensorRT's Python API that this project uses, written by hand from its public documentation.

Every name is there in 10.12 and in 11.4. `ASKED_FOR` are asked for with `getattr`, in case a version drops them. `REMOVED` are gone in
11, and must not be used at all.
"""

from __future__ import annotations

MODULE = ("Builder", "BuilderFlag", "DataType", "ExecutionContextAllocationStrategy", "ILogger", "IProgressMonitor", "LayerInformationFormat", "MemoryPoolType",
          "NetworkDefinitionCreationFlag", "OnnxParser", "ProfilingVerbosity", "Runtime", "TensorIOMode",
          "__version__")  # fmt: skip

ENUMS = {
    "BuilderFlag": ("TF32",),
    "DataType": ("BF16", "FLOAT", "HALF", "INT32", "INT64"),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "LayerInformationFormat": ("JSON",),
    "MemoryPoolType": ("WORKSPACE",),
    "NetworkDefinitionCreationFlag": (),
    "ProfilingVerbosity": ("DETAILED",),
    "Severity": ("ERROR", "INTERNAL_ERROR", "WARNING"),  # ILogger.Severity
    "TensorIOMode": ("INPUT",),
}

CLASSES = {
    "Builder": ("build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile"),
    "EngineInspector": ("get_engine_information",),
    "IBuilderConfig": ("add_optimization_profile", "clear_flag", "create_timing_cache", "get_timing_cache", "profiling_verbosity",
                       "progress_monitor", "set_memory_pool_limit", "set_timing_cache"),
    "ICudaEngine": ("create_engine_inspector", "create_execution_context", "device_memory_size_v2", "get_tensor_dtype", "get_tensor_mode",
                    "get_tensor_name", "get_tensor_profile_shape", "get_tensor_shape", "num_io_tensors",
                    "num_optimization_profiles"),
    "IExecutionContext": ("execute_async_v3", "get_tensor_shape", "infer_shapes", "set_device_memory", "set_input_shape",
                          "set_optimization_profile_async", "set_tensor_address"),
    "ILogger": ("Severity", "__init__"),
    "INetworkDefinition": ("get_input", "num_inputs"),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("__init__",),
    "ITensor": ("name", "shape"),
    "ITimingCache": ("serialize",),
    "OnnxParser": ("get_error", "num_errors", "parse"),
    "ParserError": ("desc", "node_name", "node_operator"),
    "Runtime": ("deserialize_cuda_engine",),
}  # fmt: skip

ASKED_FOR = {"NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",)}

# Methods of its base classes that are written here, and called by TensorRT.
OVERRIDDEN = {"ILogger": {"log"}, "IProgressMonitor": {"phase_finish", "phase_start", "step_complete"}}

# What a variable of this name holds, in export/tensorrt.py and runtime/backends/trt.py.
VARIABLES = {"builder": "Builder", "cache": "ITimingCache", "config": "IBuilderConfig", "context": "IExecutionContext",
             "engine": "ICudaEngine", "error": "ParserError", "inspector": "EngineInspector", "network": "INetworkDefinition",
             "parser": "OnnxParser", "profile": "IOptimizationProfile", "runtime": "Runtime", "_runtime": "Runtime",
             "tensor": "ITensor"}  # fmt: skip

REMOVED = ("FP16", "BF16_FLAG", "INT8", "FP8", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS",
           "WEIGHTLESS", "EXPLICIT_BATCH", "supports_model", "parse_with_weight_descriptors", "device_memory_size",
           "create_execution_context_without_device_memory", "platform_has_fast_fp16", "precision", "set_output_type",
           "dynamic_range", "int8_calibrator", "IAlgorithmSelector", "CUBLAS", "CUDNN", "max_workspace_size", "build_engine",
           "execute_v2", "execute_async_v2", "get_binding_shape", "num_bindings")  # fmt: skip
