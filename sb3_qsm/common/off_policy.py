"""What the algorithms with a diffusion policy have in common around their updates."""

import contextlib
import copy
import difflib
import inspect
import io
import json
import math
import os
import pathlib
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import (
    DictReplayBufferSamples,
    GymEnv,
    MaybeCallback,
    ReplayBufferSamples,
    Schedule,
)
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_qsm.common.buffers import cut_off_episodes
from sb3_qsm.common.checkpoint import resume
from sb3_qsm.common.checks import check_integer, check_number, whole
from sb3_qsm.common.files import BAD_ZIP, own_errors, replacing
from sb3_qsm.common.losses import Metrics, UpdateNoise
from sb3_qsm.common.policies import DiffusionActor, DiffusionPolicy, QCritic
from sb3_qsm.common.safe import load_safe, save_safe
from sb3_qsm.diffusion import NOISE_SCHEDULES, SAMPLERS

SelfDiffusionAlgorithm = TypeVar("SelfDiffusionAlgorithm", bound="DiffusionOffPolicyAlgorithm")

#: What stores a step of as many environments as the buffer was made for
_SB3_ADD = (ReplayBuffer.add, DictReplayBuffer.add, HerReplayBuffer.add)


class DiffusionOffPolicyAlgorithm(OffPolicyAlgorithm):
    """
    Base of the algorithms that train a diffusion policy from a replay buffer: their common arguments, exploration, checks of
    what the environment returns, logging, saving and loading. Subclasses bring ``train``.

    :param args: Arguments of SB3's ``OffPolicyAlgorithm``
    :param actor_learning_rate: Learning rate of the actor, a number or a schedule; by default ``learning_rate``
    :param diffusion_steps: Number of diffusion steps T
    :param noise_schedule: One of :data:`sb3_qsm.diffusion.NOISE_SCHEDULES`
    :param sampler: One of :data:`sb3_qsm.diffusion.SAMPLERS`
    :param sampling_temperature: Factor on the noise of the reverse process
    :param target_policy_noise: Standard deviation of the Gaussian noise added to the next action in the critic's target
    :param exploration_noise: Standard deviation of the Gaussian noise added to the scaled actions while collecting
    :param exploration_initial_eps: Probability that an action is uniformly random instead, at step 0; it falls linearly to
        zero. Until ``learning_starts`` all actions are random anyway
    :param exploration_decay_steps: Environment step at which that probability is zero
    :param kwargs: Arguments of SB3's ``OffPolicyAlgorithm``
    """

    policy: DiffusionPolicy
    actor: DiffusionActor
    critic: QCritic
    critic_target: QCritic

    #: An argument that no other algorithm has, by which saved models are told apart
    own_argument: ClassVar[str]

    def __init__(
        self,
        *args: Any,
        actor_learning_rate: float | Schedule | None,
        diffusion_steps: int,
        noise_schedule: str,
        sampler: str,
        sampling_temperature: float,
        target_policy_noise: float,
        exploration_noise: float,
        exploration_initial_eps: float,
        exploration_decay_steps: int,
        **kwargs: Any,
    ) -> None:
        supported: dict[str, Any] = {"sde_support": False, "supported_action_spaces": (spaces.Box,), "support_multi_env": True}
        super().__init__(*args, **(kwargs | supported))
        self.actor_learning_rate = actor_learning_rate
        self.diffusion_steps = diffusion_steps
        self.noise_schedule = noise_schedule
        self.sampler = sampler
        self.sampling_temperature = sampling_temperature
        self.target_policy_noise = target_policy_noise
        self.exploration_noise = exploration_noise
        self.exploration_initial_eps = exploration_initial_eps
        self.exploration_decay_steps = exploration_decay_steps
        # Whether an action was drawn whose transition is not stored yet
        self._step_is_open = False
        # Statistics of VecNormalize after the last good step
        self._statistics: dict[str, Any] | None = None

    def _check_choice(self, name: str, known: Iterable[str]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"Unknown {name} {value!r}; known ones: {', '.join(sorted(known))}")

    def _check_number(self, name: str, low: float, strict: bool = False, high: float = math.inf) -> None:
        check_number(name, getattr(self, name), low, strict, high)

    def _check_integer(self, name: str, low: int) -> None:
        check_integer(name, getattr(self, name), low)

    def _check_hyperparameters(self) -> None:
        """Refuse arguments out of their range, before anything is built."""
        self._check_choice("noise_schedule", NOISE_SCHEDULES)
        self._check_choice("sampler", SAMPLERS)
        for name in ("diffusion_steps", "batch_size", "buffer_size"):
            self._check_integer(name, 1)
        for name in ("sampling_temperature", "target_policy_noise", "exploration_noise"):
            self._check_number(name, 0.0)
        for name in ("exploration_initial_eps", "tau", "gamma"):
            self._check_number(name, 0.0, high=1.0)
        for name in ("learning_rate", "actor_learning_rate"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                self._check_number(name, 0.0)
        for name in ("learning_starts", "exploration_decay_steps"):
            # Stable-Baselines3 takes 1e4 too
            check_integer(name, whole(getattr(self, name)), 0)
        self._check_integer("gradient_steps", -1)
        check_integer("train_freq", self.train_freq[0] if isinstance(self.train_freq, tuple) else self.train_freq, 1)
        space = self.action_space
        # Stable-Baselines3 has refused all others
        assert isinstance(space, spaces.Box)
        if (space.low >= space.high).any():
            raise ValueError(
                f"action_space: each component's low must be below its high, got low={space.low} and high={space.high}"
            )
        twice = sorted(set(self._diffusion_kwargs()) & set(self.policy_kwargs))
        own = [name for name in twice if name not in inspect.signature(type(self)).parameters]
        if own:
            raise ValueError(f"policy_kwargs must not have {', '.join(own)}: {type(self).__name__} decides on that itself")
        if twice:
            raise ValueError(f"Pass {', '.join(twice)} to {type(self).__name__} itself, not in policy_kwargs")

    def _diffusion_kwargs(self) -> dict[str, Any]:
        """Arguments of the algorithm that the policy needs to act, also when it is saved alone."""
        return {
            "diffusion_steps": self.diffusion_steps,
            "noise_schedule": self.noise_schedule,
            "sampler": self.sampler,
            "sampling_temperature": self.sampling_temperature,
        }

    def _setup_model(self) -> None:
        self._check_hyperparameters()
        policy_kwargs = self.policy_kwargs
        self.policy_kwargs = {**self._diffusion_kwargs(), **policy_kwargs}
        try:
            super()._setup_model()
        finally:
            # The user's argument is stored as it was given
            self.policy_kwargs = policy_kwargs
        self._create_aliases()
        if self.actor_learning_rate is not None:
            self.actor_lr_schedule: Schedule | None = FloatSchedule(self.actor_learning_rate)
            update_learning_rate(self.actor.optimizer, self.actor_lr_schedule(1))
        else:
            self.actor_lr_schedule = None

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target

    def _optimizers(self) -> list[th.optim.Optimizer]:
        """Those that follow the learning rate."""
        return [self.actor.optimizer, self.critic.optimizer]

    def _update_learning_rates(self) -> None:
        """Set the learning rates of the optimizers to their schedules and log them."""
        self._update_learning_rate(self._optimizers())
        if self.actor_lr_schedule is not None:
            actor_learning_rate = self.actor_lr_schedule(self._current_progress_remaining)
            update_learning_rate(self.actor.optimizer, actor_learning_rate)
            self.logger.record("train/actor_learning_rate", actor_learning_rate)

    def _draw_noise(self, batch: ReplayBufferSamples | DictReplayBufferSamples) -> UpdateNoise:
        """All random numbers of a gradient step, in two calls of the global generator."""
        steps, shape = self.diffusion_steps, batch.actions.shape
        with_chain = self._target_has_chain_noise()
        normal = th.randn((steps if with_chain else 0) + 3, *shape, device=self.device)
        t = th.randint(steps, shape[:1], device=self.device)
        chain = normal[1:-2] if with_chain else None
        return UpdateNoise(latent=normal[0], chain=chain, target=normal[-2], eps=normal[-1], t=t)

    def _target_has_chain_noise(self) -> bool:
        """Whether the next actions of the critics' target are drawn by the whole chain of ``sampler``, which has noise."""
        return True

    def _check_finite(self, name: str, metrics: Metrics) -> None:
        """
        Stop while the parameters are still those of before the step. On a GPU the look would wait for the device, so there
        it is left to :meth:`_log`, once for each call of ``train``.
        """
        if metrics[name].device.type == "cpu":
            self._require_finite(name, metrics[name].item())

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            saved = "Model and replay buffer can still be saved."
            if self.device.type != "cpu":
                saved = "The replay buffer can still be saved, but the model's parameters may be spoiled."
            raise ValueError(
                f"{name} is {value} at environment step {self.num_timesteps}, gradient step {self._n_updates}: check the "
                f"scale of rewards and observations and the learning rate. {saved}"
            )

    def _log(self, metrics: list[Metrics]) -> None:
        """Average the metrics over the gradient steps and move them off the device in one piece."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        names = list(dict.fromkeys(name for step in metrics for name in step))
        if not names:
            return
        values = [[step[name] for step in metrics if name in step] for name in names]
        means = th.stack([each[0] if len(each) == 1 else th.stack(each).mean() for each in values]).tolist()
        for name, mean in zip(names, means, strict=True):
            if name.endswith("loss"):
                self._require_finite(name, mean)
            self.logger.record(f"train/{name}", mean)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if action_noise is None and self.exploration_noise > 0:
            shape = (n_envs, *self.action_space.shape)  # type: ignore[misc]
            action_noise = NormalActionNoise(np.zeros(shape), np.full(shape, self.exploration_noise))
        self._step_is_open = True
        actions, buffer_actions = super()._sample_action(learning_starts, action_noise, n_envs)
        eps = self._exploration_eps()
        if eps > 0 and self.num_timesteps >= learning_starts:
            random = np.random.rand(n_envs) < eps
            buffer_actions[random] = np.random.uniform(-1.0, 1.0, buffer_actions[random].shape)
            actions = self.policy.unscale_action(buffer_actions)
        return actions, buffer_actions

    def _exploration_eps(self) -> float:
        """Probability of a random action at the present step."""
        decay = max(self.exploration_decay_steps, 1)
        return self.exploration_initial_eps * max(0.0, 1.0 - self.num_timesteps / decay)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        noise = self.action_noise
        if isinstance(noise, VectorizedActionNoise) and noise.n_envs != self.n_envs:
            # SB3 keeps what it made for another number of environments
            self.action_noise = noise.base_noise
        if self._step_is_open:
            # A callback or Ctrl-C stopped the last training between a step and its storing: the environments are a step ahead
            self._last_obs, self._step_is_open = None, False
        for optimizer in self._optimizers():
            made = self.policy.optimizer_class
            if isinstance(made, type) and not isinstance(optimizer, made):
                raise ValueError(
                    f"The optimizers must be of the policy's optimizer_class {made.__name__}, got {type(optimizer).__name__}: "
                    "a model with it could not be loaded. Pass policy_kwargs=dict(optimizer_class=...) instead"
                )
        if self.replay_buffer is not None:
            # SB3's own cannot store their steps; others, like that of DDiffPG, may have one row for each transition
            if type(self.replay_buffer).add in _SB3_ADD and self.replay_buffer.n_envs != self.n_envs:
                raise ValueError(
                    f"The replay buffer must be of as many environments as the model has, {self.n_envs}, got one of "
                    f"{self.replay_buffer.n_envs}"
                )
            if reset_num_timesteps or self._last_obs is None:
                cut_off_episodes(self.replay_buffer, self.n_envs)
        self._remember_statistics()
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        observation, self._last_obs = self._last_obs, None
        with self._finite_statistics():
            self._require_finite_from_env("observation", observation)
        self._last_obs = observation
        return result

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Go on with another environment, see :meth:`BaseAlgorithm.set_env`.

        :param env: The environment
        :param force_reset: Whether it is reset before the training goes on
        """
        super().set_env(env, force_reset)
        if isinstance(self.replay_buffer, HerReplayBuffer):
            # Which asks it for the rewards of other goals
            self.replay_buffer.env = self.env

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray[Any, Any],
        new_obs: np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]],
        reward: np.ndarray[Any, Any],
        dones: np.ndarray[Any, Any],
        infos: list[dict[str, Any]],
    ) -> None:
        # Before anything is stored: the buffer stays good and can be saved
        with self._finite_statistics():
            self._require_finite_from_env("reward", reward)
            self._require_finite_from_env("observation", new_obs)
            if self._vec_normalize_env is not None:
                # What the buffer gets; VecNormalize clips an infinity out of what it returns
                self._require_finite_from_env("reward", self._vec_normalize_env.get_original_reward())
                self._require_finite_from_env("observation", self._vec_normalize_env.get_original_obs())
            for done, info in zip(dones, infos, strict=True):
                # As SB3 asks for it
                if done and info.get("terminal_observation") is not None:
                    self._require_finite_from_env("terminal observation", info["terminal_observation"])
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._step_is_open = False

    def _remember_statistics(self) -> None:
        """Keep a copy of the statistics of VecNormalize, which counts each step before it can be looked at."""
        env = self._vec_normalize_env
        self._statistics = None
        if env is not None and env.training:
            # Its own: another attribute is looked up in what it wraps
            names = ("obs_rms", "ret_rms", "returns")
            self._statistics = copy.deepcopy({name: value for name, value in vars(env).items() if name in names})

    @contextlib.contextmanager
    def _finite_statistics(self) -> Iterator[None]:
        """Put the statistics back if this step is refused: they are part of the model that can still be saved."""
        try:
            yield
        except ValueError:
            for name, saved in (self._statistics or {}).items():
                found = vars(self._vec_normalize_env)[name]
                if isinstance(saved, np.ndarray):
                    found[:] = saved
                    continue
                # In place: an evaluation may share them
                for key in saved if isinstance(saved, dict) else [None]:
                    old, new = (saved, found) if key is None else (saved[key], found[key])
                    vars(new).update(vars(old))
            raise
        self._remember_statistics()

    def _require_finite_from_env(self, name: str, value: Any) -> None:
        """Stop at the first NaN or infinity that the environment returns."""
        if isinstance(value, dict):
            for key, entry in value.items():
                self._require_finite_from_env(f"{name}[{key!r}]", entry)
        elif not np.isfinite(value).all():
            raise ValueError(
                f"The environment returned a non-finite {name} at environment step {self.num_timesteps}: "
                f"{np.asarray(value).tolist()}. Nothing of this step was stored; model and replay buffer can still be saved."
            )

    def dump_logs(self) -> None:
        """Write log data, with the spread of the policy: the standard deviation of its samples at the current state."""
        if self._n_updates > 0 and self._last_obs is not None:
            self.logger.record("train/action_std", self._action_std())
        super().dump_logs()

    @th.no_grad()
    def _action_std(self, n_samples: int = 32) -> float:
        """Standard deviation of samples at the last observation, averaged over action dimensions and environments."""
        self.policy.set_training_mode(False)
        devices = [self.device] if self.device.type == "cuda" else []
        # Looking must not change the training that goes on
        with th.random.fork_rng(devices=devices):
            observation, _ = self.policy.obs_to_tensor(self._last_obs)  # type: ignore[arg-type]
            features = self.actor.features(observation)
            latents = self.actor.draw_latents(len(features), n=n_samples)
            actions = self.actor.sample(features.repeat(n_samples, 1), *latents, self.actor.sampling_steps)
        return actions.view(n_samples, len(features), -1).std(dim=0).mean().item()

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer, see :meth:`OffPolicyAlgorithm.load_replay_buffer`. No return of several steps runs on from its
        last episode into what the environments do next.

        :param path: Path to the file, or the file
        :param truncate_last_traj: With hindsight replay, whether to end the last episode, which was not finished, or to let it
            go on
        :raises ValueError: if its observations or actions are not of the model's shapes; the buffer that was there stays
        """
        before = self.replay_buffer
        try:
            super().load_replay_buffer(path, truncate_last_traj)
            self._check_replay_buffer(before)
        except BaseException:
            self.replay_buffer = before
            raise
        if self.replay_buffer is not None and not isinstance(self.replay_buffer, HerReplayBuffer):
            cut_off_episodes(self.replay_buffer, self.n_envs)

    def _check_replay_buffer(self, own: ReplayBuffer | None) -> None:
        """Refuse a loaded replay buffer of other shapes, and tell when its returns are of another length than the model's."""
        loaded = self.replay_buffer
        assert loaded is not None
        # Bounds may differ: those of VecNormalize are not those of what the buffer holds
        if loaded.obs_shape != get_obs_shape(self.observation_space) or loaded.action_dim != get_action_dim(self.action_space):
            raise ValueError(
                f"The replay buffer must be of {self.observation_space} and {self.action_space}, the spaces of the model, got "
                f"{loaded.observation_space} and {loaded.action_space}"
            )
        steps, own_steps = (getattr(buffer, "n_steps", 1) for buffer in (loaded, own))
        if own is not None and steps != own_steps:
            warnings.warn(
                f"The loaded replay buffer has returns of n_steps={steps}, and they are what is trained on now; the model was "
                f"made with n_steps={own_steps}",
                stacklevel=3,
            )

    @classmethod
    def resume(
        cls: type[SelfDiffusionAlgorithm],
        path: str | os.PathLike[str],
        env: GymEnv,
        device: th.device | str = "auto",
        **kwargs: Any,
    ) -> SelfDiffusionAlgorithm:
        """
        Go on with a run from its checkpoint, see :func:`sb3_qsm.common.checkpoint.resume`:
        ``model.learn(total_timesteps - model.num_timesteps, reset_num_timesteps=False)``.

        :param path: A run's folder or the checkpoint itself
        :param env: Environment like the one of the interrupted run, with ``VecNormalize`` around it if it had that
        :param device: Device of the networks
        :param kwargs: Further arguments of ``load``, such as ``tensorboard_log``
        :return: The model, with its replay buffer, random number generators and counters
        :raises CheckpointError: if there is no checkpoint, it is damaged, or does not fit the class or ``env``
        """
        return resume(cls, path, env, device, **kwargs)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model to a zip-file, see :meth:`BaseAlgorithm.save`. A file that is there is replaced when the new one is
        whole: a full disk or an interrupt leaves the old one.

        :param path: Path to the file (``.zip`` is added to a name without suffix) or a file-like object
        :param exclude: Names of attributes that should not be saved, besides the usual ones
        :param include: Names of attributes that should be saved although they usually are not
        :raises OSError: if it cannot be written, for instance because the disk is full
        """
        self._before_save()
        target = path if isinstance(path, io.BufferedIOBase) else pathlib.Path(path)
        if not isinstance(target, pathlib.Path):
            with own_errors():
                super().save(path, exclude, include)
            return
        with replacing(target if target.suffix else target.with_name(f"{target.name}.zip")) as file, own_errors():
            super().save(file, exclude, include)

    @classmethod
    def load(
        cls: type[SelfDiffusionAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfDiffusionAlgorithm:
        """
        Load the model from a zip-file, see :meth:`BaseAlgorithm.load`.

        :param path: Path to the file (or a file-like) where to load the agent from
        :param env: The new environment to run the loaded model on
        :param device: Device on which the code should run
        :param custom_objects: Dictionary of objects to replace upon loading
        :param print_system_info: Whether to print system info of the saved model and of the current system
        :param force_reset: Force call to ``reset()`` before training
        :param kwargs: Extra arguments to change the model when loading
        :return: New model instance with loaded parameters
        :raises ValueError: if the file is no saved model, is damaged, or was saved by another algorithm
        :raises TypeError: if an argument in ``kwargs`` is neither one of the constructor nor in the file
        """
        if not isinstance(path, io.BufferedIOBase) and pathlib.Path(path).is_dir():
            # As the command line leaves them: the file of a run beside a folder of the same name
            path = pathlib.Path(path).with_name(f"{pathlib.Path(path).name}.zip")
        saved = cls._check_saved_file(path)
        parameters = inspect.signature(cls).parameters
        for name in kwargs:
            # SB3 makes an attribute of whatever it is
            if name not in parameters and name not in saved and "kwargs" not in parameters:
                near = difflib.get_close_matches(name, parameters, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{cls.__name__} has no argument {name!r}{hint}")
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def save_safe(self, path: str | os.PathLike[str] | io.BufferedIOBase) -> None:
        """
        Write the model to a file that can be opened without trust, see :func:`sb3_qsm.common.safe.save_safe`.

        :param path: File to write (``.safetensors`` is added to a name without suffix) or a binary stream
        :raises ValueError: if something of the model cannot be expressed, such as a function as schedule; nothing is written
        :raises OSError: if it cannot be written, for instance because the disk is full; what was there is still there
        :raises ImportError: if safetensors is not installed
        """
        self._before_save()
        save_safe(self, path)

    def _before_save(self) -> None:
        """Bring arguments up to date that were changed on what was made from them."""

    @classmethod
    def load_safe(
        cls: type[SelfDiffusionAlgorithm],
        path: str | os.PathLike[str] | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        **kwargs: Any,
    ) -> SelfDiffusionAlgorithm:
        """
        Read a model that :meth:`save_safe` wrote, running no code of the file, see :func:`sb3_qsm.common.safe.load_safe`.

        :param path: File or a binary stream
        :param env: Environment to go on with; it is reset before training. None to predict only
        :param device: Device of the networks
        :param kwargs: Arguments of the constructor that replace those in the file, such as ``buffer_size``
        :return: The model
        :raises ValueError: if the file is no safe model, is damaged, says anything that is not allowed or does not fit ``env``
        :raises TypeError: if an argument in ``kwargs`` is not one of the constructor
        :raises ImportError: if safetensors is not installed
        """
        return load_safe(cls, path, env, device, **kwargs)

    @classmethod
    def _check_saved_file(cls, path: str | pathlib.Path | io.BufferedIOBase) -> dict[str, Any]:
        """Refuse a file that is no model of this algorithm, before anything in it is unpickled; what is saved, by name."""
        file = open_path(path, "r", verbose=0, suffix="zip")
        start = file.tell()
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
                data = json.loads(archive.read("data"))
        except BAD_ZIP as error:
            raise ValueError(f"{path} is not a saved model, or it is truncated or damaged: {error}") from error
        finally:
            if file is path:
                file.seek(start)
            else:
                file.close()
        if damaged is not None:
            raise ValueError(f"{path} is damaged: {damaged} in it does not match its checksum")
        if not isinstance(data, dict) or cls.own_argument not in data:
            policy = data.get("policy_class", {}) if isinstance(data, dict) else {}
            saved_by = policy.get("__module__", "another algorithm") if isinstance(policy, dict) else "another algorithm"
            raise ValueError(f"{path} was not saved by {cls.__name__} but by {saved_by}")
        return data

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor", "critic", "critic_target", "_loaded_statistics", "_statistics"]
