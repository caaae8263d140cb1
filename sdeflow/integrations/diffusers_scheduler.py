"""Any fixed-grid plan as a diffusers scheduler: `PlanScheduler`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from diffusers.utils.outputs import BaseOutput
except ImportError as error:
    raise ImportError(
        "sdeflow.integrations.diffusers_scheduler needs diffusers: pip install 'sdeflow[diffusers]'"
    ) from error

from sdeflow.checked import described, numbers, whole
from sdeflow.grids import GRIDS
from sdeflow.integrations.diffusers_config import kind_of, own_entries, read_config
from sdeflow.integrations.diffusers_grids import chosen_grid, time_of_told
from sdeflow.integrations.diffusers_model import from_diffusers
from sdeflow.integrations.plan_rows import (
    Given,
    Planned,
    RowRun,
    check_starts,
    plan_of,
    plan_record,
    rest_of,
    solver_of,
    text_of,
)
from sdeflow.integrations.seed_rows import SeedRows
from sdeflow.model import row_of
from sdeflow.noise import Noise, fresh_seed
from sdeflow.plan import Plan

_OWN = ("solver", "grid", "eta", "seed", "plan", "source")


@dataclass
class PlanSchedulerOutput(BaseOutput):
    """What `PlanScheduler.step` returns.

    Attributes:
        prev_sample: where the next model call is made, or the sample after the last one.
        pred_original_sample: x_0 as the model output predicts it (clipped, where the configuration says so); None
            where it does not say.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # theirs differ in a type of their own
    """A fixed-grid method of sdeflow with the protocol of a diffusers scheduler.

    `timesteps` has one entry a model call, so more than `num_inference_steps` for methods of several calls a step;
    every `step` makes one row of the plan. States are those of sdeflow: variance preserving for a table of betas,
    x_0 + sigma eps in EDM's preconditioning. Made by `from_scheduler`, `from_plan`, or with all entries by name.

    Args:
        solver: a constructor call as text, "DPMSolverPP(2)"; a fixed grid and a linear method.
        grid: None for the grid of the scheduler it replaces (`diffusers_grid`), the name of a function of `sf.grids`,
            or times from start to end.
        eta: stochasticity of the reversal that the solver integrates.
        seed: of the noise, which belongs to the sample: row i of a batch has its own. A `generator` given to `step`
            replaces it by its `initial_seed()`, a list of one a sample by theirs; with neither, one is drawn from
            torch's generator.
        plan: instead of solver, grid and eta: a plan as `Plan.save` writes it.
        source: the class of the scheduler whose entries the others are.

    The others are entries of diffusers schedulers with their meaning there.

    Raises:
        ValueError: no process in the entries, no such solver or grid, or a plan of another process.
    """

    order = 1
    """Timesteps that diffusers' pipelines count as one step: the most calls of a step of the plan."""

    @register_to_config
    def __init__(
        self,
        solver: str | None = None,
        grid: str | list[float] | None = None,
        eta: float = 0.0,
        seed: int | None = None,
        plan: dict[str, Any] | None = None,
        source: str | None = None,
        num_train_timesteps: int | None = None,
        beta_start: float | None = None,
        beta_end: float | None = None,
        beta_schedule: str | None = None,
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool | None = None,
        prediction_type: str | None = None,
        clip_sample: bool | None = None,
        clip_sample_range: float | None = None,
        thresholding: bool | None = None,
        dynamic_thresholding_ratio: float | None = None,
        sample_max_value: float | None = None,
        timestep_spacing: str | None = None,
        timestep_type: str | None = None,
        steps_offset: int | None = None,
        set_alpha_to_one: bool | None = None,
        final_sigmas_type: str | None = None,
        interpolation_type: str | None = None,
        lambda_min_clipped: float | None = None,
        use_karras_sigmas: bool | None = None,
        use_exponential_sigmas: bool | None = None,
        use_beta_sigmas: bool | None = None,
        use_lu_lambdas: bool | None = None,
        use_flow_sigmas: bool | None = None,
        shift: float | None = None,
        use_dynamic_shifting: bool | None = None,
        time_shift_type: str | None = None,
        shift_terminal: float | None = None,
        invert_sigmas: bool | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        sigma_schedule: str | None = None,
        rho: float | None = None,
        snr_shift_scale: float | None = None,
        scaler: float | None = None,
    ) -> None:
        config: dict[str, Any] = self.config
        entries = {key: value for key, value in config.items() if key not in _OWN and not key.startswith("_")}
        self._entries = read_config({**entries, "_class_name": source})
        if isinstance(self._entries.get("clip_sample"), bool) and clip_sample is None:
            self.register_to_config(clip_sample=self._entries["clip_sample"])
        self._named_grid, self._own_seed = grid, seed  # pipelines change the configuration
        self._given = Given()
        self._model = from_diffusers(self._given, self._entries)
        self._problem = self._model.gaussian.reverse(self._model, eta)
        self._solver: Planned | None = None
        if (solver is None) == (plan is None):
            raise ValueError("expected a solver, or a plan, and not both")
        if plan is not None and (grid is not None or eta != 0.0):
            raise ValueError("a plan has its own grid and eta: expected neither")
        if solver is not None and not isinstance(solver, str):
            raise TypeError(f"expected solver as text, such as 'DPMSolverPP(2)', got {described(solver)}")
        if seed is not None and not whole(seed):
            raise TypeError(f"expected seed as a whole number or None, got {described(seed)}")
        if grid is not None and not isinstance(grid, (str, list, tuple)):
            raise TypeError(f"expected grid as None, a name, or a list of times, got {described(grid)}")
        if isinstance(grid, str) and grid not in GRIDS:
            raise ValueError(f"unknown grid {grid!r}: expected None, times, or one of {', '.join(GRIDS)}")
        self.timesteps: Tensor | None = None
        self.num_inference_steps: int | None = None
        self._plan: Plan | None = None
        self._run: RowRun | None = None
        self._told = torch.empty(0)
        self._at = self._offset = self._begin = 0
        if plan is not None:
            made = plan_of(plan)
            if isinstance(made.eta, str):
                raise ValueError(f"expected a plan of a number as eta, got {made.eta}")
            self._problem = self._model.gaussian.reverse(self._model, made.eta or 0.0)
            self._use(made, None)
        else:
            assert solver is not None
            self._solver = solver_of(solver)
            self._solver.check(self._problem)
            if isinstance(grid, (list, tuple)):
                self._use(self._planned(numbers(grid, "grid")), None)

    # ---- constructors

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        solver: Planned | str,
        *,
        grid: str | Sequence[float] | Tensor | None = None,
        eta: float = 0.0,
        seed: int | None = None,
    ) -> Self:
        """A solver on the process of another scheduler, by default on the grid it visits.

        Args:
            scheduler: a scheduler, its config, or the path of a saved one.
            solver, grid, eta, seed: as for the class; a solver may be given as such.
        """
        times = grid if grid is None or isinstance(grid, str) else torch.as_tensor(grid, dtype=torch.float64).tolist()
        return cls(**own_entries(cls, scheduler, _OWN), solver=text_of(solver), grid=times, eta=eta, seed=seed)

    @classmethod
    def from_plan(cls, plan: Plan | str, scheduler: Any, *, seed: int | None = None) -> Self:
        """A plan, or the file of one, in the place of another scheduler.

        Args:
            plan: of the process of that scheduler, made by `solver.plan` or `sf.tune`, or the path it was saved at.
            scheduler: a scheduler, its config, or the path of a saved one.
        """
        plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        return cls(**own_entries(cls, scheduler, _OWN), plan=plan_record(plan), seed=seed)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; the entries that its class had by default stay what they are, not what they are here."""
        if isinstance(config, Mapping):
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
            if config.get("_class_name", cls.__name__) != cls.__name__:
                config.setdefault("source", config["_class_name"])
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # ---- the protocol

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the state at the start: 1, or sigma_max in EDM's preconditioning."""
        return self._model.gaussian.prior_std

    @property
    def step_index(self) -> int | None:
        """Model calls so far, from the first of `timesteps`; None before the first."""
        return None if self._run is None else self._at

    @property
    def begin_index(self) -> int:
        """The entry of `timesteps` at which sampling begins."""
        return self._begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at that entry of `timesteps` (image to image): the start of a step."""
        self._begin = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Plan a run, and set `timesteps`: what the network is told at each model call.

        Args:
            num_inference_steps: of the grid; a plan or a grid of times has its own number.
            timesteps: entries of the table to visit instead, descending; the last step goes to the data.
            sigmas: for a flow, its sigmas before the shift; the last step goes to the data.
            mu: the shift of a flow with `use_dynamic_shifting`.

        Raises:
            ValueError: another number of steps than the plan has, or a grid that the method cannot be planned on.
        """
        fixed = self._solver is None or isinstance(self._named_grid, (list, tuple))
        if fixed:
            assert self._plan is not None
            if timesteps is not None or sigmas is not None or mu is not None:
                raise ValueError("this scheduler has a grid of its own: expected no timesteps, sigmas or mu")
            if num_inference_steps is not None and num_inference_steps != self._plan.steps:
                raise ValueError(
                    f"this plan has {self._plan.steps} steps ({self._plan.nfe} model calls): expected "
                    f"num_inference_steps={self._plan.steps}, got {num_inference_steps}"
                )
            self._use(self._plan, device)
            return
        named = None if self._named_grid is None else str(self._named_grid)
        grid = chosen_grid(self._entries, named, num_inference_steps, timesteps, sigmas, mu)
        self._use(self._planned(grid), device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input: the sample, or in EDM's preconditioning c_in x = x/sqrt(sigma^2 + sigma_data^2)."""
        if kind_of(self._entries) != "edm":
            return sample
        if timestep is None:
            raise ValueError("expected the timestep, of which c_in is a function")
        own = self._plan is not None and self._at < len(self._told) and self._is(timestep, self._at)
        assert self._plan is not None or not own
        # the time itself, not what is left of it in a float32 timestep
        sigma = (
            self._plan.times[self._at] if own and self._plan else time_of_told(self._entries, torch.as_tensor(timestep))
        )
        return (1 / torch.sqrt(sigma.cpu() ** 2 + float(self._entries["sigma_data"]) ** 2)).to(sample.dtype) * sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PlanSchedulerOutput | tuple[Tensor, Tensor | None]:
        """One row of the plan.

        Args:
            model_output: of the shape of `sample`, or with twice its channels (a learned variance, of which the first
                half is taken).
            timestep: the entry of `timesteps` whose turn it is.
            sample: what the last `step` returned, or what the caller made of it.
            eta, use_clipped_model_output: arguments of DDIM's `step` that its pipelines pass; nothing but their
                defaults, as stochasticity belongs to the plan and clipping follows the configuration.
            generator: the seed of the noise is its `initial_seed()`, read at the first step. Of a list of one a sample
                each gives its sample the noise that it has alone, in a batch of one with that generator.

        Raises:
            ValueError: a timestep out of turn, a shape that changes, or arguments that the plan does not have.
        """
        if self.timesteps is None:
            raise ValueError("call set_timesteps first")
        if eta != 0.0 or use_clipped_model_output:
            raise ValueError(
                f"expected eta=0 and use_clipped_model_output=False, got {eta!r} and {use_clipped_model_output!r}: "
                "noise belongs to the plan (PlanScheduler's eta, or DDIM(eta=...) as solver)"
            )
        if self._run is None:
            self._start(timestep, sample, generator)
        assert self._run is not None
        self._check_turn(timestep, sample)
        k = self._at - self._offset
        x0 = self._run.x0(k, model_output, sample)
        previous = self._run.row(k, model_output, sample)
        self._at += 1
        if self._at == len(self._told):  # ready for another run on the same grid
            self._run = None
        return PlanSchedulerOutput(previous, x0) if return_dict else (previous, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise at timesteps (batch,), of the table or of a run, fractional ones included."""
        alpha, sigma = self._levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` as pipelines of flows call it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha noise - sigma x_0, what a network of "v_prediction" is trained on."""
        alpha, sigma = self._levels(timesteps, sample)
        return alpha * noise - sigma * sample

    def __len__(self) -> int:
        """Entries of the table."""
        return int(self._entries["num_train_timesteps"])

    # ---- within

    def _levels(self, timesteps: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at timesteps, in the dtype of x and shaped to broadcast against it."""
        t = time_of_told(self._entries, torch.as_tensor(timesteps).cpu()).reshape(-1, *[1] * (x.ndim - 1))
        process = self._model.gaussian
        if not bool(((t >= process.t0) & (t <= process.t1 * (1 + 1e-6))).all()):
            raise ValueError(f"expected timesteps of the process, got {torch.as_tensor(timesteps).tolist()}")
        t = t.clamp(max=process.t1)
        return process.alpha(t).to(x), process.sigma(t).to(x)

    def _planned(self, grid: Tensor) -> Plan:
        assert self._solver is not None
        if grid.ndim != 1 or grid.numel() < 2 or not bool((torch.diff(grid) < 0).all()):
            raise ValueError(f"expected two or more descending times, got {grid.tolist()}")
        process = self._model.gaussian
        if not (float(grid[0]) <= process.t1 * (1 + 1e-12) and float(grid[-1]) >= process.t0):
            raise ValueError(f"expected times in [{process.t0:g}, {process.t1:g}], got {grid.tolist()}")
        return self._solver.plan(self._problem, grid)

    def _use(self, plan: Plan, device: torch.device | str | None) -> None:
        """Make ready for a run by the plan."""
        plan.check(self._problem)
        check_starts(plan, plan.name)
        self._problem.evaluator(plan.target, plan.times)  # refuses times where the prediction does not determine it
        if self._unclipped is not self._model:
            process = self._model.gaussian
            self._unclipped.factors(plan.times, row_of("x0", process, plan.times))
        self._plan = plan
        self._told = self._told_at(plan.times)
        whole = bool((self._told == self._told.round()).all()) and kind_of(self._entries) == "table"
        self.timesteps = self._told.to(device or "cpu", torch.int64 if whole else torch.float32)
        self.num_inference_steps = plan.steps
        self.order = max(len(rows) for rows in plan._rows)
        self._run = None
        self._at = self._offset = self._begin = 0

    def _told_at(self, times: Tensor) -> Tensor:
        return torch.log(times) / 4 if kind_of(self._entries) == "edm" else self._unclipped.time_table(times)

    @property
    def _unclipped(self) -> Any:
        """The model under a clipping one: it knows what the network is told."""
        return self._model.net.parts["model"] if hasattr(self._model.net, "parts") else self._model

    def _start(self, timestep: Any, sample: Tensor, generator: Any) -> None:
        plan, begin = self._plan, self._begin
        assert plan is not None
        if begin == 0 and not self._is(timestep, 0):  # pipelines that begin late and do not say so
            found = [k for k in range(plan.nfe) if self._is(timestep, k) and (k == 0 or _starts(plan, k))]
            begin = found[0] if found else 0
        if begin:
            if self._solver is None:
                raise ValueError(
                    f"a plan begins at its own start, timestep {float(self._told[0]):g}, got {float(timestep):g}; a "
                    "scheduler of a solver (from_scheduler) can begin later"
                )
            plan = rest_of(self._solver, self._problem, plan.grid, begin, plan)
        noise = None
        if plan.draws_noise(self._problem):
            noise = self._noise(generator, sample)
        self._run = RowRun(plan, self._problem, sample, noise, self._given)
        self._at = self._offset = begin

    def _noise(self, generator: Any, sample: Tensor) -> Noise:
        batch, device = sample.shape[0], sample.device
        if generator is None:
            return Noise(fresh_seed() if self._own_seed is None else int(self._own_seed), batch, device=device)
        seeds = [int(g.initial_seed()) for g in (generator if isinstance(generator, (list, tuple)) else [generator])]
        if len(seeds) not in (1, batch):
            raise ValueError(f"expected one generator, or one a sample, {batch}, got {len(seeds)}")
        return Noise(seeds[0], batch, device=device) if len(seeds) == 1 else SeedRows(seeds, device)

    def _is(self, timestep: Any, k: int) -> bool:
        told = float(self._told[k])
        return abs(float(timestep) - told) <= 1e-5 * max(1.0, abs(told))

    def _check_turn(self, timestep: Any, sample: Tensor) -> None:
        assert self._run is not None
        if not self._is(timestep, self._at):
            raise ValueError(
                f"timestep out of turn: model call {self._at} is at {float(self._told[self._at]):g}, got "
                f"{float(timestep):g}; set_timesteps begins anew"
            )
        if sample.shape != self._run.shape:
            raise ValueError(f"expected a sample of shape {tuple(self._run.shape)}, got {tuple(sample.shape)}")


def _starts(plan: Plan, k: int) -> bool:
    return bool(plan.step_of_row[k] != plan.step_of_row[k - 1])
