"""Kills at random moments and at every file operation of every trainer; signals; faults in write, reward, network.

make torture
"""

import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch

from torture import report, trials
from torture.trials import SCRIPTS, finish, flags_of, fork, kill_at, run, state_of

KILLS = 20  # of each trainer, at random moments


@pytest.fixture(scope="module", params=SCRIPTS)
def whole(request, tmp_path_factory):
    """(script, what its uninterrupted run leaves, its seconds)."""
    script, folder = SCRIPTS[request.param], tmp_path_factory.mktemp(request.param)
    begin = time.time()
    code, err = fork(lambda: run(script, flags_of(script, folder)))
    assert code == 0, err[-2000:]
    return script, state_of(folder / "run"), time.time() - begin


def test_random_kills_resume_bit_for_bit(whole, tmp_path):
    script, wanted, seconds = whole
    draw, problems = random.Random(script.__name__), []
    for trial in range(KILLS):
        folder = tmp_path / str(trial)
        folder.mkdir()
        moment = draw.uniform(0, 1.1 * seconds)

        def work(folder=folder, moment=moment):
            threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
            run(script, flags_of(script, folder))

        fork(work)
        problem = finish(script, folder, flags_of(script, folder))
        if problem or state_of(folder / "run") != wanted:
            problems.append((trial, problem or "another result"))
        report.add(f"{script.__name__}: kills at random moments", 1, bool(problems and problems[-1][0] == trial))
        shutil.rmtree(folder)
    assert not problems


def test_a_kill_at_every_file_operation(whole, tmp_path):
    script, wanted, problems, count, code = whole[0], None, [], 0, 1
    while code:
        folder, operation = tmp_path / str(count), count or 9999  # the first one is not killed
        folder.mkdir()
        flags = flags_of(script, folder, "run", "--epochs", 2, "--eval-every", 1, "--keep", 1)

        def work(folder=folder, operation=operation, flags=flags):
            kill_at(operation, folder / "run")
            run(script, flags)

        code, _ = fork(work)
        problem = finish(script, folder, flags) if code else ""
        found = "" if problem else state_of(folder / "run")
        wanted = wanted if count else found
        if problem or found != wanted:
            problems.append((operation, problem or "another result"))
        if code:
            wrong = bool(problems and problems[-1][0] == operation)
            report.add(f"{script.__name__}: a kill at each file operation", 1, wrong)
        shutil.rmtree(folder)
        code, count = code or not count, count + 1
    count -= 2  # the first and the last were not killed
    assert count > 20 and not problems


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_at_random_moments(whole, tmp_path, number):
    script, wanted, seconds = whole
    draw, problems, stopped, trial = random.Random(f"{script.__name__} {number}"), [], 0, 0
    while stopped < 4 and trial < 16:
        folder = tmp_path / str(trial)
        folder.mkdir()

        flags, wait = flags_of(script, folder, "run", "--save-every", 0), draw.uniform(0.2, 0.9) * seconds

        def work(flags=flags, wait=wait):
            for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a job in the background ignores some
                signal.signal(each, signal.default_int_handler)
            threading.Timer(wait, os.kill, (os.getpid(), number)).start()
            run(script, flags)

        begin = time.time()
        code, err = fork(work)
        trial, stopped = trial + 1, stopped + (code == 128 + number)
        if code == 0:  # the signal came too late: the machine was busier when `seconds` was measured
            seconds = min(seconds, time.time() - begin)
        if code not in (0, 128 + number) or "Traceback" in err:
            problems.append((trial, code, err[-1500:]))
        elif problem := finish(script, folder, flags):
            problems.append((trial, problem))
        elif state_of(folder / "run")["lora"] != wanted["lora"]:
            problems.append((trial, "another result"))
        shutil.rmtree(folder)
    report.add(f"{script.__name__}: {number.name} at random moments", trial, len(problems))
    assert not problems and stopped == 4


# ---- faults ----------------------------------------------------------------------------------------------
class FullDisk(OSError):
    pass


def broken_write(after: int):
    """torch.save fails as on a full disk from the n-th checkpoint on."""
    seen, real = [], torch.save

    def save(state, path):
        seen.append(0)
        if len(seen) > after:
            raise FullDisk(28, "No space left on device", str(path))
        return real(state, path)

    torch.save = save


def broken_reward(after: int):
    seen, real = [], trials.rewards.Reward.__call__

    def call(self, *a, **k):
        seen.append(0)
        if len(seen) > after:
            raise trials.rewards.RewardError("injected")
        return real(self, *a, **k)

    trials.rewards.Reward.__call__ = call


def broken_network(after: int):
    """NaN outputs, in the update only: what a rollout draws goes into the reward, which refuses it before."""
    seen, real = [], trials.harness.common.Policy.predict

    def predict(self, *a, **k):
        o = real(self, *a, **k)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.net.parameters()):
            seen.append(0)
            if len(seen) > after:
                return o * float("nan")
        return o

    trials.harness.common.Policy.predict = predict


@pytest.mark.parametrize("fault", [broken_write, broken_reward, broken_network])
@pytest.mark.parametrize("after", [0, 2, 9])
def test_a_fault_is_one_sentence_and_the_run_goes_on_without_it(whole, tmp_path, fault, after):
    script, wanted, _ = whole
    code, err = fork(lambda: (fault(after), run(script, flags_of(script, tmp_path, "run", "--max-bad-steps", 0))))
    clean = "Traceback" not in err and code in (0, 1)
    report.add(f"{script.__name__}: {fault.__name__.replace('_', ' ')} after {after}", 1, 1 - clean)
    assert clean, err[-3000:]
    if code:
        assert not (problem := finish(script, tmp_path, flags_of(script, tmp_path))), problem
        assert state_of(tmp_path / "run")["lora"] == wanted["lora"]
