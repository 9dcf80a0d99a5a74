"""The plain composition: an ITO text edit put together from diffusers' parts, as one would write it the first time.

DiffEdit-style mask a seed at a time with guidance, `DDIMInverseScheduler`, autograd for the update, one
stage after the other, nothing shared and nothing kept. Same weights, noise and method as `Editor.edit`, whose result it
must reproduce; `bench/edit.py` pairs the two. It uses nothing of the runtime but the seeds' noise, so that both start alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

from iedit.runtime.schedule import seeded_noise


class Naive:
    """Args:
    model: a `model.model.Model`; its modules are called as the diffusers pipelines call them.
    steps, scale: sampling steps, guidance scale.
    """

    def __init__(self, model: Any, steps: int = 25, scale: float = 5.0):
        self.model, self.steps, self.scale = model, steps, scale
        self.device, self.dtype = model.device, model.dtype
        config = DDIMScheduler.load_config(model.folder / "scheduler")
        self.forward, self.inverse = DDIMScheduler.from_config(config), DDIMInverseScheduler.from_config(config)
        self.forward.set_timesteps(steps)
        self.inverse.set_timesteps(steps)
        self.evaluations = 0

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        ids = self.model.tokenizer(prompt, padding="max_length", max_length=self.model.tokenizer.model_max_length,
                                   truncation=True, return_tensors="pt").input_ids  # fmt: skip
        return self.model.text_encoder(ids.to(self.device))[0]

    @torch.no_grad()
    def predict(self, x: Tensor, t: Any, text: Tensor, empty: Tensor | None) -> Tensor:
        """With guidance where `empty` is given."""
        if empty is None:
            self.evaluations += 1
            return self.model.unet(x.to(self.dtype), t, text).sample.float()
        self.evaluations += 2
        both = self.model.unet(torch.cat([x, x]).to(self.dtype), t, torch.cat([empty, text])).sample.float()
        low, high = both.chunk(2)
        return low + self.scale * (high - low)

    def mask(self, x0: Tensor, edit: Tensor, source: Tensor, empty: Tensor, options: Any, seed: int) -> Tensor:
        """A seed at a time, each prompt with guidance; blur, min-max, threshold."""
        t = self.forward.timesteps[self.steps - int(self.steps * options.strength)]
        maps = []
        for i in range(options.seeds):
            noise = seeded_noise(seed, f"mask-{i}", tuple(x0.shape[1:]))[None].to(self.device)
            x = self.forward.add_noise(x0, noise, t)
            maps.append(
                (self.predict(x, t, edit, empty) - self.predict(x, t, source, empty)).abs().mean(1, keepdim=True)
            )
        heat = torch.stack(maps).mean(0)
        radius = math.ceil(3 * options.sigma)
        at = torch.arange(-radius, radius + 1, device=self.device, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (at / options.sigma) ** 2)
        kernel = kernel / kernel.sum()
        heat = F.pad(heat, (radius, radius, radius, radius), mode="replicate")
        heat = F.conv2d(F.conv2d(heat, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
        heat = (heat - heat.min()) / (heat.max() - heat.min())
        return (heat > options.threshold).float()

    @torch.no_grad()
    def invert(self, x0: Tensor, text: Tensor) -> list[Tensor]:
        """Latents from the noisiest to the clean one."""
        found = [x0]
        for t in self.inverse.timesteps:
            found.append(self.inverse.step(self.predict(found[-1], t, text, None), t, found[-1]).prev_sample)
        return found[::-1]

    def update(self, y: Tensor, x: Tensor, g: Tensor | None, mask: Tensor, lam: float, rule: str) -> Tensor:
        """One step on (1 - lam) * L_G + lam * L_rec by autograd: clipped at 0.1, or Adam's."""
        y = y.detach().clone().requires_grad_(True)
        adam = torch.optim.Adam([y], lr=0.1)
        loss = lam * ((1 - mask) * (y - x)).pow(2).mean()
        if g is not None:
            loss = loss + (1 - lam) * (1 - F.cosine_similarity(y.flatten(1), g.flatten(1)).mean())
        loss.backward()
        if rule == "clipped":
            assert y.grad is not None
            return y.detach() - (y.grad * (y[0].numel() / 2)).clamp(-0.1, 0.1)
        adam.step()
        return y.detach()

    def sample(self, y: Tensor, edit: Tensor, empty: Tensor, source: Any, guidance: Any, mask: Tensor, lam: float,
               phase: Any) -> Tensor:  # fmt: skip
        for i, t in enumerate(self.forward.timesteps):
            y = self.forward.step(self.predict(y, t, edit, empty), t, y, eta=0.0).prev_sample
            if i < phase.updates(self.steps):
                y = self.update(y, source(i + 1), guidance(i + 1) if guidance else None, mask, lam, phase.update)
        return y

    def edit(self, image: Tensor, prompt: str, source_prompt: str, options: Any, seed: int = 0) -> dict[str, Tensor]:
        """The whole edit.

        Args:
            image: (1, 3, H, W) in [-1, 1].
            options: `options.Options`; lam, mask, t_u and update of its phases are used.

        Returns:
            image (1, 3, H, W), mask (1, 1, h, w) and latent (1, C, h, w).
        """
        options = options.settled(self.model, self.steps)
        edit, source, empty = self.text(prompt), self.text(source_prompt), self.text("")
        vae = self.model.vae
        with torch.no_grad():
            x0 = vae.encode(image.to(self.device, self.dtype)).latent_dist.mode().float() * vae.config.scaling_factor
        mask = self.mask(x0, edit, source, empty, options.mask, seed)
        xs = self.invert(x0, source)
        noise = seeded_noise(seed, "guidance", tuple(x0.shape[1:]))[None].to(self.device)

        def noised(i: int) -> Tensor:
            return x0 if i == self.steps else self.forward.add_noise(x0, noise, self.forward.timesteps[i])

        y = self.sample(noised(0), edit, empty, noised, None, mask, 1.0, options.guidance)
        gs = self.invert(y, edit)
        y = self.sample(xs[0], edit, empty, xs.__getitem__, gs.__getitem__, mask, options.lam,
                        options.final)  # fmt: skip
        with torch.no_grad():
            picture = vae.decode((y / vae.config.scaling_factor).to(self.dtype)).sample.float()
        return {"image": picture, "mask": mask, "latent": y}
