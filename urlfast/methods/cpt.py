"""CPT's transfer: a policy that was pre-trained without rewards helps to find those of a task, and to collect them.

Campos et al., "Coverage as a Principle for Discovering Transferable Behavior in Reinforcement Learning" (2021), algorithms 1 to 3 and
appendix J.2. Its first stage is NGU's reward alone (ngu.py); this is the second. pi_p, the pre-trained policy, is only used for acting,
and its weights stay as they are. The paper's table of values is lost from the text that we have: they are its sources' (Agent57, NGU,
eps-z-greedy), or ours where they say so.

    Q(o, .)     over A+ = A and a', "what pi_p does here, for one step"; random at first, learned by R2D2 from the task's reward
    evaluation  argmax_{A+} Q(o, .)
    acting      on a flight: pi_p(o);  else eps-greedy over A+;  then a' becomes pi_p(o), and a primitive action is executed either way
    flights     begin at any step outside of one with probability eps_levy, last n ~ n^-mu steps, and end with their episode;
                eps_levy is drawn once an episode
    learning    y_t by Peng's Q(lambda), whoever acted;   e_t what was chosen (a' on a flight), p_t the primitive action executed
                1/2 (Q(o_t, e_t) - y_t)^2, and where e_t is a' also 1/2 (Q(o_t, p_t) - y_t)^2: they are one action, so one return fits both

Both networks read every observation and every executed action, flying or not, so that neither memory has gaps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from urlfast import Field, SequenceReplay
from urlfast.learners.r2d2 import R2D2Config
from urlfast.limits import check_limits
from urlfast.methods import FREEZE, LOAD, RESET, Rule, check_parts, load_parts
from urlfast.methods.recurrent import RecurrentConfig, RecurrentTask


class Variant(NamedTuple):
    """A row of the paper's comparison: what it takes from the pre-trained run."""

    flights: Literal["policy", "action", "none"]
    extended: bool
    torso: Rule = RESET  # the convolutions
    q: Rule = RESET  # all behind them

    def table(self, parts) -> dict[str, Rule]:
        """The rule of each of a pre-trained method's saved parts. The target networks begin as what they are to follow."""
        named = {"encoder": self.torso, "encoder_target": self.torso, "q": self.q, "q_target": self.q}
        return {**dict.fromkeys(parts, RESET), **named}


VARIANTS = {  # rules of `urlfast transfer`
    "cpt": Variant("policy", True),
    "cpt-shared-torso": Variant("policy", True, torso=FREEZE),
    "exploitation": Variant("none", True),
    "exploration": Variant("policy", False),
    "frozen-torso": Variant("none", False, torso=FREEZE),
    "fine-tuning": Variant("none", False, torso=LOAD, q=LOAD),  # of all weights, where they are a recurrent agent's
    "eps-z-greedy": Variant("action", False),  # nothing is transferred: the paper's baseline beside eps-greedy
}


def acting(parts: dict[str, dict]) -> dict[str, dict]:
    """Of what a method has saved: all but what only its training needs."""
    learning = ("encoder_target", "q_target", "critic_target")
    return {name: state for name, state in parts.items() if name not in learning and not name.endswith("optimizer")}


# Flights --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlightConfig:
    """Exploratory flights: who acts on them, how often they begin, and how long they last."""

    # Who acts: the pre-trained policy; or a random action, drawn as eps-greedy draws one and then repeated (eps-z-greedy); or nobody.
    by: Literal["policy", "action", "none"] = "action"
    mu: float = 2.0  # a flight lasts n steps with a probability in proportion to n^-mu [eps-z-greedy]
    longest: int = 10_000  # steps of a flight at most [eps-z-greedy]
    epsilon: tuple[float, float] = (1e-4, 1e-1)  # bounds of an episode's probability to begin one at a step, log-uniform [ours]

    def __post_init__(self):
        check_limits(self, mu="> 0", longest="1..1000000", epsilon="0..1")
        low, high = self.epsilon
        if not 0 < low <= high:
            raise ValueError(f"epsilon: must be two numbers above 0, the smaller one first, got {low} {high}")


class Flights:
    """The flights of N environments. Vectorised: one call is one step of all of them."""

    def __init__(self, config: FlightConfig, generator: torch.Generator):
        """generator: on the CPU."""
        self.config, self.generator = config, generator
        weight = np.arange(1, config.longest + 1, dtype=np.float64) ** -config.mu
        self.cumulative = weight.cumsum() / weight.sum()  # P(length <= 1), P(length <= 2), ..
        self.cumulative[-1] = 1.0
        self.left = np.zeros(0, np.int64)  # steps that the running flights have before them
        self.epsilon = np.zeros(0)  # eps_levy of the running episodes

    def __call__(self, is_first: np.ndarray, begins: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(flying, begun), bool (N,) each: whether the coming step is one of a flight, and whether it is its first.

        is_first: (N,), where an episode begins. begins: (N,), where one not in flight begins to be; None: with eps_levy.
        """
        n = len(is_first)
        if len(self.left) != n:
            self.left, self.epsilon, is_first = np.zeros(n, np.int64), np.zeros(n), np.ones(n, bool)
        of_episode, of_step, of_length = torch.rand(3, n, generator=self.generator, dtype=torch.float64).numpy()
        low, high = self.config.epsilon
        self.epsilon = np.where(is_first, low * (high / low) ** of_episode, self.epsilon)
        left = np.where(is_first, 0, self.left)
        begun = (left == 0) & (of_step < self.epsilon if begins is None else begins)
        left = np.where(begun, 1 + self.cumulative.searchsorted(of_length, side="right"), left)
        flying = left > 0
        self.left = left - flying
        return flying, begun


# The agent -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CPTTaskConfig(RecurrentConfig):
    learner: R2D2Config = field(  # Of Q, with Peng's Q(lambda)
        default_factory=lambda: R2D2Config(target="peng", trace_lambda=0.7, adam_eps=1e-4, burn_in=0, target_period=1500)
    )
    flight: FlightConfig = field(default_factory=FlightConfig)
    extended: bool = False  # Q may also choose what the pre-trained policy does, for a step
    trace_length: int = 160  # steps of a sequence that are learned from [Agent57]
    period: int = 80  # steps from one sequence's start to the next one's; the rest of them overlap [Agent57]
    priority_exponent: float = 1.0  # a sequence is drawn in proportion to its priority to this power [CPT]
    learning_start: int = 500_000  # agent steps before the first update [Agent57: 6250 sequences]
    replay_capacity: int = 5_000_000  # rows: a step of an environment is one; the oldest make room [Agent57]

    def __post_init__(self):
        super().__post_init__()
        if self.extended and self.flight.by == "action":
            raise ValueError("extended: goes with flights of the pre-trained policy or with none, not with flight.by action")

    @property
    def follows(self) -> bool:
        """Whether pi_p acts."""
        return self.extended or self.flight.by == "policy"

    @staticmethod
    def small() -> "CPTTaskConfig":
        """For a run of few million steps, on few environments: R2D2's sequences, fewer of them before and in an update."""
        c = CPTTaskConfig(trace_length=80, period=40, batch_size=32, learning_start=80_000, replay_capacity=1_000_000)
        return replace(c, learner=replace(c.learner, burn_in=40))

    @staticmethod
    def toy() -> "CPTTaskConfig":
        """For small environments and short episodes."""
        c, toy = CPTTaskConfig(), RecurrentConfig.toy()
        same = {name: getattr(toy.learner, name) for name in ("torso", "lstm", "hidden", "lr", "burn_in", "target_period")}
        sizes = {name: getattr(toy, name) for name in ("trace_length", "period", "batch_size", "replay_ratio", "learning_start")}
        return replace(c, learner=replace(c.learner, **same), replay_capacity=toy.replay_capacity, **sizes)

    def after(self, pretrained, variant: Variant = VARIANTS["cpt"]) -> "CPTTaskConfig":
        """This config as that variant of a pre-trained method's: on networks of its shape, where it has them or they are taken over."""
        config = replace(self, flight=replace(self.flight, by=variant.flights), extended=variant.extended)
        if isinstance(pretrained.learner, R2D2Config):
            return RecurrentConfig.after(config, pretrained)
        return config if variant.torso == RESET else replace(config, encoder=pretrained.encoder)


class CPTTask:
    """The environment's reward, with the help of a pre-trained policy."""

    parts = (*RecurrentTask.parts, "pretrained")
    acting, fixed, statistics = RecurrentTask.acting, ("pretrained",), ()

    def __init__(
        self,
        config: CPTTaskConfig,
        observation_shape,
        actions,
        *,
        device="cpu",
        seed: int = 0,
        frame_stack: int = 4,
        make_policy: Callable[[dict], Any] | None = None,
    ):
        """make_policy: the method that a run's {method, domain, preset, config} describes, for these observations and actions.

        pi_p itself is the part "pretrained", for it has to be there again when a run is resumed: {"run": what make_policy takes,
        "parts": what that method saved of itself}.
        """
        self.config = config
        outputs = actions + 1 if config.extended and isinstance(actions, int) else None
        self.task = RecurrentTask(
            config, observation_shape, actions, device=device, seed=seed, frame_stack=frame_stack, num_outputs=outputs
        )
        if config.extended:
            self.task.columns = ("choice",)
        self.agent, self.device = self.task.agent, self.task.device
        self.flights = Flights(config.flight, self.agent.learner.generator)
        self.make_policy, self.run, self.policy = make_policy, {}, None
        self.choice = self.held = np.zeros(0, np.int64)  # e_t; the random actions that eps-z-greedy repeats
        self.seen = np.zeros(3, np.int64)  # since the last update: steps, those in flight, those that Q gave to pi_p

    def make_replay(self, num_envs: int, steps: int) -> SequenceReplay:
        """Raises ValueError where there is no pre-trained policy to follow."""
        if self.config.follows and self.policy is None:
            raise ValueError("flight: there is no pre-trained policy to follow; begin with `urlfast transfer RUN --rule cpt`")
        columns = {"choice": Field((), "int64")} if self.config.extended else {}
        return self.agent.make_replay(num_envs, steps, **columns)

    def act(self, step, explore: bool = True) -> np.ndarray:
        """Algorithm 3, for N environments; without explore, the evaluator's: greedy, no flights."""
        acted, by = self.agent.act(step, explore), self.config.flight.by
        flying = begun = np.zeros(len(step.is_first), bool)
        if explore and by != "none":
            flying, begun = self.flights(step.is_first, acted.at_random if by == "action" else None)
        if self.policy is not None:
            pilot = self.policy.act(step, explore=False)
        else:
            pilot = self.held = np.where(begun, acted.choice, self.held if len(self.held) == len(begun) else acted.choice)
        follow = self.agent.num_actions  # a', which Q knows where it is extended
        self.choice = np.where(flying, follow, acted.choice)
        action = np.where(self.choice == follow, pilot, acted.choice)
        self.took(action)
        self.agent.columns["mu"] = np.where(flying, np.float32(1), acted.mu)
        if explore:
            self.seen += [np.count_nonzero(~step.is_last & which) for which in (True, flying, ~flying & (self.choice == follow))]
        return action

    def took(self, actions: np.ndarray) -> None:
        """The primitive actions that were executed, for both memories."""
        self.agent.took(actions)
        if hasattr(self.policy, "took"):
            self.policy.took(actions)

    def observe(self, rows: dict[str, np.ndarray]) -> None:
        self.agent.observe(rows)
        if self.config.extended:
            rows["choice"] = self.choice if len(self.choice) == len(rows["action"]) else rows["action"]

    def initial_errors(self, batch, q: Tensor) -> Tensor:
        return self.task.initial_errors(batch, q)

    def update(self, replay: SequenceReplay) -> dict[str, Tensor]:
        """One gradient step on a batch of the replay. On a GPU the metrics hold until the next call."""
        metrics, (steps, flown, followed) = self.task.update(replay), self.seen.tolist()
        if steps:
            metrics |= {"flight_share": torch.tensor(flown / steps), "follow_share": torch.tensor(followed / steps)}
            self.seen[:] = 0
        return metrics

    def state_dict(self) -> dict[str, dict]:
        state = self.task.state_dict()
        if self.config.follows:
            state["pretrained"] = {"run": self.run, "parts": acting(self.policy.state_dict())}
        return state

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Raises ValueError where a part is missing or unknown."""
        load_parts(self, state, self.parts if self.config.follows else RecurrentTask.parts)

    def load_part(self, part: str, state: dict) -> None:
        """One part, of this or of a pre-trained method. Raises ValueError for a part that a task does not have."""
        if part != "pretrained":
            self.task.load_part(part, state)
            return
        self.run, self.policy = state["run"], self.make_policy(state["run"])
        own, parts = self.policy.state_dict(), acting(state["parts"])
        check_parts(parts, tuple(acting(own)))
        self.policy.load_state_dict(own | parts)

    def freeze(self, part: str) -> None:
        if part != "pretrained":  # which nothing here trains
            self.task.freeze(part)
