"""VMPO: Variance Minimisation Policy Optimisation.  Paper: Ou et al., "Diffusion Alignment Beyond KL: Variance
Minimisation as Effective Policy Optimiser", arXiv 2602.12229.  Official code: github.com/SamsungLabs/VMPO (SD3.5, OCR)

Idea:  the denoiser is the proposal of a Sequential Monte Carlo sampler whose target at every step is the reference
       tilted by exp(reward / beta).  Its log importance weight log w is constant, hence of zero variance, exactly when
       the policy is that tilt, so VMPO minimises the variance of log w over the policy's own transitions.  On-policy
       the gradient is that of KL(policy || tilt) (Proposition 1), and no ratio, group or clipping is needed.
Algorithm, one epoch (the loop below repeats the numbers):
  1 rollout     trajectories of the current policy theta_old; keep x_t, the draws z and the outputs o_old, o_ref
  2 reward      r(x_0); with Diff also r(x0_hat(x_t)) at every step, from the sampler's own predictions
  3 potential   u_t = r(x_0) / beta (R2G)  or  (r(x0_hat_s) - r(x0_hat_t)) / beta (Diff)            Eq. 38-45
  4 update      for each transition, shuffled over samples and steps:
     4a         log R = log p_ref(x_s | x_t) - log p_theta(x_s | x_t);   log w = log R + u_t        Eq. 1
     4b         M_phi(t, c), the running estimate of E[log w], or its Monte-Carlo mean              Eq. 7, 5
     4c         loss (log w - M_phi)^2, or one of its relatives                                     Eq. 8, 5, 31, 32, 50-55
     4d         + lambda_KL * KL(p_theta || p_old);  AdamW on theta and on phi                      App. D
  5 log, checkpoint, evaluation with the same noise every time
Differs from the paper: (a) its Eq. 5 lacks the square and mixes K and N; we use the unbiased variance.  (b) R2G: the
       step potential is r / beta, not r / (T beta), whose on-policy optimum is the tilt at temperature T beta.  (c) The
       minus sign in Eq. 55's last term.  (d) M_phi is a small MLP; the paper gives no architecture.
Differs from the official code: Tweedie rewards come from the rollout (theirs: two more network passes and decodes per
       transition); KL to the old policy with the true variance (theirs: to the reference, times dt).  Both are flags.
Run:   python vmpo.py --preset tiny                       # embedded model, CPU, minutes, no downloads
       python vmpo.py --preset sd15-hpsv2                 # the paper's first experiment, one GPU
       torchrun --nproc-per-node 8 vmpo.py --preset sd15-hpsv2      # the same run on eight
Port:  copy diff_potential(), log_weights() and vmpo_loss(): tensors in, tensors out.  Details: docs/vmpo.md.
"""

import torch
from torch import nn

import common
import rewards

TINY = common.TINY | dict(potential="r2g", mean="group", beta=0.1, kl_anchor="ref", kl_coef=0.3)
SD35 = dict(model="sd3.5-medium", reward="ocr", beta=0.1, steps=10, eval_steps=40, cfg=4.5, noise_level=0.7,
            lora_rank=32, lora_alpha=64, prompts="prompts/ocr_train.txt", eval_prompts="prompts/ocr_test.txt",
            micro_batch_size=4)  # fmt: skip
PRESETS = {
    # Table 1: SD1.5, HPSv2 (v2.1), photo and painting prompts of HPDv2; App. D
    "sd15-hpsv2": dict(eval_prompts="prompts/benchmark_ir.txt"),  # the defaults are this experiment
    # Table 2: SD1.5, ImageReward, DrawBench prompts (not redistributable: prompts/README.md says where they are)
    "sd15-imagereward": dict(reward="imagereward", beta=0.1, prompts="prompts/drawbench.txt", eval_prompts="prompts/benchmark_ir.txt"),
    # Table 3: SD3.5-M, text rendering; App. D (its beta is not stated: the official code's)
    "sd35-ocr": SD35,
    # the same with the official code's choices where they differ from the paper's
    "sd35-ocr-release": SD35 | dict(num_prompts=256, beta_warmup_epochs=50, diff_reward="train", kl_anchor="ref", kl_denom="g2", mean_coef=0.01, mean_lr=3e-5, ema_decay=0.9, dtype="float16"),
    # the embedded models: coloured shapes on a CPU (ours; how these numbers were found: docs/vmpo.md)
    "tiny": TINY | dict(model="tiny-sd35", train_fraction=0.6, lr=4e-4, epochs=200),
    "tiny-sd15": TINY | dict(model="tiny-sd15", train_fraction=0.7, lr=1e-3, epochs=120),
}
GRADIENT = ("gradient", "gradient-xt", "gradient-gfn")


def parse_args(argv=None):
    parser = common.make_parser(__doc__, "vmpo")
    g = parser.add_argument_group("method")
    g.add_argument("--objective", default="vmpo", choices=["vmpo", "mc", "surrogate", "ppo", "db", *GRADIENT],
                   help="vmpo = Eq. 8; mc = Eq. 5; surrogate = Eq. 31; ppo = Eq. 32, clipped; db = GFlowNet detailed balance, Eq. 49/50; gradient = Eq. 52, gradient-xt = Eq. 53, gradient-gfn = Eq. 54/55 (differentiable rewards only)")  # fmt: skip
    g.add_argument("--potential", default="diff", choices=["diff", "r2g", "learned"], help="u_t: difference of Tweedie rewards (Eq. 40-44), return-to-go (Eq. 38/39), or diff with F_phi times the Tweedie reward (Eq. 45) (paper: diff is best, Tables 1-3)")
    g.add_argument("--beta", type=float, default=0.01, help="temperature of r / beta = strength of the KL to the reference, in units of the raw reward (paper: 0.01 HPSv2, 0.1 ImageReward, App. D)")
    g.add_argument("--mean", default="time_prompt", choices=["time_prompt", "time", "group", "batch"], help="M_phi: network of time and prompt (official code), of time only (Eq. 8 as printed), or the Monte-Carlo mean over the prompt's K samples or the batch, per step (Eq. 5)")
    g.add_argument("--r2g-scale", default="1", choices=["1", "1/T"], help="r2g: u = r / beta or r / (T beta); 1/T targets temperature T beta (paper: footnote 5 absorbs it in beta)")
    g.add_argument("--diff-reward", default="rollout", choices=["rollout", "train"], help="diff: Tweedie rewards from the rollout's own predictions, or anew with the current theta (official code)")
    g.add_argument("--beta-warmup-epochs", type=int, default=0, help="1 / beta rises linearly from 0 over these epochs (official code: 50)")
    g.add_argument("--mean-lr", type=float, default=3e-4, help="learning rate of phi (paper: 3e-4, App. D; official code: 3e-5)")
    g.add_argument("--mean-coef", type=float, default=1.0, help="weight of phi's regression loss (paper: 1, Eq. 8; official code: 0.01)")
    g.add_argument("--mean-max-grad-norm", type=float, default=1.0, help="phi's own gradient clipping (official code: 1)")
    g.add_argument("--kl-coef", type=float, default=1.0, help="lambda_KL of the step-wise KL regulariser (paper: 1, App. D)")
    g.add_argument("--kl-anchor", default="old", choices=["old", "ref"], help="KL to the rollout's policy (paper, App. D) or to the reference (official code)")
    g.add_argument("--kl-denom", default="sigma2", choices=["sigma2", "g2"], help="KL divided by 2 sigma_t^2 (exact) or by 2 g_t^2, i.e. times dt (official code; flow models only)")
    g.add_argument("--clip-range", type=float, default=1e-4, help="xi of Eq. 32, for mean-reduced log-probs (Flow-GRPO: 1e-4)")
    g.add_argument("--backward-coef", type=float, default=1.0, help="gradient-gfn: weight of the backward term (gradient-GFlowNet's code: 1)")
    common.add_args(parser)
    return common.parse(parser, PRESETS, argv, rewards, check, sizes)


def check(args):
    common.check_updates(args, args.num_prompts * args.group_size * args.train_steps)
    if not args.beta > 0:
        raise common.UsageError(f"--beta {args.beta} must be above 0; the paper uses 0.01 (HPSv2) and 0.1 (ImageReward)")
    if args.mean == "batch" and args.num_prompts * args.group_size < 2:
        raise common.UsageError("--mean batch needs at least two samples; raise --num-prompts or --group-size")
    if args.mean == "group" and args.group_size < 2:
        raise common.UsageError(f"--mean group needs at least two images per prompt, --group-size is {args.group_size}; use 2 or more, or --mean time_prompt")
    if args.objective in ("mc", "surrogate", "ppo") and args.mean not in ("group", "batch"):
        raise common.UsageError(f"--objective {args.objective} is a Monte-Carlo form (Eq. 5) and --mean {args.mean} is a network; use --mean group or batch")
    if args.objective in (*GRADIENT, "db") and args.diff_reward == "train":
        raise common.UsageError(f"--diff-reward train does not go with --objective {args.objective}; leave it at rollout")
    if args.diff_reward == "train" and args.potential != "diff":
        raise common.UsageError(f"--diff-reward train needs --potential diff, not {args.potential}")
    if args.diff_reward == "train" and args.mean in ("group", "batch"):
        raise common.UsageError(f"--diff-reward train changes u_t during the update, --mean {args.mean} is taken before it; use --mean time_prompt")
    if args.potential == "learned" and args.mean in ("group", "batch"):
        raise common.UsageError(f"--potential learned changes u_t during the update, --mean {args.mean} is taken before it; use --mean time_prompt")
    if args.kl_denom == "g2" and args.kind == "eps":
        raise common.UsageError(f"--kl-denom g2 needs a flow model (g_t of its SDE), --model {args.model} is not one; use sigma2")
    if args.objective in GRADIENT and args.detach_uncond:
        raise common.UsageError(f"--objective {args.objective} differentiates with respect to x_t, through both branches of the guidance; leave --detach-uncond out")
    if args.objective in GRADIENT:
        for name, _ in rewards.parse_spec(args.reward):
            if not rewards.is_differentiable(name):
                raise common.UsageError(f"--objective {args.objective} needs a differentiable reward and {name} is not one; use e.g. clipscore, hpsv2 or imagereward")
    if args.objective == "ppo":
        common.warn_of_clip_range(args)


def sizes(args) -> dict[str, str]:
    """The lines of --dry-run."""
    samples, train = args.num_prompts * args.group_size, args.train_steps
    passes = 2 if args.cfg != 1 else 1
    along = args.potential != "r2g" and args.objective not in GRADIENT and args.diff_reward == "rollout"
    scored = samples * (1 + (min(train + 1, args.steps) if along else 0))
    if args.diff_reward == "train":
        scored += 2 * samples * train * args.inner_epochs
    if args.objective in GRADIENT:
        scored += samples * (args.steps + 1)
    return {
        "samples per epoch": f"{samples} = {args.num_prompts} prompts x {args.group_size}",
        "network evaluations per epoch": f"{samples * args.steps * passes} in the rollout, {samples * train * passes} of the reference, {samples * train * args.inner_epochs * passes} with gradient",
        "decodes and reward evaluations per epoch": f"{scored} images",
        "transitions per epoch": f"{samples * train}, {samples * train // args.updates_per_epoch} per update",
        "updates": f"{args.updates_per_epoch * args.inner_epochs} per epoch, {args.updates_per_epoch * args.inner_epochs * args.epochs} in all",
    }


# ---- method: pure functions of tensors ------------------------------------------------------------------------------
def r2g_potential(reward: torch.Tensor, steps: int, beta: float, scale: str = "1") -> torch.Tensor:
    """Return-to-go: u_t = r(x_0) / beta for every step, (B,) -> (B, T).  Eq. 38/39; scale '1/T' divides by T.

    ours: '1' is the default: each local loss sees only its own log R, so 1/T aims at temperature T beta.
    """
    u = reward / (beta if scale == "1" else steps * beta)
    return u[:, None].expand(-1, steps)


def diff_potential(reward_t: torch.Tensor, beta: float) -> torch.Tensor:
    """u_t = (r(x0_hat_s) - r(x0_hat_t)) / beta from rewards along the trajectory (B, T+1) -> (B, T).  Eq. 40-44.

    The last column is the terminal reward r(x_0).  The sum over steps is (r(x_0) - r(x0_hat(x_T))) / beta.
    """
    return (reward_t[:, 1:] - reward_t[:, :-1]) / beta


def log_weights(log_r: torch.Tensor, potential: torch.Tensor) -> torch.Tensor:
    """log w_t = log p_ref - log p_theta + u_t, (B,).  Eq. 1.  Mind the sign: log R is reference over policy."""
    return log_r + potential


def vmpo_loss(log_w: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 8 split as theta's (log w - sg M)^2 and phi's (sg log w - M)^2, each (B,).

    ref-code: the split.  Their sum has the gradient of Eq. 8; there is no 1/2, so on-policy it is twice grad KL.
    """
    return (log_w - mean.detach()) ** 2, (log_w.detach() - mean) ** 2


def mc_loss(log_w: torch.Tensor, mean: torch.Tensor, k: int) -> torch.Tensor:
    """Eq. 5, (B,), whose average over the k samples is their unbiased 1/2 Var(log w).  paper: lacks the square."""
    return 0.5 * k / (k - 1) * (log_w - mean) ** 2


def surrogate_loss(log_w: torch.Tensor, mean: torch.Tensor, logp: torch.Tensor, k: int) -> torch.Tensor:
    """Eq. 31, (B,): -sg[A] log p_theta with A = log w - mean; the same gradient as Eq. 5."""
    return -k / (k - 1) * (log_w - mean).detach() * logp


def ppo_loss(log_w, mean, log_ratio, clip_range: float, k: int) -> torch.Tensor:
    """Eq. 32/33, (B,), to be minimised: the surrogate with a clipped importance ratio p_theta / p_old."""
    adv, ratio = (log_w - mean).detach(), log_ratio.exp()
    return -k / (k - 1) * torch.minimum(ratio * adv, ratio.clamp(1 - clip_range, 1 + clip_range) * adv)


def db_loss(log_w: torch.Tensor) -> torch.Tensor:
    """GFlowNet detailed balance, (B,): (log w)^2 with nothing subtracted.  Eq. 49/50."""
    return log_w**2


def gradient_loss(grad_reward, grad_logp_ref, grad_logp, beta: float, residual=0.0) -> torch.Tensor:
    """|| grad r / beta + residual + grad log p_ref - grad log p_theta ||^2 per scalar, (B,).  Eq. 52, 54.

    For the gradients with respect to x_t (Eq. 53, 55) pass -grad_reward and -residual: there the reward of the state
    that is left, not of the one that is reached, enters.  paper: Eq. 55 prints + before its residual.
    """
    error = grad_reward / beta + residual + grad_logp_ref - grad_logp
    return (error**2).flatten(1).mean(1)


class MeanNet(nn.Module):
    """M_phi(t) or M_phi(t, c) of Eq. 7/8, float32, 0 at the start.  ours: the paper gives no architecture."""

    def __init__(self, text_dim: int = 0, width: int = 256):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU())
        self.text = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width)) if text_dim else None
        self.head = nn.Sequential(nn.Linear(width * (2 if text_dim else 1), width), nn.SiLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.head[-1].weight), nn.init.zeros_(self.head[-1].bias)

    def forward(self, t: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        """t (B,) in [0, 1], text (B, D) mean prompt embedding -> (B,)."""
        h = self.time(common.sinusoid(t))
        if self.text is not None:
            h = torch.cat([h, self.text(text)], 1)
        return self.head(h)[:, 0]


def main(args):
    # ---- setup ------------------------------------------------------------------------------------------------------
    run = common.setup(args, "vmpo")
    second_order = args.objective in ("gradient-xt", "gradient-gfn")
    common.second_order(second_order)
    policy = common.Policy(args, run)
    params = common.add_lora(policy, args)
    reward, more = rewards.load_args(args, run.device)
    grid = common.make_grid(policy.pipe.scheduler, policy.kind, args.steps, args.kernel, args.noise_level)
    steps = common.policy_steps(grid, args.train_steps)
    torch.manual_seed(args.seed)
    text_dim = policy.uncond.embeds.shape[-1] if args.mean == "time_prompt" else 0
    channels = policy.latent_shape[0]
    phi = nn.ModuleDict()  # what is learned beside the policy: M_phi, F_phi or G_phi
    if args.mean in ("time", "time_prompt") and args.objective == "vmpo":
        phi["mean"] = MeanNet(text_dim)
    if args.potential == "learned" and args.objective not in GRADIENT:
        phi["potential"] = common.FieldNet(channels)
    if args.objective == "gradient-gfn":
        phi["residual"] = common.FieldNet(channels)
    phi.to(run.device)
    learned = [(list(phi.parameters()), args.mean_lr, args.mean_max_grad_norm)] if len(phi) else []
    optimiser = common.Optimiser(args, run, params, *learned)
    spread = ("log_w/mean", "log_r/mean", "potential/mean")
    means = ["loss/total", "loss/theta", "loss/mean", "loss/kl", "kl/ref", *spread, "ratio/mean", "ratio/clip_frac"]
    tops = ["ratio/max", "ratio/start_deviation"]
    keys = [*means, *(key.replace("mean", "std") for key in spread), *tops, "grad/norm", "grad/norm_phi"]
    recorder = common.Recorder(run, args, policy, optimiser, reward, more, rewards.RewardError, keys, {"phi": phi})

    for epoch in recorder.epochs():
        # ---- 1 rollout ----------------------------------------------------------------------------------------------
        recorder.phase()
        batch = common.epoch_batch(policy, args, run, epoch)
        path = common.rollout(policy, grid, batch.cond, batch.prompts, batch.noise, args.cfg, args.micro_batch_size, steps, "rollout" if run.is_main else "")
        text = path.cond.mean_embedding()

        # ---- 2 reward -----------------------------------------------------------------------------------------------
        recorder.phase()
        grad_r = None
        with recorder.scoring(epoch):
            with torch.no_grad():
                final, parts = reward(policy.decode(path.x[:, -1]), batch.texts, batch.metadata, chunk=args.reward_batch_size)
                reward_t = final[:, None].expand(-1, grid.steps + 1).clone()  # (B, T+1); the last column is r(x_0)
                if args.potential != "r2g" and args.diff_reward == "rollout" and args.objective not in GRADIENT:
                    for i in range(min(steps[-1] + 2, grid.steps)):
                        x0_hat = grid.x0_hat(path.x[:, i], path.o_old[:, i], i)  # the sampler's own prediction
                        reward_t[:, i] = reward(policy.decode(x0_hat), batch.texts, batch.metadata, chunk=args.reward_batch_size)[0]
            if args.objective in GRADIENT:
                grad_r = reward_gradients(policy, reward, grid, path, batch.texts, batch.metadata, args)

        # ---- 3 potential --------------------------------------------------------------------------------------------
        beta = args.beta / min(1.0, (epoch + 1) / max(1, args.beta_warmup_epochs))
        if args.potential == "r2g":
            potential = r2g_potential(final, grid.steps, beta, args.r2g_scale)
        else:
            potential = diff_potential(reward_t, beta)
        potential = potential[:, steps]  # (B, S), S = trained steps
        baseline, k = None, args.group_size if args.mean == "group" else args.num_prompts * args.group_size
        if args.mean in ("group", "batch"):
            # ours: the Monte-Carlo mean is taken once, with theta_old (Eq. 33 allows it), so that a micro-batch need
            # not hold a whole group
            w = grid.at(grid.w, torch.arange(grid.steps), path.z[0])
            log_r_old = torch.stack([common.log_ratio((w * (r - o))[steps], z[steps], args.logprob_reduce)
                                     for r, o, z in zip(path.o_ref, path.o_old, path.z)])  # fmt: skip
            log_w_old = log_weights(log_r_old, potential)
            if args.mean == "group":
                baseline = log_w_old.view(-1, args.group_size, len(steps)).mean(1).repeat_interleave(args.group_size, 0)
            else:
                baseline = common.gather(log_w_old, run).mean(0).expand(len(log_w_old), -1)

        # ---- 4 update -----------------------------------------------------------------------------------------------
        recorder.phase()
        stats, norms, checked = common.Stats(means, tops), [], False
        column = torch.full((grid.steps,), -1)
        column[steps] = torch.arange(len(steps))
        rows_per_update = args.num_prompts * args.group_size * len(steps) / args.updates_per_epoch
        for update, part in enumerate(common.epoch_updates(args, run, steps, epoch)):
            for chunk in common.micro_batches(part, args.micro_batch_size, run, f"update {update + 1}"):
                n, i = chunk.unbind(1)
                x_t, z_old, o_old, o_ref = path.x[n, i], path.z[n, i], path.o_old[n, i], path.o_ref[n, i]
                # 4a: log R and log w of Eq. 1; moved = (mu_theta - mu_old) / sigma, z = (x_s - mu_theta) / sigma
                x_t.requires_grad_(second_order)
                o = policy.predict(x_t, grid.time(i, len(n), run.device), path.cond[n], args.cfg)
                w = grid.at(grid.w, i, o)
                moved = w * (o - o_old)
                z = z_old - moved
                log_r = common.log_ratio(w * (o_ref - o), z, args.logprob_reduce)
                log_p = common.log_ratio(moved, z_old, args.logprob_reduce)  # log p_theta - log p_old
                if update == 0 and not checked:
                    stats.top("ratio/start_deviation", common.check_start(moved, z_old, args, run, epoch))
                    checked = True
                if args.potential == "learned" and args.objective not in GRADIENT:
                    u = learned_potential(phi["potential"], path, grid, reward_t, n, i, beta)
                elif args.diff_reward == "train":
                    u = fresh_potential(policy, reward, grid, path, final, n, i, o, batch.prompts, beta, args)
                else:
                    u = potential[n, column[i]]
                log_w = log_weights(log_r, u)
                # 4b: the mean of log w
                if "mean" in phi:
                    mean = phi["mean"](grid.t[i].to(run.device), text[n] if text_dim else None)
                else:
                    mean = baseline[n, column[i]] if baseline is not None else torch.zeros_like(log_w)
                # 4c: the loss
                loss_mean = torch.zeros_like(log_w)
                if args.objective == "vmpo":
                    loss, regression = vmpo_loss(log_w, mean)
                    loss_mean = regression if "mean" in phi else loss_mean
                elif args.objective == "mc":
                    loss = mc_loss(log_w, mean, k)
                elif args.objective == "surrogate":
                    loss = surrogate_loss(log_w, mean, log_p, k)
                elif args.objective == "ppo":
                    loss = ppo_loss(log_w, mean, log_p, args.clip_range, k)
                elif args.objective == "db":
                    loss = db_loss(log_w)
                else:
                    loss = match_gradients(policy, grid, path, grad_r, phi, n, i, x_t, o, z, w, beta, args)
                # 4d: + KL, gradients
                kl_ref = common.kl_divergence(w * (o - o_ref), args.logprob_reduce)
                kl = common.kl_divergence(moved, args.logprob_reduce) if args.kl_anchor == "old" else kl_ref
                if args.kl_denom == "g2":
                    kl = kl * grid.dt[i].to(kl)
                row = loss + args.mean_coef * loss_mean + args.kl_coef * kl
                optimiser.backward(row.sum() / rows_per_update)
                ratio = log_p.exp()
                stats.add({
                    "loss/total": row, "loss/theta": loss, "loss/mean": loss_mean, "loss/kl": kl, "kl/ref": kl_ref,
                    "log_w/mean": log_w, "log_r/mean": log_r, "potential/mean": u, "ratio/mean": ratio,
                    "ratio/clip_frac": ((ratio - 1).abs() > args.clip_range).float(),
                })  # fmt: skip
                stats.top("ratio/max", ratio.max().item())
            norms.append(optimiser.step())  # 4d: all-reduce, clip, AdamW on theta and on phi

        # ---- 5 log, samples, checkpoint, eval -----------------------------------------------------------------------
        norm = torch.tensor(norms).mean(0).tolist()
        metrics = stats.result(run, std=spread) | dict(zip(("grad/norm", "grad/norm_phi"), norm))
        recorder.end_epoch(epoch, final, parts, metrics)
    recorder.finish()


# ---- pieces of the update that need the networks --------------------------------------------------------------------
def learned_potential(net, path, grid, reward_t, n, i, beta):
    """Diff with r_t replaced by F_phi(x_t, t) r_t, F_phi = 1 + nu_t net, so that F_phi = 1 at the data.  Eq. 45."""
    device = path.x.device
    nu = torch.cat([grid.nu, torch.zeros(1, dtype=torch.float64)]).to(device, torch.float32)
    t = torch.cat([grid.t, torch.zeros(1, dtype=torch.float64)]).to(device, torch.float32)

    def value(j):
        return (1 + nu[j] * net(path.x[n, j], t[j]).flatten(1).mean(1)) * reward_t[n, j]

    return (value(i + 1) - value(i)) / beta


@torch.no_grad()
def fresh_potential(policy, reward, grid, path, final, n, i, o, prompts, beta, args):
    """Diff with Tweedie rewards of the current theta (official code): one more network pass, two decodes, two rewards."""
    texts, extra = [prompts[j].text for j in n], [prompts[j].metadata for j in n]
    now = reward(policy.decode(grid.x0_hat(path.x[n, i], o, i)), texts, extra, chunk=args.reward_batch_size)[0]
    after = (i + 1).clamp(max=grid.steps - 1)
    x_s = path.x[n, i + 1]
    o_s = policy.predict(x_s, grid.time(after, len(n), x_s.device), path.cond[n], args.cfg)
    then = reward(policy.decode(grid.x0_hat(x_s, o_s, after)), texts, extra, chunk=args.reward_batch_size)[0]
    then = torch.where((i + 1 == grid.steps).to(then.device), final[n], then)
    return (then - now) / beta


def reward_gradients(policy, reward, grid, path, texts, extra, args):
    """grad_{x_t} r(x0_hat(x_t)) at every state of the trajectories, (B, T+1, C, h, w), through network, VAE and reward."""
    grads = torch.zeros_like(path.x)
    size = min(args.micro_batch_size, args.decode_batch_size)  # the graph of network, VAE and reward lives at once
    for start in range(0, len(path.x), size):
        rows = slice(start, start + size)
        for i in range(grid.steps + 1):
            x = path.x[rows, i].clone().requires_grad_()
            x0 = x  # the terminal latent is its own Tweedie estimate
            if i < grid.steps:
                x0 = grid.x0_hat(x, policy.predict(x, grid.time(i, len(x), x.device), path.cond[rows], args.cfg), i)
            total = reward(policy.decode(x0), texts[rows], extra[rows], grad=True)[0]
            grads[rows, i] = torch.autograd.grad(total.sum(), x)[0]
    return grads


def match_gradients(policy, grid, path, grad_r, phi, n, i, x_t, o, z, w, beta, args):
    """Eq. 52 (gradient), 53 (gradient-xt) or 54/55 (gradient-gfn), (B,).  Gradients of log p in closed form for x_s."""
    sigma = grid.at(grid.sigma, i, o)
    t_next = torch.cat([grid.t, torch.zeros(1, dtype=torch.float64)])[i + 1].to(o.device)
    grad_logp = -z / sigma  # with respect to x_s
    grad_logp_ref = grad_logp + w * (path.o_ref[n, i] - o) / sigma
    if args.objective == "gradient":
        return gradient_loss(grad_r[n, i + 1], grad_logp_ref, grad_logp, beta)
    back, back_ref = common.backward_scores(policy, grid, i, x_t, path.x[n, i + 1], o, path.cond[n], args.cfg)
    if args.objective == "gradient-xt":
        return gradient_loss(-grad_r[n, i], back_ref, back, beta)
    g_s, g_t = phi["residual"](path.x[n, i + 1], t_next), phi["residual"](x_t.detach(), grid.t[i].to(o.device))
    loss = gradient_loss(grad_r[n, i + 1], grad_logp_ref, grad_logp, beta, g_s)
    loss = loss + args.backward_coef * gradient_loss(-grad_r[n, i], back_ref, back, beta, -g_t)
    terminal = phi["residual"](path.x[n, -1], torch.zeros(len(n), device=o.device))
    return loss + (terminal**2).flatten(1).mean(1)


if __name__ == "__main__":
    common.run_main(main, parse_args, rewards.UsageError)
