"""Model -> ONNX graphs, one engine folder for each module: `OUT/onnx-PRECISION/MODULE/{model.onnx, model.onnx.data, engine.json}`.

A graph takes and returns float32 whatever its precision, and batch, height, width and text length are free in it. The
weights lie beside it in `model.onnx.data` (a protobuf ends at 2 GB); those that a graph with ControlNets has in common with the UNet's are
in one file for all (`shared_weights`). A half-precision graph has explicit float32 islands,
norms and softmax, and the time embeddings of all timesteps are a table that was computed in float32, so the file means the
same wherever it runs. Images of layouts enter through the graphs `control-embedding-NAME`, once for each edit; the conditioning scales
are inputs of the fused graphs. Names of inputs and outputs are in `runtime/model/module_io.py`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.backends.base import missing
from ..runtime.backends.engine_spec import PRECISIONS, EngineSpec, Shapes
from ..runtime.backends.torch_modules import AsIs, decode_latent, encode_image, runnable, summed_residuals
from ..runtime.errors import RunError, UsageError, first_line
from ..runtime.model import module_io
from ..runtime.model.model import Model
from ..runtime.model.module_io import CONTROL_EMBEDDING_PREFIX, CONTROLNET_PREFIX
from .build_folder import build_once
from .shared_weights import share_weights
from .traced_once import onnx_program

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
OPSETS = (22, 23)  # 23 has the Attention operator, 22 spells it as MatMul and Softmax
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What TensorRT's ONNX parser takes (onnx-tensorrt, docs/operators.md, 10.x), as far as image networks use it.
TENSORRT_OPERATORS = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Cast Ceil Celu Clip
    Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu
    Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity If
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization
    LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu
    Pad ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
    Reshape Resize ReverseSequence RMSNormalization RoiAlign Round ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin
    Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Upsample Where Xor
    """.split()  # noqa: SIM905  a list of 130 strings would fill a page
)


@dataclass(frozen=True)
class ExportProgress:
    """What `export_onnx` tells while it works.

    Attributes:
        module: name of the module that is worked on.
        seconds: since work on the module began.
        text: waiting, exporting, kept (there was a valid engine), done, or a warning.
        done: the module is finished.
    """

    module: str
    seconds: float
    text: str
    done: bool = False


Tell = Callable[[ExportProgress], None]


def module_names(model: Model, layouts: Sequence[str] | None = None) -> tuple[str, ...]:
    """The modules that an edit needs: the UNet alone, with each layout, and with all of `layouts` together; the control embedding of each
    layout; the VAE's two halves and the text encoder.

    Args:
        layouts: names of ControlNets; None is each that the model has, alone. Several that are named are also fused
            together, in the engine that an edit with all of them asks for.

    Raises:
        UsageError: the model has no such ControlNet.
    """
    names = sorted(set(model.controlnets if layouts is None else layouts))
    for name in names:
        if name not in model.controlnets:
            have = ", ".join(model.controlnets) or "none"
            raise UsageError(f"layouts: {model.name} has no ControlNet for {name}; it has {have}")
    together = ["+".join(["unet", *names])] if layouts is not None and len(names) > 1 else []
    embeddings = [CONTROL_EMBEDDING_PREFIX + name for name in names]
    return ("unet", *(f"unet+{name}" for name in names), *together, *embeddings, "vae_encoder", "vae_decoder", "text_encoder")  # fmt: skip


# --- modules as functions of tensors ----------------------------------------------------------------------------


class _UNet(nn.Module):
    """UNet and ControlNets as one function; `controls` are the control embedding and the scale of each, as `module_io.inputs` has them."""

    def __init__(self, unet: nn.Module, controlnets: Mapping[str, nn.Module], dtype: torch.dtype):
        super().__init__()
        self.unet, self.controlnets, self.dtype = unet, nn.ModuleDict(controlnets), dtype

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *controls: Tensor) -> Tensor:
        x, text = sample.to(self.dtype), encoder_hidden_states.to(self.dtype)

        def residuals() -> Iterator[tuple[list[Tensor], Tensor]]:
            for i, net in enumerate(self.controlnets.values()):
                embedding, scale = (c.to(self.dtype) for c in controls[2 * i : 2 * i + 2])
                scale = scale[:, None, None, None]
                down, mid = net(x, timestep, text, controlnet_cond=embedding, return_dict=False)
                yield [d * scale for d in down], mid * scale

        output: Tensor = self.unet(x, timestep, text, return_dict=False, **summed_residuals(residuals()))[0]
        return output.float()


class _ControlNet(nn.Module):
    """One ControlNet: its residuals, from the top down, and the middle's, scaled."""

    def __init__(self, net: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, image: Tensor, scale: Tensor
    ) -> tuple[Tensor, ...]:
        x, text, maps = (i.to(self.dtype) for i in (sample, encoder_hidden_states, image))
        down, mid = self.net(x, timestep, text, controlnet_cond=maps, return_dict=False)
        return tuple((r * scale.to(self.dtype)[:, None, None, None]).float() for r in (*down, mid))


class _Part(nn.Module):
    """A part of the model with one input: `call(part, input)` in float32, where the input is cast to the part's dtype."""

    def __init__(self, part: Any, call: Callable[[Any, Tensor], Tensor], dtype: torch.dtype):
        super().__init__()
        self.part, self.call, self.dtype = part, call, dtype

    def forward(self, input: Tensor) -> Tensor:
        return self.call(self.part, input.to(self.dtype)).float()


@dataclass(frozen=True)
class Function:
    """A module ready for export: what to trace, with what, and which dimensions must stay free.

    Attributes:
        module: takes `inputs` by position.
        inputs: name -> example.
        outputs: names, in the order in which it returns them.
        dims: name of input or output -> for each dimension its name if it is free, or its size.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dims: Mapping[str, tuple[str | int, ...]]


Example = tuple[Tensor, tuple[str | int, ...]]  # and its dims, as in `Function`


def function(model: Model, module: str, precision: str = "fp32") -> Function:
    """The `Function` of one module at a precision. The model is left as it was: what is changed is a copy."""
    dtype = DTYPES[precision]
    plain = dtype == model.dtype == torch.float32
    timesteps, factor = len(model.schedule.alphas_cumprod), model.vae_scale_factor

    def own(part: Any) -> Any:
        return part if plain else with_islands(copy.deepcopy(part), dtype)

    def network(part: Any) -> Any:
        """A UNet or ControlNet with its table of time embeddings, which is computed in float32 and then cast."""
        return with_islands(runnable(part if plain else copy.deepcopy(part).float(), timesteps, None, "sdpa"), dtype)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=model.device)

    # Sizes of the examples: all different, and none 0 or 1, which the tracer takes for constants.
    cells = model.multiple // factor
    batch, h, w, length = 2, 2 * cells, 3 * cells, 11
    width, channels = int(model.unet.config.cross_attention_dim), int(model.unet.config.block_out_channels[0])
    picture = (zeros(batch, 3, h * factor, w * factor), ("batch", 3, "image_height", "image_width"))
    latent = (zeros(batch, model.channels, h, w), ("batch", model.channels, "height", "width"))
    embedding = (zeros(batch, channels, h, w), ("batch", channels, "height", "width"))
    ids = (torch.ones((batch, length), dtype=torch.int64, device=model.device), ("batch", "length"))
    prompt_embeds = (zeros(batch, length, width), ("batch", "length", width))
    wide = int(model.unet.config.in_channels)  # twice the latent's for InstructPix2Pix
    sample = (zeros(batch, wide, h, w), ("batch", wide, "height", "width"))
    noisy = [sample, (torch.tensor([1, 500], device=model.device), ("batch",)), prompt_embeds]
    scale = (zeros(batch) + 0.5, ("batch",))

    def made(of: nn.Module, given: Sequence[Example], dims: tuple[str | int, ...], *outputs: str) -> Function:
        """With outputs of `dims`, by default the module's one output."""
        named = dict(zip(module_io.inputs(module), given, strict=True))
        outputs = outputs or (module_io.output(module),)
        every = {name: dims for name, (_, dims) in named.items()} | dict.fromkeys(outputs, dims)
        return Function(of, {name: value for name, (value, _) in named.items()}, outputs, every)

    if module.startswith("unet"):
        names = module_io.layouts(module)
        nets = {name: network(model.controlnets[name]) for name in names}
        for net in nets.values():
            net.controlnet_cond_embedding = AsIs()
        given = [*noisy, *(one for _ in names for one in (embedding, scale))]
        return made(_UNet(network(model.unet), nets, dtype), given, latent[1])
    if module.startswith(CONTROLNET_PREFIX):
        net = network(model.controlnets[module.removeprefix(CONTROLNET_PREFIX)])
        residuals = module_io.controlnet_outputs(len(net.controlnet_down_blocks))
        return made(_ControlNet(net, dtype), [*noisy, picture, scale], ("batch", 0, "h", "w"), *residuals)
    if module.startswith(CONTROL_EMBEDDING_PREFIX):
        net = own(model.controlnets[module.removeprefix(CONTROL_EMBEDDING_PREFIX)].controlnet_cond_embedding)
        return made(_Part(net, lambda part, image: part(image), dtype), [picture], embedding[1])
    if module == "vae_encoder":
        return made(_Part(own(model.vae), encode_image, dtype), [picture], latent[1])
    if module == "vae_decoder":
        return made(_Part(own(model.vae), decode_latent, dtype), [latent], picture[1])
    if module == "text_encoder":
        text = _Part(own(model.text_encoder), lambda part, ids: part(ids)[0], torch.int64)
        return made(text, [ids], prompt_embeds[1])
    raise UsageError(f"module {module!r} is not one of {', '.join(module_names(model))} or controlnet-NAME")


# --- float32 islands --------------------------------------------------------------------------------------------


class _GroupNorm32(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


class _LayerNorm32(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


def with_islands(part: Any, dtype: torch.dtype) -> Any:
    """`part` itself, changed to `dtype` with its norms in float32; softmax follows in the graph (`_float32_softmax`)."""
    # Not diffusers' own `to`, which warns of modules that it would keep in float32 even where there are none.
    nn.Module.to(part, dtype)
    if dtype == torch.float32:
        return part
    for module in part.modules():
        # The class is exchanged rather than the module wrapped: names of weights and isinstance checks stay.
        if type(module) is nn.GroupNorm:
            module.__class__ = _GroupNorm32
            module.float()
        elif type(module) is nn.LayerNorm:
            module.__class__ = _LayerNorm32
            module.float()
    return part


def _float32_softmax(graph: Any) -> None:
    """Compute softmax in float32: with casts around the operator, or by the attribute of Attention that says so. In place."""
    from onnx import TensorProto, helper

    nodes = []
    for node in graph.node:
        if node.op_type == "Attention":
            node.attribute.append(helper.make_attribute("softmax_precision", TensorProto.FLOAT))
        if node.op_type != "Softmax":
            nodes.append(node)
            continue
        dtype = next((v.type.tensor_type.elem_type for v in graph.value_info if v.name == node.output[0]), None)
        if dtype not in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            nodes.append(node)
            continue
        wide_in, wide_out = node.output[0] + "_wide_in", node.output[0] + "_wide_out"
        nodes.append(helper.make_node("Cast", [node.input[0]], [wide_in], to=TensorProto.FLOAT))
        nodes.append(
            helper.make_node("Softmax", [wide_in], [wide_out], **{a.name: helper.get_attribute_value(a) for a in node.attribute})
        )  # fmt: skip
        nodes.append(helper.make_node("Cast", [wide_out], [node.output[0]], to=dtype))
    del graph.node[:]
    graph.node.extend(nodes)


# --- graphs -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that are not needed (torchvision) and of its own deprecations."""
    import logging

    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def write_graph(of: Function, folder: Path, opset: int) -> Any:
    """Trace a function and write `model.onnx` and its weights into `folder`; returns the graph, a ModelProto without weights.

    Raises:
        RunError: the exporter fixed a dimension that must be free.
    """
    import onnx

    dynamic = tuple({i: d for i, d in enumerate(of.dims[name]) if isinstance(d, str)} for name in of.inputs)
    spread = isinstance(of.module, _UNet)  # its *controls have one entry together
    shapes: tuple[Any, ...] = (*dynamic[:3], dynamic[3:]) if spread and len(dynamic) > 3 else dynamic
    # Copies: the tracer takes one tensor that is given twice for one input, and the second layout would read the first's.
    examples = tuple(value.clone() for value in of.inputs.values())
    with _quiet(), torch.no_grad():
        program = onnx_program(
            of.module.eval(), examples, opset_version=opset, dynamic_shapes=shapes,
            input_names=list(of.inputs), output_names=list(of.outputs), verbose=False, optimize=True,
        )  # fmt: skip
        program.save(str(folder / GRAPH), external_data=True)
    del program
    proto = onnx.load(str(folder / GRAPH), load_external_data=False)
    strip(proto)
    _float32_softmax(proto.graph)
    check_dynamic(proto, of.dims)
    onnx.save(proto, str(folder / GRAPH))
    onnx.checker.check_model(str(folder / GRAPH))  # by path: it looks at the weights' file too
    return proto


def strip(proto: Any) -> None:
    """Remove what the exporter tells of itself, tracebacks and paths: three quarters of the file, and no two the same."""
    proto.doc_string = ""
    del proto.metadata_props[:]
    for graph in (proto.graph, *proto.functions):
        graph.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        for value in graph.value_info:
            del value.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]


def graph_digest(proto: Any) -> str:
    """sha256 of the graph, 64 hex digits; weights count by name, shape and type only."""
    from onnx import TensorProto

    bare = type(proto)()
    bare.CopyFrom(proto)
    for tensor in bare.graph.initializer:
        # Small weights lie in the graph itself; integers and scalars (shapes, scales) are the graph's own.
        weight = tensor.dims and tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
        if weight or tensor.external_data:
            for field in ("external_data", "raw_data", "float_data", "int32_data", "data_location"):
                tensor.ClearField(field)
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def check_dynamic(proto: Any, dims: Mapping[str, Sequence[str | int]]) -> None:
    """Raises RunError where a dimension that must be free was fixed by the exporter, which it does without a word."""
    for value in (*proto.graph.input, *proto.graph.output):
        shape = value.type.tensor_type.shape.dim
        for i, (have, wanted) in enumerate(zip(shape, dims[value.name], strict=True)):
            if isinstance(wanted, str) and not have.dim_param:
                raise RunError(
                    f"export: dimension {i} ({wanted}) of {value.name} was fixed at {have.dim_value}; it must be "
                    "free: this torch or diffusers exports the model differently, use the versions of constraints.txt"
                )


def attention_of(proto: Any) -> str:
    """See `engine_spec.EngineSpec.attention`."""
    operators = {node.op_type for node in proto.graph.node}
    return "operator" if "Attention" in operators else "decomposed" if "Softmax" in operators else ""


def unsupported_operators(proto: Any) -> list[str]:
    """Operators of a graph that TensorRT's parser does not know, sorted; ONNX Runtime takes them all the same."""
    operators = {f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in proto.graph.node}
    return sorted(operators - TENSORRT_OPERATORS)


# --- engines ----------------------------------------------------------------------------------------------------


def tool_versions() -> dict[str, str]:
    """Versions of what makes a graph."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def check_export(precision: str, opset: int) -> None:
    """Raises UsageError where nothing can be exported as asked; before a model is loaded for it."""
    why = missing("onnx", "onnxscript", extra="onnx")
    if why:
        raise UsageError(f"export: {'; '.join(why)}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if opset not in OPSETS:
        raise UsageError(f"opset is {opset}, expected one of {', '.join(map(str, OPSETS))}")


def engine_folder(out: Path, module: str, precision: str) -> Path:
    """Where an engine is written; it is found by its `engine.json`, not by this name."""
    return out / f"onnx-{precision}" / module


def export_onnx(
    model: Model,
    out: Path,
    layouts: Sequence[str] | None = None,
    precision: str = "fp32",
    opset: int = 23,
    tell: Tell = lambda progress: None,
    *,
    modules: Sequence[str] | None = None,
    shapes: Sequence[Shapes] | None = None,
    force: bool = False,
) -> list[EngineSpec]:
    """Export the modules of a model. What is there already and valid is kept.

    Args:
        out: folder; the default of the command is `engine_spec.engines_folder(model.weights_digest)`.
        layouts: see `module_names`.
        modules: these only, in place of `module_names(model, layouts)`; "controlnet-NAME" is one too.
        shapes: recorded for whoever builds an engine of fixed ranges from the graph; the graph itself takes any.
        force: export anew even what is there.

    Returns:
        A spec for each module, in the order of the modules.

    Raises:
        UsageError: a name, the precision or the opset is not known, or a package is not installed; nothing was written.
        RunError: the exporter failed, or fixed a dimension; modules that were finished before stay.
    """
    check_export(precision, opset)
    names = module_names(model, layouts) if modules is None else tuple(modules)
    known = {*module_names(model, None), *(CONTROLNET_PREFIX + n for n in model.controlnets)}
    for name in names:
        fused = name.split("+")
        if name not in known and not (
            fused[0] == "unet" and fused[1:] == sorted(set(fused[1:]) & set(model.controlnets))
        ):
            raise UsageError(f"module {name!r} is not one of {', '.join(sorted(known))}")
    ranges = tuple(shapes or (default_shapes(model),))
    return [_export(model, out, name, precision, opset, ranges, force, tell) for name in names]


def default_shapes(model: Model, size: tuple[int, int] | None = None, batch: int = 2) -> Shapes:
    """Any batch and size; the best at the UNet's training size, or at `size` (width, height), and `batch`."""
    side = int(model.unet.config.sample_size) * model.vae_scale_factor
    width, height = size or (side, side)
    smallest = model.multiple
    return Shapes(batch=(1, batch, 0), height=(smallest, height, 0), width=(smallest, width, 0))


def _export(
    model: Model, out: Path, module: str, precision: str, opset: int, shapes: tuple[Shapes, ...], force: bool, tell: Tell
) -> EngineSpec:  # fmt: skip
    began = time.perf_counter()

    def say(text: str, done: bool = False) -> None:
        tell(ExportProgress(module, time.perf_counter() - began, text, done))

    wanted: dict[str, Any] = {"format": "onnx", "module": module, "weights": model.module_digest(module),
                              "precision": precision, "opset": opset, "inputs": module_io.inputs(module)}  # fmt: skip

    def build(folder: Path) -> EngineSpec:
        say("exporting")
        try:
            proto = write_graph(function(model, module, precision), folder, opset)
        except (RunError, UsageError, OSError, MemoryError):
            raise
        except Exception as error:
            reason = first_line(error.__cause__ or error, 200)  # the exporter's own text is advice to its developers
            raise RunError(f"export of {module}: {reason}; use the versions of constraints.txt") from error
        if names := module_io.layouts(module):
            parts = ["unet", *(f"unet+{name}" for name in names if len(names) > 1)]
            saved = share_weights(folder, GRAPH, WEIGHTS, [engine_folder(out, part, precision) for part in parts])
            say(f"shares {saved / 2**20:.1f} MiB of weights with other engines")
        unknown = unsupported_operators(proto)
        if unknown:
            say(f"warning: TensorRT's parser does not know {', '.join(unknown)}")
        return EngineSpec(
            model=model.name,
            graph=graph_digest(proto),
            shapes=shapes,
            versions=tool_versions(),
            attention=attention_of(proto),
            **wanted,
        )

    target = engine_folder(out, module, precision)
    spec, kept = build_once(target, lambda there: not there.differs(**wanted), build, say, force)
    say("kept" if kept else "done", done=True)
    return spec
