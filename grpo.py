"""GRPO: group-relative policy optimisation of a sampler's steps, and its zeroth-order relatives.
Papers: Liu et al., "Flow-GRPO", arXiv 2505.05470;  Black et al., DDPO, 2305.13301;
       Fan et al., DPOK, 2305.16381;  Xue et al., DanceGRPO, 2505.07818;
       MixGRPO, 2507.21802;  GRPO-Guard, 2510.22319;  Dr.GRPO, 2503.20783;
       PCPO, as in the code of Reward Score Matching (RSM, 2604.17415).  Equation
       numbers: RSM and VMPO (2602.12229) write most of these losses in one notation
Official code: github.com/yifan123/flow_grpo (Flow-GRPO, Fast, Guard)

Idea:  denoising is a decision process: a state is (c, t, x_t), an action is the
       next latent x_s, a step's policy is the Gaussian p_theta(x_s | x_t) of a
       stochastic sampler, and the one reward r(x_0) comes at the end.  All methods
       here raise the log-probability of the actions of good images, relative to the
       other images of the prompt, and differ in how a step's log ratio to the
       behaviour policy enters, in what holds the policy, and in which steps are
       stochastic.
Algorithm, one epoch (the loop below repeats the numbers):
  1 rollout     K images per prompt with theta_old; SDE steps inside the window, ODE
                steps outside; keep x_t, the draws z, the outputs o_old
  2 reward      r(x_0)
  3 advantage   A = (r - mean) / (std + 1e-4) of the group,
                or a relative                                           Flow-GRPO Eq. 4
  4 update      for each SDE transition, shuffled over samples and steps:
     4a         lambda = log p_theta(x_s | x_t) - log p_old(x_s | x_t),
                from the draws and the outputs                          RSM Eq. 101
     4b         the loss: REINFORCE, DDPO / GRPO,                       VMPO Eq. 18, 21
                EPG, PCPO or Guard                                      RSM Eq. 105, 100
     4c         + beta KL, on the means or the outputs;  AdamW          VMPO Eq. 22
  5 log, checkpoint, evaluation with the same noise every time
Differs from the papers: nowhere in the losses.
Differs from public code: the old log-probs are the rollout's own, never theta's;
       those of CPS are log-densities (theirs leave 1 / 2 sigma^2 out); a group is an
       integer, not a text; Guard's bias is per sample (theirs is averaged over the
       batch); a window of SDE steps lasts an epoch, not a call of the sampler; log
       ratios lose no digits; an update takes random transitions, not whole images,
       and prompts come in shuffled passes, not in independent draws.
Run:   python grpo.py --preset tiny-sd15        # embedded model, CPU, minutes, no downloads
       python grpo.py --preset vmpo-baseline-sd15-hpsv2     # the GRPO row of VMPO's Table 1
       torchrun --nproc-per-node 8 grpo.py --preset flowgrpo-sd35-ocr
Port:  copy the functions under "method": tensors in, tensors out; see docs/port.md.
       Details of the methods: docs/grpo.md
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: on a busy CPU, threads that spin on cost ten times

import dataclasses

import torch

import common
import harness
import rewards
from harness import need

TINY = harness.TINY | dict(loss="grpo", adv_norm="group", kl="mean", kl_anchor="ref", beta=0.05)
SD35 = dict(
    model="sd3.5-medium", num_prompts=48, group_size=24, steps=10, eval_steps=40,
    cfg=4.5, noise_level=0.7, lora_rank=32, lora_alpha=64, ema_decay=0.9, ema_repeats=2,
    adv_norm="global", drop_zero_advantage=True, kl="mean-nodt", kl_anchor="ref", beta=0.04,
    max_sequence_length=128, micro_batch_size=4, dtype="float16",
    note="150 epochs (theirs: until stopped), because a run must end",
)  # fmt: skip
OCR = SD35 | dict(reward="ocr", prompts="prompts/ocr_train.txt", eval_prompts="prompts/ocr_test.txt")
GENEVAL = SD35 | dict(
    reward="geneval-reward-flowgrpo", prompts="prompts/geneval_train.jsonl",
    eval_prompts="prompts/geneval_official.jsonl", eval_rewards="geneval",
)  # fmt: skip
PRESETS = {
    # DDPO: aesthetic reward, 45 animals; aesthetic() of its code's config/dgx.py; no KL
    "ddpo-sd15": dict(
        loss="ddpo", reward="aesthetic", prompts="prompts/simple_animals.txt", num_prompts=256,
        group_size=1, adv_norm="running", adv_eps=1e-6, kl="none", epochs=200, dtype="float16",
        note="SD 1.5 for the authors' SD 1.4: one model for all SD1.x runs",
    ),
    # Flow-GRPO: SD3.5-M, text rendering and GenEval; KL weight of the released configuration
    "flowgrpo-sd35-ocr": OCR,
    "flowgrpo-sd35-geneval": GENEVAL,
    # Flow-GRPO: FLUX.1-dev, PickScore; 512 pixels, distilled guidance, no KL
    "flowgrpo-flux": SD35 | dict(
        model="flux.1-dev", steps=6, eval_steps=28, cfg=3.5, noise_level=0.9, dtype="bfloat16",
        lora_rank=64, lora_alpha=128, lora_targets="attention+mlp", micro_batch_size=3,
        ema_repeats=6, kl="none", drop_zero_advantage=False, reward="pickscore26",
        prompts="prompts/pickscore_train.txt", eval_prompts="prompts/pickscore_test.txt",
        note="150 epochs (theirs: until stopped); states in float32 (theirs: rounded to bfloat16)",
    ),
    # Flow-GRPO-Fast as released for SD3.5 without guidance: GenEval, three CPS steps in the
    # noisy half, no KL.  Its 1e-5 clips a log-prob without our 1 / 2 sigma^2; in steps 0-4
    # 2 sigma^2 is 1.67 ... 0.91, so that 1e-5 is nearly the same here
    "flowgrpo-fast": GENEVAL | dict(
        kernel="cps", noise_level=0.8, cfg=1.0, kl="none", clip_range=1e-5,
        sde_window=3, sde_window_mode="random", sde_window_range=[0, 5],
        note="150 epochs (theirs: until stopped); one window an epoch (theirs: per 9 images), to resume",
    ),
    # GRPO-Guard: released configuration
    "guard": OCR | dict(
        loss="guard", clip_range=2e-6, lr=1e-4, kl="none", adv_norm="group", ema_repeats=4,
        note="150 epochs (theirs: until stopped); each image's own bias, as the paper, not the batch's",
    ),
    # DanceGRPO: finetune_flux_grpo.sh; 9 of the first 15 steps drawn for each image, no KL
    "dance-sd35": SD35 | dict(
        num_prompts=16, group_size=12, steps=16, train_fraction=0.9375, random_steps=9,
        kernel="dance", noise_level=0.3, shared_noise=True, kl="none", ema_decay=0.0,
        adv_norm="group", adv_eps=1e-8, adv_unbiased=True, drop_zero_advantage=False,
        updates_per_epoch=3, epochs=300, dtype="bfloat16",
        note="theirs is FLUX, 720 pixels, all weights, 103k prompts: size, LoRA, lr, cfg are Flow-GRPO's",
    ),
    # PCPO on SD1.5: the baseline configuration of Reward Score Matching's code
    "pcpo-sd15": dict(
        loss="pcpo", num_prompts=8, group_size=16, adv_norm="group", adv_eps=1e-8, kl="none",
        train_fraction=0.98, shared_blocks=2, lora_rank=16, lora_alpha=16, epochs=300,
        eval_kernel="same", dtype="float16",
        note="8 prompts in all (theirs: on each GPU), HPDv2's benchmark for its unshipped training list",
    ),
    # the GRPO rows of VMPO's Tables 1 and 2: Flow-GRPO's code with groups of 8, the rest as
    # VMPO (App. D); the defaults
    "vmpo-baseline-sd15-hpsv2": dict(
        eval_prompts="prompts/benchmark_ir.txt",
        note="std of all rewards and KL to the old policy are our reading: the paper does not say",
    ),
    # the embedded models: coloured shapes on a CPU (ours; docs/grpo.md)
    "tiny": TINY | dict(model="tiny-sd35", train_fraction=0.6, lr=4e-4, epochs=200),
    "tiny-sd15": TINY | dict(model="tiny-sd15", train_fraction=0.7, lr=1e-3, epochs=120),
}  # fmt: skip
METRICS = harness.Metrics(
    means=[
        "loss/total", "loss/policy", "loss/kl", "kl/ref",
        "ratio/mean", "ratio/clip_frac", "ratio/approx_kl",
        "adv/mean", "adv/zero_std_frac", "adv/clip_frac",
    ],
    stds=("adv/mean",),
    tops=("ratio/max", "ratio/start_deviation"),
    more=("window/first", "grad/norm"),
)  # fmt: skip


def parse_args(argv=None):
    parser = harness.make_parser(__doc__, "grpo")
    flag = harness.flags(parser, "method")
    losses = ["reinforce", "ddpo", "grpo", "epg", "pcpo", "guard"]
    flag("--loss", "grpo", losses, "reinforce: DPOK; ddpo: DDPO-IS; grpo: Flow-, Dr.GRPO (docs/grpo.md)")
    norms = ["group", "global", "none", "rloo", "raw", "running"]
    flag("--adv-norm", "global", norms, "under A: std of the group (GRPO), all (Flow-GRPO), prompt (DDPO), or 1")
    flag("--adv-eps", 1e-4, "float > 0", "added to the std (Flow-GRPO: 1e-4; DDPO: 1e-6; DanceGRPO: 1e-8)")
    flag("--adv-unbiased", False, "yes/no", "std with K - 1 for K (DanceGRPO)")
    flag("--drop-zero-advantage", False, "yes/no", "rows with A = 0 leave policy and KL (Flow-GRPO)")
    flag("--adv-per-reward", False, "yes/no", "A = sum_k w_k A(r_k), each reward of a sum by itself (GDPO)")
    flag("--adv-clip", 5.0, "float > 0 or inf", "A is clipped to +- this (DDPO, Flow-GRPO: 5)")
    flag("--clip-range", 1e-4, "float > 0 or inf", "xi (DDPO, Flow-GRPO: 1e-4, of mean log-probs)")
    terms = ["none", "mean", "mean-nodt", "velocity", "implicit"]
    flag("--kl", "mean", terms, "of the Gaussians; times dt (Flow-GRPO); of o (AWM); in r (VMPO Eq. 23)")
    flag("--kl-anchor", "old", ["ref", "old"], "KL to the reference (Flow-GRPO) or the rollout's policy (VMPO)")
    flag("--beta", 1.0, "float >= 0", "weight of the KL, in units of A (Flow-GRPO: 0.04; VMPO: 1)")
    flag("--sde-window", 0, "int >= 0", "stochastic, trained steps (Fast: 2-3, MixGRPO: 4); 0 = all")
    modes = ["fixed", "random", "progressive"]
    flag("--sde-window-mode", "fixed", modes, "at its first place, at random (Fast), on to the end (MixGRPO)")
    places = dict(nargs=2, metavar=("FIRST", "END"))
    flag("--sde-window-range", None, "int >= 0", "where it may lie (Fast: noisy half); default: trained", **places)
    flag("--sde-window-every", 1, "int >= 1", "epochs between two windows (MixGRPO: 25)")
    flag("--random-steps", 0, "int >= 0", "trained steps, drawn for each image (DanceGRPO: 9); 0 = all")
    flag("--shared-blocks", 0, "int >= 0", "N: one x_T in each N-th of an epoch (PCPO: 2); 0 = off")
    weights = ["auto", "none", "zeta", "public", "loss-only"]
    flag("--pcpo-weights", "auto", weights, "pcpo: w~_t (RSM Eq. 109); auto = zeta (flow) or public")
    flag("--pcpo-w", 4.5, "float > 0", "pcpo: W of the sampler's sigma~ (public code: 4.5)")
    harness.add_args(parser)
    parser.set_defaults(num_prompts=16, group_size=8)
    return harness.parse(parser, PRESETS, argv, rewards, check, sizes)


# ---- method: pure functions of tensors ---------------------------------------
def reinforce_loss(adv: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """-A log p_theta up to a constant, (B,).  DDPO-SF, DPOK; VMPO Eq. 18."""
    # the gradient is that of log p_theta; nothing corrects for draws of an older policy
    return -adv * log_ratio


def clipped_loss(adv: torch.Tensor, log_ratio: torch.Tensor, clip_range) -> torch.Tensor:
    """max(-A ratio, -A clip(ratio, 1 - xi, 1 + xi)), (B,); xi a number or (B,).

    PPO, DDPO-IS, (Flow-, Dr., Dance)GRPO; VMPO Eq. 19/21, RSM Eq. 106.
    """
    ratio = log_ratio.exp()
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    # the larger loss: only a row that went too far in its own direction has no gradient
    return torch.maximum(-adv * ratio, -adv * clipped)


def epg_loss(adv: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """-sg[ratio] A log p_theta, (B,): importance weights without clipping.  RSM Eq. 105."""
    return -log_ratio.exp().detach() * adv * log_ratio


def pcpo_loss(adv: torch.Tensor, log_ratio: torch.Tensor, clip_range) -> torch.Tensor:
    """max(-A lambda, -A clip(lambda, -xi, xi)), (B,), lambda the log ratio.  RSM Eq. 100.

    xi a number or (B,).  The gradient is that of the hinge max(0, xi |A| - A lambda).
    """
    clipped = torch.clamp(log_ratio, -clip_range, clip_range)
    return torch.maximum(-adv * log_ratio, -adv * clipped)


def guard_log_ratio(moved: torch.Tensor, z: torch.Tensor, sigma, reduce: str) -> torch.Tensor:
    """(log ratio + ||mu_theta - mu_old||^2 / 2 sigma^2) sigma, (B,).  GRPO-Guard.

    The ratio's negative bias is removed for each sample, which leaves the cross term, at
    one scale for all steps.  The loss of it is divided by dt.
    """
    # ref-code: averages the bias over the batch; ours: its own, as the formula says
    return common.reduce_latent(moved * z, reduce) * sigma


def implicit_reward(reward, log_r: torch.Tensor, beta: float) -> torch.Tensor:
    """r - beta log(p_old / p_ref) of each step, r (B,), log R (B, S) -> (B, S).  VMPO Eq. 23."""
    # plus: log R = log p_ref - log p_old has the opposite sign of Eq. 23's log ratio
    return reward[:, None] + beta * log_r


class RunningStats:
    """A from the last 32 rewards of the prompt, or where it has fewer than 16 from all of an epoch.  DDPO."""

    def __init__(self, eps: float):
        self.eps, self.last = eps, {}

    def advantage(self, reward: torch.Tensor, prompts: list[int]):
        """Rewards (B,), their prompts' numbers -> A (B,), and where A's rewards are all equal."""
        every, own = common.gather(reward).double().cpu(), reward.double().cpu()
        numbers = common.gather(torch.tensor(prompts, device=reward.device)).tolist()
        for number, value in zip(numbers, every.tolist()):  # of all processes
            self.last[number] = [*self.last.get(number, []), value][-32:]
        used = [torch.tensor(self.last[number], dtype=every.dtype) for number in prompts]
        used = [r if len(r) >= 16 else every for r in used]
        equal = torch.stack([r.min() == r.max() for r in used])
        std, mean = map(torch.stack, zip(*(torch.std_mean(r, correction=0) for r in used)))
        adv = torch.where(equal, 0.0, own - mean) / (std + self.eps)
        return adv.to(reward), equal.to(reward.device)

    def state_dict(self) -> dict:
        return self.last

    def load_state_dict(self, state: dict) -> None:
        self.last = dict(state)


def mixed_grid(sde: common.Grid, ode: common.Grid, steps: list[int]) -> common.Grid:
    """The SDE's Gaussians at `steps`, the ODE's steps elsewhere.  Fast, MixGRPO."""
    inside = torch.zeros(sde.steps, dtype=torch.bool)
    inside[steps] = True
    parts = ("x_coef", "o_coef", "sigma")
    pick = {k: torch.where(inside, getattr(sde, k), getattr(ode, k)) for k in parts}
    return dataclasses.replace(sde, **pick)


def window(mode: str, width: int, first: int, end: int, lap: int, seed: int) -> list[int]:
    """The steps of window number `lap` among the steps first ... end - 1."""
    at = 0
    if mode == "random":  # from its own generator, so that a resumed run draws the same
        places = end - first - width + 1
        at = int(torch.randint(places, (), generator=common.generator("window", seed, lap)))
    elif mode == "progressive":  # to the last step, where it shrinks to that one, and from the start
        at = lap % (end - first)  # ref-code: one round of an empty window before it starts again
    return list(range(first + at, min(first + at + width, end)))


def main(args):
    # ---- setup ---------------------------------------------------------------
    run, policy, theta, (reward, more) = harness.start(args, "grpo", rewards)
    native = policy.grid(args.steps, args.kernel, args.noise_level)
    ode = policy.grid(args.steps, "ode", 0.0)
    sde = stochastic_grid(native, args)
    trainable = common.policy_steps(sde, args.train_steps)
    check_noise(args, trainable)
    samples = args.num_prompts * args.group_size
    # again: a step without noise is no transition
    harness.check_updates(args, samples * fewest_steps(args, len(trainable)))
    optimiser = harness.make_optimiser(args, run, theta)
    running = {"running": RunningStats(args.adv_eps)} if args.adv_norm == "running" else {}
    harness.write_influence(run, trainable, influence(sde, pcpo_table(native, trainable, args), args))
    columns = METRICS.with_steps(["clip_frac"], trainable)
    recorder = harness.Recorder(run, args, policy, optimiser, (reward, more), rewards.RewardError, columns, running)

    for epoch in recorder.epochs():
        # ---- 1 rollout -------------------------------------------------------
        recorder.phase()
        grid, steps = sde, trainable
        if args.sde_window:
            places, lap = args.sde_window_range, epoch // args.sde_window_every
            steps = window(args.sde_window_mode, args.sde_window, *places, lap, args.seed)
            grid = mixed_grid(sde, ode, steps)
        reference = steps if needs_reference(args) else ()
        batch = harness.epoch_batch(args, policy, epoch, blocks=args.shared_blocks)
        path = common.rollout(policy, grid, batch.cond, batch.noise, args.cfg, args.micro_batch_size, reference)

        # ---- 2 reward --------------------------------------------------------
        recorder.phase()
        with recorder.scoring(epoch):
            final, parts = harness.score(args, policy, reward, path.x[:, -1], batch.prompts)
        recorder.leave_out(epoch, batch, final)

        # ---- 3 advantage -----------------------------------------------------
        returns = final  # (B,), or (B, S) where each of the S trained steps has its own
        if args.kl == "implicit":
            log_r = path.log_ref_over_old(grid, steps, args.logprob_reduce)
            returns = implicit_reward(final, log_r, args.beta)
        how = args.group_size, args.adv_norm, args.adv_eps, args.adv_unbiased
        if running:
            adv, zero = running["running"].advantage(final, [p.id for p in batch.prompts])
        elif args.adv_per_reward:
            adv, zero = common.sum_of_advantages(parts, reward.weights, *how)
        else:
            adv, zero = common.group_advantage(returns, *how)
        adv, zero = (x.view(len(final), -1).expand(-1, len(steps)) for x in (adv, zero))
        clipped = adv.abs() > args.adv_clip
        adv = adv.clamp(-args.adv_clip, args.adv_clip)  # (B, S)

        # ---- 4 update --------------------------------------------------------
        recorder.phase()
        stats, norms = recorder.stats(epoch), []
        column = torch.full((grid.steps,), -1)  # of `adv`, `zero` and `clipped`, by step
        column[steps] = torch.arange(len(steps))
        w_pcpo = pcpo_table(native, steps, args)
        if not reference:  # no term needs it: at a few transitions, for the log
            some = path.rows(*harness.watched_rows(args, batch, steps, epoch).unbind(1))
            at, how = (some.i, some.x_t, some.o_old, some.cond), (args.cfg, args.logprob_reduce)
            stats.add({"kl/ref": common.reference_kl(policy, grid, *at, *how, args.micro_batch_size)})
        updates = harness.epoch_updates(args, batch, steps, epoch, args.random_steps)
        transitions = samples * min(args.random_steps or len(steps), len(steps))
        for update, part in enumerate(updates):
            at, count = (part[:, 0], column[part[:, 1]]), transitions / args.updates_per_epoch
            stats.add({"adv/zero_std_frac": zero[at].float(), "adv/clip_frac": clipped[at].float()})
            if args.drop_zero_advantage:  # before policy and KL, means over the rows that are left
                part = part[(adv[at] != 0).cpu()]
                count = common.all_reduce({"rows": len(part)})["rows"]
            if not count:  # no row in any process
                continue
            for chunk in common.micro_batches(part, args.micro_batch_size, f"update {update + 1}"):
                rows = path.rows(*chunk.unbind(1))
                n, i = rows.n, rows.i
                # 4a: lambda, the log ratio to the rollout's policy
                o = policy.predict(rows.x_t, grid.time(i, rows.x_t), rows.cond, args.cfg)
                w = grid.at(grid.w, i, o)
                moved = w * (o - rows.o_old)  # (mu_theta - mu_old) / sigma
                log_ratio = common.log_ratio(moved, rows.z, args.logprob_reduce)
                if not norms:  # no update yet
                    stats.check_start(moved, rows.z)
                # 4b: the loss, and the log ratio that it compares with its clip range
                a = adv[n, column[i]]
                loss, log_ratio = policy_loss(grid, rows, o, moved, log_ratio, a, w_pcpo, args)
                # 4c: + beta KL, gradients
                kl, known = kl_term(grid, rows, o, w, moved, args)
                total = loss + args.beta * kl
                # micro-batches and processes add up to the mean over the update's transitions
                optimiser.backward(total.sum() / count)
                ratio = log_ratio.exp()
                outside = (log_ratio if args.loss == "pcpo" else ratio - 1).abs() > args.clip_range
                stats.add(harness.by_step(i, {"clip_frac": outside.float()}) | known | {
                    "loss/total": total, "loss/policy": loss, "loss/kl": kl, "adv/mean": a,
                    "ratio/mean": ratio, "ratio/clip_frac": outside.float(),
                    "ratio/approx_kl": 0.5 * log_ratio**2,
                }, i)  # fmt: skip
                stats.top("ratio/max", ratio.max().item())
            norms += optimiser.step()  # 4c: all-reduce, clip, AdamW on theta

        # ---- 5 log, samples, checkpoint, eval --------------------------------
        del batch, path  # what follows needs the room
        own = {"window/first": steps[0], "grad/norm": sum(norms) / max(1, len(norms))}
        recorder.end_epoch(epoch, final, parts, stats.result() | own)
    recorder.finish()


# ---- pieces that need the networks or the flags ------------------------------
def influence(grid: common.Grid, w_pcpo, args) -> torch.Tensor:
    """h_t (T,) up to a constant: the weight of the value's gradient in that of o.  RSM Eq. 23.

    That of A z in o's gradient is gamma w, and A z estimates sigma times the value's gradient.
    """
    if args.loss == "guard":
        return grid.o_coef.abs() * grid.sigma / grid.dt
    if args.loss == "pcpo" and args.pcpo_weights != "none":
        return w_pcpo.abs() * grid.sigma
    return grid.o_coef.abs()


def needs_reference(args) -> bool:
    """Whether the rollout asks the pretrained model, too: one more pass per trained step."""
    return args.kl == "implicit" or args.kl != "none" and args.kl_anchor == "ref"


def fewest_steps(args, available: int) -> int:
    """Transitions of an image that every epoch trains; a progressive window shrinks to one step."""
    if args.sde_window and args.sde_window_mode == "progressive":
        return 1
    most = args.sde_window or available
    return min(args.random_steps or most, most)


def stochastic_grid(native: common.Grid, args) -> common.Grid:
    """The sampler of the stochastic steps: PCPO's own where --pcpo-weights says so."""
    public = args.loss == "pcpo" and args.pcpo_weights == "public"
    return common.pcpo_grid(native, args.pcpo_w) if public else native


def pcpo_table(native: common.Grid, steps: list[int], args) -> torch.Tensor:
    """w~_t (T,) of the native grid, also where PCPO's own sampler runs, whose true w_t vary."""
    over = list(range(native.steps)) if args.pcpo_weights == "public" else steps  # ref-code: all
    return common.pcpo_weights(native, over, args.pcpo_weights)


def policy_loss(grid, rows, o, moved, log_ratio, adv, w_pcpo, args):
    """--loss of R rows: the loss (R,), and the log ratio that it clips (R,): log_ratio is
    that of 4a; PCPO and Guard put their own in its place.
    """
    sigma, dt, xi = grid.sigma[rows.i].to(o), grid.dt[rows.i].to(o), args.clip_range
    if args.loss == "reinforce":
        loss = reinforce_loss(adv, log_ratio)
    elif args.loss == "epg":
        loss = epg_loss(adv, log_ratio)
    elif args.loss == "pcpo":
        if args.pcpo_weights != "none":  # w~_t for w_t: no longer a log-likelihood ratio
            shift = grid.at(w_pcpo, rows.i, o) * (o - rows.o_old)
            log_ratio = common.log_ratio(shift, rows.z, args.logprob_reduce)
        loss = pcpo_loss(adv, log_ratio, xi)
    elif args.loss == "guard":
        log_ratio = guard_log_ratio(moved, rows.z, sigma, args.logprob_reduce)
        loss = clipped_loss(adv, log_ratio, xi) / dt
    else:  # grpo; ddpo is the same loss without a KL
        loss = clipped_loss(adv, log_ratio, xi)
    return loss, log_ratio


def kl_term(grid, rows, o, w, moved, args):
    """--kl of R rows, (R,), VMPO Eq. 22, 0 where there is none; "kl/ref", where the reference was asked."""
    kl, known = o.new_zeros(len(o)), {}  # an implicit KL is part of the reward
    if rows.o_ref is not None:
        known["kl/ref"] = common.kl_divergence(w * (o - rows.o_ref), args.logprob_reduce)
    if args.kl == "velocity":  # of the native outputs, all steps alike
        anchor = rows.o_ref if args.kl_anchor == "ref" else rows.o_old
        kl = common.reduce_latent((o - anchor) ** 2, "mean")
    elif args.kl in ("mean", "mean-nodt") and args.kl_anchor == "ref":
        kl = known["kl/ref"]
    elif args.kl in ("mean", "mean-nodt"):  # 0 in the first update, which still is at theta_old
        kl = common.kl_divergence(moved, args.logprob_reduce)
    if args.kl == "mean-nodt":  # over 2 g^2 instead of 2 sigma^2 = 2 g^2 dt
        kl = kl * grid.dt[rows.i].to(kl)
    return kl, known


# ---- what no paper mentions: checks of the flags, sizes for --dry-run --------
def check(args):
    updates, loss, flow = args.updates_per_epoch * args.inner_epochs, args.loss, args.kind == "flow"
    running, implicit = args.adv_norm == "running", args.kl == "implicit"
    if not running:
        harness.check_group(args)
    one = "--adv-norm running needs one reward an image, --kl implicit has one a step; use mean"
    need(not running or not implicit, one)
    each = "--adv-per-reward takes the rewards one by one, --kl implicit and --adv-norm running their sum"
    need(not args.adv_per_reward or not (implicit or running), each, "leave it out")
    gaps = "--skip-failed does not go with --adv-norm running, which keeps every reward"
    need(not args.skip_failed or not running, gaps, "use group or global")
    both = args.shared_blocks and args.shared_noise
    need(not both, "--shared-blocks and --shared-noise share x_T in two ways; use one of them")
    bare = f"--loss ddpo has no KL term, --kl is {args.kl}"
    need(loss != "ddpo" or args.kl == "none", bare, "use --loss grpo, the same with a KL, or --kl none")
    once = f"--loss reinforce is on-policy, {updates} updates per rollout are not"
    need(loss != "reinforce" or updates == 1, once, "use --updates-per-epoch 1 --inner-epochs 1, or --loss epg")
    what = f"--kl mean-nodt needs a flow model (g_t of its SDE), --model {args.model} is not one"
    need(args.kl != "mean-nodt" or flow, what, "use mean")
    wrong, right = ("public", "zeta") if flow else ("zeta", "public")
    args.pcpo_weights = right if args.pcpo_weights == "auto" else args.pcpo_weights
    what = f"--pcpo-weights {args.pcpo_weights} does not fit --model {args.model}"
    need(args.pcpo_weights != wrong, what, f"use {right}")
    check_window(args)
    steps, drawn = args.sde_window or args.train_steps, args.random_steps
    need(drawn <= steps, f"--random-steps {drawn} is more than the {steps} trained ones; use fewer")
    harness.check_updates(args, args.num_prompts * args.group_size * fewest_steps(args, args.train_steps))
    if loss in ("ddpo", "grpo", "pcpo"):
        harness.warn_of_clip_range(args)
    if args.kl in ("mean", "mean-nodt", "velocity") and args.kl_anchor == "old" and updates == 1:
        what = "--kl-anchor old with one update per rollout is a KL of a policy to itself"
        print(f"note: {what}, identically 0; for a KL that acts use --kl-anchor ref")


def check_window(args) -> None:
    """The window lies in its range, the range in the trained steps; fills in the range."""
    for word in args.argv:
        idle = word.startswith("--sde-window-") and not args.sde_window
        need(not idle, f"{word} does nothing with --sde-window 0; give a window of 1 or more steps, or leave it out")
    first, end = args.sde_window_range = args.sde_window_range or [0, args.train_steps]
    fits = first + args.sde_window <= end <= args.train_steps
    place = f"steps {first} to {end} of the {args.train_steps} trained ones"
    what = f"--sde-window {args.sde_window} does not fit into {place}"
    need(fits or not args.sde_window, what, "use a smaller window or another --sde-window-range")


def check_noise(args, trainable: list[int]) -> None:
    """Every step that the window can reach has noise; known only when there is a grid."""
    for i in range(*args.sde_window_range) if args.sde_window else ():
        what = f"step {i} of kernel {args.kernel} has no noise and cannot be trained"
        need(i in trainable, f"--sde-window-range: {what}; end the range before it")


def sizes(args) -> dict[str, str]:
    """The lines of --dry-run."""
    samples, train = args.num_prompts * args.group_size, args.sde_window or args.train_steps
    rows, passes = samples * min(args.random_steps or train, train), harness.network_passes(args, args.cfg)
    watched = samples * train if needs_reference(args) else min(harness.WATCHED, samples * train)  # for the log
    calls = f"{samples * args.steps * passes} in the rollout, {watched * passes} of the reference"
    window = f"{args.sde_window} of {args.steps}, {args.sde_window_mode}"
    return {
        "stochastic steps": window if args.sde_window else f"all {args.steps}",
        "network evaluations per epoch": f"{calls}, {rows * args.inner_epochs * passes} with gradient",
        "decodes and reward evaluations per epoch": f"{samples} images",
        "transitions per epoch": f"{rows}, {rows // args.updates_per_epoch} per update",
    }


if __name__ == "__main__":
    harness.run_main(main, parse_args, rewards.UsageError)
