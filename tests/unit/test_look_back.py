"""Looking back: exact where its assumptions hold, nearer where they nearly do, and the same as another way to work it out."""
import math
import random

import numpy as np
import pytest
import torch
from sampling_by_hand import PATTERNS, SCHEDULES, Mixture, Path, exploding, far, flow, polynomial, randn, with_skips

from pack.core.stepcache.look_back import KAPPA, NODES, LookBack
from pack.core.stepcache.solvers import SOLVERS


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("skips", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_after_a_computed_step_x_is_where_the_run_without_skips_would_be(solver, sigmas, skips, order):
    path = Path(solver, sigmas, polynomial(2))
    made_up, left = with_skips(path, skips, order), with_skips(path, skips, order, look_back=None)
    after = [n + 1 for n in range(len(sigmas) - 1) if n not in skips]
    assert max(far(made_up[n], path.x[n]) for n in after) < 1e-9
    assert max(far(left[n], path.x[n]) for n in after) > 1e-4, "nothing was to be made up"


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_with_one_computed_step_before_the_skips_a_line_is_made_up_for(solver):
    path = Path(solver, SCHEDULES["flow"], polynomial(1))
    made_up = with_skips(path, (1, 2), 0)
    assert far(made_up[4], path.x[4]) < 1e-9 < 1e-3 < far(with_skips(path, (1, 2), 0, look_back=None)[4], path.x[4])
    assert far(with_skips(Path(solver, SCHEDULES["flow"], polynomial(2)), (1, 2), 0)[4], Path(solver, SCHEDULES["flow"], polynomial(2)).x[4]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_what_is_remembered_is_the_derivative_on_the_right_x(solver, dtype):
    path, back = Path(solver, SCHEDULES["flow"], polynomial(2, dtype)), LookBack(solver, SCHEDULES["flow"])
    remembered = {}

    class Spy:
        skipped = back.skipped

        def computed(self, n, d):
            remembered[n], told = back.computed(n, d)
            return remembered[n], told

    with_skips(path, (3, 4, 6), 1, Spy())
    assert all(far(d, path.d[n]) < {torch.float32: 1e-4, torch.float64: 1e-9}[dtype] for n, d in remembered.items())


@pytest.mark.parametrize("kappa", [0.2, 0.7, 0.9])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_where_the_model_minds_x_more_or_less_than_assumed_it_is_still_nearer(solver, schedule, order, kappa):
    """Right after the group, that is. Far from 0.45, the wide steps of 12 from sigma 14.6 down leave least to gain."""
    path, most = Path(solver, SCHEDULES[schedule], polynomial(2), kappa), 0.9 if schedule == "variance-exploding" else 0.3
    for skips in PATTERNS.values():
        made_up, left = (with_skips(path, skips, order, look_back=look) for look in (True, None))
        after = next(n for n in range(skips[0], 13) if n not in skips) + 1
        assert far(made_up[after], path.x[after]) < most * far(left[after], path.x[after]), skips


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_of_a_smooth_path_that_is_no_polynomial_most_of_the_error_is_made_up_for(solver):
    a, b = randn(1), randn(2)
    path = Path(solver, flow(20), lambda n: a * math.cos(n / 5) + b * math.exp(-n / 7))
    for skips in ((5, 8, 11, 14), (4, 5, 8, 9, 12, 13)):
        made_up, left = (with_skips(path, skips, 1, look_back=look)[-1] for look in (True, None))
        assert far(made_up, path.x[-1]) < 0.5 * far(left, path.x[-1])


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("is_flow", [True, False], ids=["flow", "variance-exploding"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_on_an_exact_denoiser_of_pictures_the_final_latent_is_much_nearer(solver, is_flow, interval, order):
    sigmas, gains = flow(28) if is_flow else exploding(28), []
    skips = [n for n in range(3, 27) if (n - 2) % interval]
    for seed in range(4):
        model = Mixture(solver, sigmas, is_flow, seed)
        full, left, made_up = (with_skips(model, now, order, look)[-1] for now, look in (((), None), (skips, None), (skips, True)))
        gains.append(math.log10(far(left, full) / far(made_up, full)))
    assert sum(gains) / len(gains) > 0.2, "4 dB"


def test_a_multistep_sampler_is_not_disturbed_by_what_it_was_told_to_make_up():
    """dpmpp_2m brings back the last D, so the step after the made-up one must take that out again, and so on."""
    sigmas, solver = SCHEDULES["flow"], SOLVERS["dpmpp_2m"]
    path = Path(solver, sigmas, polynomial(2))
    for skips in ((3, 4), (3, 4, 6), (3, 4, 6, 7)):
        made_up = with_skips(path, skips, 0)
        assert max(far(made_up[n], path.x[n]) for n in range(9, len(sigmas))) < 1e-9

    class Deaf(LookBack):
        def answered(self, d):
            return d

    echoed = with_skips(path, (3, 4), 0, Deaf(solver, sigmas))
    assert far(echoed[6], path.x[6]) < 1e-9 and far(echoed[7], path.x[7]) > 1e-3, "it would be, so the test proves something"


# another way to work it out: positions instead of errors ---------------------------------------------------------------
class Dense:
    """LookBack in numpy, of one group at a time, by one linear system in everything that is not known.

    Unknown are the right x and D of the skipped steps, the right x of the computed one and the right derivative there:

        x*_{j+1} = a x*_j + b D*_j + e D*_{j-1}         D*_j = x*_j - sigma_j sum_k l_k(j) d*_k
        d*_n + (1 - kappa) (x_n - x*_n) / sigma_n = d_n

    The D to tell is then what the sampler, who knows x_n and the D that it was told before, needs to arrive at x*_{n+1}.
    `right` and `told` are D of the step before, as it should be and as the sampler has it; `meant` is a stand-in's, less
    what was told on purpose.
    """

    def __init__(self, solver, sigmas):
        self.solver, self.sigmas, self.kappa = solver, sigmas, KAPPA
        self.nodes: list[tuple[int, np.ndarray]] = []
        self.group: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.right = self.told = self.meant = None

    def continued(self, n: int, meant: np.ndarray) -> np.ndarray:
        """The D to tell so that x goes where `meant` would take it, had the last step been told what was meant, too."""
        _, b, e = self.solver(self.sigmas, n)
        return meant if not e else (b * meant + e * self.meant - e * self.told) / b

    def skipped(self, n, x, d):
        told = self.continued(n, x - self.sigmas[n] * d)
        if not self.group:
            self.before = self.right
        self.group.append((n, x, told))
        self.meant, self.told = x - self.sigmas[n] * d, told
        return told

    def computed(self, n, x, d):
        if not self.group:
            right = x - self.sigmas[n] * d
            told, known = self.continued(n, right), d
        else:
            told, right, known = self.solve(n, x, d)
        self.nodes, self.group = [*self.nodes, (n, known)][-NODES:], []
        self.right, self.meant, self.told = right, right, told
        return known, told

    def solve(self, n, x, d):
        skips, m = [j for j, *_ in self.group], len(self.group)
        size = 2 * m + 2            # x*_j and D*_j of the skips, then x*_n and d*_n
        matrix, constant = np.zeros((size, size)), np.zeros((size, x.size))
        places = [place for place, _ in self.nodes] + [n]
        first = self.group[0][1].ravel()        # where the group began nothing was wrong yet
        matrix[0, 0], constant[0] = 1, first
        for k, j in enumerate(skips):
            a, b, e = self.solver(self.sigmas, j)
            # the polynomial through the nodes at j, from their Vandermonde matrix
            weights = np.linalg.solve(np.vander(places, increasing=True).T, np.power(float(j), np.arange(len(places))))
            row = 1 + k             # D*_j - x*_j + sigma l_n d*_n = -sigma sum_known
            matrix[row, m + 1 + k], matrix[row, k], matrix[row, -1] = 1, -1, self.sigmas[j] * weights[-1]
            constant[row] = -self.sigmas[j] * sum(w * v.ravel() for w, (_, v) in zip(weights, self.nodes, strict=False))
            row = 1 + m + k         # x*_{j+1} - a x*_j - b D*_j - e D*_{j-1} = 0
            matrix[row, k + 1] = 1
            matrix[row, k] -= a
            matrix[row, m + 1 + k] -= b
            if k:
                matrix[row, m + k] -= e
            elif e:
                constant[row] += e * self.before.ravel()
        pull = (1 - self.kappa) / self.sigmas[n]
        matrix[-1, -1], matrix[-1, m], constant[-1] = 1, -pull, (d - pull * x).ravel()
        found = np.linalg.solve(matrix, constant).reshape(size, *x.shape)
        x_right, known, d_before = found[m], found[-1], found[2 * m]
        right = x_right - self.sigmas[n] * known
        a, b, e = self.solver(self.sigmas, n)
        told = (a * x_right + b * right + e * d_before - a * x - e * self.told) / b
        return told, right, known


def random_skips(generator: random.Random, steps: int) -> tuple[int, ...]:
    """Groups of 1 to 4 with 1 to 3 computed steps between them, the first and the last step computed."""
    skips, n = [], generator.randint(1, 3)
    while n < steps - 1:
        many = generator.randint(1, 4)
        skips += [j for j in range(n, n + many) if j < steps - 1]
        n += many + generator.randint(1, 3)
    return tuple(skips)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigmas", [flow(28), exploding(28), flow(40)[:29]], ids=SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_it_agrees_with_a_dense_linear_system_over_random_patterns(name, sigmas, dtype):
    solver, generator = SOLVERS[name], random.Random(f"{name} {len(sigmas)} {sigmas[0]}")
    worst = 0.0
    for seed in range(20):
        steps = len(sigmas) - 1
        skips = random_skips(generator, steps)
        path = Path(solver, sigmas, lambda n, seed=seed: randn(1000 * seed + n), generator.uniform(0, 0.9))
        back, dense = LookBack(solver, sigmas), Dense(solver, sigmas)
        scale = max(d.abs().max() for d in path.d).item()
        x = path.start
        before = None
        for n in range(steps):
            if n in skips:
                d = randn(1000 * seed + 500 + n)
                told, expected = back.skipped(n, d.to(dtype)).double(), dense.skipped(n, x.numpy(), d.numpy())
                expected = (x.numpy() - expected) / sigmas[n]
            else:
                d = (x - path.denoised(n, x)) / sigmas[n]
                (known, told), (right, expected) = back.computed(n, d.to(dtype)), dense.computed(n, x.numpy(), d.numpy())
                told, expected = told.double(), (x.numpy() - expected) / sigmas[n]
                worst = max(worst, np.abs(known.double().numpy() - right).max() / scale)
            worst = max(worst, np.abs(told.numpy() - expected).max() / max(scale, np.abs(expected).max()))
            a, b, e = solver(sigmas, n)
            now = torch.from_numpy(x.numpy() - sigmas[n] * expected)
            x = a * x + b * now + (e * before if e else 0.0)
            before = now
    assert worst < {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
