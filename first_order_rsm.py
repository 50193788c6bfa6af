"""First-order RSM: VGG-Flow, Residual nabla-DB and SQDF with differentiable rewards, and their redesigns.
Papers: Lee et al., "Reward Score Matching", arXiv 2604.17415 (code: github.com/jaylee2000/rsm);  VGG-Flow, 2512.05116
       (github.com/lzzcd001/vggflow);  Residual nabla-DB, 2412.07775 (github.com/lzzcd001/nabla-gfn);  SQDF (code only:
       github.com/Shin-woocheol/SQDF)

Idea:  the optimal policy's score is the reference's plus grad V / beta.  With a differentiable reward grad V can be
       replaced by the reward's gradient through the decoder, and training is a regression of the denoiser on
       "reference + weight x reward gradient".  The methods differ in where the gradient is taken, in its weight over
       time and in the weight of the squared error; RSM shows that the networks they add on top do next to nothing and
       that one gradient per image, at its end, and a weight that does not vanish on the noisy side do better.
Algorithm, one epoch (the loop below repeats the numbers):
  1 rollout     ODE (VGG-Flow) or SDE trajectories of theta_old; keep x_t, the draws z, o_old, o_ref
  2 reward      r(x_0)
  3 guidance    g = grad r at x0_hat(x_t) (current), x0_hat(x_s) (lookahead) or x_0 (terminal)          Eq. 13, 14
  4 update      for each transition, shuffled over images and steps:
     4a         g, its norm clipped at a running quantile
     4b         VGG-Flow        mean ||o - o_ref + scale eta_t g||^2                                  Eq. 84-88
                Residual-DB     mean ||(mu - mu_ref) / sigma^2 - scale eta_t g||^2, or that times sigma^2  Eq. 76-78
                SQDF            -eta_t r(x0_hat(x_s)) + alpha mean ||mu - mu_ref||^2 / sigma^2         Eq. 79-83
                + the backward term, if asked                                                          Eq. 67-75
     4c         + lambda mean ||o - o_old||^2;  AdamW
  5 log, checkpoint, evaluation with the same noise every time
Differs from the papers: SQDF's reward is linearised at the rollout's x_s, which is exact for one update per rollout.
       From public code: quantiles are over all processes; SQDF's KL is kept where r <= 0; the prompt of a gradient is
       its own sample's.
Run:   python first_order_rsm.py --preset tiny            # embedded model, CPU, minutes, no downloads
       python first_order_rsm.py --preset rsm-sd15-hpsv2
Port:  copy the functions under "method": tensors in, tensors out.
"""

import argparse
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import common
import rewards

TINY = common.TINY | dict(reward="clipscore", reward_path=[str(common.HERE / "tiny" / "clip")], eval_rewards="shapes,shapes-strict", num_prompts=16, group_size=1, guidance_quantile=0.0, lr=4e-3, epochs=120)
FLOW = dict(model="sd3.5-medium", method="vgg-flow", reward="hpsv2", prompts="prompts/geneval_train_prompts.txt", num_prompts=32, group_size=1,
            steps=20, eval_steps=40, cfg=5.0, detach_uncond=True, train_fraction=1.0, updates_per_epoch=1, lr=5e-4, weight_decay=1e-2,
            lora_rank=8, lora_alpha=8, epochs=200, micro_batch_size=4, dtype="bfloat16")  # fmt: skip
DIFFUSION = dict(model="sd15", method="residual-db", reward="hpsv2", prompts="prompts/geneval_train_prompts.txt", num_prompts=256, group_size=1,
                 steps=50, cfg=5.0, step_every=5, updates_per_epoch=2, old_coef=100.0, scale=5e5, lr=1e-3, lora_rank=8, lora_alpha=8,
                 epochs=100, dtype="bfloat16")  # fmt: skip
PRESETS = {
    # RSM's flow experiment: the pruned baseline and the redesign
    "vgg-flow-sd35-hpsv2": FLOW | dict(scale=3e7),
    "rsm-sd35-hpsv2": FLOW | dict(scale=1.5e7, guidance="terminal", temporal="linear"),
    # RSM's diffusion experiment: the pruned baseline and the redesign
    "residual-db-sd15-hpsv2": DIFFUSION,
    "rsm-sd15-hpsv2": DIFFUSION | dict(guidance="terminal", temporal="constant", residual_scale="sigma", lr=4e-3),
    # SQDF as released, with the reference as look-ahead
    "sqdf-sd15-aesthetic": dict(model="sd15", method="sqdf", reward="aesthetic", prompts="prompts/simple_animals.txt", num_prompts=64, group_size=1, step_every=50, last_step=False, guidance_clip=float("inf"), guidance_quantile=0.0, replay_size=1024, updates_per_epoch=1, lr=1e-3),
    # the embedded models: coloured shapes on a CPU, rewarded by a small CLIP (ours; docs/first_order_rsm.md)
    "tiny": TINY | dict(model="tiny-sd35", method="vgg-flow", scale=75.0, guidance="terminal", temporal="linear"),
    "tiny-sd15": TINY | dict(model="tiny-sd15", method="residual-db", scale=50.0, guidance="terminal", temporal="constant", residual_scale="sigma", train_fraction=0.9, lr=1e-3),
}
METHODS = {  # guidance, temporal weight, scale, network Jacobian, denoiser of the look-ahead
    "vgg-flow": ("current", "quad", 3e7, False, "policy"),
    "residual-db": ("lookahead", "alpha-bar", 5e5, True, "policy"),
    "sqdf": ("lookahead", "gamma-discount", 1.0, True, "reference"),
}


def parse_args(argv=None):
    parser = common.make_parser(__doc__, "first_order_rsm")
    yes_no = argparse.BooleanOptionalAction
    g = parser.add_argument_group("method")
    g.add_argument("--method", default="residual-db", choices=list(METHODS), help="the regression (see the top); the flags below default to the method's own choices")
    g.add_argument("--guidance", default="auto", choices=["auto", "current", "lookahead", "terminal"], help="g = grad r at x0_hat(x_t) (VGG-Flow), at x0_hat(x_s) with respect to x_s (Residual-DB, SQDF), or at x_0, one gradient for the whole trajectory (RSM: reward score distillation)")
    g.add_argument("--temporal", default="auto", choices=["auto", "quad", "linear", "constant", "alpha-bar", "sigma", "gamma-discount"], help="eta_t: (1-t)^2 (VGG-Flow), 1-t (RSM, flow), 1 (RSM, diffusion), alpha_s^2 (Residual-DB), sigma_t, gamma^(steps left) (SQDF)")
    g.add_argument("--gamma", type=float, default=0.9, help="gamma_q of gamma-discount (SQDF: 0.9)")
    g.add_argument("--scale", type=float, help="1 / beta: weight of the guidance (RSM: vgg-flow 3e7, redesign 1.5e7; residual-db 5e5; SQDF 1), on gradients clipped as below")
    g.add_argument("--alpha", type=float, default=2.0, help="sqdf: weight of mean ||mu - mu_ref||^2 / sigma^2 (SQDF: 2.0 aesthetic, 0.005 HPS)")
    g.add_argument("--residual-scale", default="none", choices=["none", "sigma"], help="residual-db: residual multiplied by sigma_t, with the guidance scale sigma_t eta_t g (RSM, diffusion)")
    g.add_argument("--old-coef", type=float, default=0.0, help="lambda of mean ||o - o_old||^2 (Residual-DB, RSM: 100)")
    g.add_argument("--jacobian", action=yes_no, default=None, help="current, lookahead: gradient through the denoiser as well; default: not for vgg-flow")
    g.add_argument("--denoiser", default="auto", choices=["auto", "policy", "reference"], help="whose x0_hat (SQDF: frozen)")
    g.add_argument("--lookahead-model", default="", metavar="PATH", help="sqdf: folder or hub id of a frozen one-step denoiser (unet/ or transformer/), e.g. a fused LCM-LoRA, run without guidance (SQDF)")
    g.add_argument("--step-every", type=int, default=1, help="train one random step of each N per image, and the last (RSM, diffusion: 5, i.e. 11 of 50); 1 = all")
    g.add_argument("--last-step", action=yes_no, default=True, help="with --step-every: the last trained step of every image as well (RSM; SQDF: no)")
    g.add_argument("--guidance-clip", type=float, default=1.0, help="norm at which g is clipped per sample in an epoch's first update (RSM: 1)")
    g.add_argument("--guidance-quantile", type=float, default=0.8, help="after an update the clip becomes this quantile of its norms, over all processes, until the epoch ends (VGG-Flow, RSM: 0.8); 0 = fixed")
    g.add_argument("--value-net", action=yes_no, default=False, help="vgg-flow: a learned residual of the value gradient, trained by consistency along the flow and at the end (VGG-Flow; RSM: useless)")
    g.add_argument("--value-terminal", type=float, default=1e3, help="weight of its terminal loss (VGG-Flow: 1e3)")
    g.add_argument("--flow-net", action=yes_no, default=False, help="residual-db: a learned residual of the guidance, zero at x_0 (Residual-DB; RSM: useless)")
    g.add_argument("--backward-coef", type=float, default=0.0, help="residual-db: weight of the backward term, the same balance differentiated with respect to x_t (Residual-DB: 1; RSM: unstable); 0 = none")
    g.add_argument("--replay-size", type=int, default=0, help="residual-db, sqdf: past transitions kept, from which x_t is drawn again; x_s and the guidance are new (SQDF: 1024 aesthetic, 4096 HPS; RSM: no benefit); 0 = online only")
    g.add_argument("--replay-ratio", type=int, default=1, help="replayed transitions per new one (SQDF: 1)")
    g.add_argument("--replay-priority", default="uniform", choices=["uniform", "reward"], help="reward: in proportion to gamma^(steps left) r above the buffer's smallest (SQDF has both)")
    g.add_argument("--net-lr", type=float, default=1e-3, help="learning rate of these networks")
    g.add_argument("--tiny-vae", default="", metavar="PATH", help="folder or hub id of a diffusers AutoencoderTiny (TAESD, TAESD3) that decodes for the gradient (RSM, flow)")
    g.add_argument("--checkpoint-decoder", action=yes_no, default=False, help="recompute the decoder's activations in the reward gradient: less memory")
    common.add_args(parser)
    parser.set_defaults(num_prompts=64, group_size=1, updates_per_epoch=1)
    return common.parse(parser, PRESETS, argv, rewards, check, sizes)


def check(args):
    guidance, temporal, scale, jacobian, denoiser = METHODS[args.method]
    args.guidance = guidance if args.guidance == "auto" else args.guidance
    args.temporal = temporal if args.temporal == "auto" else args.temporal
    args.denoiser = denoiser if args.denoiser == "auto" else args.denoiser
    args.scale = scale if args.scale is None else args.scale
    args.jacobian = jacobian if args.jacobian is None else args.jacobian
    for name, _ in rewards.parse_spec(args.reward):
        if not rewards.is_differentiable(name):
            raise common.UsageError(f"--reward {name} has no gradient, and {args.method} is a first-order method; use e.g. hpsv2, clipscore, imagereward or aesthetic, or a zeroth-order trainer (tempflow_rsm.py, grpo.py)")
    common.check_above_zero(args, "scale", "alpha", "guidance_clip", "gamma", "net_lr")
    common.check_not_negative(args, "old_coef", "value_terminal", "backward_coef", "replay_size")
    if args.gamma > 1 or not 0 <= args.guidance_quantile < 1:
        raise common.UsageError(f"--gamma {args.gamma} must be at most 1 and --guidance-quantile {args.guidance_quantile} in [0, 1)")
    if not 1 <= args.step_every <= args.train_steps:
        raise common.UsageError(f"--step-every {args.step_every} must lie between 1 and the {args.train_steps} trained steps")
    if args.residual_scale != "none" and args.method != "residual-db":
        raise common.UsageError(f"--residual-scale {args.residual_scale} belongs to residual-db, --method is {args.method}; use --residual-scale none (a preset may have set it)")
    if args.lookahead_model and (args.method != "sqdf" or args.guidance != "lookahead"):
        raise common.UsageError("--lookahead-model belongs to --method sqdf --guidance lookahead; leave it out")
    if args.temporal == "sigma" and args.method == "vgg-flow":
        raise common.UsageError("--temporal sigma is 0 on vgg-flow's deterministic rollout; use linear, quad or constant")
    for name in ("tiny_vae", "lookahead_model"):
        if path := getattr(args, name):
            flag, local = f"--{name.replace('_', '-')} {path}", Path(path).is_dir()
            file = "config.json" if name == "tiny_vae" else ("unet" if args.kind == "eps" else "transformer") + "/config.json"
            if local and not (Path(path) / file).is_file():
                raise common.UsageError(f"{flag} has no {file}; give the folder of {'an AutoencoderTiny' if name == 'tiny_vae' else 'a pipeline of the type of --model'}")
            if not local and path.count("/") != 1:
                raise common.UsageError(f"{flag} is neither a folder nor a hub id such as owner/name")
            if not local:
                common.require_hub(path, flag, file)
    if args.value_net and args.train_steps != args.steps:
        raise common.UsageError(f"--value-net follows the value gradient to the end, and {args.train_steps} of {args.steps} steps are trained; use --train-fraction 1")
    if args.value_net and (args.method != "vgg-flow" or args.kind != "flow" or args.step_every != 1 or args.guidance != "current"):
        raise common.UsageError("--value-net belongs to --method vgg-flow on a flow model, all steps, --guidance current; leave it out")
    for name in ("flow_net", "backward_coef"):
        if getattr(args, name) and args.method != "residual-db":
            raise common.UsageError(f"--{name.replace('_', '-')} belongs to residual-db, --method is {args.method}; leave it out")
    if args.backward_coef and (args.guidance, args.jacobian) != ("lookahead", True):
        raise common.UsageError("--backward-coef needs the reward's gradients with respect to x_s and x_t; use --guidance lookahead --jacobian")
    if args.backward_coef and args.detach_uncond:
        raise common.UsageError("--backward-coef differentiates with respect to x_t, through both branches of the guidance; leave --detach-uncond out")
    if args.replay_size and args.method == "vgg-flow":
        raise common.UsageError(f"--replay-size {args.replay_size} belongs to residual-db and sqdf, whose steps are stochastic; leave it out")
    if args.replay_size and (args.guidance, args.jacobian, args.denoiser) == ("lookahead", False, "policy") and not args.lookahead_model:
        raise common.UsageError("--replay-size with --no-jacobian has no output of the rollout at the new x_s; use --jacobian, --denoiser reference or another --guidance")
    if args.replay_ratio < 1:
        raise common.UsageError(f"--replay-ratio {args.replay_ratio} is too small; use 1 or more, or --replay-size 0 for none")
    common.check_updates(args, args.num_prompts * args.group_size * transitions(args))


def intervals(args) -> list[tuple[int, int]]:
    """The (first, end) of each interval of trained steps, from which one is drawn; with --last-step also the last step."""
    n, every = args.train_steps, args.step_every
    pieces = [(i, min(i + every, n)) for i in range(0, n, every)]
    return pieces + ([(n - 1, n)] if every > 1 and args.last_step else [])


def transitions(args) -> int:
    """Trained transitions per image and epoch: new ones, and for each --replay-ratio old ones."""
    return len(intervals(args)) * (1 + args.replay_ratio * bool(args.replay_size))


def sizes(args) -> dict[str, str]:
    """The lines of --dry-run."""
    samples, passes, rows = args.num_prompts * args.group_size, 2 if args.cfg != 1 else 1, transitions(args)
    replayed, both = rows - len(intervals(args)), 1 + bool(args.backward_coef)  # gradients with respect to x_s, x_t
    asked = args.guidance != "terminal" and (args.jacobian or args.denoiser == "reference" or args.lookahead_model)
    again = samples * rows * both * (1 if args.lookahead_model else passes) if asked else 0
    train = samples * rows * args.inner_epochs * passes * (2 if args.value_net or args.backward_coef else 1)
    scored = replayed + 1 if args.guidance == "terminal" else rows * both
    kept = 4 + bool(args.backward_coef) + bool(args.backward_coef or args.flow_net) + bool(args.flow_net)  # see Rows
    return {
        "samples per epoch": f"{samples} = {args.num_prompts} prompts x {args.group_size}",
        "guidance": f"{args.guidance}, temporal weight {args.temporal}, scale {args.scale:g}",
        "network evaluations per epoch": f"{samples * (args.steps + replayed) * passes} in the rollout, {samples * (args.train_steps + replayed) * passes} of the reference, {again} in the reward gradient, {train} with gradient",
        "reward gradients per epoch": f"{samples * scored} images, through decoder and reward",
        "transitions per epoch": f"{samples * rows}, {samples * rows // args.updates_per_epoch} per update",
        "memory for the rollout": common.rollout_memory(args, samples * (4 * args.steps + 1 + rows * kept), "states, noise, two outputs; the transitions with their guidance"),
    }


# ---- method: pure functions of tensors ------------------------------------------------------------------------------
def temporal_weight(kind: str, grid: common.Grid, gamma: float) -> torch.Tensor:
    """eta_t of every step, (T,) float64."""
    if kind == "quad":
        return (1 - grid.t) ** 2
    if kind == "linear":
        return 1 - grid.t
    if kind == "alpha-bar":
        return grid.alpha_s**2
    if kind == "sigma":
        return grid.sigma
    if kind == "gamma-discount":
        return gamma ** torch.arange(grid.steps - 1, -1, -1, dtype=torch.float64)
    return torch.ones_like(grid.t)


def weight_of_start(kind: str, grid: common.Grid, eta: torch.Tensor, gamma: float) -> torch.Tensor:
    """eta of the state x_t of every step, (T,): what the step into it had; for the noise x_T the weight's own formula."""
    first = {"alpha-bar": grid.alpha[0] ** 2, "gamma-discount": eta[0] * gamma}.get(kind, eta[0])
    return torch.cat([first.view(1), eta[:-1]])


def clip_norm(g: torch.Tensor, limit: float) -> torch.Tensor:
    """g (B, ...) with every sample's norm at most `limit`."""
    norm = g.flatten(1).norm(dim=1).clamp(min=1e-12)
    return g * (limit / norm).clamp(max=1.0).view(-1, *[1] * (g.ndim - 1))


def vgg_loss(o: torch.Tensor, o_ref: torch.Tensor, push: torch.Tensor) -> torch.Tensor:
    """mean ||o - (o_ref - push)||^2, (B,), push = scale eta_t g (+ the value network).  Eq. 87-88."""
    return ((o - o_ref + push) ** 2).flatten(1).mean(1)


def db_loss(drift: torch.Tensor, push: torch.Tensor, sigma: torch.Tensor, residual_scale: str) -> torch.Tensor:
    """mean ||drift / sigma - push||^2, (B,), drift = (mu_theta - mu_ref) / sigma; 'sigma': times sigma^2.  Eq. 76-78."""
    error = drift / sigma - push if residual_scale == "none" else drift - sigma * push
    return (error**2).flatten(1).mean(1)


def backward_loss(back, back_ref, push_t, sigma: torch.Tensor, residual_scale: str) -> torch.Tensor:
    """mean ||grad log p_ref - grad log p_theta - push_t||^2, (B,), gradients with respect to x_t, push_t = scale eta g
    at x_t (+ the flow network); 'sigma': times sigma^2.  The other half of Residual-DB's balance (Eq. 67-75)."""
    error = back_ref - back - push_t
    return ((error if residual_scale == "none" else sigma * error) ** 2).flatten(1).mean(1)


def sqdf_loss(mu: torch.Tensor, push: torch.Tensor, drift: torch.Tensor, alpha: float) -> torch.Tensor:
    """-<push, mu_theta> + alpha mean ||drift||^2, (B,): the gradient of -eta r(x0_hat(mu + sigma z)) + KL.  Eq. 79-83."""
    return -(push * mu).flatten(1).sum(1) + alpha * (drift**2).flatten(1).mean(1)


def influence(method: str, grid: common.Grid, eta: torch.Tensor, residual_scale: str) -> torch.Tensor:
    """h_t (T,) up to a constant: the guidance's weight in the gradient with respect to the network's output.  Eq. 21-23."""
    if method == "vgg-flow":
        return eta
    if method == "residual-db":
        return eta * grid.w.abs() * (1 / grid.sigma if residual_scale == "none" else grid.sigma)
    return eta * grid.o_coef.abs()


def main(args):
    # ---- setup ------------------------------------------------------------------------------------------------------
    run = common.setup(args, "first_order_rsm")
    common.second_order(bool(args.backward_coef))
    policy = common.Policy(args, run)
    params = common.add_lora(policy, args)
    reward, more = rewards.load_args(args, run.device)
    kernel, level = ("ode", 0.0) if args.method == "vgg-flow" else (args.kernel, args.noise_level)
    grid = common.make_grid(policy.pipe.scheduler, policy.kind, args.steps, kernel, level)
    steps = list(range(args.train_steps)) if args.method == "vgg-flow" else common.policy_steps(grid, args.train_steps)
    if len(steps) < args.train_steps:
        raise common.UsageError(f"the last of the {args.train_steps} trained steps has no noise with kernel {args.kernel}; use --train-fraction {len(steps) / args.steps:g}")
    eta = temporal_weight(args.temporal, grid, args.gamma)
    eta_t = weight_of_start(args.temporal, grid, eta, args.gamma)
    h = influence(args.method, grid, eta, args.residual_scale)[steps]
    if run.is_main:
        common.write_json(run.dir / "influence.json", {"step": steps, "h": (h / h.mean()).tolist()})
    gradient = RewardGradient(args, run, policy, reward)
    torch.manual_seed(args.seed)
    phi = nn.ModuleDict({"net": common.FieldNet(policy.latent_shape[0])} if args.value_net or args.flow_net else {}).to(run.device)
    learned = [(list(phi.parameters()), args.net_lr, args.max_grad_norm)] if len(phi) else []
    optimiser = common.Optimiser(args, run, params, *learned)
    means = ["loss/total", "loss/guidance", "loss/old", "loss/net", "kl/ref", "drift/mean", "guidance/clip_frac"]
    per_step = [f"{what}/{i:02d}" for what in ("drift", "guidance_norm") for i in steps]
    keys = [*means, *per_step, "guidance/norm", "guidance/limit", "grad/norm", "grad/norm_phi"]
    replay = Replay(args.replay_size)
    recorder = common.Recorder(run, args, policy, optimiser, reward, more, rewards.RewardError, keys, {"phi": phi, "replay": replay})

    for epoch in recorder.epochs():
        # ---- 1 rollout ----------------------------------------------------------------------------------------------
        recorder.phase()
        batch = common.epoch_batch(policy, args, run, epoch)
        path = common.rollout(policy, grid, batch.cond, batch.prompts, batch.noise, args.cfg, args.micro_batch_size, steps, "rollout" if run.is_main else "")

        # ---- 2 reward -----------------------------------------------------------------------------------------------
        recorder.phase()
        with recorder.scoring(epoch), torch.no_grad():
            final, parts = reward(policy.decode(path.x[:, -1]), batch.texts, batch.metadata, chunk=args.reward_batch_size)

        # ---- 3 guidance ---------------------------------------------------------------------------------------------
        chosen = step_choice(args, epoch, batch.indices)  # (B, S) trained steps of each image
        with recorder.scoring(epoch):
            sets = [rows_of(path, chosen, batch, policy, gradient, grid, args)]
            count, own = chosen.shape[1], chosen.numel()
            place = torch.arange(own).view(-1, count)  # (B, S) the row of each transition
            if args.replay_size:
                replay.add(grid, path, chosen, batch, final, args, run)
                again = transitions(args) - count  # for each image
                sets += [rows_of(*old, policy, gradient, grid, args) for old in replay.draw(policy, grid, batch, again, epoch, args)]
                place = torch.cat([place, own + torch.arange(len(chosen) * again).view(-1, again)], 1)
            rows = concatenated(sets)

        # ---- 4 update -----------------------------------------------------------------------------------------------
        recorder.phase()
        stats, norms = common.Stats([*means, *per_step, "guidance/norm"]), []
        limit = args.guidance_clip
        rows_per_update = args.num_prompts * args.group_size * place.shape[1] / args.updates_per_epoch
        for update, part in enumerate(common.epoch_updates(args, run, list(range(place.shape[1])), epoch)):
            for chunk in common.micro_batches(part, args.micro_batch_size, run, f"update {update + 1}"):
                n = place[tuple(chunk.unbind(1))]
                i, cond, x_t, o_old, o_ref = rows.step[n], rows.cond[n], rows.x_t[n], rows.o_old[n], rows.o_ref[n]
                # 4a: the clipped guidance, with its weight
                size = rows.g[n].flatten(1).norm(dim=1)
                push = args.scale * grid.at(eta, i, x_t) * clip_norm(rows.g[n], limit)
                # 4b: the regression
                x_t.requires_grad_(bool(args.backward_coef))
                o = policy.predict(x_t, grid.time(i, len(n), run.device), cond, args.cfg)
                shift = grid.at(grid.o_coef, i, o) * (o - o_ref)  # mu_theta - mu_ref
                net_loss, values = torch.zeros(len(n), device=run.device), {}
                if args.method == "vgg-flow":
                    if args.value_net:
                        net_loss = value_loss(policy, phi["net"], grid, path, chosen, rows.g.unflatten(0, chosen.shape), eta, *chunk.unbind(1), limit, args)
                        push = push + args.scale * phi["net"](x_t, grid.t[i].to(x_t)).detach()
                    loss = vgg_loss(o, o_ref, push)
                else:
                    sigma = grid.at(grid.sigma, i, o)
                    drift = shift / sigma
                    if args.flow_net:
                        s = torch.cat([grid.t, torch.zeros(1).double()])[i + 1].to(x_t)
                        push = push + phi["net"](rows.x_s[n], s)
                        net_loss = (phi["net"](rows.x_0[n], torch.zeros_like(s)) ** 2).flatten(1).mean(1)
                    if args.method == "residual-db":
                        loss = db_loss(drift, push, sigma, args.residual_scale)
                        if args.backward_coef:
                            push_t = args.scale * grid.at(eta_t, i, x_t) * clip_norm(rows.g_t[n], limit)
                            push_t = push_t + phi["net"](x_t.detach(), grid.t[i].to(x_t)) if args.flow_net else push_t
                            scores = common.backward_scores(policy, grid, i, x_t, rows.x_s[n], o, cond, args.cfg)
                            loss = loss + args.backward_coef * backward_loss(*scores, push_t, sigma, args.residual_scale)
                    else:
                        mu = grid.mu(x_t, o, i)
                        loss = sqdf_loss(mu, push, drift, args.alpha)
                    values = {"kl/ref": common.kl_divergence(drift, args.logprob_reduce)}
                # 4c: + the pull to the old outputs, gradients
                old = ((o - o_old) ** 2).flatten(1).mean(1)
                row = loss + args.old_coef * old + net_loss
                optimiser.backward(row.sum() / rows_per_update)
                moved = (shift**2).flatten(1).mean(1)
                for j in i.unique().tolist():
                    values |= {f"drift/{j:02d}": moved[i == j], f"guidance_norm/{j:02d}": size[i == j]}
                stats.add(values | {
                    "loss/total": row, "loss/guidance": loss, "loss/old": old, "loss/net": net_loss, "drift/mean": moved,
                    "guidance/norm": size, "guidance/clip_frac": (size > limit).float(),
                })  # fmt: skip
            norms.append(optimiser.step())
            if args.guidance_quantile:
                limit = norm_quantile(rows.g[place[tuple(part.unbind(1))]], place.numel(), args.guidance_quantile, run)

        # ---- 5 log, samples, checkpoint, eval -----------------------------------------------------------------------
        norm = torch.tensor(norms).mean(0).tolist()
        metrics = stats.result(run) | {"guidance/limit": limit} | dict(zip(("grad/norm", "grad/norm_phi"), norm))
        recorder.end_epoch(epoch, final, parts, metrics)
    recorder.finish()


# ---- pieces that need the networks ----------------------------------------------------------------------------------
def step_choice(args, epoch: int, indices) -> torch.Tensor:
    """The trained steps (B, S) of each image: one from each interval, a function of (seed, epoch, sample index)."""
    pieces = intervals(args)
    first, width = torch.tensor([a for a, _ in pieces]), torch.tensor([b - a for a, b in pieces])
    draws = [torch.rand(len(pieces), generator=common.generator("steps", args.seed, epoch, n)) for n in indices]
    return first + (torch.stack(draws) * width).long()


@dataclass
class Replay:
    """SQDF's buffer: x_t, its step, x_0, the prompt and gamma^(steps left) r of past transitions of all processes."""

    size: int
    items: dict[str, torch.Tensor] = field(default_factory=dict)  # on the CPU, the oldest first

    def add(self, grid, path, chosen, batch, final, args, run) -> None:
        n, i = torch.arange(len(chosen)).repeat_interleave(chosen.shape[1]), chosen.flatten()
        prompt = torch.tensor([p.id for p in batch.prompts])[n]
        value = args.gamma ** (grid.steps - 1 - i).to(final) * final[n]
        new = {"x_t": path.x[n, i], "step": i, "x_0": path.x[n, -1], "prompt": prompt, "value": value}
        for name, values in new.items():
            values = common.gather(values.to(run.device), run).cpu()
            self.items[name] = torch.cat([self.items.get(name, values[:0]), values])[-self.size :].clone()  # else a checkpoint has all

    def draw(self, policy, grid, batch, count: int, epoch: int, args):
        """`count` old transitions for each sample, with an x_s of today's policy, by (seed, epoch, sample index).

        Yields micro-batches of them, in the samples' order: Rollout of one trajectory for each, known at x_t, x_s and x_0
        only (NaN elsewhere), their steps (M, 1), their Batch.
        """
        old, device = self.items, batch.noise.device
        weight = torch.ones_like(old["value"])
        if args.replay_priority == "reward":
            weight = old["value"] - old["value"].min() + 1e-6
        generators = [common.generator("replay", args.seed, epoch, n) for n in batch.indices]
        every = torch.cat([torch.multinomial(weight, count, replacement=True, generator=g) for g in generators])
        draws = torch.cat([torch.randn((count, *policy.latent_shape), generator=g) for g in generators])
        for pick, z in zip(every.split(args.micro_batch_size), draws.to(device).split(args.micro_batch_size)):
            prompts = [args.prompt_list[p] for p in old["prompt"][pick].tolist()]
            cond, n, i = policy.encode([p.text for p in prompts]), torch.arange(len(pick)), old["step"][pick]
            x = torch.full((len(pick), grid.steps + 1, *policy.latent_shape), torch.nan, device=device)
            x[:, -1], x[n, i] = old["x_0"][pick].to(device), old["x_t"][pick].to(device)
            path = common.Rollout(x, z, torch.full_like(x[:, 1:], torch.nan), torch.full_like(x[:, 1:], torch.nan), cond, prompts)
            with torch.no_grad():
                path.o_old[n, i] = policy.predict(x[n, i], grid.time(i, len(n), device), cond, args.cfg)
                with policy.reference():
                    path.o_ref[n, i] = policy.predict(x[n, i], grid.time(i, len(n), device), cond, args.cfg)
            x[n, i + 1] = grid.mu(x[n, i], path.o_old[n, i], i) + grid.at(grid.sigma, i, z) * z
            yield path, i[:, None], common.Batch(prompts, range(len(n)), cond, z[:, None])

    def state_dict(self) -> dict:
        return self.items

    def load_state_dict(self, state: dict) -> None:
        self.items = state


@dataclass
class Rows:
    """Transitions, flat (R, ...), image by image; what only an option needs is None without it."""

    step: torch.Tensor
    cond: common.Cond
    x_t: torch.Tensor
    o_old: torch.Tensor
    o_ref: torch.Tensor
    g: torch.Tensor
    g_t: torch.Tensor | None = None  # --backward-coef
    x_s: torch.Tensor | None = None  # --backward-coef, --flow-net
    x_0: torch.Tensor | None = None  # --flow-net


def concatenated(parts: list[Rows]) -> Rows:
    found = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Rows)}
    cond = sum(found["cond"][1:], found["cond"][0])
    return Rows(**{k: cond if k == "cond" else None if v[0] is None else torch.cat(v) for k, v in found.items()})


def rows_of(path, chosen, batch, policy, gradient, grid, args) -> Rows:
    """The chosen steps (B, S) of these trajectories, with their guidance."""
    n, i = torch.arange(len(chosen)).repeat_interleave(chosen.shape[1]), chosen.flatten()
    where = [args.guidance, *(["current"] if args.backward_coef else [])]
    g = [guidance(policy, gradient, grid, path, chosen, batch, args, w).flatten(0, 1) for w in where]  # (B S, C, h, w)
    x_s = path.x[n, i + 1] if args.backward_coef or args.flow_net else None
    x_0 = path.x[n, -1] if args.flow_net else None
    return Rows(i, path.cond[n], path.x[n, i], path.o_old[n, i], path.o_ref[n, i], g[0], g[1] if g[1:] else None, x_s, x_0)


def norm_quantile(g: torch.Tensor, most: int, quantile: float, run) -> float:
    """The quantile of the samples' norms over all processes; `most`: no process has more rows."""
    size = torch.full((most,), torch.nan, device=run.device)
    size[: len(g)] = g.flatten(1).norm(dim=1)
    every = common.gather(size, run)
    return torch.quantile(every[~every.isnan()].double(), quantile).item()


class RewardGradient:
    """grad of the summed reward with respect to latents, in float32, through the decoder and the reward, in chunks."""

    def __init__(self, args, run, policy, reward):
        self.args, self.policy, self.reward, self.tiny = args, policy, reward, None
        if args.tiny_vae:
            from diffusers import AutoencoderTiny

            self.tiny = AutoencoderTiny.from_pretrained(args.tiny_vae).to(run.device, torch.float32).eval().requires_grad_(False)
        self.net = None
        if args.lookahead_model:
            folder = "unet" if policy.kind == "eps" else "transformer"
            self.net = type(policy.net).from_pretrained(args.lookahead_model, subfolder=folder)
            self.net.to(run.device, run.dtype).eval().requires_grad_(False)

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        if self.tiny is None:
            return self.policy.decode(x0)
        return (self.tiny.decode(x0, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def reward_of(self, x0, texts, metadata) -> torch.Tensor:
        images = checkpoint(self.decode, x0, use_reentrant=False) if self.args.checkpoint_decoder else self.decode(x0)
        return self.reward(images, texts, metadata, grad=True)[0]

    def x0_hat(self, grid, x, i, cond):
        """x0_hat(x) at step i with gradient, by the chosen denoiser; i (B,) below T."""
        time = grid.time(i, len(x), x.device)
        if self.net is not None:
            self.policy.network_calls += 1
            embeds = cond.embeds[cond.index]
            if cond.pooled is not None:
                o = self.net(x.to(self.policy.dtype), embeds, cond.pooled[cond.index], time, return_dict=False)[0].float()
            else:
                o = self.net(x.to(self.policy.dtype), time, embeds, return_dict=False)[0].float()
        else:
            o = self.policy.predict(x, time, cond, self.args.cfg)
        return grid.x0_hat(x, o, i)

    @contextmanager
    def frozen(self):
        """The chosen denoiser, for a forward pass and its backward, which checkpointing repeats."""
        reference = self.args.denoiser == "reference" and self.net is None
        with self.policy.whole_gradient(), self.policy.reference() if reference else nullcontext():
            yield


def guidance(policy, gradient, grid, path, chosen, batch, args, where: str = "") -> torch.Tensor:
    """g (B, S, C, h, w) of the chosen steps.  Eq. 13 (current), 14 (lookahead); terminal: grad r at x_0, for every step."""
    where = where or args.guidance
    count, width = chosen.shape
    g = torch.zeros(count, width, *path.x.shape[2:], device=path.x.device)
    rows = [(n, k) for n in range(count) for k in range(1 if where == "terminal" else width)]
    chunk = min(args.micro_batch_size, args.decode_batch_size)  # the graph of network, decoder and reward lives at once
    for start in range(0, len(rows), chunk):
        n, k = torch.tensor(rows[start : start + chunk]).unbind(1)
        texts, extra = [batch.texts[j] for j in n], [batch.metadata[j] for j in n]
        i = chosen[n, k] + (where == "lookahead")
        with gradient.frozen():
            x, through = path.x[n, i], where != "terminal" and args.jacobian
            if where == "terminal":
                x0 = path.x[n, -1]
            elif through:
                x.requires_grad_()
                x0 = gradient.x0_hat(grid, x, i.clamp(max=grid.steps - 1), path.cond[n])
                end = (i == grid.steps).to(x.device)[:, None, None, None]  # the terminal latent is its own estimate
                x0 = torch.where(end, x, x0)
            else:
                x0 = frozen_estimate(gradient, grid, path, n, i)
            leaf = x0.detach().clone().requires_grad_()
            a = torch.autograd.grad(gradient.reward_of(leaf, texts, extra).sum(), leaf)[0]
            if through:  # ours: at norm 16, for a half-precision network's gradients would be lost at the reward's own scale
                size = a.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None] / 16
                a = torch.autograd.grad(x0, x, a / size)[0] * size
            g[n, k] = a
    return g[:, :1].expand(-1, width, -1, -1, -1) if where == "terminal" else g


@torch.no_grad()
def frozen_estimate(gradient, grid, path, n, i) -> torch.Tensor:
    """x0_hat at states i of the trajectories, from the rollout's own outputs where they are there; no gradient."""
    inner = i.clamp(max=grid.steps - 1)
    if gradient.args.denoiser == "policy" and gradient.net is None:
        x0 = grid.x0_hat(path.x[n, i], path.o_old[n, inner], inner)
    else:
        x0 = gradient.x0_hat(grid, path.x[n, i], inner, path.cond[n])
    return torch.where((i == grid.steps).to(x0.device)[:, None, None, None], path.x[n, i], x0).clone()


def value_loss(policy, net, grid, path, chosen, g, eta, n, k, limit, args) -> torch.Tensor:
    """VGG-Flow's losses for the value network, (B,): consistency along the flow + terminal.  Eq. 84-86.

    The value gradient G = eta_t g + net(x_t, t) of the controlled flow obeys dG/dtau = (dv_ref/dx)^T G along it (tau =
    1 - t; the gradient of the Hamilton-Jacobi-Bellman equation).  ours: the product with the frozen network's Jacobian
    is taken by automatic differentiation; public code takes finite differences of 1e-4.
    """
    i = chosen[n, k]
    after = (k + 1).clamp(max=chosen.shape[1] - 1)
    end = (i + 1 == grid.steps).to(path.x.device)[:, None, None, None]
    t = torch.cat([grid.t, torch.zeros(1, dtype=torch.float64)]).to(path.x)
    here = grid.at(eta, i, path.x[n, i]) * clip_norm(g[n, k], limit)
    there = grid.at(eta, chosen[n, after], here) * clip_norm(g[n, after], limit)
    value_t = here + net(path.x[n, i], t[i])
    value_s = torch.where(end, clip_norm(g[n, k], limit), there) + net(path.x[n, i + 1], t[i + 1])
    x = path.x[n, i].clone().requires_grad_()
    with policy.reference(), policy.whole_gradient(), torch.enable_grad():
        v_ref = policy.predict(x, grid.time(i, len(n), x.device), path.cond[n], args.cfg)
        carried = torch.autograd.grad((v_ref * value_t.detach()).sum(), x)[0]
    error = (value_s - value_t) / grid.at(grid.dt, i, x) - carried
    terminal = net(path.x[n, -1], torch.zeros(len(n), device=x.device))
    return (error**2).flatten(1).mean(1) + args.value_terminal * (terminal**2).flatten(1).mean(1)


if __name__ == "__main__":
    common.run_main(main, parse_args, rewards.UsageError)
