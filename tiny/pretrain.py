"""Trains the embedded models from nothing: VAE, SD3.5-type and SD1.5-type text-to-image models of shapes, and CLIP.

    python -m tiny.pretrain --all                 # about forty minutes on two CPU cores, a few on a GPU
    python -m tiny.pretrain --stages vae clip     # only these; a stage whose folder is complete is skipped
    python -m tiny.pretrain --all --out DIR       # elsewhere than tiny/

Stopped at any moment, the same command goes on: every stage keeps its state in OUT/.pretrain (removed at the end) and
the batch of step i is a function of (seed, stage, i) alone.  The two text-to-image models stop at the first check at
which their held-out strict accuracy reaches --target: they are left imperfect so that fine-tuning has something to do.
The result is plain diffusers / transformers folders: OUT/sd35, OUT/sd15, OUT/clip.
"""

import argparse
import copy
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tiny import shapes

STAGES = ("vae", "sd35", "sd15", "clip")
TOKENS = 10  # longest caption: 8 words + 2
DATASET = 40_000
EVAL_IMAGES = 600
SAMPLER_STEPS = 10  # the presets' number of sampler steps
LATENT_MEAN, LATENT_STD = 0.2, 2.0  # what the VAE is folded to; its shift and scaling factor undo it
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m tiny.pretrain"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="all four stages")
    what.add_argument("--stages", nargs="+", choices=STAGES, help="only these (sd35 and sd15 need vae)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the folders go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--target", type=float, default=0.5, help="held-out strict accuracy at which sd35, sd15 stop")
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--clip-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=8000, help="the most steps sd35 and sd15 are trained for")
    parser.add_argument("--check-every", type=int, default=250, help="steps between two accuracy checks")
    parser.add_argument("--batch-size", type=int, default=64)
    return parser.parse_args(argv)


# ---- data -----------------------------------------------------------------------------------------------------------
def make_dataset(seed: int) -> tuple[list[str], torch.Tensor]:
    """DATASET training captions and their images (N, 3, 32, 32) uint8."""
    rng = np.random.default_rng(seed)
    prompts = shapes.prompt_list("train", DATASET, seed)
    images = np.stack([shapes.render(p, rng) for p in tqdm(prompts, desc="render", leave=False)])
    return prompts, torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def vocabulary() -> list[str]:
    every = [p for split in ("train", "heldout") for k in shapes.captions(split).values() for p in k]
    # longest first: a merge of "red" must not split "three"
    return sorted({word for p in every for word in p.split()}, key=lambda word: (-len(word), word))


def make_t5_tokenizer() -> T5Tokenizer:
    """A real T5 tokenizer (unigram) with a piece for every word of the captions."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [("\u2581" + word, -1.0) for word in vocabulary()]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=["<extra_id_0>"], model_max_length=256)


def make_tokenizer() -> CLIPTokenizer:
    """A real CLIP tokenizer (byte-level BPE) with merges for the words of the captions; anything else is spelled."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = [256 + i for i in range(256 - len(printable))]  # byte-level BPE's stand-ins for the unprintable bytes
    letters = [chr(c) for c in printable + extra]
    vocab, merges = letters + [c + "</w>" for c in letters], []
    for word in vocabulary():
        piece = [*word[:-1], word[-1] + "</w>"]
        while len(piece) > 1:
            pair = (piece[0], piece[1])
            if pair not in merges:
                merges.append(pair)
                vocab.append("".join(pair))
            piece = ["".join(pair), *piece[2:]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    table = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    return CLIPTokenizer(vocab=table, merges=merges, model_max_length=TOKENS)


def tokens(tokenizer, prompts: list[str]) -> torch.Tensor:
    return tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def corrupt(caption: str, rng: np.random.Generator) -> str:
    """A caption that differs in one word or in the order of the objects: the hard negative of the contrastive loss."""
    scene, words = shapes.parse(caption), caption.split()
    pools = [list(shapes.COLOURS), list(shapes.SHAPES), [s + "s" for s in shapes.SHAPES], list(shapes.NUMBERS)]
    if scene.relation:
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
        if rng.random() < 0.4:
            return " ".join(opposite.get(w, w) for w in words)
    if scene.kind == "binding" and rng.random() < 0.3:  # swap the two colours
        words[1], words[5] = words[5], words[1]
        return " ".join(words)
    places = [(i, pool) for i, w in enumerate(words) for pool in pools if w in pool]
    i, pool = places[rng.integers(len(places))]
    words[i] = rng.choice([w for w in pool if w != words[i]])
    return " ".join(words)


class MuonAndAdamW:
    """Muon for the weight matrices, AdamW for the rest, behind the few methods that fit() uses."""

    def __init__(self, params, lr, muon: bool):
        matrices = [p for p in params if muon and p.ndim == 2 and min(p.shape) >= 16 and max(p.shape) < 2000]
        chosen = {id(p) for p in matrices}
        rest = [p for p in params if id(p) not in chosen]
        self.parts = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr, weight_decay=1e-4, adjust_lr_fn="match_rms_adamw"))
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


# ---- one training loop for all stages -------------------------------------------------------------------------------
def fit(name, args, log, net, steps, lr, loss_fn, check=None, muon=False):
    """Training with warm-up (and cosine decay where nothing stops it early); returns the net of averaged weights."""
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = MuonAndAdamW(list(net.parameters()), lr, muon)
    state_file = args.out / ".pretrain" / f"{name}.pt"
    step, seconds, checks, done = 0, 0.0, [], False
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        net.load_state_dict(state["net"]), average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, checks, done = state["step"], state["seconds"], state["checks"], state["done"]
    bar = tqdm(total=steps, initial=step, desc=name, mininterval=5)
    start, saved = time.time() - seconds, time.time()
    while step < steps and not done:
        rng = np.random.default_rng((args.seed, STAGES.index(name), step))
        generator = torch.Generator(args.device).manual_seed(int(rng.integers(2**62)))
        decay = 0.5 * (1 + np.cos(np.pi * step / steps)) if check is None else 1.0
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * max(decay, 0.02)
        loss, info = loss_fn(rng, generator, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            for a, p in zip(average.parameters(), net.parameters()):
                a.lerp_(p, 1 - min(0.998, step / (step + 10)))
        bar.update(1)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", **info)
        if check is not None and step % args.check_every == 0:
            accuracy = check(average)
            checks.append([step, round(time.time() - start, 1), round(loss.item(), 4), round(accuracy, 4)])
            tqdm.write(f"{name} step {step}: loss {loss.item():.4f}, held-out strict accuracy {accuracy:.3f}")
            done = accuracy >= args.target
        if done or step == steps or time.time() - saved > 60:
            saved = time.time()
            state_file.parent.mkdir(parents=True, exist_ok=True)
            state = dict(net=net.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict(),
                         step=step, seconds=saved - start, checks=checks, done=done)  # fmt: skip
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    bar.close()
    log[name] = dict(steps=step, batch_size=args.batch_size, learning_rate=lr, seconds=round(time.time() - start, 1),
                     parameters=sum(p.numel() for p in net.parameters()), checks=checks)  # fmt: skip
    return average


# ---- the four stages ------------------------------------------------------------------------------------------------
def train_vae(args, log, prompts, images):
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=shapes.SIZE,
    ).to(args.device)

    def loss_fn(rng, generator, step):
        x = images[rng.integers(len(images), size=args.batch_size)].to(args.device) / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator)).sample
        mse = F.mse_loss(y, x)
        return F.l1_loss(y, x) + mse + 1e-6 * posterior.kl().mean(), dict(mse=f"{mse.item():.5f}")

    vae = fit("vae", args, log, vae, args.vae_steps, 3e-3, loss_fn).eval()
    with torch.no_grad():
        x = images[:2000].to(args.device) / 127.5 - 1
        posterior = [vae.encode(c).latent_dist for c in x.split(200)]
        z, noise = torch.cat([d.mean for d in posterior]), torch.cat([d.var for d in posterior])
        # fold the per-channel mean and deviation (of a posterior sample, so that a channel the VAE does not use stays
        # small) into the 1x1 convolutions on both sides of the latent
        m, s = z.mean((0, 2, 3)), (z.var((0, 2, 3)) + noise.mean((0, 2, 3))).sqrt() / LATENT_STD
        m = m - LATENT_MEAN * s
        w, b = vae.quant_conv.weight, vae.quant_conv.bias
        w[:4] /= s[:, None, None, None]
        b[:4] = (b[:4] - m) / s
        b[4:] -= 2 * s.log()
        w, b = vae.post_quant_conv.weight, vae.post_quant_conv.bias
        b += w[:, :, 0, 0] @ m
        w *= s[None, :, None, None]
        z = torch.cat([vae.encode(c).latent_dist.mean for c in x.split(200)])
        y = torch.cat([vae.decode(c).sample for c in z.split(200)])
        strict = shapes.score((y / 2 + 0.5).clamp(0, 1).cpu().numpy(), prompts[:2000])[1].mean()
    vae.register_to_config(scaling_factor=1 / LATENT_STD, shift_factor=LATENT_MEAN)
    used = (z.std((0, 2, 3)) / LATENT_STD).tolist()  # 1 where a channel's latents are all signal
    log["vae"] |= dict(signal_by_channel=[round(u, 3) for u in used], mse=F.mse_loss(y, x).item())
    log["vae"] |= dict(strict_accuracy_of_reconstructions=float(strict))
    vae.save_pretrained(args.out / "sd35" / "vae")
    vae.save_pretrained(args.out / "sd15" / "vae")


def train_clip(args, log, prompts, images):
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=64, **ends)  # fmt: skip
    vision = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                  image_size=shapes.SIZE, patch_size=4, projection_dim=64)  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).to(args.device)
    mean, std = (torch.tensor(v, device=args.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    negatives = 3

    def features(net, ids, pixels):
        image = F.normalize(net.get_image_features(pixel_values=(pixels - mean) / std).pooler_output, dim=-1)
        return image, F.normalize(net.get_text_features(input_ids=ids).pooler_output, dim=-1)

    def loss_fn(rng, generator, step):
        rows = rng.integers(len(images), size=args.batch_size)
        right = [prompts[i] for i in rows]
        wrong = [corrupt(p, rng) for p in right for _ in range(negatives)]
        x = images[rows].to(args.device) / 255
        noise = torch.randn(x.shape, generator=generator, device=args.device)
        x = (x + 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator, device=args.device) * noise).clamp(0, 1)
        image, caption = features(model, tokens(tokenizer, right + wrong).to(args.device), x)
        scale, n = model.logit_scale.exp().clamp(max=100), args.batch_size
        same = torch.tensor([[a == b and i != j for j, b in enumerate(right)] for i, a in enumerate(right)])
        same = same.to(args.device)  # another image of the same caption is no negative
        label = torch.arange(n, device=args.device)
        among = (scale * image @ caption[:n].T).masked_fill(same, -1e4)
        hard = scale * (image[:, None] * caption[n:].view(n, negatives, -1)).sum(-1)
        loss = F.cross_entropy(torch.cat([among, hard], 1), label) + F.cross_entropy(among.T, label)
        return loss, dict(hard=f"{(among.diagonal()[:, None] > hard).float().mean().item():.3f}")

    model = fit("clip", args, log, model, args.clip_steps, 1e-3, loss_fn).eval()
    rng = np.random.default_rng(args.seed + 1)
    right = shapes.prompt_list("heldout", 1200, args.seed)
    pixels = torch.from_numpy(np.stack([shapes.render(p, rng) for p in right]).transpose(0, 3, 1, 2) / 255).float()
    ids = tokens(tokenizer, right + [corrupt(p, rng) for p in right]).to(args.device)
    with torch.no_grad():
        image, caption = features(model, ids, pixels.to(args.device))
    wins = (image * caption[:1200]).sum(-1) > (image * caption[1200:]).sum(-1)
    log["clip"] |= dict(heldout_right_over_corrupted_caption=wins.float().mean().item())
    folder = args.out / "clip"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = dict(height=shapes.SIZE, width=shapes.SIZE)
    CLIPImageProcessor(size=dict(shortest_edge=shapes.SIZE), crop_size=size).save_pretrained(folder)


def load_latents(args, images):
    """The frozen VAE and the scaled latents (N, 4, 8, 8) of the whole dataset, without and with the shift."""
    vae = AutoencoderKL.from_pretrained(args.out / "sd35" / "vae").to(args.device).eval().requires_grad_(False)
    with torch.no_grad():
        chunks = tqdm(images.split(500), desc="encode", leave=False)
        z = torch.cat([vae.encode(c.to(args.device) / 127.5 - 1).latent_dist.mean for c in chunks])
    return vae, z * vae.config.scaling_factor, (z - vae.config.shift_factor) * vae.config.scaling_factor


def heldout_accuracy(pipe, n: int, **call) -> tuple[float, dict[str, float]]:
    """Strict accuracy over n held-out captions, one image each, through the plain pipeline call; and by kind."""
    prompts = shapes.prompt_list("heldout", n)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, n, 100):
        generator = torch.Generator("cpu").manual_seed(i)
        call |= dict(num_inference_steps=SAMPLER_STEPS, guidance_scale=1.0, generator=generator, output_type="np")
        images.append(pipe(prompts[i : i + 100], height=shapes.SIZE, width=shapes.SIZE, **call).images)
    _, strict = shapes.score(np.concatenate(images).transpose(0, 3, 1, 2), prompts)
    kinds = np.array([shapes.parse(p).kind for p in prompts])
    return float(strict.mean()), {k: round(float(strict[kinds == k].mean()), 3) for k in shapes.KINDS}


def text_config(tokenizer, width, layers):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_sd35(args, log, prompts, images):
    vae, _, latents = load_latents(args, images)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    t5_tokenizer = make_t5_tokenizer()
    ids, empty = tokens(tokenizer, prompts).to(args.device), tokens(tokenizer, [""]).to(args.device)
    t5_ids, t5_empty = tokens(t5_tokenizer, prompts).to(args.device), tokens(t5_tokenizer, [""]).to(args.device)
    width, heads, head_dim = 64, 6, 16
    net = nn.ModuleDict(
        dict(
            text_encoder=CLIPTextModelWithProjection(text_config(tokenizer, width, 3)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, width, 3)),
            text_encoder_3=T5EncoderModel(
                T5Config(vocab_size=len(t5_tokenizer), d_model=2 * width, d_kv=32, num_heads=4, num_layers=1, d_ff=256)
            ),
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=4,
                attention_head_dim=head_dim,
                num_attention_heads=heads,
                caption_projection_dim=heads * head_dim,
                joint_attention_dim=2 * width,
                pooled_projection_dim=2 * width,
                pos_embed_max_size=8,
                qk_norm="rms_norm",
            ),
        )
    ).to(args.device)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def loss_fn(rng, generator, step):
        # every form of the T5 part: TOKENS long (ours) or 256 (a plain diffusers call), or zeros where it is absent
        long, absent = step % 20 == 19, rng.random() < 0.5
        n, length = (args.batch_size // 4, 256) if long else (args.batch_size, TOKENS)
        rows = torch.from_numpy(rng.integers(len(images), size=n))
        drop = torch.from_numpy(rng.random(n) < 0.1).to(args.device)
        token = torch.where(drop[:, None], empty, ids[rows])
        one, two = (net[k](token, output_hidden_states=True) for k in ("text_encoder", "text_encoder_2"))
        context = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        t5_token = F.pad(torch.where(drop[:, None], t5_empty, t5_ids[rows]), (0, length - TOKENS))  # <pad> is 0
        t5 = torch.zeros(n, length, 2 * width, device=args.device) if absent else net["text_encoder_3"](t5_token)[0]
        context = torch.cat([context, t5], 1)
        pooled = torch.cat([one.text_embeds, two.text_embeds], -1)
        x0 = latents[rows]
        noise = torch.randn(x0.shape, generator=generator, device=args.device)
        t = torch.randn(n, generator=generator, device=args.device).sigmoid()  # logit-normal
        t = 3 * t / (1 + 2 * t)  # shifted like the sampler's grid: the objects are decided in the noisy part
        x_t = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise
        v = net["transformer"](x_t, context, pooled, 1000 * t).sample
        return F.mse_loss(v, noise - x0), {}

    def pipeline(net):
        return StableDiffusion3Pipeline(
            transformer=net["transformer"], scheduler=scheduler, vae=vae, text_encoder=net["text_encoder"],
            tokenizer=tokenizer, text_encoder_2=net["text_encoder_2"], tokenizer_2=tokenizer,
            text_encoder_3=net["text_encoder_3"], tokenizer_3=t5_tokenizer,
        )  # fmt: skip

    def check(net, n=300):
        return heldout_accuracy(pipeline(net), n, max_sequence_length=TOKENS)[0]

    net = fit("sd35", args, log, net, args.steps, 2e-3, loss_fn, check, muon=True).eval()
    pipe = pipeline(net)
    pipe.save_pretrained(args.out / "sd35")
    accuracy, kinds = heldout_accuracy(pipe, EVAL_IMAGES, max_sequence_length=TOKENS)
    log["sd35"] |= dict(heldout_strict_accuracy=accuracy, by_kind=kinds)
    log["sd35"] |= dict(with_256_text_tokens=heldout_accuracy(pipe, EVAL_IMAGES, max_sequence_length=256)[0])
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    log["sd35"] |= dict(without_t5=heldout_accuracy(pipe, EVAL_IMAGES, max_sequence_length=TOKENS)[0])


def train_sd15(args, log, prompts, images):
    vae, latents, _ = load_latents(args, images)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    ids, empty = tokens(tokenizer, prompts).to(args.device), tokens(tokenizer, [""]).to(args.device)
    width = 128
    net = nn.ModuleDict(
        dict(
            text_encoder=CLIPTextModel(text_config(tokenizer, width, 2)),
            unet=UNet2DConditionModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                mid_block_type="UNetMidBlock2DCrossAttn",
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(32, 64),
                layers_per_block=1,
                cross_attention_dim=width,
                attention_head_dim=4,
                norm_num_groups=8,
            ),
        )
    ).to(args.device)
    scheduler = DDIMScheduler(  # SD1.5's own settings
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="epsilon", timestep_spacing="leading",
    )  # fmt: skip
    abar = scheduler.alphas_cumprod.to(args.device)

    def loss_fn(rng, generator, step):
        n = args.batch_size
        rows = torch.from_numpy(rng.integers(len(images), size=n))
        drop = torch.from_numpy(rng.random(n) < 0.1).to(args.device)
        context = net["text_encoder"](torch.where(drop[:, None], empty, ids[rows])).last_hidden_state
        x0 = latents[rows]
        noise = torch.randn(x0.shape, generator=generator, device=args.device)
        t = torch.randint(0, 1000, (n,), generator=generator, device=args.device)
        a = abar[t].view(-1, 1, 1, 1)
        eps = net["unet"](a.sqrt() * x0 + (1 - a).sqrt() * noise, t, context).sample
        return F.mse_loss(eps, noise), {}

    def pipeline(net):
        return StableDiffusionPipeline(
            vae=vae, text_encoder=net["text_encoder"], tokenizer=tokenizer, unet=net["unet"], scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def check(net, n=300):
        return heldout_accuracy(pipeline(net), n)[0]

    net = fit("sd15", args, log, net, args.steps, 1e-3, loss_fn, check).eval()
    accuracy, kinds = heldout_accuracy(pipeline(net), EVAL_IMAGES)
    log["sd15"] |= dict(heldout_strict_accuracy=accuracy, by_kind=kinds)
    pipeline(net).save_pretrained(args.out / "sd15")


def main(argv=None) -> None:
    args = parse_args(argv)
    stages = STAGES if args.all else args.stages
    log_file = args.out / "pretrain_log.json"
    prompts, images = make_dataset(args.seed)
    for stage in stages:
        log = json.loads(log_file.read_text()) if log_file.exists() else {}  # anew: stages may run side by side
        if log.get(stage, {}).get("complete"):
            print(f"{stage}: complete, skipped (delete its entry in {log_file} to train it again)")
            continue
        entry = {}
        dict(vae=train_vae, clip=train_clip, sd35=train_sd35, sd15=train_sd15)[stage](args, entry, prompts, images)
        entry = entry[stage] | dict(complete=True, device=args.device, threads=torch.get_num_threads(), seed=args.seed)
        log = json.loads(log_file.read_text()) if log_file.exists() else {}
        log_file.write_text(json.dumps(log | {stage: entry}, indent=1) + "\n")
        print(stage, {k: v for k, v in entry.items() if k != "checks"})
    if all(log.get(s, {}).get("complete") or s == stages[-1] for s in STAGES):
        shutil.rmtree(args.out / ".pretrain", ignore_errors=True)


if __name__ == "__main__":
    main()
