"""TempFlow-RSM: branching policy gradients and their Reward-Score-Matching redesign.
Papers: Lee et al., "Reward Score Matching", arXiv 2604.17415 (code: github.com/jaylee2000/rsm);  He et al., TempFlow-GRPO,
       2508.04324 (code: github.com/Shredded-Pork/TempFlow-GRPO);  Li et al., BranchGRPO, 2509.06040

Idea:  one stochastic step at t, then the deterministic sampler to the end: the reward of that child is the reward of
       that one draw z.  A (r - mean) z / sigma over the B_i children of one state estimates the gradient of the value
       there (Stein), and every zeroth-order method regresses the score on the reference's score plus a multiple of it.
       In this view (RSM, Eq. 10) the number of children, the weight gamma(t) and the clip range per step are choices,
       and the redesign moves the children to the noisy steps and clips all steps alike.
Algorithm, one epoch (the loop below repeats the numbers):
  1 rollout     ODE trunk per image; at step i take B_i children by one SDE step, each by ODE to the end (or a tree)
  2 reward      r of every leaf; a node of a tree has the mean of its leaves
  3 advantage   A = (r - mean) / (std + 1e-4) among the children of (seed, step), or of (prompt, step)
  4 update      for each parent state, shuffled over images and steps; its children share one network call:
     4a         log ratio of every child;  row weight mean(B) / B_i
     4b         the loss: PPO, hinge, or Eq. 10 itself; times gamma(t)                 Eq. 10, 104-114
     4c         + beta KL to the reference; on steps without children the KL alone (ODE anchors);  AdamW
  5 log, checkpoint, evaluation with the same noise every time
Differs from the papers: the children of a state share the training pass, because they share (x_t, t, c): the same loss
       (they are averaged) for a B_i-th of the cost.  From public code: no state is evaluated twice; advantages, weights
       and biases are per row (TempFlow's broadcast to (B,1,1,B); Guard's are averaged over the batch).
Run:   python tempflow_rsm.py --preset tiny-sd15          # embedded model, CPU, minutes, no downloads
       torchrun --nproc-per-node 4 tempflow_rsm.py --preset rsm-geneval
Port:  copy the functions under "method": tensors in, tensors out.
"""

import dataclasses
import warnings
from dataclasses import dataclass

import torch
from tqdm import tqdm

import common
import rewards

TINY = common.TINY | dict(group_size=1, num_prompts=4, kl="true", beta=0.05, decode_batch_size=256)
SD35 = dict(model="sd3.5-medium", num_prompts=16, group_size=4, steps=10, eval_steps=40, cfg=4.5, noise_level=0.7,
            lora_rank=32, lora_alpha=64, max_sequence_length=128, ema_decay=0.9, micro_batch_size=4)  # fmt: skip
GENEVAL = SD35 | dict(num_prompts=48, reward="geneval-reward", prompts="prompts/geneval_train.jsonl",
                      eval_prompts="prompts/geneval_official.jsonl", eval_rewards="geneval", beta=0.004, epochs=420)  # fmt: skip
AESTHETIC = SD35 | dict(reward="aesthetic", prompts="prompts/pickscore_train.txt", eval_prompts="prompts/pickscore_test.txt",
                        kl="heuristic", beta=0.01, epochs=150)  # fmt: skip
RSM = dict(loss="hinge", reweight="none", fair_clip="guard")
SD15 = dict(model="sd15", steps=50, eval_steps=50, cfg=5.0, ema_decay=0.0, micro_batch_size=8, grouping="prompt", loss="hinge", reweight="pcpo", kl="none", lora_rank=16, lora_alpha=16, num_prompts=8, epochs=300)
PRESETS = {
    # TempFlow-GRPO as released; RSM's baselines
    "tempflow-sd35-geneval": GENEVAL,
    "tempflow-sd35-aesthetic": AESTHETIC,
    # RSM, mechanistic study: the same number of training rows, spread evenly or so that all steps are as noisy
    "rsm-uniform": AESTHETIC | RSM | dict(profile="7,7,7,7,7,7,6,6,0"),
    "rsm-equalvar": AESTHETIC | RSM | dict(profile="4,5,5,6,7,8,9,10,0"),
    # RSM, GenEval: children on the four noisiest steps, KL anchors on the others
    "rsm-geneval": GENEVAL | RSM | dict(profile="6,6,8,10", anchor_beta=0.004),
    # RSM, SD1.5: PCPO on whole stochastic trajectories, and its redesign with sparse branching
    "pcpo-sd15-hpsv2": SD15 | dict(branching="tree", tree_splits="", group_size=16),
    "rsm-sd15-hpsv2": SD15 | dict(group_size=5, profile="0:4,10:4,20:4,30:4,40:4", anchor_beta=8e-5, anchor_form="pcpo", anchor_max_ratio=0.1),
    # the embedded models: coloured shapes on a CPU (ours; docs/tempflow_rsm.md)
    "tiny": TINY | dict(model="tiny-sd35", lr=4e-4, epochs=200),
    "tiny-sd15": TINY | dict(model="tiny-sd15", lr=1e-3, epochs=120),
}


def parse_args(argv=None):
    parser = common.make_parser(__doc__, "tempflow_rsm")
    g = parser.add_argument_group("method")
    g.add_argument("--branching", default="trunk", choices=["trunk", "tree"], help="trunk = one-step children of an ODE trunk (TempFlow-GRPO); tree = stochastic everywhere, splitting at --tree-splits (BranchGRPO; without splits: plain trajectories)")
    g.add_argument("--profile", default="base", help="B_i: base (6 at every step but the last), uniform, equalvar, lowsnr, a list 'B_0,B_1,...', or 'step:B,step:B'; the named ones are generated for any grid by the three flags below")
    g.add_argument("--profile-total", type=int, help="sum of B_i of a named profile (RSM, 10 steps: 54; lowsnr: 30); default: 6 per step but the last, lowsnr 7.5 per active step")
    g.add_argument("--profile-power", type=float, help="p of B_i ~ sigma_i^-p (RSM: 0 for base and uniform, 1 for equalvar and lowsnr; its Eq. 19 would ask for 2)")
    g.add_argument("--profile-inactive", type=int, help="steps at the end, besides the last, without children (RSM, 10 steps: base 0, uniform and equalvar 1, lowsnr 5)")
    g.add_argument("--tree-splits", default="0,3,6,9", help="tree: steps at which every node gets two children (BranchGRPO: 0,3,6,9 of 20)")
    g.add_argument("--tail", default="ode", choices=["ode", "sde"], help="trunk: how a child goes on to the end (TempFlow: ode)")
    g.add_argument("--grouping", default="seed", choices=["seed", "prompt"], help="A is relative to the children of the same image and step (TempFlow), or of all the prompt's images at that step (RSM, SD1.5)")
    g.add_argument("--adv-clip", type=float, default=5.0, help="A is clipped to +- this (TempFlow, RSM: 5)")
    g.add_argument("--loss", default="ppo", choices=["ppo", "hinge", "rsm"], help="clipped ratio (TempFlow), hinge max(0, xi |A| - A log ratio) (RSM's 'matching'), or Eq. 10 written out, with the gradient of hinge + beta KL")
    g.add_argument("--reweight", default="tempflow", choices=["none", "tempflow", "pcpo", "guard"], help="gamma(t): 1, 2.25 sigma_t (TempFlow), zeta dt / w_t (PCPO; on SD1.5 its sampler and constant weight), or sigma_t / dt without the ratio's bias (Guard)")
    g.add_argument("--tempflow-scale", type=float, default=2.25, help="TempFlow: 1 / mean sigma_t of the trained steps (2.25 on SD3.5's 10-step grid)")
    g.add_argument("--pcpo-w", type=float, default=4.5, help="PCPO on SD1.5: W of the sampler's sigma~ (public code: 4.5); 0 = native sampler, constant weight only")
    g.add_argument("--fair-clip", default="none", choices=["none", "sigma2", "guard"], help="clip the log ratio at xi / sigma_t^2 (RSM Eq. 24); guard also gamma = sigma_t / dt (RSM, GenEval)")
    g.add_argument("--clip-range", type=float, default=1e-4, help="xi (TempFlow, RSM: 1e-4 for mean log-probs)")
    g.add_argument("--kl", default="true", choices=["none", "true", "heuristic"], help="on rows with children: KL of the Gaussians, or that times dt (RSM, aesthetic; flow models only)")
    g.add_argument("--beta", type=float, default=0.004, help="weight of the KL to the reference (TempFlow: 0.004 GenEval, 0.001 PickScore; RSM: 0.01 with heuristic)")
    g.add_argument("--anchor-beta", type=float, default=0.0, help="ODE anchors: weight of the KL at the trunk's states on steps without children (RSM: 0.004 GenEval; 8e-5 SD1.5); 0 = none")
    g.add_argument("--anchor-form", default="kl", choices=["kl", "pcpo"], help="kl = mean(B) ||d mu||^2 / 2 sigma^2 (RSM, flow), pcpo = W^2 ||d eps||^2 / 2 (RSM, SD1.5)")
    g.add_argument("--anchor-max-ratio", type=float, help="at most this many anchors per child, chosen at random (RSM, SD1.5: 0.1); default: all")
    g.add_argument("--entropy", type=float, default=0.0, help="beta of the entropy-augmented return r - beta sum log(p_theta / p_ref) over the later stochastic steps, whose mean is the soft value (RSM Eq. 57-60); needs --branching tree or --tail sde")
    common.add_args(parser)
    parser.set_defaults(model="sd3.5-medium", num_prompts=16, group_size=4, steps=10, eval_steps=40, cfg=4.5, lora_rank=32,
                        lora_alpha=64, max_sequence_length=128, ema_decay=0.9, micro_batch_size=4)  # fmt: skip
    return common.parse(parser, PRESETS, argv, rewards, check, sizes)


def check(args):
    if args.branching == "tree":
        try:
            args.splits = sorted({int(s) for s in args.tree_splits.split(",") if s.strip()})
        except ValueError:
            raise common.UsageError(f"--tree-splits {args.tree_splits} is not a list of step numbers such as 0,3,6,9") from None
        if args.splits and not 0 <= args.splits[0] <= args.splits[-1] < args.train_steps:
            raise common.UsageError(f"--tree-splits {args.tree_splits} goes beyond the {args.train_steps} trained steps; use steps 0 to {args.train_steps - 1}")
        args.widths = [(2 if i in args.splits else 1) if i < args.train_steps else 0 for i in range(args.steps)]
    else:
        if args.profile.isalpha() and args.profile not in PROFILES:
            raise common.UsageError(f"--profile {args.profile} is unknown; use {', '.join(PROFILES)}, a list 'B_0,B_1,...' or 'step:B,...'")
        if args.profile_power is not None and not abs(args.profile_power) <= 10:
            raise common.UsageError(f"--profile-power {args.profile_power} is no exponent one can use; give one between -10 and 10")
        args.widths = None if args.profile.isalpha() else parse_profile(args.profile, args.train_steps, args.steps)
        if args.grouping == "seed" and args.widths and 1 in args.widths:
            raise common.UsageError(f"--profile {args.profile} has a step with one child, and --grouping seed compares the children of a state; use 2 or more, or --grouping prompt")
        if args.grouping == "prompt" and args.group_size < 2 and args.widths and 1 in args.widths:
            raise common.UsageError(f"--profile {args.profile} has a step with one child, --group-size {args.group_size} leaves it alone in its group; use 2 or more of either")
        if not args.widths:
            args.widths = named_profile(args, None)
        if not args.widths and (scheduler := find_scheduler(args)):
            args.widths = named_profile(args, sde_grids(scheduler, args)[1].sigma.tolist())
    if args.grouping == "prompt" and args.group_size < 2 and args.branching == "tree" and 0 not in args.splits:
        raise common.UsageError(f"--group-size {args.group_size} leaves one image per prompt and nothing to compare; use 2 or more")
    if args.branching == "tree" and args.grouping == "seed" and 0 not in args.splits:
        raise common.UsageError("--branching tree --grouping seed compares nodes of one tree, which has one node before the first split; use --tree-splits 0,... or --grouping prompt")
    if args.entropy and (args.branching, args.tail) == ("trunk", "ode"):
        raise common.UsageError(f"--entropy {args.entropy} needs stochastic later steps; use --branching tree or --tail sde")
    if args.anchor_beta and args.branching == "tree":
        raise common.UsageError(f"--anchor-beta {args.anchor_beta} belongs to the trunk's states without children, a tree has none; leave it out")
    if args.shared_noise and args.branching == "trunk" and args.group_size > 1:
        raise common.UsageError(f"--shared-noise makes the {args.group_size} trunks of a prompt identical; use --group-size 1 and a wider --profile")
    if args.loss == "rsm" and (args.kl != "true" or not args.beta > 0):
        raise common.UsageError("--loss rsm writes policy term and KL as one square (Eq. 10); use --kl true and --beta above 0, or --loss hinge")
    if args.loss == "ppo" and args.reweight == "pcpo":
        raise common.UsageError("--loss ppo does not go with --reweight pcpo; use --loss hinge or rsm")
    if args.fair_clip != "none" and args.reweight in ("pcpo", "guard"):
        raise common.UsageError(f"--fair-clip {args.fair_clip} does not go with --reweight {args.reweight}; use none or tempflow")
    if args.kl == "heuristic" and args.kind == "eps":
        raise common.UsageError(f"--kl heuristic needs a flow model (g_t of its SDE), --model {args.model} is not one; use true")
    common.check_above_zero(args, "clip_range", "adv_clip", "tempflow_scale")
    common.check_not_negative(args, "beta", "anchor_beta", "entropy", "pcpo_w")
    if args.anchor_max_ratio is not None:
        common.check_not_negative(args, "anchor_max_ratio")
    if args.widths:
        check_states(args, args.widths)
    if args.reweight != "guard":
        common.warn_of_clip_range(args)


def check_states(args, widths: list[int]) -> None:
    states = args.num_prompts * args.group_size * sum(map(bool, widths)) + anchor_count(args, widths)
    if args.updates_per_epoch > states:
        raise common.UsageError(f"--updates-per-epoch {args.updates_per_epoch} is more than the {states} states of an epoch; use fewer")


def find_scheduler(args):
    """The model's scheduler, of which only the configuration is read; None for a model that is still on the hub."""
    import diffusers

    cls = diffusers.DDIMScheduler if args.kind == "eps" else diffusers.FlowMatchEulerDiscreteScheduler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a deprecated option that diffusers passes to the hub's client
        try:
            return cls.from_pretrained(args.model_path, subfolder="scheduler", local_files_only=True)
        except OSError:
            return None


def sizes(args) -> dict[str, str]:
    """The lines of --dry-run."""
    samples, passes = args.num_prompts * args.group_size, 2 if args.cfg != 1 else 1
    lines = {"images per epoch": f"{samples} = {args.num_prompts} prompts x {args.group_size} seeds"}
    widths = args.widths
    if widths is None:
        text = f"profile {args.profile}: generated from the model's grid when it is loaded"
        return lines | {"children": text, "memory for the rollout": "unknown before that"}
    rows, training = sum(widths), [i for i, b in enumerate(widths) if b]
    if args.branching == "tree":
        nodes, calls, parents, children = 1, 0, 0, 0
        for b in widths:
            calls, parents, children = calls + nodes, parents + nodes * bool(b), children + nodes * b
            nodes *= b or 1
        tails = 0
        lines |= {"leaves per image": str(nodes)}
    else:
        anchors = anchor_steps(args, widths)
        calls, children, nodes, parents = network_evaluations(widths, max([*training, *anchors])), rows, rows, len(training)
        tails = sum(b * max(0, args.train_steps - 1 - i) for i, b in enumerate(widths)) if args.entropy else 0
        lines |= {"children per image": f"{rows} on {len(training)} steps: {' '.join(map(str, widths))}"}
    kept = anchor_count(args, widths)
    states, reference = samples * parents + kept, samples * parents * needs_reference(args) + kept
    # x_t, o_old, o_ref and z of the levels, the same again in one piece for the update, the leaves and epoch_batch's noise
    latents = 2 * (2 * states + samples * children) + reference + states * bool(reference) + samples * (nodes + args.steps + 1)
    return lines | {
        "network evaluations per epoch": f"{samples * calls * passes} in the rollout ({samples * (calls + rows) * passes} if parents were evaluated again), {states * passes * args.inner_epochs} with gradient, {(reference + samples * tails) * passes} of the reference",
        "decodes and reward evaluations per epoch": f"{samples * nodes} images",
        "training rows per epoch": f"{samples * children}",
        "memory for the rollout": common.rollout_memory(args, latents, f"{latents} latents: noise, leaves, and twice states, outputs and draws"),
    }


def needs_reference(args) -> bool:
    """At the states with children, that is; anchors need it always."""
    return bool(args.kl != "none" and args.beta or args.entropy or args.loss == "rsm")


def anchor_steps(args, widths: list[int]) -> list[int]:
    """Steps without children at which the trunk's states carry a KL; never the last one."""
    return [i for i in range(min(args.train_steps, args.steps - 1)) if not widths[i]] if args.anchor_beta else []


def anchor_count(args, widths: list[int]) -> int:
    """Anchors of an epoch, over all processes."""
    samples = args.num_prompts * args.group_size
    every = samples * len(anchor_steps(args, widths))
    return every if args.anchor_max_ratio is None else int(min(every, args.anchor_max_ratio * samples * sum(widths)))


# ---- method: pure functions of tensors ------------------------------------------------------------------------------
PROFILES = {"base": (0.0, 0), "uniform": (0.0, 1), "equalvar": (1.0, 1), "lowsnr": (1.0, 5)}  # power; inactive of 9 steps


def make_profile(sigma: list[float], power: float, total: int, inactive: int) -> list[int]:
    """B_i ~ sigma_i^-power over all steps but the last and the `inactive` ones before it, rounded to `total` (RSM).

    Largest remainders; the earlier step wins a tie.  sigma (T,) in sampling order.  Returns T integers.
    """
    active = len(sigma) - 1 - inactive
    weight = [s**-power for s in sigma[:active]]
    share = [total * w / sum(weight) for w in weight]
    widths = [int(x) for x in share]
    order = sorted(range(active), key=lambda i: (-round(share[i] - widths[i], 9), i))
    for i in order[: total - sum(widths)]:
        widths[i] += 1
    return widths + [0] * (len(sigma) - active)


def parse_profile(text: str, train_steps: int, steps: int) -> list[int]:
    """'6,6,8,10' or '0:4,10:4' -> T numbers of children."""
    widths = [0] * steps
    try:
        items = [item.split(":") for item in text.split(",")]
        pairs = [(n, int(*item)) if len(item) == 1 else tuple(map(int, item)) for n, item in enumerate(items)]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError
    except ValueError:
        raise common.UsageError(f"--profile {text} is not a list of numbers 'B_0,B_1,...' or 'step:B,...'") from None
    for i, b in pairs:
        if not 0 <= i < steps or b < 0 or b and i >= train_steps:
            raise common.UsageError(f"--profile {text}: {b} children at step {i} is impossible; the grid has {steps} steps, of which {train_steps} are trained")
        widths[i] = b
    if len({i for i, _ in pairs}) < len(pairs):
        raise common.UsageError(f"--profile {text} names a step twice; give every step once")
    if not any(widths):
        raise common.UsageError(f"--profile {text} has no children at all; at least one step needs some")
    return widths


def named_profile(args, sigma: list[float] | None) -> list[int] | None:
    """The numbers of children of --profile NAME; sigma (T,) is needed where they depend on it, else None comes back."""
    power, inactive = PROFILES[args.profile]
    power = power if args.profile_power is None else args.profile_power
    before_last = args.steps - 1
    inactive = round(inactive * before_last / 9) if args.profile_inactive is None else args.profile_inactive
    if not 0 <= inactive < before_last:
        raise common.UsageError(f"--profile-inactive {inactive} leaves no step of {args.steps} with children; use 0 to {before_last - 1}")
    if before_last - inactive > args.train_steps:
        raise common.UsageError(f"--profile {args.profile} puts children on {before_last - inactive} steps, of which {args.train_steps} are trained; raise --profile-inactive to {before_last - args.train_steps}, or --train-fraction")
    total = args.profile_total
    if total is None:
        total = round(7.5 * (before_last - inactive)) if args.profile == "lowsnr" else 6 * before_last
    if sigma is None and power:
        return None
    if sigma and (silent := [i for i in range(before_last - inactive) if sigma[i] < common.MIN_SIGMA]):
        raise common.UsageError(f"--profile {args.profile} has children at step {silent[0]}, which has no noise with kernel {args.kernel}; raise --profile-inactive")
    widths = make_profile(sigma or [1.0] * args.steps, power, total, inactive)
    least = 2 if args.grouping == "seed" or args.group_size < 2 else 1
    if min(widths[: before_last - inactive]) < least:
        raise common.UsageError(f"--profile-total {total} leaves a step with fewer than {least} children ({' '.join(map(str, widths))}, --group-size {args.group_size}); raise it")
    return widths


def network_evaluations(widths: list[int], last: int) -> int:
    """Per image and guidance branch: the trunk up to step `last`, and every child's way to the end.

    The published counts add one per child for evaluating its parent again; the trunk has that already.
    """
    return last + 1 + sum(b * (len(widths) - 1 - i) for i, b in enumerate(widths))


def clipped_loss(adv, log_ratio, clip_range) -> torch.Tensor:
    """max(-A ratio, -A clip(ratio, 1 - xi, 1 + xi)), (R,); xi a number or (R,)."""
    ratio = log_ratio.exp()
    return torch.maximum(-adv * ratio, -adv * torch.clamp(ratio, 1 - clip_range, 1 + clip_range))


def hinge_loss(adv, log_ratio, clip_range) -> torch.Tensor:
    """max(0, xi |A| - A lambda), (R,): the gradient of PPO clipped in log space.  RSM's 'matching' loss, Eq. 104."""
    return (clip_range * adv.abs() - adv * log_ratio).clamp(min=0)


def rsm_loss(adv, drift, moved, z, gamma, c2, beta: float, open_row) -> torch.Tensor:
    """Eq. 10 for policy gradients, per scalar of the latent as the KL is, elements of (R, C, h, w):

    beta/2 ||drift - gamma A z / beta||^2 + beta/2 C2 ||moved||^2,  drift = (mu_theta - mu_ref) / sigma, moved = the
    same to old; C1 = beta b^2 / (2 sigma^2), Psi = sigma A z / (beta b).  Rows that the clip closes have gamma = C2 = 0.
    """
    a, g, c, keep = (v[:, None, None, None] for v in (adv, gamma, c2, open_row.to(adv)))
    return beta / 2 * (drift - keep * g * a * z / beta) ** 2 + beta / 2 * keep * c * moved**2


def pcpo_weights(grid: common.Grid, steps: list[int]) -> torch.Tensor:
    """w~_t (T,), signed as grid.w: zeta dt with zeta = sum w / sum dt over `steps` (flow), or the mean w (SD1.5)."""
    w = grid.w[steps].abs()
    return -w.sum() / grid.dt[steps].sum() * grid.dt if grid.kind == "flow" else -w.mean().expand(grid.steps)


def pcpo_grid(grid: common.Grid, big_w: float) -> common.Grid:
    """SD1.5's DDIM grid with PCPO's sigma~, for which (c1 + c2) / sigma~ = W (ref-code; docs/grpo.md)."""
    c1 = grid.nu * grid.alpha_s / grid.alpha
    root = grid.nu_s**2 * (big_w**2 + 1) - c1**2
    sigma = (big_w * c1 + root.clamp(min=0).sqrt()) / (big_w**2 + 1)
    if (root < 0).any() or (sigma > grid.nu_s).any():
        raise common.UsageError(f"--pcpo-w {big_w} has no sampler on this grid of {grid.steps} steps; use a larger value, more --steps, or 0")
    return dataclasses.replace(grid, sigma=sigma, o_coef=-c1 + (grid.nu_s**2 - sigma**2).sqrt())


def sde_grids(scheduler, args) -> tuple[common.Grid, common.Grid]:
    """The kernel's own grid, and the one that children are drawn with."""
    native = common.make_grid(scheduler, args.kind, args.steps, args.kernel, args.noise_level)
    pcpo = args.reweight == "pcpo" and args.kind == "eps" and args.pcpo_w
    return native, pcpo_grid(native, args.pcpo_w) if pcpo else native


@dataclass
class Level:
    """Step i: P states, each with B children.  On a trunk P = N images, or those that have an anchor here, and B = 0."""

    x_t: torch.Tensor  # (P, C, h, w)
    o_old: torch.Tensor
    o_ref: torch.Tensor | None  # None where nothing needs it
    z: torch.Tensor  # (P, B, C, h, w)
    image: torch.Tensor  # (P,) local index
    value: torch.Tensor | None = None  # (P, B) mean reward of the leaves below each child


# ---- rollout --------------------------------------------------------------------------------------------------------
def branch_noise(args, epoch: int, i: int, indices, count: int, shape, device) -> torch.Tensor:
    """(N, count, C, h, w): the draws of step i, by (seed, epoch, step, sample index)."""
    draws = [torch.randn((count, *shape), generator=common.generator("branch", args.seed, epoch, i, n)) for n in indices]
    return torch.stack(draws).to(device)


def evaluate_states(policy, grid, args, x, cond, i: int) -> torch.Tensor:
    """o at the states x (P, C, h, w) of step i, in micro-batches."""
    o = torch.empty_like(x)
    for start in range(0, len(x), args.micro_batch_size):
        rows = slice(start, start + args.micro_batch_size)
        o[rows] = policy.predict(x[rows], grid.time(i, len(x[rows]), x.device), cond[rows], args.cfg)
    return o


def evaluate_reference(policy, grid, args, x, cond, i: int) -> torch.Tensor:
    with policy.reference():
        return evaluate_states(policy, grid, args, x, cond, i)


def log_ratio_to_ref(grid, args, i: int, o, o_ref, z) -> torch.Tensor:
    """log p_old - log p_ref of the draws z (P, B, ...) of step i: (P, B)."""
    delta = (grid.at(grid.w, i, o) * (o_ref - o))[:, None]
    return -common.log_ratio((delta + 0 * z).flatten(0, 1), z.flatten(0, 1), args.logprob_reduce).view(z.shape[:2])


@torch.no_grad()
def trunk_rollout(policy, sde, ode, batch, widths, args, epoch, bar, anchored=None):
    """ODE trunks with one-step children -> {step: Level}, {step: (x_0 (N B, ...), entropy cost (N, B))}.

    `anchored`: the (sample index, step) pairs that are anchors in this epoch; None = all images at all anchor steps.
    """
    device, shape = batch.noise.device, policy.latent_shape
    anchors, wanted = anchor_steps(args, widths), [i for i, b in enumerate(widths) if b]
    x, levels, leaves = batch.noise[:, 0], {}, {}
    for i in range(max([*wanted, *anchors]) + 1):
        o = evaluate_states(policy, ode, args, x, batch.cond, i)
        image = torch.arange(len(x) if i in wanted or i in anchors else 0)
        if i in anchors and anchored is not None:
            image = torch.tensor([n for n, index in enumerate(batch.indices) if (index, i) in anchored], dtype=torch.long)
        if len(image):
            x_t, cond, indices = x[image], batch.cond[image], [batch.indices[n] for n in image]
            reference = needs_reference(args) or i in anchors
            o_ref = evaluate_reference(policy, ode, args, x_t, cond, i) if reference else None
            z = branch_noise(args, epoch, i, indices, widths[i], shape, device)
            levels[i] = Level(x_t, o[image], o_ref, z, image)
        x = ode.mu(x, o, i)
        bar.update(1)
    for i in wanted:
        level = levels[i]
        x = (sde.mu(level.x_t, level.o_old, i)[:, None] + sde.at(sde.sigma, i, level.z) * level.z).flatten(0, 1)
        cond = batch.cond[torch.arange(len(level.x_t)).repeat_interleave(widths[i])]
        cost = torch.zeros(level.z.shape[:2], device=device)
        for j in range(i + 1, ode.steps):  # all children of all images in one batch
            stochastic = args.tail == "sde" and j < args.train_steps and sde.sigma[j] >= common.MIN_SIGMA
            o = evaluate_states(policy, ode, args, x, cond, j)
            if stochastic:
                z = branch_noise(args, epoch, f"{i}/{j}", batch.indices, widths[i], shape, device).flatten(0, 1)
                if args.entropy:
                    o_ref = evaluate_reference(policy, ode, args, x, cond, j)
                    cost += log_ratio_to_ref(sde, args, j, o, o_ref, z[:, None]).view_as(cost)
                x = sde.mu(x, o, j) + sde.at(sde.sigma, j, x) * z
            else:
                x = ode.mu(x, o, j)
        bar.update(1)
        leaves[i] = (x, cost)
    return levels, leaves


@torch.no_grad()
def tree_rollout(policy, sde, ode, batch, widths, args, epoch, bar):
    """Stochastic trees -> {step: Level} and the leaves (N L, C, h, w)."""
    x, nodes, levels = batch.noise[:, 0], 1, {}
    for i in range(sde.steps):
        image = torch.arange(len(batch.noise)).repeat_interleave(nodes)
        cond = batch.cond[image]
        o = evaluate_states(policy, ode, args, x, cond, i)
        if widths[i] and sde.sigma[i] >= common.MIN_SIGMA:
            o_ref = evaluate_reference(policy, ode, args, x, cond, i) if needs_reference(args) else None
            z = branch_noise(args, epoch, i, batch.indices, nodes * widths[i], policy.latent_shape, x.device)
            z = z.view(-1, widths[i], *policy.latent_shape)
            levels[i] = Level(x, o, o_ref, z, image)
            x, nodes = (sde.mu(x, o, i)[:, None] + sde.at(sde.sigma, i, z) * z).flatten(0, 1), nodes * widths[i]
        else:
            x = ode.mu(x, o, i)
        bar.update(1)
    return levels, x


def back_up(levels, grid, args, reward: torch.Tensor) -> None:
    """Node values of a tree: the mean of the leaves below, minus the entropy cost on the way (RSM Eq. 57-60)."""
    value = reward
    for i in sorted(levels, reverse=True):
        level = levels[i]
        level.value = value.view(level.z.shape[:2])
        cost = args.entropy * log_ratio_to_ref(grid, args, i, level.o_old, level.o_ref, level.z) if args.entropy else 0.0
        value = (level.value - cost).mean(1)


def main(args):
    # ---- setup ------------------------------------------------------------------------------------------------------
    run = common.setup(args, "tempflow_rsm")
    policy = common.Policy(args, run)
    params = common.add_lora(policy, args)
    reward, more = rewards.load_args(args, run.device)
    native, sde = sde_grids(policy.pipe.scheduler, args)
    ode = common.make_grid(policy.pipe.scheduler, policy.kind, args.steps, "ode", 0.0)
    trainable = common.policy_steps(sde, args.train_steps)
    widths = args.widths or named_profile(args, sde.sigma.tolist())
    branching = args.splits if args.branching == "tree" else [i for i, b in enumerate(widths) if b]
    if without := [i for i in branching if i not in trainable]:
        flag = "--tree-splits splits" if args.branching == "tree" else "--profile has children"
        raise common.UsageError(f"{flag} at step {without[0]}, which has no noise with kernel {args.kernel}; leave it out")
    widths = [b if i in trainable else 0 for i, b in enumerate(widths)]  # a tree goes on without noise there
    check_states(args, widths)
    if run.is_main and args.branching == "trunk":
        print(f"children per step: {' '.join(map(str, widths))}")
    with_children, anchors = [i for i, b in enumerate(widths) if b], anchor_steps(args, widths)
    mean_width = sum(widths) / len(with_children)
    weights = pcpo_weights(native, with_children if policy.kind == "flow" else trainable)
    optimiser = common.Optimiser(args, run, params)
    means = ["loss/total", "loss/policy", "loss/kl", "loss/anchor", "kl/ref", "ratio/mean", "ratio/clip_frac", "ratio/approx_kl", "adv/mean", "adv/zero_std_frac"]
    tops = ["ratio/max", "ratio/start_deviation"]
    per_step = [f"value_std/{i:02d}" for i in with_children]
    recorder = common.Recorder(run, args, policy, optimiser, reward, more, rewards.RewardError, [*means, "adv/std", *tops, *per_step, "grad/norm"])

    for epoch in recorder.epochs():
        # ---- 1 rollout ----------------------------------------------------------------------------------------------
        recorder.phase()
        batch = common.epoch_batch(policy, args, run, epoch)
        anchored = kept_anchors(args, run, epoch, anchors, sum(widths))
        bar = tqdm(desc="rollout", leave=False, disable=not run.is_main or None)
        if args.branching == "tree":
            levels, ends = tree_rollout(policy, sde, ode, batch, widths, args, epoch, bar)
            leaves = {-1: (ends, None)}
        else:
            levels, leaves = trunk_rollout(policy, sde, ode, batch, widths, args, epoch, bar, anchored)
        bar.close()

        # ---- 2 reward -----------------------------------------------------------------------------------------------
        recorder.phase()
        scores = {}
        with recorder.scoring(epoch), torch.no_grad():
            for i, (x0, _) in leaves.items():
                owner = torch.arange(len(batch.prompts)).repeat_interleave(len(x0) // len(batch.prompts)).tolist()
                texts, extra = [batch.texts[n] for n in owner], [batch.metadata[n] for n in owner]
                scores[i] = reward(policy.decode(x0), texts, extra, chunk=args.reward_batch_size)
        if args.branching == "tree":
            back_up(levels, sde, args, scores[-1][0])
        else:
            for i in with_children:
                levels[i].value = scores[i][0].view(levels[i].z.shape[:2]) - args.entropy * leaves[i][1]
        final = torch.cat([total for total, _ in scores.values()])
        parts = {name: torch.cat([p[name] for _, p in scores.values()]) for name in next(iter(scores.values()))[1]}

        # ---- 3 advantage --------------------------------------------------------------------------------------------
        children, spread = [], {}
        for i in with_children:
            level = levels[i]
            seeds = args.group_size if args.grouping == "prompt" else 1
            group = seeds * level.value.numel() // len(batch.prompts)
            adv, equal = common.group_advantage(level.value.flatten(), group, "group", run)
            children.append((level.z.flatten(0, 1), adv.clamp(-args.adv_clip, args.adv_clip), equal))
            spread[f"value_std/{i:02d}"] = common.gather(level.value.view(-1, group).std(1, correction=0), run).mean().item()
        z, adv, equal = (torch.cat(c) for c in zip(*children))  # a row per child, in the order of the states
        every = list(levels.values())  # x_t, o_old, o_ref, step, width, sample: a row per state
        x_t, o_old = torch.cat([level.x_t for level in every]), torch.cat([level.o_old for level in every])
        o_ref = None
        if needs_reference(args) or anchors:
            o_ref = torch.cat([torch.full_like(v.x_t, torch.nan) if v.o_ref is None else v.o_ref for v in every])
        count = torch.tensor([len(level.x_t) for level in every])
        step, width = (torch.tensor(v).repeat_interleave(count) for v in (list(levels), [level.z.shape[1] for level in every]))
        sample = torch.cat([level.image for level in every])
        first_child = width.cumsum(0) - width
        states = {}  # (image, step): its rows; none where an anchor is left out
        for p, key in enumerate(zip(sample.tolist(), step.tolist())):
            states.setdefault(key, []).append(p)

        # ---- 4 update -----------------------------------------------------------------------------------------------
        recorder.phase()
        stats, norms, checked = common.Stats(means, tops), [], False
        for update, part in enumerate(common.epoch_updates(args, run, sorted(with_children + anchors), epoch)):
            mine = torch.tensor([p for n, i in part.tolist() for p in states.get((n, i), [])], dtype=torch.long)
            family = [torch.arange(first_child[p], first_child[p] + width[p]) for p in mine]
            count = {"rows": float(sum((~equal[f]).sum() for f in family)), "anchors": float((width[mine] == 0).sum())}
            count = common.all_reduce(count | {"states": float(len(mine))}, run)
            if not count["states"]:  # anchors only, which are all left out
                continue
            count = {k: max(1.0, v) for k, v in count.items()}
            for rows in common.micro_batches(torch.arange(len(mine)), args.micro_batch_size, run, f"update {update + 1}"):
                p = mine[rows]
                o = policy.predict(x_t[p], ode.time(step[p], len(p), run.device), batch.cond[sample[p]], args.cfg)
                # 4a: each child's log ratio; its parent's outputs are its own
                c = torch.cat([family[j] for j in rows])
                own = torch.arange(len(p)).repeat_interleave(width[p])
                i = step[p][own]
                sigma, dt, a = sde.sigma[i].to(x_t), sde.dt[i].to(x_t), adv[c]
                shift = (o - o_old[p])[own]
                moved = sde.at(sde.w, i, o) * shift
                log_ratio = common.log_ratio(moved, z[c], args.logprob_reduce)
                if update == 0 and not checked and len(c):
                    stats.top("ratio/start_deviation", common.check_start(moved, z[c], args, run, epoch))
                    checked = True
                # 4b: the loss, its gamma(t) and its clip range
                gamma, c2 = torch.ones_like(a), a
                if args.reweight == "tempflow":
                    gamma, c2 = args.tempflow_scale * sigma, args.tempflow_scale * sigma * a
                elif args.reweight == "pcpo":
                    log_ratio = common.log_ratio(sde.at(weights, i, o) * shift, z[c], args.logprob_reduce)
                    gamma = (weights / sde.w)[i].to(x_t)
                    c2 = gamma**2 * a
                elif args.reweight == "guard":
                    log_ratio = common.reduce_latent(moved * z[c], args.logprob_reduce) * sigma
                    gamma, c2 = sigma / dt, torch.zeros_like(a)
                clip_range = args.clip_range / sigma**2 if args.fair_clip != "none" else args.clip_range
                if args.loss == "ppo":
                    loss = clipped_loss(a, log_ratio, clip_range)
                else:
                    loss = hinge_loss(a, log_ratio, clip_range)
                if args.reweight == "guard":
                    loss = loss / dt
                elif args.reweight == "tempflow":
                    loss = loss * gamma
                if args.fair_clip == "guard":
                    loss, gamma, c2 = loss * sigma / dt, gamma * sigma / dt, c2 * sigma / dt
                # 4c: + KL, anchors, gradients
                kl, values, anchor = torch.zeros_like(loss), {}, torch.zeros(0, device=run.device)
                if o_ref is not None:
                    known = slice(None) if needs_reference(args) else width[p] == 0  # else only anchors have o_ref
                    drift = o[known] - o_ref[p[known]]
                    here = common.kl_divergence(sde.at(sde.w, step[p[known]], o) * drift, args.logprob_reduce)
                    values["kl/ref"] = here
                    if args.kl != "none" and needs_reference(args):
                        kl = here[own] * (dt if args.kl == "heuristic" else 1.0)
                    anchor = here * mean_width
                    if args.anchor_form == "pcpo":
                        anchor = 0.5 * (args.pcpo_w or 1.0) ** 2 * common.reduce_latent(drift**2, "mean")
                    anchor = anchor[width[p[known]] == 0]
                row = loss + args.beta * kl
                if args.loss == "rsm":
                    open_row = loss.detach() > 0
                    eq10 = rsm_loss(a, sde.at(sde.w, i, o) * drift[own], moved, z[c], gamma, c2 / args.beta, args.beta, open_row)
                    row = common.reduce_latent(eq10, args.logprob_reduce)
                row = row * ~equal[c]
                if args.branching == "trunk":
                    row = row * mean_width / width[p][own].to(row)
                optimiser.backward(row.sum() / count["rows"] + args.anchor_beta * anchor.sum() / count["anchors"])
                ratio = log_ratio.exp()
                stats.add(values | {
                    "loss/total": row, "loss/policy": loss, "loss/kl": kl, "loss/anchor": anchor, "ratio/mean": ratio,
                    "ratio/clip_frac": (log_ratio.abs() > clip_range).float(), "ratio/approx_kl": 0.5 * log_ratio**2,
                    "adv/mean": a, "adv/zero_std_frac": equal[c].float(),
                })  # fmt: skip
                stats.top("ratio/max", ratio.max().item() if len(c) else 0.0)
            norms += optimiser.step()

        # ---- 5 log, samples, checkpoint, eval -----------------------------------------------------------------------
        metrics = stats.result(run, std=("adv/mean",)) | spread | {"grad/norm": sum(norms) / len(norms)}
        recorder.end_epoch(epoch, final, parts, metrics)
    recorder.finish()


def kept_anchors(args, run, epoch: int, steps: list[int], rows: int) -> set | None:
    """The (sample index, step) pairs that are anchors in this epoch; None = all.  --anchor-max-ratio per child row."""
    if args.anchor_max_ratio is None:
        return None
    samples = args.num_prompts * args.group_size
    pairs = [(n, i) for n in range(samples) for i in steps]
    order = torch.randperm(len(pairs), generator=common.generator("anchors", args.seed, epoch)).tolist()
    return {pairs[j] for j in order[: int(min(len(pairs), args.anchor_max_ratio * samples * rows))]}


if __name__ == "__main__":
    common.run_main(main, parse_args, rewards.UsageError)
