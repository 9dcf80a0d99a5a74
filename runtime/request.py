"""What an edit is asked with and what it returns; the check of a request before anything is run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from PIL import Image
from torch import Tensor

from . import METHODS
from . import images as pictures
from . import layouts as layout_maps
from .alignment import alignment
from .codec import token_chunks
from .errors import UsageError
from .model.checkpoint import check_layouts, check_side
from .model.model import Model
from .options import (
    IP2P,
    ITO,
    P2P,
    STEPS,
    TEXT_ONLY,
    UNMASKED,
    USES,
    OptionContext,
    Options,
    OptionUse,
    check_uses,
    mask_mode,
    unused_notes,
)
from .profile import Profile

# A PIL image, a path, or an array; in a checked request a PIL image.
Picture: TypeAlias = Any


@dataclass(frozen=True)
class EditRequest:
    """One edit. A picture may be a PIL image, a path, or an array (see `images.as_picture`).

    Attributes:
        image: any mode and size; it is padded to what the model takes and cropped back.
        prompt: what the edited picture shows.
        source_prompt: what the picture shows now. With layouts and no source prompt, `prompt` stands for both.
        method: one of `METHODS`.
        layouts: name of a ControlNet or T2I-Adapter -> map of the picture's size, for the edited picture.
        source_layouts: the same for the picture as it is; those not given are annotated from it where that can be done.
        mask: "L" picture of the same size, white edits; None estimates one, where the method needs one.
        seed: of every noise; 0 is a seed.
        steps: sampling steps; None is 50 for iedit and 25 for the others.
    """

    image: Picture
    prompt: str
    source_prompt: str = ""
    method: str = "ito"
    layouts: Mapping[str, Picture] = field(default_factory=dict)
    source_layouts: Mapping[str, Picture] = field(default_factory=dict)
    mask: Picture | None = None
    seed: int = 0
    steps: int | None = None
    options: Options = Options()


@dataclass(frozen=True)
class EditResult:
    """What an edit returns.

    Attributes:
        image: RGB, the size of the input.
        mask: "L", white where the edit was allowed: the latent cells that it was made in or, with `composite="pixel"` and a given
            mask, that mask; None without a mask.
        guidance: RGB guidance image, None where it was skipped; decoded when it is first asked for.
        guidance_latent: (C, h, w) float32 on the CPU, what it is decoded from.
        latent, source_latent: (C, h, w) float32 on the CPU, of the result and of the input (padded size).
        profile: what the batch cost that this edit was part of.
        receipt: JSON-ready: the request, model digest, versions, backend, mask statistics, notes.
        notes: what a user should know of this edit, and of the run that it was part of.
    """

    image: Image.Image
    mask: Image.Image | None
    guidance_latent: Tensor | None
    latent: Tensor
    source_latent: Tensor
    profile: Profile
    receipt: dict[str, Any]
    draw: Callable[[Tensor], Image.Image] = field(repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: the guidance image is drawn now, as the model that draws it stays behind."""
        return self.__dict__ | {"guidance": self.guidance, "draw": None}

    @property
    def notes(self) -> list[str]:
        return list(self.receipt["notes"])

    @functools.cached_property
    def guidance(self) -> Image.Image | None:
        return None if self.guidance_latent is None else self.draw(self.guidance_latent)


@dataclass
class PreparedRequest:
    """A checked request with its tensors on the device.

    Attributes:
        size: width and height of the picture as it is worked on.
        pixels: (1, 3, H, W) in [-1, 1], that picture padded to what the model takes; `digest` is of its pixels.
        maps, source_maps: layout name -> (1, 3, H, W) in [0, 1], of the edited picture and of the source.
        given_mask: (1, 1, h, w) of 0 and 1, the given mask in latent cells.
        mask_picture: the given mask, at the size of the picture that was given.
        full: the picture that was given, RGB, where a smaller one is worked on (`Options.resize`).
        chunks: pieces of the tokenizer's length that the longest text has.
        aligned: `cross` and `own` of `alignment.alignment`, for p2p.
        results: stage results by stage name.
        keys: their cache keys, of the stages that the cache keeps.
        mask: (1, 1, h, w) in [0, 1], given or estimated; None until then, and where there is none.
        notes: what the user should know of this edit.
    """

    request: EditRequest
    size: tuple[int, int]
    pixels: Tensor
    digest: str
    maps: dict[str, Tensor]
    source_maps: dict[str, Tensor]
    given_mask: Tensor | None
    mask_picture: Image.Image | None
    full: Image.Image | None
    chunks: int
    source_prompt: str
    aligned: tuple[Tensor, Tensor] | None = None
    notes: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None

    @property
    def steps(self) -> int:
        assert self.request.steps is not None  # settled by `check_request`
        return self.request.steps

    def edited_area(self) -> Image.Image | None:
        """Where the edit was allowed: see `EditResult.mask`; of the size of the picture as it is worked on, or of the given mask."""
        if self.mask is None:
            return None
        if self.mask_picture is not None and (self.request.options.composite == "pixel" or self.full is not None):
            return self.mask_picture
        height, width = self.pixels.shape[-2:]
        return pictures.cells_to_mask(self.mask, (width, height), self.size)

    def note(self, text: str) -> None:
        """Something that the user should know of this edit, once."""
        if text not in self.notes:
            self.notes.append(text)


def estimates_mask(request: EditRequest) -> bool:
    """Whether the method uses a mask and the options let it be estimated where none is given."""
    return request.method not in UNMASKED and mask_mode(request.method, request.options.mask.mode) != "none"


def option_context(
    request: EditRequest, guidance_scale: float | None = None, lambdas: Sequence[float | None] | None = None
) -> OptionContext:
    """What of a request decides which options matter.

    Args:
        guidance_scale: where the request leaves it to the checkpoint.
        lambdas: of all requests that are asked for together, None where it is chosen later; by default its own.
    """
    o = request.options
    return OptionContext(
        request.method,
        lambdas=(o.lam,) if lambdas is None else tuple(lambdas),
        mask_given=request.mask is not None,
        mask_mode=mask_mode(request.method, o.mask.mode),
        layouts=bool(request.layouts),
        composite=o.composite,
        refine=o.refine,
        resize=o.resize is not None,
        cross_replace=o.cross_replace,
        self_replace=o.self_replace,
        guidance_scale=guidance_scale if o.guidance_scale is None else o.guidance_scale,
        inverts_with_negative=o.inversion == "unconditional" or o.inversion_scale != 1,
    )


def set_fields(request: EditRequest) -> list[OptionUse]:
    """The rows of `options.USES` whose field differs from its default."""
    default = EditRequest(request.image, request.prompt)

    def value(of: EditRequest, path: str) -> Any:
        return functools.reduce(getattr, path.split("."), of)

    return [use for use in USES if value(request, use.field) != value(default, use.field)]


def _with_pictures(request: EditRequest) -> EditRequest:
    """Paths and arrays as PIL images."""
    maps: dict[str, Any] = {}
    for name in ("layouts", "source_layouts"):
        given = getattr(request, name)
        if not isinstance(given, Mapping):
            raise TypeError(f"{name} is a {type(given).__name__}, expected a mapping of layout name to picture")
        maps[name] = {n: pictures.as_picture(p, f"{name}[{n!r}]", pictures.load_layout) for n, p in given.items()}
    mask = None if request.mask is None else pictures.as_picture(request.mask, "mask", pictures.load_layout)
    return dataclasses.replace(request, image=pictures.as_picture(request.image, "image"), mask=mask, **maps)


D = TypeVar("D")
# Declared type -> what a caller may give for it.
_ACCEPTED: dict[Any, Any] = {float: numbers.Real, int: numbers.Integral, str: str, bool: (bool, np.bool_), tuple: tuple,
                             type(None): type(None)}  # fmt: skip


def _plain(value: D, inside: str) -> D:
    """A dataclass with the numbers of NumPy as Python's own, which JSON takes.

    Raises:
        TypeError: a field whose value is not of its declared type, named from `inside` on.
    """
    changed = {}
    for name, hint in get_type_hints(type(value)).items():
        held = getattr(value, name)
        parts = (get_args(hint) if get_origin(hint) is not tuple else ()) or (hint,)
        types: list[Any] = [get_origin(part) or part for part in parts]
        first = types[0]
        if isinstance(first, type) and dataclasses.is_dataclass(first):
            if not isinstance(held, first):
                raise TypeError(f"{inside}{name} is a {type(held).__name__}, expected {first.__name__}")
            changed[name] = _plain(held, f"{inside}{name}.")
        elif all(t in _ACCEPTED for t in types):
            is_truth = isinstance(held, (bool, np.bool_))
            if not any(isinstance(held, _ACCEPTED[t]) for t in types) or (is_truth and bool not in types):
                wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
                raise TypeError(f"{inside}{name} is {held!r}, a {type(held).__name__}; expected {wanted}")
            if isinstance(held, np.generic):
                changed[name] = held.item()
    return dataclasses.replace(value, **changed)  # type: ignore[type-var]


def _unknown_words(model: Model, texts: Iterable[str]) -> list[str]:
    """One note that names the words of `texts` that the model says it does not know; none where it says nothing."""
    words = dict.fromkeys(w for text in texts for w in re.findall(r"[^\W_]+", text.lower()))
    unknown = [w for w in words if w not in model.words] if model.words else []
    if not unknown:
        return []
    shown = ", ".join(f'"{w}"' for w in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
    return [
        f"{model.name} does not know {shown}: what it draws of that means nothing; `iedit info` lists the words that it knows"
    ]


def _settled(model: Model, request: EditRequest, steps: int, context: OptionContext) -> Options:
    """A request's options with a number for what was left to the checkpoint, where the edit uses it: a receipt says what ran."""
    o = request.options
    settled = o.settled(model, steps, context.method, context.layouts)
    unused: dict[str, Any] = {} if context.estimates_mask else {"mask": o.mask}
    if context.method not in ITO:
        unused |= {"guidance": o.guidance, "final": o.final}
    if context.method not in ITO or context.lacks("a guidance image"):
        unused["guidance_path"] = o.guidance_path
    if context.lacks("guidance"):
        unused["guidance_until"] = o.guidance_until
    return dataclasses.replace(settled, **unused)


def _check_fields(model: Model, request: EditRequest) -> None:
    """Raises UsageError for what is wrong with a field by itself, or with the model's ControlNets."""
    if request.method not in METHODS:
        raise UsageError(f"method is {request.method!r}, expected one of {', '.join(METHODS)}")
    if not request.prompt.strip():
        raise UsageError("the prompt is empty: say what the edited picture shows")
    texts = {"prompt": request.prompt, "source prompt": request.source_prompt}
    for name, text in (texts | {"negative prompt": request.options.negative_prompt}).items():
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UsageError(f"the {name} holds bytes that are no UTF-8; type it again, or set the terminal to UTF-8")
    if request.method.startswith("controlnet") and not request.layouts:
        raise UsageError(f"method {request.method} needs at least one layout (--layout pose=FILE)")
    if request.method in TEXT_ONLY and request.layouts:
        raise UsageError(f"method {request.method} takes no layouts; leave them out, or name a method that does")
    if request.method in P2P and not request.source_prompt.strip():
        raise UsageError(
            f"method {request.method} needs a source prompt, whose attention it takes: say what the picture shows now"
        )
    if (request.method in IP2P) != model.instructs:
        raise UsageError(
            f"method {request.method} needs an InstructPix2Pix checkpoint, whose UNet takes {2 * model.channels} channels, those of the "
            f"noisy latent and of the picture; {model.name}'s takes {model.channels}: name one with --model, or use another method"
            if request.method in IP2P
            else f"{model.name} is an InstructPix2Pix checkpoint, whose UNet takes the picture too: use method ip2p, and say in the prompt "
            "what to change"
        )
    request.options.check()
    o = request.options
    if o.inversion_correction == "null-text" and (o.guidance_scale == 1 or o.guided_steps(100) == 0):
        raise UsageError(
            "inversion_correction null-text fits the unconditional half of the guidance, and guidance scale 1 (or guidance_until 0) has "
            "none; use direct"
        )
    for name, _ in request.options.control_scales:
        if name not in (*model.layouts, *model.left_out):
            known = ", ".join(model.layouts) or "none"
            raise UsageError(f"control_scales: {model.name} has no ControlNet or T2I-Adapter {name!r}; it has {known}")
    check_layouts(model.name, model.layouts, [*request.layouts, *request.source_layouts], model.left_out)
    extra = sorted(set(request.source_layouts) - set(request.layouts))
    if extra:
        raise UsageError(f"source layout {extra[0]!r} has no layout to go with it: give layouts[{extra[0]!r}] too")
    pictures.check_size(request.image)


def check_request(model: Model, request: EditRequest, lambdas: Sequence[float | None] | None = None) -> PreparedRequest:
    """A request with its pictures as tensors; everything that can be wrong with it is found here, before anything is run.

    Args:
        lambdas: of all requests that are asked for together; by default its own.

    Raises:
        UsageError: the request cannot be run as asked.
        TypeError: a field is of another type than declared; it is named.
    """
    request = _plain(_with_pictures(request), "")
    _check_fields(model, request)
    context = option_context(request, model.guidance_scale, lambdas)
    check_uses(context, set_fields(request))
    steps = STEPS.get(request.method, 25) if request.steps is None else request.steps
    model.schedule.spaced(request.options.timestep_spacing).levels(steps)
    request = dataclasses.replace(request, steps=steps, options=_settled(model, request, steps, context))
    image, full = pictures.as_rgb(request.image), None
    if request.options.resize is not None and max(image.size) > request.options.resize:
        full, image = image, pictures.fit(image, request.options.resize)
    check_side(image.size, model.side, model.name)
    padded, size = pictures.pad_to_multiple(image, model.multiple)

    def tensor_of(name: str, picture: Image.Image) -> Tensor:
        if picture.size != size:  # a source's map may have been made of the picture at its own size or at this one
            picture = layout_maps.check_layout(picture, name, request.image.size).resize(size, Image.Resampling.LANCZOS)
        layout = layout_maps.check_layout(picture, name, size)
        framed = Image.new("RGB", padded.size)
        framed.paste(layout, (0, 0))
        return ((pictures.to_tensor(framed) + 1) / 2).to(model.device)

    maps = {name: tensor_of(name, picture) for name, picture in request.layouts.items()}
    source_maps = {}
    if context.estimates_mask:
        for name in maps:
            given = request.source_layouts.get(name)
            source_maps[name] = tensor_of(name, layout_maps.annotate(image, name) if given is None else given)
    given_mask, mask = None, None
    if request.mask is not None:
        mask = pictures.load_mask(request.mask, request.image.size)
        small = mask if full is None else pictures.shrink_mask(mask, size)
        latent = (padded.height // model.vae_scale_factor, padded.width // model.vae_scale_factor)
        given_mask = pictures.mask_to_latent(small, latent, padded.size).to(model.device)
    source_prompt = request.source_prompt or (request.prompt if request.layouts else "")
    texts = (request.prompt, source_prompt, request.options.negative_prompt)
    chunks = max(len(token_chunks(model, t)) for t in texts)
    aligned, o = None, request.options
    if request.method in P2P:
        aligned = alignment(model, source_prompt, request.prompt, chunks, o.replacement, o.reweight)
    return PreparedRequest(
        request=request,
        size=size,
        pixels=pictures.to_tensor(padded),
        digest=hashlib.sha256(f"{padded.size}".encode() + padded.tobytes()).hexdigest()[:32],
        maps=maps,
        source_maps=source_maps,
        given_mask=given_mask,
        mask_picture=mask,
        full=full,
        chunks=chunks,
        source_prompt=source_prompt,
        aligned=aligned,
        notes=[
            *pictures.dropped(request.image),
            *unused_notes(context, bool(request.source_prompt), bool(request.source_layouts)),
            *_unknown_words(model, texts),
        ],
    )
