"""AWM: Advantage Weighted Matching.  Paper: Xue et al., "Advantage Weighted Matching: Aligning RL with Pretraining in
Diffusion Models", arXiv 2509.25050.  Official code: github.com/scxue/advantage_weighted_matching
Also here, with --objective nft: DiffusionNFT (Zheng et al., arXiv 2509.16117; code: github.com/NVlabs/DiffusionNFT)

Idea:  the whole image x_0 is the action, and log p_theta(x_0 | c) is replaced by its evidence bound: minus the denoising
       loss of pretraining.  A policy gradient is then pretraining with weights: images better than their group pull the
       velocity towards them, worse ones push it away.  DDPO does the same with noisy targets (Theorem 1 and 2), hence
       with more variance; and as no step of the sampler has a probability here, any sampler may draw the images.
Algorithm, one epoch (the loop below repeats the numbers):
  1 rollout     K images per prompt with any sampler; keep x_0 only
  2 reward      r(x_0)
  3 advantage   A = (r - mean) / (std + 1e-4) of the group, or a relative
  4 update      for each image, shuffled; n_t times t and noises e, the same for theta, old, lagged copy and reference:
     4a         x_t = (1 - t) x_0 + t e;   l = -w(t) mean ||v(x_t, t, c) - (e - x_0)||^2               Eq. 10
     4b         log ratio = E_t[l_theta - l_old];   policy loss -A exp(log ratio)                      Eq. 9, 11
     4c         + beta w_KL(t) mean ||v_theta - v_ref||^2   (+ the same to a lagged copy of theta)     Eq. 12
     4d         AdamW; the first half of the data is on-policy, the second one update old             Section 5.2
  5 log, checkpoint, evaluation with the same noise every time
Differs from the paper: nowhere known; what it does not state is a flag (docs/awm.md), and so is the law of t, uniform
       over the sampler's grid without its last step.  From the official code: the paper's recipe is the default, the
       code's is --preset release-*, on a slightly different sampler grid and without the code's extra draws of index 1;
       t and e belong to the image, not to the micro-batch.
SD1.5: the network predicts e: x_t = alpha x_0 + nu e and the error is mean ||e_theta - e||^2.  Seen as a rectified flow
       at t = nu / (alpha + nu), v_theta - v = (e_theta - e) / (1 - t): weight w(t) on the velocity error is weight
       w(t) / (1 - t)^2 on the noise error, and 'uniform' here (on the noise error) is (1 - t)^2 on the velocity's.
       'elbo' is the bound's own weight of the noise error, -1/2 d logSNR / du at training index 1000 u.
Run:   python awm.py --preset tiny                        # embedded model, CPU, minutes, no downloads
       torchrun --nproc-per-node 8 awm.py --preset release-ocr
Port:  copy the functions under "method": tensors in, tensors out.
"""

import argparse
import functools
import inspect
import json
from contextlib import nullcontext

import torch
from tqdm import tqdm

import common
import rewards

TINY = common.TINY | dict(adv_norm="group", beta=0.4, updates_per_epoch=2, sampler="ode")
# ours: the sampler's grid.  The released one starts at t = 0.999 and its t[-2] is t[-3] / 2; here it is diffusers' with
# the model's shift, ending with one step to 1e-3
RELEASE = dict(steps=14, cfg=1.0, sampler="SASolverScheduler", sampler_noise=0.4, weight="ghuber", train_timesteps=6, train_fraction=0.9,
               skip_first=True, adv_norm="global", adv_scale=5.0, clip_range=1.0, ratio="exp-each", offpolicy="none",
               updates_per_epoch=1, num_prompts=72, lag_coef=1.0, ema_decay=0.99, ema_every=1)  # fmt: skip
# the rewards as Flow-GRPO's and the official code compute them (docs/rewards.md)
GENEVAL = dict(reward="geneval-reward-flowgrpo", prompts="prompts/geneval_train.jsonl", eval_prompts="prompts/geneval_official.jsonl", eval_rewards="geneval")
PICK = dict(reward="pickscore26", prompts="prompts/pickscore_train.txt", eval_prompts="prompts/pickscore_test.txt")
NFT = dict(objective="nft", cfg=1.0, sampler="DPMSolverMultistepScheduler", adv_norm="global", beta=1e-4, offpolicy="lagged",
           updates_per_epoch=1, train_timesteps=9, lag_decay_max=0.5, ema_decay=0.9, ema_every=1)  # fmt: skip
PRESETS = {
    # Table 2: SD3.5-M, text rendering; Table 1: GenEval; Table 2: PickScore (prompt lists: prompts/README.md)
    "awm-ocr": dict(),  # the defaults are this experiment
    "awm-geneval": GENEVAL,
    "awm-pickscore": PICK | dict(beta=0.01),
    # the configurations of the official code, a later recipe than the paper's
    "release-ocr": RELEASE | dict(beta=0.003),
    "release-geneval": RELEASE | GENEVAL | dict(beta=0.001),
    "release-pickscore": RELEASE | PICK | dict(beta=1e-4, skip_first=False, num_prompts=24, sampler_noise=0.0),
    # DiffusionNFT's released configurations
    "nft-ocr": NFT | dict(nft_beta=0.1, lag_decay_max=0.999, lag_decay_slope=0.0075, lag_decay_start=75),
    "nft-geneval": NFT | GENEVAL,
    # the embedded models: coloured shapes on a CPU (ours; docs/awm.md)
    "tiny": TINY | dict(model="tiny-sd35", lr=4e-4, epochs=100),
    "tiny-sd15": TINY | dict(model="tiny-sd15", lr=1e-3, epochs=80),
}


def parse_args(argv=None):
    parser = common.make_parser(__doc__, "awm")
    yes_no = argparse.BooleanOptionalAction
    g = parser.add_argument_group("method")
    g.add_argument("--objective", default="awm", choices=["awm", "nft"], help="awm = Eq. 9-12; nft = DiffusionNFT's forward-process loss on the same images")
    g.add_argument("--adv-norm", default="group", choices=["group", "global", "none", "rloo", "raw"], help="A: (r - group mean) / group std (paper: group-relative), / std of all rewards of the epoch (official code), / 1, r - mean of the others, or r itself")
    g.add_argument("--adv-clip", type=float, default=5.0, help="A is clipped to +- this; nft: its A_max (official codes: 5)")
    g.add_argument("--adv-scale", type=float, default=1.0, help="A is divided by this after clipping (paper: 1; official code: 5, so that |A| <= 1)")
    g.add_argument("--weight", default="uniform", choices=["uniform", "elbo", "t", "t2", "huber", "ghuber"], help="w(t) of the matching error e: 1 (paper), that of the evidence bound ((1-t)/t; SD1.5: -1/2 d logSNR / du, u = index / 1000), t, t^2, or t times a Huber or generalised Huber function of e (official code: ghuber)")
    g.add_argument("--huber-power", type=float, default=0.25, help="p of ghuber (official code: 0.25)")
    g.add_argument("--train-timesteps", type=int, default=4, help="n_t: noisings of each image in an update (paper: 4, Section 5; official code: 6)")
    g.add_argument("--timesteps", default="discrete", choices=["discrete", "uniform", "logit-normal"], help="law of t: the sampler's own grid (paper, Section 5.2), U(0, 1), or sigmoid of N(0, 1), shifted as the model's grid is")
    g.add_argument("--timestep-grid", type=int, help="steps of the grid of --timesteps discrete; default --steps (paper: the sampler's)")
    g.add_argument("--stratified", action=yes_no, default=True, help="the n_t draws come one from each of n_t equal bins (official code)")
    g.add_argument("--skip-first", action=yes_no, default=False, help="--timesteps discrete without t = 1 (official code: GenEval, OCR)")
    g.add_argument("--t-min", type=float, default=0.01, help="smallest t of the uniform and logit-normal laws (official code: 0.01)")
    g.add_argument("--ratio", default="mean-then-exp", choices=["mean-then-exp", "exp-each"], help="exp of the mean over the n_t noisings (Eq. 11) or one ratio for each (official code); on-policy the same gradient")
    g.add_argument("--clip-range", type=float, default=0.0, help="xi of a PPO clip of the ratio; 0 = none (paper: Eq. 9 leaves it out; official code: 1)")
    g.add_argument("--beta", type=float, default=0.4, help="weight of the velocity KL to the reference, in units of A (paper: 0.4 GenEval and OCR, 0.01 PickScore; official code: 0.001, 0.003, 1e-4); 0 = off")
    g.add_argument("--kl-weight", default="uniform", choices=["uniform", "elbo"], help="w_KL(t) of Eq. 12: 1, or 1 / (2 g^2) with g^2 = 0.49 t / (1 - t) (official code's ELBO)")
    g.add_argument("--offpolicy", default="half", choices=["half", "none", "lagged"], help="old policy of the ratio: half = the rollout's for all updates but the first, on which it is theta (paper, with 2 updates: half of the data); none = theta itself, always on-policy; lagged = the lagged copy, which also draws the images")
    g.add_argument("--lag-coef", type=float, default=0.0, help="weight of the velocity KL to the lagged copy of theta (official code: 1); 0 = off")
    g.add_argument("--lag-decay-max", type=float, default=0.3, help="copy <- d copy + (1 - d) theta once an epoch, d = min(this, slope * (epoch - start)) (official code: 0.3; NFT: 0.5)")
    g.add_argument("--lag-decay-slope", type=float, default=0.001, help="slope of d (official code and NFT: 0.001; NFT OCR: 0.0075)")
    g.add_argument("--lag-decay-start", type=int, default=0, help="epochs for which d is 0 (NFT OCR: 75)")
    g.add_argument("--nft-beta", type=float, default=1.0, help="nft: strength b of v+ = (1-b) v_old + b v (NFT: 1; OCR: 0.1)")
    g.add_argument("--nft-space", default="x0", choices=["x0", "native"], help="nft: squares of x_0 predictions, each divided by its sg[mean |x0_hat - x0|] (its code), or of the network's output")
    g.add_argument("--sampler", default="sde", help="of the rollout: sde = --kernel (paper: Euler-Maruyama), ode, or a scheduler class of diffusers such as SASolverScheduler (official code), DPMSolverMultistepScheduler, UniPCMultistepScheduler")
    g.add_argument("--sampler-config", default="{}", metavar="JSON", help="settings of that scheduler, e.g. '{\"algorithm_type\": \"sde-dpmsolver++\"}'")
    g.add_argument("--sampler-noise", type=float, help="tau of SASolverScheduler for t in [300, 900] of 1000, 0 elsewhere (official code: 0.4 OCR and GenEval; 0, an ODE, PickScore); default: diffusers' own, 1 for t in [200, 800]")
    g.add_argument("--train-cfg", type=float, default=1.0, help="guidance in the training pass (paper: none = 1, Section 4)")
    common.add_args(parser)
    parser.set_defaults(model="sd3.5-medium", reward="ocr", prompts="prompts/ocr_train.txt", eval_prompts="prompts/ocr_test.txt",
                        num_prompts=48, group_size=24, steps=10, eval_steps=40, cfg=4.5, lora_rank=32, lora_alpha=64,
                        max_sequence_length=128, micro_batch_size=4)  # fmt: skip
    return common.parse(parser, PRESETS, argv, rewards, check, sizes)


def check(args):
    if args.group_size < 2 and args.adv_norm != "raw":
        raise common.UsageError(f"--adv-norm {args.adv_norm} compares the images of a prompt, --group-size is {args.group_size}; use 2 or more, or --adv-norm raw")
    if args.train_timesteps < 1:
        raise common.UsageError(f"--train-timesteps {args.train_timesteps} is too few; use 1 or more (paper: 4)")
    common.check_above_zero(args, "adv_clip", "adv_scale", "huber_power", "nft_beta")
    common.check_not_negative(args, "beta", "lag_coef", "clip_range", "lag_decay_slope")
    if not 0 <= args.lag_decay_max < 1 or not 0 < args.t_min < 1:
        raise common.UsageError(f"--lag-decay-max {args.lag_decay_max} and --t-min {args.t_min} must lie between 0 and 1")
    if args.objective == "nft" and args.offpolicy != "lagged":
        raise common.UsageError(f"--objective nft takes its v_old from the lagged copy, --offpolicy is {args.offpolicy}; use --offpolicy lagged")
    if args.objective == "nft" and args.adv_scale != 1:
        raise common.UsageError(f"--objective nft scales A by --adv-clip itself; leave --adv-scale {args.adv_scale} out")
    if args.kl_weight == "elbo" and args.kind == "eps":
        raise common.UsageError(f"--kl-weight elbo is defined by the flow SDE, --model {args.model} is not a flow model; use uniform")
    grid, most = args.timestep_grid or args.steps, 500 if args.kind == "eps" else 10**6
    if not 2 <= grid <= most:
        raise common.UsageError(f"--timestep-grid {args.timestep_grid} must be 2 to {most}")
    if int(grid * args.train_fraction + 1e-9) < 1 + args.skip_first:
        raise common.UsageError(f"--train-fraction {args.train_fraction} leaves no step of --timestep-grid {grid}{', without --skip-first' if args.skip_first else ''}; raise one of them")
    if args.sampler == "ode" and args.shared_noise:
        raise common.UsageError("--shared-noise with --sampler ode makes the images of a prompt all the same; use --sampler sde, or leave it out")
    if args.sampler in ("sde", "ode") and args.sampler_config != "{}":
        raise common.UsageError(f"--sampler-config is for a scheduler of diffusers, --sampler is {args.sampler}; leave it out")
    if args.sampler_noise is not None and args.sampler != "SASolverScheduler":
        if any(flag.startswith("--sampler-n") for flag in args.argv):
            raise common.UsageError(f"--sampler-noise {args.sampler_noise} is the tau of SASolverScheduler, --sampler is {args.sampler}; leave it out")
        args.sampler_noise = None  # the preset's, whose sampler was replaced
    if args.sampler_noise is not None:
        common.check_not_negative(args, "sampler_noise")
    try:
        args.sampler_options = json.loads(args.sampler_config)
        assert isinstance(args.sampler_options, dict)
    except (ValueError, AssertionError):
        raise common.UsageError(f"--sampler-config {args.sampler_config} is not a JSON object") from None
    if args.sampler not in ("sde", "ode"):
        check_sampler(args)
    common.check_updates(args, args.num_prompts * args.group_size, "images")


def check_sampler(args):
    """UsageError where --sampler is no diffusers scheduler for this model, or fails in a trial of all its steps."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    exchangeable = {s.name for s in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"} | {"SASolverScheduler"}
    cls = getattr(diffusers, args.sampler, None) if args.sampler in exchangeable else None
    if cls is None:
        raise common.UsageError(f"--sampler {args.sampler} is unknown; use sde, ode, or a scheduler class of diffusers such as SASolverScheduler")
    accepts = inspect.signature(cls.__init__).parameters
    if args.kind == "flow" and "use_flow_sigmas" not in accepts:
        raise common.UsageError(f"--sampler {args.sampler} cannot run a flow model; use e.g. SASolverScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler")
    given = set(args.sampler_options)
    if unknown := given - set(accepts):
        raise common.UsageError(f"--sampler-config: {args.sampler} has no setting {', '.join(sorted(unknown))}")
    if "tau_func" in given:
        raise common.UsageError("--sampler-config: tau_func is a function, which JSON cannot hold; use --sampler-noise")
    fixed = {"prediction_type", "use_flow_sigmas", "flow_shift", "num_train_timesteps", "trained_betas", "beta_start", "beta_end", "beta_schedule"}
    if args.kind == "flow":  # other spacings of the noise levels replace the flow's
        fixed |= {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"}
    if fixed & given:
        raise common.UsageError(f"--sampler-config: {', '.join(sorted(fixed & given))} is the model's own; leave it out")
    if args.kind == "flow":
        config = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    else:
        config = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1).config
    what = f"--sampler {args.sampler} with {args.steps} steps and --sampler-config {args.sampler_config}"
    try:
        generators = [common.generator("trial", n) for n in range(2)]
        one, two = scheduler_loop(make_scheduler(args, config), torch.zeros(2, 4, 2, 2), lambda x, t: x, generators)
    except Exception as problem:  # whatever diffusers raises would end the first rollout
        raise common.UsageError(f"{what} fails: {' '.join([type(problem).__name__, *str(problem).split()])}") from None
    if not (one + two).isfinite().all():
        raise common.UsageError(f"{what} gives images that are not finite; change the settings")
    if args.shared_noise and torch.equal(one, two):
        raise common.UsageError(f"--shared-noise with --sampler {args.sampler}, which draws no noise of its own, makes the images of a prompt all the same; use --sampler sde, or leave it out")


def make_scheduler(args, config):
    """A diffusers scheduler of --sampler, its steps set, with the noise levels of the model's scheduler `config`."""
    import diffusers

    options = dict(args.sampler_options)
    if args.sampler_noise is not None:
        options["tau_func"] = lambda t: args.sampler_noise if 300 <= t <= 900 else 0.0
    if args.kind == "flow":
        options |= dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.shift)
        config = {}
    scheduler = getattr(diffusers, args.sampler).from_config(config, **options)
    scheduler.set_timesteps(args.steps)
    if args.kind == "flow" and scheduler.sigmas[-1] > 0:
        scheduler.sigmas[-1] = 1e-3  # ours: SASolver and DEIS end at the last step's start, on a noisy latent
    return scheduler


def sizes(args) -> dict[str, str]:
    """The lines of --dry-run."""
    samples, passes, train = args.num_prompts * args.group_size, 2 if args.cfg != 1 else 1, 2 if args.train_cfg != 1 else 1
    rows = samples * args.train_timesteps * args.inner_epochs * train
    # theta_old is asked once for every image that comes after the first update
    later = samples if args.inner_epochs > 1 else samples - samples // args.updates_per_epoch
    half = later * args.train_timesteps * train if args.offpolicy == "half" else 0
    return {
        "samples per epoch": f"{samples} = {args.num_prompts} prompts x {args.group_size}",
        "noisings": f"{args.train_timesteps} per image, law {args.timesteps}",
        "network evaluations per epoch": f"{samples * args.steps * passes} in the rollout, {rows} with gradient, {rows * (args.beta > 0)} of the reference, {half + rows * lagged(args)} of the old policy or the lagged copy",
        "decodes and reward evaluations per epoch": f"{samples} images",
        "updates": f"{args.updates_per_epoch * args.inner_epochs} per epoch, {args.updates_per_epoch * args.inner_epochs * args.epochs} in all",
        "memory for the rollout": common.rollout_memory(args, samples * (draws(args) + 2), "x_0 and noise"),
    }


def draws(args) -> int:
    """Noise draws of an image after its start: a scheduler of diffusers makes its own, one step at a time."""
    return args.steps if args.sampler == "sde" else 0


def lagged(args) -> bool:
    return args.lag_coef > 0 or args.offpolicy == "lagged"


# ---- method: pure functions of tensors ------------------------------------------------------------------------------
def matching_error(o: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """e = mean over the latent of ||o - target||^2, (B,) float64; target e - x_0 (flow) or e (noise).  Eq. 10."""
    return ((o - target) ** 2).flatten(1).double().mean(1)


def elbo_weights(abar: torch.Tensor) -> torch.Tensor:
    """-1/2 d logSNR / du, (N,), logSNR = log(abar / (1 - abar)) at u = i / N: the evidence bound's weight of the noise
    error at training index i.  A rectified flow has 1 / (t (1 - t)), which is (1 - t) / t on the velocity error."""
    return -0.5 * torch.gradient((abar / (1 - abar)).log(), spacing=1 / len(abar))[0]


def weighted_error(error: torch.Tensor, t: torch.Tensor, kind: str, power: float = 0.25, elbo=None) -> torch.Tensor:
    """w(t) e, or t times a concave function of e (ref-code: huber, ghuber); same shape.  -this is Eq. 10's bound.

    elbo: w(t) of kind "elbo" if e is a noise error, elbo_weights() at its indices; default the velocity error's.
    """
    if kind == "huber":
        return t * ((error + 1e-10).sqrt() - 1e-5)
    if kind == "ghuber":
        return t / power * ((error + 1e-10) ** power - 1e-10**power)
    if kind == "elbo":
        return ((1 - t) / t if elbo is None else elbo) * error
    return {"uniform": torch.ones_like(t), "t": t, "t2": t**2}[kind] * error


def awm_loss(adv, weighted, weighted_old, ratio: str, clip_range: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """-A exp(log ratio) (B,), and the log ratios; from A (B,) and the weighted errors (B, n_t).  Eq. 9 and 11.

    clip_range xi > 0: max(-A rho, -A clip(rho, 1 - xi, 1 + xi)).
    """
    log_ratio = weighted_old - weighted
    if ratio == "mean-then-exp":
        log_ratio = log_ratio.mean(1, keepdim=True)
    rho, adv = log_ratio.exp(), adv[:, None]
    loss = -adv * rho
    if clip_range:
        loss = torch.maximum(loss, -adv * rho.clamp(1 - clip_range, 1 + clip_range))
    return loss.mean(1), log_ratio


def nft_loss(adv, o, o_old, target, strength: float, adv_max: float, to_x0=None, x0=None) -> torch.Tensor:
    """DiffusionNFT, (B,):  A_max / b * (r ||v+ - v*||^2 + (1 - r) ||v- - v*||^2),  r = clip(1/2 + A / (2 A_max), 0, 1),
    v+ = (1 - b) v_old + b v, v- = (1 + b) v_old - b v.  With to_x0: squares of x_0 predictions, each / sg[mean |error|].
    """
    r = (0.5 + adv / (2 * adv_max)).clamp(0, 1)
    loss = torch.zeros_like(r)
    for share, v in ((r, (1 - strength) * o_old + strength * o), (1 - r, (1 + strength) * o_old - strength * o)):
        if to_x0 is None:
            loss = loss + share * matching_error(v, target)
        else:
            error = (to_x0(v) - x0).flatten(1).double()
            scale = error.detach().abs().mean(1).clamp(min=1e-5)  # ref-code: the floor
            loss = loss + share * (error**2).mean(1) / scale
    return adv_max / strength * loss


def x0_hat(kind: str, x_t, alpha, nu, o) -> torch.Tensor:
    """E[x_0 | x_t] of the network output o; alpha, nu (B,)."""
    alpha, nu = alpha[:, None, None, None], nu[:, None, None, None]
    return x_t - nu * o if kind == "flow" else (x_t - nu * o) / alpha


def bins(n: int, stratified: bool, generator: torch.Generator) -> torch.Tensor:
    """n numbers in (0, 1): independent, or one from each of n equal bins."""
    u = torch.rand(n, dtype=torch.float64, generator=generator)
    return (torch.arange(n) + u) / n if stratified else u


def lag_decay(epoch: int, top: float, slope: float, start: int) -> float:
    return min(top, slope * max(0, epoch - start))


class Noising:
    """The times t and noises e of an image: functions of (seed, epoch, sample index) alone, so the same for all policies."""

    def __init__(self, args, policy):
        self.args, self.kind, self.policy = args, policy.kind, policy
        scheduler, steps = policy.pipe.scheduler, args.timestep_grid or args.steps
        grid = common.make_grid(scheduler, policy.kind, steps, "ode", 0.0)
        used = slice(1 if args.skip_first else 0, int(steps * args.train_fraction + 1e-9))
        self.grid = grid.timestep[used]
        self.shift = scheduler.config.shift if policy.kind == "flow" else 1.0
        self.abar = scheduler.alphas_cumprod.double().cpu() if policy.kind == "eps" else None
        self.elbo = elbo_weights(self.abar) if policy.kind == "eps" else None

    def timesteps(self, generator) -> torch.Tensor:
        """(n_t,) on the network's scale: 1000 t for a flow, a training index 0 ... 999 for SD1.5."""
        args = self.args
        u = bins(args.train_timesteps, args.stratified, generator)
        if args.timesteps == "discrete":
            return self.grid[(u * len(self.grid)).long()]
        if args.timesteps == "uniform":
            t = args.t_min + (1 - args.t_min) * u
        else:
            t = torch.special.ndtri(u).sigmoid()
            t = (self.shift * t / (1 + (self.shift - 1) * t)).clamp(min=args.t_min)  # ref-code: the clamp
        return t * 1000 if self.kind == "flow" else (t * len(self.abar)).long().double().clamp(max=len(self.abar) - 1)

    def __call__(self, x0: torch.Tensor, epoch: int, indices):
        """Images x0 (B, C, h, w) -> x_t, target (B, n_t, C, h, w) and timestep, t, alpha, nu (B, n_t)."""
        timestep, e = [], []
        for index in indices:
            generator = common.generator("noising", self.args.seed, epoch, index)
            timestep.append(self.timesteps(generator))
            e.append(torch.randn((self.args.train_timesteps, *x0.shape[1:]), generator=generator))
        timestep, e, x0 = torch.stack(timestep), torch.stack(e).to(x0), x0[:, None]
        if self.kind == "flow":
            alpha, nu = 1 - timestep / 1000, timestep / 1000
        else:
            alpha, nu = self.abar[timestep.long()].sqrt(), (1 - self.abar[timestep.long()]).sqrt()
        timestep, t, alpha, nu = (v.to(x0) for v in (timestep, nu / (alpha + nu), alpha, nu))
        x_t = alpha[..., None, None, None] * x0 + nu[..., None, None, None] * e
        return x_t, e - x0 if self.kind == "flow" else e, timestep, t, alpha, nu

    def of(self, rows, x0: torch.Tensor, batch, epoch: int):
        """The noisings of the images `rows`: a call of the network on all of them, their target and x_t (B n_t, C, h, w),
        and t, alpha, nu and elbo_weights() (B, n_t), the latter None for a flow."""
        x_t, target, timestep, *levels = self(x0[rows], epoch, [batch.indices[j] for j in rows])
        cond = batch.cond[rows.repeat_interleave(self.args.train_timesteps)]
        output = functools.partial(self.policy.predict, x_t.flatten(0, 1), timestep.flatten(), cond, self.args.train_cfg)
        elbo = None if self.elbo is None else self.elbo[timestep.long().cpu()].to(x0)
        return output, target.flatten(0, 1), x_t.flatten(0, 1), *levels, elbo


def scheduler_loop(scheduler, x: torch.Tensor, predict, generators) -> torch.Tensor:
    """x_0 (B, C, h, w) from standard normal x by all steps of a diffusers scheduler; one generator a row."""
    given = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        o = predict(scheduler.scale_model_input(x, t), t.to(x.device, torch.float32).expand(len(x)))
        x = scheduler.step(o, t, x, **given, return_dict=False)[0]
    return x


@torch.no_grad()
def sample(policy, args, batch, epoch: int, desc: str) -> torch.Tensor:
    """x_0 (B, C, h, w) by --sampler from the batch's noise; a diffusers scheduler draws from one generator a sample."""
    if args.sampler in ("sde", "ode"):
        kernel, level = (args.kernel, args.noise_level) if args.sampler == "sde" else ("ode", 0.0)
        grid = common.make_grid(policy.pipe.scheduler, policy.kind, args.steps, kernel, level)
    x0 = torch.empty_like(batch.noise[:, 0])
    starts = range(0, len(x0), args.micro_batch_size)
    for start in tqdm(starts, desc=desc, leave=False, disable=not desc or None):
        rows = slice(start, min(start + args.micro_batch_size, len(x0)))
        x, cond = batch.noise[rows, 0], batch.cond[rows]
        if args.sampler in ("sde", "ode"):
            for i in range(grid.steps):
                o = policy.predict(x, grid.time(i, len(x), x.device), cond, args.cfg)
                x = grid.mu(x, o, i)
                if args.sampler == "sde":
                    x = x + grid.at(grid.sigma, i, x) * batch.noise[rows, i + 1]
        else:
            scheduler = make_scheduler(args, policy.pipe.scheduler.config)  # fresh: multistep solvers have a memory
            generators = [common.generator("sampler", args.seed, epoch, j) for j in batch.indices[rows]]
            x = scheduler_loop(scheduler, x, functools.partial(policy.predict, cond=cond, cfg=args.cfg), generators)
        x0[rows] = x
    return x0


def main(args):
    # ---- setup ------------------------------------------------------------------------------------------------------
    run = common.setup(args, "awm")
    policy = common.Policy(args, run)
    params = common.add_lora(policy, args)
    reward, more = rewards.load_args(args, run.device)
    noising = Noising(args, policy)
    optimiser = common.Optimiser(args, run, params)
    lag = common.EMA(params, 0.0)  # the lagged copy of theta; decay per epoch below
    means = ["loss/total", "loss/policy", "loss/kl", "loss/lag", "kl/ref", "matching/error", "ratio/mean", "ratio/clip_frac", "adv/mean", "adv/zero_std_frac", "adv/clip_frac"]
    keys = [*means, "adv/std", "ratio/max", "lag/decay", "grad/norm"]
    recorder = common.Recorder(run, args, policy, optimiser, reward, more, rewards.RewardError, keys, {"lag": lag})

    for epoch in recorder.epochs():
        # ---- 1 rollout ----------------------------------------------------------------------------------------------
        recorder.phase()
        batch = common.epoch_batch(policy, args, run, epoch, draws(args))
        with lag.applied() if args.offpolicy == "lagged" else nullcontext():
            x0 = sample(policy, args, batch, epoch, "rollout" if run.is_main else "")

        # ---- 2 reward -----------------------------------------------------------------------------------------------
        recorder.phase()
        with recorder.scoring(epoch), torch.no_grad():
            final, parts = reward(policy.decode(x0), batch.texts, batch.metadata, chunk=args.reward_batch_size)

        # ---- 3 advantage --------------------------------------------------------------------------------------------
        adv, zero = common.group_advantage(final, args.group_size, args.adv_norm, run)
        clipped = adv.abs() > args.adv_clip
        adv = adv.clamp(-args.adv_clip, args.adv_clip) / args.adv_scale

        # ---- 4 update -----------------------------------------------------------------------------------------------
        recorder.phase()
        stats, norms = common.Stats(means, ["ratio/max"]), []
        images = max(1, args.micro_batch_size // args.train_timesteps)  # a micro-batch holds all n_t noisings of its images
        images_per_update = args.num_prompts * args.group_size / args.updates_per_epoch

        updates = [part[:, 0] for part in common.epoch_updates(args, run, [0], epoch)]
        old = torch.full((len(x0), args.train_timesteps), torch.nan, dtype=torch.float64, device=run.device)
        if args.offpolicy == "half" and len(updates) > 1:  # l_old of all but the first update's images, with theta_old
            for rows in common.micro_batches(torch.cat(updates[1:]).unique(), images, run, "old policy"):
                output, target, _, t, *_ = noising.of(rows, x0, batch, epoch)
                with torch.no_grad():
                    old[rows] = matching_error(output(), target).view_as(t)
        for update, part in enumerate(updates):
            for rows in common.micro_batches(part, images, run, f"update {update + 1}"):
                # 4a: noisy data, and what the frozen policies say about it
                output, target, x_t, t, alpha, nu, elbo = noising.of(rows, x0, batch, epoch)
                a = adv[rows]
                with torch.no_grad():
                    with policy.reference() if args.beta else nullcontext():
                        o_ref = output() if args.beta else None
                    with lag.applied() if lagged(args) else nullcontext():
                        o_lag = output() if lagged(args) else None
                o = output()
                error = matching_error(o, target).view_as(t)
                # 4b: the policy loss
                log_ratio = torch.zeros_like(error)
                if args.objective == "nft":
                    back = functools.partial(x0_hat, policy.kind, x_t, alpha.flatten(), nu.flatten())
                    space = (back, x0[rows].repeat_interleave(args.train_timesteps, 0)) if args.nft_space == "x0" else ()
                    each = a.repeat_interleave(args.train_timesteps)
                    loss = nft_loss(each, o, o_lag, target, args.nft_beta, args.adv_clip, *space).view_as(t).mean(1)
                else:
                    if args.offpolicy == "lagged":
                        error_old = matching_error(o_lag, target).view_as(t)
                    else:  # on-policy: theta itself, with a stopped gradient
                        error_old = old[rows] if args.offpolicy == "half" and update else error.detach()
                    weighted, weighted_old = (weighted_error(x, t, args.weight, args.huber_power, elbo) for x in (error, error_old))
                    loss, log_ratio = awm_loss(a, weighted, weighted_old, args.ratio, args.clip_range)
                # 4c: + KL to the reference and to the lagged copy, gradients
                row, values = loss, {}
                if args.beta:
                    apart = matching_error(o, o_ref).view_as(t)
                    kl = (apart / (0.98 * t / (1 - t).clamp(min=0.01)) if args.kl_weight == "elbo" else apart).mean(1)
                    row = row + args.beta * kl
                    values |= {"kl/ref": apart, "loss/kl": kl}
                if args.lag_coef:
                    values["loss/lag"] = matching_error(o, o_lag).view_as(t).mean(1)
                    row = row + args.lag_coef * values["loss/lag"]
                optimiser.backward(row.sum() / images_per_update)
                ratio = log_ratio.exp()
                stats.add(values | {
                    "loss/total": row, "loss/policy": loss, "matching/error": error, "ratio/mean": ratio,
                    "ratio/clip_frac": ((ratio - 1).abs() > args.clip_range).float() * (args.clip_range > 0),
                    "adv/mean": a, "adv/zero_std_frac": zero[rows].float(), "adv/clip_frac": clipped[rows].float(),
                })  # fmt: skip
                stats.top("ratio/max", ratio.max().item())
            norms += optimiser.step()  # 4d

        # ---- 5 log, samples, checkpoint, eval -----------------------------------------------------------------------
        decay = lag_decay(epoch + 1, args.lag_decay_max, args.lag_decay_slope, args.lag_decay_start)
        lag.update(decay)
        metrics = stats.result(run, std=("adv/mean",)) | {"lag/decay": decay, "grad/norm": sum(norms) / len(norms)}
        recorder.end_epoch(epoch, final, parts, metrics)
    recorder.finish()


if __name__ == "__main__":
    common.run_main(main, parse_args, rewards.UsageError)
