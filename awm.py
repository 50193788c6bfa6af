"""AWM: Advantage Weighted Matching.
Paper: Xue et al., "Advantage Weighted Matching: Aligning RL with Pretraining in
       Diffusion Models", arXiv 2509.25050
Official code: github.com/scxue/advantage_weighted_matching
Also here: DiffusionNFT (Zheng et al., arXiv 2509.16117; github.com/NVlabs/DiffusionNFT),
       RAM (Bergmeister et al., arXiv 2605.10759; code AndreasBergmeister/ram), V-GRPO (Tang et al.,
       arXiv 2604.23380; code tang-bd/v-grpo), both second-hand: docs/awm.md

Idea:  the image x_0 is the action, and log p_theta(x_0 | c) is replaced by its evidence
       bound, minus the denoising loss.  A policy gradient is then pretraining with
       weights: images better than their group pull the velocity towards them, worse ones
       push it away.  DDPO does the same with noisy targets (Theorems 1, 2), hence with
       more variance; and any sampler may draw the images, as its steps need no density.
Algorithm, one epoch (the loop below repeats the numbers):
  1 rollout     K images per prompt with any sampler; keep x_0 only
  2 reward      r(x_0)
  3 advantage   A = (r - mean) / (std + 1e-4) of the group, or a relative
  4 update      for each image, shuffled; the same n_t times t and noises e for all policies
     4a         x_t = (1 - t) x_0 + t e;  l = -w(t) mean ||v - (e - x_0)||^2    Eq. 10
     4b         log ratio = E_t[l_theta - l_old];  loss -A exp(log ratio)       Eq. 9, 11
     4c         + beta w_KL(t) mean ||v_theta - v_ref||^2                       Eq. 12
                (+ the same to a lagged copy of theta: official code)
     4d         AdamW; with two updates the second is off-policy                Sec. 5.2
  5 log, checkpoint, evaluation with the same noise every time
Differs from the paper: nowhere known; what it does not state is a flag (docs/awm.md).
Differs from the official code (its recipe is --preset release-*): t and e belong to the
       image, not to the micro-batch; the base is stored in float16, not cast to it.
SD1.5: the network predicts e: x_t = alpha x_0 + nu e, error mean ||e_theta - e||^2.  As a
       rectified flow at t = nu / (alpha + nu) it has v_theta - v = (e_theta - e) / (1 - t).
Run:   python awm.py --preset tiny              # embedded model, CPU, minutes, no downloads
       torchrun --nproc-per-node 8 awm.py --preset release-ocr
Port:  copy the functions under "method": tensors in, tensors out; see docs/port.md.
       Details of the method: docs/awm.md
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: on a busy CPU, threads that spin on cost ten times

import functools
import inspect
from contextlib import nullcontext
from dataclasses import dataclass

import torch

import common
import harness
import rewards
from harness import need

TINY = harness.TINY | dict(adv_norm="group", beta=0.4, updates_per_epoch=2, sampler="ode")
PAPER = "steps, guidance, prompts an epoch are Flow-GRPO's, EMA (none), epochs ours: the paper does not say"
CODE = "150 epochs (code: until stopped), shuffled passes of the prompts (code: with repetition), "
RELEASE = dict(
    steps=14, cfg=1.0, eval_cfg=1.0, dtype="float16", weight="ghuber",
    sampler="SASolverScheduler", sampler_grid="official", sampler_noise=0.4,
    train_timesteps=6, train_fraction=0.9, skip_first=True, adv_norm="global", adv_scale=5.0,
    clip_range=1.0, ratio="exp-each", offpolicy="none", updates_per_epoch=1, num_prompts=72,
    lag_coef=1.0, ema_decay=0.99, ema_every=1,
    note=CODE + "t of each image (code: of the micro-batch)",
)  # fmt: skip
# FLUX.1-dev: there is no released configuration; its guidance is an input of the network
FLUX = dict(
    model="flux.1-dev", lora_rank=64, lora_alpha=128, lora_targets="attention+mlp",
    steps=6, eval_steps=28, cfg=3.5, train_cfg=3.5, noise_level=0.9, dtype="bfloat16",
    note=PAPER + ", nor noise level and LoRA layers (Flow-GRPO's FLUX run's); trained at the rollout's "
    "guidance, which here is an input (paper: no guidance in training)",
)  # fmt: skip
# the rewards as Flow-GRPO's and the official code compute them (docs/rewards.md)
GENEVAL = dict(
    reward="geneval-reward-flowgrpo", prompts="prompts/geneval_train.jsonl",
    eval_rewards="geneval", eval_prompts="prompts/geneval_official.jsonl",
)  # fmt: skip
PICK = dict(
    reward="pickscore26",
    prompts="prompts/pickscore_train.txt", eval_prompts="prompts/pickscore_test.txt",
)  # fmt: skip
NFT = dict(
    objective="nft", cfg=1.0, eval_cfg=1.0, dtype="float16", adv_norm="global", beta=1e-4,
    sampler="DPMSolverMultistepScheduler", sampler_grid="official", offpolicy="lagged",
    updates_per_epoch=1, train_fraction=1.0, timesteps="subset", train_timesteps=9,
    lag_decay_max=0.5, ema_decay=0.9, ema_every=1,
    note=CODE + "the sampler's network is told 1000 t (code: its integer part)",
)  # fmt: skip
PRESETS = {
    # Table 2: SD3.5-M, text rendering; Table 1: GenEval; Table 2: PickScore
    "awm-ocr": dict(note=PAPER),  # the defaults are this experiment
    "awm-geneval": GENEVAL | dict(note=PAPER),
    "awm-pickscore": PICK | dict(beta=0.01, note=PAPER),
    # Table 2, FLUX: text rendering, PickScore
    "awm-flux-ocr": FLUX,
    "awm-flux-pickscore": FLUX | PICK | dict(beta=0.01),
    # the configurations of the official code, a later recipe than the paper's
    "release-ocr": RELEASE | dict(beta=0.003),
    "release-geneval": RELEASE | GENEVAL | dict(beta=0.001),
    "release-pickscore": RELEASE | PICK | dict(beta=1e-4, skip_first=False, num_prompts=24, sampler_noise=0.0),
    # DiffusionNFT's released configurations
    "nft-ocr": NFT | dict(
        nft_beta=0.1, updates_per_epoch=2, lag_decay_max=0.999, lag_decay_slope=0.0075, lag_decay_start=75,
    ),
    "nft-geneval": NFT | GENEVAL,
    # the embedded models: coloured shapes on a CPU (ours; docs/awm.md)
    "tiny": TINY | dict(model="tiny-sd35", lr=4e-4, epochs=100),
    "tiny-sd15": TINY | dict(model="tiny-sd15", lr=1e-3, epochs=80, eval_every=10),
    "tiny-sd15-release": RELEASE | harness.TINY | dict(
        model="tiny-sd15", beta=0.003, lr=1e-3, epochs=80, eval_every=10,
        dtype="auto", sampler_grid="diffusers", note="",
    ),
}  # fmt: skip
SCHEDULERS = {  # of diffusers, by the kind of model; the last two of "eps" and SASolver draw noise
    "flow": [
        "SASolverScheduler", "DPMSolverMultistepScheduler",  # which have an official grid
        "UniPCMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
    ],
    "eps": [
        "SASolverScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler",
        "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler",
    ],
}  # fmt: skip
METRICS = harness.Metrics(
    means=[
        "loss/total", "loss/policy", "loss/kl", "loss/lag", "kl/ref", "matching/error",
        "ratio/mean", "ratio/clip_frac", "adv/mean", "adv/zero_std_frac", "adv/clip_frac",
    ],
    stds=("adv/mean",),
    tops=("ratio/max",),
    more=("lag/decay", "grad/norm"),
)  # fmt: skip


def parse_args(argv=None):
    parser = harness.make_parser(__doc__, "awm")
    flag = harness.flags(parser, "method")
    flag("--objective", "awm", ["awm", "nft", "ram"], "Eq. 9-12; DiffusionNFT's, RAM's on the same images")
    flag("--adv-norm", "group", ["group", "global", "none", "rloo", "raw"], "A (paper: group; code: global)")
    flag("--adv-per-reward", False, "yes/no", "A = sum_k w_k A(r_k), each reward of a sum by itself (GDPO)")
    flag("--adv-clip", 5.0, "float > 0 or inf", "A is clipped to +- this; nft: A_max (codes: 5)")
    flag("--adv-soft-clip", 0.0, "float >= 0", "eta of A <- eta tanh(A / eta), after them (V-GRPO: 3); 0 = off")
    flag("--adv-scale", 1.0, "float > 0", "divides A after clipping (paper: 1; code: 5)")
    weights = ["uniform", "elbo", "t", "t2", "huber", "ghuber", "adaptive"]
    flag("--weight", "uniform", weights, "w(t) of Eq. 10 (paper: 1; code: ghuber; V-GRPO: adaptive)")
    flag("--huber-power", 0.25, "float > 0", "p of ghuber (code: 0.25)")
    flag("--train-timesteps", 4, "int >= 1", "n_t: noisings of an image (paper: 4, Sec. 5; code: 6)")
    flag("--noisings-of", "image", ["image", "group"], "whose t and e they are: each image's, a group's (V-GRPO)")
    laws = ["discrete", "discrete-with-init", "subset", "uniform", "uniform-shifted", "linear", "logit-normal"]
    flag("--timesteps", "discrete", laws, "law of t; discrete: sampler's grid (Sec. 5.2); subset: NFT; linear: RAM")
    flag("--stratified", True, "yes/no", "one t from each of n_t equal bins of the law (code)")
    flag("--skip-first", False, "yes/no", "discrete without t = 1: discrete_wo_init (code: GenEval, OCR)")
    flag("--t-min", 0.01, "float in (0, 1)", "smallest t of the other laws (code: 0.01; uniform 0.2)")
    flag("--ratio", "mean-then-exp", ["mean-then-exp", "exp-each"], "exp of the mean over t (Eq. 11), of each (code)")
    flag("--clip-range", 0.0, "float >= 0", "xi of a PPO clip; 0 = none (paper: omitted; code: 1)")
    flag("--beta", 0.4, "float >= 0", "KL to the reference, in units of A (paper: 0.4, PickScore 0.01); ram: 1 / m")
    flag("--kl-weight", "uniform", ["uniform", "elbo"], "w_KL(t) of Eq. 12: 1, or 1 / (2 g^2) (code)")
    flag("--offpolicy", "half", ["half", "none", "lagged"], "old policy: rollout's (Sec. 5.2), theta, lagged copy")
    flag("--lag-coef", 0.0, "float >= 0", "KL to the lagged copy (code: 1); 0 = off")
    flag("--lag-decay-max", 0.3, "float in [0, 1)", "d of copy <- d copy + (1 - d) theta (code: 0.3)")
    flag("--lag-decay-slope", 0.001, "float >= 0", "growth of d per optimiser step (code: 0.001)")
    flag("--lag-decay-start", 0, "int", "optimiser steps for which d is 0 (NFT OCR: 75)")
    flag("--nft-beta", 1.0, "float > 0", "b of v+ = (1 - b) v_old + b v (NFT: 1; OCR: 0.1)")
    flag("--nft-space", "x0", ["x0", "native"], "nft: errors of x0_hat, normalised (code), or of o")
    flag("--sampler", "sde", "text", "sde = --kernel (paper), ode, or a diffusers scheduler (code: SASolverScheduler)")
    flag("--sampler-grid", "diffusers", ["diffusers", "official"], "a flow's times: or AWM's, NFT's codes'")
    flag("--sampler-noise", None, "float >= 0", "tau of SASolverScheduler (code: 0.4, 0)")
    flag("--train-cfg", 1.0, "float finite", "guidance in training (paper: none = 1, Sec. 4)")
    harness.add_args(parser)
    parser.set_defaults(
        model="sd3.5-medium", lora_rank=32, lora_alpha=64, max_sequence_length=128, micro_batch_size=4,
        reward="ocr", prompts="prompts/ocr_train.txt", eval_prompts="prompts/ocr_test.txt",
        num_prompts=48, group_size=24, steps=10, eval_steps=40, cfg=4.5,
    )  # fmt: skip
    return harness.parse(parser, PRESETS, argv, rewards, check, sizes)


# ---- method: pure functions of tensors ---------------------------------------
def matching_error(o: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """mean ||o - target||^2, (..., C, h, w) -> (...); target e - x_0 (flow) or e.  Eq. 10."""
    # float64: Eq. 11 subtracts two errors that hardly differ
    return ((o - target) ** 2).flatten(-3).double().mean(-1)


def elbo_weights(abar: torch.Tensor) -> torch.Tensor:
    """-1/2 d logSNR / du, (N,), at index N u: the evidence bound's weight of a noise error.

    A rectified flow has 1 / (t (1 - t)), which is (1 - t) / t on the velocity error, Eq. 2.
    """
    return -0.5 * torch.gradient((abar / (1 - abar)).log(), spacing=1 / len(abar))[0]


def weighted_error(error, t, kind: str, power: float = 0.25, elbo=None, absolute=None) -> torch.Tensor:
    """w(t) error, of any shape; Eq. 10's bound is minus this.

    elbo: elbo_weights() of noise errors; without it "elbo" is the velocity error's weight.
    absolute: mean |o - target|; "adaptive" is V-GRPO's Eq. 14, ||x_0_hat - x_0||^2 / sg[mean |x_0_hat - x_0|].
    """
    if kind == "adaptive":  # x_0_hat - x_0 is t times o - target (flow), nu / alpha times it (else)
        return (t if elbo is None else t / (1 - t)) * error / absolute.detach()
    if kind == "huber":  # ref-code: this and ghuber are t times a concave function
        return t * ((error + 1e-10).sqrt() - 1e-5)
    if kind == "ghuber":
        return t / power * ((error + 1e-10) ** power - 1e-10**power)
    if kind == "elbo":
        return ((1 - t) / t if elbo is None else elbo) * error
    return {"uniform": torch.ones_like(t), "t": t, "t2": t**2}[kind] * error


def awm_loss(adv, weighted, weighted_old, ratio: str, clip_range: float = 0.0):
    """-A exp(log ratio), (b,), and the log ratios; A (b,), weighted errors (b, n_t).  Eq. 9, 11.

    clip_range xi > 0: max(-A rho, -A clip(rho, 1 - xi, 1 + xi)).
    """
    log_ratio = weighted_old - weighted  # l_theta - l_old: the smaller error is the likelier
    if ratio == "mean-then-exp":
        log_ratio = log_ratio.mean(1, keepdim=True)
    rho, adv = log_ratio.exp(), adv[:, None]
    loss = -adv * rho
    if clip_range:
        loss = torch.maximum(loss, -adv * rho.clamp(1 - clip_range, 1 + clip_range))
    return loss.mean(1), log_ratio


def velocity_kl(error: torch.Tensor, t: torch.Tensor, kind: str) -> torch.Tensor:
    """w_KL(t) mean ||v_theta - v_ref||^2, Eq. 12; "elbo": 1 / (2 g^2), g^2 = 0.49 t / (1 - t)."""
    return error / (0.98 * t / (1 - t).clamp(min=0.01)) if kind == "elbo" else error


def nft_loss(adv, o, o_old, target, strength: float, adv_max: float, to_x0=None, x0=None):
    """DiffusionNFT: A_max / b * (r ||v+ - v*||^2 + (1 - r) ||v- - v*||^2), of adv's shape.

    r = clip(1/2 + A / (2 A_max), 0, 1), v+ = (1 - b) v_old + b v, v- = (1 + b) v_old - b v.
    With to_x0: squares of x_0 predictions, each over sg[mean |error|].
    """
    r = (0.5 + adv / (2 * adv_max)).clamp(0, 1)
    loss = torch.zeros_like(r)
    towards = (1 - strength) * o_old + strength * o
    away = (1 + strength) * o_old - strength * o
    for share, v in ((r, towards), (1 - r, away)):
        if to_x0 is None:
            loss = loss + share * matching_error(v, target)
        else:
            error = (to_x0(v) - x0).flatten(-3).double()
            scale = error.detach().abs().mean(-1).clamp(min=1e-5)  # ref-code: the floor
            loss = loss + share * (error**2).mean(-1) / scale
    return adv_max / strength * loss


def ram_loss(adv, o, o_old, target) -> torch.Tensor:
    """RAM's 2 A mean <o - o_old, o_old - target>, of adv's shape; its anchor is Eq. 12's KL.

    Their sum has the gradient of RAM's Eq. 17 times beta, with the reward A / beta:
    beta ||o - sg[o_ref + A / beta (target - o_old)]||^2; o_old: sg[o], or the lagged copy's (code).
    """
    return 2 * adv * ((o - o_old) * (o_old - target)).flatten(-3).double().mean(-1)


def x0_hat(kind: str, x_t, alpha, nu, o) -> torch.Tensor:
    """E[x_0 | x_t], (..., C, h, w), from the network's output o; alpha, nu (...)."""
    alpha, nu = alpha[..., None, None, None], nu[..., None, None, None]
    return x_t - nu * o if kind == "flow" else (x_t - nu * o) / alpha


def integer_bins(u: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """An index from each of n bins of first ... stop - 1, by u (n,).  ref-code: integer bounds."""
    bounds = torch.linspace(first, stop, len(u) + 1).long()
    return bounds[:-1] + (u * bounds.diff()).long()


def lag_decay(steps: int, top: float, slope: float, start: int) -> float:
    """d after so many optimiser steps."""
    return min(top, slope * max(0, steps - start))


def main(args):
    # ---- setup ---------------------------------------------------------------
    run, policy, theta, (reward, more) = harness.start(args, "awm", rewards)
    noising = Noising(args, policy)
    optimiser = harness.make_optimiser(args, run, theta)
    lag = common.EMA(theta, 0.0)  # the lagged copy of theta; lag_decay() gives its decay
    scorers, samples = (reward, more), args.num_prompts * args.group_size
    recorder = harness.Recorder(run, args, policy, optimiser, scorers, rewards.RewardError, METRICS, {"lag": lag})

    for epoch in recorder.epochs():
        # ---- 1 rollout -------------------------------------------------------
        recorder.phase()
        batch = harness.epoch_batch(args, policy, epoch, draws(args))
        with lag.applied() if args.offpolicy == "lagged" else nullcontext():
            x0 = sample(policy, args, batch, epoch, "rollout")

        # ---- 2 reward --------------------------------------------------------
        recorder.phase()
        with recorder.scoring(epoch):
            final, parts = harness.score(args, policy, reward, x0, batch.prompts)
        recorder.leave_out(epoch, batch, final)

        # ---- 3 advantage -----------------------------------------------------
        adv, zero = common.group_advantage(final, args.group_size, args.adv_norm)
        if args.adv_per_reward:
            adv, zero = common.sum_of_advantages(parts, reward.weights, args.group_size, args.adv_norm)
        clipped = adv.abs() > args.adv_clip
        adv = adv.clamp(-args.adv_clip, args.adv_clip) / args.adv_scale
        if args.adv_soft_clip:
            adv = args.adv_soft_clip * torch.tanh(adv / args.adv_soft_clip)

        # ---- 4 update --------------------------------------------------------
        recorder.phase()
        stats, norms = recorder.stats(epoch), []
        # whole images, with all n_t noisings: Eq. 11 averages before it exponentiates
        size = max(1, args.micro_batch_size // args.train_timesteps)
        updates = [part[:, 0] for part in harness.epoch_updates(args, batch, [0], epoch)]
        old = x0.new_full((len(x0), args.train_timesteps), torch.nan, dtype=torch.float64)  # (B, n_t)
        if args.offpolicy == "half" and len(updates) > 1:
            # paper: half of the data is off-policy; its old errors, while theta still is theta_old
            for n in common.micro_batches(torch.cat(updates[1:]).unique(), size, "old policy"):
                rows = noising.rows(n, x0, batch, epoch)
                with torch.no_grad():
                    old[n] = bound(args, rows, output(policy, rows, args))
        if not args.beta:  # no term needs the reference: at a few images, for the log
            for n in common.micro_batches(harness.watched_rows(args, batch, [0], epoch)[:, 0], size, ""):
                stats.add({"kl/ref": reference_distance(policy, noising.rows(n, x0, batch, epoch), args)})
        for update, part in enumerate(updates):
            for n in common.micro_batches(part, size, f"update {update + 1}"):
                # 4a: the noised images, and what the policies say about them; the frozen ones
                # only where the loss asks for them, as each costs a network pass
                rows, a = noising.rows(n, x0, batch, epoch), adv[n]
                with torch.no_grad(), policy.reference() if args.beta else nullcontext():
                    o_ref = output(policy, rows, args) if args.beta else None
                with torch.no_grad(), lag.applied() if lagged(args) else nullcontext():
                    o_lag = output(policy, rows, args) if lagged(args) else None
                o = output(policy, rows, args)  # (b, n_t, C, h, w)
                error = matching_error(o, rows.target)  # (b, n_t)
                # 4b: the policy loss
                known = old[n] if args.offpolicy == "half" and update > 0 else None
                loss, log_ratio = policy_loss(policy.kind, rows, x0[n, None], o, o_lag, known, a, args)
                # 4c: + KL to the reference and to the lagged copy, gradients
                total, values = loss, {}
                if args.beta:
                    apart = matching_error(o, o_ref)
                    kl = velocity_kl(apart, rows.t, args.kl_weight).mean(1)
                    values = {"kl/ref": apart, "loss/kl": kl}
                    total = total + args.beta * kl
                if args.lag_coef:
                    values["loss/lag"] = matching_error(o, o_lag).mean(1)
                    total = total + args.lag_coef * values["loss/lag"]
                # micro-batches and processes add up to the mean over the update's images
                optimiser.backward(total.sum() / (samples / args.updates_per_epoch))
                ratio = log_ratio.exp()
                outside = (ratio - 1).abs() > args.clip_range
                stats.add(values | {
                    "loss/total": total, "loss/policy": loss, "matching/error": error,
                    "ratio/mean": ratio, "ratio/clip_frac": outside.float() * (args.clip_range > 0),
                    "adv/mean": a, "adv/zero_std_frac": zero[n].float(),
                    "adv/clip_frac": clipped[n].float(),
                })  # fmt: skip
                stats.top("ratio/max", ratio.max().item())
            norms += optimiser.step()  # 4d: all-reduce, clip, AdamW on theta
        # once an epoch the lagged copy follows theta
        decay = lag_decay(optimiser.steps, args.lag_decay_max, args.lag_decay_slope, args.lag_decay_start)
        lag.update(decay)

        # ---- 5 log, samples, checkpoint, eval --------------------------------
        del batch, x0  # what follows needs the room
        metrics = stats.result() | {"lag/decay": decay, "grad/norm": sum(norms) / len(norms)}
        recorder.end_epoch(epoch, final, parts, metrics)
    recorder.finish()


# ---- pieces that need the networks or the flags ------------------------------
@dataclass
class Noised:
    """The n_t noisings of each of b images: what a micro-batch of an update sees."""

    x_t: torch.Tensor  # (b, n_t, C, h, w) = alpha x_0 + nu e
    target: torch.Tensor  # what the network should say there: e - x_0 (flow) or e
    timestep: torch.Tensor  # (b, n_t), as it goes into the network
    t: torch.Tensor  # (b, n_t) in [0, 1], as are alpha and nu
    alpha: torch.Tensor
    nu: torch.Tensor
    elbo: torch.Tensor | None  # (b, n_t), elbo_weights() of a noise-predicting model
    cond: common.Cond  # of b n_t rows


class Noising:
    """The times t and noises e of an image: functions of (seed, epoch, index) alone.

    Hence the same for theta, theta_old and the reference, as Eq. 11 and 12 need them.
    """

    def __init__(self, args, policy):
        self.args, self.scheduler, self.flow = args, policy.pipe.scheduler, policy.kind == "flow"
        self.grid = policy.grid(args.steps, "ode", 0.0).timestep[: args.train_steps]  # of the discrete laws
        self.abar = None if self.flow else self.scheduler.alphas_cumprod.double().cpu()
        self.elbo = None if self.flow else elbo_weights(self.abar)

    def timesteps(self, generator) -> torch.Tensor:
        """(n_t,) for the network: 1000 t for a flow, a training index 0 ... 999 for SD1.5."""
        args, count = self.args, len(self.grid)
        shift = self.scheduler.config.shift if self.flow else 1.0
        if args.timesteps == "subset":  # NFT: no step twice
            return self.grid[torch.randperm(count, generator=generator)[: args.train_timesteps]]
        u = torch.rand(args.train_timesteps, dtype=torch.float64, generator=generator)
        if args.timesteps == "discrete-with-init":  # t = 1 always
            return self.grid[torch.cat([torch.zeros(1).long(), integer_bins(u[1:], 1, count)])]
        if args.timesteps == "discrete" and args.skip_first and args.stratified:
            return self.grid[integer_bins(u, 1, count)]
        if args.stratified:
            u = (torch.arange(len(u)) + u) / len(u)
        if args.timesteps == "discrete":
            first = int(args.skip_first)
            return self.grid[first + (u * (count - first)).long()]
        t = args.t_min + (1 - args.t_min) * u
        if args.timesteps == "linear":  # RAM: density 2 t
            t = u.sqrt().clamp(min=args.t_min)
        if args.timesteps == "logit-normal":
            t = torch.special.ndtri(u).sigmoid()
        if args.timesteps not in ("uniform", "linear"):
            t = (shift * t / (1 + (shift - 1) * t)).clamp(min=args.t_min)  # ref-code: the clamp
        if self.flow:
            return t * 1000
        return (t * len(self.abar)).long().double().clamp(max=len(self.abar) - 1)

    def __call__(self, x0: torch.Tensor, epoch: int, indices):
        """Images x0 (b, C, h, w) -> x_t, target, timestep, t, alpha and nu of Noised."""
        timestep, e = [], []
        for index in indices:
            owner = index // self.args.group_size if self.args.noisings_of == "group" else index
            generator = common.generator("noising", self.args.seed, epoch, owner)
            timestep.append(self.timesteps(generator))
            e.append(torch.randn((self.args.train_timesteps, *x0.shape[1:]), generator=generator))
        timestep, e, x0 = torch.stack(timestep), torch.stack(e).to(x0), x0[:, None]
        if self.flow:
            alpha, nu, target = 1 - timestep / 1000, timestep / 1000, e - x0
        else:
            abar, target = self.abar[timestep.long()], e
            alpha, nu = abar.sqrt(), (1 - abar).sqrt()
        timestep, t, alpha, nu = (v.to(x0) for v in (timestep, nu / (alpha + nu), alpha, nu))
        x_t = alpha[..., None, None, None] * x0 + nu[..., None, None, None] * e
        return x_t, target, timestep, t, alpha, nu

    def rows(self, n: torch.Tensor, x0: torch.Tensor, batch, epoch: int) -> Noised:
        """The noisings of the local images n (b,)."""
        x_t, target, timestep, *levels = self(x0[n], epoch, [batch.indices[j] for j in n])
        elbo = None if self.elbo is None else self.elbo[timestep.long().cpu()].to(x0)
        cond = batch.cond[n.repeat_interleave(self.args.train_timesteps)]
        return Noised(x_t, target, timestep, *levels, elbo, cond)


def output(policy, rows: Noised, args) -> torch.Tensor:
    """o(x_t, t, c) of every noising, (b, n_t, C, h, w), by the policy that is switched on."""
    x_t, timestep = rows.x_t.flatten(0, 1), rows.timestep.flatten()
    return policy.predict(x_t, timestep, rows.cond, args.train_cfg).view_as(rows.x_t)


def bound(args, rows: Noised, o: torch.Tensor) -> torch.Tensor:
    """w(t) mean ||o - target||^2, (b, n_t): minus l of Eq. 10."""
    error, absolute = matching_error(o, rows.target), None
    if args.weight == "adaptive":
        absolute = (o - rows.target).detach().abs().flatten(-3).double().mean(-1)
    return weighted_error(error, rows.t, args.weight, args.huber_power, rows.elbo, absolute)


def policy_loss(kind: str, rows: Noised, x0, o, o_lag, old, adv, args):
    """--objective of b images: the loss (b,), and the log ratio, 0 where there is none.

    old: the rollout's bound (b, n_t), where it is the old policy's; o_lag: the lagged copy's output.
    """
    if args.objective == "awm":
        now = bound(args, rows, o)
        if old is None:  # theta itself: the ratio is 1, with a gradient
            old = bound(args, rows, o_lag) if args.offpolicy == "lagged" else now.detach()
        return awm_loss(adv, now, old, args.ratio, args.clip_range)
    if args.objective == "nft":  # v_old is the lagged copy's
        space = (functools.partial(x0_hat, kind, rows.x_t, rows.alpha, rows.nu), x0) if args.nft_space == "x0" else ()
        loss = nft_loss(adv[:, None], o, o_lag, rows.target, args.nft_beta, args.adv_clip, *space)
    else:  # ram: --beta adds its anchor
        v_old = o_lag if args.offpolicy == "lagged" else o.detach()
        loss = ram_loss(adv[:, None], o, v_old, rows.target)
    return loss.mean(1), torch.zeros_like(loss)


@torch.no_grad()
def reference_distance(policy, rows: Noised, args) -> torch.Tensor:
    """mean ||o_theta - o_ref||^2, (b, n_t)."""
    o = output(policy, rows, args)
    with policy.reference():
        return matching_error(o, output(policy, rows, args))


def lagged(args) -> bool:
    return args.lag_coef > 0 or args.offpolicy == "lagged"


def draws(args) -> int:
    """Noise draws of an image after its start: a scheduler of diffusers makes its own."""
    return args.steps if args.sampler == "sde" else 0


@torch.no_grad()
def sample(policy, args, batch, epoch: int, desc: str) -> torch.Tensor:
    """x_0 (B, C, h, w) by --sampler from the batch's noise."""
    ours, x0 = args.sampler in ("sde", "ode"), torch.empty_like(batch.noise[:, 0], device=policy.device)
    if ours:
        kernel = (args.kernel, args.noise_level) if args.sampler == "sde" else ("ode", 0.0)
        grid = policy.grid(args.steps, *kernel)
    for n in common.micro_batches(torch.arange(len(x0)), args.micro_batch_size, desc):
        x = batch.noise[n, 0].to(policy.device)
        predict = functools.partial(policy.predict, cond=batch.cond[n], cfg=args.cfg)
        for i in range(args.steps) if ours else ():
            x = grid.mu(x, predict(x, grid.time(i, x)), i)
            if args.sampler == "sde":
                x = x + grid.at(grid.sigma, i, x) * batch.noise[n, i + 1].to(x.device)
        if not ours:
            # a fresh one, as multistep solvers have a memory; one generator a sample, so that
            # an image depends on no micro-batch
            scheduler = make_scheduler(args, policy.pipe.scheduler)
            keys = [("sampler", args.seed, epoch, batch.indices[j]) for j in n]
            x = scheduler_loop(args, scheduler, x, predict, [common.generator(*key) for key in keys])
        x0[n] = x
    return x0


def scheduler_loop(args, scheduler, x: torch.Tensor, predict, generators) -> torch.Tensor:
    """x_0 (b, C, h, w) from standard normal x by all steps of a diffusers scheduler."""
    official = args.sampler_grid == "official"
    takes = inspect.signature(scheduler.step).parameters
    given = {"generator": generators} if "generator" in takes else {}
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        time = t.to(x.device, torch.float32).expand(len(x))
        o = predict(scheduler.scale_model_input(x, t), time)
        if official and i + 1 == args.steps:
            return x - scheduler.sigmas[i] * o  # ref-code: "denoise to zero", without a corrector
        x = scheduler.step(o, t, x, **given, return_dict=False)[0]
        if official and i == 0:  # ref-code: SASolver's first corrector is off
            scheduler.last_sample = None
    return x


def make_scheduler(args, model):
    """The diffusers scheduler of --sampler with the noise levels of the model's own."""
    import diffusers

    options = {}
    if args.sampler_noise is not None:
        options["tau_func"] = lambda t: args.sampler_noise if 300 <= t <= 900 else 0.0
    flow, cls = args.kind == "flow", getattr(diffusers, args.sampler)
    if flow:
        options |= dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=model.config.shift)
    scheduler = cls.from_config({} if flow else model.config, **options)
    scheduler.set_timesteps(args.steps)
    if flow:
        if args.sampler_grid == "official":
            official_grid(args, scheduler, model)
        elif scheduler.sigmas[-1] > 0:
            # ours: SASolver and DEIS end at the last step's start, on a noisy latent
            scheduler.sigmas[-1] = 1e-3
        # what the network is told: the times of x, which diffusers rounds to integers
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    return scheduler


def official_grid(args, scheduler, model) -> None:
    """NFT's times are the model's own; AWM's have t_0 = 0.999, t_{T-1} = t_{T-2} / 2.

    ref-code: AWM's tau is that of the time a step arrives at (diffusers: departs from).
    """
    model.set_timesteps(args.steps)
    scheduler.sigmas = sigmas = model.sigmas.clone()
    if args.sampler == "SASolverScheduler":
        sigmas[-2], sigmas[0] = sigmas[-3] / 2, 1 - 1e-3
        times, tau = (1000 * sigmas).tolist(), scheduler.tau_func
        arrival = dict(zip(times, times[1:]))  # of a departure
        scheduler.tau_func = lambda t: tau(arrival[t.item()])


# ---- what no paper mentions: checks of the flags, sizes for --dry-run --------
def check(args):
    used, count = args.train_steps, args.train_timesteps
    harness.check_updates(args, args.num_prompts * args.group_size, "images")
    harness.check_group(args)
    nft = "--objective nft takes v_old from the lagged copy and scales A by --adv-clip alone"
    fits = args.offpolicy == "lagged" and args.adv_scale == 1 and args.adv_clip < float("inf")
    need(fits or args.objective != "nft", nft, "use --offpolicy lagged, a finite --adv-clip, leave --adv-scale out")
    idle = f"--objective {args.objective} has no w(t), --weight {args.weight} would do nothing"
    need(args.objective == "awm" or args.weight == "uniform", idle, "use --weight uniform")
    ram = "--objective ram takes its anchor from --beta, its v_old from theta or the lagged copy"
    fits = args.beta > 0 and args.offpolicy != "half" and args.kl_weight == "uniform"
    need(fits or args.objective != "ram", ram, "use --beta > 0, --offpolicy none or lagged, --kl-weight uniform")
    flow = f"--kl-weight elbo is the flow SDE's, --model {args.model} is not a flow model"
    need(args.kl_weight != "elbo" or args.kind == "flow", flow, "use uniform")
    none = f"--train-fraction {args.train_fraction} (and --skip-first) leaves no step of --steps {args.steps}"
    need(used > (args.skip_first or args.timesteps == "discrete-with-init"), none, "raise one of them")
    few = f"--timesteps subset cannot draw {count} different steps out of {used}"
    need(args.timesteps != "subset" or count <= used, few, "lower --train-timesteps")
    check_sampler(args)


def check_sampler(args):
    """--sampler fits the model, its grid and noise, and --shared-noise."""
    sampler, known = args.sampler, ["sde", "ode", *SCHEDULERS[args.kind]]
    wrong = f"--sampler {sampler} does not fit --model {args.model}"
    need(sampler in known, wrong, f"use one of {', '.join(known)}")
    if args.sampler_noise is not None and sampler != "SASolverScheduler":
        given = any(word.startswith("--sampler-n") for word in args.argv)
        need(not given, f"--sampler-noise is for SASolverScheduler, --sampler is {sampler}; leave it out")
        args.sampler_noise = None  # the preset's, whose sampler was replaced
    codes = SCHEDULERS["flow"][:2]
    fits = sampler in ("sde", "ode") or args.kind == "flow" and sampler in codes
    wrong = f"--sampler-grid official is a flow model's, with {' or '.join(codes)}"
    need(fits or args.sampler_grid != "official", wrong, "use diffusers")
    draws = sampler in ["sde", *SCHEDULERS["eps"][-2:]] or sampler == "SASolverScheduler" and args.sampler_noise != 0
    equal = f"--shared-noise with --sampler {sampler} makes the images of a prompt all the same"
    need(draws or not args.shared_noise, equal, "use --sampler sde, or leave it out")


def sizes(args) -> dict[str, str]:
    """The lines of --dry-run."""
    samples, passes = args.num_prompts * args.group_size, harness.network_passes(args, args.cfg)
    noisings = args.train_timesteps * harness.network_passes(args, args.train_cfg)
    rows = samples * noisings * args.inner_epochs
    # theta_old is asked once for every image that comes after the first update
    later = samples if args.inner_epochs > 1 else samples - samples // args.updates_per_epoch
    old = later * noisings * (args.offpolicy == "half") + rows * lagged(args)
    watched = min(harness.WATCHED, samples) * noisings  # for the log, by theta as well
    old += 0 if args.beta else watched
    first, reference = f"{samples * args.steps * passes} in the rollout", rows if args.beta else watched
    last = f"{reference} of the reference, {old} of the old policy or the lagged copy"
    noise = samples * (draws(args) + 1)
    return {
        "noisings": f"{args.train_timesteps} per image, law {args.timesteps}",
        "network evaluations per epoch": f"{first}, {rows} with gradient, {last}",
        "decodes and reward evaluations per epoch": f"{samples} images",
        "memory for the rollout": harness.rollout_memory(args, noise + samples, "x_0 and noise", noise),
    }


if __name__ == "__main__":
    harness.run_main(main, parse_args, rewards.UsageError)
