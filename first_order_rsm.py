"""First-order RSM: VGG-Flow, Residual nabla-DB and SQDF with differentiable rewards, and their redesigns.
Papers: Lee et al., "Reward Score Matching", arXiv 2604.17415 (github.com/jaylee2000/rsm);
       VGG-Flow, 2512.05116 (github.com/lzzcd001/vggflow);  Residual nabla-DB, 2412.07775
       (github.com/lzzcd001/nabla-gfn);  SQDF (code only: github.com/Shin-woocheol/SQDF)

Idea:  the optimal policy's score is the reference's plus grad V / beta.  A differentiable reward
       lends its own gradient to grad V, and training is a regression of the denoiser on
       "reference + weight x gradient".  The methods differ in where the gradient is taken, in its
       weight over time and in the weight of the squared error.  RSM: the networks they add do next
       to nothing; one gradient per image, at its end, and a weight that does not vanish on the
       noisy side do better.
Algorithm, one epoch (the loop below repeats the numbers):
  1 rollout   ODE (VGG-Flow) or SDE trajectories of theta_old; keep x_t, x_s, o_old
  2 reward    r(x_0)
  3 guidance  of the trained steps of each image (SQDF: of trajectories drawn from a buffer): o_ref and
              g = grad r at x0_hat(x_t) (current), x0_hat(x_s) (lookahead; Eq. 13, 14), x_0 (terminal)
  4 update    for each transition, shuffled over images and steps:
     4a       push = scale eta_t g, the norm of g clipped at a running quantile
     4b       VGG-Flow     mean ||o - o_ref + push||^2                                     Eq. 84-88
              Residual-DB  mean ||(mu - mu_ref) / sigma^2 - push||^2, or times sigma^2     Eq. 76-78
              SQDF         -eta_t r(x0_hat(x_s)) + alpha mean ||mu - mu_ref||^2 / sigma^2  Eq. 79-83
              + the backward term, if asked                                                Eq. 67-75
     4c       + lambda mean ||o - o_old||^2;  AdamW
  5 log, checkpoint, evaluation with the same noise every time
Differs from the papers: SQDF's reward is linearised at the rollout's x_s, exact in its first update.
       From public code: quantiles are over all processes; SQDF's KL is kept where r <= 0; the
       prompt of a gradient is its own sample's.
Run:   python first_order_rsm.py --preset tiny            # embedded model, CPU, minutes, no downloads
       python first_order_rsm.py --preset rsm-sd15-hpsv2
Port:  copy the functions under "method": tensors in, tensors out; see docs/port.md.
       Details of the methods: docs/first_order_rsm.md
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: on a busy CPU, threads that spin on cost ten times

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import common
import harness
import rewards
from harness import need

AHEAD = dict(guidance="lookahead", jacobian=True)
METHODS = {  # the papers' choices
    "vgg-flow": dict(guidance="current", temporal="quad", scale=3e7, jacobian=False, denoiser="policy"),
    "residual-db": AHEAD | dict(temporal="alpha-bar", scale=5e5, denoiser="policy"),
    "sqdf": AHEAD | dict(temporal="gamma-discount", scale=1.0, denoiser="reference"),
}
OWNERS = {  # of a flag that one method alone understands
    "residual_scale": "residual-db", "flow_net": "residual-db", "backward_coef": "residual-db",
    "value_net": "vgg-flow", "lookahead_model": "sqdf", "replay_size": "residual-db and sqdf",
}  # fmt: skip
TINY = harness.TINY | dict(
    reward="clipscore", reward_path=[str(harness.HERE / "tiny" / "clip")],
    eval_rewards="shapes,shapes-strict", num_prompts=16, group_size=1, guidance_quantile=0.0,
    lr=4e-3, epochs=120,
)  # fmt: skip
RSM = dict(
    reward="hpsv2", prompts="prompts/geneval_train_prompts.txt", group_size=1, cfg=5.0,
    lora_rank=8, lora_alpha=8, dtype="bfloat16",
)  # fmt: skip
FLOW = RSM | dict(
    model="sd3.5-medium", method="vgg-flow", num_prompts=32, steps=20, resolution=1024,
    tiny_vae="madebyollin/taesd3", lora_targets="to_q,to_k,to_v,to_out.0",
    detach_uncond=True, train_fraction=1.0, updates_per_epoch=1, lr=5e-4, weight_decay=1e-2,
    epochs=200, micro_batch_size=4,
    note="logged rewards are those of the full decoder, TAESD3 is for the gradient only (theirs: for both)",
)  # fmt: skip
NO_CLIP = dict(guidance_clip=float("inf"), guidance_quantile=0.0)
DIFFUSION = RSM | NO_CLIP | dict(
    model="sd15", method="residual-db", num_prompts=256, steps=50, step_every=5,
    updates_per_epoch=2, old_coef=100.0, scale=5e5, lr=1e-3, epochs=100,
    eval_prompts="prompts/geneval_official.jsonl", eval_kernel="same", eval_every=25,
    note="g is that of the rollout's weights in both updates (theirs: of the moment's, the same in "
         "update 1), through a float32 decoder (bfloat16)",
)  # fmt: skip
LINEAR = dict(guidance="terminal", temporal="linear")  # the redesigns: flow
SIGMA = dict(guidance="terminal", temporal="constant", residual_scale="sigma")  # diffusion
PRESETS = {
    # RSM's flow experiment: the pruned baseline and the redesign
    "vgg-flow-sd35-hpsv2": FLOW | dict(scale=3e7),
    "rsm-sd35-hpsv2": FLOW | LINEAR | dict(scale=1.5e7),
    # RSM's diffusion experiment: the pruned baseline and the redesign
    "residual-db-sd15-hpsv2": DIFFUSION,
    "rsm-sd15-hpsv2": DIFFUSION | SIGMA | dict(
        lr=4e-3, eval_every=0,
        note="sigma_t is that of the step, 20 of 1000 training steps long (theirs, by a bug, of 19: 0.98 "
             "to 1.2 times it); float32 decoder (bfloat16)",
    ),
    # SQDF as released: 64 images join the buffer of 1024, 64 of these are trained, one step of each
    "sqdf-sd15-aesthetic": NO_CLIP | dict(
        model="sd15", method="sqdf", reward="aesthetic", prompts="prompts/simple_animals.txt",
        num_prompts=64, group_size=1, step_every=50, last_step=False, replay_size=1024,
        updates_per_epoch=1, lr=1e-3, epochs=2000, dtype="float16", save_every=100,
        note="the look-ahead is the reference with guidance, as no LCM weights are named (theirs: "
             "--lookahead-model, SD1.5 with LCM-LoRA), the KL is kept where r <= 0, and the aesthetic "
             "model's input is normalised once (twice)",
    ),
    # the embedded models: coloured shapes on a CPU, rewarded by a small CLIP (ours)
    "tiny": TINY | LINEAR | dict(model="tiny-sd35", method="vgg-flow", scale=75.0),
    "tiny-sd15": TINY | SIGMA | dict(
        model="tiny-sd15", method="residual-db", scale=50.0, train_fraction=0.9, lr=1e-3
    ),
}  # fmt: skip
METRICS = harness.Metrics(
    means=[
        "loss/total", "loss/guidance", "loss/old", "loss/net", "kl/ref", "drift/mean",
        "guidance/norm", "guidance/clip_frac", "push/reward", "push/net",
    ],
    more=("guidance/limit", "grad/norm", "grad/norm_phi"),
)  # fmt: skip


def parse_args(argv=None):
    parser = harness.make_parser(__doc__, "first_order_rsm")
    flag = harness.flags(parser, "method")
    flag("--method", "residual-db", list(METHODS), "the regression; sets what is auto or empty below")
    places = ["auto", "current", "lookahead", "terminal"]
    flag("--guidance", "auto", places, "r's gradient at x0_hat(x_t), x0_hat(x_s) (Eq. 13, 14) or x_0 (RSM)")
    kinds = ["auto", "quad", "linear", "constant", "alpha-bar", "sigma", "gamma-discount"]
    flag("--temporal", "auto", kinds, "eta_t: (1-t)^2, 1-t, 1, alpha_s^2, sigma_t, gamma^(steps left)")
    flag("--gamma", 0.9, "float in (0, 1]", "gamma_q of gamma-discount (SQDF: 0.9)")
    flag("--scale", None, "float > 0", "1 / beta (RSM: 3e7 vgg-flow, 5e5 residual-db; SQDF: 1)")
    flag("--alpha", 2.0, "float > 0", "sqdf: weight of the KL (SQDF: 2.0 aesthetic, 0.005 HPS)")
    flag("--residual-scale", "none", ["none", "sigma"], "residual-db: times sigma_t (RSM, diffusion)")
    flag("--old-coef", 0.0, "float >= 0", "lambda of mean ||o - o_old||^2 (Residual-DB, RSM: 100)")
    flag("--jacobian", None, "yes/no", "g through the denoiser as well; default: not for vgg-flow")
    flag("--denoiser", "auto", ["auto", "policy", "reference"], "whose x0_hat (SQDF: frozen)")
    flag("--lookahead-model", "", "text", "sqdf: a frozen one-step denoiser (SQDF)", metavar="PATH")
    flag("--step-every", 1, "int >= 1", "trains one step of each N (RSM, diffusion: 5); 1 = all")
    flag("--last-step", True, "yes/no", "and the last trained step always (RSM; SQDF: no)")
    flag("--guidance-clip", 1.0, "float > 0 or inf", "limit of g's norm, first update (VGG-Flow: 1; others: inf)")
    flag("--guidance-quantile", 0.8, "float in [0, 1)", "later limits: of the norms (VGG-Flow: 0.8); 0 = fixed")
    flag("--value-net", False, "yes/no", "vgg-flow: learned part of the value gradient (RSM: useless)")
    flag("--value-terminal", 1e3, "float >= 0", "weight of its terminal loss (VGG-Flow: 1e3)")
    flag("--flow-net", False, "yes/no", "residual-db: learned part of the guidance (RSM: useless)")
    flag("--net-lr", 1e-3, "float > 0", "learning rate of either network (ours)")
    flag("--backward-coef", 0.0, "float >= 0", "residual-db: backward term (paper: 1; RSM: unstable)")
    flag("--replay-size", 0, "int >= 0", "trains on a buffer's trajectories (SQDF: 1024 aesthetic, 4096 HPS)")
    flag("--tiny-vae", "", "text", "an AutoencoderTiny for the gradient (RSM, flow)", metavar="PATH")
    harness.add_args(parser)
    parser.set_defaults(num_prompts=64, group_size=1, updates_per_epoch=1)
    return harness.parse(parser, PRESETS, argv, rewards, check, sizes)


# ---- method: pure functions of tensors ---------------------------------------
def temporal_weight(kind: str, grid: common.Grid, gamma: float) -> torch.Tensor:
    """eta_t of every step, (T,) float64."""
    left = torch.arange(grid.steps - 1, -1, -1, dtype=torch.float64)
    return {
        "quad": (1 - grid.t) ** 2,
        "linear": 1 - grid.t,
        "constant": torch.ones_like(grid.t),
        "alpha-bar": grid.alpha_s**2,
        "sigma": grid.sigma,
        "gamma-discount": gamma**left,
    }[kind]


def weight_of_start(kind: str, grid: common.Grid, eta, gamma: float) -> torch.Tensor:
    """eta of the states x_t, (T,): that of the step into them; of x_T by the formula itself."""
    own = {"alpha-bar": grid.alpha[0] ** 2, "gamma-discount": eta[0] * gamma}
    return torch.cat([own.get(kind, eta[0]).view(1), eta[:-1]])


def clip_norm(g: torch.Tensor, limit: float) -> torch.Tensor:
    """g (B, ...) with every sample's norm at most `limit`."""
    norm = g.flatten(1).norm(dim=1).clamp(min=1e-12)
    return g * (limit / norm).clamp(max=1.0).view(-1, *[1] * (g.ndim - 1))


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B,): mean over the latent's scalars, as in all public code."""
    return (x**2).flatten(1).mean(1)


def vgg_loss(o, o_ref, push) -> torch.Tensor:
    """mean ||o - (o_ref - push)||^2, (B,).  Eq. 87-88.  Minus: a velocity points away from x_0."""
    return mean_square(o - o_ref + push)


def db_loss(drift, push, sigma, residual_scale: str) -> torch.Tensor:
    """mean ||drift / sigma - push||^2, (B,), drift = (mu_theta - mu_ref) / sigma.  Eq. 76-78.

    'sigma': times sigma^2, so that steps of small sigma do not outweigh all others.
    """
    error = drift / sigma - push if residual_scale == "none" else drift - sigma * push
    return mean_square(error)


def backward_loss(back, back_ref, push_t, sigma, residual_scale: str) -> torch.Tensor:
    """mean ||grad log p_ref - grad log p_theta - push_t||^2, (B,), gradients in x_t.  Eq. 67-75.

    The other half of Residual-DB's balance; push_t = scale eta g at x_t (+ the flow network).
    """
    error = back_ref - back - push_t
    return mean_square(error if residual_scale == "none" else sigma * error)


def sqdf_loss(mu, push, drift, alpha: float) -> torch.Tensor:
    """-<push, mu_theta> + alpha mean ||drift||^2, (B,).  Eq. 79-83.

    At theta_old it has the gradient of -eta r(x0_hat(mu_theta + sigma z)) + the KL, without the
    chain through denoiser, decoder and reward in every update.
    """
    return -(push * mu).flatten(1).sum(1) + alpha * mean_square(drift)


def influence(method: str, grid: common.Grid, eta, residual_scale: str) -> torch.Tensor:
    """h_t (T,) up to a constant: the weight of g in the gradient with respect to o.  Eq. 21-23."""
    if method == "vgg-flow":
        return eta
    if method == "residual-db":
        return eta * grid.w.abs() * (1 / grid.sigma if residual_scale == "none" else grid.sigma)
    return eta * grid.o_coef.abs()


def main(args):
    # ---- setup ---------------------------------------------------------------
    second_order = args.backward_coef > 0
    common.second_order(second_order)
    run, policy, theta, (reward, more) = harness.start(args, "first_order_rsm", rewards)
    # VGG-Flow regresses velocities along the ODE; the others need steps with a density
    kernel, level = ("ode", 0.0) if args.method == "vgg-flow" else (args.kernel, args.noise_level)
    grid = policy.grid(args.steps, kernel, level)
    steps = trained_steps(grid, args)
    eta = temporal_weight(args.temporal, grid, args.gamma)
    eta_t = weight_of_start(args.temporal, grid, eta, args.gamma)
    t = grid.t_all.to(run.device, torch.float32)
    harness.write_influence(run, steps, influence(args.method, grid, eta, args.residual_scale))
    gradient = RewardGradient(args, policy, reward, grid)
    phi = learned_networks(policy, args)
    learned = [(list(phi.parameters()), args.net_lr, args.max_grad_norm)]
    optimiser = harness.make_optimiser(args, run, theta, *(learned if len(phi) else []))
    replay, columns = Replay(args.replay_size), METRICS.with_steps(["drift", "guidance_norm"], steps)
    modules = {"phi": phi, "replay": replay}
    recorder = harness.Recorder(run, args, policy, optimiser, (reward, more), rewards.RewardError, columns, modules)
    each = len(intervals(args))  # trained transitions of an image
    transitions = args.num_prompts * args.group_size * each

    for epoch in recorder.epochs():
        # ---- 1 rollout -------------------------------------------------------
        recorder.phase()
        batch = harness.epoch_batch(args, policy, epoch)
        path = common.rollout(policy, grid, batch.cond, batch.noise, args.cfg, args.micro_batch_size)

        # ---- 2 reward --------------------------------------------------------
        recorder.phase()
        with recorder.scoring(epoch):
            final, parts = harness.score(args, policy, reward, path.x[:, -1], batch.prompts)

        # ---- 3 guidance ------------------------------------------------------
        # with theta_old, before the update: the reward's graph never meets theta's
        chosen = step_choice(args, epoch, batch.indices)  # (B, S) trained steps
        drawn = [(path, chosen, batch)]
        if args.replay_size:
            replay.add(path, batch)
            drawn = replay.draw(policy, grid, batch, chosen, epoch, args)
        with recorder.scoring(epoch):
            every = joined([rows_of(gradient, *part) for part in drawn])  # (B S,) image by image

        # ---- 4 update --------------------------------------------------------
        recorder.phase()
        stats, norms = recorder.stats(epoch), []
        limit = args.guidance_clip
        for update, part in enumerate(harness.epoch_updates(args, batch, list(range(each)), epoch)):
            mine = part @ torch.tensor([each, 1])  # (R,) rows of `every`
            for chunk in common.micro_batches(mine, args.micro_batch_size, f"update {update + 1}"):
                rows = every[chunk]
                i, x_t = rows.i, rows.x_t.requires_grad_(second_order)
                # 4a: the push; one image's huge gradient must not decide a whole update
                size = rows.g.flatten(1).norm(dim=1)
                push = args.scale * grid.at(eta, i, x_t) * clip_norm(rows.g, limit)
                # 4b: the regression on reference + push
                o = policy.predict(x_t, grid.time(i, x_t), rows.cond, args.cfg)
                shift = grid.at(grid.o_coef, i, o) * (o - rows.o_ref)  # mu_theta - mu_ref
                sigma = grid.at(grid.sigma, i, o)
                drift = shift / sigma  # unused by VGG-Flow, whose sigma is 0
                net, net_loss = torch.zeros_like(push), torch.zeros_like(size)
                if args.value_net:  # learns from its own losses; theta takes what it says
                    net_loss = value_loss(policy, phi["net"], grid, rows, eta, t, limit, args)
                    net = args.scale * phi["net"](x_t, t[i]).detach()
                elif args.flow_net:  # learns from theta's loss, and to be 0 at x_0
                    net = phi["net"](rows.x_s, t[i + 1])
                    net_loss = mean_square(phi["net"](rows.x_0, torch.zeros_like(t[i])))
                parts_of_push = {"push/reward": push.flatten(1).norm(dim=1), "push/net": net.flatten(1).norm(dim=1)}
                push = push + net
                if args.method == "vgg-flow":
                    loss = vgg_loss(o, rows.o_ref, push)
                elif args.method == "residual-db":
                    loss = db_loss(drift, push, sigma, args.residual_scale)
                else:
                    loss = sqdf_loss(grid.mu(x_t, o, i), push, drift, args.alpha)
                if args.backward_coef:
                    push_t = args.scale * grid.at(eta_t, i, x_t) * clip_norm(rows.g_t, limit)
                    push_t = push_t + phi["net"](x_t.detach(), t[i]) if args.flow_net else push_t
                    back = common.backward_scores(policy, grid, i, x_t, rows.x_s, o, rows.cond, args.cfg)
                    backward = backward_loss(*back, push_t, sigma, args.residual_scale)
                    loss = loss + args.backward_coef * backward
                # 4c: + the pull to the old outputs, gradients
                old = mean_square(o - rows.o_old)
                total = loss + args.old_coef * old + net_loss
                # micro-batches and processes add up to the mean over the update's transitions
                optimiser.backward(total.sum() / (transitions / args.updates_per_epoch))
                moved, clipped = mean_square(shift), (size > limit).float()
                stats.add(harness.by_step(i, {"drift": moved, "guidance_norm": size}) | parts_of_push | {
                    "loss/total": total, "loss/guidance": loss, "loss/old": old, "loss/net": net_loss,
                    "drift/mean": moved, "guidance/norm": size, "guidance/clip_frac": clipped,
                }, i)  # fmt: skip
                if args.method != "vgg-flow":
                    stats.add({"kl/ref": common.kl_divergence(drift, args.logprob_reduce)})
            norms.append(optimiser.step())  # 4c: all-reduce, clip, AdamW on theta and on phi
            if args.guidance_quantile:  # 4a of the next update
                limit = norm_quantile(every.g[mine], len(every.i), args.guidance_quantile)

        # ---- 5 log, samples, checkpoint, eval --------------------------------
        del batch, path, drawn, every  # what follows needs the room
        norm = torch.tensor(norms).mean(0).tolist()
        own = dict(zip(columns.more, [limit, *norm]))
        recorder.end_epoch(epoch, final, parts, stats.result() | own)
    recorder.finish()


# ---- pieces that need the networks or the flags ------------------------------
def trained_steps(grid, args) -> list[int]:
    """The leading --train-fraction; without noise Residual-DB and SQDF have no residual."""
    if args.method == "vgg-flow":
        return list(range(args.train_steps))
    steps = common.policy_steps(grid, args.train_steps)
    what = f"the last trained step has no noise with --kernel {args.kernel}"
    fits = f"use --train-fraction {len(steps) / args.steps:g}"
    need(len(steps) == args.train_steps, f"{what}; {fits}")
    return steps


def intervals(args) -> list[tuple[int, int]]:
    """(first, end) of the pieces of the trained steps, of each of which one is drawn."""
    n, every = args.train_steps, args.step_every
    pieces = [(i, min(i + every, n)) for i in range(0, n, every)]
    return pieces + ([(n - 1, n)] if every > 1 and args.last_step else [])


def step_choice(args, epoch: int, indices) -> torch.Tensor:
    """The trained steps (B, S) of each image, by (seed, epoch, sample index)."""
    first, end = torch.tensor(intervals(args)).unbind(1)
    keys = [common.generator("steps", args.seed, epoch, n) for n in indices]
    draws = torch.stack([torch.rand(len(first), generator=k) for k in keys])
    return first + (draws * (end - first)).long()


def learned_networks(policy, args) -> nn.ModuleDict:
    """What is learned beside the policy: the one of --value-net or --flow-net ("net")."""
    torch.manual_seed(args.seed)
    phi = nn.ModuleDict()
    if args.value_net or args.flow_net:
        phi["net"] = common.FieldNet(policy.latent_shape[0])
    return phi.to(policy.device)


class RewardGradient:
    """The reward of latents, differentiable in float32, and the x0_hat that it is taken at."""

    def __init__(self, args, policy, reward, grid):
        self.args, self.policy, self.reward, self.grid = args, policy, reward, grid
        self.decode, self.net = policy.decode, None
        if args.tiny_vae:
            from diffusers import AutoencoderTiny

            tiny = AutoencoderTiny.from_pretrained(args.tiny_vae)
            tiny.to(policy.device, torch.float32).eval().requires_grad_(False)
            self.decode = lambda x0: (tiny.decode(x0).sample / 2 + 0.5).clamp(0, 1)
        if args.gradient_checkpointing:
            self.decode = partial(checkpoint, self.decode, use_reentrant=False)
        if args.lookahead_model:
            part, load = policy.backbone.part, type(policy.net).from_pretrained
            self.net = load(args.lookahead_model, subfolder=part)
            self.net.to(policy.device, policy.dtype).eval().requires_grad_(False)
        self.frozen = args.denoiser == "reference" and self.net is None
        # the rollout has the policy's outputs already, but not the graph that a Jacobian needs
        self.kept = args.denoiser == "policy" and self.net is None and not args.jacobian

    def reward_of(self, x0, texts, metadata) -> torch.Tensor:
        return self.reward(self.decode(x0), texts, metadata, grad=True)[0]

    def x0_hat(self, path, n, i, x) -> torch.Tensor:
        """x0_hat of the states x at i of samples n; x_0 itself (i = T) is its own estimate."""
        inner, cond = i.clamp(max=self.grid.steps - 1), path.cond[n]
        time = self.grid.time(inner, x)
        if self.kept:
            o = path.o_old[n, inner].to(x.device)
        elif self.net is None:
            o = self.policy.predict(x, time, cond, self.args.cfg)
        else:  # a one-step model has no guidance
            self.policy.network_calls += 1
            pooled = None if cond.pooled is None else cond.pooled[cond.index]
            forward, low = self.policy.backbone.forward, x.to(self.policy.dtype)
            o = forward(self.net, low, time, cond.embeds[cond.index], pooled).float()
        end = (i == self.grid.steps).to(x.device)[:, None, None, None]
        return torch.where(end, x, self.grid.x0_hat(x, o, inner))


def guidance(gradient, path, chosen, batch, where: str = "") -> torch.Tensor:
    """g (B, S, C, h, w) of the chosen steps.  Eq. 13 (current), 14 (lookahead)."""
    args, policy, where = gradient.args, gradient.policy, where or gradient.args.guidance
    terminal, through = where == "terminal", where != "terminal" and args.jacobian
    states, found = chosen + (where == "lookahead"), []
    if terminal:  # one gradient for the whole trajectory
        states = torch.full_like(chosen[:, :1], gradient.grid.steps)
    # the graph of denoiser, decoder and reward lives at once
    size = min(args.micro_batch_size, args.decode_batch_size)
    for n, i in zip(*(part.split(size) for part in flat(states))):
        texts, extra = [batch.texts[j] for j in n], [batch.metadata[j] for j in n]
        # until the backward pass is done: checkpointing repeats the forward pass there
        with policy.whole_gradient(), policy.reference() if gradient.frozen else nullcontext():
            x = path.x[n, i].to(policy.device).requires_grad_(through)
            with torch.set_grad_enabled(through):
                x0 = x if terminal else gradient.x0_hat(path, n, i, x)
            leaf = x0.detach().clone().requires_grad_()
            g = torch.autograd.grad(gradient.reward_of(leaf, texts, extra).sum(), leaf)[0]
            if through:
                # ours: at norm 16; at the reward's own scale a half-precision network loses it
                norm = g.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None] / 16
                g = torch.autograd.grad(x0, x, g / norm)[0] * norm
        found.append(g)
    g = torch.cat(found).unflatten(0, states.shape)
    return g.expand(-1, chosen.shape[1], -1, -1, -1)


def flat(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps (B, S) -> sample and step of each transition, image by image, (B S,)."""
    return torch.arange(len(chosen)).repeat_interleave(chosen.shape[1]), chosen.flatten()


@dataclass
class Rows:
    """R transitions, of whichever images and steps: what an update sees."""

    i: torch.Tensor  # (R,) step
    cond: common.Cond
    x_t: torch.Tensor  # (R, C, h, w), as are all that follow
    o_old: torch.Tensor
    o_ref: torch.Tensor
    g: torch.Tensor  # the guidance, not yet clipped
    g_t: torch.Tensor  # --backward-coef (else empty, as below): the gradient in x_t
    g_s: torch.Tensor  # --value-net: g of the next step; of the last step its own
    x_s: torch.Tensor  # these two and --flow-net
    x_0: torch.Tensor  # --value-net, --flow-net

    def __getitem__(self, r: torch.Tensor) -> "Rows":
        return Rows(*(value[r] for value in vars(self).values()))


def rows_of(gradient, path, chosen, batch) -> Rows:
    """The chosen steps (B, S) of these trajectories, with their guidance."""
    args, (n, i), none = gradient.args, flat(chosen), torch.empty(chosen.numel(), 0)
    learned = args.value_net or args.flow_net
    g = guidance(gradient, path, chosen, batch)
    g_t, g_s, x_s, x_0 = none, none, none, none
    if args.backward_coef:
        g_t = guidance(gradient, path, chosen, batch, "current").flatten(0, 1)
    if args.value_net:
        g_s = torch.cat([g[:, 1:], g[:, -1:]], 1).flatten(0, 1)
    if learned or args.backward_coef:
        x_s = path.state(n, i + 1)
    if learned:
        x_0 = path.state(n, -1)
    o_ref = reference_outputs(gradient, path, chosen).flatten(0, 1)
    states = path.state(n, i), path.o_old[n, i].to(o_ref.device), o_ref
    return Rows(i, path.cond[n], *states, g.flatten(0, 1), g_t, g_s, x_s, x_0)


@torch.no_grad()
def reference_outputs(gradient, path, chosen) -> torch.Tensor:
    """o_ref (B, S, C, h, w) at the chosen steps alone, in the rollout's batches where these are all."""
    policy, grid, args = gradient.policy, gradient.grid, gradient.args
    found = torch.empty(*chosen.shape, *path.x.shape[2:], device=policy.device)
    for n in torch.arange(len(chosen)).split(args.micro_batch_size):
        for k, i in enumerate(chosen[n].unbind(1)):
            x_t = path.x[n, i].to(policy.device)
            with policy.reference():
                found[n, k] = policy.predict(x_t, grid.time(i, x_t), path.cond[n], args.cfg)
    return found


def joined(sets: list[Rows]) -> Rows:
    (i, cond, *latents) = zip(*(vars(rows).values() for rows in sets))
    return Rows(torch.cat(i), sum(cond[1:], cond[0]), *map(torch.cat, latents))


@dataclass
class Replay:
    """SQDF's buffer: the newest `size` trajectories of all processes."""

    replaced = True  # its state: never changed in place
    size: int
    items: dict = field(default_factory=dict)  # on the CPU, the oldest first: x (N, T+1, ...), prompt (N,)

    def add(self, path, batch) -> None:
        prompt = torch.tensor([p.id for p in batch.prompts], device=path.x.device)
        # ours: half precision, 1.6 GB for 1024 of 50 steps; x_s is drawn anew from what was kept
        for name, values in {"x": path.x.half(), "prompt": prompt}.items():
            values = common.gather(values).cpu()
            values = torch.cat([self.items.get(name, values[:0]), values])
            self.items[name] = values[-self.size :].clone()  # a view would be saved whole

    def draw(self, policy, grid, batch, chosen, epoch: int, args):
        """A trajectory in place of each sample, none twice and new ones included, at its chosen steps.

        By (seed, epoch, sample index); x_s is drawn anew.  Yields what rows_of() takes, a micro-batch
        at a time, each transition by itself: path, steps (M, 1), Batch.
        """
        old, mine, size = self.items, list(batch.indices), args.micro_batch_size
        (sample, step), each = flat(chosen), (chosen.shape[1], *policy.latent_shape)
        key = common.generator("replay", args.seed, epoch)
        picks = torch.randperm(len(old["prompt"]), generator=key)[mine][sample]
        keys = [common.generator("replay", args.seed, epoch, j) for j in mine]
        draws = torch.cat([torch.randn(each, generator=k) for k in keys]).to(policy.device)
        for n, i, z in zip(*(part.split(size) for part in (picks, step, draws))):
            prompts = [args.prompt_list[p] for p in old["prompt"][n].tolist()]
            cond = policy.encode([p.text for p in prompts])
            path = replayed_path(policy, grid, old["x"][n, i], old["x"][n, -1], i, z, cond, args.cfg)
            yield path, i[:, None], common.Batch(prompts, range(len(z)), cond, z[:, None])

    def state_dict(self) -> dict:
        return dict(self.items)

    def load_state_dict(self, state: dict) -> None:
        self.items = dict(state)


@torch.no_grad()
def replayed_path(policy, grid, x_t, x_0, i, z, cond, cfg) -> common.Rollout:
    """Old transitions as trajectories, known at x_t, x_s and x_0 only, NaN elsewhere."""
    n, x_t = torch.arange(len(z)), x_t.to(z)
    x = torch.full((len(z), grid.steps + 1, *z.shape[1:]), torch.nan, device=z.device)
    o_old = x[:, 1:].clone()
    o_old[n, i] = policy.predict(x_t, grid.time(i, x_t), cond, cfg)
    x[n, i], x[:, -1] = x_t, x_0.to(z)
    x_s = grid.mu(x_t, o_old[n, i], i) + grid.at(grid.sigma, i, z) * z
    x[n, i + 1] = x_s  # after x_0, which is new, too, where the step is the last
    return common.Rollout(x, z, o_old, None, cond)


def value_loss(policy, net, grid, rows, eta, t, limit, args) -> torch.Tensor:
    """VGG-Flow's losses for the value network, (R,): consistency + terminal.  Eq. 84-86.

    The value gradient G = eta_t g + net(x_t, t) of the controlled flow obeys dG/dtau = (dv_ref/dx)^T G
    along it, tau = 1 - t: the gradient of the Hamilton-Jacobi-Bellman equation.  ours: the Jacobian's
    product by automatic differentiation; public code takes finite differences of 1e-4.
    """
    i, x = rows.i, rows.x_t.clone().requires_grad_()
    weight = torch.cat([eta, torch.ones_like(eta[:1])])  # at x_0 G is the reward's own gradient
    value_t = grid.at(weight, i, x) * clip_norm(rows.g, limit) + net(rows.x_t, t[i])
    value_s = grid.at(weight, i + 1, x) * clip_norm(rows.g_s, limit) + net(rows.x_s, t[i + 1])
    with policy.reference(), policy.whole_gradient(), torch.enable_grad():
        v_ref = policy.predict(x, grid.time(i, x), rows.cond, args.cfg)
        carried = torch.autograd.grad((v_ref * value_t.detach()).sum(), x)[0]
    error = (value_s - value_t) / grid.at(grid.dt, i, x) - carried
    terminal = net(rows.x_0, torch.zeros_like(t[i]))
    return mean_square(error) + args.value_terminal * mean_square(terminal)


def norm_quantile(g: torch.Tensor, most: int, quantile: float) -> float:
    """The quantile of the rows' norms over all processes, each with at most `most` rows."""
    size = torch.full((most,), torch.nan, device=g.device)
    size[: len(g)] = g.flatten(1).norm(dim=1)
    every = common.gather(size)
    return torch.quantile(every[~every.isnan()].double(), quantile).item()


# ---- what no paper mentions: checks of the flags, sizes for --dry-run --------
def check(args):
    own, method = METHODS[args.method], args.method
    vars(args).update({k: v for k, v in own.items() if vars(args)[k] in ("auto", None)})
    ahead, model = args.guidance == "lookahead", args.lookahead_model
    for name, _ in rewards.parse_spec(args.reward):
        what = f"--reward {name} has no gradient, and {method} is a first-order method"
        own = f"if gradients pass, set {name.partition(':')[2]}.differentiable = True in its module; else"
        use = f"{own if ':' in name else 'use e.g. hpsv2 or clipscore, or'} use a zeroth-order trainer (grpo.py)"
        need(rewards.is_differentiable(name), what, use)
    gaps = "--skip-failed does not go with first-order methods, which need the gradient of every reward"
    need(not args.skip_failed, gaps, "leave it out")
    whole = f"--reward {args.reward} compares the images of a prompt; a first-order method scores them one by one"
    need(not rewards.is_grouped(args.reward), whole, "use vmpo.py, awm.py or grpo.py")
    for name, owners in OWNERS.items():
        what = f"--{name.replace('_', '-')} belongs to --method {owners}, not to {method}"
        use = "leave it out, or back at its default where a preset has it"
        need(method in owners or vars(args)[name] in (0, "", "none"), what, use)
    many = f"--step-every {args.step_every} is more than the {args.train_steps} trained steps"
    need(args.step_every <= args.train_steps, many, "use at most these")
    ode = "--temporal sigma is 0 on vgg-flow's deterministic rollout"
    need(args.temporal != "sigma" or method != "vgg-flow", ode, "use linear, quad or constant")
    need(ahead or not model, "--lookahead-model needs --guidance lookahead; leave it out")
    check_folder(args, "--tiny-vae", args.tiny_vae, "config.json", "an AutoencoderTiny")
    part = f"{args.backbone.part}/config.json"
    check_folder(args, "--lookahead-model", model, part, "a pipeline of the type of --model")
    every = args.train_steps == args.steps and args.step_every == 1
    fits = every and args.kind == "flow" and args.guidance == "current"
    use = "use a flow model, --guidance current --step-every 1 --train-fraction 1"
    need(fits or not args.value_net, "--value-net follows a flow's value gradient along all steps to the end", use)
    fits = ahead and args.jacobian and not args.detach_uncond
    what = "--backward-coef needs r's whole gradients with respect to x_s and x_t"
    use = "use --guidance lookahead --jacobian, and leave --detach-uncond out"
    need(fits or not args.backward_coef, what, use)
    kept = ahead and args.denoiser == "policy" and not args.jacobian and not model
    what = "--replay-size with --no-jacobian has no output of the rollout at the new x_s"
    need(not kept or not args.replay_size, what, "use --jacobian, --denoiser reference or another --guidance")
    samples, size = args.num_prompts * args.group_size, args.replay_size
    few = f"--replay-size {size} is less than the {samples} samples of an epoch"
    need(not size or size >= samples, f"{few}, which are drawn from it without repetition", "use more")
    harness.check_updates(args, samples * len(intervals(args)))


def check_folder(args, flag: str, path: str, file: str, what: str) -> None:
    """Unless empty, the path is a folder with this file, or a hub id that has it (--dry-run does not ask)."""
    if not path or Path(path, file).is_file():
        return
    need(not Path(path).is_dir(), f"{flag} {path} has no {file}", f"give the folder of {what}")
    need(path.count("/") == 1, f"{flag} {path} is neither a folder nor a hub id such as owner/name")
    if not args.dry_run:
        harness.require_hub(path, f"{flag} {path}", file)


def sizes(args) -> dict[str, str]:
    """The lines of --dry-run."""
    samples, passes = args.num_prompts * args.group_size, harness.network_passes(args, args.cfg)
    rows, learned = len(intervals(args)), args.value_net or args.flow_net
    replayed, backward = rows * bool(args.replay_size), bool(args.backward_coef)
    gradients, asked = rows * (1 + backward), 0  # in x_s, and in x_t
    if args.guidance == "terminal":
        gradients = replayed or 1
    elif args.jacobian or args.lookahead_model or args.denoiser == "reference":
        asked = gradients * (1 if args.lookahead_model else passes)
    calls = {
        "in the rollout": (args.steps + replayed) * passes,
        "of the reference": rows * passes,
        "in the reward gradient": asked,
        "with gradient": rows * args.inner_epochs * passes * (1 + (args.value_net or backward)),
    }
    kept = 4 + backward + args.value_net + (backward or learned) + learned  # see Rows
    path = samples * (3 * args.steps + 1)
    what = "states, noise, outputs; the transitions with their guidance"
    lines = {
        "guidance": f"{args.guidance}, temporal weight {args.temporal}, scale {args.scale:g}",
        "network evaluations per epoch": ", ".join(f"{samples * n} {k}" for k, n in calls.items()),
        "reward gradients per epoch": f"{samples * gradients} images, through decoder and reward",
        "transitions per epoch": f"{samples * rows}, {samples * rows // args.updates_per_epoch} per update",
        "memory for the rollout": harness.rollout_memory(args, path + samples * rows * kept, what, path),
    }
    if backward:
        lines[harness.UNKNOWN] = "the second derivative keeps whole attention matrices"
    if args.replay_size and harness.latent_size(args):
        half = 2 * args.replay_size * (args.steps + 1) * harness.latent_size(args) / 2**30
        lines["memory for the buffer"] = f"{half:.2f} GB, in each process and checkpoint"
    return lines


if __name__ == "__main__":
    harness.run_main(main, parse_args, rewards.UsageError)
