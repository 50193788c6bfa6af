"""TempFlow-RSM: branching policy gradients and their Reward-Score-Matching redesign.
Papers: Lee et al., "Reward Score Matching" (RSM), arXiv 2604.17415;
       He et al., TempFlow-GRPO, 2508.04324;  Li et al., BranchGRPO, 2509.06040
Official code: github.com/jaylee2000/rsm, github.com/Shredded-Pork/TempFlow-GRPO

Idea:  one stochastic step at t, then the deterministic sampler to the end: the reward of
       that child is the reward of that one draw z.  The mean of A z / sigma over the B_i
       children of one state estimates the gradient of the value there (Stein), and every
       zeroth-order method regresses the score on the reference's score plus a multiple of
       it.  In this view (RSM, Eq. 10) the number of children, the weight gamma(t) and the
       clip range per step are choices, and the redesign moves the children to the noisy
       steps and clips all steps alike.
Algorithm, one epoch (the loop below repeats the numbers):
  1 rollout     an ODE trunk per image; at step i B_i children by one SDE step, each by ODE
                to the end; or a tree that is stochastic everywhere
  2 reward      r of every leaf; a node of a tree has the mean of its leaves
  3 advantage   A = (r - mean) / (std + 1e-4) among the children of (seed, step),
                or of (prompt, step); rows with A = 0 do not count (--mask)
  4 update      for each parent state, shuffled over images and steps:
     4a         the log ratio of every child; siblings share one network pass
     4b         the loss: PPO, hinge or Eq. 10 itself, times gamma(t)     Eq. 10, 104-114
     4c         + beta KL to the reference; row weight mean(B) / B_i; on steps without
                children the KL alone (ODE anchors);  AdamW
  5 log, checkpoint, evaluation with the same noise every time
Differs from the papers: siblings share the training pass, because they share (x_t, t, c):
       the same loss (they are averaged) for a B_i-th of the cost.
Differs from public code: no state is evaluated twice; advantages, weights and biases are
       per row (TempFlow's broadcast to (B,1,1,B); Guard's are averaged over the batch).
       A preset's own differences are its note, which a run prints.
Run:   python tempflow_rsm.py --preset tiny-sd15      # embedded model, CPU, no downloads
       torchrun --nproc-per-node 4 tempflow_rsm.py --preset rsm-geneval
Port:  copy the functions under "method": tensors in, tensors out; see docs/port.md.
       Details of the methods: docs/tempflow_rsm.md
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: on a busy CPU, threads that spin on cost ten times

import dataclasses
import math
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass

import torch

import common
import harness
import rewards
from harness import need

TINY = harness.TINY | dict(group_size=1, num_prompts=4, kl="true", beta=0.05, mask="groups", decode_batch_size=256)
DEFAULTS = dict(
    model="sd3.5-medium", num_prompts=16, group_size=4, steps=10, eval_steps=40, cfg=4.5,
    lora_rank=32, lora_alpha=64, max_sequence_length=128, ema_decay=0.9, micro_batch_size=4,
)  # fmt: skip
# for the notes: half the memory; needs the test list and time; less repetition, the same law
HALF = "weights in float16 (theirs: float32, autocast), evaluations off between the first and last"
OURS = f"prompts in shuffled passes (theirs: with repetition), {HALF}"
SD35 = DEFAULTS | dict(noise_level=0.7, dtype="float16")
GENEVAL = SD35 | dict(
    num_prompts=48, reward="geneval-reward-flowgrpo", eval_rewards="geneval,pickscore",
    prompts="prompts/geneval_train.jsonl", eval_prompts="prompts/geneval_official.jsonl",
    beta=0.004, epochs=420,
)  # fmt: skip
AESTHETIC = SD35 | dict(
    reward="aesthetic", kl="heuristic", beta=0.01, epochs=150, ema_repeats=8,
    prompts="prompts/pickscore_train.txt", eval_prompts="prompts/pickscore_test.txt",
    note=f"150 epochs (theirs: 151, the last is evaluated only), {OURS}",
)  # fmt: skip
EPOCHS = "420 epochs as in RSM's text (its configuration: 1081)"
RSM = dict(loss="hinge", reweight="none", fair_clip="guard")
SD15 = dict(
    model="sd15", steps=50, eval_steps=50, cfg=5.0, ema_decay=0.0, micro_batch_size=8,
    lora_rank=16, lora_alpha=16, num_prompts=8, epochs=300,
    grouping="prompt", loss="hinge", reweight="pcpo", kl="none",
    dtype="float16", shared_blocks=2, eval_kernel="same",
)  # fmt: skip
HPD = (
    "8 prompts an epoch in all (the configuration's 8 are per GPU; RSM's text: 4 GPUs), two HPDv2 "
    f"benchmark files for its 103k training prompts, which are not shipped, {HALF}"
)
PRESETS = {
    # TempFlow-GRPO as RSM's baselines
    "tempflow-sd35-geneval": GENEVAL | dict(
        ema_repeats=12,
        note=f"RSM's baseline, not TempFlow's own run (8 prompts x 4 images, 3000 epochs); {EPOCHS}, {OURS}",
    ),
    "tempflow-sd35-aesthetic": AESTHETIC,
    # RSM, mechanistic study: as many rows, spread evenly or so that all steps are as noisy
    "rsm-uniform": AESTHETIC | RSM | dict(profile="7,7,7,7,7,7,6,6,0"),
    "rsm-equalvar": AESTHETIC | RSM | dict(profile="4,5,5,6,7,8,9,10,0"),
    # RSM, GenEval: children on the four noisiest steps, KL anchors on the others
    "rsm-geneval": GENEVAL | RSM | dict(
        profile="6,6,8,10", anchor_beta=0.004, ema_repeats=7, note=f"{EPOCHS}, {OURS}",
    ),
    # RSM, SD1.5: PCPO on whole stochastic trajectories
    "pcpo-sd15-hpsv2": SD15 | dict(
        branching="tree", tree_splits="", group_size=16, adv_eps=1e-8, train_fraction=0.98,
        tail="sde", mask="none", note=f"{HPD}, updates of random transitions (theirs: of whole images)",
    ),
    # RSM, SD1.5: PCPO's redesign with sparse branching; its 5 trunks a prompt start from one
    # x_T, hence are one; .8 = 80 anchors / 100 micro-batches
    "rsm-sd15-hpsv2": SD15 | dict(
        group_size=1, profile="0:20,10:20,20:20,30:20,40:20", anchor_beta=8e-5,
        anchor_form="pcpo", anchor_max_ratio=0.1, anchor_first=0.8,
        note=f"{HPD}, updates of whole states (theirs: of random children)",
    ),
    # the embedded models: coloured shapes on a CPU (ours; docs/tempflow_rsm.md)
    "tiny": TINY | dict(model="tiny-sd35", lr=4e-4, epochs=200),
    "tiny-sd15": TINY | dict(model="tiny-sd15", lr=1e-3, epochs=120),
}  # fmt: skip
METRICS = harness.Metrics(
    means=[
        "loss/total", "loss/policy", "loss/kl", "loss/anchor", "kl/ref",
        "ratio/mean", "ratio/clip_frac", "ratio/approx_kl", "adv/mean", "adv/zero_std_frac",
    ],
    stds=("adv/mean",),
    tops=("ratio/max", "ratio/start_deviation"),
    more=("grad/norm",),  # before it "value_std/NN" of every step with children
)  # fmt: skip


def parse_args(argv=None):
    parser = harness.make_parser(__doc__, "tempflow_rsm")
    flag = harness.flags(parser, "method")
    flag("--branching", "trunk", ["trunk", "tree"], "ODE trunks (TempFlow), stochastic trees (BranchGRPO)")
    flag("--profile", "base", "text", "B_i: 'B_0,B_1,...'; 'step:B,...'; base: 6, but for the last")
    flag("--tree-splits", "0,3,6,9", "text", "steps with two children (BranchGRPO: 0,3,6,9 of 20)")
    flag("--tail", "ode", ["ode", "sde"], "a trunk's child goes on (TempFlow: ode); a tree's untrained steps (PCPO)")
    flag("--lookahead", 0, "int >= 0", "i - j: steps of a child, then r of x0_hat (RSM Eq. 15); 0 = to x_0 (j = 0)")
    flag("--grouping", "seed", ["seed", "prompt"], "A among the image's children, or the prompt's (SD1.5)")
    flag("--adv-eps", 1e-4, "float > 0", "A = (r - mean) / (std + this) (RSM, TempFlow: 1e-4; PCPO: 1e-8)")
    flag("--adv-unbiased", False, "yes/no", "std over the group's size - 1 (BranchGRPO, with eps 1e-8)")
    flag("--mask", "rows", ["rows", "groups", "none"], "what is left out: A = 0 (RSM), equal groups, nothing (PCPO)")
    flag("--adv-clip", 5.0, "float > 0 or inf", "A is clipped to +- this (TempFlow, RSM: 5)")
    flag("--loss", "ppo", ["ppo", "hinge", "rsm"], "clipped ratio (TempFlow), RSM Eq. 104, Eq. 10 itself")
    rules = ["none", "tempflow", "pcpo", "guard"]
    flag("--reweight", "tempflow", rules, "gamma(t): 1, 2.25 sigma_t, w~_t / w_t, sigma_t / dt (RSM Table 1)")
    flag("--pcpo-w", 4.5, "float >= 0", "SD1.5: W of PCPO's sampler (public code: 4.5); 0 = native sampler")
    flag("--fair-clip", "none", ["none", "sigma2", "guard"], "xi / sigma_t^2 (RSM Eq. 24); guard: weight sigma_t / dt")
    flag("--clip-range", 1e-4, "float > 0 or inf", "xi of mean log-probs (TempFlow, RSM: 1e-4)")
    flag("--kl", "true", ["none", "true", "heuristic"], "on children's rows; or times dt (RSM, aesthetic)")
    flag("--beta", 0.004, "float >= 0", "weight of the KL, in units of A (TempFlow: 0.004; RSM: 0.01)")
    flag("--anchor-beta", 0.0, "float >= 0", "KL on childless steps (RSM: 0.004 GenEval, 8e-5 SD1.5)")
    flag("--anchor-form", "kl", ["kl", "pcpo"], "mean(B) KL (RSM, flow), W^2 |d eps|^2 / 2 (RSM, SD1.5)")
    flag("--anchor-max-ratio", None, "float >= 0", "at most so many anchors per child (RSM, SD1.5: 0.1)")
    flag("--anchor-first", 0.0, "float >= 0", "all of them in update 1, beta times this (RSM, SD1.5: 0.8)")
    flag("--shared-blocks", 0, "int >= 0", "N: one x_T for each N-th part of an epoch (RSM, SD1.5: 2); 0 = off")
    flag("--entropy", 0.0, "float >= 0", "beta of the return r - beta log(p_theta / p_ref) (RSM Eq. 57-60)")
    harness.add_args(parser)
    parser.set_defaults(**DEFAULTS)
    return harness.parse(parser, PRESETS, argv, rewards, check, sizes)


# ---- method: pure functions of tensors ---------------------------------------
TEMPFLOW = 2.25  # 1 / mean sigma_t of SD3.5's 10 steps, TempFlow's and RSM's constant


def clipped_loss(adv, log_ratio, clip_range) -> torch.Tensor:
    """max(-A ratio, -A clip(ratio, 1 - xi, 1 + xi)), (R,); xi a number or (R,)."""
    ratio = log_ratio.exp()
    return torch.maximum(-adv * ratio, -adv * torch.clamp(ratio, 1 - clip_range, 1 + clip_range))


def hinge_loss(adv, log_ratio, clip_range) -> torch.Tensor:
    """max(0, xi |A| - A lambda), (R,): the gradient of PPO clipped in log space.  RSM Eq. 104."""
    return (clip_range * adv.abs() - adv * log_ratio).clamp(min=0)


def temporal_weights(reweight: str, fair_clip: str, adv, sigma, dt, pcpo):
    """gamma(t) and beta C2 of Eq. 10, each (R,), that a method amounts to.  RSM's Table 1.

    adv is A, for PPO's gradient A ratio;  pcpo = w~_t / w_t.
    """
    if reweight == "tempflow":
        gamma, c2 = TEMPFLOW * sigma, TEMPFLOW * sigma * adv
    elif reweight == "pcpo":
        gamma, c2 = pcpo, pcpo**2 * adv
    elif reweight == "guard":  # its ratio lacks -|moved|^2 / 2, the pull to the old policy
        gamma, c2 = sigma / dt, torch.zeros_like(adv)
    else:
        gamma, c2 = torch.ones_like(adv), adv
    return (gamma * sigma / dt, c2 * sigma / dt) if fair_clip == "guard" else (gamma, c2)


def rsm_loss(adv, drift, moved, z, gamma, c2, beta: float, open_row) -> torch.Tensor:
    """Eq. 10 for policy gradients, per scalar of the latent as the KL is, (R, C, h, w):

    beta/2 |drift - gamma A z / beta|^2 + beta/2 C2 |moved|^2, where drift = (mu_theta -
    mu_ref) / sigma, moved = (mu_theta - mu_old) / sigma, C1 = beta b^2 / (2 sigma^2) and
    Psi = sigma A z / (beta b).  Rows that the clip closes have gamma = C2 = 0.
    """
    a, g, c, keep = (v[:, None, None, None] for v in (adv, gamma, c2, open_row.to(adv)))
    return beta / 2 * (drift - keep * g * a * z / beta) ** 2 + beta / 2 * keep * c * moved**2


@dataclass
class Level:
    """What the rollout keeps of step i: P states with B children each; B = 0 for anchors."""

    x_t: torch.Tensor  # (P, C, h, w), as are the next two
    o_old: torch.Tensor
    o_ref: torch.Tensor | None  # None where no term needs it
    z: torch.Tensor  # (P, B, C, h, w): the draws that made the children
    image: torch.Tensor  # (P,) local sample
    value: torch.Tensor | None = None  # (P, B) mean return of the leaves below each child


@dataclass
class Rows:
    """S states, each a network pass, and their R children, each a row of the loss."""

    x_t: torch.Tensor  # (S, C, h, w), as are the next two
    o_old: torch.Tensor
    o_ref: torch.Tensor  # NaN where no term needs it, so that a use by mistake shows
    step: torch.Tensor  # (S,)
    image: torch.Tensor  # (S,) local sample
    width: torch.Tensor  # (S,) number of children; a state without any is an anchor
    z: torch.Tensor  # (R, C, h, w), state by state, as are the next two
    adv: torch.Tensor  # (R,) A
    equal: torch.Tensor  # (R,) whether all values of its group are equal
    counts: torch.Tensor  # (R,) whether the row counts

    @property
    def parent(self) -> torch.Tensor:
        """(R,) the state of each child."""
        return torch.arange(len(self.width)).repeat_interleave(self.width)

    def __getitem__(self, p: torch.Tensor) -> "Rows":
        """The states p and their children."""
        children, values = torch.arange(len(self.z)).split(self.width.tolist()), list(vars(self).values())
        c = torch.cat([p[:0], *(children[q] for q in p.tolist())])
        return Rows(*(v[p] for v in values[:6]), *(v[c] for v in values[6:]))

    def find(self, pairs: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """The states of these (image, step), at most so many of each: several in a tree, none for an
        anchor left out."""
        of = defaultdict(list)
        for p, pair in enumerate(zip(self.image.tolist(), self.step.tolist())):
            of[pair].append(p)
        return torch.tensor([p for n, i in pairs.tolist() for p in of[n, i][:most]], dtype=torch.long)


def all_rows(levels: dict[int, Level], *children: torch.Tensor) -> Rows:
    """The states of all steps and their children (adv, equal, counts), step by step."""
    every = list(levels.values())
    x_t, o_old = torch.cat([v.x_t for v in every]), torch.cat([v.o_old for v in every])
    o_ref = x_t.new_tensor(torch.nan).expand_as(x_t)  # a view: no memory
    if any(v.o_ref is not None for v in every):
        ref = [torch.full_like(v.x_t, torch.nan) if v.o_ref is None else v.o_ref for v in every]
        o_ref = torch.cat(ref)
    count = torch.tensor([len(v.x_t) for v in every])
    step = torch.tensor(list(levels)).repeat_interleave(count)
    width = torch.tensor([v.z.shape[1] for v in every]).repeat_interleave(count)
    image, z = torch.cat([v.image for v in every]), torch.cat([v.z.flatten(0, 1) for v in every])
    return Rows(x_t, o_old, o_ref, step, image, width, z, *children)


def main(args):
    # ---- setup ---------------------------------------------------------------
    run, policy, theta, (reward, more) = harness.start(args, "tempflow_rsm", rewards)
    native = policy.grid(args.steps, args.kernel, args.noise_level)
    ode = policy.grid(args.steps, "ode", 0.0)
    sde = stochastic_grid(native, args)
    common.policy_steps(sde, args.train_steps)  # refuses a grid without noise
    widths = children_per_step(args, sde.sigma.tolist())  # B_i, (T,)
    branching, anchors = [i for i, b in enumerate(widths) if b], anchor_steps(args, widths)
    mean_width = sum(widths) / len(branching)
    w_loss = loss_weights(native, sde, branching, args)
    optimiser = harness.make_optimiser(args, run, theta)
    spreads = [f"value_std/{i:02d}" for i in branching]
    columns = dataclasses.replace(METRICS, more=(*spreads, *METRICS.more))
    columns = columns.with_steps(["clip_frac"], branching)
    harness.write_influence(run, branching, influence(sde, w_loss, args))
    recorder = harness.Recorder(run, args, policy, optimiser, (reward, more), rewards.RewardError, columns)

    for epoch in recorder.epochs():
        # ---- 1 rollout -------------------------------------------------------
        recorder.phase()
        batch = harness.epoch_batch(args, policy, epoch, blocks=args.shared_blocks)
        with common.progress(None, "rollout") as bar:
            if args.branching == "tree":
                levels, ends = tree_rollout(policy, sde, ode, batch, widths, args, epoch, bar)
                leaves, ends = {-1: (ends, None)}, None  # no second name: see the last line
            else:
                kept = kept_anchors(args, epoch, anchors, sum(widths))
                levels, leaves = trunk_rollout(policy, sde, ode, batch, widths, args, epoch, bar, kept)

        # ---- 2 reward --------------------------------------------------------
        recorder.phase()
        with recorder.scoring(epoch):
            returns, parts = score(policy, reward, leaves, batch, args)
        recorder.leave_out(epoch, batch, *returns.values())
        final = torch.cat(list(returns.values()))
        if args.branching == "tree":
            back_up(levels, sde, args, final)
        else:
            for i, (_, cost) in leaves.items():
                levels[i].value = returns[i].view(cost.shape) - args.entropy * cost

        # ---- 3 advantage -----------------------------------------------------
        adv, equal, spread = advantages([levels[i].value for i in branching], args)
        counts = rows_that_count(adv, equal, args)
        every = all_rows(levels, adv.clamp(-args.adv_clip, args.adv_clip), equal, counts)

        # ---- 4 update --------------------------------------------------------
        recorder.phase()
        stats, norms = recorder.stats(epoch), []
        if not needs_reference(args):  # at a few states with children, for the log
            some = every[every.find(harness.watched_rows(args, batch, branching, epoch), 1)]
            at, how = (some.step, some.x_t, some.o_old, batch.cond[some.image]), (args.cfg, args.logprob_reduce)
            stats.add({"kl/ref": common.reference_kl(policy, sde, *at, *how, args.micro_batch_size)})
        steps = sorted(branching + ([] if args.anchor_first else anchors))
        for update, part in enumerate(harness.epoch_updates(args, batch, steps, epoch)):
            mine = every.find(part)
            if args.anchor_first and update % args.updates_per_epoch == 0:  # of a pass
                mine = torch.cat([mine, (every.width == 0).nonzero()[:, 0]])
            count = count_rows(every, mine)  # over all processes
            if not count["states"]:  # anchors only, all of them left out: no update
                continue
            for chunk in common.micro_batches(mine, args.micro_batch_size, f"update {update + 1}"):
                rows = every[chunk]
                x_t, own = rows.x_t, rows.parent
                i = rows.step[own]  # (R,)
                # 4a: lambda, each child's log ratio to the rollout's policy at its parent's state
                o = policy.predict(x_t, ode.time(rows.step, x_t), batch.cond[rows.image], args.cfg)
                w, shift = sde.at(sde.w, i, o), (o - rows.o_old)[own]
                moved = w * shift  # (mu_theta - mu_old) / sigma, (R, C, h, w)
                if update == 0 and len(own):  # anchors have no draws to check
                    stats.check_start(moved, rows.z)
                # 4b: the loss, and the log ratio that it compares with its clip range
                loss, log_ratio, xi = policy_loss(sde, rows, i, sde.at(w_loss, i, o) * shift, args)
                # 4c: + beta KL, anchors, gradients
                kl, anchor, kl_ref = kl_terms(sde, rows, i, o, mean_width, args)
                total = loss + args.beta * kl
                if args.loss == "rsm":
                    drift = w * (o - rows.o_ref)[own]  # (mu_theta - mu_ref) / sigma
                    total = eq_10(sde, rows, i, drift, moved, loss, w_loss, args)
                total = total * rows.counts  # no policy term, hence no KL to hold it either
                if args.branching == "trunk":  # every step weighs the same, whatever its width
                    total = total * mean_width / rows.width[own].to(total)
                # micro-batches and processes add up to the mean over the update's rows, anchors
                anchored = args.anchor_beta * anchor.sum() / max(1.0, count["anchors"])
                anchored = anchored * (args.anchor_first or 1.0)
                optimiser.backward(total.sum() / max(1.0, count["rows"]) + anchored)
                ratio, outside = log_ratio.exp(), log_ratio.abs() > xi
                stats.add(harness.by_step(i, {"clip_frac": outside.float()}) | {
                    "loss/total": total, "loss/policy": loss, "loss/kl": kl, "loss/anchor": anchor,
                    **({"kl/ref": kl_ref} if needs_reference(args) else {}),
                    "ratio/mean": ratio, "ratio/clip_frac": outside.float(),
                    "ratio/approx_kl": 0.5 * log_ratio**2,
                    "adv/mean": rows.adv, "adv/zero_std_frac": rows.equal.float(),
                }, i)  # fmt: skip
                stats.top("ratio/max", ratio.max().item() if len(own) else 0.0)
            norms += optimiser.step()  # 4c: all-reduce, clip, AdamW on theta

        # ---- 5 log, samples, checkpoint, eval --------------------------------
        del batch, levels, leaves, every  # what follows needs the room
        metrics = stats.result() | dict(zip(spreads, spread)) | {"grad/norm": sum(norms) / len(norms)}
        recorder.end_epoch(epoch, final, parts, metrics)
    recorder.finish()


# ---- pieces that need the networks or the flags ------------------------------
def influence(grid: common.Grid, w_loss, args) -> torch.Tensor:
    """h_t (T,) up to a constant: the weight of the value's gradient in that of o.  RSM Eq. 23."""
    one, pcpo = torch.ones_like(grid.sigma), w_loss / grid.w
    rule = args.reweight, args.fair_clip
    gamma, _ = temporal_weights(*rule, one, grid.sigma, grid.dt, pcpo)
    return gamma * grid.o_coef.abs()


def stochastic_grid(native: common.Grid, args) -> common.Grid:
    """The sampler of the stochastic steps: for PCPO on SD1.5 its own, unless --pcpo-w is 0."""
    public = args.reweight == "pcpo" and args.kind == "eps" and args.pcpo_w
    return common.pcpo_grid(native, args.pcpo_w) if public else native


def loss_weights(native: common.Grid, sde: common.Grid, branching: list[int], args) -> torch.Tensor:
    """w of the log ratio in the loss, (T,): PCPO's w~ is the native grid's also where its own sampler runs."""
    if args.reweight != "pcpo":
        return sde.w
    noisy = [i for i in range(args.steps) if native.sigma[i] >= common.MIN_SIGMA]
    return common.pcpo_weights(native, *((branching, "zeta") if args.kind == "flow" else (noisy, "public")))


def needs_reference(args) -> bool:
    """Whether the states with children ask the pretrained model, too; anchors always do."""
    return bool(args.kl != "none" and args.beta or args.entropy or args.loss == "rsm")


def anchor_steps(args, widths: list[int]) -> list[int]:
    """Steps without children at which the trunk's states carry a KL; never the last one."""
    last = min(args.train_steps, args.steps - 1)
    return [i for i in range(last) if not widths[i]] if args.anchor_beta else []


def anchor_count(args, steps: list[int], rows: int) -> int:
    """Anchors of an epoch over all processes, where an image has `rows` children."""
    samples, ratio = args.num_prompts * args.group_size, args.anchor_max_ratio
    every = samples * len(steps)
    return every if ratio is None else int(min(every, ratio * samples * rows))


def kept_anchors(args, epoch: int, steps: list[int], rows: int) -> set | None:
    """The (sample index, step) pairs that are anchors in this epoch; None = all of them."""
    if args.anchor_max_ratio is None:
        return None
    pairs = [(n, i) for n in range(args.num_prompts * args.group_size) for i in steps]
    order = torch.randperm(len(pairs), generator=common.generator("anchors", args.seed, epoch))
    return {pairs[j] for j in order[: anchor_count(args, steps, rows)].tolist()}


def branch_noise(args, epoch: int, i, indices, count: int, shape, device) -> torch.Tensor:
    """(N, count, C, h, w): the draws of step i, by (seed, epoch, step, sample index)."""
    keys = [("branch", args.seed, epoch, i, n) for n in indices]
    draws = [torch.randn((count, *shape), generator=common.generator(*key)) for key in keys]
    return torch.stack(draws).to(device)


def evaluate(policy, grid, args, x, cond, i: int, frozen: bool = False) -> torch.Tensor:
    """o, or o_ref, at the states x (P, C, h, w) of step i, in micro-batches."""
    o = torch.empty_like(x)
    with policy.reference() if frozen else nullcontext():
        for start in range(0, len(x), args.micro_batch_size):
            rows = slice(start, start + args.micro_batch_size)
            o[rows] = policy.predict(x[rows], grid.time(i, x[rows]), cond[rows], args.cfg)
    return o


def log_ratio_to_ref(grid, args, i: int, o, o_ref, z) -> torch.Tensor:
    """log p_old - log p_ref of the draws z (P, B, C, h, w) of step i, (P, B)."""
    delta = (grid.at(grid.w, i, o) * (o_ref - o))[:, None].expand_as(z)
    # common's is of the other Gaussian over the one that made z, hence the sign
    return -common.log_ratio(delta.flatten(0, 1), z.flatten(0, 1), args.logprob_reduce).view(z.shape[:2])


@torch.no_grad()
def trunk_rollout(policy, sde, ode, batch, widths, args, epoch, bar, kept=None):
    """ODE trunks with one-step children -> {step: Level}, {step: what child_ends() gives}.

    kept: the (sample index, step) pairs that are anchors in this epoch; None = all.
    """
    anchors, branching = anchor_steps(args, widths), [i for i, b in enumerate(widths) if b]
    x, levels, leaves = batch.noise[:, 0].to(policy.device), {}, {}
    for i in range(max([*branching, *anchors]) + 1):  # no further than it is needed
        o = evaluate(policy, ode, args, x, batch.cond, i)
        image = torch.arange(len(x) if i in branching or i in anchors else 0)
        if i in anchors and kept is not None:
            image = image[[(n, i) in kept for n in batch.indices]]
        if len(image):
            x_t, cond, indices = x[image], batch.cond[image], [batch.indices[n] for n in image]
            frozen = needs_reference(args) or i in anchors
            o_ref = evaluate(policy, ode, args, x_t, cond, i, frozen) if frozen else None
            z = branch_noise(args, epoch, i, indices, widths[i], policy.latent_shape, x.device)
            levels[i] = Level(x_t, o[image], o_ref, z, image)
        x = ode.mu(x, o, i)
        bar.update(1)
    for i in branching:
        leaves[i] = child_ends(policy, sde, ode, batch, levels[i], i, args, epoch)
        bar.update(1)
    return levels, leaves


def child_ends(policy, sde, ode, batch, level, i: int, args, epoch):
    """x_0, or x0_hat after --lookahead steps, (N B, C, h, w) of step i's children, and on the way
    sum log(p_old / p_ref), (N, B).

    The sum is of the stochastic steps of --tail sde and for --entropy, else 0.
    """
    x = sde.mu(level.x_t, level.o_old, i)[:, None] + sde.at(sde.sigma, i, level.z) * level.z
    x, cost = x.flatten(0, 1), torch.zeros(x.shape[:2], device=x.device)
    cond = batch.cond[level.image.repeat_interleave(cost.shape[1])]
    for j in range(i + 1, ode.steps):  # all children of all images in one batch
        o = evaluate(policy, ode, args, x, cond, j)
        if j == i + args.lookahead:
            return ode.x0_hat(x, o, j), cost
        if args.tail == "ode" or j >= args.train_steps or sde.sigma[j] < common.MIN_SIGMA:
            x = ode.mu(x, o, j)
            continue
        key = f"{i}/{j}"  # step j's own children have other draws
        z = branch_noise(args, epoch, key, batch.indices, cost.shape[1], policy.latent_shape, x.device)
        z = z.flatten(0, 1)
        if args.entropy:
            o_ref = evaluate(policy, ode, args, x, cond, j, frozen=True)
            cost += log_ratio_to_ref(sde, args, j, o, o_ref, z[:, None]).view_as(cost)
        x = sde.mu(x, o, j) + sde.at(sde.sigma, j, x) * z
    return x, cost


@torch.no_grad()
def tree_rollout(policy, sde, ode, batch, widths, args, epoch, bar):
    """Stochastic trees -> {step: Level} and the leaves (N L, C, h, w)."""
    x, nodes, levels = batch.noise[:, 0].to(policy.device), 1, {}
    for i, b in enumerate(widths):
        image = torch.arange(len(batch.noise)).repeat_interleave(nodes)
        cond = batch.cond[image]
        o = evaluate(policy, ode, args, x, cond, i)
        if b and sde.sigma[i] >= common.MIN_SIGMA:
            o_ref = evaluate(policy, ode, args, x, cond, i, True) if needs_reference(args) else None
            z = branch_noise(args, epoch, i, batch.indices, nodes * b, policy.latent_shape, x.device)
            z = z.view(-1, b, *policy.latent_shape)  # (N nodes, B, C, h, w)
            levels[i] = Level(x, o, o_ref, z, image)
            x = (sde.mu(x, o, i)[:, None] + sde.at(sde.sigma, i, z) * z).flatten(0, 1)
            nodes = nodes * b
        elif args.tail == "sde" and sde.sigma[i] >= common.MIN_SIGMA:
            z = branch_noise(args, epoch, i, batch.indices, nodes, policy.latent_shape, x.device)
            z = z.flatten(0, 1)
            x = sde.mu(x, o, i) + sde.at(sde.sigma, i, z) * z
        else:
            x = ode.mu(x, o, i)
        bar.update(1)
    return levels, x


def back_up(levels, grid, args, reward: torch.Tensor) -> None:
    """Values of a tree's nodes: the mean of the leaves below, less the entropy cost on the way.

    RSM Eq. 57-60: a step's own log ratio is a cost to its parent, not to the child it leads to.
    """
    value = reward
    for i in sorted(levels, reverse=True):
        level = levels[i]
        value = level.value = value.view(level.z.shape[:2])
        if args.entropy:
            cost = log_ratio_to_ref(grid, args, i, level.o_old, level.o_ref, level.z)
            value = value - args.entropy * cost
        value = value.mean(1)


def score(policy, reward, leaves, batch, args):
    """{step: rewards (N L,) of its leaves, image by image}, and the terms of all of them."""
    found = {i: harness.score(args, policy, reward, x0, batch.prompts) for i, (x0, _) in leaves.items()}
    terms = [terms for _, terms in found.values()]
    parts = {name: torch.cat([each[name] for each in terms]) for name in terms[0]}
    return {i: total for i, (total, _) in found.items()}, parts


def advantages(values: list[torch.Tensor], args) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Values of each step's children -> A (R,), where a group's values are equal, a group's mean std by step."""
    images, found, spread = args.group_size if args.grouping == "prompt" else 1, [], []
    for value in values:  # (P, B), image by image, hence prompt by prompt: groups are blocks of equal size
        group = images * value.numel() // (args.num_prompts * args.group_size // common.world())
        each = common.group_advantage(value.flatten(), group, "group", args.adv_eps, args.adv_unbiased)
        found.append(each)
        std = common.gather(value.view(-1, group).std(1, correction=0))
        spread.append(harness.scored(std).mean().item())
    return *(torch.cat(each) for each in zip(*found)), spread


def rows_that_count(adv: torch.Tensor, equal: torch.Tensor, args) -> torch.Tensor:
    """(R,) by --mask; rows: A != 0, also in groups of unequal rewards, or all where all A are 0.

    ref-code: RSM; TempFlow drops a row whose A is 0 at all steps, BranchGRPO and PCPO drop none.
    ours: "all" is over all processes (RSM: of a process), so that a run depends on no GPU count.
    """
    if args.mask == "groups":
        return ~equal
    some = common.all_reduce({"rows": float((adv.nan_to_num() != 0).sum())})["rows"]
    return adv != 0 if args.mask == "rows" and some else torch.ones_like(equal)


def count_rows(every: Rows, mine: torch.Tensor) -> dict[str, float]:
    """States, anchors and rows that count among the states `mine` of all processes."""
    anchors = every.width[mine] == 0
    valid = every.counts[torch.isin(every.parent, mine)]
    count = {"states": len(mine), "anchors": anchors.sum(), "rows": valid.sum()}
    return common.all_reduce({key: float(value) for key, value in count.items()})


def policy_loss(grid, rows: Rows, i, moved, args):
    """--loss of R rows: the loss (R,), the log ratio that was clipped (R,), and its clip range.

    moved: as of 4a, with PCPO's w~ in place of w: no log-likelihood ratio any more.
    """
    sigma, dt = grid.sigma[i].to(moved), grid.dt[i].to(moved)
    xi = args.clip_range if args.fair_clip == "none" else args.clip_range / sigma**2
    log_ratio = common.log_ratio(moved, rows.z, args.logprob_reduce)
    if args.reweight == "guard":
        log_ratio = common.reduce_latent(moved * rows.z, args.logprob_reduce) * sigma
    weight = TEMPFLOW * sigma if args.reweight == "tempflow" else torch.ones_like(sigma)
    # ref-code: TempFlow's weight is outside PPO's clip, inside the hinge (there without fair clip)
    inside = args.loss != "ppo" and args.fair_clip == "none"
    log_ratio = log_ratio * weight if inside else log_ratio
    clipped = clipped_loss if args.loss == "ppo" else hinge_loss  # rsm: which rows are open
    loss = clipped(rows.adv, log_ratio, xi)
    if args.reweight == "guard":
        loss = loss / dt
    loss = loss if inside else loss * weight
    return (loss * sigma / dt if args.fair_clip == "guard" else loss), log_ratio, xi


def eq_10(grid, rows: Rows, i, drift, moved, loss, w_loss, args) -> torch.Tensor:
    """--loss rsm of R rows, (R,), KL included; open are the rows in which the hinge is not 0."""
    sigma, dt, pcpo = (v[i].to(drift) for v in (grid.sigma, grid.dt, w_loss / grid.w))
    beta = args.beta
    gamma, c2 = temporal_weights(args.reweight, args.fair_clip, rows.adv, sigma, dt, pcpo)
    each = rsm_loss(rows.adv, drift, moved, rows.z, gamma, c2 / beta, beta, loss.detach() > 0)
    return common.reduce_latent(each, args.logprob_reduce)


def kl_terms(grid, rows: Rows, i, o, mean_width: float, args):
    """--kl of R rows, (R,), --anchor-form of the anchors, (A,), and the KL of the states where the
    reference was asked: of all, or of the anchors alone.
    """
    every, kl = needs_reference(args), torch.zeros_like(rows.adv)
    known = slice(None) if every else rows.width == 0
    drift = o[known] - rows.o_ref[known]
    delta = grid.at(grid.w, rows.step[known], o) * drift  # (mu_theta - mu_ref) / sigma
    kl_ref = common.kl_divergence(delta, args.logprob_reduce)
    if args.kl != "none" and every:
        kl = kl_ref[rows.parent]
    if args.kl == "heuristic":  # ref-code: over 2 g^2, i.e. times dt, as sigma^2 = g^2 dt
        kl = kl * grid.dt[i].to(kl)
    anchor = kl_ref * mean_width  # as much as a step with children
    if args.anchor_form == "pcpo":
        anchor = 0.5 * (args.pcpo_w or 1.0) ** 2 * common.reduce_latent(drift**2, "mean")
    return kl, anchor[rows.width == 0] if every else anchor, kl_ref


# ---- what no paper mentions: checks of the flags, sizes for --dry-run --------
def check(args):
    tree, loss, model = args.branching == "tree", args.loss, args.model
    args.widths = children_per_step(args)
    late = args.tail == "sde" or tree or not args.entropy
    need(late, "--entropy needs stochastic later steps; use --branching tree or --tail sde")
    need(not args.lookahead or not tree, "--lookahead is of a trunk's children, not of a tree; leave it out")
    need(not args.anchor_beta or not tree, "--anchor-beta is of states without children, as no tree has; leave it out")
    flag = "--shared-blocks" if args.shared_blocks else "--shared-noise"
    same = (args.shared_noise or args.shared_blocks) and not tree and args.group_size > 1
    what = f"{flag} makes the {args.group_size} trunks of a prompt identical"
    need(not same, what, "use --group-size 1 and a wider --profile")
    both = args.shared_blocks and args.shared_noise
    need(not both, "--shared-blocks and --shared-noise share x_T in two ways; use one of them")
    square = "--loss rsm writes policy term and KL as one square (Eq. 10); use --kl true and --beta above 0"
    need(loss != "rsm" or args.kl == "true" and args.beta > 0, square)
    need(loss != "ppo" or args.reweight != "pcpo", "--reweight pcpo needs --loss hinge or rsm, not ppo")
    fair = args.fair_clip == "none" or args.reweight in ("none", "tempflow")
    need(fair, f"--fair-clip {args.fair_clip} does not go with --reweight {args.reweight}; use none or tempflow")
    whole = f"--reward {args.reward} compares the images of a prompt, not the children of a state"
    need(not rewards.is_grouped(args.reward), whole, "use vmpo.py, awm.py or grpo.py")
    flow = f"--kl heuristic needs a flow model (g_t of its SDE), --model {model} is not one; use true"
    need(args.kl != "heuristic" or args.kind == "flow", flow)
    if args.reweight != "guard":
        harness.warn_of_clip_range(args)


def children_per_step(args, sigma=()) -> list[int]:
    """B_i (T,), checked; against the grid's sigma (T,) too, once that is known."""
    tree = args.branching == "tree"
    text = f"--tree-splits {args.tree_splits}" if tree else f"--profile {args.profile}"
    widths = tree_widths(args, text) if tree else parse_profile(args, text)
    # every child has another to be compared with: of its state, or of the prompt's images
    fewest, what = (widths[0], "one node before the first split") if tree else (min(filter(None, widths)), "one child")
    pair = fewest > 1 or args.grouping == "prompt" and args.group_size > 1
    alone = f"{text}: {what} has none to be compared with by --grouping {args.grouping} --group-size {args.group_size}"
    need(pair, alone, "give more, or use --grouping prompt and two images")
    for i, noise in enumerate(sigma):
        if noise < common.MIN_SIGMA:
            what = f"{text} has children at step {i}, which has no noise with kernel {args.kernel}"
            need(widths[i] <= tree, what, "leave it out")  # a tree goes on by an ODE step there
            widths[i] = 0
    states = args.num_prompts * args.group_size * sum(map(bool, widths))
    if not args.anchor_first:
        states += anchor_count(args, anchor_steps(args, widths), sum(widths))
    what = f"--updates-per-epoch {args.updates_per_epoch} is more than the {states} states of an epoch"
    need(args.updates_per_epoch <= states, what, "use fewer")
    return widths


def tree_widths(args, text: str) -> list[int]:
    """--tree-splits -> T numbers of children of each node, 0 at the steps that are not trained."""
    words, trained = [s for s in args.tree_splits.split(",") if s.strip()], args.train_steps
    steps = f"{text} is not a list of trained steps such as 0,3,6,9"
    need(all(s.strip().isdecimal() and int(s) < trained for s in words), steps, f"use 0 to {trained - 1}")
    splits = set(map(int, words))
    return [(1 + (i in splits)) * (i < trained) for i in range(args.steps)]


def parse_profile(args, text: str) -> list[int]:
    """--profile '6,6,8,10', '0:4,10:4' or 'base' -> T numbers of children."""
    steps, trained = args.steps, args.train_steps
    words = ["6"] * (steps - 1) if args.profile == "base" else args.profile.split(",")
    try:
        items = [[int(v) for v in item.split(":")] for item in words]
        given = dict(item if len(item) > 1 else (n, *item) for n, item in enumerate(items))
    except ValueError:
        raise common.UsageError(f"{text} is not base or a list 'B_0,B_1,...' or 'step:B,...'") from None
    grid = f"the grid has {steps} steps, of which {trained} are trained"
    for i, b in given.items():
        possible = 0 <= i < (trained if b else steps) and b >= 0
        need(possible, f"{text}: {b} children at step {i} is impossible", grid)
    need(len(given) == len(items), f"{text} names a step twice; give every step once")
    need(any(given.values()), f"{text} has no children at all; at least one step needs some")
    return [given.get(i, 0) for i in range(steps)]


def network_evaluations(widths: list[int], last: int, lookahead: int = 0) -> int:
    """Per image and guidance branch: the trunk up to step `last`, and each child's way to its reward.

    The published counts add one per child for evaluating its parent again.
    """
    left = len(widths) - 1  # of the first step's child
    return last + 1 + sum(b * min(left - i, lookahead or left) for i, b in enumerate(widths))


def sizes(args) -> dict[str, str]:
    """The lines of --dry-run."""
    samples, widths = args.num_prompts * args.group_size, args.widths
    rows, training = sum(widths), [i for i, b in enumerate(widths) if b]
    anchors, tails = anchor_steps(args, widths), 0
    if args.branching == "tree":
        before = [math.prod(b or 1 for b in widths[:i]) for i in range(args.steps + 1)]  # nodes
        calls, leaves, parents = sum(before[:-1]), before[-1], sum(before[i] for i in training)
        children = sum(before[i] * widths[i] for i in training)
    else:
        calls = network_evaluations(widths, max([*training, *anchors]), args.lookahead)
        leaves, parents, children = rows, len(training), rows
        if args.entropy:  # the reference along stochastic tails
            most = (args.lookahead or args.steps) - 1  # the last evaluation gives x0_hat alone
            tails = sum(b * max(0, min(args.train_steps - 1 - i, most)) for i, b in enumerate(widths))
    kept = anchor_count(args, anchors, rows)
    states, reference = samples * parents + kept, samples * parents * needs_reference(args) + kept
    # x_t, o_old and z of the levels, again in one piece for the update; o_ref; leaves, noise
    latents = 2 * (2 * states + samples * children) + reference + states * bool(reference)
    latents += samples * (leaves + args.steps + 1)
    what = f"{latents} latents: noise, leaves, and twice states, outputs and draws"
    passes = harness.network_passes(args, args.cfg)
    first, update = f"{samples * calls * passes} in the rollout", states * passes * args.inner_epochs
    watched = 0 if needs_reference(args) else min(harness.WATCHED, samples * len(training))  # for the log
    frozen = f"{(reference + samples * tails + watched) * passes} of the reference"
    return {
        "children per image": f"{children} on {len(training)} steps: {' '.join(map(str, widths))}",
        "network evaluations per epoch": f"{first}, {update} with gradient, {frozen}",
        "decodes and reward evaluations per epoch": f"{samples * leaves} images",
        "training rows per epoch": f"{samples * children}",
        "memory for the rollout": harness.rollout_memory(args, latents, what, samples * (args.steps + 1)),
    }


if __name__ == "__main__":
    harness.run_main(main, parse_args, rewards.UsageError)
