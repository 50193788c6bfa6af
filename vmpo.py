"""VMPO: Variance Minimisation Policy Optimisation.
Paper: Ou et al., "Diffusion Alignment Beyond KL: Variance Minimisation as Effective
       Policy Optimiser", arXiv 2602.12229
Official code: github.com/SamsungLabs/VMPO (SD3.5, OCR)

Idea:  the denoiser is the proposal of a Sequential Monte Carlo sampler whose target at
       every step is the reference tilted by exp(reward / beta).  Its log importance
       weight log w is constant, hence of zero variance, exactly when the policy is that
       tilt, so VMPO minimises the variance of log w over the policy's own transitions.
       On-policy the gradient is that of KL(policy || tilt) (Proposition 1), and no
       ratio, group or clipping is needed.
Algorithm, one epoch (the loop below repeats the numbers):
  1 rollout     trajectories of theta_old; keep x_t, the draws z, the outputs o_old, o_ref
  2 reward      r(x_0); with Diff also r(x0_hat(x_t)), from the sampler's own predictions
  3 potential   u_t = r(x_0) / beta (R2G)
                or (r(x0_hat_s) - r(x0_hat_t)) / beta (Diff)                  Eq. 38-45
  4 update      for each transition, shuffled over samples and steps:
     4a         log R = log p_ref(x_s | x_t) - log p_theta(x_s | x_t);
                log w = log R + u_t                                           Eq. 1
     4b         M_phi(t, c), the running estimate of E[log w],
                or its Monte-Carlo mean                                       Eq. 7, 5
     4c         loss (log w - M_phi)^2, or a relative         Eq. 8, 5, 31, 32, 50-55
     4d         + lambda_KL * KL(p_theta || p_old);  AdamW on theta and phi   App. D
  5 log, checkpoint, evaluation with the same noise every time
Differs from the paper: (a) Eq. 5 lacks the square and mixes K and N; we use the unbiased
       variance.  (b) R2G: u_t = r / beta, not r / (T beta), whose optimum is the tilt at
       temperature T beta.  (c) The minus sign in Eq. 55's last term.  (d) M_phi is an MLP.
Differs from the official code: Tweedie rewards come from the rollout (theirs: from two more
       network passes per transition); KL to theta_old (theirs: to the reference, times dt).
Run:   python vmpo.py --preset tiny             # embedded model, CPU, minutes, no downloads
       python vmpo.py --preset sd15-hpsv2       # the paper's first experiment, one GPU
       torchrun --nproc-per-node 8 vmpo.py --preset sd15-hpsv2      # the same run on eight
Port:  copy diff_potential(), log_weights(), vmpo_loss(): tensors in, tensors out; see
       docs/port.md.  Details of the method: docs/vmpo.md
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: on a busy CPU, threads that spin on cost ten times

import torch
from torch import nn

import common
import harness
import rewards
from harness import need

GRADIENT = ("gradient", "gradient-xt", "gradient-gfn")
TINY = harness.TINY | dict(potential="r2g", mean="group", beta=0.1, kl_anchor="ref", kl_coef=0.3)
SD35 = dict(
    model="sd3.5-medium", reward="ocr", beta=0.1, steps=10, eval_steps=40, cfg=4.5, noise_level=0.7,
    lora_rank=32, lora_alpha=64, micro_batch_size=4, max_sequence_length=128,
    prompts="prompts/ocr_train.txt", eval_prompts="prompts/ocr_test.txt",
)  # fmt: skip
SD15 = "M_phi's form and eta = 1 are ours; the paper reports 100 prompts x 10 images"
PRESETS = {
    # Table 1: SD1.5, HPSv2 (v2.1), photo and painting prompts of HPDv2; App. D; the defaults
    "sd15-hpsv2": dict(eval_prompts="prompts/benchmark_ir.txt", note=SD15),
    # Table 2: SD1.5, ImageReward, DrawBench prompts (not redistributable: prompts/README.md)
    "sd15-imagereward": dict(
        reward="imagereward", beta=0.1, prompts="prompts/drawbench.txt", eval_prompts="prompts/benchmark_ir.txt",
        note=SD15,
    ),
    # Table 3: SD3.5-M, text rendering; App. D
    "sd35-ocr": SD35 | dict(
        dtype="bfloat16",
        note="beta and T5's 128 tokens are the code's, 150 epochs SD1.5's (not in the paper)",
    ),
    # the same with the official code's choices where they differ from the paper's
    "sd35-ocr-release": SD35 | dict(
        num_prompts=256, train_fraction=1.0, random_steps=9,
        beta_warmup_epochs=50, diff_reward="train", kl_anchor="ref", kl_denom="g2",
        mean_coef=0.01, mean_lr=3e-5, ema_decay=0.9, ema_every=1, dtype="float16",
        note="150 epochs (code: until stopped by hand), M_phi an MLP (code: a transformer), "
        "updates of transitions (code: of images), base stored in float16 (code: cast)",
    ),
    # the embedded models: coloured shapes on a CPU (ours; how these numbers were found: docs/vmpo.md)
    "tiny": TINY | dict(model="tiny-sd35", train_fraction=0.6, lr=4e-4, epochs=200),
    "tiny-sd15": TINY | dict(model="tiny-sd15", train_fraction=0.7, lr=1e-3, epochs=120),
}  # fmt: skip
METRICS = harness.Metrics(
    means=[
        "loss/total", "loss/theta", "loss/mean", "loss/kl", "kl/ref",
        "log_w/mean", "log_r/mean", "potential/mean", "ratio/mean", "ratio/clip_frac", "phi/net", "phi/reward",
    ],
    stds=("log_w/mean", "log_r/mean", "potential/mean"),
    tops=("ratio/max", "ratio/start_deviation"),
    more=("grad/norm", "grad/norm_phi"),
)  # fmt: skip


def parse_args(argv=None):
    parser = harness.make_parser(__doc__, "vmpo")
    flag = harness.flags(parser, "method")
    objectives = ["vmpo", "mc", "surrogate", "ppo", "db", *GRADIENT]
    flag("--objective", "vmpo", objectives, "Eq. 8, 5, 31, 32, 49/50 (detailed balance); by gradients: 52, 53, 54/55")
    flag("--potential", "diff", ["diff", "r2g", "learned"], "u_t: of Tweedie rewards (Eq. 40-44), Eq. 38/39, Eq. 45")
    flag("--beta", 0.01, "float > 0", "temperature of r / beta (paper: 0.01 HPSv2, 0.1 ImageReward, App. D)")
    means = ["time_prompt", "time", "group", "batch"]
    flag("--mean", "time_prompt", means, "M_phi: network of (t, c) (code), of t (Eq. 8); or a mean (Eq. 5)")
    flag("--r2g-scale", "1", ["1", "1/T"], "r2g: u = r / beta or r / (T beta), which aims at T beta (footnote 5)")
    flag("--diff-reward", "rollout", ["rollout", "train"], "diff: Tweedie rewards of the rollout, or of theta (code)")
    flag("--beta-warmup-epochs", 0, "int >= 0", "u_t times min(1, epoch / this), from 0; 0 = off (code: 50)")
    flag("--random-steps", 0, "int >= 0", "of the trained steps, drawn for each image; 0 = all (code: 9)")
    flag("--mean-lr", 3e-4, "float > 0", "learning rate of phi (paper: 3e-4, App. D; code: 3e-5)")
    flag("--mean-coef", 1.0, "float >= 0", "weight of phi's regression loss (paper: 1, Eq. 8; code: 0.01)")
    flag("--mean-max-grad-norm", 1.0, "float > 0 or inf", "phi's own gradient clipping (code: 1)")
    flag("--kl-coef", 1.0, "float >= 0", "lambda_KL of the step-wise KL regulariser (paper: 1, App. D)")
    flag("--kl-anchor", "old", ["old", "ref"], "KL to the rollout's policy (App. D) or to the reference (code)")
    flag("--kl-denom", "sigma2", ["sigma2", "g2"], "KL over 2 sigma_t^2 (exact) or 2 g_t^2, i.e. times dt (code)")
    flag("--clip-range", 1e-4, "float > 0", "xi of Eq. 32, for mean-reduced log-probs (Flow-GRPO: 1e-4)")
    harness.add_args(parser)
    return harness.parse(parser, PRESETS, argv, rewards, check, sizes)


# ---- method: pure functions of tensors ---------------------------------------
def r2g_potential(reward: torch.Tensor, steps: int, beta: float, scale: str = "1") -> torch.Tensor:
    """Return-to-go: u_t = r(x_0) / beta for every step, (B,) -> (B, T).  Eq. 38/39.

    ours: scale '1/T' divides by T, but '1' is the default: each local loss sees only
    its own log R, so that 1/T aims at temperature T beta.
    """
    u = reward / (beta if scale == "1" else steps * beta)
    return u[:, None].expand(-1, steps)


def diff_potential(reward_t: torch.Tensor, beta: float) -> torch.Tensor:
    """u_t = (r(x0_hat_s) - r(x0_hat_t)) / beta, (B, T+1) -> (B, T).  Eq. 40-44.

    reward_t: along the trajectory; its last column is the terminal reward r(x_0).
    The sum of u over the steps is (r(x_0) - r(x0_hat(x_T))) / beta.
    """
    return (reward_t[:, 1:] - reward_t[:, :-1]) / beta


def reward_ramp(epoch: int, epochs: int) -> float:
    """ref-code: u_t's factor, from 0 (log w is log R alone) to 1 after so many epochs."""
    return min(1.0, epoch / epochs) if epochs else 1.0


def log_weights(log_r: torch.Tensor, potential: torch.Tensor) -> torch.Tensor:
    """log w_t = log p_ref - log p_theta + u_t, (B,).  Eq. 1."""
    # mind the sign: log R is reference over policy, the opposite of a PPO ratio
    return log_r + potential


def vmpo_loss(log_w: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 8 split as theta's (log w - sg M)^2 and phi's (sg log w - M)^2, each (B,).

    ref-code: the split.  Their sum has the gradient of Eq. 8; without a 1/2, on-policy
    it is twice that of the KL.
    """
    return (log_w - mean.detach()) ** 2, (log_w.detach() - mean) ** 2


def mc_loss(log_w: torch.Tensor, mean: torch.Tensor, k: int) -> torch.Tensor:
    """Eq. 5, (B,), whose average over the k samples is their unbiased 1/2 Var(log w).

    paper: Eq. 5 as printed lacks the square.
    """
    return 0.5 * k / (k - 1) * (log_w - mean) ** 2


def surrogate_loss(log_w: torch.Tensor, mean: torch.Tensor, logp: torch.Tensor, k: int) -> torch.Tensor:
    """Eq. 31, (B,): -sg[A] log p_theta with A = log w - mean; the same gradient as Eq. 5."""
    return -k / (k - 1) * (log_w - mean).detach() * logp


def ppo_loss(log_w, mean, log_ratio, clip_range: float, k: int) -> torch.Tensor:
    """Eq. 32/33, (B,), to be minimised: the surrogate with a clipped ratio p_theta / p_old."""
    adv, ratio = (log_w - mean).detach(), log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -k / (k - 1) * torch.minimum(ratio * adv, clipped * adv)


def db_loss(log_w: torch.Tensor) -> torch.Tensor:
    """GFlowNet detailed balance, (B,): (log w)^2 with nothing subtracted.  Eq. 49/50."""
    return log_w**2


def gradient_loss(grad_reward, grad_logp_ref, grad_logp, beta: float, residual=0.0) -> torch.Tensor:
    """|| grad r / beta + residual + grad log p_ref - grad log p_theta ||^2 per scalar, (B,).

    Eq. 52, 54.  For the gradients with respect to x_t (Eq. 53, 55) pass -grad_reward and
    -residual: there the reward of the state that is left, not of the one that is reached,
    enters.  paper: Eq. 55 prints + before its residual.
    """
    error = grad_reward / beta + residual + grad_logp_ref - grad_logp
    return (error**2).flatten(1).mean(1)


class MeanNet(nn.Module):
    """M_phi(t) or M_phi(t, c) of Eq. 7/8, float32, 0 at the start.

    ours: the paper gives no architecture.
    """

    def __init__(self, text_dim: int = 0, width: int = 256):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU())
        self.text, inner = None, width
        if text_dim:
            inner = 2 * width
            self.text = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.head = nn.Sequential(nn.Linear(inner, width), nn.SiLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.head[-1].weight), nn.init.zeros_(self.head[-1].bias)

    def forward(self, t: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        """t (B,) in [0, 1], text (B, D) mean prompt embedding -> (B,)."""
        h = self.time(common.sinusoid(t))
        if self.text is not None:
            h = torch.cat([h, self.text(text)], 1)
        return self.head(h)[:, 0]


def main(args):
    # ---- setup ---------------------------------------------------------------
    second_order = args.objective in ("gradient-xt", "gradient-gfn")
    common.second_order(second_order)
    run, policy, theta, (reward, more) = harness.start(args, "vmpo", rewards)
    grid = policy.grid(args.steps, args.kernel, args.noise_level)
    steps = common.policy_steps(grid, args.train_steps)
    if args.objective not in GRADIENT:  # log w is a multiplier of z, as A is
        harness.write_influence(run, steps, grid.o_coef.abs())
    phi = learned_networks(policy, args)
    learned = [(list(phi.parameters()), args.mean_lr, args.mean_max_grad_norm)]
    optimiser = harness.make_optimiser(args, run, theta, *(learned if len(phi) else []))
    scorers = reward, more
    recorder = harness.Recorder(run, args, policy, optimiser, scorers, rewards.RewardError, METRICS, {"phi": phi})
    transitions = args.num_prompts * args.group_size * min(args.random_steps or len(steps), len(steps))

    for epoch in recorder.epochs():
        # ---- 1 rollout -------------------------------------------------------
        recorder.phase()
        batch = harness.epoch_batch(args, policy, epoch)
        path = common.rollout(policy, grid, batch.cond, batch.noise, args.cfg, args.micro_batch_size, steps)

        # ---- 2 reward --------------------------------------------------------
        recorder.phase()
        grad_r, ramp = None, reward_ramp(epoch, args.beta_warmup_epochs)
        with recorder.scoring(epoch):
            final, parts = harness.score(args, policy, reward, path.x[:, -1], batch.prompts)
            reward_t = tweedie_rewards(policy, reward, grid, path, final, batch, steps, args)
            if args.objective in GRADIENT:
                grad_r = reward_gradients(policy, reward, grid, path, batch, args).mul_(ramp)
        recorder.leave_out(epoch, batch, final, reward_t)

        # ---- 3 potential -----------------------------------------------------
        if args.potential == "r2g":
            potential = r2g_potential(final, grid.steps, args.beta, args.r2g_scale)
        else:
            potential = diff_potential(reward_t, args.beta)
        potential = ramp * potential[:, steps]  # (B, S), S = trained steps
        monte_carlo = None
        if args.mean in ("group", "batch"):
            # ours: taken once, with theta_old (Eq. 33 allows it), so that a micro-batch need
            # not hold a whole group
            log_r_old = path.log_ref_over_old(grid, steps, args.logprob_reduce)
            monte_carlo = monte_carlo_mean(log_weights(log_r_old, potential), args)

        # ---- 4 update --------------------------------------------------------
        recorder.phase()
        stats, norms = recorder.stats(epoch), []
        column = torch.full((grid.steps,), -1)  # of `potential` and `monte_carlo`, by step
        column[steps] = torch.arange(len(steps))
        updates = harness.epoch_updates(args, batch, steps, epoch, args.random_steps)
        for update, part in enumerate(updates):
            for chunk in common.micro_batches(part, args.micro_batch_size, f"update {update + 1}"):
                rows = path.rows(*chunk.unbind(1))
                n, i = rows.n, rows.i
                # 4a: log R and log w of Eq. 1
                x_t = rows.x_t.requires_grad_(second_order)
                o = policy.predict(x_t, grid.time(i, x_t), rows.cond, args.cfg)
                w = grid.at(grid.w, i, o)
                moved = w * (o - rows.o_old)  # (mu_theta - mu_old) / sigma
                z = rows.z - moved  # (x_s - mu_theta) / sigma
                log_r = common.log_ratio(w * (rows.o_ref - o), z, args.logprob_reduce)
                log_p = common.log_ratio(moved, rows.z, args.logprob_reduce)  # theta over old
                if update == 0:
                    stats.check_start(moved, rows.z)
                if "potential" in phi:
                    u = learned_potential(phi["potential"], path, grid, ramp * reward_t, n, i, args.beta)
                elif args.diff_reward == "train":
                    u = ramp * fresh_potential(policy, reward, grid, path, final, rows, o, batch, args)
                else:
                    u = potential[n, column[i]]
                log_w = log_weights(log_r, u)
                # 4b: the mean of log w
                mean = torch.zeros_like(log_w) if monte_carlo is None else monte_carlo[n, column[i]]
                if "mean" in phi:
                    text = rows.cond.mean_embedding() if args.mean == "time_prompt" else None
                    mean = phi["mean"](grid.t[i].to(run.device), text)
                # 4c: the loss
                if args.objective in GRADIENT:
                    loss = match_gradients(policy, grid, path, grad_r, phi, rows, o, z, w, args)
                    loss_mean = torch.zeros_like(loss)
                else:
                    loss, loss_mean = variance_loss(log_w, mean, log_p, args)
                # 4d: + KL, gradients
                kl = kl_ref = common.kl_divergence(w * (o - rows.o_ref), args.logprob_reduce)
                if args.kl_anchor == "old":  # 0 in the first update, which still is at theta_old
                    kl = common.kl_divergence(moved, args.logprob_reduce)
                if args.kl_denom == "g2":
                    kl = kl * grid.dt[i].to(kl)
                total = loss + args.mean_coef * loss_mean + args.kl_coef * kl
                # micro-batches and processes add up to the mean over the update's transitions
                optimiser.backward(total.sum() / (transitions / args.updates_per_epoch))
                ratio = log_p.exp()
                outside = (ratio - 1).abs() > args.clip_range
                stats.add({
                    "loss/total": total, "loss/theta": loss, "loss/mean": loss_mean,
                    "loss/kl": kl, "kl/ref": kl_ref,
                    "log_w/mean": log_w, "log_r/mean": log_r, "potential/mean": u,
                    "ratio/mean": ratio, "ratio/clip_frac": outside.float(),
                }, i)  # fmt: skip
                stats.top("ratio/max", ratio.max().item())
                if "potential" in phi or "residual" in phi:
                    stats.add(learned_size(phi, path, grid, reward_t, grad_r, n, i, args.beta))
            norms.append(optimiser.step())  # 4d: all-reduce, clip, AdamW on theta and on phi

        # ---- 5 log, samples, checkpoint, eval --------------------------------
        del batch, path, grad_r  # what follows needs the room
        norm = torch.tensor(norms).mean(0).tolist()
        recorder.end_epoch(epoch, final, parts, stats.result() | dict(zip(METRICS.more, norm)))
    recorder.finish()


# ---- pieces that need the networks or the flags ------------------------------
def learned_networks(policy, args) -> nn.ModuleDict:
    """What is learned beside the policy: M_phi ("mean"), F_phi ("potential") or G_phi ("residual")."""
    torch.manual_seed(args.seed)
    text_dim = policy.uncond.embeds.shape[-1] if args.mean == "time_prompt" else 0
    channels, phi = policy.latent_shape[0], nn.ModuleDict()
    if args.mean in ("time", "time_prompt") and args.objective == "vmpo":
        phi["mean"] = MeanNet(text_dim)
    if args.potential == "learned" and args.objective not in GRADIENT:
        phi["potential"] = common.FieldNet(channels)
    if args.objective == "gradient-gfn":
        phi["residual"] = common.FieldNet(channels)
    return phi.to(policy.device)


def monte_carlo_mean(log_w: torch.Tensor, args) -> torch.Tensor:
    """The mean of log w (B, S) over the prompt's samples or all, per step and for each sample.

    Eq. 5; groups lie within a process, "batch" is over all processes.
    """
    if args.mean == "group":
        k = args.group_size
        return log_w.view(-1, k, log_w.shape[1]).mean(1).repeat_interleave(k, 0)
    every = common.gather(log_w)
    return every[~every.isnan().any(1)].mean(0).expand(len(log_w), -1)  # nan: left out


def variance_loss(log_w, mean, log_p, args) -> tuple[torch.Tensor, torch.Tensor]:
    """--objective, apart from gradient matching: theta's loss and phi's (0 without M_phi), (B,)."""
    k = args.group_size if args.mean == "group" else args.num_prompts * args.group_size  # K of Eq. 5
    none = torch.zeros_like(log_w)
    if args.objective == "mc":
        return mc_loss(log_w, mean, k), none
    if args.objective == "surrogate":
        return surrogate_loss(log_w, mean, log_p, k), none
    if args.objective == "ppo":
        return ppo_loss(log_w, mean, log_p, args.clip_range, k), none
    if args.objective == "db":
        return db_loss(log_w), none
    loss, regression = vmpo_loss(log_w, mean)
    return loss, regression if args.mean in ("time", "time_prompt") else none


@torch.no_grad()
def tweedie_rewards(policy, reward, grid, path, final, batch, steps, args) -> torch.Tensor:
    """r(x0_hat(x_t)) along the trajectories, (B, T+1); the last column is r(x_0).

    From the sampler's own predictions: no network call.  Only the states of trained steps
    and their ends are scored; elsewhere, and where none is needed, r(x_0) stands.
    """
    reward_t = final[:, None].expand(-1, grid.steps + 1).clone()
    if args.potential == "r2g" or args.diff_reward == "train" or args.objective in GRADIENT:
        return reward_t
    for i in range(min(steps[-1] + 2, grid.steps)):
        x0_hat = grid.x0_hat(path.x[:, i], path.o_old[:, i], i)
        reward_t[:, i], _ = harness.score(args, policy, reward, x0_hat, batch.prompts)
    return reward_t


def learned_potential(net, path, grid, reward_t, n, i, beta):
    """Diff with F_phi(x_t, t) r_t for r_t, F_phi = 1 + nu_t net, which is 1 at the data.  Eq. 45."""
    t, nu = (table.to(reward_t) for table in (grid.t_all, torch.cat([grid.nu, torch.zeros(1)])))

    def value(j):
        return (1 + nu[j] * net(path.state(n, j), t[j]).flatten(1).mean(1)) * reward_t[n, j]

    return (value(i + 1) - value(i)) / beta


@torch.no_grad()
def learned_size(phi, path, grid, reward_t, grad_r, n, i, beta) -> dict[str, torch.Tensor]:
    """How large the learned part is, and what it is added to, each (R,): (F_phi - 1) r_t / beta and
    r_t / beta, or the norms of G_phi(x_s) and grad r / beta."""
    if "potential" in phi:
        t, own = grid.t[i].to(path.x), reward_t[n, i] / beta
        net = grid.nu[i].to(t) * phi["potential"](path.x[n, i], t).flatten(1).mean(1) * own
        return {"phi/net": net.abs(), "phi/reward": own.abs()}
    net = phi["residual"](path.x[n, i + 1], grid.t_all[i + 1].to(path.x))
    norms = (value.flatten(1).norm(dim=1) for value in (net, grad_r[n, i + 1] / beta))
    return dict(zip(("phi/net", "phi/reward"), norms))


@torch.no_grad()
def fresh_potential(policy, reward, grid, path, final, rows, o, batch, args):
    """Diff with Tweedie rewards of the current theta, (B,).

    ref-code: costs one more network pass, two decodes and two rewards per transition.
    """
    n, i = rows.n, rows.i
    prompts = [batch.prompts[j] for j in n]
    x_s, after = path.state(n, i + 1), (i + 1).clamp(max=grid.steps - 1)
    o_s = policy.predict(x_s, grid.time(after, x_s), rows.cond, args.cfg)
    now, then = (
        harness.score(args, policy, reward, x0_hat, prompts)[0]
        for x0_hat in (grid.x0_hat(rows.x_t, o, i), grid.x0_hat(x_s, o_s, after))
    )
    then = torch.where((i + 1 == grid.steps).to(then.device), final[n], then)
    return (then - now) / args.beta


def reward_gradients(policy, reward, grid, path, batch, args):
    """grad_{x_t} r(x0_hat(x_t)) at every state, (B, T+1, C, h, w)."""
    grads = torch.zeros_like(path.x, device=policy.device)
    # the graph of network, VAE and reward lives at once
    size = min(args.micro_batch_size, args.decode_batch_size)
    for rows in (slice(start, start + size) for start in range(0, len(path.x), size)):
        for i in range(grid.steps + 1):
            x = path.state(rows, i).clone().requires_grad_()
            x0 = x  # the terminal latent is its own Tweedie estimate
            if i < grid.steps:
                o = policy.predict(x, grid.time(i, x), path.cond[rows], args.cfg)
                x0 = grid.x0_hat(x, o, i)
            total = reward(policy.decode(x0), batch.texts[rows], batch.metadata[rows], grad=True)[0]
            grads[rows, i] = torch.autograd.grad(total.sum(), x)[0]
    return grads


def match_gradients(policy, grid, path, grad_r, phi, rows, o, z, w, args):
    """Eq. 52 (gradient), 53 (gradient-xt) or 54/55 (gradient-gfn), (B,)."""
    n, i, x_t, beta = rows.n, rows.i, rows.x_t, args.beta
    sigma = grid.at(grid.sigma, i, o)
    grad_logp = -z / sigma  # with respect to x_s, where it is known in closed form
    grad_logp_ref = grad_logp + w * (rows.o_ref - o) / sigma
    if args.objective == "gradient":
        return gradient_loss(grad_r[n, i + 1], grad_logp_ref, grad_logp, beta)
    x_s = path.state(n, i + 1)
    back, back_ref = common.backward_scores(policy, grid, i, x_t, x_s, o, rows.cond, args.cfg)
    if args.objective == "gradient-xt":
        return gradient_loss(-grad_r[n, i], back_ref, back, beta)
    t = grid.t_all.to(o.device)
    g_s, g_t = phi["residual"](x_s, t[i + 1]), phi["residual"](x_t.detach(), t[i])
    loss = gradient_loss(grad_r[n, i + 1], grad_logp_ref, grad_logp, beta, g_s)
    loss = loss + gradient_loss(-grad_r[n, i], back_ref, back, beta, -g_t)
    terminal = phi["residual"](path.state(n, -1), torch.zeros(len(n), device=o.device))
    return loss + (terminal**2).flatten(1).mean(1)


# ---- what no paper mentions: checks of the flags, sizes for --dry-run --------
def check(args):
    samples, objective, mean = args.num_prompts * args.group_size, args.objective, args.mean
    sampled, gradient, fresh = mean in ("group", "batch"), objective in GRADIENT, args.diff_reward == "train"
    many = f"--random-steps {args.random_steps} is more than the {args.train_steps} trained steps"
    need(args.random_steps <= args.train_steps, many, "use fewer, or a larger --train-fraction")
    harness.check_updates(args, samples * (args.random_steps or args.train_steps))
    need(mean != "batch" or samples > 1, "--mean batch needs two samples", "raise --num-prompts or --group-size")
    few = f"--mean group needs two or more images per prompt, --group-size is {args.group_size}"
    need(mean != "group" or args.group_size > 1, few, "use 2 or more, or --mean time_prompt")
    form = f"--objective {objective} is a Monte-Carlo form (Eq. 5) and --mean {mean} is a network"
    need(objective not in ("mc", "surrogate", "ppo") or sampled, form, "use --mean group or batch")
    fixed = f"--diff-reward train does not go with --objective {objective}"
    need(not fresh or not gradient and objective != "db", fixed, "leave it at rollout")
    need(not fresh or args.potential == "diff", f"--diff-reward train needs --potential diff, not {args.potential}")
    late = f"a u_t that changes during the update does not go with --mean {mean}, which is taken before it"
    need(not sampled or not fresh and args.potential != "learned", late, "use --mean time_prompt")
    fixed = "--skip-failed needs rewards that are known before the update and have no gradient"
    need(not args.skip_failed or not gradient and not fresh, fixed, "leave it out")
    flow = f"--kl-denom g2 needs a flow model (g_t of its SDE), --model {args.model} is not one"
    need(args.kl_denom != "g2" or args.kind == "flow", flow, "use sigma2")
    both = f"--objective {objective} differentiates by x_t, through both branches of the guidance"
    need(not gradient or not args.detach_uncond, both, "leave --detach-uncond out")
    apart = f"--reward {args.reward} compares a prompt's images, --diff-reward train and gradients take them singly"
    singly = fresh or gradient
    need(not singly or not rewards.is_grouped(args.reward), apart, "use --objective vmpo, --diff-reward rollout")
    for name, _ in rewards.parse_spec(args.reward) if gradient else ():
        what = f"--objective {objective} needs a differentiable reward and {name} is not one"
        own = f"if gradients pass, set {name.partition(':')[2]}.differentiable = True in its module"
        need(rewards.is_differentiable(name), what, own if ":" in name else "use e.g. clipscore, hpsv2 or imagereward")
    if objective == "ppo":
        harness.warn_of_clip_range(args)


def sizes(args) -> dict[str, str]:
    """The lines of --dry-run."""
    samples, passes = args.num_prompts * args.group_size, harness.network_passes(args, args.cfg)
    rows, gradient = samples * (args.random_steps or args.train_steps), args.objective in GRADIENT
    along = args.potential != "r2g" and args.diff_reward == "rollout" and not gradient
    scored = samples * (1 + along * min(args.train_steps + 1, args.steps) + gradient * (args.steps + 1))
    scored += 2 * rows * args.inner_epochs * (args.diff_reward == "train")
    reference = samples * args.train_steps * passes
    calls = f"{samples * args.steps * passes} in the rollout, {reference} of the reference"
    lines = {}
    if gradient:
        usual, own = samples * (4 * args.steps + 1), samples * (args.steps + 1)
        what = "states, noise, two outputs, gradients"
        lines["reward gradients per epoch"] = f"{own} images"
        lines["memory for the rollout"] = harness.rollout_memory(args, usual + own, what, usual)
    if args.objective in ("gradient-xt", "gradient-gfn"):
        lines[harness.UNKNOWN] = "the second derivative keeps whole attention matrices"
    return lines | {
        "network evaluations per epoch": f"{calls}, {rows * args.inner_epochs * passes} with gradient",
        "decodes and reward evaluations per epoch": f"{scored} images",
        "transitions per epoch": f"{rows}, {rows // args.updates_per_epoch} per update",
    }


if __name__ == "__main__":
    harness.run_main(main, parse_args, rewards.UsageError)
