"""The model side of the five trainers: what a paper's method section mentions.  No flags, no run folder, no method.

A *kernel* turns a network output o (epsilon or velocity) into the Gaussian of one sampler step, N(mu, sigma^2 I).
Every kernel of the papers is linear, mu = x_coef * x_t + o_coef * o, so a `Grid` holds three numbers per step and the
rest is arithmetic.  Time runs from t = 1 (noise) to t = 0 (data); step i = 0 leaves pure noise; x_s is the next,
cleaner state.  Shapes: B samples (group-major: P prompts x K images), T sampler steps, latents (C, h, w).
Everything random is a function of (seed, epoch, sample index), so that a run depends neither on the micro-batch size,
nor on the number of processes, nor on having been interrupted.

Carry away: Policy(pipe) + add_lora() + policy.grid() + rollout() + log_ratio() is all a method needs (docs/port.md).
"""

import hashlib
import json
import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
MIN_SIGMA = 1e-6  # below this a step has no density: it is performed, but it is not a step of the policy


class UsageError(ValueError):
    """Bad input, found before anything heavy: one sentence with what was given, what is expected and what to do."""


# ---- backbones: one class each with all that tells one model from another ----
class SD15:
    """Stable Diffusion 1.5: a UNet that predicts the noise epsilon, on DDIM steps of its training schedule."""

    kind, part = "eps", "unet"  # what the network predicts; its name in the pipeline and in a LoRA file
    distilled = False  # True: the guidance is an input of the network, there is no unconditional branch
    kernels = ("ddim", "ancestral", "ode")
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    mlp = ("ff.net.0.proj", "ff.net.2")
    encoders = ("text_encoder",)

    @staticmethod
    def load(path, dtype, t5):
        from diffusers import StableDiffusionPipeline

        off = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        return StableDiffusionPipeline.from_pretrained(path, dtype=dtype, **off)

    @staticmethod
    def latents(config):
        """Channels of the latent, and its usual height and width."""
        return config.in_channels, config.sample_size

    @staticmethod
    def scheduler(given, latent_shape):
        """DDIM with the model's own noise schedule, whatever its default sampler is (as DDPO does)."""
        from diffusers import DDIMScheduler

        if given.config.prediction_type != "epsilon":
            raise UsageError(f"the model predicts {given.config.prediction_type}; only epsilon is supported")
        return DDIMScheduler.from_config(given.config)

    @staticmethod
    def encode(pipe, texts, device, length):
        return pipe.encode_prompt(texts, device, 1, False)[0], None

    @staticmethod
    def forward(net, x, t, embeds, pooled, guidance=1.0):
        return net(x, t, embeds, return_dict=False)[0]

    @staticmethod
    def to_vae(x0, config):
        return x0 / config.scaling_factor


class SD35:
    """Stable Diffusion 3 and 3.5: a transformer that predicts the velocity noise - data of a rectified flow."""

    kind, part, distilled = "flow", "transformer", False
    kernels = ("flow_sde", "dance", "ancestral", "cps", "ode")
    # "attn.": the joint attention of each block, as in the official codes, not SD3.5-M's second one, attn2
    attention = tuple(f"attn.{name}" for name in SD15.attention)
    attention += ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
    mlp = (*SD15.mlp, "ff_context.net.0.proj", "ff_context.net.2")
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @staticmethod
    def load(path, dtype, t5):
        from diffusers import StableDiffusion3Pipeline

        off = {} if t5 else dict(text_encoder_3=None, tokenizer_3=None)
        return StableDiffusion3Pipeline.from_pretrained(path, dtype=dtype, **off)

    latents = SD15.latents

    @staticmethod
    def scheduler(given, latent_shape):
        return given

    @staticmethod
    def encode(pipe, texts, device, length):
        off = dict(do_classifier_free_guidance=False, max_sequence_length=length)
        embeds, _, pooled, _ = pipe.encode_prompt(texts, None, None, device=device, **off)
        return embeds, pooled

    @staticmethod
    def forward(net, x, t, embeds, pooled, guidance=1.0):
        return net(x, embeds, pooled, t, return_dict=False)[0]

    @staticmethod
    def to_vae(x0, config):
        return x0 / config.scaling_factor + config.shift_factor


class Flux:
    """FLUX.1-dev: a rectified flow as SD3.5, distilled so that the guidance is an input and one call is enough."""

    kind, part, distilled = "flow", "transformer", True
    kernels, attention, mlp = SD35.kernels, SD35.attention, SD35.mlp
    encoders = ("text_encoder", "text_encoder_2")
    to_vae = SD35.to_vae

    @staticmethod
    def load(path, dtype, t5):
        from diffusers import FluxPipeline

        return FluxPipeline.from_pretrained(path, dtype=dtype)

    @staticmethod
    def latents(config):
        return config.in_channels // 4, 128  # the network sees 2 x 2 squares of the latent as one token

    @staticmethod
    def scheduler(given, latent_shape):
        """The model's own times: t = 1, 1 - 1/T, ..., 1/T, shifted towards 1 by e^mu, more for larger images."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        c, tokens = given.config, latent_shape[1] * latent_shape[2] // 4
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        mu = c.base_shift + slope * (tokens - c.base_image_seq_len)

        class AtThisResolution(FlowMatchEulerDiscreteScheduler):
            def set_timesteps(self, steps, device=None):
                super().set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu, device=device)

        return AtThisResolution.from_config(c, shift=math.exp(mu) if c.use_dynamic_shifting else c.shift)

    @staticmethod
    def encode(pipe, texts, device, length):
        return pipe.encode_prompt(texts, device=device, max_sequence_length=length)[:2]

    @staticmethod
    def forward(net, x, t, embeds, pooled, guidance=1.0):
        b, c, h, w = x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2
        tokens = x.reshape(b, c, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, 4 * c)
        row, column = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
        places = torch.cartesian_prod(row.new_zeros(1), row, column)  # (h w, 3); the text's are 0
        texts = places.new_zeros(embeds.shape[1], 3)
        scale = torch.full_like(t, guidance) if net.config.guidance_embeds else None
        o = net(tokens, embeds, pooled, t / 1000, places, texts, scale, return_dict=False)[0]
        return o.view(b, h, w, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


BACKBONES = {  # by the pipeline's class
    "StableDiffusionPipeline": SD15,
    "StableDiffusion3Pipeline": SD35,
    "FluxPipeline": Flux,
}


@dataclass
class Cond:
    """Text conditions of B samples: the unique prompts' embeddings, and which of them each sample has."""

    embeds: torch.Tensor  # (U, L, D)
    pooled: torch.Tensor | None  # (U, D') for SD3.5 and FLUX
    index: torch.Tensor  # (B,) into the U unique prompts

    def __getitem__(self, rows) -> "Cond":
        return Cond(self.embeds, self.pooled, self.index[rows])

    def __add__(self, other: "Cond") -> "Cond":
        """The rows of both, one after the other."""
        pooled = None if self.pooled is None else torch.cat([self.pooled, other.pooled])
        index = torch.cat([self.index, other.index + len(self.embeds)])
        return Cond(torch.cat([self.embeds, other.embeds]), pooled, index)

    def mean_embedding(self) -> torch.Tensor:
        """(B, D) mean over the tokens, float32."""
        return self.embeds.float().mean(1)[self.index]


class Policy:
    """A diffusers pipeline whose denoiser carries a LoRA: the one interface to all backbones.

    `pipe` is a pipeline of one of the BACKBONES; dtype is that of the frozen denoiser.
    """

    def __init__(self, pipe, device="cpu", dtype=torch.float32, resolution=None, max_sequence_length=256,
                 decode_batch_size=8, detach_uncond=False, offload_text_encoders=False, offload_rollout=False,
                 vae_dtype=torch.float32):  # fmt: skip
        self.pipe, self.device, self.dtype = pipe, torch.device(device), dtype
        self.backbone = BACKBONES[type(pipe).__name__]
        self.kind, self.net = self.backbone.kind, getattr(pipe, self.backbone.part)
        self.encoders = [e for name in self.backbone.encoders if (e := getattr(pipe, name)) is not None]
        self.max_sequence_length, self.offload = max_sequence_length, offload_text_encoders
        self.store = torch.device("cpu") if offload_rollout else self.device  # where an epoch's noise and states are
        self.vae = pipe.vae.to(self.device, vae_dtype).eval().requires_grad_(False)
        self.net.to(self.device).eval().requires_grad_(False)
        for encoder in self.encoders:
            encoder.to("cpu" if self.offload else self.device).eval().requires_grad_(False)
        if self.backbone.distilled and not self.net.config.guidance_embeds:
            raise UsageError("this FLUX takes no guidance, as FLUX.1-schnell; give FLUX.1-dev or one made from it")
        pixels = pipe.vae_scale_factor
        channels, usual = self.backbone.latents(self.net.config)
        self.resolution = resolution or usual * pixels
        if self.resolution % (2 * pixels):
            raise UsageError(f"--resolution {self.resolution} must be a multiple of {2 * pixels} for this model")
        self.latent_shape = (channels, self.resolution // pixels, self.resolution // pixels)
        pipe.scheduler = self.backbone.scheduler(pipe.scheduler, self.latent_shape)
        self.decode_batch_size, self.detach_uncond = decode_batch_size, detach_uncond
        self.uncond = self.encode([""])
        self.network_calls = 0

    def grid(self, steps: int, kernel: str, level: float) -> "Grid":
        return make_grid(self.pipe.scheduler, self.kind, steps, kernel, level)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """Prompts (B) -> Cond; every distinct text is encoded once."""
        unique = list(dict.fromkeys(prompts))
        for encoder in self.encoders if self.offload else ():
            encoder.to(self.device)
        parts = [unique[n : n + 16] for n in range(0, len(unique), 16)]
        found = [self.backbone.encode(self.pipe, texts, self.device, self.max_sequence_length) for texts in parts]
        for encoder in self.encoders if self.offload else ():
            encoder.to("cpu")
        embeds, pooled = zip(*found)
        pooled = None if pooled[0] is None else torch.cat(pooled).to(self.dtype)
        place = {text: i for i, text in enumerate(unique)}
        index = torch.tensor([place[p] for p in prompts], device=self.device)
        return Cond(torch.cat(embeds).to(self.dtype), pooled, index)

    def predict(self, x_t: torch.Tensor, timestep: torch.Tensor, cond: Cond, cfg: float) -> torch.Tensor:
        """Guided network output o_u + cfg (o_c - o_u), float32 (B, C, h, w), in one batched call; timestep (B,).

        A distilled model gives it at once: it takes cfg as an input, 1 included.
        """
        self.network_calls += 1
        embeds, pooled = cond.embeds[cond.index], None if cond.pooled is None else cond.pooled[cond.index]
        x, t = x_t.to(self.dtype), timestep
        if cfg == 1 or self.backbone.distilled:
            return self.backbone.forward(self.net, x, t, embeds, pooled, cfg).float()
        embeds = torch.cat([self.uncond.embeds.expand(len(embeds), -1, -1), embeds])
        if pooled is not None:
            pooled = torch.cat([self.uncond.pooled.expand(len(pooled), -1), pooled])
        both = self.backbone.forward(self.net, torch.cat([x, x]), torch.cat([t, t]), embeds, pooled).float()
        o_uncond, o_cond = both.chunk(2)
        if self.detach_uncond:
            o_uncond = o_uncond.detach()
        return o_uncond + cfg * (o_cond - o_uncond)

    @contextmanager
    def reference(self):
        """Adapters off, whoever has added them: the frozen pretrained model."""
        # the flag alone: peft's own switch also visits every weight, a twentieth of a small model's call
        layers = adapter_layers(self.net)
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    @contextmanager
    def whole_gradient(self):
        """Gradients with respect to x_t need both branches of the guidance: detach_uncond is for theta's only."""
        kept, self.detach_uncond = self.detach_uncond, False
        try:
            yield
        finally:
            self.detach_uncond = kept

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32; differentiable where gradients are on."""
        z = self.backbone.to_vae(x0.to(self.device), self.vae.config).to(self.vae.dtype)
        images = [self.vae.decode(part, return_dict=False)[0] for part in z.split(self.decode_batch_size)]
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)


def second_order(needed: bool) -> None:
    """Switches the fast CUDA attention kernels off where a gradient is differentiated again: they cannot be."""
    torch.backends.cuda.enable_flash_sdp(not needed)
    torch.backends.cuda.enable_mem_efficient_sdp(not needed)
    torch.backends.cuda.enable_cudnn_sdp(not needed)


# ---- LoRA and other weights --------------------------------------------------
def add_lora(policy: Policy, targets: list[str], rank: int, alpha: float, seed: int) -> list[nn.Parameter]:
    """Adds the trainable adapter (float32, B = 0, so that the policy starts as the reference) and returns its weights.

    targets: endings of layer names, e.g. policy.backbone.attention.
    """
    from peft import LoraConfig

    torch.manual_seed(seed)
    policy.net.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
    )
    params = [p for p in policy.net.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()  # a step of lr 1e-4 would be lost in a half-precision weight
    for layer in adapter_layers(policy.net) if policy.dtype != torch.float32 else ():
        parts = layer.lora_A["default"], layer.lora_B["default"]
        if all(type(part) is nn.Linear for part in parts):
            layer.cast_input_dtype_enabled = False  # peft would compute it, and keep its input, in float32
            for part in parts:
                part.__class__ = CastLinear
    return params


def adapter_layers(net: nn.Module) -> list[nn.Module]:
    """The layers with a LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in net.modules() if isinstance(module, BaseTunerLayer)]


class CastLinear(nn.Linear):
    """A layer with float32 weights and gradients that computes in its input's precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


def export_lora(policy: Policy, folder, about: dict | None = None) -> None:
    """pytorch_lora_weights.safetensors that pipe.load_lora_weights(folder) loads; alpha / rank is folded into B.

    about: what stands in the file's header, as JSON under one key: safetensors would write several in any order.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = policy.net.peft_config["default"]
    scale = config.lora_alpha / config.r
    weights = get_peft_model_state_dict(policy.net, adapter_name="default")
    weights = {k: (v * scale if ".lora_B." in k else v).detach().cpu().contiguous() for k, v in weights.items()}
    weights, file = {f"{policy.backbone.part}.{k}": v for k, v in weights.items()}, f"{folder}/{LORA_FILE}"
    os.makedirs(folder, exist_ok=True)
    save_file(weights, file, {"made_by": json.dumps(about)} if about else None)
    os.chmod(file, 0o644)  # safetensors writes for the owner only


def import_lora(policy: Policy, weights: dict[str, torch.Tensor]) -> str:
    """Sets the adapter to what export_lora() wrote, alpha / rank taken out of B; what does not fit, or ""."""
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    config = policy.net.peft_config["default"]
    weights = {key.removeprefix(f"{policy.backbone.part}."): value.float() for key, value in weights.items()}
    own = get_peft_model_state_dict(policy.net, adapter_name="default")
    if other := sorted(own.keys() ^ weights.keys()):
        return (
            f"the layers are not the same ({len(own)} and {len(weights)} weights; {other[0]} is in one of them alone)"
        )
    if other := [key for key in own if own[key].shape != weights[key].shape]:
        return f"{other[0]} is {tuple(weights[other[0]].shape)}, this model's is {tuple(own[other[0]].shape)}"
    scale = config.lora_alpha / config.r
    weights = {key: value / scale if ".lora_B." in key else value for key, value in weights.items()}
    set_peft_model_state_dict(policy.net, weights, adapter_name="default")
    return ""


def sinusoid(t: torch.Tensor, width: int = 256) -> torch.Tensor:
    """(B,) times in [0, 1] -> (B, width) features."""
    frequency = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = 1000 * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


class FieldNet(nn.Module):
    """A small convolutional field (x, t) -> (B, C, h, w), 0 at the start: residual gradient and value networks."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.time = nn.Linear(256, width)
        self.first, self.middle = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight), nn.init.zeros_(self.last.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = nn.functional.silu(self.first(x) + self.time(sinusoid(t))[..., None, None])
        return self.last(nn.functional.silu(self.middle(h)))


# ---- prompts and noise: functions of (seed, epoch, sample index) alone -------
@dataclass(frozen=True)
class Prompt:
    id: int  # line number in the list, from 0: groups go by this, never by the text
    text: str
    metadata: dict = field(default_factory=dict, hash=False)


def generator(*key) -> torch.Generator:
    """A CPU random generator that depends on `key` alone (its seed keeps 32 bits of the key's hash)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def prompt_batch(prompts: list[Prompt], epoch: int, seed: int, n: int) -> list[Prompt]:
    """The n prompts of this epoch: an endless stream of shuffled passes over the list, a function of epoch alone."""
    order: dict[int, list[int]] = {}
    chosen = []
    for position in range(epoch * n, (epoch + 1) * n):
        lap, place = divmod(position, len(prompts))
        if lap not in order:
            order[lap] = torch.randperm(len(prompts), generator=generator("prompts", seed, lap)).tolist()
        chosen.append(prompts[order[lap][place]])
    return chosen


def sample_noise(seed: int, epoch: int | str, indices, steps: int, shape, device) -> torch.Tensor:
    """(len(indices), steps + 1, *shape) standard normals: the start and one draw per step, by (seed, epoch, index)."""
    rows = [torch.randn((steps + 1, *shape), generator=generator("noise", seed, epoch, i)) for i in indices]
    return torch.stack(rows).to(device)


@dataclass
class Batch:
    """This process's share of an epoch: B samples, group-major, so that x.view(P, K) works; indices count over all."""

    prompts: list[Prompt]
    indices: range
    cond: Cond
    noise: torch.Tensor  # (B, T+1, C, h, w): the start and one draw per step
    kept: torch.Tensor | None = None  # (B,) bool: the images that updates use; None: all

    @property
    def texts(self) -> list[str]:
        return [p.text for p in self.prompts]

    @property
    def metadata(self) -> list[dict]:
        return [p.metadata for p in self.prompts]


def epoch_batch(policy, prompts: list[Prompt], epoch: int, seed: int, num_prompts: int, group_size: int, draws: int,
                shared_noise: bool = False, blocks: int = 0) -> Batch:  # fmt: skip
    """Prompts, conditions and noise (the start and `draws` more) of this epoch: whole groups for each process.

    shared_noise: the images of a prompt start from one x_T; blocks N: those of each N-th part of the epoch.
    """
    chosen = prompt_batch(prompts, epoch, seed, num_prompts)
    samples = num_prompts * group_size // world()
    mine = range(rank() * samples, (rank() + 1) * samples)
    own = [p for p in chosen for _ in range(group_size)][mine.start : mine.stop]
    noise = sample_noise(seed, epoch, mine, draws, policy.latent_shape, policy.store)
    if shared_noise:
        noise[:, 0] = noise[::group_size, 0].repeat_interleave(group_size, 0)
    if blocks:
        total = num_prompts * group_size
        firsts = [-(-(n * blocks // total) * total // blocks) for n in mine]  # the first image of n's block
        noise[:, 0] = sample_noise(seed, epoch, firsts, 0, policy.latent_shape, policy.store)[:, 0]
    return Batch(own, mine, policy.encode([p.text for p in own]), noise)


# ---- kernels and grids -------------------------------------------------------
@dataclass
class Grid:
    """One sampler: per step i the network's timestep, mu = x_coef x_t + o_coef o, sigma, x0_hat = x0_x x_t + x0_o o.

    All (T,) float64 on the CPU.  t and dt are the flow time and its step (for SD1.5: alphas_bar index / 1000 and the
    step's length); alpha, nu are the signal and noise levels of x_t, alpha_s, nu_s those of x_s.
    """

    kind: str
    kernel: str
    timestep: torch.Tensor
    t: torch.Tensor
    dt: torch.Tensor
    alpha: torch.Tensor
    nu: torch.Tensor
    alpha_s: torch.Tensor
    nu_s: torch.Tensor
    x_coef: torch.Tensor
    o_coef: torch.Tensor  # = b_t k_t: the mean's change per unit of network output (negative)
    sigma: torch.Tensor
    x0_x: torch.Tensor
    x0_o: torch.Tensor

    @property
    def steps(self) -> int:
        return len(self.t)

    @property
    def w(self) -> torch.Tensor:
        """Signed sensitivity o_coef / sigma (T,): delta = w (o_a - o_b) is the mean's shift in standard deviations."""
        return self.o_coef / self.sigma

    @property
    def t_all(self) -> torch.Tensor:
        """t of all states (T+1,): of x_0, too, where it is 0."""
        return torch.cat([self.t, torch.zeros(1, dtype=self.t.dtype)])

    def at(self, table: torch.Tensor, i, like: torch.Tensor) -> torch.Tensor:
        """table[i] as float32 shaped to broadcast against `like`; i an int or a (B,) tensor of step indices."""
        value = table[i].to(like.device, torch.float32)
        return value if value.ndim == 0 else value.view(-1, *[1] * (like.ndim - 1))

    def time(self, i, x: torch.Tensor) -> torch.Tensor:
        """The network's timestep of step i for the B rows of x, (B,)."""
        return self.timestep[i].to(x.device, torch.float32).expand(len(x))

    def mu(self, x_t, o, i):
        return self.at(self.x_coef, i, x_t) * x_t + self.at(self.o_coef, i, x_t) * o

    def x0_hat(self, x_t, o, i):
        """Tweedie's estimate of E[x_0 | x_t]."""
        return self.at(self.x0_x, i, x_t) * x_t + self.at(self.x0_o, i, x_t) * o


def make_grid(scheduler, kind: str, steps: int, kernel: str, level: float) -> Grid:
    """Grid of `steps` steps of the pipeline's own scheduler with one of the kernels at noise level `level`."""
    scheduler.set_timesteps(steps)
    return {"eps": ddim_grid, "flow": flow_grid}[kind](scheduler, steps, kernel, level)


def ddim_grid(scheduler, steps: int, kernel: str, level: float) -> Grid:
    """Variance-preserving x_t = alpha x_0 + nu epsilon: ddim: eta = level, ancestral: 1, ode: 0."""
    timestep = scheduler.timesteps.double().cpu()
    abar = scheduler.alphas_cumprod.double()
    index = scheduler.timesteps.long().cpu()
    before = index - scheduler.config.num_train_timesteps // steps
    abar_t = abar[index]
    abar_s = torch.where(before >= 0, abar[before.clamp(min=0)], scheduler.final_alpha_cumprod.double())
    alpha, nu, alpha_s, nu_s = abar_t.sqrt(), (1 - abar_t).sqrt(), abar_s.sqrt(), (1 - abar_s).sqrt()
    eta = {"ddim": level, "ancestral": 1.0, "ode": 0.0}[kernel]
    sigma = eta * ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)).clamp(min=0).sqrt()
    x_coef = alpha_s / alpha  # mu = alpha_s x0_hat + sqrt(nu_s^2 - sigma^2) eps
    o_coef = -alpha_s * nu / alpha + (nu_s**2 - sigma**2).clamp(min=0).sqrt()
    t, dt = timestep / 1000, torch.full_like(timestep, 1 / steps)
    levels = (alpha, nu, alpha_s, nu_s)
    return Grid("eps", kernel, timestep, t, dt, *levels, x_coef, o_coef, sigma, 1 / alpha, -nu / alpha)


def flow_grid(scheduler, steps: int, kernel: str, level: float) -> Grid:
    """Rectified flow x_t = (1 - t) x_0 + t noise, o = noise - x_0: Euler-Maruyama, ancestral or CPS steps."""
    sigmas = scheduler.sigmas.double().cpu()
    t, s = sigmas[:-1], sigmas[1:]
    dt = t - s
    if kernel in ("flow_sde", "dance", "ode"):  # Euler-Maruyama of dx = [v - g^2/2 score] dt + g dw
        # Flow-GRPO's g is infinite at t = 1: there 1 - t becomes 1 - (the second grid value), inside g only
        room = torch.where(t < 1, 1 - t, 1 - sigmas[1])
        g2 = {"flow_sde": level**2 * t / room, "dance": torch.full_like(t, level**2), "ode": 0 * t}[kernel]
        x_coef = 1 - dt * g2 / (2 * t)
        o_coef = -dt * (1 + (1 - t) * g2 / (2 * t))
        sigma = (g2 * dt).sqrt()
    elif kernel == "ancestral":  # q(x_s | x_t, x_0 = x0_hat)
        q = t**2 - ((1 - t) / (1 - s)) ** 2 * s**2
        x_coef = (1 - s) + (1 - t) * s**2 / (t * (1 - s))
        o_coef = -(1 - s) / t * q
        sigma = s / t * q.clamp(min=0).sqrt()
    else:  # coefficients-preserving sampling
        sigma = s * math.sin(level * math.pi / 2)
        rest = (s**2 - sigma**2).clamp(min=0).sqrt()
        x_coef = (1 - s) + rest
        o_coef = -(1 - s) * t + rest * (1 - t)
    timestep = scheduler.timesteps.double().cpu()
    levels = (1 - t, t, 1 - s, s)
    return Grid("flow", kernel, timestep, t, dt, *levels, x_coef, o_coef, sigma, torch.ones_like(t), -t)


def pcpo_weights(grid: Grid, steps: list[int], kind: str) -> torch.Tensor:
    """PCPO's w~_t (T,), float64 and signed as grid.w, in place of the sensitivities w_t of the trained `steps`.

    kind "zeta": zeta dt with zeta = sum w / sum dt, which keeps the sum; else the mean of the native w.
    """
    w = grid.w[steps].abs()
    if kind == "zeta":
        return -w.sum() / grid.dt[steps].sum() * grid.dt
    return -w.mean().expand(grid.steps)


def pcpo_grid(grid: Grid, big_w: float) -> Grid:
    """SD1.5's DDIM grid with the standard deviations sigma~ of PCPO's public sampler, (c1 + c2) / sigma~ = W.

    ref-code: it takes this root, which leaves the true sensitivity (c1 - c2) / sigma~ anything but constant; the
    constant weight is imposed in the loss.
    """
    c1 = grid.nu * grid.alpha_s / grid.alpha
    root = grid.nu_s**2 * (big_w**2 + 1) - c1**2
    sigma = (big_w * c1 + root.clamp(min=0).sqrt()) / (big_w**2 + 1)
    if (root < 0).any() or (sigma > grid.nu_s).any():
        what = f"--pcpo-w {big_w} has no sampler on this grid of {grid.steps} steps"
        raise UsageError(f"{what}; use a larger value, more --steps, or the native sampler")
    return replace(grid, sigma=sigma, o_coef=-c1 + (grid.nu_s**2 - sigma**2).sqrt())


def policy_steps(grid: Grid, train_steps: int) -> list[int]:
    """The step indices that are trained: the leading `train_steps`, without those that have no density."""
    steps = [i for i in range(train_steps) if grid.sigma[i] >= MIN_SIGMA]
    without = train_steps - len(steps)
    if not steps:
        what = f"none of the first {train_steps} steps of kernel {grid.kernel}"
        raise UsageError(f"{what} is stochastic; raise --noise-level")
    if without:
        print(f"note: {without} of the {train_steps} steps has no noise (sigma < {MIN_SIGMA}) and is not trained")
    return steps


# ---- log-probabilities and KL ------------------------------------------------
def reduce_latent(x: torch.Tensor, how: str) -> torch.Tensor:
    """(B, ...) -> (B,): mean or sum over the latent's scalars."""
    return x.flatten(1).mean(1) if how == "mean" else x.flatten(1).sum(1)


def gaussian_logp(x_s: torch.Tensor, mu: torch.Tensor, sigma, reduce: str) -> torch.Tensor:
    """log N(x_s; mu, sigma^2 I) per sample, (B,); sigma a float or broadcastable to x_s; 'mean' divides by d."""
    sigma = torch.as_tensor(sigma, dtype=x_s.dtype, device=x_s.device)
    density = -((x_s - mu) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return reduce_latent(density, reduce)


def log_ratio(delta: torch.Tensor, z: torch.Tensor, reduce: str) -> torch.Tensor:
    """log N(x_s; mu_a) - log N(x_s; mu_b), (B,), from delta = (mu_a - mu_b) / sigma and z = (x_s - mu_b) / sigma.

    Equal to the difference of two gaussian_logp, without losing the digits that a clip range of 1e-4 needs.
    """
    return reduce_latent(delta * z - 0.5 * delta**2, reduce)


def kl_divergence(delta: torch.Tensor, reduce: str) -> torch.Tensor:
    """KL between two Gaussians of equal covariance whose means differ by delta standard deviations, (B,)."""
    return reduce_latent(0.5 * delta**2, reduce)


@torch.no_grad()
def reference_kl(policy, grid, i, x_t, o_old, cond: Cond, cfg: float, reduce: str, size: int) -> torch.Tensor:
    """KL(p_old || p_ref) of R transitions at the steps i (R,), (R,): one reference pass each, `size` at once."""
    found = [x_t.new_zeros(0)]
    for r in micro_batches(torch.arange(len(i)), size, ""):
        with policy.reference():
            o_ref = policy.predict(x_t[r], grid.time(i[r], x_t[r]), cond[r], cfg)
        found.append(kl_divergence(grid.at(grid.w, i[r], o_ref) * (o_old[r] - o_ref), reduce))
    return torch.cat(found)


def backward_scores(policy, grid, i, x_t, x_s, o, cond: Cond, cfg: float) -> tuple[torch.Tensor, torch.Tensor]:
    """grad log p_theta and grad log p_ref (x_s | x_t), both with respect to x_t (B, C, h, w), at steps i (B,).

    o = policy.predict(x_t, ...) with x_t requiring a gradient; the first is differentiable again (second_order()).
    """
    sigma = grid.at(grid.sigma, i, o)
    logp = gaussian_logp(x_s, grid.mu(x_t, o, i), sigma, "sum")
    back = torch.autograd.grad(logp.sum(), x_t, create_graph=True)[0]
    x_ref = x_t.detach().requires_grad_()
    with policy.reference():
        o_ref = policy.predict(x_ref, grid.time(i, x_ref), cond, cfg)
        logp_ref = gaussian_logp(x_s, grid.mu(x_ref, o_ref, i), sigma, "sum")
        # inside, because checkpointing repeats the forward pass here
        back_ref = torch.autograd.grad(logp_ref.sum(), x_ref)[0]
    return back, back_ref


# ---- rollout and its rows ----------------------------------------------------
@dataclass
class Transitions:
    """R transitions of a rollout, of whichever samples n and steps i: what a micro-batch of an update sees."""

    n: torch.Tensor  # (R,) local sample
    i: torch.Tensor  # (R,) step
    x_t: torch.Tensor  # (R, C, h, w), as are the next three
    z: torch.Tensor  # (x_s - mu_old) / sigma
    o_old: torch.Tensor
    o_ref: torch.Tensor | None
    cond: Cond


@dataclass
class Rollout:
    """Trajectories of this process, float32: states x (B, T+1, C, h, w), draws z and outputs o_old (B, T, C, h, w).

    They are where the noise was (policy.store); rows() and state() bring theirs to the policy's device.

    x_s = mu_old + sigma z was formed from exactly these tensors; o_ref are the reference's outputs at the same x_t.
    """

    x: torch.Tensor
    z: torch.Tensor
    o_old: torch.Tensor
    o_ref: torch.Tensor | None  # 0 at steps without a reference pass
    cond: Cond

    def rows(self, n: torch.Tensor, i: torch.Tensor) -> Transitions:
        device = self.cond.index.device
        o_ref = None if self.o_ref is None else self.o_ref[n, i].to(device)
        kept = (each[n, i].to(device) for each in (self.x, self.z, self.o_old))
        return Transitions(n, i, *kept, o_ref, self.cond[n])

    def state(self, n, i) -> torch.Tensor:
        return self.x[n, i].to(self.cond.index.device)

    def log_ref_over_old(self, grid: Grid, steps: list[int], reduce: str) -> torch.Tensor:
        """log p_ref - log p_old of the rollout's own draws at these steps, (B, S)."""
        w = grid.at(grid.w, torch.tensor(steps), self.z[0])
        each = zip(self.o_ref, self.o_old, self.z)  # one trajectory after the other: whole tensors would be copied
        found = [log_ratio(w * (ref[steps] - old[steps]), z[steps], reduce) for ref, old, z in each]
        return torch.stack(found).to(self.cond.index.device)


@torch.no_grad()
def rollout(policy, grid, cond, noise, cfg, micro_batch, reference=(), desc="rollout") -> Rollout:
    """Samples B trajectories from noise (B, T+1, C, h, w); at the steps in `reference` also of the frozen model."""
    count, steps = len(noise), grid.steps
    x = torch.empty_like(noise)
    x[:, 0] = noise[:, 0]
    o_old = torch.empty_like(noise[:, 1:])
    o_ref = torch.zeros_like(o_old) if reference else None
    starts = range(0, count, micro_batch)
    bar = progress(len(starts) * steps, desc)
    for start in starts:
        rows = slice(start, min(start + micro_batch, count))
        x_t = noise[rows, 0].to(policy.device)
        for i in range(steps):
            o = policy.predict(x_t, grid.time(i, x_t), cond[rows], cfg)
            if i in reference:  # now, while x_t is at hand, and in the same batch as the policy's own pass
                with policy.reference():
                    o_ref[rows, i] = policy.predict(x_t, grid.time(i, x_t), cond[rows], cfg)
            draw = noise[rows, i + 1].to(policy.device)
            x_t = grid.mu(x_t, o, i) + grid.at(grid.sigma, i, x_t) * draw
            x[rows, i + 1], o_old[rows, i] = x_t, o
            bar.update(1)
    bar.close()
    return Rollout(x, noise[:, 1:], o_old, o_ref, cond)


@torch.no_grad()
def path_distance(policy, grid, path, count: int, cfg: float, reduce: str) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the first `count` trajectories are from the reference, each (count,): one reference pass a state.

    drift: sum over the steps of mean ||mu_theta - mu_ref||^2; the sum of the KLs of those steps that have a density.
    """
    drift = kl = path.x.new_zeros(count)
    for i in range(grid.steps):
        x_t = path.x[:count, i]
        with policy.reference():
            apart = path.o_old[:count, i] - policy.predict(x_t, grid.time(i, x_t), path.cond[range(count)], cfg)
        drift = drift + reduce_latent((grid.at(grid.o_coef, i, apart) * apart) ** 2, "mean")
        if grid.sigma[i] >= MIN_SIGMA:
            kl = kl + kl_divergence(grid.at(grid.w, i, apart) * apart, reduce)
    return drift, kl


def shuffled_rows(mine: range, samples: int, steps: list[int], updates: int, *key, each=0) -> list[torch.Tensor]:
    """For each of `updates` optimiser steps this process's transitions, (n, 2) of (local sample, step index).

    The shuffle (by `key`) is over the transitions of all `samples`, of which this process has `mine`, so that every
    update sees the same set however many processes there are.  It is stratified: of so many successive transitions
    each goes to another update, so all processes have as many rows of one, within two, and none waits for another.
    each: so many of the steps, drawn for each sample.
    """
    table = torch.tensor(steps).expand(samples, -1)
    if each:
        draws = [torch.randperm(len(steps), generator=generator("subset", *key, n))[:each] for n in range(samples)]
        table = torch.tensor(steps)[torch.stack(draws)]
    drawn, count, width = generator("shuffle", *key), table.numel(), table.shape[1]
    order = torch.randperm(count, generator=drawn)
    rows = torch.stack([order // width, table.flatten()[order]], 1)
    turns = torch.rand((-(-count // updates), updates), generator=drawn).argsort(1).flatten()[:count]
    update = torch.empty_like(turns)
    update[rows[:, 0].argsort(stable=True)] = turns  # sample by sample, its transitions in the shuffle's order
    here = (rows[:, 0] >= mine.start) & (rows[:, 0] < mine.stop)
    return [rows[here & (update == u)] - torch.tensor([mine.start, 0]) for u in range(updates)]


def micro_batches(rows: torch.Tensor, size: int, desc: str):
    """rows in pieces of at most `size`, under a progress bar; none where a process has no rows in an update."""
    with progress(len(rows), desc) as bar:
        for part in rows.split(size) if len(rows) else ():
            yield part
            bar.update(len(part))


def progress(total: int | None, desc: str) -> tqdm:
    """A bar on the terminal of the first process; none without a description."""
    off = not desc or rank() > 0
    return tqdm(total=total, desc=desc, leave=False, disable=off or None, mininterval=0.5)


# ---- advantages --------------------------------------------------------------
def group_advantage(reward, group_size: int, mode: str, eps=1e-4, unbiased=False) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of rewards (B,) or (B, S), group-major, each column by itself, and which groups have one reward
    only (A is 0 there, but for raw); both of the rewards' shape.

    group: (r - mean) / (std + 1e-4) of the prompt's K samples (GRPO); global: the same mean, the std of all rewards of
    the epoch (Flow-GRPO); none: r - mean (Dr.GRPO; VMPO Eq. 20); rloo: r - mean of the other K - 1; raw: r itself.
    eps and unbiased: of the standard deviations (Flow-GRPO: biased + 1e-4; DanceGRPO: unbiased + 1e-8).
    A group with a nan (no score) has no advantages, and the others' are those that they have without it.
    """
    r = reward.double().unflatten(0, (-1, group_size))  # (P, K) or (P, K, S)
    equal = (r == r[:, :1]).all(1, keepdim=True)
    centred = torch.where(equal, 0.0, r - r.mean(1, keepdim=True))
    if mode == "group":
        adv = centred / (r.std(1, correction=int(unbiased), keepdim=True) + eps)
    elif mode == "global":
        every = gather(reward).double().unflatten(0, (-1, group_size))
        every = every[~every.flatten(1).isnan().any(1)].flatten(0, 1)
        adv = centred / (every.std(0, correction=int(unbiased)) + eps)
    elif mode == "rloo":
        adv = centred * group_size / (group_size - 1)
    else:
        adv = centred if mode == "none" else r
    return adv.flatten(0, 1).float(), equal.expand_as(r).flatten(0, 1)


def sum_of_advantages(parts: dict, weights: dict, *how) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_k w_k A(r_k) over the terms of a sum, each {name: (B,)}, by group_advantage(r_k, *how).

    No reward counts more because it varies more (MixGRPO's advantage_aggr, 2507.21802; GDPO, 2601.05242, which scales
    the sum by the batch besides).
    """
    found = {name: group_advantage(value, *how) for name, value in parts.items()}
    adv = sum(weights[name] * adv for name, (adv, _) in found.items())
    return adv, torch.stack([equal for _, equal in found.values()]).all(0)


# ---- optimiser step and averaging --------------------------------------------
class EMA:
    """Averaged copies of the trained weights; `applied()` swaps them in, but not between forward and backward."""

    def __init__(self, params: list[nn.Parameter], decay: float):
        self.params, self.decay, self.shadow = params, decay, [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        """shadow <- d shadow + (1 - d) weights."""
        torch._foreach_lerp_(self.shadow, self.params, 1 - (self.decay if decay is None else decay))

    @contextmanager
    @torch.no_grad()
    def applied(self):
        kept = [p.detach().clone() for p in self.params]
        torch._foreach_copy_(self.params, self.shadow)
        try:
            yield
        finally:
            torch._foreach_copy_(self.params, kept)

    def state_dict(self) -> dict:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.shadow = [x.to(p.device) for x, p in zip(state["shadow"], self.params)]


class Optimiser:
    """AdamW on theta, and on phi where a method has one: loss scaling, clipping, averaging, bad steps counted.

    parts: [(weights, learning rate, clipping norm), ...], theta first; adam: AdamW's other settings; a `scaler` is for
    float16 networks, whose small gradients would be 0 without it.  ema_warmup: see _average().
    """

    def __init__(self, parts, adam: dict, ema_decay=0.0, ema_every=1, ema_warmup=False, ema_repeats=1, scaler=None,
                 max_bad_steps=5):  # fmt: skip
        self.params, self.scaler = parts[0][0], scaler
        adam = adam | {"foreach": True}  # the same numbers as weight by weight, in half the time on a CPU
        self.parts = [(torch.optim.AdamW(weights, lr=lr, **adam), weights, norm) for weights, lr, norm in parts]
        for p in [p for _, weights, _ in self.parts for p in weights] if world() > 1 else ():
            dist.broadcast(p.data, 0)  # the processes stay equal because they start equal and apply equal gradients
        self.ema, self.ema_every = EMA(self.params, ema_decay) if ema_decay else None, ema_every
        self.ema_warmup, self.ema_repeats = ema_warmup, ema_repeats
        self.steps, self.bad_steps, self.max_bad_steps = 0, 0, max_bad_steps
        self.cause = lambda: "cause unknown"  # what is not finite, where somebody watches

    def backward(self, loss: torch.Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self) -> list[float]:
        """One update of every part; their gradient norms before clipping.  Stops after max_bad_steps bad ones."""
        done = [optimizer_step(opt, weights, norm, self.scaler) for opt, weights, norm in self.parts]
        if self.scaler:
            self.scaler.update()
        taken = all(fine for _, fine in done)
        self.steps += 1
        self.bad_steps = 0 if taken else self.bad_steps + 1
        if not taken and rank() == 0:
            print(f"note: update {self.steps} is not applied, its gradient is NaN or infinite ({self.cause()})")
        if self.bad_steps > self.max_bad_steps:
            what = f"{self.bad_steps} updates in a row had a NaN or infinite gradient ({self.cause()})"
            raise SystemExit(f"stopped: {what}; the last checkpoint is intact; try a smaller --lr")
        if self.ema and taken:
            self._average()
        return [norm for norm, _ in done]

    def _average(self) -> None:
        """Every ema_every steps; with ema_warmup by min((1 + s) / (10 + s), d) after s steps, at s = 7, 15, ... of 8.

        ref-code: Flow-GRPO and its descendants average in every micro-batch of such a step, ema_repeats times.
        """
        s, every = self.steps, self.ema_every
        if self.ema_warmup and (s + 1) % every == 0:
            self.ema.update(min((1 + s) / (10 + s), self.ema.decay) ** self.ema_repeats)
        elif not self.ema_warmup and s % every == 0:
            self.ema.update()

    def averaged(self):
        """Context in which theta is its EMA, where there is one."""
        return self.ema.applied() if self.ema else nullcontext()

    def state_dict(self) -> dict:
        return {
            "lora": [p.detach() for p in self.params],
            "parts": [opt.state_dict() for opt, _, _ in self.parts],
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "steps": self.steps,
            "bad_steps": self.bad_steps,
        }

    def load_state_dict(self, state: dict) -> None:
        for p, saved in zip(self.params, state["lora"], strict=True):
            p.data.copy_(saved)
        for (opt, _, _), saved in zip(self.parts, state["parts"], strict=True):
            own = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
            opt.load_state_dict(saved)
            for group, settings in zip(opt.param_groups, own):
                group.update(settings)  # lr and the like are the flags', where a resume changes them
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.steps, self.bad_steps = state["steps"], state["bad_steps"]


def optimizer_step(optimizer, params, max_norm: float, scaler=None) -> tuple[float, bool]:
    """All-reduce, clip, step.  Returns (gradient norm, taken?); a NaN or infinite gradient is not applied.

    The all-reduce comes before the scaler looks for overflow, so every process takes the same decision.
    """
    all_reduce_grads(params)
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(params, max_norm).item()
    taken = math.isfinite(norm)
    if scaler is not None:
        scaler.step(optimizer)  # skips by itself where it saw an overflow
    elif taken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, taken


# ---- processes ---------------------------------------------------------------
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_grads(params: list[nn.Parameter]) -> None:
    """Sum of the gradients over the processes, one flattened all-reduce (losses carry 1/global count already)."""
    if world() == 1:
        return
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in params])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p).clone()


def gather(x: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, in rank order (= sample order: each process holds a contiguous block of prompts)."""
    if world() == 1:
        return x
    mine = x.contiguous().cuda() if dist.get_backend() == "nccl" else x.contiguous()
    parts = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(parts, mine)
    return torch.cat(parts).to(x.device)


def all_reduce(values: dict[str, float], how: str = "SUM") -> dict[str, float]:
    """Each value's sum (or how="MAX") over the processes."""
    if world() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flat = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(flat, getattr(dist.ReduceOp, how))
    return dict(zip(values, flat.tolist()))
