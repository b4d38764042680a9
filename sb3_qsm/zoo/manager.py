"""rl_zoo3's experiment manager, with checkpoints, resuming, checks of what the user gave, and studies that survive workers."""

import contextlib
import difflib
import inspect
import math
import os
import pickle
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import yaml
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, PartialFixedSampler
from optuna.storages._heartbeat import is_heartbeat_enabled
from optuna.trial import TrialState
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_qsm.common.checkpoint import CHECKPOINT_NAME, RunCheckpointCallback, read_info, resume
from sb3_qsm.qsm.qsm import CosineDecay
from sb3_qsm.zoo.errors import SETUP_MISTAKES, TRACEBACK_HINT, UserError
from sb3_qsm.zoo.registry import ALGORITHMS
from sb3_qsm.zoo.storage import experimental, fail_dead_trials, mark_worker, studies_with_heartbeat

# What rl_zoo3 itself takes out of the hyperparameters
_ZOO_NAMES = (
    "callback",
    "env_kwargs",
    "env_wrapper",
    "frame_stack",
    "monitor_kwargs",
    "n_envs",
    "n_timesteps",
    "noise_std",
    "noise_type",
    "normalize",
    "policy",
    "vec_env_wrapper",
)
# Arguments of the class that rl_zoo3 passes on from the command line
_COMMAND_LINE_NAMES = ("self", "env", "policy", "verbose", "seed", "device", "tensorboard_log", "_init_setup_model")


class ZooExperimentManager(ExperimentManager):
    """
    Takes the place of rl_zoo3's manager in ``sb3-qsm train``. Its additional settings are ``args.resume``,
    ``args.checkpoint_freq``, ``args.heartbeat`` and ``args.fixed``.
    """

    run_folder: Path | None = None
    """Folder of the run that goes on"""
    _made_folder = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._monitor_kwargs: dict[str, Any] = {}
        super().__init__(*args, **kwargs)
        if self.args.resume is not None:
            self.run_folder = Path(self.args.resume)
            self.save_path = str(self.run_folder)
            self.params_path = str(self.run_folder / self.env_name)
            self.continue_training = True
        self.lock: FileLock | None = None

    # rl_zoo3 sets this attribute in several places; none of them may make the monitor files start anew
    @property
    def monitor_kwargs(self) -> dict[str, Any]:
        """Arguments of the Monitor wrapper."""
        # It first sets the text of the configuration, and reads it back to make a dictionary of it
        if self.run_folder is None or not isinstance(self._monitor_kwargs, dict):
            return self._monitor_kwargs
        return {**self._monitor_kwargs, "override_existing": False}

    @monitor_kwargs.setter
    def monitor_kwargs(self, value: dict[str, Any]) -> None:
        self._monitor_kwargs = value

    # --- Hyperparameters

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the hyperparameters of a new run from the configuration, of an old one from its folder, and check the names."""
        if self.run_folder is not None:
            with open(Path(self.params_path) / "config.yml") as file:
                # As rl_zoo3 does it: the file holds Python objects
                saved = yaml.load(file, Loader=yaml.UnsafeLoader)
            return dict(saved), saved
        try:
            if self.trial_id == 0 and self.storage and self.study_name:
                # rl_zoo3 2.9.2 takes trial 0 for no trial
                trial = self.load_trial(self.storage, self.study_name, 0)
                self.custom_hyperparams = {**trial, **(self.custom_hyperparams or {})}
            hyperparams, saved = super().read_hyperparameters()
        except KeyError as error:
            if self.trial_id is None:
                raise
            raise UserError(
                f"argument --trial-id: trial {self.trial_id} is not one of {self.algo}: it has no {error}"
            ) from error
        self._keep_normalization(hyperparams, saved)
        if self.algo in ALGORITHMS:
            known = {*_ZOO_NAMES, *constructor_arguments(ALGOS[self.algo]).difference(_COMMAND_LINE_NAMES)}
            check_names(f"hyperparameter of {self.algo}", hyperparams, known, f" (from {self.config} and -params)")
            self._check_needed(hyperparams)
        return hyperparams, saved

    def _keep_normalization(self, hyperparams: dict[str, Any], saved: dict[str, Any]) -> None:
        """
        Write into the configuration how the agent that is trained on was normalized. rl_zoo3 normalizes so, but then neither
        saves the statistics with the run nor knows of them when the run is played or goes on.
        """
        path = Path(self.trained_agent).parent / self.env_name / "vecnormalize.pkl"
        if not self.trained_agent or not path.is_file():
            return
        try:
            # As trustworthy as the agent beside it
            stats: VecNormalize = pickle.loads(path.read_bytes())
            names = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys")
            settings = ", ".join(f"{name}={getattr(stats, name)!r}" for name in names)
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise UserError(f"argument --trained-agent: {str(path)!r} beside it is damaged: {error}") from error
        hyperparams["normalize"] = saved["normalize"] = f"dict({settings})"

    def _check_needed(self, hyperparams: dict[str, Any]) -> None:
        """Refuse hyperparameters without what rl_zoo3 needs, and make numbers of what YAML takes for text."""
        for name in ("policy", "n_timesteps"):
            if name not in hyperparams:
                raise UserError(f"{self.config} has no {name} for {self.env_name}, nor has -params")
        for name in ("n_timesteps", "n_envs"):
            value = hyperparams.get(name, 1)
            try:
                number = int(float(value))
            except (TypeError, ValueError, OverflowError):
                number = 0
            if number < 1 or isinstance(value, bool):
                raise UserError(f"{name} must be an integer >= 1, got {value!r} (from {self.config} and -params)")
            if name in hyperparams:
                hyperparams[name] = number

    def _preprocess_schedules(self, hyperparams: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """Let the actor's learning rate be a schedule too; rl_zoo3 knows the names of the others."""
        for name in ("learning_rate", "actor_learning_rate"):
            if isinstance(hyperparams.get(name), str):
                # YAML takes 3e-4 for text; it wants 3.0e-4
                with contextlib.suppress(ValueError):
                    hyperparams[name] = float(hyperparams[name])
        rate = hyperparams.get("actor_learning_rate")
        if isinstance(rate, str):
            kind, *numbers = rate.split("_")
            n_timesteps = self.n_timesteps if self.n_timesteps > 0 else int(hyperparams["n_timesteps"])
            if kind == "lin" and len(numbers) == 1:
                hyperparams["actor_learning_rate"] = super()._preprocess_schedules({"learning_rate": rate})["learning_rate"]
            elif kind == "cosine" and len(numbers) == 2:
                hyperparams["actor_learning_rate"] = CosineDecay(
                    float(numbers[0]), n_timesteps, int(float(numbers[1])), hyperparams.get("learning_starts", 0)
                )
            else:
                raise UserError(f"actor_learning_rate {rate!r} is none of NUMBER, lin_NUMBER, cosine_NUMBER_DECAYSTEPS")
        rate = hyperparams.get("learning_rate")
        if isinstance(rate, str) and not rate.startswith("lin_"):
            # rl_zoo3 takes every word before the underscore for "lin"
            raise UserError(f"learning_rate {rate!r} is none of NUMBER, lin_NUMBER")
        processed: dict[str, Any] = super()._preprocess_schedules(hyperparams)
        return processed

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        policy_name = hyperparams.get("policy")
        processed = super()._preprocess_hyperparams(hyperparams)
        policy_kwargs = processed[0].get("policy_kwargs") or {}
        policy = getattr(ALGOS[self.algo], "policy_aliases", {}).get(policy_name)
        if self.algo in ALGORITHMS and policy is not None:
            positional = ("self", "observation_space", "action_space", "lr_schedule")
            known = constructor_arguments(policy).difference(positional)
            check_names(f"name in policy_kwargs of {self.algo}'s {policy_name}", policy_kwargs, known)
        return processed

    # --- One run

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """
        Make everything that a run needs. Where that fails, nothing is left of the run: ``enjoy`` plays the newest one.

        :return: The model and the hyperparameters to save; None with a study
        """
        try:
            return super().setup_experiment()
        except BaseException as error:
            if self._made_folder:
                shutil.rmtree(self.save_path, ignore_errors=True)
            if isinstance(error, SETUP_MISTAKES):
                raise UserError(f"{type(error).__name__}: {error}{TRACEBACK_HINT}") from error
            raise

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        Make environments.

        :param n_envs: Number of environments
        :param eval_env: Whether they are for evaluation
        :param no_log: Whether they write no monitor files
        :return: The environments
        :raises UserError: if the environment refuses its arguments
        """
        try:
            env: VecEnv = super().create_envs(n_envs, eval_env, no_log)
        except TypeError as error:
            given = self.eval_env_kwargs if eval_env else self.env_kwargs
            if not given:
                raise
            # Without arguments of their own the environments of evaluations, which are made first, have those of the training
            own = eval_env and self.args.eval_env_kwargs is not None
            raise UserError(
                f"argument --{'eval-' if own else ''}env-kwargs: {self.env_name} does not take {given}: {error}"
            ) from error
        return env

    def create_log_folder(self) -> None:
        """Make the run's folder, and know whether it was this process that made it: two that begin together may share one."""
        os.makedirs(os.path.dirname(self.save_path), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.save_path)
            self._made_folder = True
        super().create_log_folder()  # type: ignore[no-untyped-call]

    def create_callbacks(self) -> None:
        """Add the checkpoints to rl_zoo3's callbacks, last, so that they contain the others' newest state."""
        super().create_callbacks()  # type: ignore[no-untyped-call]
        if self.optimize_hyperparameters or not self.args.checkpoint_freq or self.args.checkpoint_freq < 0:
            return
        if not issubclass(ALGOS[self.algo], OffPolicyAlgorithm):
            raise UserError(f"argument --checkpoint-freq: {self.algo} is not an off-policy algorithm and cannot be resumed")
        # Two processes that go on with the same run would write into the same files
        self.lock = FileLock(str(Path(self.save_path) / ".run.lock"))
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            hint = "argument --resume: " if self.run_folder is not None else ""
            again = "" if hint else ": start it again for a run of its own"
            raise UserError(f"{hint}another process is still training in {self.save_path!r}{again}") from error
        if not self.callbacks:
            # rl_zoo3 ends the first callback once more, also after an error or an interrupt, when a checkpoint must not change
            self.callbacks.append(ConvertCallback(None))
        self.callbacks.append(RunCheckpointCallback(self.args.checkpoint_freq, self.save_path, self.verbose))

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if self.run_folder is None:
            agent: BaseAlgorithm = super()._load_pretrained_agent(hyperparams, env)
            return agent
        algorithm = ALGOS[self.algo]
        assert issubclass(algorithm, OffPolicyAlgorithm)
        model = resume(
            algorithm, self.run_folder, env, self.device, verbose=self.verbose, tensorboard_log=self.tensorboard_log
        )
        print(f"Resuming at step {model.num_timesteps} of {self.n_timesteps}")
        return model

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if self.run_folder is None:
            super()._save_config(saved_hyperparams)
        else:
            # The run's own files stay as they are
            print(f"Log path: {self.save_path}")

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train, from where the model is.

        :param model: The model
        """
        if self.run_folder is None:
            try:
                super().learn(model)
            except Exception:
                if self._made_folder and getattr(model, "_n_updates", 1) == 0:
                    # Nothing was learned, and what there is would be taken for a run
                    if self.lock is not None:
                        self.lock.release()
                    shutil.rmtree(self.save_path, ignore_errors=True)
                raise
            return
        total = self.n_timesteps
        self.n_timesteps = max(total - model.num_timesteps, 0)
        log = read_info(self.run_folder).get("log")
        super().learn(_Continued(model, log))  # type: ignore[arg-type]
        self.n_timesteps = total

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """
        Save the model. The checkpoint of a finished run is of no more use, and as large as the replay buffer.

        :param model: The model
        """
        super().save_trained_model(model)
        if self.lock is not None:
            if model.num_timesteps >= self.n_timesteps and not self.args.keep_checkpoint:
                (Path(self.save_path) / CHECKPOINT_NAME).unlink(missing_ok=True)
            self.lock.release()
            Path(self.lock.lock_file).unlink(missing_ok=True)

    # --- A study

    def _create_sampler(self, sampler_method: str) -> BaseSampler:
        """rl_zoo3's sampler, of what is not fixed."""
        sampler = super()._create_sampler(sampler_method)
        fixed: dict[str, Any] = {}
        if self.algo in ALGORITHMS or self.args.fixed:
            space = self._search_space()
            fixed = fixed_values(self.args.fixed or [], space, self.algo)
            plain = self._hyperparams.get("optimize_memory_usage") or self._hyperparams.get("replay_buffer_class") is not None
            if plain and "n_steps" in space and fixed.setdefault("n_steps", 1) != 1:
                raise UserError(
                    "argument --fixed: n_steps must be 1 with optimize_memory_usage or a replay_buffer_class, got "
                    f"{fixed['n_steps']}: such a buffer has no n-step returns"
                )
        if not fixed:
            return sampler
        with experimental():
            return PartialFixedSampler(fixed, sampler)

    def _search_space(self) -> dict[str, BaseDistribution]:
        """What is searched, by name."""
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the study of which the user would read is not theirs
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
        optuna.logging.set_verbosity(verbosity)
        additional_args = {
            "using_her_replay_buffer": self._hyperparams.get("replay_buffer_class") is HerReplayBuffer,
            "her_kwargs": self._hyperparams.get("replay_buffer_kwargs", {}),
        }
        HYPERPARAMS_SAMPLER[self.algo](trial, self.n_actions, self.n_envs, additional_args)
        return trial.distributions

    def objective(self, trial: optuna.Trial) -> float:
        """
        Train and evaluate one sample of hyperparameters.

        :param trial: Optuna's trial
        :return: Mean return of the last evaluation
        :raises optuna.exceptions.TrialPruned: if the training diverged, or the sample is refused
        """
        mark_worker(trial)
        try:
            value: float = super().objective(trial)
        except ValueError as error:
            # What was sampled does not go with what was given, such as more sampling_steps than diffusion_steps
            print(f"Trial {trial.number} pruned: {error}")
            raise optuna.exceptions.TrialPruned(str(error)) from error
        if not math.isfinite(value):
            # Optuna would count it as failed, and try again without having learned anything
            print(f"Trial {trial.number} pruned: its return is {value}")
            raise optuna.exceptions.TrialPruned(f"mean return {value}")
        return value

    def hyperparameters_optimization(self) -> None:
        """
        Work on the study until it has its trials; those that a killed worker left unfinished are done again. There is no run:
        its folder, in which ``enjoy`` would look for a model, does not stay.
        """
        try:
            self._work_on_study()
        finally:
            files = {path.name for path in Path(self.save_path).rglob("*") if not path.name.endswith(".monitor.csv")}
            # A training that began at the same moment may share it
            if self._made_folder and files <= {str(self.env_name), "args.yml", "config.yml", "command.txt"}:
                shutil.rmtree(self.save_path, ignore_errors=True)

    def _work_on_study(self) -> None:
        heartbeat: int = self.args.heartbeat
        while True:
            with studies_with_heartbeat(heartbeat) as studies, _interrupts() as interrupts:
                try:
                    super().hyperparameters_optimization()
                except ValueError as error:
                    if studies and not studies[-1].get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                        raise UserError(f"no trial was completed: {_count_trials(studies[-1])}") from error
                    raise
            if (
                interrupts
                or self.max_total_trials is None
                or self.storage is None
                or not self._lost_trials(studies[-1], heartbeat)
            ):
                return
            print("Trials of a killed worker are done again")

    @staticmethod
    def _lost_trials(study: optuna.Study, heartbeat: int) -> int:
        """Trials whose worker is gone. One killed just now on another machine is known when its sign of life is overdue."""
        deadline = time.monotonic() + (3 * heartbeat if is_heartbeat_enabled(study._storage) else 0)
        while True:
            lost, unknown = fail_dead_trials(study)
            if lost or not unknown or time.monotonic() >= deadline:
                return lost
            time.sleep(min(1.0, heartbeat))


@contextlib.contextmanager
def _interrupts() -> Iterator[list[KeyboardInterrupt]]:
    """Know of an interrupt of a study, which rl_zoo3 keeps to itself."""
    real_optimize = optuna.Study.optimize
    interrupts: list[KeyboardInterrupt] = []

    def optimize(*args: Any, **kwargs: Any) -> None:
        try:
            real_optimize(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            interrupts.append(interrupt)
            raise

    with mock.patch.object(optuna.Study, "optimize", optimize):
        yield interrupts


class _Continued:
    """A model whose ``learn`` goes on counting, and logging into the same folder of TensorBoard."""

    def __init__(self, model: BaseAlgorithm, log: str | None) -> None:
        self._model = model
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def learn(self, total_timesteps: int, **kwargs: Any) -> BaseAlgorithm:
        model = self._model
        if model.tensorboard_log is not None and self._log is not None:
            # SB3 would take the newest folder, which may be another run's
            formats = ["stdout", "tensorboard"] if model.verbose >= 1 else ["tensorboard"]
            model.set_logger(configure(os.path.join(model.tensorboard_log, self._log), formats))
        return model.learn(total_timesteps, reset_num_timesteps=False, **kwargs)


def constructor_arguments(cls: type[BaseAlgorithm] | type[BasePolicy]) -> set[str]:
    """
    Names of the arguments of a class, including those that it hands on to its bases.

    :param cls: Class
    :return: Names
    """
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names.update(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names


def check_names(what: str, given: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """
    Refuse names that nothing will read.

    :param what: What the names are, for the message
    :param given: Names
    :param known: What is allowed
    :param where: Where they come from, for the message
    :raises UserError: naming the first unknown name and the nearest valid one
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"unknown {what}: {name!r}{where}; the nearest valid one is {near[0]!r}")


def fixed_values(given: Iterable[str], space: dict[str, BaseDistribution], algo: str) -> dict[str, Any]:
    """
    Read what ``--fixed`` takes out of a search.

    :param given: Texts ``NAME:VALUE``
    :param space: What is searched, by name
    :param algo: Name of the algorithm, for the message
    :return: Values by name
    :raises UserError: if a name is not searched, or a value is not one that the search could draw
    """
    fixed: dict[str, Any] = {}
    for text in given:
        name, colon, written = text.partition(":")
        if not colon:
            raise UserError(f"argument --fixed: {text!r} is not NAME:VALUE")
        check_names(f"name in --fixed, of what is searched for {algo}", [name], space)
        distribution = space[name]
        values: list[Any] = []
        if isinstance(distribution, CategoricalDistribution):
            values = [choice for choice in distribution.choices if str(choice) == written]
            allowed = ", ".join(map(str, distribution.choices))
        else:
            assert isinstance(distribution, (IntDistribution, FloatDistribution))
            with contextlib.suppress(ValueError):
                number = int(written) if isinstance(distribution, IntDistribution) else float(written)
                values = [number] if distribution.low <= number <= distribution.high else []
            allowed = f"{distribution.low} to {distribution.high}"
        if not values:
            raise UserError(f"argument --fixed: {name} must be a value that is searched ({allowed}), got {written!r}")
        fixed[name] = values[0]
    return fixed


def _count_trials(study: optuna.Study) -> str:
    states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "no trials"
