"""GRPO: group-relative policy optimisation of a sampler's steps, and its zeroth-order relatives.
Papers: Liu et al., "Flow-GRPO", arXiv 2505.05470 (code: github.com/yifan123/flow_grpo);  Black et al., DDPO, 2305.13301;
       Fan et al., DPOK, 2305.16381;  Xue et al., DanceGRPO, 2505.07818;  MixGRPO, 2507.21802;  GRPO-Guard, 2510.22319;
       PCPO (as in the code of Reward Score Matching, 2604.17415);  Dr.GRPO, 2503.20783

Idea:  denoising is a decision process: a state is (c, t, x_t), an action is the next latent x_s, a step's policy is the
       Gaussian p_theta(x_s | x_t) of a stochastic sampler, and the one reward r(x_0) comes at the end.  All methods here
       raise the log-probability of the actions of good images, relative to the other images of the prompt, and differ in
       how a step's log-ratio to the behaviour policy enters, in what holds the policy, and in which steps are stochastic.
Algorithm, one epoch (the loop below repeats the numbers):
  1 rollout     K images per prompt with theta_old; SDE steps inside the window, ODE steps outside; keep x_t, z, o_old
  2 reward      r(x_0)
  3 advantage   A = (r - mean) / (std + 1e-4) of the group, or a relative                      Flow-GRPO Eq. 4
  4 update      for each SDE transition, shuffled over samples and steps:
     4a         log ratio = log p_theta(x_s | x_t) - log p_old(x_s | x_t)                       from z and the outputs
     4b         the loss: REINFORCE, DDPO / GRPO, EPG, PCPO or Guard                            docs/grpo.md
     4c         + beta KL, on the outputs or the means;  AdamW
  5 log, checkpoint, evaluation with the same noise every time
Differs from the papers: nowhere in the losses.  DDPO's running per-prompt statistics are replaced by those of the
       epoch's group.  From public code: the old log-probs are the rollout's own, never theta's; those of CPS are
       log-densities (public code leaves 1 / 2 sigma^2 out); a group is an integer, not a text; Guard's bias is per
       sample (public code averages it over the batch); a window of SDE steps lasts an epoch, not a call of the
       sampler; log ratios lose no digits.
Run:   python grpo.py --preset tiny-sd15                  # embedded model, CPU, minutes, no downloads
       python grpo.py --preset vmpo-baseline-sd15-hpsv2   # the GRPO row of VMPO's Table 1, one GPU
       torchrun --nproc-per-node 8 grpo.py --preset flowgrpo-sd35-ocr
Port:  copy the functions under "method": tensors in, tensors out.
"""

import dataclasses

import torch

import common
import rewards

TINY = common.TINY | dict(loss="grpo", adv_norm="group", kl="mean", kl_anchor="ref", beta=0.05)
SD35 = dict(model="sd3.5-medium", num_prompts=48, group_size=24, steps=10, eval_steps=40, cfg=4.5, noise_level=0.7,
            lora_rank=32, lora_alpha=64, max_sequence_length=128, adv_norm="global", kl="mean-nodt", kl_anchor="ref",
            beta=0.04, ema_decay=0.9, micro_batch_size=4)  # fmt: skip
OCR = SD35 | dict(reward="ocr", prompts="prompts/ocr_train.txt", eval_prompts="prompts/ocr_test.txt")
PRESETS = {
    # DDPO, Section 5: aesthetic reward, 45 animals, 256 images and 4 updates an epoch; no KL
    "ddpo-sd15": dict(loss="ddpo", reward="aesthetic", prompts="prompts/simple_animals.txt", num_prompts=16, group_size=16, updates_per_epoch=4, adv_norm="group", kl="none", epochs=100),
    # Flow-GRPO: SD3.5-M, text rendering and GenEval; KL coefficients of the released configuration
    "flowgrpo-sd35-ocr": OCR,
    "flowgrpo-sd35-geneval": SD35 | dict(reward="geneval-reward-flowgrpo", prompts="prompts/geneval_train.jsonl", eval_prompts="prompts/geneval_official.jsonl", eval_rewards="geneval"),
    # Flow-GRPO-Fast as released for SD3.5 without guidance: three CPS steps in the noisy half, no KL.  Its 1e-5 clips a
    # log-prob without our 1 / 2 sigma^2; in steps 0-4 2 sigma^2 is 1.67 ... 0.91, so 1e-5 is nearly the same here
    "flowgrpo-fast": OCR | dict(kernel="cps", sde_window=3, sde_window_mode="random", sde_window_range=[0, 5], noise_level=0.8, cfg=1.0, kl="none", clip_range=1e-5),
    # GRPO-Guard: released configuration
    "guard": OCR | dict(loss="guard", clip_range=2e-6, lr=1e-4, kl="none", adv_norm="group"),
    # PCPO on SD1.5: the baseline configuration of Reward Score Matching's code
    "pcpo-sd15": dict(loss="pcpo", num_prompts=8, group_size=16, adv_norm="group", kl="none", lora_rank=16, lora_alpha=16, epochs=300),
    # the GRPO rows of VMPO's Tables 1 and 2: Flow-GRPO's code with groups of 8, everything else as VMPO (App. D)
    "vmpo-baseline-sd15-hpsv2": dict(eval_prompts="prompts/benchmark_ir.txt"),  # the defaults are this experiment
    # the embedded models: coloured shapes on a CPU (ours; docs/grpo.md)
    "tiny": TINY | dict(model="tiny-sd35", train_fraction=0.6, lr=4e-4, epochs=200),
    "tiny-sd15": TINY | dict(model="tiny-sd15", train_fraction=0.7, lr=1e-3, epochs=120),
}


def parse_args(argv=None):
    parser = common.make_parser(__doc__, "grpo")
    g = parser.add_argument_group("method")
    g.add_argument("--loss", default="grpo", choices=["reinforce", "ddpo", "grpo", "epg", "pcpo", "guard"], help="of a transition: reinforce = -A log p (DPOK: with --kl mean); ddpo = clipped ratio, no KL (DDPO-IS); grpo = the same clipped ratio, KL allowed; epg = -sg[ratio] A log p; pcpo = clipped log ratio; guard = clipped normalised ratio (GRPO-Guard)")
    g.add_argument("--adv-norm", default="global", choices=["group", "global", "none", "rloo", "raw"], help="A: (r - group mean) / group std (GRPO), / std of all rewards of the epoch (Flow-GRPO), / 1 (Dr.GRPO; VMPO Eq. 20), r - mean of the others, or r itself (REINFORCE)")
    g.add_argument("--adv-clip", type=float, default=5.0, help="A is clipped to +- this (DDPO, Flow-GRPO: 5)")
    g.add_argument("--clip-range", type=float, default=1e-4, help="xi: clip range of the ratio, or of the log ratio for pcpo (Flow-GRPO, DDPO: 1e-4 for mean log-probs; Fast: 1e-5, on CPS log-probs without 1 / 2 sigma^2; Guard: 2e-6)")
    g.add_argument("--fair-clip", default="none", choices=["none", "sigma2", "guard"], help="clip the log ratio at xi / sigma_t^2 instead of xi (RSM Eq. 24); guard also weights the row by sigma_t / dt")
    g.add_argument("--kl", default="mean", choices=["none", "mean", "mean-nodt", "velocity", "implicit", "implicit-sum"], help="mean = KL of the steps' Gaussians, ||d mu||^2 / 2 sigma^2; mean-nodt = / 2 g^2, i.e. times dt (Flow-GRPO's code, flow models only); velocity = mean ||o - o_anchor||^2 (AWM); implicit = r - beta log(p_old / p_ref) of the step as its reward (VMPO Eq. 23), implicit-sum = of all trained steps")
    g.add_argument("--kl-anchor", default="old", choices=["ref", "old"], help="KL to the pretrained model (Flow-GRPO) or to the rollout's policy (VMPO's App. D)")
    g.add_argument("--beta", type=float, default=1.0, help="weight of the KL, in units of A (Flow-GRPO: 0.04 GenEval and OCR, 0.01 PickScore, all mean-nodt; VMPO's App. D: 1 to old)")
    g.add_argument("--sde-window", type=int, default=0, help="number of consecutive stochastic steps, which alone are trained; the others are ODE steps (Flow-GRPO-Fast: 2 or 3, MixGRPO: 4); 0 = all steps stochastic")
    g.add_argument("--sde-window-mode", default="fixed", choices=["fixed", "random", "progressive"], help="window at the start of its range, anew at random every --sde-window-every epochs (Fast), or moving on by one step (MixGRPO)")
    g.add_argument("--sde-window-range", type=int, nargs=2, metavar=("FIRST", "END"), help="steps in which the window lies (Flow-GRPO-Fast: 0 to half of the steps); default: the trained steps")
    g.add_argument("--sde-window-every", type=int, default=1, help="epochs between two windows (MixGRPO: 25)")
    g.add_argument("--pcpo-weights", default="auto", choices=["auto", "none", "zeta", "public", "loss-only"], help="pcpo: w_t of the log ratio; zeta = zeta dt (flow); public = sampler with sigma~ and a constant weight (SD1.5); loss-only = native sampler, w_t replaced by its mean; auto = zeta or public")
    g.add_argument("--pcpo-zeta", type=float, help="pcpo: pins zeta (public code: 4.3152); default: sum w / sum dt over the trained steps of the actual grid")
    g.add_argument("--pcpo-w", type=float, default=4.5, help="pcpo: W of the sampler's sigma~ (public code: 4.5)")
    common.add_args(parser)
    parser.set_defaults(num_prompts=16, group_size=8)
    return common.parse(parser, PRESETS, argv, rewards, check, sizes)


def check(args):
    if args.pcpo_weights == "auto":
        args.pcpo_weights = "zeta" if args.kind == "flow" else "public"
    if args.group_size < 2 and args.adv_norm != "raw":
        raise common.UsageError(f"--adv-norm {args.adv_norm} compares the images of a prompt, --group-size is {args.group_size}; use 2 or more, or --adv-norm raw")
    if args.loss == "ddpo" and args.kl != "none":
        raise common.UsageError(f"--loss ddpo has no KL term, --kl is {args.kl}; use --loss grpo, which is the same with one, or --kl none")
    if args.loss == "reinforce" and args.updates_per_epoch * args.inner_epochs > 1:
        raise common.UsageError(f"--loss reinforce is on-policy, {args.updates_per_epoch * args.inner_epochs} updates per rollout are not; use --updates-per-epoch 1 --inner-epochs 1, or --loss epg")
    if args.kl == "mean-nodt" and args.kind == "eps":
        raise common.UsageError(f"--kl mean-nodt needs a flow model (g_t of its SDE), --model {args.model} is not one; use mean")
    if args.fair_clip != "none" and args.loss not in ("grpo", "ddpo", "pcpo"):
        raise common.UsageError(f"--fair-clip {args.fair_clip} does not go with --loss {args.loss}; use grpo or pcpo")
    if args.pcpo_weights == "zeta" and args.kind == "eps" or args.pcpo_weights == "public" and args.kind == "flow":
        raise common.UsageError(f"--pcpo-weights {args.pcpo_weights} does not fit --model {args.model}; use {'public or loss-only' if args.kind == 'eps' else 'zeta'}")
    common.check_above_zero(args, "clip_range", "adv_clip", "pcpo_w")
    common.check_not_negative(args, "beta")
    if args.pcpo_zeta is not None:
        common.check_above_zero(args, "pcpo_zeta")
    if not args.sde_window and (useless := [flag for flag in args.argv if flag.startswith("--sde-window-")]):
        raise common.UsageError(f"{useless[0]} does nothing with --sde-window 0; give a window of 1 or more steps, or leave it out")
    if args.sde_window < 0 or args.sde_window_every < 1:
        raise common.UsageError(f"--sde-window {args.sde_window} every {args.sde_window_every} epochs is impossible; use 0 or more steps, every 1 or more")
    args.sde_window_range = args.sde_window_range or [0, args.train_steps]
    first, end = args.sde_window_range
    if args.sde_window and not 0 <= first < first + args.sde_window <= end <= args.train_steps:
        raise common.UsageError(f"--sde-window {args.sde_window} does not fit into steps {first} to {end} of the {args.train_steps} trained ones; use a smaller window or another --sde-window-range")
    common.check_updates(args, args.num_prompts * args.group_size * (args.sde_window or args.train_steps))
    if args.loss in ("ddpo", "grpo", "pcpo"):
        common.warn_of_clip_range(args)
    if args.kl in ("mean", "mean-nodt", "velocity") and args.kl_anchor == "old" and args.updates_per_epoch * args.inner_epochs == 1:
        print("note: --kl-anchor old with one update per rollout is a KL of a policy to itself, identically 0; for a KL that acts use --kl-anchor ref")


def sizes(args) -> dict[str, str]:
    """The lines of --dry-run."""
    samples, train = args.num_prompts * args.group_size, args.sde_window or args.train_steps
    passes = 2 if args.cfg != 1 else 1
    return {
        "samples per epoch": f"{samples} = {args.num_prompts} prompts x {args.group_size}",
        "stochastic steps": f"{args.sde_window} of {args.steps}, {args.sde_window_mode}" if args.sde_window else f"all {args.steps}",
        "network evaluations per epoch": f"{samples * args.steps * passes} in the rollout, {samples * train * passes * needs_reference(args)} of the reference, {samples * train * args.inner_epochs * passes} with gradient",
        "decodes and reward evaluations per epoch": f"{samples} images",
        "transitions per epoch": f"{samples * train}, {samples * train // args.updates_per_epoch} per update",
        "updates": f"{args.updates_per_epoch * args.inner_epochs} per epoch, {args.updates_per_epoch * args.inner_epochs * args.epochs} in all",
    }


def needs_reference(args) -> bool:
    return args.kl.startswith("implicit") or args.kl != "none" and args.kl_anchor == "ref"


# ---- method: pure functions of tensors ------------------------------------------------------------------------------
def reinforce_loss(adv: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """-A log p_theta up to a constant, (B,).  DDPO-SF, DPOK: strictly on-policy."""
    return -adv * log_ratio


def clipped_loss(adv: torch.Tensor, log_ratio: torch.Tensor, clip_range) -> torch.Tensor:
    """max(-A ratio, -A clip(ratio, 1 - xi, 1 + xi)), (B,); xi a number or (B,).  PPO, DDPO-IS, (Flow-, Dr., Dance)GRPO."""
    ratio = log_ratio.exp()
    return torch.maximum(-adv * ratio, -adv * torch.clamp(ratio, 1 - clip_range, 1 + clip_range))


def epg_loss(adv: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """-sg[ratio] A log p_theta, (B,): importance weighting without clipping."""
    return -log_ratio.exp().detach() * adv * log_ratio


def pcpo_loss(adv: torch.Tensor, log_ratio: torch.Tensor, clip_range) -> torch.Tensor:
    """max(-A lambda, -A clip(lambda, -xi, xi)), (B,), lambda the log ratio; xi a number or (B,).  PCPO-base."""
    return torch.maximum(-adv * log_ratio, -adv * torch.clamp(log_ratio, -clip_range, clip_range))


def guard_log_ratio(moved: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor, reduce: str) -> torch.Tensor:
    """(log ratio + ||mu_theta - mu_old||^2 / 2 sigma^2) sigma, (B,): the cross term alone, at one scale for all steps.

    GRPO-Guard: the ratio's negative bias -||delta||^2 / 2 is removed for each sample.  ref-code: averages it over the
    batch; ours: its own, as the formula says.  The loss is divided by dt.
    """
    return common.reduce_latent(moved * z, reduce) * sigma


def fair_range(clip_range: float, sigma: torch.Tensor) -> torch.Tensor:
    """xi / sigma^2, (B,): clipping sigma^2 lambda at xi and dividing by sigma^2 is clipping lambda there.  RSM Eq. 24."""
    return clip_range / sigma**2


def pcpo_weights(grid: common.Grid, steps: list[int], kind: str, zeta: float | None) -> torch.Tensor:
    """w~_t (T,), float64 and signed as grid.w, in place of the sensitivities w_t of the trained `steps`.

    zeta: zeta dt with zeta = sum w / sum dt, which keeps the sum; public, loss-only: the mean of the native w.
    """
    w = grid.w[steps].abs()
    if kind == "zeta":
        zeta = w.sum() / grid.dt[steps].sum() if zeta is None else zeta
        return -zeta * grid.dt
    return -w.mean().expand(grid.steps)


def pcpo_grid(grid: common.Grid, big_w: float) -> common.Grid:
    """SD1.5's DDIM grid with the standard deviations sigma~ of PCPO's public sampler, for which (c1 + c2) / sigma~ = W.

    ref-code: it takes this root, which leaves the true sensitivity (c1 - c2) / sigma~ anything but constant; the
    constant weight is imposed in the loss.
    """
    c1 = grid.nu * grid.alpha_s / grid.alpha
    root = grid.nu_s**2 * (big_w**2 + 1) - c1**2
    sigma = (big_w * c1 + root.clamp(min=0).sqrt()) / (big_w**2 + 1)
    if (root < 0).any() or (sigma > grid.nu_s).any():
        raise common.UsageError(f"--pcpo-w {big_w} has no sampler on this grid of {grid.steps} steps; use a larger value, more --steps, or --pcpo-weights loss-only")
    return dataclasses.replace(grid, sigma=sigma, o_coef=-c1 + (grid.nu_s**2 - sigma**2).sqrt())


def mixed_grid(sde: common.Grid, ode: common.Grid, steps: list[int]) -> common.Grid:
    """The SDE's Gaussians at `steps`, the ODE's steps elsewhere.  Flow-GRPO-Fast, MixGRPO."""
    inside = torch.zeros(sde.steps, dtype=torch.bool)
    inside[steps] = True
    pick = {k: torch.where(inside, getattr(sde, k), getattr(ode, k)) for k in ("x_coef", "o_coef", "sigma")}
    return dataclasses.replace(sde, **pick)


def window_start(mode: str, width: int, first: int, end: int, lap: int, seed: int) -> int:
    """First step of window number `lap` among the steps first ... end - 1."""
    places = end - first - width + 1
    if mode == "random":
        return first + int(torch.randint(places, (), generator=common.generator("window", seed, lap)))
    return first + (lap % places if mode == "progressive" else 0)


def main(args):
    # ---- setup ------------------------------------------------------------------------------------------------------
    run = common.setup(args, "grpo")
    policy = common.Policy(args, run)
    params = common.add_lora(policy, args)
    reward, more = rewards.load_args(args, run.device)
    native = common.make_grid(policy.pipe.scheduler, policy.kind, args.steps, args.kernel, args.noise_level)
    ode = common.make_grid(policy.pipe.scheduler, policy.kind, args.steps, "ode", 0.0)
    public = args.loss == "pcpo" and args.pcpo_weights == "public"
    sde = pcpo_grid(native, args.pcpo_w) if public else native
    trainable = common.policy_steps(sde, args.train_steps)
    if args.sde_window and (silent := set(range(*args.sde_window_range)) - set(trainable)):
        raise common.UsageError(f"--sde-window-range: step {min(silent)} of kernel {args.kernel} has no noise and cannot be trained; end the range before it")
    # a step without noise is no transition: the count of the flags may be too large
    common.check_updates(args, args.num_prompts * args.group_size * (args.sde_window or len(trainable)))
    optimiser = common.Optimiser(args, run, params)
    means = ["loss/total", "loss/policy", "loss/kl", "kl/ref", "ratio/mean", "ratio/clip_frac", "ratio/approx_kl", "adv/mean", "adv/zero_std_frac", "adv/clip_frac"]
    tops = ["ratio/max", "ratio/start_deviation"]
    keys = [*means, "adv/std", *tops, "window/first", "grad/norm"]
    recorder = common.Recorder(run, args, policy, optimiser, reward, more, rewards.RewardError, keys)

    for epoch in recorder.epochs():
        # ---- 1 rollout ----------------------------------------------------------------------------------------------
        recorder.phase()
        steps, grid, first = trainable, sde, 0
        if args.sde_window:
            first = window_start(args.sde_window_mode, args.sde_window, *args.sde_window_range, epoch // args.sde_window_every, args.seed)
            steps = list(range(first, first + args.sde_window))
            grid = mixed_grid(sde, ode, steps)
        batch = common.epoch_batch(policy, args, run, epoch)
        reference = steps if needs_reference(args) else ()
        path = common.rollout(policy, grid, batch.cond, batch.prompts, batch.noise, args.cfg, args.micro_batch_size, reference, "rollout" if run.is_main else "")

        # ---- 2 reward -----------------------------------------------------------------------------------------------
        recorder.phase()
        with recorder.scoring(epoch), torch.no_grad():
            final, parts = reward(policy.decode(path.x[:, -1]), batch.texts, batch.metadata, chunk=args.reward_batch_size)

        # ---- 3 advantage --------------------------------------------------------------------------------------------
        returns = final  # (B,), or (B, S) with S trained steps
        if args.kl.startswith("implicit"):
            w = grid.at(grid.w, torch.tensor(steps), path.z[0])
            drift = torch.stack([-common.log_ratio(w * (r - o)[steps], z[steps], args.logprob_reduce)
                                 for r, o, z in zip(path.o_ref, path.o_old, path.z)])  # fmt: skip
            returns = final[:, None] - args.beta * drift if args.kl == "implicit" else final - args.beta * drift.sum(1)
        adv, zero = common.group_advantage(returns, args.group_size, args.adv_norm, run)
        adv, zero = (v.view(len(final), -1).expand(-1, len(steps)) for v in (adv, zero))
        clipped = adv.abs() > args.adv_clip
        adv = adv.clamp(-args.adv_clip, args.adv_clip)

        # ---- 4 update -----------------------------------------------------------------------------------------------
        recorder.phase()
        stats, norms, checked = common.Stats(means, tops), [], False
        column = torch.full((grid.steps,), -1)
        column[steps] = torch.arange(len(steps))
        weights = pcpo_weights(native, steps, args.pcpo_weights, args.pcpo_zeta)
        rows_per_update = args.num_prompts * args.group_size * len(steps) / args.updates_per_epoch
        for update, part in enumerate(common.epoch_updates(args, run, steps, epoch)):
            for chunk in common.micro_batches(part, args.micro_batch_size, run, f"update {update + 1}"):
                n, i = chunk.unbind(1)
                x_t, z, o_old = path.x[n, i], path.z[n, i], path.o_old[n, i]
                a, sigma, dt = adv[n, column[i]], grid.sigma[i].to(x_t), grid.dt[i].to(x_t)
                # 4a: the log ratio; moved = (mu_theta - mu_old) / sigma, z = (x_s - mu_old) / sigma
                o = policy.predict(x_t, grid.time(i, len(n), run.device), path.cond[n], args.cfg)
                moved = grid.at(grid.w, i, o) * (o - o_old)
                log_ratio = common.log_ratio(moved, z, args.logprob_reduce)
                if update == 0 and not checked:
                    stats.top("ratio/start_deviation", common.check_start(moved, z, args, run, epoch))
                    checked = True
                # 4b: the loss
                clip_range = args.clip_range if args.fair_clip == "none" else fair_range(args.clip_range, sigma)
                if args.loss == "reinforce":
                    loss = reinforce_loss(a, log_ratio)
                elif args.loss == "epg":
                    loss = epg_loss(a, log_ratio)
                elif args.loss == "pcpo":
                    if args.pcpo_weights != "none":
                        log_ratio = common.log_ratio(grid.at(weights, i, o) * (o - o_old), z, args.logprob_reduce)
                    loss = pcpo_loss(a, log_ratio, clip_range)
                elif args.loss == "guard":
                    log_ratio = guard_log_ratio(moved, z, sigma, args.logprob_reduce)
                    loss = clipped_loss(a, log_ratio, clip_range) / dt
                else:  # grpo, ddpo
                    loss = clipped_loss(a, log_ratio, clip_range)
                if args.fair_clip == "guard":
                    loss = loss * sigma / dt
                # 4c: + KL, gradients
                kl = torch.zeros_like(loss)
                values = {}
                if reference:
                    o_ref = path.o_ref[n, i]
                    values["kl/ref"] = common.kl_divergence(grid.at(grid.w, i, o) * (o - o_ref), args.logprob_reduce)
                if args.kl in ("mean", "mean-nodt"):
                    kl = values["kl/ref"] if args.kl_anchor == "ref" else common.kl_divergence(moved, args.logprob_reduce)
                    kl = kl * dt if args.kl == "mean-nodt" else kl
                elif args.kl == "velocity":
                    kl = common.reduce_latent((o - (o_ref if args.kl_anchor == "ref" else o_old)) ** 2, "mean")
                row = loss + args.beta * kl
                optimiser.backward(row.sum() / rows_per_update)
                ratio = log_ratio.exp()
                outside = (log_ratio if args.loss == "pcpo" else ratio - 1).abs() > clip_range
                stats.add(values | {
                    "loss/total": row, "loss/policy": loss, "loss/kl": kl, "ratio/mean": ratio,
                    "ratio/clip_frac": outside.float(), "ratio/approx_kl": 0.5 * log_ratio**2,
                    "adv/mean": a, "adv/zero_std_frac": zero[n, column[i]].float(), "adv/clip_frac": clipped[n, column[i]].float(),
                })  # fmt: skip
                stats.top("ratio/max", ratio.max().item())
            norms += optimiser.step()

        # ---- 5 log, samples, checkpoint, eval -----------------------------------------------------------------------
        metrics = stats.result(run, std=("adv/mean",)) | {"window/first": first, "grad/norm": sum(norms) / len(norms)}
        recorder.end_epoch(epoch, final, parts, metrics)
    recorder.finish()


if __name__ == "__main__":
    common.run_main(main, parse_args, rewards.UsageError)
